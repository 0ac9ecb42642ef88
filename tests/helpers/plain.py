"""The network once more, from its definition: numpy float64, one sequence, no cache; nothing is the engine's."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class PlainLlama:
    """A Llama from Meta's weights.

    Args:
        params: of `params.json`.
        weights: all of them by Meta's names, not cut.
    """

    def __init__(self, params: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> None:
        self._params = params
        self._weights = {name: weight.double().numpy() for name, weight in weights.items()}

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype = torch.float64) -> PlainLlama:
        """Reads a checkpoint of one file, its weights rounded to `dtype`."""
        weights = torch.load(folder / "consolidated.00.pth", weights_only=True)
        params = json.loads((folder / "params.json").read_text(encoding="utf-8"))
        return cls(params, {name: weight.to(dtype) for name, weight in weights.items()})

    def logits(self, token_ids: list[int]) -> Floats:
        """[T, V]: what follows each token."""
        n_heads, n_kv_heads = self._params["n_heads"], self._params.get("n_kv_heads") or self._params["n_heads"]
        h = self._weights["tok_embeddings.weight"][token_ids]
        n = len(token_ids)
        future = np.triu(np.full((n, n), -np.inf), k=1)
        for i in range(self._params["n_layers"]):
            name = f"layers.{i}.attention"
            x = self._norm(h, f"layers.{i}.attention_norm")
            q = _rotate(self._linear(x, f"{name}.wq").reshape(n, n_heads, -1))
            k = _rotate(self._linear(x, f"{name}.wk").reshape(n, n_kv_heads, -1))
            v = self._linear(x, f"{name}.wv").reshape(n, n_kv_heads, -1)
            k, v = (np.repeat(t, n_heads // n_kv_heads, axis=1) for t in (k, v))
            scores = np.einsum("qhe,khe->hqk", q, k) / math.sqrt(q.shape[-1]) + future
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            h = h + self._linear(np.einsum("hqk,khe->qhe", weights, v).reshape(n, -1), f"{name}.wo")
            name = f"layers.{i}.feed_forward"
            x = self._norm(h, f"layers.{i}.ffn_norm")
            gate = self._linear(x, f"{name}.w1")
            h = h + self._linear(gate / (1 + np.exp(-gate)) * self._linear(x, f"{name}.w3"), f"{name}.w2")
        return self._linear(self._norm(h, "norm"), "output")

    def _linear(self, x: Floats, name: str) -> Floats:
        y: Floats = x @ self._weights[f"{name}.weight"].T
        return y

    def _norm(self, x: Floats, name: str) -> Floats:
        scale: Floats = np.sqrt((x * x).mean(axis=-1, keepdims=True) + self._params["norm_eps"])
        y: Floats = x / scale * self._weights[f"{name}.weight"]
        return y


def _rotate(x: Floats) -> Floats:
    """Rotary embedding of [T, heads, width]: neighbours are the two parts of a complex number."""
    n, _, width = x.shape
    angles = np.outer(np.arange(n), 10000.0 ** (-np.arange(0, width, 2) / width))
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
    return np.stack((z.real, z.imag), axis=-1).reshape(x.shape)


def log_softmax(logits: Floats) -> Floats:
    """Natural logarithms of the probabilities; any [..., V]."""
    highest = logits.max(axis=-1, keepdims=True)
    y: Floats = logits - highest - np.log(np.exp(logits - highest).sum(axis=-1, keepdims=True))
    return y
