"""The decode step of a single sequence on a CPU, compiled by torch's Inductor: one function for all layers, one for the
head.

Such a step is bound by reading the weights. torch's own product of one row with a matrix reads them with one thread;
the same product written as a sum becomes a vectorised loop over the matrix' rows, shared among threads, at the memory's
speed. What stands between two products is merged into such loops; matrices that read the same input are one
(`huge_pages.stacked`). With more sequences torch's products are as good.

Shape suffixes: D residual width, O outputs, H query heads and K key/value heads, G = H / K, E head width, C = E / 2,
B blocks of the sequence, L slots in them, P positions of the rotary table, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from tpserve.model.huge_pages import stacked
from tpserve.model.kv_cache import PagedKVCache
from tpserve.model.llama import Llama, TransformerBlock
from tpserve.model.onednn import OneDnnLinear
from tpserve.model.quantized import Float8Linear, Int8Linear

_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "realize_opcount_threshold": 0,  # or a norm would be computed anew for every output of the product behind it
    "size_asserts": False,
    "alignment_asserts": False,
    "scalar_asserts": False,
    "cpp.enable_floating_point_contract_flag": "fast",  # products are added in one instruction: 2% of a step
    "cpp_wrapper": True,  # what stands around the loops takes as long in Python as one of them
}


class _Compiled:
    """A function that is called as the C++ that Inductor made of it, without what torch puts around it: checks,
    wrappers, a tensor of every size. A step of 7 ms spent 1 ms there, between the loops.

    Args:
        function: of tensors and numbers.
        dynamic: (argument, dimension) of the sizes that may change; the others and all numbers stay what they were.
    """

    def __init__(self, function: Callable[..., Any], dynamic: Sequence[tuple[int, int]] = ()) -> None:
        self._function, self._dynamic = function, dynamic
        self._call: Callable[[list[Any]], Any] | None = None
        self._sources: list[int | tuple[int, int]] = []  # of the compiled function's arguments: ours, or a size of ours

    def compile(self, *args: Any) -> Any:
        """Compiles for such arguments, and calls it.

        Args:
            args: none of them twice; dynamic sizes are neither one nor, where they may differ, equal.

        Raises:
            RuntimeError: the compiler failed.
        """
        from torch._inductor import compile_fx  # takes a second

        sizes = {args[i].shape[dim]: (i, dim) for i, dim in reversed(self._dynamic)}
        for i, dim in self._dynamic:
            torch._dynamo.mark_dynamic(args[i], dim)

        def inner_compile(graph: torch.fx.GraphModule, examples: Any, **how: Any) -> Any:
            compiled = compile_fx.compile_fx_inner(graph, examples, **how)
            call = getattr(compiled, "current_callable", None)
            if call is None:
                raise RuntimeError("this torch keeps what it compiled in another place")

            def first_call(given: list[Any]) -> Any:
                at = {id(arg): i for i, arg in enumerate(args)}
                try:
                    self._sources = [sizes[value] if isinstance(value, int) else at[id(value)] for value in given]
                except KeyError:
                    raise RuntimeError("the compiled function takes something else than it was given") from None
                self._call = call
                return call(given)

            compiled.current_callable = first_call  # type: ignore[attr-defined]
            return compiled

        def compiler(graph: torch.fx.GraphModule, examples: Any) -> Any:
            return compile_fx.compile_fx(graph, examples, inner_compile, _OPTIONS)

        # A graph from this cache would not come by `inner_compile`; what is made of it has a cache of its own.
        with torch._functorch.config.patch(enable_autograd_cache=False):
            return torch.compile(self._function, fullgraph=True, dynamic=False, backend=compiler)(*args)

    def __call__(self, *args: Any) -> Any:
        """As the function."""
        assert self._call is not None, "compile comes first"
        result = self._call(
            [args[at] if isinstance(at, int) else _number(args[at[0]].shape[at[1]]) for at in self._sources]
        )
        return result[0] if len(result) == 1 else result


@functools.lru_cache
def _number(value: int) -> torch.Tensor:
    """As the compiled functions take numbers; to make one takes as long as a small loop."""
    return torch.tensor(value)


class CompiledDecoder:
    """One token of one sequence.

    Args:
        model: on the CPU, `consolidate`d; `supports` says yes to it.
        cache: where keys and values live.
        tokens_RL, tables_RB: int64, the rows' tokens and block tables.

    Attributes:
        ready: whether `compile` was called.
    """

    def __init__(self, model: Llama, cache: PagedKVCache, tokens_RL: torch.Tensor, tables_RB: torch.Tensor) -> None:
        self.ready = False
        self._model, self._tokens_RL, self._tables_RB = model, tokens_RL, tables_RB
        self._places_B = torch.arange(tables_RB.shape[1])
        self._block_size, self._caches = cache.block_size, list(zip(cache.k, cache.v, strict=True))
        self._layers: list[tuple[torch.Tensor | None, ...]] = []
        for block in model.layers:
            attention, ffn = (block := cast(TransformerBlock, block)).attention, block.feed_forward
            self._layers.append(
                (*_matrix(attention.wq, attention.wk, attention.wv), *_matrix(attention.wo), *_matrix(ffn.w1, ffn.w3),
                 *_matrix(ffn.w2), block.attention_norm.weight.detach(), block.ffn_norm.weight.detach())
            )  # fmt: skip
        self._tables = model.tok_embeddings.weight.detach(), model.rope_PC2
        self._head_weights = model.norm.weight.detach(), model.output.weight.detach()
        self._begin = _Compiled(_begin, dynamic=((2, 0),))
        self._layer = _Compiled(_layer, dynamic=((4, 0), (5, 0), (6, 0), (7, 0)))
        self._head = _Compiled(_head)
        self._greedy = _Compiled(_greedy)

    @staticmethod
    def supports(model: Llama, max_blocks: int) -> bool:
        """Whether this model decodes so here: on a CPU, in float32 or bfloat16, and there is a C++ compiler.

        Weights may be of any scheme but int4, which lie in another order.
        """
        weight = model.output.weight
        parts = [part for block in model.layers for part in block.modules()]
        kinds = {type(part) for part in parts if isinstance(part, nn.Linear) or hasattr(part, "q_NK")}
        return (
            weight.device.type == "cpu"
            and weight.dtype in (torch.float32, torch.bfloat16)
            and (kinds in ({Int8Linear}, {Float8Linear}) or kinds <= {nn.Linear, OneDnnLinear})
            and max_blocks > 1
            and any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "g++"), "g++", "clang++"))
        )

    @torch.inference_mode()
    def compile(self) -> None:
        """Makes the functions, with a cache of its own.

        Raises:
            RuntimeError: the compiler failed.
        """
        (k_cache, v_cache), eps, slots = self._caches[0], self._model.norm.eps, 3 * self._block_size
        row, position = torch.zeros(2, 1, dtype=torch.int64).unbind()
        begun = self._begin.compile(
            row, position, self._places_B[:2], self._tokens_RL, self._tables_RB, *self._tables, self._block_size
        )
        caches = torch.zeros_like(k_cache[:slots]), torch.zeros_like(v_cache[:slots])
        h_D = self._layer.compile(*begun, *caches, eps, *self._layers[0])
        logits_V = self._head.compile(h_D, *self._head_weights, eps)
        self._greedy.compile(logits_V, row, position, self._tokens_RL.clone())  # into which it writes
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
        batch, eps = (self._places_B[:num_blocks], self._tokens_RL, self._tables_RB), self._model.norm.eps
        h_D, *step = self._begin(row, position, *batch, *self._tables, self._block_size)
        for weights, (k_cache, v_cache) in zip(self._layers, self._caches, strict=True):
            h_D = self._layer(h_D, *step, k_cache, v_cache, eps, *weights)
        logits_V: torch.Tensor = self._head(h_D, *self._head_weights, eps)
        return logits_V[None]

    def draw_greedy(self, logits_V: torch.Tensor, row: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Writes the most probable token to its place; int64 [1], that token, of equals the lowest id.

        Args:
            logits_V: float32.
            row, position: int64 [1], of the sequence and of the new token.
        """
        token: torch.Tensor = self._greedy(logits_V, row, position, self._tokens_RL)
        return token


