"""Products of one row of x with int4 weights, by one program a multiprocessor that begins before its turn.

A layer of int4 weights is read in the time that a few kernels take to start, so what counts is that reading does not
stop between them. A program fills a ring in shared memory with its first weights, then waits for the kernel in front
of it (programmatic dependent launch), and goes on from there. The rings are so large that a multiprocessor has room for
one program of most kernels: smaller programs gather where the last kernel's end first, and the other multiprocessors
idle.

A program takes the weight's rows 16 at a time, each of its warps one group of inputs (`GROUP`) after the other. Both
operands are bytes: q, which three instructions take out of eight weights, and x in 16 bits a number,
of its group's largest; its upper and lower bytes are two columns of one product of integers, which is exact. The parts
of the warps lie in shared memory until the end, when all rows are added up and finished at once.

Written in Gluon, Triton's language for kernels that say which lane holds what. Lane 4r + c reads 16 bytes that lie
together of the rows r and r + 8, and the same inputs of x: which input is which along the tensor cores' K makes no
difference as long as both agree.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

GROUP = gl.constexpr(128)
_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # before and since Triton 3.7


@gluon.constexpr_function
def _bases(count, first, place, rank):
    """Basis vectors of a layout for 0 … count - 1: powers of two from `first` on, along one of `rank` dimensions."""
    return [[first << i if dim == place else 0 for dim in range(rank)] for i in range(count.bit_length() - 1)]


@gluon.constexpr_function
def _ring_layout(words):
    """[16, words] row by row, but that neighbouring rows lie in other banks."""
    return gl.SharedLinearLayout([*_bases(words, 1, 1, 2), [1, 16], [2, 0], [4, 0], [8, 0]])


@gluon.constexpr_function
def _weight_lanes(warps):
    """[16, warps · 16] words: a group of inputs a warp; lane 4r + c has 4 words of the rows r and r + 8."""
    lanes = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[0, 1], [0, 2], [8, 0]], lanes, _bases(warps, 16, 1, 2), [], [16, warps * 16])


@gluon.constexpr_function
def _x_lanes(warps):
    """[2, warps · 128] bytes, the inputs that `_weight_lanes` has; one of the two is an even lane's r, one an odd's."""
    lanes = [[0, 16], [0, 32], [1, 0], [0, 0], [0, 0]]
    registers = [[0, 1], [0, 2], [0, 4], [0, 8], [0, 64]]
    return gl.DistributedLinearLayout(registers, lanes, _bases(warps, 128, 1, 2), [], [2, warps * 128])


@gluon.constexpr_function
def _x_operand(warps):
    """[warps, 64, 4, 2] as the right operand's lanes have it, columns being pairs."""
    registers = [[0, 1, 0, 0], [0, 2, 0, 0], [0, 16, 0, 0], [0, 32, 0, 0]]
    lanes = [[0, 4, 0, 0], [0, 8, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 2, 0]]
    return gl.DistributedLinearLayout(registers, lanes, _bases(warps, 1, 0, 4), [], [warps, 64, 4, 2])


