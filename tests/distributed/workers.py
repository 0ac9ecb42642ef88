"""What the processes of the tensor-parallel tests do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode

from tpserve.model.attention import PagedAttention, SequenceSlice
from tpserve.model.kv_cache import PagedKVCache
from tpserve.model.loader import load_model
from tpserve.model.parallel import TensorParallel, num_kv_heads


def join(rank: int, world_size: int, store: str) -> None:
    """Enters a gloo group that meets at a file."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)


def leave() -> None:
    """Ends this process in success. Without torch's teardown at exit: it has aborted ranks that had finished."""
    dist.barrier()
    os._exit(0)


def two_steps(rank: int, world_size: int, store: str, folder: str, tokens: list[int], out: str, dtype: str) -> None:
    """Prefills all but the last token, decodes that one, counts the second step's collectives; rank 0 saves it all."""
    if world_size > 1:
        join(rank, world_size, store)
    loaded = load_model(Path(folder), dtype=getattr(torch, dtype), max_seq_len=64)
    args = loaded.info.args
    n, blocks = len(tokens), -(-len(tokens) // 4)
    heads = num_kv_heads(args, loaded.tp)
    cache = PagedKVCache(args.n_layers, blocks, 4, heads, args.head_dim, dtype=loaded.dtype, device=loaded.device)
    logits = []
    with torch.inference_mode():
        for start, stop in ((0, n - 1), (n - 1, n)):
            positions, table = torch.arange(start, stop), torch.arange(blocks)[None]
            decodes = [stop] if stop - start == 1 else []
            prefills = [] if decodes else [SequenceSlice(start, stop - start)]
            attend = PagedAttention(cache, table, torch.zeros_like(positions), positions, decodes, prefills)
            with CommDebugMode() as comms:
                logits.append(loaded.model(torch.tensor(tokens[start:stop]), torch.arange(start, stop), attend))
    counts = {str(op): count for op, count in comms.get_comm_counts().items() if count}
    assert not any("DTensor" in type(p).__name__ for p in loaded.model.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in loaded.model.modules())
    if rank == 0:
        torch.save({"logits": torch.cat(logits), "counts": counts}, out)
    if world_size > 1:
        leave()


def collectives(rank: int, world_size: int, store: str, dtypes: str) -> None:
    """Checks the sum and the gather of these types (with commas between), with a vocabulary that does not divide; and
    that the ranks agree on what one of them cannot make."""
    join(rank, world_size, store)
    tp = TensorParallel.from_world()
    for dtype in (getattr(torch, name) for name in dtypes.split(",")):
        x = torch.full((3, 8), rank + 1.0, dtype=dtype)
        assert torch.equal(tp.all_reduce(x), torch.full_like(x, world_size * (world_size + 1) / 2)), dtype
        for vocab in (world_size * 4, world_size * 4 - 1, 17):
            whole = torch.arange(2 * vocab, dtype=torch.float32).view(2, vocab).to(dtype)
            own = whole.chunk(world_size, dim=1)[rank]
            gathered = tp.gather_vocabulary(own, vocab)
            assert torch.equal(gathered, whole), dtype
            assert gathered.is_contiguous(), vocab  # kernels that draw ask for it
            assert tp.gather_vocabulary(own[:0], vocab).shape == (0, vocab)  # a step may ask for nothing

    def fails_on_rank_1() -> str:
        if rank == 1:
            raise RuntimeError("no peer access")
        return "made"

    cpu = torch.device("cpu")
    assert tp.made_by_all(lambda: f"rank {rank}'s", cpu) == f"rank {rank}'s"
    assert tp.made_by_all(fails_on_rank_1, cpu) is None, "the ranks must do without, all of them"
    leave()


class FairscaleLlama(nn.Module):
    """A Llama of Fairscale's layers, written from the architecture alone: complex rotation, dense mask, no cache."""

    def __init__(self, params: dict[str, Any], hidden: int) -> None:
        super().__init__()
        from fairscale.nn.model_parallel.layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear

        self.params = params
        dim, kv = params["dim"], params["dim"] // params["n_heads"] * params["n_kv_heads"]
        column = {"bias": False, "gather_output": False}
        row = {"bias": False, "input_is_parallel": True}
        self.tok_embeddings = ParallelEmbedding(params["vocab_size"], dim)
        self.layers = nn.ModuleList()
        for _ in range(params["n_layers"]):
            block = nn.Module()
            block.attention = nn.Module()
            block.attention.wq = ColumnParallelLinear(dim, dim, **column)
            block.attention.wk = ColumnParallelLinear(dim, kv, **column)
            block.attention.wv = ColumnParallelLinear(dim, kv, **column)
            block.attention.wo = RowParallelLinear(dim, dim, **row)
            block.feed_forward = nn.Module()
            block.feed_forward.w1 = ColumnParallelLinear(dim, hidden, **column)
            block.feed_forward.w2 = RowParallelLinear(hidden, dim, **row)
            block.feed_forward.w3 = ColumnParallelLinear(dim, hidden, **column)
            block.attention_norm = nn.RMSNorm(dim, params["norm_eps"])
            block.ffn_norm = nn.RMSNorm(dim, params["norm_eps"])
            self.layers.append(block)
        self.norm = nn.RMSNorm(dim, params["norm_eps"])
        self.output = ColumnParallelLinear(dim, params["vocab_size"], bias=False, gather_output=True)

    def forward(self, tokens: Tensor) -> Tensor:
        width, n = self.params["dim"] // self.params["n_heads"], len(tokens)
        freqs = 10000.0 ** (-torch.arange(0, width, 2) / width)
        angles = torch.arange(n)[:, None, None] * freqs
        turn = torch.polar(torch.ones_like(angles), angles)

        def rotate(x: Tensor) -> Tensor:
            return torch.view_as_real(torch.view_as_complex(x.view(n, -1, width // 2, 2)) * turn).flatten(-2)

        h = self.tok_embeddings(tokens)
        for block in self.layers:
            a = block.attention
            x = block.attention_norm(h)
            q, k, v = rotate(a.wq(x)), rotate(a.wk(x)), a.wv(x).view(n, -1, width)
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
            scores = torch.einsum("qhe,khe->hqk", q, k) / width**0.5
            scores = scores + torch.full((n, n), -torch.inf).triu(1)
            h = h + a.wo(torch.einsum("hqk,khe->qhe", scores.softmax(-1), v).flatten(-2))
            x, f = block.ffn_norm(h), block.feed_forward
            h = h + f.w2(F.silu(f.w1(x)) * f.w3(x))
        return self.output(self.norm(h))


def fairscale_checkpoint(
    rank: int, world_size: int, store: str, folder: str, params: dict[str, Any], hidden: int, tokens: list[int]
) -> None:
    """Fairscale's own shards of a random network, and its own logits."""
    from fairscale.nn.model_parallel.initialize import initialize_model_parallel

    join(rank, world_size, store)
    initialize_model_parallel(world_size)
    torch.manual_seed(rank)
    model = FairscaleLlama(params, hidden)
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    with torch.no_grad():
        for norm in norms:
            norm.uniform_(0.5, 1.5)
            dist.broadcast(norm, 0)
        logits = model(torch.tensor(tokens))
    torch.save(model.state_dict(), Path(folder) / f"consolidated.{rank:02d}.pth")
    if rank == 0:
        (Path(folder) / "params.json").write_text(json.dumps(params))
        torch.save(logits, Path(folder) / "logits.pt")
    leave()
