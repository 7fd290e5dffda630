"""All of `nsa_attention` (Eq. 5) at once: what the branches share is computed once.

Forward, that is the bounds of the queries. Backward, the gradient of the gated sum goes straight
into every branch, which multiplies its probabilities with its gates, and all three branches add to
one `dq`: the branches' own gradients are never written.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nsa_port.kernels.geometry import Layout, NSAConfig
from nsa_port.kernels.results import WholeForward
from nsa_port.kernels.triton.bounds import all_bounds
from nsa_port.kernels.triton.combining import combine
from nsa_port.kernels.triton.host import last_contiguous, on_device_of
from nsa_port.kernels.triton.interval import interval_attention
from nsa_port.kernels.triton.interval_backward import BackwardRows, interval_backward
from nsa_port.kernels.triton.preparation import gated_rows
from nsa_port.kernels.triton.selected import attend_selected
from nsa_port.kernels.triton.selected_backward import selected_gradients
from nsa_port.kernels.triton.selection import blocks_of

_FEWEST_DENSE = 16
"""Queries from which on dense attention takes the place of a selection that leaves nothing out."""


def nsa_attention(
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
    *,
    blocks_of: Callable[..., Tensor] = blocks_of,
    attend_selected: Callable[..., tuple[Tensor, Tensor]] = attend_selected,
    combine: Callable[..., Tensor] = combine,
) -> WholeForward:
    """The gated sum of the three branches, and what its backward needs.

    The keyword arguments are for kernels of another folder in place of the ones here.
    """
    with on_device_of(q):
        rows = (q.shape[1], k_slc.shape[1], k_cmp.shape[1])
        causal, window, visible = all_bounds(*rows, config, layout, q.device)
        o_cmp, lse_cmp = interval_attention(q, k_cmp, v_cmp, visible, layout, scale)
        indices = blocks_of(q, k_cmp, lse_cmp, visible, causal, config, layout, scale)
        if _all_are_chosen(q, config, layout):
            o_slc, lse_slc = interval_attention(q, k_slc, v_slc, causal, layout, scale)
        else:
            o_slc, lse_slc = attend_selected(
                q, k_slc, v_slc, indices, causal, config, layout, scale
            )
        o_win, lse_win = interval_attention(
            q, k_win, v_win, window, layout, scale, config.window_size
        )
        out = combine(o_cmp, o_slc, o_win, gates)
        lse = torch.stack((lse_cmp, lse_slc, lse_win))
    if not needs_grad:
        o_cmp, o_slc, o_win = (q.new_empty(0) for _ in range(3))
    return WholeForward(out, o_cmp, o_slc, o_win, lse, indices)


def _all_are_chosen(q: Tensor, config: NSAConfig, layout: Layout) -> bool:
    """Whether every query chooses every block that it may, so that selection is dense attention.

    Not for the few queries of decoding, whose kernels would change as the cache grows.
    """
    chosen = config.num_select_blocks(layout.num_keys) <= config.num_selected
    return chosen and q.shape[1] >= _FEWEST_DENSE


def nsa_attention_backward(
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
    """`dq, dk_cmp, dv_cmp, dk_slc, dv_slc, dk_win, dv_win, dgates`."""
    grad = last_contiguous(grad)
    with on_device_of(q):
        rows = (q.shape[1], k_slc.shape[1], k_cmp.shape[1])
        causal, window, visible = all_bounds(*rows, config, layout, q.device)
        outputs = (saved.o_cmp, saved.o_slc, saved.o_win)
        dense = _all_are_chosen(q, config, layout)
        (of_cmp, of_slc, of_win), dgates = gated_rows(grad, outputs, saved.lse, gates, dense)
        cu_blocks = layout.compressed_cu_seqlens(config) if layout.packed else None
        dq, dk_cmp, dv_cmp = interval_backward(
            BackwardRows(grad, *of_cmp[:2]), q, k_cmp, v_cmp, visible, cu_blocks, layout,
            scale, gate=of_cmp.gate,
        )  # fmt: skip
        rows_slc = BackwardRows(grad, *of_slc[:2])
        if dense:
            dq, dk_slc, dv_slc = interval_backward(
                rows_slc, q, k_slc, v_slc, causal, layout.cu_seqlens_k, layout, scale,
                gate=of_slc.gate, dq=dq,
            )  # fmt: skip
        else:
            dq, dk_slc, dv_slc = selected_gradients(
                rows_slc, q, k_slc, v_slc, saved.indices, causal, config, layout, scale,
                gate=of_slc.gate, dq=dq,
            )  # fmt: skip
        dq, dk_win, dv_win = interval_backward(
            BackwardRows(grad, *of_win[:2]), q, k_win, v_win, window, layout.cu_seqlens_k,
            layout, scale, gate=of_win.gate, dq=dq,
        )  # fmt: skip
    return dq, dk_cmp, dv_cmp, dk_slc, dv_slc, dk_win, dv_win, dgates
