"""Where top_k and top_p cut rows of logits: four launches, and nothing is sorted.

The mass of what is at least as large is measured at sixteen places, then at sixteen between two of those, and again;
the few tokens left between two places are listed and searched. Weights are integers, as in `sampling`, so that sums are
the same in any order, and what is kept is what `sampling.sample` keeps, bit for bit.

Shape suffixes: N rows, V vocabulary, L levels, P places, C tokens of a list.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_wait

from tpserve.model.logits import SamplingBatch

COLUMNS = 2048  # of a program
MAX_TOP_K = 1024  # leaves room in a list for what is between two places

_LISTED = 4096  # tokens of a list
_TILE = tl.constexpr(256)  # tokens that are looked at together; programs have whole tiles
_LEVELS, _PLACES = tl.constexpr(3), tl.constexpr(16)
_UNIT = tl.constexpr(2.0**-11)  # of distances from the largest logit: all of them are exact in float32
_ONE = tl.constexpr(2.0**44)
_IDS = tl.constexpr(2**18)
LOWEST, _HIGHEST = tl.constexpr(-(2**50)), tl.constexpr(2**50)  # no token's key
_FLOAT32_MIN = tl.constexpr(torch.finfo(torch.float32).min)


class Cuts:
    """Finds the cuts of up to `max_N` rows; one call after the other, for they share their scratch.

    Attributes:
        last_key_N: int64, the last call's: the smallest `token_key` that is kept.
    """

    def __init__(self, max_N: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.last_key_N = zeros(max_N, dtype=torch.int64)
        # What is counted or summed up is zero between calls.
        self._sums_NLP = zeros(max_N, _LEVELS.value, _PLACES.value, dtype=torch.int64)
        self._counts_NLP = zeros(max_N, _LEVELS.value, _PLACES.value)
        self._listed_N, self._arrived_N = zeros(max_N), zeros(max_N)
        self._values_NC, self._ids_NC = zeros(max_N, _LISTED, dtype=torch.float32), zeros(max_N, _LISTED)

    def __call__(self, logits_NV: torch.Tensor, most_N: torch.Tensor, batch: SamplingBatch, *, pdl: bool) -> None:
        """Args:
        logits_NV: float32, rows one behind the other; at most 2**18 a row.
        most_N: float32, the largest of each row.
        batch: the rows' parameters; no top_k between `MAX_TOP_K` and V. Rows without top_k and top_p, and greedy
            ones, are not cut, and not written.
        pdl: programmatic dependent launch: starts while the kernel before still runs.
        """
        n, v = logits_NV.shape
        # Measuring few tokens is spread over more programs.
        columns = COLUMNS // 4 if n * v <= 2**18 else COLUMNS
        row = (logits_NV, most_N, batch.temperature_N, batch.min_p_N, batch.top_k_N, batch.top_p_N)
        for level in range(_LEVELS.value):
            _measure_kernel[(triton.cdiv(v, columns), n)](
                *row, self._sums_NLP, self._counts_NLP, columns, V=v, LEVEL=level, PDL=pdl, launch_pdl=pdl, num_warps=8,
            )  # fmt: skip
        _cut_kernel[(triton.cdiv(v, COLUMNS), n)](
            *row, self._sums_NLP, self._counts_NLP, self._listed_N, self._values_NC, self._ids_NC, self.last_key_N,
            self._arrived_N, V=v, C=COLUMNS, LISTED=_LISTED, PDL=pdl, launch_pdl=pdl, num_warps=8, maxnreg=128,
        )  # fmt: skip


@triton.jit
def is_cut(top_k, top_p, V: tl.constexpr):
    """Of a random row; `SamplingBatch.any_filter` says whether there is one."""
    return (top_k < V) | (top_p < 1.0)


@triton.jit
def row_most(most):
    """What is taken off a row's logits; -inf less -inf would not be a number."""
    return tl.maximum(most, _FLOAT32_MIN)


@triton.jit
def _relative(logit, most, temperature):
    """Of the logarithm of the probability, to the most probable token's; rounded as `sampling` does."""
    return tl.div_rn(logit - most, temperature)


@triton.jit
def row_weight(logit, most, temperature, min_p):
    """`sampling._weights`; 0 for what is not a number."""
    probability = libdevice.exp(_relative(logit, most, temperature))
    return (tl.where(probability >= min_p, probability, 0.0) * _ONE).to(tl.int64)


@triton.jit
def token_key(logit, token):
    """int64 in the order of the logits, and of equals (of two zeros none is larger) against that of the ids."""
    bits = (logit + 0.0).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return order.to(tl.int64) * _IDS + (_IDS - 1 - token)


@triton.jit
def _asked(top_p, total):
    """The mass that top_p asks for; a top_p that has decayed to 0 for the first token."""
    return tl.maximum(tl.minimum(tl.ceil(top_p * total.to(tl.float64)).to(tl.int64), total), 1)


