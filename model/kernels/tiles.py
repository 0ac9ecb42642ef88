"""Which tile each product of a decode step uses: figures found by timing whole steps, not single products."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Tile:
    """How a product is cut.

    Attributes:
        rows, depth: of the weight's tile that a program holds at once.
        warps, stages: warps a program; tiles in flight. With one sequence, 1 means two in registers, the first of them
            asked for before the wait.
        split: programs that share a row, each a part of K (only where the sum is made elsewhere).
        prefetch: bytes of each weight row brought to L2 before the wait.
        early: let the next kernel start before this one has waited, instead of after.
    """

    rows: int
    depth: int
    warps: int = 4
    stages: int = 1
    split: int = 1
    prefetch: int = 0
    early: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Tiles:
    """The tiles of a step's five products."""

    qkv: Tile
    wo: Tile
    gate_up: Tile
    down: Tile
    head: Tile


def choose_tiles(s: int, dim: int, head_dim: int, ranks: int) -> Tiles:
    """Tiles for steps of `s` sequences.

    Args:
        dim: D; head_dim: E.
        ranks: of the group.
    """
    # A smaller share of the weights leaves more of a step to starting kernels: then the first bytes are fetched early.
    if s == 1:
        prefetch = 1024
        tile = Tile(8, 1024, 4, 3, prefetch=prefetch)
        tiles = Tiles(
            qkv=Tile(16, 512, 4, 3, prefetch=prefetch),
            wo=Tile(8, 512, 4, 3, prefetch=prefetch),
            gate_up=tile,
            down=Tile(32, 512, 8, 3, prefetch=prefetch),
            head=tile,
        )
    elif s <= 8:
        prefetch, early = (512, False) if ranks > 1 else (0, True)
        tiles = Tiles(
            qkv=Tile(32, 256, 2, 4, prefetch=prefetch, early=early),
            wo=Tile(32, 256, 4, 4, prefetch=prefetch, early=early),
            gate_up=Tile(32, 256, 4, 5, prefetch=prefetch, early=early),
            down=Tile(32, 512, 4, 5, prefetch=prefetch, early=early),
            head=Tile(64, 256, 4, 5, prefetch=prefetch, early=early),
        )
    else:
        wide, narrow = Tile(64, 128, 4, 4), Tile(32, 128, 4, 4)
        tiles = Tiles(qkv=wide, wo=narrow, gate_up=wide, down=narrow, head=wide)
    return dataclasses.replace(tiles, qkv=_fit(tiles.qkv, head_dim), wo=_fit(tiles.wo, dim), down=_fit(tiles.down, dim))


def _fit(tile: Tile, n: int) -> Tile:
    """The tile with rows that divide `n`."""
    return dataclasses.replace(tile, rows=min(tile.rows, n & -n))
