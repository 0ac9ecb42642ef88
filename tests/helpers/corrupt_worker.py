"""A rank of the real engine; rank 1 loads a weight wrong: `python -m tests.helpers.corrupt_worker FOLDER`.

TPSERVE_TEST_CORRUPT says which: the parameter's name.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from tpserve.engine import group
from tpserve.engine.worker import run
from tpserve.model import loader

CORRUPT = "TPSERVE_TEST_CORRUPT"


def load_model(*arguments: Any, **options: Any) -> loader.LoadedModel:
    """The real one; then rank 1's slice is turned upside down."""
    loaded = loader.load_model(*arguments, **options)
    if loaded.tp.rank == 1:
        weight = loaded.model.state_dict()[os.environ[CORRUPT]]
        weight.copy_(torch.flip(weight, [0]))
    return loaded


if __name__ == "__main__":
    group.load_model = load_model
    run()
