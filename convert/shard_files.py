"""Meta's `consolidated.NN.pth` files: finding them and opening them without reading the weights."""

from __future__ import annotations

import dataclasses
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch

from tpserve.convert.errors import ConvertError
from tpserve.convert.layout import is_dropped
from tpserve.convert.sniff import is_legacy_torch_file, why_not_torch_file

_SHARD_NAME = re.compile(r"consolidated\.(\d\d)\.pth")
_READ_BYTES = 1 << 20
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Shard:
    """One opened shard file.

    Attributes:
        path: the file.
        tensors: its weights by Meta's name, without the buffers that are dropped.
        mapped: whether the tensors' memory is the file itself, so that its pages may be given back at any time.
        stored: a tensor's name for each piece of memory, in the order in which they lie there; dropped ones, too.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    mapped: bool
    stored: tuple[str, ...]


def find_shards(ckpt_dir: Path) -> list[Path]:
    """The shard files of a folder in rank order.

    Raises:
        ConvertError: there is none, or one in the middle is missing; the message names it.
    """
    if not ckpt_dir.is_dir():
        raise ConvertError(f"{ckpt_dir} is not a folder; --ckpt_dir is the folder that holds consolidated.00.pth")
    found = {int(m[1]): p for p in ckpt_dir.iterdir() if (m := _SHARD_NAME.fullmatch(p.name))}
    if not found:
        hint = ""
        if any(ckpt_dir.glob("*.safetensors")):
            hint = "; it holds Hugging Face safetensors, and only Meta's own format is converted"
        raise ConvertError(f"{ckpt_dir} holds no consolidated.NN.pth{hint}")
    for rank in range(max(found) + 1):
        if rank not in found:
            raise ConvertError(f"{ckpt_dir / f'consolidated.{rank:02d}.pth'} is missing (found up to {max(found):02d})")
    return [found[rank] for rank in range(len(found))]


def open_shard(path: Path) -> Shard:
    """Opens one shard; zip-format files are mapped, not read. Unpickling is restricted to tensors (`weights_only`).

    Raises:
        ConvertError: it is not a file of weights; the message names the file and the key.
    """
    reason = why_not_torch_file(path)
    if reason:
        raise ConvertError(f"{path} {reason}")
    mapped = not is_legacy_torch_file(path)
    if mapped:
        _check_number(path)
    try:
        content = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except pickle.UnpicklingError as e:
        asked = re.search(r"GLOBAL ([\w.]+)", str(e))
        what = f"it asks for {asked[1]}" if asked else "its pickle is damaged"
        raise ConvertError(f"{path} is not a plain file of weights ({what}), and was not executed") from None
    except OSError as e:
        raise ConvertError(f"{path} cannot be read: {e.strerror or e}") from None
    except Exception as e:
        # A damaged pickle can make the unpickler raise almost anything.
        reason = next(iter(str(e).splitlines()), type(e).__name__)
        raise ConvertError(f"{path} cannot be loaded, it may be damaged: {reason}") from e
    if not isinstance(content, dict):
        raise ConvertError(f"{path} holds a {type(content).__name__}, not a dictionary of weights")
    for key, value in content.items():
        _check_weight(path, key, value)
    stored = {v.untyped_storage().data_ptr(): k for k, v in content.items() if v.layout == torch.strided}
    names = tuple(name for _, name in sorted(stored.items()))
    return Shard(path, {k: v.detach() for k, v in content.items() if not is_dropped(k)}, mapped, names)


def verify_shard(shard: Shard, on_bytes: Callable[[int], object] = lambda n: None) -> None:
    """Compares every record of a zip-format shard with the CRC-32 that `torch.save` gave it.

    Args:
        shard: one of a folder without `checklist.chk`; files of torch before 1.6 have no such sums and pass.
        on_bytes: called with the number of bytes of every piece.

    Raises:
        ConvertError: one differs; the message names the file and the key.
        OSError: of the disk.
    """
    if not shard.mapped:
        return
    with zipfile.ZipFile(shard.path) as archive:
        for record in archive.infolist():
            try:
                with archive.open(record) as f:  # compares at the end of the record
                    while piece := f.read(_READ_BYTES):
                        on_bytes(len(piece))
            except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, zlib.error):
                raise ConvertError(
                    f"{shard.path} is damaged: {_key(shard, archive, record)} does not have the CRC-32 that it was "
                    "saved with; download it again"
                ) from None


def _key(shard: Shard, archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> str:
    """The weight in a record: records lie in the file, and weights in the map of it, in the same order."""
    records = [r for r in archive.infolist() if r.filename.rpartition("/")[0].endswith("/data")]
    records.sort(key=lambda r: r.header_offset)
    if record not in records or len(shard.stored) != len(records):
        return f"its record {record.filename}"
    return shard.stored[records.index(record)]


def _check_number(path: Path) -> None:
    """`torch.save` calls the archive in a file after the file: shards that were exchanged are known by that."""
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].partition("/")[0]
    written = _SHARD_NAME.fullmatch(f"{root}.pth")
    if written is not None and _SHARD_NAME.fullmatch(path.name) and f"{root}.pth" != path.name:
        raise ConvertError(
            f"{path} was written as {root}.pth: were the shards exchanged? give them back their names, or download "
            "them again"
        )


def _check_weight(path: Path, key: object, value: object) -> None:
    if not isinstance(key, str):
        raise ConvertError(f"{path}: the key {key!r} is a {type(key).__name__}, not the name of a weight")
    if not isinstance(value, torch.Tensor):
        raise ConvertError(f"{path}: {key!r} is a {type(value).__name__}, not a tensor; is this a training checkpoint?")
    if is_dropped(key):
        return
    if value.dtype not in DTYPES or value.layout != torch.strided:
        raise ConvertError(
            f"{path}: {key} is {value.dtype} ({value.layout}); weights must be dense float32, float16 or bfloat16"
        )
