"""Paged key/value tensors (Kwon et al., "PagedAttention", 2023): blocks of `block_size` tokens, owned by the engine."""

from __future__ import annotations

import torch


class PagedKVCache:
    """The keys and values of one rank, all layers.

    A *slot* is one token's place: block b holds slots [b·block_size, (b+1)·block_size). The cache does not know who
    owns which block.

    Attributes:
        k, v: a tensor a layer, [num_blocks · block_size, K, E] (K key/value heads of this rank, E head width).
    """

    def __init__(
        self,
        n_layers: int,
        num_blocks: int,
        block_size: int,
        n_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_blocks * block_size, n_kv_heads, head_dim)
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layers)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layers)]

    def copy_blocks(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copies whole blocks, in every layer.

        Args:
            sources, targets: int64 block numbers, pairwise. All sources are read before any target is written.
        """
        for tensor in (*self.k, *self.v):
            blocks = tensor.view(self.num_blocks, self.block_size, *tensor.shape[1:])
            blocks[targets] = blocks[sources]


def bytes_per_block(n_layers: int, block_size: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes on a rank: keys and values of `block_size` tokens in every layer."""
    return 2 * n_layers * block_size * n_kv_heads * head_dim * dtype.itemsize
