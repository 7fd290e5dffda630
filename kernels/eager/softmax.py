"""One masked softmax attention step on a tile of logits, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_port.kernels.eager.products import product


def attend(logits: Tensor, visible: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the visible logits, then their sum of `v`; rows that see nothing give 0, -inf.

    Args:
        logits: `[..., R, N]`, float32 or float64, overwritten.
        visible: bool, broadcasts to `logits`.
        v: `[..., N, Dv]`.

    Returns:
        `out [..., R, Dv]` and `lse [..., R, 1]`.
    """
    logits.masked_fill_(~visible, -torch.inf)
    highest = logits.amax(-1, keepdim=True)
    empty = highest == -torch.inf
    p = logits.sub_(highest.masked_fill_(empty, 0)).exp_()
    total = p.sum(-1, keepdim=True)
    out = product(p, v).div_(total).masked_fill_(empty, 0)
    return out, total.log_().add_(highest)


def attend_backward(
    logits: Tensor,
    visible: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`dq [..., R, Dk], dk [..., N, Dk], dv [..., N, Dv]` of `attend`.

    Args:
        logits: `[..., R, N]`, overwritten.
        q, grad_out: `[..., R, D]`, the rows.
        k, v: `[..., N, D]`.
        lse, delta: `[..., R, 1]`.
    """
    p, dlogits = probabilities(logits, visible, v, grad_out, lse, delta, scale)
    # A padded row may hold anything, and 0 * NaN is NaN.
    empty = lse == -torch.inf
    dk = product(dlogits.transpose(-1, -2), q.masked_fill(empty, 0))
    dv = product(p.transpose(-1, -2), grad_out.masked_fill(empty, 0))
    return product(dlogits, k), dk, dv


def probabilities(
    logits: Tensor,
    visible: Tensor,
    v: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`p` and the gradient of `q . k` (with the scale in it), 0 where nothing is visible."""
    p = logits.sub_(lse).masked_fill_(~visible, -torch.inf).exp_()
    dlogits = product(grad_out, v.transpose(-1, -2)).sub_(delta).mul_(p).mul_(scale)
    return p, dlogits.masked_fill_(~visible, 0)
