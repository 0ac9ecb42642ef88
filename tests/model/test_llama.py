"""The network by itself: what it computes of a step of which few logits are asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tpserve.model.args import ModelArgs
from tpserve.model.llama import Llama

ARGS = ModelArgs(64, 3, 4, 2, 100, 128)


class Causal:
    """One prompt; notes which layers stored how many keys."""

    def __init__(self) -> None:
        self.stored: list[tuple[int, int]] = []

    def __call__(self, layer: int, q_THE: torch.Tensor, k_TKE: torch.Tensor, v_TKE: torch.Tensor) -> torch.Tensor:
        self.stored.append((layer, len(k_TKE)))
        q, k, v = (x.transpose(0, 1)[None] for x in (q_THE, k_TKE, v_TKE))
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


@pytest.mark.parametrize("asked", [[8], [0, 3, 3, 8], []])
@torch.inference_mode()
def test_the_last_block_goes_on_with_the_rows_that_are_asked_for(asked: list[int]) -> None:
    torch.manual_seed(1)
    model, tokens_T = Llama(ARGS).eval(), torch.randint(100, (9,))
    rows = [0] * ARGS.n_layers
    for i, block in enumerate(model.layers):

        def note(_: nn.Module, inputs: tuple[torch.Tensor, ...], i: int = i) -> None:
            rows[i] = len(inputs[0])

        block.feed_forward.register_forward_pre_hook(note)  # type: ignore[union-attr, operator]
    every, some = Causal(), Causal()
    whole = model(tokens_T, torch.arange(9), every)
    assert rows == [9, 9, 9]
    few = model(tokens_T, torch.arange(9), some, torch.tensor(asked, dtype=torch.int64))
    assert rows == [9, 9, len(asked)]
    assert some.stored == every.stored == [(0, 9), (1, 9), (2, 9)]
    torch.testing.assert_close(few, whole[asked], rtol=1e-5, atol=1e-6)
