"""Which tile each product of a decode step uses: found by timing whole steps on an H200, not single products."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from tpserve.model.kernels import has_gluon
from tpserve.model.matrix import Matrix


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
class Stream:
    """A product by `stream.py`.

    Attributes:
        each: groups that a warp takes in a step.
        stages: steps in the ring.
        registers: of a lane.
        programs: one a multiprocessor.
    """

    each: int
    stages: int
    registers: int
    programs: int
    warps: ClassVar[int] = 8
    split: ClassVar[int] = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Tiles:
    """The tiles of a step's five products."""

    qkv: Tile | Stream
    wo: Tile | Stream
    gate_up: Tile | Stream
    down: Tile | Stream
    head: Tile

    def all_with(self, *, prefetch: int = 0, early: bool = False) -> Tiles:
        """The same tiles with other ways to begin."""
        tiles = (self.qkv, self.wo, self.gate_up, self.down, self.head)
        changes = {"prefetch": prefetch, "early": early}
        return Tiles(*(tile if isinstance(tile, Stream) else dataclasses.replace(tile, **changes) for tile in tiles))  # type: ignore[arg-type]

    def fit(self, dim: int, head_dim: int) -> Tiles:
        """Tiles whose rows divide what they must."""

        def fit(tile: Tile | Stream, n: int) -> Tile | Stream:
            return tile if isinstance(tile, Stream) else dataclasses.replace(tile, rows=min(tile.rows, n & -n))

        return dataclasses.replace(self, qkv=fit(self.qkv, head_dim), wo=fit(self.wo, dim), down=fit(self.down, dim))


# By the weights of a layer on this rank, in MiB (7B on 4, 2 and 1 ranks: 97, 193, 386): the less there is to read, the
# more of a step is kernels starting, and the more it pays to bring the first bytes near before the wait.
_SMALL, _MEDIUM = 144, 290
_WIDE = 8192  # D from which rows are so long that other tiles are best (70B on 4 ranks: 408 MiB)


def _whole(dim: int, qkv_rows: int) -> str:
    """Which of the models that were measured on one GPU a layer is most like. What decides is how many programs there
    are beside how many run at a time, 132 or a few times as many, which changes by leaps."""
    if dim > 4096:
        return "13B"
    return "8B" if qkv_rows < 2 * dim else "7B"  # heads of keys that several heads of queries share


def choose_tiles(
    s: int, dim: int, head_dim: int, layer_bytes: int, weights: tuple[Matrix, Matrix, Matrix, Matrix]
) -> Tiles:
    """Tiles for steps of `s` sequences.

    Args:
        dim: D; head_dim: E.
        layer_bytes: weights of one layer on this rank.
        weights: those that `qkv`, `wo`, `gate_up` and `down` are for. They may differ in their form: a rank's slice
            of a matrix may be too narrow for the others' groups.
    """

    def of(weight: Matrix) -> Tiles:
        mib = layer_bytes / 2**20
        if weight.q.dtype == torch.float32:
            return _float32(s)
        if weight.scale is None:
            whole = _whole(dim, weights[0].shape[0])
            return _one(dim, mib, whole) if s == 1 else _few(dim, mib, whole)
        return _fewer_bits(weight.scheme, dim) if s == 1 else _few_of_fewer_bits(weight.scheme)

    qkv, wo, gate_up, down = (of(weight) for weight in weights)
    tiles = Tiles(qkv.qkv, wo.wo, gate_up.gate_up, down.down, qkv.head).fit(dim, head_dim)
    if s > 1 or not has_gluon():
        return tiles
    others = (tiles.qkv, tiles.wo, tiles.gate_up, tiles.down)
    ways = [_stream(weight, *ring) or tile for weight, ring, tile in zip(weights, _RINGS, others, strict=True)]
    return Tiles(ways[0], ways[1], ways[2], ways[3], tiles.head)


# The rings of QKV, wo, gate and up, and down: groups of a step a warp, at most; KiB; registers of a lane. Found on 7B.
_RINGS = ((4, 108, 168), (2, 90, 128), (4, 180, 168), (4, 108, 168))


