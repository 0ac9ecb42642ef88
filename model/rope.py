"""Rotary position embedding in Meta's interleaved form (Su et al., "RoFormer", 2021, section 3.2.2)."""

from __future__ import annotations

import math

import torch

from tpserve.model.args import ModelArgs


def rope_table(args: ModelArgs, n_positions: int, device: torch.device | str) -> torch.Tensor:
    """Cosine and sine of every position's rotation angles.

    Returns:
        float32 [n_positions, head_dim / 2, 2]; [..., 0] is the cosine and [..., 1] the sine.
    """
    if torch.device(device).type == "meta":  # for its arithmetic torch would import its compiler
        return torch.empty(n_positions, args.head_dim // 2, 2, device=device)
    exponents = torch.arange(0, args.head_dim, 2, dtype=torch.float32, device=device) / args.head_dim
    freqs = 1.0 / (args.rope_theta**exponents)
    if args.use_scaled_rope:
        freqs = _scale_frequencies(freqs, args)
    angles = torch.outer(torch.arange(n_positions, dtype=torch.float32, device=device), freqs)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def _scale_frequencies(freqs: torch.Tensor, args: ModelArgs) -> torch.Tensor:
    """Llama 3.1's context extension: long wavelengths are stretched by `rope_scale_factor`, short ones kept, and
    those between blended linearly ("The Llama 3 Herd of Models", 2024, section 3.4.2; constants of its release)."""
    wavelengths = 2 * math.pi / freqs
    context, low, high = args.rope_original_context_tokens, args.rope_low_freq_factor, args.rope_high_freq_factor
    smooth = ((context / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * freqs / args.rope_scale_factor + smooth * freqs


def apply_rope(x_THD: torch.Tensor, rope_TC2: torch.Tensor) -> torch.Tensor:
    """Rotates neighbouring pairs (x[2i], x[2i+1]) of every head by their position's angle, in float32.

    Args:
        x_THD: [tokens, heads, head_dim].
        rope_TC2: rows of `rope_table` at the tokens' positions, [tokens, head_dim / 2, 2].
    """
    # A rotation is a product of complex numbers: one pass instead of nine (5% of a prompt on a CPU).
    pairs_THC = torch.view_as_complex(x_THD.float().view(*x_THD.shape[:-1], -1, 2))
    rotated_THC = pairs_THC * torch.view_as_complex(rope_TC2)[:, None]
    return torch.view_as_real(rotated_THC).flatten(-2).type_as(x_THD)