def _matrix(*linears: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weights of layers that read the same input, one below the other, and their scales."""
    if isinstance(linears[0], Int8Linear | Float8Linear):
        return stacked(*(linear.q_NK for linear in linears)), stacked(*(linear.scale_N for linear in linears))  # type: ignore[arg-type]
    return stacked(*(linear.weight for linear in linears)), None  # type: ignore[arg-type]


def _begin(
    row: torch.Tensor,
    position: torch.Tensor,
    places_B: torch.Tensor,
    tokens_RL: torch.Tensor,
    tables_RB: torch.Tensor,
    embeddings_VD: torch.Tensor,
    rope_PC2: torch.Tensor,
    block_size: int,
) -> tuple[torch.Tensor, ...]:
    """What the layers need: the token's embedding [D], cosines and signed sines [E], its slot [1], and the slots it
    attends to [L] with what is added to their scores [L].
    """
    table_B, token = tables_RB[row, places_B], tokens_RL[row, position]
    own_E = torch.arange(2 * rope_PC2.shape[1])
    cos_E, sin_E = rope_PC2[position][0][own_E // 2].unbind(-1)
    at_L = torch.arange(len(table_B) * block_size)
    slots_L = table_B[at_L // block_size] * block_size + at_L % block_size
    seen_L = at_L <= position
    # What lies behind the sequence's end may be anything, and 0 · inf is nan: its own first slot stands there.
    slots_L = torch.where(seen_L, slots_L, slots_L[:1])
    bias_L = torch.where(seen_L, 0.0, -torch.inf)
    slot = table_B[position // block_size] * block_size + position % block_size
    return embeddings_VD[token][0].float(), cos_E, sin_E * (own_E % 2 * 2 - 1), slot, slots_L, bias_L


def _layer(
    h_D: torch.Tensor,
    cos_E: torch.Tensor,
    sin_E: torch.Tensor,
    slot: torch.Tensor,
    slots_L: torch.Tensor,
    bias_L: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    eps: float,
    wqkv_OD: torch.Tensor,
    sqkv_O: torch.Tensor | None,
    wo_DO: torch.Tensor,
    so_D: torch.Tensor | None,
    w13_OD: torch.Tensor,
    s13_O: torch.Tensor | None,
    w2_DF: torch.Tensor,
    s2_D: torch.Tensor | None,
    attention_norm: torch.Tensor,
    ffn_norm: torch.Tensor,
) -> torch.Tensor:
    """`TransformerBlock.forward`; activations stay float32. Behind each matrix: its rows' scales, where it has some."""
    _, kv_heads, width = k_cache.shape
    qkv_HE = _linear(_norm(h_D, attention_norm, eps), wqkv_OD, sqkv_O).view(-1, width)
    q_HE, k_KE, v_KE = torch.split(qkv_HE, [len(qkv_HE) - 2 * kv_heads, kv_heads, kv_heads])
    k_cache[slot] = _rotate(k_KE, cos_E, sin_E)[None].to(k_cache.dtype)
    v_cache[slot] = v_KE[None].to(v_cache.dtype)
    q_KGE = (_rotate(q_HE, cos_E, sin_E) * width**-0.5).view(kv_heads, -1, width)
    scores_KGL = torch.matmul(q_KGE, k_cache[slots_L].float().permute(1, 2, 0)) + bias_L
    attended_KGE = torch.matmul(scores_KGL.softmax(-1), v_cache[slots_L].float().transpose(0, 1))
    h_D = h_D + _linear(attended_KGE.flatten(), wo_DO, so_D)
    gate_F, up_F = _linear(_norm(h_D, ffn_norm, eps), w13_OD, s13_O).chunk(2)
    return h_D + _linear(F.silu(gate_F) * up_F, w2_DF, s2_D)


def _head(h_D: torch.Tensor, norm: torch.Tensor, output: torch.Tensor, eps: float) -> torch.Tensor:
    return _linear(_norm(h_D, norm, eps), output)


def _greedy(logits_V: torch.Tensor, row: torch.Tensor, position: torch.Tensor, tokens_RL: torch.Tensor) -> torch.Tensor:
    token = logits_V.argmax(dim=-1, keepdim=True)
    tokens_RL[row, position] = token
    return token


def _linear(x_D: torch.Tensor, weight_OD: torch.Tensor, scale_O: torch.Tensor | None = None) -> torch.Tensor:
    y_O = (x_D * weight_OD.float()).sum(-1)
    return y_O if scale_O is None else y_O * scale_O


def _norm(x_D: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    return x_D * torch.rsqrt(x_D.square().mean(-1, keepdim=True) + eps) * weight_D.float()


def _rotate(x_HE: torch.Tensor, cos_E: torch.Tensor, sin_E: torch.Tensor) -> torch.Tensor:
    """As `rope.apply_rope`: each number, and its neighbour with the other sign, by cosine and sine."""
    return x_HE * cos_E + x_HE[:, torch.arange(x_HE.shape[-1]) ^ 1] * sin_E
