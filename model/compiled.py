"""The decode step of a single sequence on a CPU, compiled by torch's Inductor: one function for all layers, one for the
head.

Such a step is bound by reading the weights. torch's own product of one row with a matrix reads them with one thread;
the same product written as a sum becomes a vectorised loop over the matrix' rows, shared among threads, at the memory's
speed. What stands between two products is merged into such loops. With more sequences torch's products are as good.

Shape suffixes: D residual width, O outputs, H query heads and K key/value heads, G = H / K, E head width, C = E / 2,
B blocks of the sequence, L = B · S positions in them, S tokens of a block, M blocks of the cache, V vocabulary.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F

from tpserve.model.kv_cache import PagedKVCache
from tpserve.model.llama import Llama, TransformerBlock

_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "realize_opcount_threshold": 0,  # or a norm would be computed anew for every output of the product behind it
    "size_asserts": False,
    "alignment_asserts": False,
    "scalar_asserts": False,
}


class CompiledDecoder:
    """One token of one sequence.

    Args:
        model: on the CPU; `supports` says yes to it.
        cache: where keys and values live.
        tokens_RL, tables_RB: int64, the rows' tokens and block tables.

    Attributes:
        ready: whether `compile` was called.
    """

    def __init__(self, model: Llama, cache: PagedKVCache, tokens_RL: torch.Tensor, tables_RB: torch.Tensor) -> None:
        self.ready = False
        self._model, self._tokens_RL, self._tables_RB = model, tokens_RL, tables_RB
        self._block_size = cache.block_size
        shape = (cache.num_blocks, cache.block_size, *cache.k[0].shape[1:])
        self._caches = [(k.view(shape), v.view(shape)) for k, v in zip(cache.k, cache.v, strict=True)]
        self._layers = []
        for block in model.layers:
            attention, ffn = (block := cast(TransformerBlock, block)).attention, block.feed_forward
            self._layers.append(
                (attention.wq.weight, attention.wk.weight, attention.wv.weight, attention.wo.weight, ffn.w1.weight,
                 ffn.w3.weight, ffn.w2.weight, block.attention_norm.weight, block.ffn_norm.weight)
            )  # fmt: skip
        self._layer = torch.compile(_layer, fullgraph=True, options=_OPTIONS)
        self._head = torch.compile(_head, fullgraph=True, options=_OPTIONS)

    @staticmethod
    def supports(model: Llama, cache: PagedKVCache, max_blocks: int) -> bool:
        """Whether this model decodes so here: float32 or bfloat16 on a CPU, and a C++ compiler."""
        weight = model.output.weight
        return (
            weight.device.type == "cpu"
            and weight.dtype in (torch.float32, torch.bfloat16)
            and max_blocks > 1
            and any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "g++"), "g++", "clang++"))
        )

    @torch.inference_mode()
    def compile(self) -> None:
        """Makes the functions, with a cache of its own.

        Raises:
            RuntimeError: the compiler failed.
        """
        k_cache, v_cache = self._caches[0]
        with torch.inference_mode(k_cache.is_inference()):  # or it would be compiled again for the real one
            caches = [(torch.zeros_like(k_cache[:3]), torch.zeros_like(v_cache[:3]))]
        table_B = torch.arange(2)
        for tensor in (table_B, *caches[0]):
            torch._dynamo.mark_dynamic(tensor, 0)
        self._run(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), table_B, caches)
        self.ready = True

    def __call__(self, row: torch.Tensor, position: torch.Tensor, seq_len: int) -> torch.Tensor:
        """Runs one step.

        Args:
            row, position: int64 [1], of the sequence and of its token.
            seq_len: tokens of the sequence, this one among them.

        Returns:
            float32 logits [1, V].
        """
        num_blocks = max(2, -(-seq_len // self._block_size))  # a dimension of one would be a function of its own
        table_B = self._tables_RB[row, :num_blocks][0]
        # A copy, for it is an inference tensor like all others: for another kind everything would be compiled again.
        return self._run(self._tokens_RL[row, position], position.clone(), table_B, self._caches)

    def _run(
        self,
        token: torch.Tensor,
        position: torch.Tensor,
        table_B: torch.Tensor,
        caches: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        model = self._model
        eps = model.norm.eps
        h_D = model.tok_embeddings(token)[0].float()
        rope_C2 = model.rope_PC2[position][0]
        for weights, (k_cache, v_cache) in zip(self._layers, caches, strict=False):
            h_D = self._layer(h_D, rope_C2, position, table_B, k_cache, v_cache, eps, *weights)
        logits_V: torch.Tensor = self._head(h_D, model.norm.weight, model.output.weight, eps)
        return logits_V[None]


def _layer(
    h_D: torch.Tensor,
    rope_C2: torch.Tensor,
    position: torch.Tensor,
    table_B: torch.Tensor,
    k_MSKE: torch.Tensor,
    v_MSKE: torch.Tensor,
    eps: float,
    wq: torch.Tensor,
    wk: torch.Tensor,
    wv: torch.Tensor,
    wo: torch.Tensor,
    w1: torch.Tensor,
    w3: torch.Tensor,
    w2: torch.Tensor,
    attention_norm: torch.Tensor,
    ffn_norm: torch.Tensor,
) -> torch.Tensor:
    """`TransformerBlock.forward`; activations stay float32."""
    _, size, kv_heads, width = k_MSKE.shape
    x_D = _norm(h_D, attention_norm, eps)
    q_HE = _rotate(_linear(x_D, wq).view(-1, width), rope_C2)
    k_KE = _rotate(_linear(x_D, wk).view(kv_heads, width), rope_C2)
    v_KE = _linear(x_D, wv).view(kv_heads, width)
    block = table_B[position // size]
    k_MSKE[block, position % size] = k_KE.to(k_MSKE.dtype)
    v_MSKE[block, position % size] = v_KE.to(v_MSKE.dtype)
    q_KGE = (q_HE * width**-0.5).view(kv_heads, -1, width)
    h_D = h_D + _linear(_attend(q_KGE, k_MSKE, v_MSKE, table_B, position), wo)
    x_D = _norm(h_D, ffn_norm, eps)
    return h_D + _linear(F.silu(_linear(x_D, w1)) * _linear(x_D, w3), w2)


def _attend(
    q_KGE: torch.Tensor, k_MSKE: torch.Tensor, v_MSKE: torch.Tensor, table_B: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """Attention of one query, scaled already; [H · E]."""
    seen_L = torch.arange(len(table_B) * k_MSKE.shape[1]) <= position
    k_LKE = k_MSKE[table_B].flatten(0, 1).float()
    scores_KGL = torch.matmul(q_KGE, k_LKE.permute(1, 2, 0)).masked_fill(~seen_L, -torch.inf)
    # What lies behind the sequence's end may be anything, and 0 · inf is nan.
    v_LKE = torch.where(seen_L[:, None, None], v_MSKE[table_B].flatten(0, 1).float(), 0.0)
    return torch.matmul(scores_KGL.softmax(-1), v_LKE.transpose(0, 1)).flatten()


def _head(h_D: torch.Tensor, norm: torch.Tensor, output: torch.Tensor, eps: float) -> torch.Tensor:
    return _linear(_norm(h_D, norm, eps), output)


def _linear(x_D: torch.Tensor, weight_OD: torch.Tensor) -> torch.Tensor:
    return (x_D * weight_OD.float()).sum(-1)


def _norm(x_D: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    return x_D * torch.rsqrt(x_D.square().mean(-1, keepdim=True) + eps) * weight_D.float()


def _rotate(x_HE: torch.Tensor, rope_C2: torch.Tensor) -> torch.Tensor:
    even, odd = x_HE.view(*x_HE.shape[:-1], -1, 2).unbind(-1)
    cos, sin = rope_C2.unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
