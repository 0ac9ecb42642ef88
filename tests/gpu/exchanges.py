"""Ranks that do nothing but exchange sums, falling behind in turn: small enough for compute-sanitizer.

    compute-sanitizer torchrun --nproc-per-node 2 --standalone tests/gpu/exchanges.py 300

All terms are small whole numbers, so sums are exact in whatever order they are made.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist

from tpserve.model.parallel import TensorParallel, without_multicast

DIM, ROWS = 512, 72
Round = Callable[[int], torch.Tensor]  # from its number to how many values are wrong


def numbers(rank: int, turn: int, rows: int, device: torch.device) -> torch.Tensor:
    """A rank's partial sums [rows, DIM] in one turn, other ones every turn."""
    at = torch.arange(rows * DIM, device=device).view(rows, DIM)
    return ((at * 7 + turn * 13 + rank * 5) % 17 - 8).to(torch.bfloat16)


def by_words(tp: TensorParallel, device: torch.device) -> Round:
    """Two sums a step, of 1, 3, 8 and 20 rows."""
    from tpserve.model.kernels.all_reduce import WordExchange
    from tpserve.model.kernels.norm import Normed

    step = torch.zeros(1, dtype=torch.int32, device=device)
    exchange = WordExchange(tp, device, terms=64, dim=DIM, gathered=64, per_step=2, step=step)
    gain = torch.ones(DIM, device=device, dtype=torch.bfloat16)

    def turn(number: int) -> torch.Tensor:
        rows = (1, 3, 8, 20)[number % 4]
        step.add_(1)
        residual, sums = torch.zeros(rows, DIM, device=device), torch.zeros(rows * DIM, device=device)
        normed = Normed(residual, gain.new_zeros(rows, DIM), sums, 1e-5)
        expected = torch.zeros_like(residual)
        for index in range(2):
            exchange.push_matrix(numbers(tp.rank, 2 * number + index, rows, device), index, pdl=index == 1)
            exchange.add(normed, gain, rows, index, 1, pdl=index == 1)
            expected += sum(numbers(rank, 2 * number + index, rows, device).float() for rank in range(tp.size))
        return (residual != expected).sum()

    return turn


def by_rows(tp: TensorParallel, device: torch.device) -> Round:
    """One sum, of up to `ROWS` rows, its residual and norm."""
    from tpserve.model.kernels.row_exchange import RowExchange

    exchange = RowExchange(tp, ROWS, DIM, torch.bfloat16, device)
    gain = torch.ones(DIM, device=device, dtype=torch.bfloat16)

    def turn(number: int) -> torch.Tensor:
        rows = ROWS - number % 5
        residual = torch.zeros(ROWS, DIM, device=device)
        exchange.partial_SD[:rows] = numbers(tp.rank, number, rows, device)
        x = exchange.add_norm(residual, gain, 1e-5, rows)
        exact = sum(numbers(rank, number, rows, device).float() for rank in range(tp.size))
        assert isinstance(exact, torch.Tensor)
        normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5)
        return ((x.float() - normed).abs() > 0.01 * normed.abs() + 1e-6).sum()

    return turn


def main(turns: int) -> None:
    """Checks `turns` steps by words and as many by rows; exits with status 1 if a value is wrong."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    without_multicast()
    dist.init_process_group("cpu:gloo,cuda:nccl")  # meetings of the hosts alone: NCCL would be most of what is checked
    tp = TensorParallel.from_world()
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    ways = {"words": by_words(tp, device), "rows": by_rows(tp, device)}
    torch.cuda.synchronize()
    dist.all_reduce(torch.zeros(1))  # all have zeroed their buffers
    generator = torch.Generator().manual_seed(tp.rank)
    for name, turn in ways.items():
        for number in range(turns):
            if number % 4 == 0:
                torch.cuda._sleep(int(torch.randint(200_000, (), generator=generator)))
            wrong += turn(number)
        sys.stdout.write(f"rank {tp.rank}, {turns} steps by {name}: {int(wrong)} wrong values\n")
    dist.all_reduce(torch.zeros(1))
    sys.stdout.flush()
    os._exit(int(wrong) > 0)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
