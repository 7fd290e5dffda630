"""All of `nsa_attention` (Eq. 5) at once: what the branches share is computed once.

Forward, that is the bounds of the queries. Backward, the gradient of the gated sum goes straight
into every branch, which multiplies its probabilities with its gates, and all three branches add to
one `dq`: the branches' own gradients are never written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nsa_port.kernels.geometry import Layout, NSAConfig
from nsa_port.kernels.results import WholeForward
from nsa_port.kernels.triton.bounds import all_bounds
from nsa_port.kernels.triton.combining import combine, combine_splits
from nsa_port.kernels.triton.host import last_contiguous
from nsa_port.kernels.triton.interval import hopper_values, interval_attention
from nsa_port.kernels.triton.interval_backward import BackwardRows, interval_backward
from nsa_port.kernels.triton.preparation import gated_rows
from nsa_port.kernels.triton.replay import repeats
from nsa_port.kernels.triton.selected import attend_selected
from nsa_port.kernels.triton.selected_backward import selected_gradients
from nsa_port.kernels.triton.selection import blocks_of
from nsa_port.kernels.triton.splitting import Splits

_combine = combine
_FEWEST_DENSE = 16
"""Queries from which on dense attention takes the place of a selection that leaves nothing out."""


@repeats
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
    rows = (q.shape[1], k_slc.shape[1], k_cmp.shape[1])
    causal, window, visible = all_bounds(*rows, config, layout, q.device)
    lse = torch.empty((3, *q.shape[:3]), dtype=torch.float32, device=q.device)
    lse_cmp, lse_slc, lse_win = lse.unbind(0)
    o_cmp, _ = interval_attention(q, k_cmp, v_cmp, visible, layout, scale, lse=lse_cmp)
    indices = blocks_of(q, k_cmp, lse_cmp, visible, causal, config, layout, scale)
    if q.shape[1] < _FEWEST_DENSE and not needs_grad and combine is _combine and q.numel():
        # Few queries, as in decoding, whose keys are split: merged in one go with the gated sum.
        parts: list[tuple[Splits, Tensor, Tensor]] = []

        def later(*part: Any) -> None:
            parts.append(part)

        attend_selected(
            q, k_slc, v_slc, indices, causal, config, layout, scale, lse=lse_slc, merge=later
        )
        interval_attention(
            q, k_win, v_win, window, layout, scale, config.window_size, lse=lse_win, merge=later
        )
        slc, win = parts
        out = combine_splits(o_cmp, slc, win, gates)
        o_cmp, o_slc, o_win = (q.new_empty(0) for _ in range(3))
        return WholeForward(out, o_cmp, o_slc, o_win, lse, indices)
    if _all_are_chosen(q, config, layout):
        o_slc, _ = interval_attention(q, k_slc, v_slc, causal, layout, scale, lse=lse_slc)
    else:
        o_slc, _ = attend_selected(
            q, k_slc, v_slc, indices, causal, config, layout, scale, lse=lse_slc
        )
    hopper = hopper_values("hopper_forward", q, k_win, v_win) if scale > 0 else None
    if hopper is not None and q.numel():
        # Not at the top: Gluon is there for Hopper alone.
        from nsa_port.kernels.triton.interval_hopper import SumWith, attend

        out, o_win = torch.empty_like(o_cmp), torch.empty_like(o_cmp) if needs_grad else o_cmp
        sum_with = SumWith(o_cmp, o_slc, gates, out, keep=needs_grad)
        attend(q, k_win, v_win, window, layout, scale, o_win, lse_win, hopper, sum_with)
    else:
        o_win, _ = interval_attention(
            q, k_win, v_win, window, layout, scale, config.window_size, lse=lse_win
        )
        out = combine(o_cmp, o_slc, o_win, gates)
    if not needs_grad:
        o_cmp, o_slc, o_win = (q.new_empty(0) for _ in range(3))
    return WholeForward(out, o_cmp, o_slc, o_win, lse, indices)


def _all_are_chosen(q: Tensor, config: NSAConfig, layout: Layout) -> bool:
    """Whether every query chooses every block that it may, so that selection is dense attention.

    Not for the few queries of decoding, whose kernels would change as the cache grows.
    """
    chosen = config.num_select_blocks(layout.num_keys) <= config.num_selected
    return chosen and q.shape[1] >= _FEWEST_DENSE


@repeats
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
    _, o_cmp, o_slc, o_win, lse, indices = saved
    grad = last_contiguous(grad)
    rows = (q.shape[1], k_slc.shape[1], k_cmp.shape[1])
    causal, window, visible = all_bounds(*rows, config, layout, q.device)
    dense = _all_are_chosen(q, config, layout)
    (of_cmp, of_slc, of_win), dgates = gated_rows(grad, (o_cmp, o_slc, o_win), lse, gates, dense)
    cu_blocks = layout.compressed_cu_seqlens(config) if layout.packed else None
    dq, dk_cmp, dv_cmp = interval_backward(
        BackwardRows(grad, *of_cmp[:2]), q, k_cmp, v_cmp, visible, cu_blocks, layout, scale,
        gate=of_cmp.gate,
    )  # fmt: skip
    rows_slc = BackwardRows(grad, *of_slc[:2])
    if dense:
        dq, dk_slc, dv_slc = interval_backward(
            rows_slc, q, k_slc, v_slc, causal, layout.cu_seqlens_k, layout, scale,
            gate=of_slc.gate, dq=dq,
        )  # fmt: skip
    else:
        dq, dk_slc, dv_slc = selected_gradients(
            rows_slc, q, k_slc, v_slc, indices, causal, config, layout, scale,
            gate=of_slc.gate, dq=dq,
        )  # fmt: skip
    dq, dk_win, dv_win = interval_backward(
        BackwardRows(grad, *of_win[:2]), q, k_win, v_win, window, layout.cu_seqlens_k, layout,
        scale, gate=of_win.gate, dq=dq,
    )  # fmt: skip
    return dq, dk_cmp, dv_cmp, dk_slc, dv_slc, dk_win, dv_win, dgates
