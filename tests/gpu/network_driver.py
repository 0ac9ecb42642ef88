"""A random network with a cache, and the steps that are given to it."""

from __future__ import annotations

import copy
import itertools

import torch

from tests.gpu.conftest import SEED
from tpserve.model.args import ModelArgs
from tpserve.model.attention import SequenceSlice
from tpserve.model.fused_network import FusedNetwork
from tpserve.model.kv_cache import PagedKVCache
from tpserve.model.llama import Llama
from tpserve.model.network import Network, PlainNetwork, StepInputs
from tpserve.model.parallel import TensorParallel
from tpserve.model.rope import rope_table

BLOCK, MAX_LEN, ROWS, BLOCKS = 16, 512, 40, 1400
# Dim, heads, key/value heads; the last one's products are `rows_product.py`'s, of up to 128 tokens.
SHAPES = [(1024, 8, 8), (1024, 8, 2), (4096, 32, 8)]


def llama(dim: int, heads: int, kv_heads: int) -> Llama:
    args = ModelArgs.from_params(
        {"dim": dim, "n_layers": 3, "n_heads": heads, "n_kv_heads": kv_heads, "vocab_size": 1000, "multiple_of": 256,
         "norm_eps": 1e-5}
    )  # fmt: skip
    torch.manual_seed(SEED)
    with torch.device("cuda"):
        model = Llama(args, MAX_LEN)
        for name, weight in model.named_parameters():
            with torch.no_grad():
                if weight.ndim == 1:
                    weight.copy_(1 + 0.1 * torch.randn_like(weight))
                else:
                    weight.normal_().mul_(1.0 if "tok_embeddings" in name else weight.shape[1] ** -0.5)
    model.rope_PC2 = rope_table(args, MAX_LEN, torch.device("cuda"))
    return model.eval()


class Driver:
    """Gives the same steps to a network, with tokens that do not depend on it."""

    def __init__(self, model: Llama, dtype: torch.dtype, fused: bool, graphs: bool = True) -> None:
        model = copy.deepcopy(model).to(dtype)
        model.rope_PC2 = model.rope_PC2.float()
        device = torch.device("cuda")
        args = model.args
        self._cache = cache = PagedKVCache(
            args.n_layers, BLOCKS, BLOCK, args.n_kv_heads, args.head_dim, dtype=dtype, device=device
        )
        generator = torch.Generator().manual_seed(SEED + 1)
        self.tokens = torch.randint(0, 1000, (ROWS, MAX_LEN + 1), generator=generator).to(device)
        self._given = self.tokens.clone()
        order = torch.randperm(BLOCKS, generator=generator)[: ROWS * MAX_LEN // BLOCK]
        self.tables = tables = order.view(ROWS, -1).to(device)
        self.network: Network = (
            FusedNetwork(model, cache, self.tokens, tables, TensorParallel(), max_num_seqs=ROWS, graphs=graphs)
            if fused
            else PlainNetwork(model, cache, self.tokens, tables)
        )
        self.network.warm_up()

    @torch.inference_mode()
    def improve(self, idle: bool) -> int:
        """All that there is to improve; how many pieces it was."""
        pieces = 0
        while self.network.improvable and pieces < 100:
            self.network.improve(idle)
            pieces += 1
            if not idle:
                break
        return pieces

    def forget(self) -> None:
        """All keys and values; what is read nevertheless is far off."""
        for tensor in (*self._cache.k, *self._cache.v):
            tensor.fill_(100)

    @torch.inference_mode()
    def step(self, parts: list[tuple[int, int, int]], asked: bool = True) -> torch.Tensor:
        """Parts are (row, first position, tokens), those of one token first; the logits of each one's last token, or
        of none. As the engine's arrays, these lie one behind the other."""
        rows = [row for row, _, n in parts for _ in range(n)]
        positions = [p for _, start, n in parts for p in range(start, start + n)]
        decodes = [start + 1 for _, start, n in parts if n == 1]
        others = [(row, start, n) for row, start, n in parts if n > 1]
        begins = [len(decodes)]
        for _, _, n in others:
            begins.append(begins[-1] + n)
        last = [sum(n for _, _, n in parts[: i + 1]) - 1 for i in range(len(parts))]
        chunks = [*(row for row, _, _ in others), 0, *begins, *(start for _, start, _ in others), 0]
        self.tokens.copy_(self._given)  # some steps draw
        arrays = (rows, positions, chunks, last if asked else [])
        sent = torch.tensor(list(itertools.chain(*arrays)), device="cuda").split_with_sizes(
            [len(array) for array in arrays]
        )
        return self.network(
            StepInputs(
                sent[0],
                sent[1],
                decodes,
                [SequenceSlice(start, n) for _, start, n in others],
                sent[2].view(3, -1) if others else None,
                sent[3] if others else None,
            )
        ).clone()
