"""`python -m tpserve.convert`: converts checkpoints; see `docs/convert.md`."""

from __future__ import annotations

import sys

import fire

from tpserve.convert.convert import convert
from tpserve.convert.errors import ConvertError

# `from` is a word of Python's, so no parameter can be called so.
_ALIASES = {"--from": "--ckpt_dir", "--to": "--out_dir"}


def run(
    ckpt_dir: str,
    out_dir: str,
    tokenizer_path: str | None = None,
    dtype: str | None = None,
    format: str = "dcp",
    mp: int | None = None,
    quantize: str | None = None,
) -> None:
    """Converts a checkpoint, whatever its form, to a folder that loads at any tensor-parallel size.

    Args:
        ckpt_dir: the checkpoint, such as a folder with consolidated.NN.pth and params.json; also --from.
        out_dir: the new folder; must not exist or be empty; also --to.
        tokenizer_path: the tokenizer; looked for in ckpt_dir and its parent when not given.
        dtype: float32, float16 or bfloat16; the checkpoint's own when not given.
        format: dcp, safetensors (both are served), hf (for `transformers`) or meta (consolidated.NN.pth).
        mp: number of shards of meta; 1 when not given.
        quantize: int8, int4 or fp8, of the blocks' matrices in dcp and safetensors; as they are when not given.
    """
    try:
        folder = convert(ckpt_dir, out_dir, tokenizer_path, dtype, format=format, mp=mp, quantize=quantize)
    except ConvertError as e:
        sys.stderr.write(f"error: {e}\n")
        raise SystemExit(2) from None
    sys.stderr.write(f"converted to {folder}\n")


def with_old_names(arguments: list[str]) -> list[str]:
    """The arguments with `--from` and `--to` as the parameters are called."""
    return [_ALIASES.get(name, name) + equals + value for name, equals, value in (a.partition("=") for a in arguments)]


def main() -> None:
    """Entry point: reads the flags as text, so that a folder named `7` stays a name."""
    texts = ("ckpt_dir", "out_dir", "tokenizer_path", "dtype", "format", "quantize")
    as_text = fire.decorators.SetParseFns(**dict.fromkeys(texts, str))
    fire.Fire(as_text(run), with_old_names(sys.argv[1:]), name="tpserve convert")


if __name__ == "__main__":
    main()
