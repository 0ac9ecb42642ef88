"""The whole network, as single-device code. What tensor parallelism adds is applied from outside (`parallel.py`):
each rank then holds fewer heads, a slice of the feed-forward and of the vocabulary, and `all_reduce` / `gather` are
no longer the identity.

Shape suffixes: T tokens of all sequences laid end to end (no padding), D residual width, H query heads and K
key/value heads of this rank, E head width, F feed-forward width of this rank, N rows whose logits are asked for,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from tpserve.model.args import ModelArgs
from tpserve.model.head import head_product
from tpserve.model.rope import apply_rope, rope_table


class Attend(Protocol):
    """Stores the step's keys and values, and attends each query to what its sequence holds up to its position."""

    def __call__(self, layer: int, q_THE: torch.Tensor, k_TKE: torch.Tensor, v_TKE: torch.Tensor) -> torch.Tensor:
        """Returns [T, H, E]; query head h reads key/value head h // (H / K)."""
        ...


def identity(x: torch.Tensor) -> torch.Tensor:
    """What a collective is on one device."""
    return x


class RMSNorm(nn.Module):
    """Root-mean-square normalisation in float32 (Zhang and Sennrich, 2019); gives the weight's type."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        x = x_TD.float()
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight).type_as(self.weight)


class Attention(nn.Module):
    """Grouped-query self-attention; `attend` owns the cache and the mask."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, args.head_dim
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)
        self.all_reduce: Callable[[torch.Tensor], torch.Tensor] = identity

    def forward(
        self, x_TD: torch.Tensor, rope_TC2: torch.Tensor, attend: Attend, rows_N: torch.Tensor | None = None
    ) -> torch.Tensor:  # fmt: skip
        heads = (-1, self.head_dim)
        q_THE = apply_rope(self.wq(x_TD).unflatten(-1, heads), rope_TC2)
        k_TKE = apply_rope(self.wk(x_TD).unflatten(-1, heads), rope_TC2)
        v_TKE = self.wv(x_TD).unflatten(-1, heads)
        out_THE = attend(self.layer, q_THE, k_TKE, v_TKE)
        if rows_N is not None:
            out_THE = out_THE[rows_N]
        return self.all_reduce(self.wo(out_THE.flatten(-2)))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, "GLU Variants Improve Transformer", 2020)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.ffn_hidden_dim, bias=False)
        self.w2 = nn.Linear(args.ffn_hidden_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.ffn_hidden_dim, bias=False)
        self.all_reduce: Callable[[torch.Tensor], torch.Tensor] = identity

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        h_TF = F.silu(self.w1(x_TD)) * self.w3(x_TD)
        return self.all_reduce(self.w2(h_TF))


class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.attention = Attention(args, layer)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(
        self, h_TD: torch.Tensor, rope_TC2: torch.Tensor, attend: Attend, rows_N: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[T, D], or [N, D] of the rows that are asked for: of the others, keys and values are stored."""
        attended_ND = self.attention(self.attention_norm(h_TD), rope_TC2, attend, rows_N)
        h_ND: torch.Tensor = (h_TD if rows_N is None else h_TD[rows_N]) + attended_ND
        h_ND += self.feed_forward(self.ffn_norm(h_ND))
        return h_ND


def _embedding(rows: int, width: int) -> nn.Embedding:
    """As `nn.Embedding`, which for a tensor without memory would import torch's compiler first, in 0.7 s."""
    weight = torch.empty(rows, width)
    return nn.Embedding(rows, width, _weight=weight if weight.is_meta else nn.init.normal_(weight))


class Llama(nn.Module):
    """A Llama with Meta's parameter names.

    Args:
        args: its numbers.
        max_seq_len: positions that the rotary table covers.
    """

    rope_PC2: torch.Tensor

    def __init__(self, args: ModelArgs, max_seq_len: int = 2048) -> None:
        super().__init__()
        self.args, self.max_seq_len = args, max_seq_len
        self.tok_embeddings = _embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(args, i) for i in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.gather: Callable[[torch.Tensor], torch.Tensor] = identity
        self.register_buffer("rope_PC2", rope_table(args, max_seq_len, self.norm.weight.device), persistent=False)

    def forward(
        self,
        tokens_T: torch.Tensor,
        positions_T: torch.Tensor,
        attend: Attend,
        rows_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One step for any mix of prefill and decode tokens.

        Args:
            tokens_T: token ids.
            positions_T: each token's position in its own sequence, counted from 0.
            attend: where keys and values go and what each query sees.
            rows_N: which tokens' logits to return; None: all.

        Returns:
            float32 logits [N, V] (or [T, V]), the same on every rank.
        """
        h_TD = self.tok_embeddings(tokens_T).float()  # rounded after each of its additions, it would lose the last ones
        rope_TC2 = self.rope_PC2[positions_T]
        *first, last = self.layers
        for block in first:
            h_TD = block(h_TD, rope_TC2, attend)
        x_ND = self.norm(last(h_TD, rope_TC2, attend, rows_N))
        logits_NV = head_product(x_ND, self.output.weight) if x_ND.is_cuda else self.output(x_ND)
        return self.gather(logits_NV).float()
