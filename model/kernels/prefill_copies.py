"""What feeds `prefill_hopper.py`: items drawn, keys and values asked for.

An entry of the ring has the keys of one round and the values of the round before, which are used together.

Names are those of `prefill_attention.py`.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from tpserve.model.kernels.block_copies import COPY, barrier, copy_tile, part, parts_of, places
from tpserve.model.kernels.prefill_attention import HOPPER_TILE

ROWS = gl.constexpr(HOPPER_TILE)  # of an item
KEYS = gl.constexpr(64)  # of a tile
ENTRIES = gl.constexpr(4)  # of the ring
DRAWN = gl.constexpr(8)  # more items than a producer can be ahead of a consumer
_BYTES = gl.constexpr(2)


@gluon.jit
def item(tiles_ptr, ticket, total, K: gl.constexpr):
    """(head, first token, queries, tile, context, table row) of an item; zeros where there is no such item."""
    about, there = tiles_ptr + ticket // K * 5, ticket < total
    first, queries = gl.load(about, mask=there, other=0), gl.load(about + 1, mask=there, other=0)
    tile, context = gl.load(about + 2, mask=there, other=0), gl.load(about + 3, mask=there, other=0)
    return ticket % K, first, queries, tile, context, gl.load(about + 4, mask=there, other=0)


@gluon.jit
def seen_by(queries, tile, context, rows, G: gl.constexpr):
    """How many keys the first `rows` rows of an item see."""
    return context + gl.minimum((tile * ROWS + rows - 1) // G + 1, queries)


@gluon.jit
def _draw(counter_ptr, total):
    ticket = gl.atomic_add(counter_ptr, 1, sem="relaxed")
    if ticket == total + gl.num_programs(0) - 1:  # nobody draws after this one
        gl.store(counter_ptr, 0)
    return ticket


@gluon.jit
def _announce(tickets, drawn, j, ticket):
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    tickets.index(j % DRAWN).store(gl.full([1], 0, gl.int32, ONE) + ticket)
    barrier()
    mbarrier.arrive(drawn.index(j % DRAWN))


@gluon.jit
def hear(tickets, drawn, j):
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mbarrier.wait(drawn.index(j % DRAWN), j // DRAWN % 2)
    return gl.max(tickets.index(j % DRAWN).load(ONE), 0)


@gluon.jit
def _copy_last_values(v_desc, v_ptr, table_ptr, column, vs, slot, end, K: gl.constexpr, E: gl.constexpr,
                      BLOCK: gl.constexpr):  # fmt: skip
    """Of the 16 that a sequence ends in those that are its own. The others may be anything, and 0 · NaN is NaN."""
    LANES: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    parts = parts_of(vs, ENTRIES, KEYS, E, v_desc)
    n, e = gl.arange(0, COPY, gl.SliceLayout(1, LANES)), gl.arange(0, 64, gl.SliceLayout(0, LANES))
    first = end // COPY * COPY
    block = gl.load(table_ptr + first // BLOCK).to(gl.int64)
    v_at = v_ptr + (block * BLOCK + first % BLOCK + n)[:, None] * (K * E) + column + e[None, :]
    for half in gl.static_range(E // 64):
        v = gl.load(v_at + half * 64, mask=(first + n < end)[:, None], other=0.0)
        parts.index(part(slot, half, first % KEYS // COPY, KEYS, E)).store(v)
    fence_async_shared()
    barrier()


@gluon.jit
def produce(
    k_desc, v_desc, v_ptr, tables_ptr, table_stride, tiles_ptr, items, ks, vs, full, free, tickets, drawn,
    K: gl.constexpr, G: gl.constexpr, E: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    TILE: gl.constexpr = KEYS * E * _BYTES
    counter_ptr = tiles_ptr + items * 5
    total = gl.load(counter_ptr + 1) * K
    n, j = gl.to_tensor(0), gl.to_tensor(0)  # entries and items so far
    ticket = _draw(counter_ptr, total)
    _announce(tickets, drawn, j, ticket)
    head, _first, queries, tile, context, row = item(tiles_ptr, ticket, total, K)
    while ticket < total:
        ticket = _draw(counter_ptr, total)
        j += 1
        _announce(tickets, drawn, j, ticket)
        column, end = head * E, seen_by(queries, tile, context, ROWS, G)
        rounds = (end + KEYS - 1) // KEYS
        table_ptr = tables_ptr + row.to(gl.int64) * table_stride
        head, _first, queries, tile, context, row = item(tiles_ptr, ticket, total, K)
        at = (rounds - 1) * KEYS
        starts = places(table_ptr, at, end, True, BLOCK, KEYS)
        slot = n % ENTRIES
        mbarrier.wait(free.index(slot), n // ENTRIES % 2 ^ 1)
        mbarrier.arrive(full.index(slot))  # for values, of which there are none yet
        mbarrier.expect(full.index(slot), TILE)
        copy_tile(k_desc, starts, column, ks, slot, full.index(slot), ENTRIES, KEYS, E)
        n += 1
        for i in range(1, rounds + 1):
            next_starts = places(table_ptr, at - KEYS, end, i < rounds, BLOCK, KEYS)
            slot = n % ENTRIES
            mbarrier.wait(free.index(slot), n // ENTRIES % 2 ^ 1)
            if i < rounds:
                mbarrier.expect(full.index(slot), TILE)
                copy_tile(k_desc, next_starts, column, ks, slot, full.index(slot), ENTRIES, KEYS, E)
            else:
                mbarrier.arrive(full.index(slot))
            if (i == 1) & (end % COPY != 0):
                _copy_last_values(v_desc, v_ptr, table_ptr, column, vs, slot, end, K, E, BLOCK)
                mbarrier.expect(full.index(slot), TILE - COPY * E * _BYTES)
            else:
                mbarrier.expect(full.index(slot), TILE)
            copy_tile(v_desc, starts, column, vs, slot, full.index(slot), ENTRIES, KEYS, E, at, end)
            n += 1
            at -= KEYS
            starts = next_starts
