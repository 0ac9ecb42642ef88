"""The command of the old TorchServe example: `torchrun --nproc-per-node N -m tpserve.convert.convert_checkpoints`.

There, N processes loaded a shard each. Here rank 0 converts alone and the others end at once: torchrun waits for
rank 0, and its failure is the job's. Without torchrun it works just as well.
"""

from __future__ import annotations

import os
import sys

import fire

from tpserve.convert.convert import convert
from tpserve.convert.errors import ConvertError


def run(
    original_ckpt_dir: str,
    save_checkpoint_dir: str,
    tokenizer_path: str | None = None,
    model_parallel_size: int | None = None,
    max_seq_len: int = 512,
    max_batch_size: int = 4,
) -> None:
    """Converts Meta's consolidated.NN.pth shards; takes the old example's flags.

    Args:
        original_ckpt_dir: folder with consolidated.NN.pth and params.json.
        save_checkpoint_dir: the new folder; must not exist or be empty.
        tokenizer_path: tokenizer.model; looked for in original_ckpt_dir and its parent when not given.
        model_parallel_size: must be the number of shards found, when given.
        max_seq_len: recorded in model_args.json, in tokens.
        max_batch_size: recorded in model_args.json, in sequences.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        return
    try:
        folder = convert(
            original_ckpt_dir,
            save_checkpoint_dir,
            tokenizer_path,
            model_parallel_size=model_parallel_size,
            legacy_args={"max_seq_len": max_seq_len, "max_batch_size": max_batch_size},
        )
    except ConvertError as e:
        sys.stderr.write(f"error: {e}\n")
        raise SystemExit(2) from None
    sys.stderr.write(f"converted to {folder}\n")


def main() -> None:
    """Entry point: reads paths as text, so that a folder named `7` stays a name."""
    as_text = fire.decorators.SetParseFns(original_ckpt_dir=str, save_checkpoint_dir=str, tokenizer_path=str)
    fire.Fire(as_text(run), name="convert_checkpoints")


if __name__ == "__main__":
    main()