@gluon.constexpr_function
def _sums(warps):
    """[warps, 16, 4]: sums of the rows r and r + 8 in lane 4r + c, one of four alike."""
    lanes = [[0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout([[0, 8, 0]], lanes, _bases(warps, 1, 0, 3), [], [warps, 16, 4])


@gluon.constexpr_function
def whole(warps):
    """A program's results, [tiles, 16], with pairs of rows in one lane."""
    return gl.BlockedLayout([1, 2], [4, 8], [warps, 1], [1, 0])


@gluon.constexpr_function
def pairs(warps):
    """Pairs of rows, [tiles, 8]."""
    return gl.BlockedLayout([1, 1], [4, 8], [warps, 1], [1, 0])


@gluon.jit
def _addresses(
    w_ptr, scale_ptr, first, K: gl.constexpr, F: gl.constexpr, ROWS: gl.constexpr, EACH: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Of the first step's weights, [16, words], and scales and zeros, [groups, 16].

    With F, rows of the gate and, F further down, of the up projection take turns.
    """
    WORDS: gl.constexpr = EACH * WARPS * GROUP // 8  # of a row in a step
    ALONG: gl.constexpr = WORDS // 128  # warps that share a row
    W: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS // ALONG, ALONG], [1, 0])
    S: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [WARPS, 1], [1, 0])
    r, place = gl.arange(0, 16, gl.SliceLayout(1, W)), gl.arange(0, 16, gl.SliceLayout(0, S))
    if F > 0:
        row, scale_row = first * 8 + r // 2 + r % 2 * F, first * 8 + place // 2 + place % 2 * F
    else:
        row, scale_row = first * 16 + r, first * 16 + place
    words = gl.arange(0, WORDS, gl.SliceLayout(0, W))
    groups = gl.arange(0, EACH * WARPS, gl.SliceLayout(1, S))
    w_at = w_ptr.to(gl.pointer_type(gl.int32)) + row.to(gl.int64)[:, None] * (K // 8) + words[None, :]
    s_at = scale_ptr.to(gl.pointer_type(gl.int64)) + groups[:, None] * ROWS + scale_row[None, :]
    return w_at, s_at, words, groups


@gluon.jit
def _fetch(
    addresses, ring, scales, slot, t, k, there, K: gl.constexpr, F: gl.constexpr, ROWS: gl.constexpr,
    EACH: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Asks for the weights of part k of tile t; where `there` is false, for nothing."""
    w_at, s_at, words, groups = addresses
    WORDS: gl.constexpr = EACH * WARPS * GROUP // 8
    ACROSS: gl.constexpr = 8 if F > 0 else 16  # rows from tile to tile
    w_at += t.to(gl.int64) * (ACROSS * K // 8) + k * WORDS
    s_at += k * (EACH * WARPS * ROWS) + t * ACROSS
    if K % (WORDS * 8) == 0:
        w_there, s_there = there & (words >= 0), there & (groups >= 0)
    else:
        w_there, s_there = there & (words < K // 8 - k * WORDS), there & (groups < K // GROUP - k * (EACH * WARPS))
    async_copy.async_copy_global_to_shared(ring.index(slot), w_at, mask=w_there[None, :])
    async_copy.async_copy_global_to_shared(scales.index(slot), s_at, mask=s_there[:, None])
    async_copy.commit_group()


@gluon.jit
def begin(
    w_ptr, scale_ptr, first, tiles, K: gl.constexpr, F: gl.constexpr, ROWS: gl.constexpr, EACH: gl.constexpr,
    WARPS: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Fills the ring and waits for the kernel in front of this one."""
    WORDS: gl.constexpr = EACH * WARPS * GROUP // 8
    STEPS: gl.constexpr = (K + WORDS * 8 - 1) // (WORDS * 8)
    ring = gl.allocate_shared_memory(gl.int32, [STAGES, 16, WORDS], _ring_layout(WORDS))
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    scales = gl.allocate_shared_memory(gl.int64, [STAGES, EACH * WARPS, 16], PLAIN)
    addresses = _addresses(w_ptr, scale_ptr, first, K, F, ROWS, EACH, WARPS)
    for ahead in gl.static_range(STAGES):
        t, k = gl.to_tensor(ahead // STEPS), gl.to_tensor(ahead % STEPS)
        _fetch(addresses, ring, scales, ahead, t, k, t < tiles, K, F, ROWS, EACH, WARPS)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    return ring, scales, addresses


@gluon.jit
def _read(ring, scales, slot, EACH: gl.constexpr, WARPS: gl.constexpr, ROW: gl.constexpr):
    """A step's weights, and scales and zeros, for each of a warp's groups: two tuples."""
    w, both = (), ()
    for g in gl.static_range(EACH):
        w += (ring.index(slot).slice(g * WARPS * 16, WARPS * 16, 1).load(_weight_lanes(WARPS)),)  # type: ignore[assignment]
        both += (scales.index(slot).slice(g * WARPS, WARPS, 0).load(ROW),)  # type: ignore[assignment]
    return w, both


@gluon.jit
def _nibbles(w, HIGH: gl.constexpr):
    """Words' low or high four bits of every byte. In assembly, or the compiler works on byte by byte in `_left`."""
    LOW: gl.constexpr = "and.b32 $0, $1, 0x0F0F0F0F;"
    SHIFTED: gl.constexpr = "{ .reg .b32 q; shr.b32 q, $1, 4; and.b32 $0, q, 0x0F0F0F0F; }"
    return gl.inline_asm_elementwise(SHIFTED if HIGH else LOW, "=r,r", [w], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _left(w, WARPS: gl.constexpr, A: gl.constexpr):
    """Words of bytes below 128, [16, warps · 16], → the left operand [warps, 16, 64], as it lies."""
    b0, b1, b2, b3 = w.to(gl.int8), (w >> 8).to(gl.int8), (w >> 16).to(gl.int8), (w >> 24).to(gl.int8)
    w = gl.reshape(gl.join(gl.join(b0, b2), gl.join(b1, b3)), [16, WARPS, 4, 2, 2, 4])
    return gl.convert_layout(gl.reshape(gl.permute(w, [1, 0, 3, 4, 2, 5]), [WARPS, 16, 64]), A, assert_trivial=True)


@gluon.jit
def _right(x, WARPS: gl.constexpr, B: gl.constexpr):
    """[warps, 64, 2] → the right operand [warps, 64, 8]: the two, four times."""
    FOUR: gl.constexpr = _x_operand(WARPS)
    x = gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(2, FOUR), assert_trivial=True), 2)
    x = gl.broadcast(x, gl.zeros([WARPS, 64, 4, 2], gl.int8, FOUR))[0]
    return gl.convert_layout(gl.reshape(x, [WARPS, 64, 8]), B, assert_trivial=True)


@gluon.jit
def _quantised(x, xs, x_scales, x_sums, GROUPS: gl.constexpr, WARPS: gl.constexpr):
    """x in 16 bits a number, of its group's largest: their upper and lower bytes, [P, 2, n]; scales and sums."""
    P: gl.constexpr = xs.shape[0]
    PLAIN2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    PLAIN3: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    groups = gl.reshape(x.to(gl.float32), [P * GROUPS, GROUP])
    most = gl.max(gl.abs(groups), 1) + 0.0 * gl.sum(groups, 1)  # which keeps a NaN
    wide = gl.expand_dims(gl.where(most > 0, 32512.0 / most, 0.0), 1)
    # Behind 1.5 · 2^23 a float32's last bits are a rounded integer.
    q = (groups * wide + 12582912.0).to(gl.int32, bitcast=True) - 0x4B400000
    sums = gl.sum(q, 1).to(gl.float32) * (most / 32512.0)
    q = gl.convert_layout(
        gl.reshape(q, [P, 1, GROUPS * GROUP]), gl.BlockedLayout([1, 1, 8], [1, 1, 32], [1, 1, WARPS], [2, 1, 0])
    )
    upper = (q + 128) >> 8
    bytes = xs._reinterpret(gl.int8, [P, 2, GROUPS * GROUP], PLAIN3)
    bytes.slice(0, 1, 1).store(upper.to(gl.int8))
    bytes.slice(1, 1, 1).store((q - upper * 256).to(gl.int8))
    x_scales._reinterpret(gl.float32, [P, GROUPS], PLAIN2).store(gl.reshape(most / 32512.0, [P, GROUPS]))
    # Of what is multiplied, not of x: what rounding did is then as small as the weights, not as their q.
    x_sums._reinterpret(gl.float32, [P, GROUPS], PLAIN2).store(gl.reshape(sums, [P, GROUPS]))


@gluon.jit
def _inputs(xs, x_scales, x_sums, k, EACH: gl.constexpr, WARPS: gl.constexpr, ROW: gl.constexpr, B: gl.constexpr):
    """Part k of x for each of a warp's groups: the right operands of both halves, scales, sums."""
    inputs = ()
    for g in gl.static_range(EACH):
        row = xs.index(k).slice(g * WARPS * GROUP, WARPS * GROUP, 1).load(_x_lanes(WARPS))
        row = gl.permute(gl.reshape(row, [2, WARPS, 2, 4, 2, 2, 4]), [1, 4, 5, 3, 6, 0, 2])
        low, high = gl.split(gl.reshape(row, [WARPS, 64, 2, 2]))
        x_scale = x_scales.index(k).slice(g * WARPS, WARPS).load(gl.SliceLayout(1, ROW))
        x_sum = x_sums.index(k).slice(g * WARPS, WARPS).load(gl.SliceLayout(1, ROW))
        inputs += ((_right(low, WARPS, B), _right(high, WARPS, B), x_scale, x_sum),)  # type: ignore[assignment]
    return inputs


@gluon.jit
def stream(
    ring, scales, addresses, x_ptr, tiles, K: gl.constexpr, F: gl.constexpr, ROWS: gl.constexpr,
    MOST: gl.constexpr, EACH: gl.constexpr, WARPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """This program's tiles of 16 rows, times x: float32 [MOST, 16].

    ROWS: of the whole weight; F: see `_addresses`. MOST: tiles of a program, at most, a power of two. EACH: groups that
    a warp takes in a step. STAGES: steps in the ring.
    """
    GROUPS: gl.constexpr = EACH * WARPS  # of a step
    STEPS: gl.constexpr = (K + GROUPS * GROUP - 1) // (GROUPS * GROUP)
    PADDED: gl.constexpr = triton.next_power_of_2(STEPS)
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 4)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 4)
    SUMS: gl.constexpr = _sums(WARPS)
    ROW: gl.constexpr = gl.SliceLayout(2, SUMS)
    PLAIN1: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    PLAIN2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    PLAIN3: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    xs = gl.allocate_shared_memory(gl.int8, [PADDED, 2, GROUPS * GROUP], PLAIN2)
    x_scales = gl.allocate_shared_memory(gl.float32, [PADDED, GROUPS], PLAIN1)
    x_sums = gl.allocate_shared_memory(gl.float32, [PADDED, GROUPS], PLAIN1)
    parts = gl.allocate_shared_memory(gl.float32, [MOST, WARPS, 16], PLAIN2)
    at = gl.arange(0, PADDED * GROUPS * GROUP, gl.BlockedLayout([8], [32], [WARPS], [0]))
    x = gl.load(x_ptr + at, mask=at < K, other=0.0)
    _quantised(x, xs, x_scales, x_sums, GROUPS, WARPS)
    y = gl.zeros([WARPS, 16, 4], gl.float32, SUMS)
    async_copy.wait_group(STAGES - 1)
    _barrier()
    weights, both = _read(ring, scales, 0, EACH, WARPS, ROW)
    if STEPS == 1:  # they stay in registers
        inputs = _inputs(xs, x_scales, x_sums, 0, EACH, WARPS, ROW, B)
    t, k, slot = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    t_ahead, k_ahead = gl.to_tensor(STAGES // STEPS), gl.to_tensor(STAGES % STEPS)
    for _step in range(tiles * STEPS):
        async_copy.wait_group(STAGES - 2)
        _barrier()  # the next step's weights are there, and all warps have read this one's
        _fetch(addresses, ring, scales, slot, t_ahead, k_ahead, t_ahead < tiles, K, F, ROWS, EACH, WARPS)
        t_ahead, k_ahead = _next(t_ahead, k_ahead, STEPS)
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)
        next_weights, next_both = _read(ring, scales, slot, EACH, WARPS, ROW)
        if STEPS > 1:
            inputs = _inputs(xs, x_scales, x_sums, k, EACH, WARPS, ROW, B)
        for g in gl.static_range(EACH):
            low, high, x_scale, x_sum = inputs[g]
            zeros = gl.zeros([WARPS, 16, 8], gl.int32, MMA)
            product = mma_v2(_left(_nibbles(weights[g], False), WARPS, A), low, zeros)
            product = mma_v2(_left(_nibbles(weights[g], True), WARPS, A), high, product)
            upper, lower = gl.split(gl.reshape(product, [WARPS, 16, 4, 2]))
            product = gl.convert_layout(upper * 256 + lower, SUMS, assert_trivial=True).to(gl.float32)
            scale = (both[g] & 0xFFFFFFFF).to(gl.int32).to(gl.float32, bitcast=True)
            zero = (both[g] >> 32).to(gl.int32).to(gl.float32, bitcast=True)
            y += product * gl.expand_dims(scale * gl.expand_dims(x_scale, 1), 2)
            y += gl.expand_dims((scale * 128.0 + zero) * gl.expand_dims(x_sum, 1), 2)
        weights, both = next_weights, next_both
        if k == STEPS - 1:
            parts.index(t).store(gl.max(y, 2))  # four alike
            y = gl.zeros([WARPS, 16, 4], gl.float32, SUMS)
        t, k = _next(t, k, STEPS)
    async_copy.wait_group(0)  # those of nothing, too: what follows may use the ring's memory
    _barrier()
    FEW: gl.constexpr = gl.BlockedLayout([1, WARPS, 2], [4, 1, 8], [WARPS, 1, 1], [2, 1, 0])
    y = gl.sum(parts._reinterpret(gl.float32, [MOST, WARPS, 16], PLAIN3).load(FEW), 1)
    return gl.convert_layout(y, whole(WARPS))


@gluon.jit
def _next(t, k, STEPS: gl.constexpr):
    """The step after part k of tile t."""
    last = k == STEPS - 1
    return gl.where(last, t + 1, t), gl.where(last, 0, k + 1)
