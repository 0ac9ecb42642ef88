"""The peer of `tpserve eval summarize`: Hugging Face's `transformers` on the same weights, written by our converter."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tpserve.convert.convert import convert
from tpserve.engine.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Generated:
    """One answer.

    Attributes:
        ids: without the token that ended it.
        seconds: that it took.
    """

    ids: list[int]
    seconds: float


class Transformers:
    """A checkpoint as `transformers` runs it: its own network and its own greedy `generate`, one prompt at a time.

    Args:
        checkpoint: of any form; it is converted to `--format hf`.
        folder: for that, empty.
        dtype: of weights and activations.
        device: cuda or cpu.
        threads: on a CPU.

    Attributes:
        name: with the version.

    Raises:
        ConfigError: the package is not there.
        ConvertError: the checkpoint cannot be converted.
    """

    def __init__(self, checkpoint: Path, folder: Path, dtype: str, device: str, threads: int) -> None:
        try:
            import transformers
        except ImportError as e:
            said = f"the comparison needs the extra `eval`: pip install 'tpserve[eval]' ({e}), or --transformers False"
            raise ConfigError(said) from None
        made = convert(checkpoint, folder / "hf", dtype=dtype, format="hf")
        logging: Any = transformers.logging
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        if device == "cpu":
            torch.set_num_threads(threads)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(made)
        self._model = model.to(device=device, dtype=getattr(torch, dtype)).eval()
        self.name = f"transformers {transformers.__version__}"

    def generate(self, prompt_ids: Sequence[int], max_new_tokens: int, end_ids: Sequence[int]) -> Generated:
        """Greedy, until one of `end_ids` or so many tokens."""
        started_s = time.perf_counter()
        prompt = torch.tensor([list(prompt_ids)], device=self._model.device)
        with torch.inference_mode():
            whole = self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=list(end_ids) or None,
                pad_token_id=end_ids[0] if end_ids else 0,
            )
        ids: list[int] = whole[0, prompt.shape[1] :].tolist()
        seconds = time.perf_counter() - started_s
        return Generated(ids[:-1] if ids and ids[-1] in end_ids else ids, seconds)
