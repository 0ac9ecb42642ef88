"""Several ranks' kernels in Triton's interpreter, a process a rank: what they exchange through each other's memory.

The whole network, on each rank, is the reference: what ranks compute together is what one would. Their logits must have
the same bits.

    TRITON_INTERPRET=1 python -m tests.interpreted.ranks OUT.json
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import multiprocessing
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from tests.interpreted.checks import CPU, ROWS, Both, Part, last, like_a_gpu
from tests.interpreted.symmetric import install, wait_politely
from tpserve.model.parallel import TensorParallel

if TYPE_CHECKING:
    from tpserve.model.kernels.row_exchange import RowExchange
    from tpserve.model.share_exchange import ShareExchange

DIM = 64
CHECK_S = 200  # then a rank that waits is ended; alone on two processors, a check takes 10


class Group(NamedTuple):
    """So many ranks, and the heads of the whole network."""

    ranks: int
    heads: int
    kv_heads: int


# Of the second, each two ranks hold the same keys; of the third, one has as many heads as the others together.
GROUPS = {"2": Group(2, 4, 4), "4": Group(4, 4, 2), "3": Group(3, 4, 4)}


class Ranks(Both):
    """As `Both`, of one rank; compares the ranks, too."""

    def __init__(
        self, heads: int, kv_heads: int, exchanges: tuple[RowExchange | None, ShareExchange | None] = (None, None)
    ) -> None:
        super().__init__(heads, kv_heads, TensorParallel.from_world(), exchanges)

    def compare(self, got: torch.Tensor, expected: torch.Tensor) -> None:
        super().compare(got, expected)
        every = [torch.empty_like(got) for _ in range(dist.get_world_size())]
        dist.all_gather(every, got.contiguous())
        assert all(torch.equal(other, got) for other in every), "the ranks' logits differ"


def check_decode_steps(heads: int, kv_heads: int) -> None:
    """Sums as words, of up to 8 sequences from the product that makes them, of more from a pass of their own."""
    ranks = Ranks(heads, kv_heads)
    assert ranks.decode_step.exchanges_words
    decode(ranks, ((1, 1), (3, 4), (13, 16), (4, 4)))


def check_decode_steps_by_rows(heads: int, kv_heads: int) -> None:
    """Larger sums are added and normed a row at a time."""
    with by_rows():
        ranks = Ranks(heads, kv_heads)
        assert ranks.decode_step.exchanges_rows
        decode(ranks, ((13, 16), (4, 4), (16, 16)))


def check_ranks_that_fall_behind(heads: int, kv_heads: int) -> None:
    """In turn, between what a rank says and what it hears: who overwrote what another has yet to read would leave it
    waiting."""
    from tpserve.model.kernels.all_reduce import WordExchange
    from tpserve.model.kernels.row_exchange import RowExchange

    delays = random.Random(dist.get_rank())

    def late(read: Callable[..., Any]) -> Callable[..., Any]:
        def after_a_while(*args: Any, **named: Any) -> Any:
            time.sleep(delays.choice((0, 0, 0.05)))
            return read(*args, **named)

        return after_a_while

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((WordExchange, "add"), (WordExchange, "gather"), (RowExchange, "add_norm")):
            patch.setattr(owner, name, late(getattr(owner, name)))
        decode(Ranks(heads, kv_heads), ((3, 4), (1, 1), (9, 16), (3, 4)))
        with by_rows():
            decode(Ranks(heads, kv_heads), ((13, 16), (4, 4)))


def check_decode_steps_without_shared_memory(heads: int, kv_heads: int) -> None:
    """By collectives, as where a rank cannot reach another's memory: it is one that cannot."""

    def unreachable(tp: TensorParallel, *_: object, **__: object) -> None:
        if tp.rank == tp.size - 1:
            raise RuntimeError("no peer access")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tpserve.model.decode_step.WordExchange", unreachable)
        ranks = Ranks(heads, kv_heads)
        assert not ranks.decode_step.exchanges_words
        decode(ranks, ((3, 4), (13, 16)))


