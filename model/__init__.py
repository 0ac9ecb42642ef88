"""Tensors: the Llama network, its paged KV cache, how it is split over ranks, and how it is loaded."""
