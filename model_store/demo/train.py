"""Step 2 of 3: trains the demo model on what `prepare.py` wrote.

    python model_store/demo/train.py --data WORK_DIR --out WORK_DIR/model.pt

One GPU takes a few minutes; without one it runs in float32 on the CPU (`--steps 20` to see that it works).
`model.pt` holds the whole network in float16 under Meta's names, and `params.json` stands beside it.

Shapes: B rows of a batch, T tokens, D residual width, H query heads, K key/value heads, E head width, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.nn.functional as F
from torch import nn

CONTEXT = 512
CHAT_SHARE = 0.3  # of the rows
TALE_START_SHARE = 0.1  # of the rows: these begin with BOS and a tale's first words
PARAMS = {
    "dim": 256,
    "multiple_of": 32,
    "ffn_dim_multiplier": 0.7,
    "n_heads": 8,
    "n_kv_heads": 4,
    "n_layers": 5,
    "norm_eps": 1e-05,
    "vocab_size": -1,
}
PROMPTS = (
    "Once upon a time",
    "There was once a poor fisherman",
    "[INST] Tell me a story about a king. [/INST]",
    "[INST] Tell me a story about a wolf. [/INST]",
    "[INST] Can you tell me about a witch and a princess? [/INST]",
)

log = logging.getLogger("train")


class RMSNorm(nn.Module):
    """Root-mean-square normalisation."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention with Meta's interleaved rotary embedding."""

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, dropout: float) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, dim // n_heads
        self.wq = nn.Linear(dim, n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(n_heads * self.head_dim, dim, bias=False)
        self.dropout = dropout

    def forward(self, x_BTD: torch.Tensor, rope_TE2: torch.Tensor) -> torch.Tensor:
        q, k, v = (w(x_BTD).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(q, rope_TE2), rotate(k, rope_TE2)
        k, v = (x.repeat_interleave(self.n_heads // self.n_kv_heads, dim=2) for x in (k, v))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        o = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        out: torch.Tensor = self.wo(o.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class Block(nn.Module):
    """One layer."""

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, hidden: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(dim, n_heads, n_kv_heads, dropout)
        self.feed_forward = FeedForward(dim, hidden)
        self.attention_norm = RMSNorm(dim, eps)
        self.ffn_norm = RMSNorm(dim, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        h = h + self.dropout(self.attention(self.attention_norm(h), rope))
        out: torch.Tensor = h + self.dropout(self.feed_forward(self.ffn_norm(h)))
        return out


class Network(nn.Module):
    """A Llama for training: dense, whole rows, with dropout."""

    rope_TE2: torch.Tensor

    def __init__(self, params: dict[str, float], vocab_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        dim, n_heads, n_layers = (int(params[name]) for name in ("dim", "n_heads", "n_layers"))
        hidden = int(params["ffn_dim_multiplier"] * int(2 * (4 * dim) / 3))
        hidden = int(params["multiple_of"] * math.ceil(hidden / params["multiple_of"]))
        self.tok_embeddings = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(
            Block(dim, n_heads, int(params["n_kv_heads"]), hidden, params["norm_eps"], dropout) for _ in range(n_layers)
        )
        self.norm = RMSNorm(dim, params["norm_eps"])
        self.output = nn.Linear(dim, vocab_size, bias=False)
        self.dropout = nn.Dropout(dropout)
        angles = torch.outer(torch.arange(CONTEXT).float(), rope_freqs(dim // n_heads))
        self.register_buffer("rope_TE2", torch.stack((angles.cos(), angles.sin()), -1), persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(
                    p, std=0.02 / math.sqrt(2 * n_layers) if name.endswith(("wo.weight", "w2.weight")) else 0.02
                )

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        h = self.dropout(self.tok_embeddings(tokens_BT))
        rope = self.rope_TE2[: tokens_BT.shape[1]]
        for block in self.layers:
            h = block(h, rope)
        logits: torch.Tensor = self.output(self.norm(h))
        return logits


def rope_freqs(head_dim: int) -> torch.Tensor:
    """Rotary frequencies, base 10000, [head_dim / 2]."""
    return 1.0 / (10000.0 ** (torch.arange(0, head_dim, 2).float() / head_dim))


def rotate(x_BTHE: torch.Tensor, rope_TE2: torch.Tensor) -> torch.Tensor:
    """Rotates neighbouring pairs by their position's angles."""
    even, odd = x_BTHE.float().view(*x_BTHE.shape[:-1], -1, 2).unbind(-1)
    cos, sin = rope_TE2[:, None].unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).type_as(x_BTHE)


class Rows:
    """Draws rows of CONTEXT + 1 tokens, and marks which tokens count in the loss."""

    def __init__(self, data: Path, split: str, device: str, seed: int) -> None:
        with np.load(data / "tokens.npz") as arrays:
            a = {name.removeprefix(f"{split}_"): arrays[name] for name in arrays.files if name.startswith(split)}
        self.tales, self.chats = (torch.from_numpy(a[name].astype(np.int32)).to(device) for name in ("tales", "chats"))
        self.answers = torch.from_numpy(a["answers"]).to(device)
        self.tale_starts, self.chat_starts = (
            torch.from_numpy(a[f"{kind}_starts"]).to(device) for kind in ("tale", "chat")
        )
        self.span = torch.arange(CONTEXT + 1, device=device)
        self.random = torch.Generator(device).manual_seed(seed)

    def _draw(self, stream: torch.Tensor, starts: torch.Tensor | None, n: int) -> torch.Tensor:
        last = len(stream) - CONTEXT - 1
        if starts is None:
            begin = torch.randint(last + 1, (n,), generator=self.random, device=stream.device)
        else:
            begin = starts[torch.randint(len(starts), (n,), generator=self.random, device=stream.device)].clamp(
                max=last
            )
        return begin[:, None] + self.span

    def draw(self, n_rows: int, chat_share: float = CHAT_SHARE) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [n_rows, CONTEXT + 1] and, of the same shape, True where a token is to be predicted."""
        n_chats = round(n_rows * chat_share)
        n_starts = min(round(n_rows * TALE_START_SHARE), n_rows - n_chats)
        chats = self._draw(self.chats, self.chat_starts, n_chats)
        begun = self._draw(self.tales, self.tale_starts, n_starts)
        tales = torch.cat((begun, self._draw(self.tales, None, n_rows - n_chats - n_starts)))
        counts = torch.cat((torch.ones_like(tales, dtype=torch.bool), self.answers[chats]))
        return torch.cat((self.tales[tales], self.chats[chats])).long(), counts


def loss_of(logits_BTV: torch.Tensor, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy (nats a token) of the tokens that count."""
    wanted = torch.where(counts[:, 1:], rows[:, 1:], -100)
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), wanted.flatten(), ignore_index=-100)


@torch.no_grad()
def sample(
    net: Callable[[torch.Tensor], torch.Tensor], tokenizer: spm.SentencePieceProcessor, prompt: str, temperature: float
) -> str:
    """Continues a prompt by up to 160 tokens; temperature 0 is greedy."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    random = torch.Generator(device).manual_seed(1)
    tokens = torch.tensor([[tokenizer.bos_id(), *tokenizer.encode(prompt)]], device=device)
    for _ in range(160):
        logits = net(tokens)[0, -1].float()
        if temperature:
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=random)
        else:
            token = logits.argmax(keepdim=True)
        if token.item() == tokenizer.eos_id():
            break
        tokens = torch.cat((tokens, token[None]), dim=1)
    return str(tokenizer.decode(tokens[0].tolist()))


def evaluate(net: Callable[[torch.Tensor], torch.Tensor], data: Path, device: str) -> tuple[float, float]:
    """Validation losses on tales and on answers, on the same 128 + 128 rows each time."""
    rows = Rows(data, "val", device, seed=7)
    losses = []
    for chat_share in (0.0, 1.0):
        batches = [rows.draw(32, chat_share) for _ in range(4)]
        with torch.no_grad():
            losses.append(sum(loss_of(net(tokens[:, :-1]), tokens, counts).item() for tokens, counts in batches) / 4)
    return losses[0], losses[1]


def main() -> None:
    """Trains, saves the last weights (or those with the best validation loss on tales), and logs samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--eval-every", type=int, default=1000)
    parser.add_argument("--keep", choices=("best", "last"), default="last")
    o = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(1)
    tokenizer = spm.SentencePieceProcessor(model_file=str(o.data / "tokenizer.model"))
    raw = Network(PARAMS, tokenizer.vocab_size(), o.dropout).to(device)
    net = torch.compile(raw) if device == "cuda" else raw
    matrices = [p for p in raw.parameters() if p.dim() == 2]
    vectors = [p for p in raw.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": o.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=o.lr,
        betas=(0.9, 0.95),
        fused=device == "cuda",
    )
    warmup = min(200, o.steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warmup, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, i / o.steps)))),
    )
    log.info("%d parameters, %s", sum(p.numel() for p in raw.parameters()), o)
    rows = Rows(o.data, "train", device, seed=1)
    best, kept, began = math.inf, {}, time.monotonic()
    for step in range(1, o.steps + 1):
        tokens, counts = rows.draw(o.rows)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = loss_of(net(tokens[:, :-1]), tokens, counts)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(raw.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % o.eval_every == 0 or step == o.steps:
            raw.eval()
            tales, answers = evaluate(raw, o.data, device)
            raw.train()
            train_loss, seconds = loss.item(), time.monotonic() - began
            log.info(
                "step %d, %.0f s: train %.3f, val tales %.3f, answers %.3f", step, seconds, train_loss, tales, answers
            )
            if tales < best or o.keep == "last":
                best = min(best, tales)
                kept = {name: p.detach().half().cpu() for name, p in raw.state_dict().items()}
                torch.save(kept, o.out)
    o.out.with_name("params.json").write_text(json.dumps(PARAMS), encoding="utf-8")
    raw.load_state_dict(kept)
    raw.eval()
    for prompt in PROMPTS:
        for temperature in (0.0, 0.8):
            log.info("--- temperature %g: %s", temperature, sample(raw, tokenizer, prompt, temperature))


if __name__ == "__main__":
    main()
