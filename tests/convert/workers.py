"""What the processes of the distributed tests do."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, empty

from tests.helpers.shards import TINY_PARAMS, random_weights
from tpserve.model.plan import tp_dim


def _join(rank: int, world_size: int, store: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)


def leave() -> None:
    """Ends this process in success. Without torch's teardown at exit: it has aborted ranks that had finished."""
    dist.barrier()
    os._exit(0)


def load_as_dtensors(rank: int, world_size: int, store: str, folder: str) -> None:
    """Loads a folder with stock PyTorch into DTensors sharded by the TP plan and checks this rank's part."""
    _join(rank, world_size, store)
    mesh = init_device_mesh("cpu", (world_size,))
    weights = random_weights(TINY_PARAMS)
    state: dict[str, DTensor] = {}
    for name, weight in weights.items():
        dim = tp_dim(name)
        state[name] = empty(*weight.shape, device_mesh=mesh, placements=[Replicate() if dim is None else Shard(dim)])
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder))
    for name, weight in weights.items():
        dim = tp_dim(name)
        expected = weight if dim is None else weight.chunk(world_size, dim)[rank]
        assert torch.equal(state[name].to_local(), expected), name
    leave()


def save_fairscale_shard(rank: int, world_size: int, store: str, folder: str, vocab_parallel: bool) -> None:
    """Builds `TINY_PARAMS` of Fairscale's own layers; saves this rank's shard, and rank 0 the uncut weights."""
    from fairscale.nn.model_parallel import initialize as fs
    from fairscale.nn.model_parallel import layers

    _join(rank, world_size, store)
    fs.initialize_model_parallel(world_size)
    torch.manual_seed(3)  # Fairscale makes the whole matrix on every rank and keeps its own part
    dim, hidden, vocab = TINY_PARAMS["dim"], 88, TINY_PARAMS["vocab_size"]
    kv_dim = dim // TINY_PARAMS["n_heads"] * TINY_PARAMS["n_kv_heads"]
    whole: dict[str, Tensor] = {}
    shard: dict[str, Tensor] = {}

    def build(name: str, layer: type[torch.nn.Module], size_in: int, size_out: int) -> None:
        def remember(weight: Tensor) -> Tensor:
            with torch.no_grad():
                weight.normal_()
            whole[name] = weight.detach().clone()
            return weight

        options = {} if "Embedding" in layer.__name__ else {"bias": False}
        shard[name] = layer(size_in, size_out, init_method=remember, **options).state_dict()["weight"]

    embedding = layers.VocabParallelEmbedding if vocab_parallel else layers.ParallelEmbedding
    column, row = layers.ColumnParallelLinear, layers.RowParallelLinear
    build("tok_embeddings.weight", embedding, vocab, dim)
    for i in range(TINY_PARAMS["n_layers"]):
        build(f"layers.{i}.attention.wq.weight", column, dim, dim)
        build(f"layers.{i}.attention.wk.weight", column, dim, kv_dim)
        build(f"layers.{i}.attention.wv.weight", column, dim, kv_dim)
        build(f"layers.{i}.attention.wo.weight", row, dim, dim)
        build(f"layers.{i}.feed_forward.w1.weight", column, dim, hidden)
        build(f"layers.{i}.feed_forward.w2.weight", row, hidden, dim)
        build(f"layers.{i}.feed_forward.w3.weight", column, dim, hidden)
        for norm in ("attention_norm", "ffn_norm"):
            whole[f"layers.{i}.{norm}.weight"] = shard[f"layers.{i}.{norm}.weight"] = torch.rand(dim)
    whole["norm.weight"] = shard["norm.weight"] = torch.rand(dim)
    build("output.weight", column, dim, vocab)
    torch.save(shard, Path(folder) / f"consolidated.{rank:02d}.pth")
    if rank == 0:
        torch.save(whole, Path(folder) / "whole.pt")
    leave()
