"""One block of memory for all weights: the same numbers, in huge pages where there are some."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

from tpserve.model.args import ModelArgs
from tpserve.model.huge_pages import consolidate, stacked
from tpserve.model.llama import Llama, TransformerBlock
from tpserve.model.quantized import quantize

ARGS = ModelArgs.from_params(
    {"dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 96, "multiple_of": 64, "norm_eps": 1e-5}
)
SMAPS = Path("/proc/self/smaps")


def llama(dtype: torch.dtype = torch.float32) -> Llama:
    torch.manual_seed(0)
    return Llama(ARGS, 64).to(dtype).eval()


def first(model: Llama) -> TransformerBlock:
    block = model.layers[0]
    assert isinstance(block, TransformerBlock)
    return block


def flags(address: int) -> list[str]:
    """Of the mapping that holds an address."""
    here = False
    for line in SMAPS.read_text().splitlines():
        head = line.split()
        if "-" in head[0] and not head[0].endswith(":"):
            begin, end = (int(part, 16) for part in head[0].split("-"))
            here = begin <= address < end
        elif here and head[0] == "VmFlags:":
            return head[1:]
    raise AssertionError(f"no mapping holds {address:x}")


@pytest.mark.parametrize("scheme", [None, "int8", "int4", "fp8"])
def test_every_number_is_where_it_was(scheme: str | None) -> None:
    model = llama(torch.bfloat16)
    if scheme is not None:
        quantize(model, scheme)
    before = {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    x = torch.randn(3, ARGS.dim, dtype=torch.bfloat16)
    with torch.inference_mode():
        said = first(model).feed_forward(x)
    consolidate(model)
    after = dict((*model.named_parameters(), *model.named_buffers()))
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name
    blocks = {tensor.untyped_storage().data_ptr() for name, tensor in after.items() if name != "rope_PC2"}
    assert len(blocks) == 1
    with torch.inference_mode():
        assert torch.equal(first(model).feed_forward(x), said)


def test_matrices_that_read_the_same_input_are_one() -> None:
    model = llama()
    attention, ffn = first(model).attention, first(model).feed_forward
    qkv = [linear.weight.detach().clone() for linear in (attention.wq, attention.wk, attention.wv)]
    with pytest.raises(ValueError, match="one below the other"):
        stacked(attention.wq.weight, attention.wk.weight)
    consolidate(model)
    assert torch.equal(stacked(attention.wq.weight, attention.wk.weight, attention.wv.weight), torch.cat(qkv))
    assert len(stacked(ffn.w1.weight, ffn.w3.weight)) == 2 * len(ffn.w1.weight)
    with pytest.raises(ValueError, match="one below the other"):
        stacked(ffn.w1.weight, ffn.w2.weight)


def test_tied_weights_stay_tied() -> None:
    model = llama()
    model.output.weight = model.tok_embeddings.weight
    expected = copy.deepcopy(model.output.weight.detach())
    consolidate(model)
    assert model.output.weight.data_ptr() == model.tok_embeddings.weight.data_ptr()
    assert torch.equal(model.output.weight, expected)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="huge pages are Linux's")
def test_huge_pages_are_asked_for() -> None:
    model = llama()
    assert "hg" not in flags(model.output.weight.data_ptr())
    consolidate(model)
    assert "hg" in flags(model.output.weight.data_ptr())
