"""`nsa_attention` out of its parts, each on the backend chosen for it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nsa_port.backends.interface import PARTS, Backend, WholeForward
from nsa_port.kernels.geometry import Layout, NSAConfig
from nsa_port.registry import kernel


def fused_backend(chosen: Mapping[str, Backend]) -> Backend | None:
    """The one backend that runs every part and has a kernel for the whole, if there is one."""
    first, *rest = chosen.values()
    if all(backend is first for backend in rest) and "nsa_attention" in first.kernels:
        return first
    return None


def describe(chosen: Mapping[str, Backend]) -> str:
    """The choice in the grammar of `NSA_PORT_BACKEND`."""
    first, *rest = chosen.values()
    if all(backend is first for backend in rest):
        return first.name
    return ",".join(f"{operator}={chosen[operator].name}" for operator in PARTS)


def forward(
    chosen: Mapping[str, Backend],
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    config: NSAConfig,
    layout: Layout,
    scale: float,
    needs_grad: bool,
) -> WholeForward:
    """Run the parts one after the other."""
    where = (config, layout, scale)
    run = {operator: kernel(backend, operator, q.device) for operator, backend in chosen.items()}
    o_cmp, lse_cmp = run["compressed_attention"](q, k_cmp, v_cmp, *where)
    idx = run["select_blocks"](q, k_cmp, lse_cmp, *where)
    o_slc, lse_slc = run["selected_attention"](q, k_slc, v_slc, idx, *where)
    o_win, lse_win = run["window_attention"](q, k_win, v_win, *where)
    out = run["combine"](o_cmp, o_slc, o_win, gates)
    lse = torch.stack((lse_cmp, lse_slc, lse_win))
    if not needs_grad:
        o_cmp, o_slc, o_win = (q.new_empty(0) for _ in range(3))
    return WholeForward(out, o_cmp, o_slc, o_win, lse, idx)


def backward(
    chosen: Mapping[str, Backend],
    grad: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    saved: WholeForward,
    config: NSAConfig,
    layout: Layout,
    scale: float,
) -> tuple[Tensor, ...]:
    """Run the parts' backwards and add up the three gradients of q."""
    where = (config, layout, scale)
    run = {
        operator: kernel(backend, operator, q.device, "_backward")
        for operator, backend in chosen.items()
        if operator != "select_blocks"
    }
    lse_cmp, lse_slc, lse_win = saved.lse.unbind(0)
    d_cmp, d_slc, d_win, dgates = run["combine"](grad, saved.o_cmp, saved.o_slc, saved.o_win, gates)
    dq_cmp, dk_cmp, dv_cmp = run["compressed_attention"](
        d_cmp, None, q, k_cmp, v_cmp, saved.o_cmp, lse_cmp, *where
    )
    dq_slc, dk_slc, dv_slc = run["selected_attention"](
        d_slc, None, q, k_slc, v_slc, saved.indices, saved.o_slc, lse_slc, *where
    )
    dq_win, dk_win, dv_win = run["window_attention"](
        d_win, None, q, k_win, v_win, saved.o_win, lse_win, *where
    )
    dq = dq_cmp + dq_slc + dq_win
    return dq, dk_cmp, dv_cmp, dk_slc, dv_slc, dk_win, dv_win, dgates
