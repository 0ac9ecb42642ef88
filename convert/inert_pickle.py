"""Shapes and dtypes out of files that `torch.save` or DCP pickled, without running what is in them. Free of torch.

Names are never looked up: each that a file of weights may ask for stands for an inert object of our own.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

from tpserve.convert.errors import ConvertError
from tpserve.convert.sniff import is_legacy_torch_file, why_not_torch_file

_STORAGES = {"FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16"}
_METADATA_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed._shard.sharded_tensor.metadata",
)
_MAX_PICKLE_BYTES = 256 << 20  # names, not weights: a 405B model's has under 1 MB


@dataclasses.dataclass(frozen=True)
class PickledTensor:
    """A tensor's shape, and its dtype by torch's name (`bfloat16`; None: one that weights do not have)."""

    shape: tuple[int, ...]
    dtype: str | None


class _Inert:
    """Whatever else is made: takes anything, does nothing, keeps its state."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __hash__(self) -> int:
        return id(self)


@dataclasses.dataclass(frozen=True)
class _Name:
    """A class or constant that a pickle names; calling it makes something inert."""

    module: str
    name: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.name == "_rebuild_tensor_v2":
            storage, shape = args[0], args[2]
            return PickledTensor(tuple(int(n) for n in shape), getattr(storage, "dtype", None))
        if self.name == "_rebuild_parameter":
            return args[0]
        if self.name == "Size":
            return tuple(args[0]) if args else ()
        if self.name == "OrderedDict":
            return dict(*args)
        return _Inert(*args)


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: str | None


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "collections" and name == "OrderedDict":
            return dict
        if module in _METADATA_MODULES:
            return _Inert
        if module in ("torch", "torch._utils", "torch.serialization") and "." not in name:
            return _Name(module, name)
        if module in ("pathlib", "pathlib._local") or (module, name) == ("builtins", "getattr"):  # of an enum's member
            return _Inert
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        kind = pid[1] if isinstance(pid, tuple) and len(pid) > 1 else None
        return _Storage(_STORAGES.get(kind.name) if isinstance(kind, _Name) else None)


def pickled_tensors(path: Path) -> dict[str, PickledTensor]:
    """The tensors of a file that `torch.save` wrote, by name.

    Raises:
        ConvertError: it is not a file of weights; the message names it.
    """
    reason = why_not_torch_file(path)
    if reason:
        raise ConvertError(f"{path} {reason}")
    try:
        if is_legacy_torch_file(path):
            with path.open("rb") as f:
                for _ in range(3):  # magic number, protocol, machine
                    _InertUnpickler(f).load()
                content = _InertUnpickler(f).load()
        else:
            with zipfile.ZipFile(path) as archive:
                record = next(i for i in archive.infolist() if i.filename.endswith("/data.pkl"))
                if record.file_size > _MAX_PICKLE_BYTES:
                    raise pickle.UnpicklingError(f"data.pkl has {record.file_size} bytes")
                content = _InertUnpickler(io.BytesIO(archive.read(record))).load()
    except OSError as e:
        raise ConvertError(f"{path} cannot be read: {e.strerror or e}") from None
    except Exception as e:  # noqa: BLE001 - a damaged pickle can raise anything
        reason = next(iter(str(e).splitlines()), "") or type(e).__name__
        raise ConvertError(f"{path} is not a plain file of weights ({reason}), and was not executed") from None
    if not isinstance(content, dict):
        raise ConvertError(f"{path} holds a {type(content).__name__}, not a dictionary of weights")
    return {str(name): tensor for name, tensor in content.items() if isinstance(tensor, PickledTensor)}


def dcp_tensor(path: Path, name: str) -> PickledTensor:
    """One tensor of a DCP folder's `.metadata`.

    Raises:
        ConvertError: the file is damaged, holds anything else, or lacks the tensor.
    """
    try:
        if path.stat().st_size > _MAX_PICKLE_BYTES:
            raise pickle.UnpicklingError(f"it has {path.stat().st_size} bytes")
        with path.open("rb") as f:
            tensors = _InertUnpickler(f).load().state["state_dict_metadata"]
        fields = tensors[name].state
        shape = tuple(int(n) for n in fields["size"])
        dtype = fields["properties"].state
        dtype = dtype["dtype"] if isinstance(dtype, dict) else dtype[0]
    except OSError as e:
        raise ConvertError(f"{path} cannot be read: {e.strerror}") from None
    except KeyError:
        raise ConvertError(f"{path} does not speak of {name}; these are not the weights of a Llama") from None
    except Exception as e:  # noqa: BLE001 - a damaged pickle can raise anything
        reason = next(iter(str(e).splitlines()), "") or type(e).__name__
        raise ConvertError(f"{path} is damaged or not metadata ({reason}), and was not executed") from None
    return PickledTensor(shape, dtype.name if isinstance(dtype, _Name) else None)
