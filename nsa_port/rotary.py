"""Rotary position embedding (RoPE, arXiv 2104.09864), also of only a part of each head."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_angles(
    positions: Tensor, rotary_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, `[B, T, 1, rotary_dim / 2]`.

    Computed anew in each call, in float32 or better: a table kept in a buffer would lose its
    precision with `module.to(torch.bfloat16)`.

    Args:
        positions: `[B, T]`.
        dtype: the dtype of what will be rotated.
    """
    precise = torch.promote_types(dtype, torch.float32)
    half = torch.arange(0, rotary_dim, 2, dtype=precise, device=positions.device)
    angles = positions[..., None, None].to(precise) * theta ** (-half / rotary_dim)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first `2 * cos.shape[-1]` channels of each head of `x [B, T, ..., D]`.

    Channel `i` forms a pair with channel `i + rotary_dim / 2`, as in GPT-NeoX and Llama.
    """
    half = cos.shape[-1]
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((rotated.to(x.dtype), rest), dim=-1)
