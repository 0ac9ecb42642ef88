"""Sequences in a shuffled cache, and what attention over them is: of `bench.attention` and of tests on GPUs."""

from __future__ import annotations

import dataclasses
import random

import torch

from tpserve.model.kernels.decode_plan import Config, Cut, DecodeScratch, choose_cut, deal, decode_scratch
from tpserve.model.kernels.paged_attention import paged_decode_attention
from tpserve.model.kernels.prefill_attention import PrefillTiles, paged_prefill_attention, prefill_tiles

LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SHAPES = [(32, 32, 128), (16, 2, 128), (32, 8, 64), (6, 2, 16), (4, 4, 8), (2, 1, 80), (4, 2, 256)]


@dataclasses.dataclass(frozen=True)
class Paged:
    """Sequences in a shuffled cache: `lens` keys each, the last `queries` of them with a query.

    Attributes:
        q_THE, k_cache, v_cache, tables_RB: as the kernels take them.
        rows, starts, contexts, lens: int64 [P], int64 [P + 1], int32 [P], int32 [P].
        slots: of every sequence's keys.
    """

    q_THE: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    tables_RB: torch.Tensor
    rows: torch.Tensor
    starts: torch.Tensor
    contexts: torch.Tensor
    lens: torch.Tensor
    slots: list[torch.Tensor]
    block_size: int

    def cut(self, max_len: int = 0, num_sms: int = 132) -> Cut:
        """As chosen for these sequences; max_len: that they may grow to, if longer than they are."""
        _, H, _ = self.q_THE.shape
        longest = max(max_len, int(self.lens.max()))
        return choose_cut(len(self.lens), H, self.k_cache, self.q_THE.dtype, self.block_size, longest, num_sms)

    def cuts(self) -> dict[str, Cut]:
        """By name: as chosen, and for Triton's kernel where Gluon's is."""
        cut = self.cut()
        if not cut.config.hopper:
            return {"": cut}
        return {" Hopper": cut, "": dataclasses.replace(cut, config=Config(32, 1, 4, 128, 4))}

    def decode(self, cut: Cut | None = None) -> torch.Tensor:
        """`paged_decode_attention` into a poisoned output."""
        S, H, E = self.q_THE.shape
        cut = cut or self.cut()
        scratch, out = decode_scratch(S, H, E, cut.items, self.q_THE.device), torch.full_like(self.q_THE, float("nan"))
        scratch.items_I8.fill_(2**30)
        deal(cut, scratch, self.rows, self.lens - 1)
        self.decode_into(out, cut, scratch)
        assert not scratch.arrived.any(), "a counter was left behind"
        return out

    def decode_into(self, out_SHE: torch.Tensor, cut: Cut, scratch: DecodeScratch, pdl: bool = False) -> None:
        """With items that were dealt."""
        paged_decode_attention(
            self.q_THE, self.k_cache, self.v_cache, self.tables_RB, out_SHE, cut, scratch, block_size=self.block_size,
            pdl=pdl,
        )  # fmt: skip

    def prefill(self, **choice: int) -> torch.Tensor:
        """`paged_prefill_attention` into a poisoned output."""
        out = torch.full_like(self.q_THE, float("nan"))
        self.prefill_into(out, self.tiles(**choice))
        return out

    def prefill_into(self, out_THE: torch.Tensor, tiles: PrefillTiles) -> None:
        """With tiles from `tiles`."""
        paged_prefill_attention(
            self.q_THE, self.k_cache, self.v_cache, self.tables_RB, tiles, out_THE, block_size=self.block_size
        )

    def tiles(self, **choice: int) -> PrefillTiles:
        """Of `prefill`; choice: `hopper_rows`."""
        T, H, _ = self.q_THE.shape
        return prefill_tiles(
            self.rows, self.starts, self.contexts, T, H, self.k_cache, self.q_THE.dtype, block_size=self.block_size,
            **choice,
        )  # fmt: skip

    def reference(self) -> torch.Tensor:
        """The same in float64, a sequence at a time."""
        out = torch.zeros_like(self.q_THE, dtype=torch.float64)
        groups = self.q_THE.shape[1] // self.k_cache.shape[1]
        for p, slots in enumerate(self.slots):
            rows = slice(int(self.starts[p]), int(self.starts[p + 1]))
            if not len(slots) or rows.start == rows.stop:
                continue
            q_HQE = self.q_THE[rows].double().transpose(0, 1)
            k_HLE = self.k_cache[slots].double().transpose(0, 1).repeat_interleave(groups, 0)
            v_HLE = self.v_cache[slots].double().transpose(0, 1).repeat_interleave(groups, 0)
            score = q_HQE @ k_HLE.transpose(1, 2) / q_HQE.shape[-1] ** 0.5
            last = int(self.contexts[p]) + torch.arange(q_HQE.shape[1], device=score.device)
            hidden = torch.arange(len(slots), device=score.device) > last[:, None]
            out[rows] = (score.masked_fill(hidden, float("-inf")).softmax(-1) @ v_HLE).transpose(0, 1)
        return out


def paged(
    contexts: list[int],
    queries: list[int],
    *,
    heads: int,
    kv_heads: int,
    width: int,
    dtype: torch.dtype,
    device: str = "cuda",
    block_size: int = 16,
    index: torch.dtype = torch.int64,
) -> Paged:
    """Random sequences in random blocks; slots that no sequence owns hold nan."""
    lens = [context + query for context, query in zip(contexts, queries, strict=True)]
    blocks = [-(-n // block_size) for n in lens]
    pool = torch.randperm(sum(blocks) + 3, device=device)
    rows = torch.randperm(len(lens) + 2, device=device)[: len(lens)]
    tables_RB = torch.full((len(lens) + 2, max(*blocks, 1) + 1), 2**30, dtype=index, device=device)
    size = (len(pool) * block_size, kv_heads, width)
    k_cache, v_cache = (torch.full(size, float("nan"), dtype=dtype, device=device) for _ in range(2))
    slots = []
    for p, count in enumerate(blocks):
        own, pool = pool[:count], pool[count:]
        tables_RB[rows[p], :count] = own.to(index)
        slots.append((own[:, None] * block_size + torch.arange(block_size, device=device)).flatten()[: lens[p]])
        for cache in (k_cache, v_cache):
            cache[slots[p]] = torch.randn(lens[p], kv_heads, width, device=device).to(dtype)
    starts = torch.tensor([0, *queries], device=device).cumsum(0)
    # Queries are a slice of a wider row, as they are after a fused projection.
    q_THE = torch.randn(sum(queries), heads + 2 * kv_heads, width, device=device).to(dtype)[:, :heads]
    return Paged(
        q_THE, k_cache, v_cache, tables_RB, rows.to(index), starts,
        torch.tensor(contexts, dtype=torch.int32, device=device), torch.tensor(lens, dtype=torch.int32, device=device),
        slots, block_size,
    )  # fmt: skip


def error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """‖out − ref‖ / ‖ref‖."""
    return float((out.double() - reference).norm() / reference.norm())


def ragged(count: int, longest: int) -> list[int]:
    """Random lengths with the awkward ones among them."""
    lens = [random.randint(1, longest) for _ in range(count)]
    return [1, 15, 16, 17, 63, 64, 65, longest, *lens][:count] if count > 8 else lens