@triton.jit
def _places(level, nearest, farthest):
    """A level's places, in units of distance, ascending: at first over every distance that has a weight, then between
    the two of the level before. Widths between them are whole: multiples of 256 at first, then of 16."""
    i = tl.arange(0, _PLACES) + 1
    return tl.where(level == 0, i * i * 256, nearest + (farthest - nearest) // _PLACES * i)


@triton.jit
def _narrowed(sums_ptr, counts_ptr, top_k, top_p, V: tl.constexpr, LEVELS: tl.constexpr):
    """Between which places the cut is by the first `LEVELS`: what is as near as the one is not enough, what is as near
    as the other is, if all is. Also the one's mass, and the mass to reach (for top_p alone)."""
    # Above the largest logit, where nothing is; from there to the first place it is a multiple of 256, too.
    nearest, farthest = tl.full((), -256, tl.int32), tl.full((), 256 * _PLACES * _PLACES, tl.int32)
    mass, limit = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    num = tl.full((), 0, tl.int32)
    i = tl.arange(0, _PLACES)
    for level in tl.static_range(LEVELS):
        # Beyond the first level what is nearer than both places is not measured again.
        sums = mass + tl.load(sums_ptr + level * _PLACES + i)
        counts = num + tl.load(counts_ptr + level * _PLACES + i)
        if level == 0:
            total = tl.max(sums, 0)
            limit = _asked(top_p, total)
        enough = tl.where(top_k < V, counts.to(tl.int64) >= top_k, sums >= limit)
        place = tl.min(tl.where(enough, i, _PLACES - 1), 0)
        at = _places(level, nearest, farthest)
        farthest = tl.sum(tl.where(i == place, at, 0), 0)
        if place > 0:
            before = i == place - 1
            nearest = tl.sum(tl.where(before, at, 0), 0)
            mass, num = tl.sum(tl.where(before, sums, 0), 0), tl.sum(tl.where(before, counts, 0), 0)
    return nearest, farthest, mass, limit


@triton.jit
def _between(relative, nearest, farthest):
    return (relative >= -_UNIT * farthest.to(tl.float32)) & (relative < -_UNIT * nearest.to(tl.float32))


@triton.jit(do_not_specialize=["logits_ptr", "temperature_ptr", "min_p_ptr", "top_k_ptr", "top_p_ptr", "columns"])
def _measure_kernel(
    logits_ptr, most_ptr, temperature_ptr, min_p_ptr, top_k_ptr, top_p_ptr, sums_ptr, counts_ptr, columns,
    V: tl.constexpr, LEVEL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    part, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if PDL:
        gdc_wait()
    temperature, min_p = tl.load(temperature_ptr + n), tl.load(min_p_ptr + n)
    top_k, top_p = tl.load(top_k_ptr + n), tl.load(top_p_ptr + n)
    if (temperature <= 0) | (not is_cut(top_k, top_p, V)):
        return
    most = row_most(tl.load(most_ptr + n))
    sums_ptr += n * _LEVELS * _PLACES
    counts_ptr += n * _LEVELS * _PLACES
    nearest, farthest, _, _ = _narrowed(sums_ptr, counts_ptr, top_k, top_p, V, LEVEL)
    at = -_UNIT * _places(LEVEL, nearest, farthest).to(tl.float32)
    sums, counts = tl.zeros((_TILE, _PLACES), tl.int64), tl.zeros((_TILE, _PLACES), tl.int32)
    for start in range(0, columns, _TILE):
        cols = part * columns + start + tl.arange(0, _TILE)
        logit = tl.load(logits_ptr + n * V + cols, mask=cols < V, other=float("-inf"))
        relative = _relative(logit, most, temperature)
        inside = _between(relative, nearest, farthest)
        if (LEVEL == 0) or (tl.max(inside.to(tl.int32), 0) > 0):
            weight = tl.where(inside, row_weight(logit, most, temperature, min_p), 0)
            near = (relative[:, None] >= at[None, :]) & (weight > 0)[:, None]
            sums += tl.where(near, weight[:, None], 0)
            counts += near.to(tl.int32)
    i = tl.arange(0, _PLACES)
    sum, count = tl.sum(sums, 0), tl.sum(counts, 0)
    tl.atomic_add(sums_ptr + LEVEL * _PLACES + i, sum, mask=count > 0, sem="relaxed")
    tl.atomic_add(counts_ptr + LEVEL * _PLACES + i, count, mask=count > 0, sem="relaxed")


@triton.jit
def _read(start, source):
    """Keys and weights of the list or, where it was too short, of the row; weight 0 is nothing."""
    listed, span, values_ptr, ids_ptr, logits_ptr, most, temperature, min_p, nearest, farthest = source
    at = start + tl.arange(0, _TILE)
    logit = tl.load(tl.where(listed, values_ptr, logits_ptr) + at, mask=at < span, other=float("-inf"))
    ids = tl.where(listed, tl.load(ids_ptr + at, mask=at < tl.where(listed, span, 0), other=0), at)
    inside = _between(_relative(logit, most, temperature), nearest, farthest)
    weights = tl.where(inside, row_weight(logit, most, temperature, min_p), 0)
    return tl.where(weights > 0, token_key(logit, ids), LOWEST), weights


@triton.jit
def _masses(at, tile, source, by_weight):
    """Weight or number of the tokens whose key is at least each of `at`. `tile` has the first tokens, which is all
    unless many logits are nearly equal."""
    keys, weights = tile
    span = source[1]
    each = tl.where(by_weight == 1, weights, 1)
    mass = tl.sum(tl.where(keys[:, None] >= at[None, :], each[:, None], 0), 0)
    for start in range(_TILE, span, _TILE):
        keys, weights = _read(start, source)
        each = tl.where(by_weight == 1, weights, 1)
        mass += tl.sum(tl.where(keys[:, None] >= at[None, :], each[:, None], 0), 0)
    return mass


@triton.jit(do_not_specialize=["logits_ptr", "temperature_ptr", "min_p_ptr", "top_k_ptr", "top_p_ptr"])
def _cut_kernel(
    logits_ptr, most_ptr, temperature_ptr, min_p_ptr, top_k_ptr, top_p_ptr, sums_ptr, counts_ptr, listed_ptr,
    values_ptr, ids_ptr, last_key_ptr, arrived_ptr,
    V: tl.constexpr, C: tl.constexpr, LISTED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    part, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if PDL:
        gdc_wait()
    temperature, min_p = tl.load(temperature_ptr + n), tl.load(min_p_ptr + n)
    top_k, top_p = tl.load(top_k_ptr + n), tl.load(top_p_ptr + n)
    if (temperature <= 0) | (not is_cut(top_k, top_p, V)):
        return
    most = row_most(tl.load(most_ptr + n))
    sums_ptr += n * _LEVELS * _PLACES
    counts_ptr += n * _LEVELS * _PLACES
    logits_ptr += n * V
    values_ptr += n * LISTED
    ids_ptr += n * LISTED
    nearest, farthest, mass, limit = _narrowed(sums_ptr, counts_ptr, top_k, top_p, V, _LEVELS)
    # A top_k's total needs all that is before its cut.
    nearest = tl.where(top_k < V, -(2**20), nearest)
    cols = part * C + tl.arange(0, C)
    logit = tl.load(logits_ptr + cols, mask=cols < V, other=float("-inf"))
    inside = _between(_relative(logit, most, temperature), nearest, farthest)
    inside = inside & (row_weight(logit, most, temperature, min_p) > 0)
    here = tl.sum(inside.to(tl.int32), 0)
    if here > 0:
        at = tl.atomic_add(listed_ptr + n, here, sem="relaxed") + tl.cumsum(inside.to(tl.int32), 0) - 1
        tl.store(values_ptr + at, logit, mask=inside & (at < LISTED))
        tl.store(ids_ptr + at, cols, mask=inside & (at < LISTED))
    tl.debug_barrier()  # all threads' stores come before the one thread's release
    if tl.atomic_add(arrived_ptr + n, 1, sem="acq_rel", scope="gpu") != tl.num_programs(0) - 1:
        return
    tl.store(arrived_ptr + n, 0)
    num = tl.atomic_xchg(listed_ptr + n, 0, sem="relaxed")
    for level in tl.static_range(_LEVELS):
        i = level * _PLACES + tl.arange(0, _PLACES)
        tl.store(sums_ptr + i, tl.zeros((_PLACES,), tl.int64))
        tl.store(counts_ptr + i, tl.zeros((_PLACES,), tl.int32))
    if num == 0:  # no token has a weight
        tl.store(last_key_ptr + n, LOWEST)
        return
    listed = num <= LISTED
    span = tl.where(listed, num, V)
    source = (listed, span, values_ptr, ids_ptr, logits_ptr, most, temperature, min_p, nearest, farthest)
    tile = _read(0, source)
    # The last token is the one with the largest key from which on there is enough; sixteen are tried at a time.
    first, i = num <= _TILE, tl.arange(0, _PLACES) + 1
    low = tl.where(first, tl.min(tl.where(tile[1] > 0, tile[0], _HIGHEST), 0), LOWEST)
    high = tl.where(first, tl.max(tile[0], 0), _HIGHEST)
    goal = tl.where(top_k < V, tl.minimum(top_k, num.to(tl.int64)), limit - mass)
    # With a top_k twice: the last of so many, then, of their total, what top_p asks for.
    for by_weight in range(tl.where(top_k < V, 0, 1), 2):
        upper = high
        while low < upper:
            step = (upper - low + _PLACES) // (_PLACES + 1)
            enough = tl.sum((_masses(low + step * i, tile, source, by_weight) >= goal).to(tl.int32), 0)
            upper = tl.minimum(upper, low + step * (enough + 1) - 1)
            low += step * enough
        if by_weight == 0:
            total = tl.max(_masses(low + 0 * i, tile, source, 1), 0)
            goal = _asked(top_p, total)
    tl.store(last_key_ptr + n, low)
