"""`python -m tpserve.convert`: converts Meta's Fairscale shards; see `docs/convert.md`."""

from __future__ import annotations

import sys

import fire

from tpserve.convert.convert import convert
from tpserve.convert.errors import ConvertError


def run(ckpt_dir: str, out_dir: str, tokenizer_path: str | None = None, dtype: str | None = None) -> None:
    """Converts Meta's consolidated.NN.pth shards to a checkpoint folder that loads at any tensor-parallel size.

    Args:
        ckpt_dir: folder with consolidated.NN.pth and params.json.
        out_dir: the new folder; must not exist or be empty.
        tokenizer_path: tokenizer.model; looked for in ckpt_dir and its parent when not given.
        dtype: float32, float16 or bfloat16; the checkpoint's own when not given.
    """
    try:
        folder = convert(ckpt_dir, out_dir, tokenizer_path, dtype)
    except ConvertError as e:
        sys.stderr.write(f"error: {e}\n")
        raise SystemExit(2) from None
    sys.stderr.write(f"converted to {folder}\n")


def main() -> None:
    """Entry point: reads the flags as text, so that a folder named `7` stays a name."""
    as_text = fire.decorators.SetParseFns(ckpt_dir=str, out_dir=str, tokenizer_path=str, dtype=str)
    fire.Fire(as_text(run), name="tpserve convert")


if __name__ == "__main__":
    main()