def _stream(weight: Matrix, each: int, ring_kib: int, registers: int) -> Stream | None:
    """How `stream.py` takes this weight; None: it does not."""
    rows, depth = weight.shape
    if weight.scheme != "int4" or weight.group != 128 or rows % 16 != 0:
        return None
    warps = Stream.warps
    # Groups that are not there cost as much as others: at most a fourth, where fewer a step help.
    while each > 1 and -depth % (each * warps * 128) * 4 > depth:
        each //= 2
    processors, shared_bytes = _processors(weight.q.device)
    programs, steps = min(processors, rows // 16), -(-depth // (each * warps * 128))
    most = -(-rows // 16 // programs)  # tiles of a program
    # x and its groups' scales and sums, and the warps' parts; both are padded to powers of two.
    others = (1 << (steps - 1).bit_length()) * each * warps * (256 + 8) + (1 << (most - 1).bit_length()) * warps * 64
    stages = min(ring_kib << 10, shared_bytes - others - 1024) // (each * warps * 16 * (64 + 8))
    return Stream(each, min(stages, 12), registers, programs) if stages >= 2 else None


def _processors(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and the shared memory that a program may have: CUDA's table of compute capabilities."""
    if device.type != "cuda":
        return 132, 227 << 10
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, (227 if properties.major in (9, 10) else 99) << 10


def _float32(s: int) -> Tiles:
    """What fits, not what was fastest: no tensor core multiplies these."""
    tile = Tile(8, 512, 4, 3) if s == 1 else Tile(32, 64, 4, 3)
    return Tiles(tile, tile, tile, tile, tile)


def _fewer_bits(scheme: str, dim: int) -> Tiles:
    """For one sequence. In int4 a program's depth is the groups that its warps take at a time."""
    head = Tile(8, 1024, 4, 3)
    if scheme == "fp8" and dim >= _WIDE:
        tiles = Tiles(Tile(4, 512, 2, 3), Tile(8, 512, 2, 3), Tile(4, 1024, 2, 3), Tile(16, 512, 4, 3), head)
    elif scheme == "fp8":
        tiles = Tiles(Tile(4, 512, 2, 3), Tile(8, 1024, 4, 3), Tile(4, 4096, 4, 3), Tile(16, 1024, 4, 3), head)
    elif scheme == "int8":
        tiles = Tiles(Tile(4, 1024, 2, 3), Tile(4, 1024, 2, 3), Tile(4, 1024, 2, 3), Tile(8, 1024, 2, 3), head)
    elif dim >= _WIDE:
        tile, small = Tile(32, 1024, 8, 3), Tile(16, 1024, 8, 3)
        tiles = Tiles(small, Tile(32, 256, 2, 6), Tile(32, 256, 2, 3), tile, head)
    else:
        tile, wide = Tile(32, 256, 2, 4), Tile(32, 512, 4, 4)
        tiles = Tiles(tile, tile, wide, wide, head)
    return tiles.all_with(prefetch=256 if scheme == "int4" else 512, early=True)


def _few_of_fewer_bits(scheme: str) -> Tiles:
    """What a program streams of the rows of x is half as much as of its 32 rows of the weight, or as much as of 16."""
    head = Tile(64, 256, 4, 5)
    if scheme == "int4":
        tiles = Tiles(Tile(32, 512, 4, 3), Tile(16, 1024, 8, 3), Tile(32, 512, 4, 3), Tile(16, 1024, 8, 3), head)
        return tiles.all_with(prefetch=1024, early=True)
    if scheme == "int8":
        wide = Tile(32, 512, 4, 4)
        tiles = Tiles(wide, Tile(16, 1024, 4, 4), wide, Tile(32, 1024, 4, 4), head)
    else:
        wide, down = Tile(32, 512, 2, 4), Tile(16, 512, 4, 6)
        tiles = Tiles(wide, down, wide, down, head)
    return tiles.all_with(prefetch=512, early=True)


def _one(dim: int, mib: float, whole: str) -> Tiles:
    head = Tile(16, 512, 4, 3)
    if mib < _SMALL:
        tiles = Tiles(Tile(8, 512, 4, 3), Tile(8, 512, 4, 1), Tile(16, 512, 4, 1), Tile(8, 1024, 4, 3), head)
        return tiles.all_with(prefetch=1024)
    if mib < _MEDIUM:
        tiles = Tiles(Tile(16, 512, 4, 3), Tile(16, 512, 8, 1), Tile(4, 1024, 2, 3), Tile(16, 512, 8, 1), head)
        return tiles.all_with(prefetch=512)
    if dim >= _WIDE:
        return Tiles(Tile(8, 1024, 2, 3), Tile(8, 512, 4, 1), Tile(4, 2048, 4, 1), Tile(8, 512, 4, 1), head)
    wide, deep, small = Tile(16, 512, 4, 3), Tile(8, 1024, 4, 3), Tile(8, 512, 4, 3)
    qkv, wo, down = {"7B": (wide, small, deep), "8B": (deep, small, deep), "13B": (deep, wide, small)}[whole]
    return Tiles(qkv, wo, Tile(4, 1024, 2, 3), down, deep).all_with(prefetch=1024, early=True)


def _few(dim: int, mib: float, whole: str) -> Tiles:
    head, down = Tile(64, 256, 4, 5), Tile(32, 512, 4, 5)
    if mib < _SMALL:
        tiles = Tiles(Tile(32, 256, 2, 4), Tile(32, 256, 4, 4), Tile(32, 256, 4, 5), down, head)
        return tiles.all_with(prefetch=512)
    if mib < _MEDIUM:
        return Tiles(Tile(32, 128, 2, 4), down, Tile(32, 256, 2, 4), down, head).all_with(prefetch=512)
    if dim >= _WIDE:
        return Tiles(down, Tile(32, 256, 4, 5), Tile(32, 256, 4, 5), down, head).all_with(prefetch=512)
    qkv, gate_up = Tile(32, 256, 2, 4), Tile(32, 256, 2, 3)
    if whole == "7B":
        gate_up = Tile(32, 512, 4, 3)
    elif whole == "13B":
        qkv, down = Tile(32, 128, 2, 6), Tile(64, 256, 4, 5)
    return Tiles(qkv, down, gate_up, down, head).all_with(prefetch=512, early=True)
