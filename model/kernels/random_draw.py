"""Random draws: the tokens of `sampling.sample`, bit for bit, in one launch behind the greedy draws; where rows have
top_k or top_p, in five (`cut.py`).

Shape suffixes: N rows, V vocabulary, P programs of a row; R, L as in `engine/rows.py`.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from tpserve.model import philox
from tpserve.model.kernels.cut import COLUMNS, LOWEST, Cuts, is_cut, row_most, row_weight, token_key
from tpserve.model.kernels.draw import GreedyDraws
from tpserve.model.logits import SamplingBatch

_DRAW = tl.constexpr(philox.DRAW)


class RandomDraws:
    """Draws for any batch; one call after the other, for they share their scratch.

    Args:
        max_N: rows for which there is scratch; where they are more, it grows.
        vocab_size: of the logits; at most 2**18.
        tokens_RL: int64, where tokens are written.
    """

    def __init__(self, max_N: int, vocab_size: int, tokens_RL: torch.Tensor) -> None:
        assert vocab_size <= 2**18
        self._vocab_size, self._tokens_RL = vocab_size, tokens_RL
        # Launched early, a kernel waits for the one before it, whatever that is.
        self._pdl = tokens_RL.device.type == "cuda"
        self._arrived_N = torch.zeros(0)
        self._hold(max_N)

    def _hold(self, n: int) -> None:
        """Scratch for at least `n` rows."""
        if n <= len(self._arrived_N):
            return
        max_N, device = triton.next_power_of_2(n), self._tokens_RL.device
        parts = triton.cdiv(self._vocab_size, COLUMNS)
        self._greedy, self._cuts = GreedyDraws(max_N, self._tokens_RL), Cuts(max_N, device)
        self._parts_NP = torch.zeros(max_N, parts, dtype=torch.int64, device=device)
        self._arrived_N = torch.zeros(max_N, dtype=torch.int32, device=device)

    def greedy(self, logits_NV: torch.Tensor, rows_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        """Writes the most probable tokens into the rows, at those positions; int64 [N], overwritten by the next call.

        Args:
            logits_NV: float32, rows one behind the other.
            rows_N, positions_N: int64.
        """
        self._hold(len(rows_N))
        return self._greedy(logits_NV, rows_N, positions_N, pdl=self._pdl)

    def __call__(
        self, logits_NV: torch.Tensor, batch: SamplingBatch, rows_N: torch.Tensor, drawn: GreedyDraws | None = None
    ) -> torch.Tensor:
        """Writes the tokens into the rows, at the batch's positions; int64 [N], overwritten by the next call.

        Args:
            logits_NV: float32, rows one behind the other.
            batch: the rows' parameters; no top_k between `cut.MAX_TOP_K` and V.
            rows_N: int64.
            drawn: has just drawn from these logits; its tokens are overwritten where the temperature is not 0.
        """
        n, v = logits_NV.shape
        self._hold(n)
        if drawn is None:
            self.greedy(logits_NV, rows_N, batch.position_N)
            drawn = self._greedy
        if batch.any_filter:
            self._cuts(logits_NV, drawn.most_S, batch, pdl=self._pdl)
        if batch.any_random:
            parts = self._parts_NP.shape[1]
            _draw_kernel[(parts, n)](
                logits_NV, drawn.most_S, batch.temperature_N, batch.min_p_N, batch.top_k_N, batch.top_p_N, batch.seed_N,
                batch.position_N, rows_N, self._cuts.last_key_N, self._parts_NP, self._arrived_N,
                drawn.drawn_S, self._tokens_RL, self._tokens_RL.stride(0), V=v, C=COLUMNS,
                P=triton.next_power_of_2(parts), PDL=self._pdl, launch_pdl=self._pdl, num_warps=8,
            )  # fmt: skip
        return drawn.drawn_S[:n]

    def enqueue_all(self, logits_1V: torch.Tensor) -> None:
        """Every kernel, so that `compiled_together` sees them."""
        device = logits_1V.device

        def one(value: float, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.full((1,), value, dtype=dtype, device=device)

        batch = SamplingBatch(
            temperature_N=one(1, torch.float32),
            top_k_N=one(1),
            top_p_N=one(1, torch.float64),
            min_p_N=one(0, torch.float32),
            seed_N=one(0),
            position_N=one(0),
            any_random=True,
            any_filter=True,
            any_min_p=False,
        )
        self(logits_1V, batch, one(0))


@triton.jit
def _uniform(seed, position):
    """`sampling.uniform`."""
    word_0, word_1, _, _ = tl.philox(
        seed.to(tl.uint64), position.to(tl.uint32), (position >> 32).to(tl.uint32), tl.full((), 0, tl.uint32),
        tl.full((), _DRAW, tl.uint32),
    )  # fmt: skip
    return (((word_0 >> 5).to(tl.int64) << 26) | (word_1 >> 6).to(tl.int64)).to(tl.float64) * (2.0**-53)


@triton.jit
def _kept(cols, logit, most, temperature, min_p, last_key):
    """Weights of what is kept, 0 of the others."""
    return tl.where(token_key(logit, cols) >= last_key, row_weight(logit, most, temperature, min_p), 0)


@triton.jit(do_not_specialize=[
    "logits_ptr", "temperature_ptr", "min_p_ptr", "top_k_ptr", "top_p_ptr", "seed_ptr", "position_ptr", "rows_ptr",
    "tokens_stride",
])  # fmt: skip
def _draw_kernel(
    logits_ptr, most_ptr, temperature_ptr, min_p_ptr, top_k_ptr, top_p_ptr, seed_ptr, position_ptr, rows_ptr,
    last_key_ptr, parts_ptr, arrived_ptr, drawn_ptr, tokens_ptr, tokens_stride,
    V: tl.constexpr, C: tl.constexpr, P: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    part, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    parts = tl.num_programs(0)
    if PDL:
        gdc_wait()
    temperature, min_p = tl.load(temperature_ptr + n), tl.load(min_p_ptr + n)
    if temperature <= 0:
        return
    most = row_most(tl.load(most_ptr + n))
    cut = is_cut(tl.load(top_k_ptr + n), tl.load(top_p_ptr + n), V)
    last_key = tl.where(cut, tl.load(last_key_ptr + n), LOWEST)
    logits_ptr += n * V
    parts_ptr += n * parts
    cols = part * C + tl.arange(0, C)
    logit = tl.load(logits_ptr + cols, mask=cols < V, other=float("-inf"))
    tl.store(parts_ptr + part, tl.sum(_kept(cols, logit, most, temperature, min_p, last_key), 0))
    tl.debug_barrier()  # the store comes before the release
    if tl.atomic_add(arrived_ptr + n, 1, sem="acq_rel", scope="gpu") != parts - 1:
        return
    tl.store(arrived_ptr + n, 0)
    # The sums of parts first, so that one part is searched.
    position = tl.load(position_ptr + n)
    i = tl.arange(0, P)
    sums = tl.load(parts_ptr + i, mask=i < parts, other=0)
    total = tl.sum(sums, 0)
    target = (_uniform(tl.load(seed_ptr + n), position) * total.to(tl.float64)).to(tl.int64)
    target = tl.minimum(target, total - 1)  # the product may be rounded up
    place = tl.minimum(tl.sum((tl.cumsum(sums, 0) <= target).to(tl.int32), 0), parts - 1)
    target -= tl.sum(tl.where(i < place, sums, 0), 0)
    cols = place * C + tl.arange(0, C)
    logit = tl.load(logits_ptr + cols, mask=cols < V, other=float("-inf"))
    running = tl.cumsum(_kept(cols, logit, most, temperature, min_p, last_key), 0)
    token = (place * C + tl.sum((running <= target).to(tl.int32), 0)).to(tl.int64)
    token = tl.where(total > 0, tl.minimum(token, V - 1), 0)  # 0: nothing but -inf
    tl.store(drawn_ptr + n, token)
    tl.store(tokens_ptr + tl.load(rows_ptr + n) * tokens_stride + position, token)
