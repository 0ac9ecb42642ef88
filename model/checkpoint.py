"""`model.json`: what a converted checkpoint folder says about itself. Free of torch: any process may read it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from tpserve.model.args import ModelArgs, ModelArgsError

FORMAT, SAFETENSORS_FORMAT, VERSION = "tpserve-dcp", "tpserve-safetensors", 1
MODEL_FILE = "model.json"
MANIFEST_FILE = "manifest.json"
DTYPES = ("float32", "float16", "bfloat16")
SCHEMES = ("int8", "int4", "fp8")


class CheckpointError(ValueError):
    """A folder that is not a usable converted checkpoint; the message names the file and what to do."""


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """The content of `model.json`.

    Attributes:
        args: the network's numbers.
        dtype: of the stored weights, one of `DTYPES`.
        tokenizer: name of the tokenizer's file in the folder; None: only token-id prompts are served.
        bos_token_id, eos_token_id: of that tokenizer; None without one.
        source: where the weights came from, for people.
        format: `FORMAT` or `SAFETENSORS_FORMAT`: how the weights lie in the folder.
        eos_token_ids: all that end a turn, where `eos_token_id` is not the only one; see `end_ids`.
        quantization: of the blocks' matrices as they are stored, one of `SCHEMES`; None: they are of `dtype`, too.
    """

    args: ModelArgs
    dtype: str
    tokenizer: str | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    source: dict[str, Any] = dataclasses.field(default_factory=dict)
    format: str = FORMAT
    eos_token_ids: tuple[int, ...] = ()
    quantization: str | None = None

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Every token that ends a turn, `eos_token_id` first."""
        first = () if self.eos_token_id is None else (self.eos_token_id,)
        return tuple(dict.fromkeys((*first, *self.eos_token_ids)))

    def write(self, folder: Path) -> None:
        """Writes `model.json` into `folder`."""
        fields = {"format": self.format, "version": VERSION, **dataclasses.asdict(self)}
        (folder / MODEL_FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> CheckpointInfo:
        """Reads and checks `folder/model.json`.

        Raises:
            CheckpointError: the folder or the file is missing, of another format, or contradicts itself.
        """
        path = folder / MODEL_FILE
        if not path.is_file():
            shards = sorted(folder.glob("consolidated.*.pth"))
            remedy = f"run: tpserve convert --ckpt_dir {folder} --out_dir …" if shards else "is it a converted folder?"
            raise CheckpointError(f"{path} does not exist; {remedy}")
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as e:  # not UTF-8, not JSON, a number of ten thousand digits, or too deep
            raise CheckpointError(f"{path} is not JSON ({e}); convert the checkpoint again") from None
        except OSError as e:
            raise CheckpointError(f"{path} cannot be read: {e.strerror}") from None
        if not isinstance(fields, dict) or fields.get("format") not in (FORMAT, SAFETENSORS_FORMAT):
            raise CheckpointError(
                f"{path} is not a {FORMAT} or {SAFETENSORS_FORMAT} file; convert the checkpoint again"
            )
        if fields.get("version") != VERSION:
            raise CheckpointError(f"{path} has version {fields.get('version')!r}, this release reads {VERSION}")
        try:
            info = cls(
                args=ModelArgs.from_dict(fields["args"]),
                dtype=fields["dtype"],
                tokenizer=fields.get("tokenizer"),
                bos_token_id=fields.get("bos_token_id"),
                eos_token_id=fields.get("eos_token_id"),
                source=fields.get("source", {}),
                format=fields["format"],
                eos_token_ids=_token_ids(fields.get("eos_token_ids", [])),
                quantization=fields.get("quantization"),
            )
        except (ModelArgsError, KeyError, TypeError) as e:
            raise CheckpointError(f"{path}: {e}") from None
        if info.dtype not in DTYPES:
            raise CheckpointError(f"{path}: dtype is {info.dtype!r}, not one of {', '.join(DTYPES)}")
        if info.quantization is not None and info.quantization not in SCHEMES:
            raise CheckpointError(f"{path}: quantization is {info.quantization!r}, not one of {', '.join(SCHEMES)}")
        if info.tokenizer is not None and Path(info.tokenizer).name != info.tokenizer:
            raise CheckpointError(f"{path}: tokenizer must be a file name in this folder, got {info.tokenizer!r}")
        return info


def _token_ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(i) is int and i >= 0 for i in value):
        raise TypeError(f"eos_token_ids must be a list of token ids, got {value!r}")
    return tuple(value)


def fingerprint(folder: Path) -> str:
    """Tells one content of a checkpoint folder from another: a hash of its model.json and of its manifest's sums."""
    digest = hashlib.sha256()
    for name in (MODEL_FILE, MANIFEST_FILE):
        with contextlib.suppress(OSError):
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:16]