@contextlib.contextmanager
def by_rows() -> Iterator[None]:
    """Only few sequences' sums go as words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tpserve.model.decode_step.MAX_WORD_ROWS", 8)
        patch.setattr("tpserve.model.decode_step.MAX_WORD_BYTES", 0)
        yield


def decode(ranks: Ranks, steps: tuple[tuple[int, int], ...]) -> None:
    """Steps of (sequences, bucket), behind prompts; each reads what the ones before wrote."""
    prompts: list[Part] = [(row, 0, 2 + row % 2) for row in range(16)]
    ranks.mixed(prompts, last(prompts))
    after = [n for _, _, n in prompts]
    for n, bucket in steps:
        ranks.decode([(row, after[row], 1) for row in range(n)], bucket)
        after[:n] = [one + 1 for one in after[:n]]


STEPS: list[list[Part]] = [
    [(0, 0, 9), (1, 0, 14), (2, 0, 4)],
    [(0, 9, 1), (1, 14, 5), (3, 0, 3)],
    [(row, 0, 2) for row in range(4, 21)],
    [(0, 10, 1), (1, 19, 1), (2, 4, 1)],
]


def check_mixed_steps(heads: int, kv_heads: int) -> None:
    """By collectives."""
    mixed(Ranks(heads, kv_heads))


def check_mixed_steps_by_rows(heads: int, kv_heads: int) -> None:
    from tpserve.model.kernels.row_exchange import RowExchange

    rows = RowExchange(TensorParallel.from_world(), 80, DIM, torch.float32, CPU)
    ranks = Ranks(heads, kv_heads, (rows, None))
    mixed(ranks)
    parts: list[Part] = [(0, 11, 1), (22, 0, 9)]
    ranks.staged(parts, last(parts))


def check_mixed_steps_by_shares(heads: int, kv_heads: int) -> None:
    """Rows are dealt to the ranks, and fetched while products are made; then by two collectives."""
    from tpserve.model.share_exchange import ShareExchange

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tpserve.model.residual.MIN_DEALT_ROWS", 1)
        shares = ShareExchange(TensorParallel.from_world(), 80, DIM, torch.float32, CPU)
        mixed(Ranks(heads, kv_heads, (None, shares)), 2)
        patch.setattr("tpserve.model.share_exchange._MIN_TILES", 0)  # products in parts
        mixed(Ranks(heads, kv_heads, (None, shares)))
        mixed(Ranks(heads, kv_heads), 2)


def mixed(ranks: Ranks, steps: int = len(STEPS)) -> None:
    for parts in STEPS[:steps]:
        ranks.mixed(parts, last(parts))
    ranks.mixed([(ROWS - 1, 0, 7)], None)
    ranks.mixed([(0, 11, 1), (ROWS - 1, 7, 3)], torch.tensor([3, 0, 3, 3]))


CHECKS: dict[str, Callable[[int, int], None]] = {
    name.removeprefix("check_"): function for name, function in list(globals().items()) if name.startswith("check_")
}


def checks_of(group: str) -> list[str]:
    """Their names: all, or what looks at how many ranks there are, or at how much each has."""
    some = ["decode_steps", "mixed_steps_by_rows"]
    more = ["decode_steps_by_rows", "mixed_steps_by_shares"]
    return {"2": list(CHECKS), "4": some + more, "3": some}[group]


@contextlib.contextmanager
def _shared_folder() -> Iterator[Path]:
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        yield Path(name)


def _rank(rank: int, group: str, folder: Path) -> None:
    size, heads, kv_heads = GROUPS[group]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size)
    like_a_gpu()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        install(patch, folder)
        wait_politely(patch)
        for name in checks_of(group):
            said = folder / f"{name}-{rank}"
            faulthandler.dump_traceback_later(CHECK_S, exit=True)
            try:
                CHECKS[name](heads, kv_heads)
            except Exception:  # noqa: BLE001 - told; the others wait for this rank, and are ended
                said.write_text(traceback.format_exc())
                sys.exit(1)
            said.touch()
        faulthandler.cancel_dump_traceback_later()
    dist.destroy_process_group()


def found_of(group: str) -> dict[str, str]:
    """By check, what went wrong on which rank."""
    with _shared_folder() as folder:
        fork = multiprocessing.get_context("fork")
        processes = [fork.Process(target=_rank, args=(rank, group, folder)) for rank in range(GROUPS[group].ranks)]
        for process in processes:
            process.start()
        left = list(processes)
        while left:
            left[0].join(0.5)
            left = [process for process in left if process.exitcode is None]
            if any(process.exitcode for process in processes):
                for process in left:
                    process.join(5)  # it may have something to tell, too
                    process.kill()
        found = {}
        for name in checks_of(group):
            files = [folder / f"{name}-{rank}" for rank in range(len(processes))]
            each = [file.read_text() if file.exists() else "it did not end\n" for file in files]
            found[name] = "".join(f"rank {rank}: {said}" for rank, said in enumerate(each) if said)
    return found


def main() -> None:
    # Rows of padding are what memory held.
    warnings.filterwarnings("ignore", "(overflow|invalid value) encountered", RuntimeWarning)
    Path(sys.argv[1]).write_text(json.dumps({group: found_of(group) for group in GROUPS}))


if __name__ == "__main__":
    main()
