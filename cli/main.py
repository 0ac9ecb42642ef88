"""The `tpserve` command: every subcommand is a thin function over a room's own."""

from __future__ import annotations

import sys
from typing import Any

import fire

from tpserve.engine.errors import TpserveError


def convert(ckpt_dir: str, out_dir: str, tokenizer_path: str | None = None, dtype: str | None = None) -> None:
    """Turns a Meta (Fairscale) checkpoint into the folder that tpserve loads at any tensor-parallel size.

    Args:
        ckpt_dir: folder with consolidated.NN.pth and params.json.
        out_dir: folder to make; must not exist.
        tokenizer_path: SentencePiece model; default: tokenizer.model in or above ckpt_dir.
        dtype: float32, float16 or bfloat16; default: the source's.
    """
    from tpserve.convert.convert import convert

    print(convert(ckpt_dir, out_dir, tokenizer_path, dtype))


def archive(checkpoint: str, **options: Any) -> None:
    """Packs a converted checkpoint for TorchServe with torch-model-archiver.

    Args:
        checkpoint: folder written by `tpserve convert`.
        options: config, model_name, version, export_path, archive_format (default | no-archive),
            tensor_parallel_size, force; see tpserve.handler.archive.archive.
    """
    from tpserve.handler.archive import archive

    made = archive(checkpoint, **options)
    print(f"{made.path} (from {made.config.name}, tensor-parallel size {made.tensor_parallel_size})")
    print(
        f"serve it: torchserve --start --ncs --model-store {made.path.parent} --models {made.models} "
        "--ts-config configs/config.properties"
    )


def demo(tensor_parallel_size: int = 2, checkpoint: str | None = None) -> None:
    """Converts the bundled checkpoint, serves it with TorchServe, streams a story, a chat and a batch, and stops.

    Args:
        tensor_parallel_size: 1, 2 or 4.
        checkpoint: another Fairscale folder than the bundled one.
    """
    from tpserve.cli.demo import run

    run(tensor_parallel_size, checkpoint)


def main() -> None:
    """Entry point of the `tpserve` command."""
    from tpserve.convert.errors import ConvertError
    from tpserve.model.args import ModelArgsError
    from tpserve.model.checkpoint import CheckpointError

    try:
        fire.Fire({"convert": convert, "archive": archive, "demo": demo}, name="tpserve")
    except (TpserveError, ConvertError, ModelArgsError, CheckpointError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
