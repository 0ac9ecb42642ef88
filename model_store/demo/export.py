"""Step 3 of 3: writes the trained network as the two shards that a Fairscale training run of two ranks would save.

    torchrun --nproc-per-node 2 model_store/demo/export.py --model WORK_DIR/model.pt \\
        --tokenizer WORK_DIR/tokenizer.model --out model_store/demo

Each rank builds the network of fairscale layers, takes its part of every matrix, checks that both ranks
together compute the logits of the whole network, and saves its own `state_dict()`. Needs `fairscale` and no GPU.

Shapes: B rows, T tokens, D residual width.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
from pathlib import Path

import fairscale.nn.model_parallel.initialize as fs_init
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear
from torch import nn
from train import Network, RMSNorm, rope_freqs, rotate

MAX_LOGIT_ERROR = 1e-3


class Attention(nn.Module):
    """This rank's heads."""

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int) -> None:
        super().__init__()
        self.head_dim = dim // n_heads
        self.wq = ColumnParallelLinear(dim, dim, bias=False, gather_output=False)
        self.wk = ColumnParallelLinear(dim, n_kv_heads * self.head_dim, bias=False, gather_output=False)
        self.wv = ColumnParallelLinear(dim, n_kv_heads * self.head_dim, bias=False, gather_output=False)
        self.wo = RowParallelLinear(dim, dim, bias=False, input_is_parallel=True)
        self.group_size = n_heads // n_kv_heads

    def forward(self, x_BTD: torch.Tensor, rope_TE2: torch.Tensor) -> torch.Tensor:
        q, k, v = (w(x_BTD).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(q, rope_TE2), rotate(k, rope_TE2)
        k, v = (x.repeat_interleave(self.group_size, dim=2) for x in (k, v))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: torch.Tensor = self.wo(o.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """This rank's part of the hidden width."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = ColumnParallelLinear(dim, hidden, bias=False, gather_output=False)
        self.w2 = RowParallelLinear(hidden, dim, bias=False, input_is_parallel=True)
        self.w3 = ColumnParallelLinear(dim, hidden, bias=False, gather_output=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class Block(nn.Module):
    """One layer."""

    def __init__(self, params: dict[str, float], hidden: int) -> None:
        super().__init__()
        dim = int(params["dim"])
        self.attention = Attention(dim, int(params["n_heads"]), int(params["n_kv_heads"]))
        self.feed_forward = FeedForward(dim, hidden)
        self.attention_norm = RMSNorm(dim, params["norm_eps"])
        self.ffn_norm = RMSNorm(dim, params["norm_eps"])

    def forward(self, h: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        h = h + self.attention(self.attention_norm(h), rope)
        out: torch.Tensor = h + self.feed_forward(self.ffn_norm(h))
        return out


class Rope(nn.Module):
    """Holds `rope.freqs`, a buffer that Meta's files carry."""

    freqs: torch.Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("freqs", rope_freqs(head_dim))


class ParallelNetwork(nn.Module):
    """The network as one rank of a Fairscale model-parallel group sees it."""

    def __init__(self, params: dict[str, float], vocab_size: int, hidden: int) -> None:
        super().__init__()
        dim = int(params["dim"])
        self.tok_embeddings = ParallelEmbedding(vocab_size, dim)
        self.layers = nn.ModuleList(Block(params, hidden) for _ in range(int(params["n_layers"])))
        self.norm = RMSNorm(dim, params["norm_eps"])
        self.output = ColumnParallelLinear(dim, vocab_size, bias=False)
        self.rope = Rope(dim // int(params["n_heads"]))

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        angles = torch.outer(torch.arange(tokens_BT.shape[1]).float(), self.rope.freqs)
        rope = torch.stack((angles.cos(), angles.sin()), -1)
        h = self.tok_embeddings(tokens_BT)
        for block in self.layers:
            h = block(h, rope)
        logits: torch.Tensor = self.output(self.norm(h))
        return logits


def take_part(net: ParallelNetwork, whole: dict[str, torch.Tensor], rank: int) -> None:
    """Copies this rank's part of every matrix: the rows of a column-parallel one, the columns of a row-parallel one."""
    with torch.no_grad():
        for name, p in net.named_parameters():
            source = whole[name].float()
            for dim in range(p.dim()):
                if p.shape[dim] != source.shape[dim]:
                    source = source.chunk(dist.get_world_size(), dim)[rank]
            p.copy_(source)


def md5(path: Path) -> str:
    """Hex digest, as Meta's `checklist.chk` holds it."""
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def main() -> None:
    """Exports; run by every rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    fs_init.initialize_model_parallel(dist.get_world_size())
    rank = fs_init.get_model_parallel_rank()
    params = json.loads(options.model.with_name("params.json").read_text(encoding="utf-8"))
    whole = torch.load(options.model, weights_only=True)
    vocab_size = whole["output.weight"].shape[0]

    net = ParallelNetwork(params, vocab_size, whole["layers.0.feed_forward.w1.weight"].shape[0])
    take_part(net, whole, rank)
    reference = Network(params, vocab_size).eval()
    reference.load_state_dict({name: p.float() for name, p in whole.items()})
    with torch.no_grad():
        tokens = torch.arange(3, 67)[None] * 29 % vocab_size
        error = (net(tokens) - reference(tokens)).abs().max().item()
    if math.isnan(error) or error > MAX_LOGIT_ERROR:
        raise SystemExit(f"rank {rank}: the shards' logits differ from the network's by {error}")

    options.out.mkdir(parents=True, exist_ok=True)
    shard = {name: tensor.half().clone() for name, tensor in net.state_dict().items()}
    torch.save(shard, options.out / f"consolidated.{rank:02d}.pth")
    dist.barrier()
    if rank == 0:
        (options.out / "params.json").write_text(json.dumps(params), encoding="utf-8")
        shutil.copyfile(options.tokenizer, options.out / "tokenizer.model")
        names = [f"consolidated.{i:02d}.pth" for i in range(dist.get_world_size())] + ["params.json"]
        for checklist, listed in (("checklist.chk", names), ("tokenizer_checklist.chk", ["tokenizer.model"])):
            lines = [f"{md5(options.out / name)}  {name}\n" for name in listed]
            (options.out / checklist).write_text("".join(lines), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
