"""Logits of a probe text by the plainest path there is, against which a loaded checkpoint is held.

One block at a time, on one device, in float32, each filled with what a source says its whole weights are: no plan, no
slices, no paged cache. Shape suffixes as in `tpserve.model.llama`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from tpserve.convert.errors import ConvertError
from tpserve.convert.weights import Weight
from tpserve.model.args import ModelArgs
from tpserve.model.llama import Llama, RMSNorm, TransformerBlock
from tpserve.model.rope import rope_table

PROBE_TOKENS = 32


def probe_tokens(vocab_size: int) -> list[int]:
    """`PROBE_TOKENS` ids spread over the vocabulary, the first and the last among them; the same for the same size."""
    steps = PROBE_TOKENS - 1
    return [(i * 19 % PROBE_TOKENS) * (vocab_size - 1) // steps for i in range(PROBE_TOKENS)]


class CausalAttend:
    """Attention of one sequence that begins here: each token sees itself and those before it."""

    def __call__(self, layer: int, q_THE: torch.Tensor, k_TKE: torch.Tensor, v_TKE: torch.Tensor) -> torch.Tensor:
        """See `tpserve.model.llama.Attend`."""
        copies = q_THE.shape[1] // k_TKE.shape[1]
        k_THE, v_THE = (x.repeat_interleave(copies, dim=1) for x in (k_TKE, v_TKE))
        q, k, v = (x.transpose(0, 1)[None] for x in (q_THE, k_THE, v_THE))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)


@torch.no_grad()
def model_logits(model: Llama, tokens: Sequence[int]) -> torch.Tensor:
    """float32 [T, V] on the CPU: what a network, whole or this rank's part of a group's, says after each token."""
    device = model.norm.weight.device
    tokens_T = torch.tensor(tokens, device=device)
    logits: torch.Tensor = model(tokens_T, torch.arange(len(tokens), device=device), CausalAttend())
    return logits.float().cpu()


@torch.no_grad()
def plain_logits(
    args: ModelArgs, tensors: Sequence[Weight], tokens: Sequence[int], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """float32 [T, V] of whole tensors; one layer's are in memory at a time.

    Args:
        args: the network's numbers.
        tensors: every parameter.
        tokens: of the text.
        dtype: that the weights are rounded to first.

    Raises:
        ConvertError: a tensor is missing, or cannot be read; the message names it.
    """
    by_name = {tensor.name: tensor for tensor in tensors}

    h_TD = F.embedding(torch.tensor(tokens), _whole("tok_embeddings.weight", by_name, dtype))
    rope_TC2 = rope_table(args, len(tokens), "cpu")
    for i in range(args.n_layers):
        h_TD = plain_block(args, i, by_name, dtype)(h_TD, rope_TC2, CausalAttend())
    return F.linear(plain_norm(args, by_name, dtype)(h_TD), _whole("output.weight", by_name, dtype))


def plain_block(args: ModelArgs, layer: int, by_name: Mapping[str, Weight], dtype: torch.dtype) -> TransformerBlock:
    """One layer in float32 on the CPU, of whole tensors rounded to `dtype` first.

    Raises:
        ConvertError: see `plain_logits`.
    """
    with torch.device("meta"):
        block = TransformerBlock(args, layer)
    _fill(block, f"layers.{layer}.", by_name, dtype)
    return block


def plain_norm(args: ModelArgs, by_name: Mapping[str, Weight], dtype: torch.dtype) -> RMSNorm:
    """What stands before the head; see `plain_block`."""
    with torch.device("meta"):
        norm = RMSNorm(args.dim, args.norm_eps)
    _fill(norm, "norm.", by_name, dtype)
    return norm


def _fill(module: nn.Module, prefix: str, by_name: Mapping[str, Weight], dtype: torch.dtype) -> None:
    state = {name: _whole(prefix + name, by_name, dtype) for name in module.state_dict()}
    module.load_state_dict(state, assign=True)


def _whole(name: str, by_name: Mapping[str, Weight], dtype: torch.dtype) -> torch.Tensor:
    if name not in by_name:
        raise ConvertError(f"{name} is missing")
    tensor = by_name[name]
    return tensor.read(0, 0, tensor.shape[0], dtype).float()
