"""The gated sum of the three branches (Eq. 5), one pass over memory each way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_port.kernels.triton.host import (
    cdiv,
    last_contiguous,
    next_power_of_2,
    on_device_of,
    strides,
)
from nsa_port.kernels.triton.splitting import Splits, merge_row
from nsa_port.kernels.triton.tiles import split_row

_ROWS = 16
_WIDTH = 64
"""Columns that a program merges of a branch in splits."""

_GATE_STRIDES = ["stride_gb", "stride_gt", "stride_gh", "stride_gg"]


def combine(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor) -> Tensor:
    """`g_cmp o_cmp + g_slc o_slc + g_win o_win`, summed in float32. `[B, T, H, Dv]`."""
    B, T, H, Dv = o_cmp.shape
    out = torch.empty((B, T, H, Dv), dtype=o_cmp.dtype, device=o_cmp.device)
    if out.numel():
        with on_device_of(o_cmp):
            _combine_kernel[(cdiv(B * T * H, _ROWS),)](
                o_cmp,
                o_slc,
                o_win,
                gates,
                out,
                B * T * H,
                T,
                H,
                *strides(o_cmp),
                *strides(o_slc),
                *strides(o_win),
                *gates.stride(),
                DIM=Dv,
                WIDTH=next_power_of_2(Dv),
                ROWS=_ROWS,
                num_warps=4,
            )
    return out


def combine_splits(
    o_cmp: Tensor,
    slc: tuple[Splits, Tensor, Tensor],
    win: tuple[Splits, Tensor, Tensor],
    gates: Tensor,
) -> Tensor:
    """`combine` of branches of which two are still in splits; writes the lse of those.

    Both are as `merge_splits` takes them, but that the outputs are not written.
    """
    B, T, H, Dv = o_cmp.shape
    out = torch.empty_like(o_cmp)
    with on_device_of(o_cmp):
        _combine_splits_kernel[(B * T * H, cdiv(Dv, _WIDTH))](
            o_cmp,
            slc[0].out,
            slc[0].lse,
            slc[2],
            win[0].out,
            win[0].lse,
            win[2],
            gates,
            out,
            B * T * H,
            T,
            H,
            slc[0].number,
            win[0].number,
            *gates.stride(),
            SPLITS_SLC=slc[0].most,
            SPLITS_WIN=win[0].most,
            MERGE_SLC=slc[0].active,
            MERGE_WIN=win[0].active,
            DIM=Dv,
            WIDTH=_WIDTH,
            num_warps=max(1, min(4, max(slc[0].most, win[0].most) * _WIDTH // 512)),
        )
    return out


@triton.jit(
    do_not_specialize=["rows", "T", "splits_slc", "splits_win", *_GATE_STRIDES],
    do_not_specialize_on_alignment=["lse_slc", "lse_win", "partial_lse_slc", "partial_lse_win"],
)
def _combine_splits_kernel(
    o_cmp,
    partial_slc,
    partial_lse_slc,
    lse_slc,
    partial_win,
    partial_lse_win,
    lse_win,
    gates,
    out,
    rows,
    T,
    H,
    splits_slc,
    splits_win,
    stride_gb,
    stride_gt,
    stride_gh,
    stride_gg,
    SPLITS_SLC: tl.constexpr,
    SPLITS_WIN: tl.constexpr,
    MERGE_SLC: tl.constexpr,
    MERGE_WIN: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program: `WIDTH` columns of one row, which is a query and head."""
    i_row = tl.program_id(0)
    o_batch, o_query, o_head = split_row(i_row, T, H)
    p_gate = gates + o_batch * stride_gb + o_query * stride_gt + o_head * stride_gh
    i_row = i_row.to(tl.int64)
    o_column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    m_column = o_column < DIM
    dtype: tl.constexpr = out.dtype.element_ty
    b_term = tl.load(o_cmp + i_row * DIM + o_column, mask=m_column, other=0.0).to(tl.float32)
    b_total = tl.load(p_gate).to(tl.float32) * b_term
    b_term, row_lse = merge_row(
        partial_slc, partial_lse_slc, i_row, rows, splits_slc, o_column, DIM, SPLITS_SLC
    )
    # Rounded as it is where branches are written.
    b_total += tl.load(p_gate + stride_gg).to(tl.float32) * b_term.to(dtype).to(tl.float32)
    if MERGE_SLC and tl.program_id(1) == 0:
        tl.store(lse_slc + i_row, row_lse)
    b_term, row_lse = merge_row(
        partial_win, partial_lse_win, i_row, rows, splits_win, o_column, DIM, SPLITS_WIN
    )
    b_total += tl.load(p_gate + 2 * stride_gg).to(tl.float32) * b_term.to(dtype).to(tl.float32)
    if MERGE_WIN and tl.program_id(1) == 0:
        tl.store(lse_win + i_row, row_lse)
    tl.store(out + i_row * DIM + o_column, b_total.to(dtype), mask=m_column)


def combine_backward(
    grad: Tensor, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `combine`: `d_cmp, d_slc, d_win` and `dgates [B, T, H, 3]`."""
    B, T, H, Dv = o_cmp.shape
    grad = last_contiguous(grad)
    d_cmp, d_slc, d_win = (
        torch.empty((B, T, H, Dv), dtype=branch.dtype, device=branch.device)
        for branch in (o_cmp, o_slc, o_win)
    )
    dgates = torch.empty((B, T, H, 3), dtype=gates.dtype, device=gates.device)
    if dgates.numel():
        with on_device_of(o_cmp):
            _combine_backward_kernel[(cdiv(B * T * H, _ROWS),)](
                grad,
                o_cmp,
                o_slc,
                o_win,
                gates,
                d_cmp,
                d_slc,
                d_win,
                dgates,
                B * T * H,
                T,
                H,
                *strides(grad),
                *strides(o_cmp),
                *strides(o_slc),
                *strides(o_win),
                *gates.stride(),
                DIM=Dv,
                WIDTH=next_power_of_2(Dv),
                ROWS=_ROWS,
                num_warps=4,
            )
    return d_cmp, d_slc, d_win, dgates


_NOT_SPECIALIZED = ["rows", "T", *_GATE_STRIDES]


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _combine_kernel(
    o_cmp,
    o_slc,
    o_win,
    gates,
    out,
    rows,
    T,
    H,
    stride_cb,
    stride_ct,
    stride_ch,
    stride_sb,
    stride_st,
    stride_sh,
    stride_wb,
    stride_wt,
    stride_wh,
    stride_gb,
    stride_gt,
    stride_gh,
    stride_gg,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: `ROWS` rows, each a head of a query."""
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    o_batch, o_query, o_head = split_row(o_row, T, H)
    o_row = o_row.to(tl.int64)
    o_column = tl.arange(0, WIDTH)
    m_tile = m_row[:, None] & (o_column < DIM)[None, :]

    p_gate = gates + o_batch * stride_gb + o_query * stride_gt + o_head * stride_gh
    o_in = o_batch * stride_cb + o_query * stride_ct + o_head * stride_ch
    total = _gated(o_cmp, p_gate, o_in, o_column, m_row, m_tile)
    o_in = o_batch * stride_sb + o_query * stride_st + o_head * stride_sh
    total += _gated(o_slc, p_gate + stride_gg, o_in, o_column, m_row, m_tile)
    o_in = o_batch * stride_wb + o_query * stride_wt + o_head * stride_wh
    total += _gated(o_win, p_gate + 2 * stride_gg, o_in, o_column, m_row, m_tile)
    o_out = o_row[:, None] * DIM + o_column[None, :]
    tl.store(out + o_out, total.to(out.dtype.element_ty), mask=m_tile)


@triton.jit
def _gated(branch, p_gate, o_in, o_column, m_row, m_tile):
    """A branch's tile times its gates, in float32."""
    b_gate = tl.load(p_gate, mask=m_row, other=0.0).to(tl.float32)
    b_branch = tl.load(branch + o_in[:, None] + o_column[None, :], mask=m_tile, other=0.0)
    return b_gate[:, None] * b_branch.to(tl.float32)


@triton.jit(do_not_specialize=[*_NOT_SPECIALIZED])
def _combine_backward_kernel(
    grad,
    o_cmp,
    o_slc,
    o_win,
    gates,
    d_cmp,
    d_slc,
    d_win,
    dgates,
    rows,
    T,
    H,
    stride_ob,
    stride_ot,
    stride_oh,
    stride_cb,
    stride_ct,
    stride_ch,
    stride_sb,
    stride_st,
    stride_sh,
    stride_wb,
    stride_wt,
    stride_wh,
    stride_gb,
    stride_gt,
    stride_gh,
    stride_gg,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: `ROWS` rows, each a head of a query."""
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    o_batch, o_query, o_head = split_row(o_row, T, H)
    o_row = o_row.to(tl.int64)
    o_column = tl.arange(0, WIDTH)
    m_tile = m_row[:, None] & (o_column < DIM)[None, :]

    o_in = o_batch * stride_ob + o_query * stride_ot + o_head * stride_oh
    b_grad = tl.load(grad + o_in[:, None] + o_column[None, :], mask=m_tile, other=0.0)
    b_grad = b_grad.to(tl.float32)
    p_gate = gates + o_batch * stride_gb + o_query * stride_gt + o_head * stride_gh
    p_dgate = dgates + o_row * 3
    o_out = o_row[:, None] * DIM + o_column[None, :]
    o_in = o_batch * stride_cb + o_query * stride_ct + o_head * stride_ch
    _ungate(o_cmp, d_cmp, p_gate, p_dgate, b_grad, o_in, o_out, o_column, m_row, m_tile)
    p_gate += stride_gg
    o_in = o_batch * stride_sb + o_query * stride_st + o_head * stride_sh
    _ungate(o_slc, d_slc, p_gate, p_dgate + 1, b_grad, o_in, o_out, o_column, m_row, m_tile)
    p_gate += stride_gg
    o_in = o_batch * stride_wb + o_query * stride_wt + o_head * stride_wh
    _ungate(o_win, d_win, p_gate, p_dgate + 2, b_grad, o_in, o_out, o_column, m_row, m_tile)


@triton.jit
def _ungate(branch, d_branch, p_gate, p_dgate, b_grad, o_in, o_out, o_column, m_row, m_tile):
    """Write one branch's gradient and its gates'."""
    b_gate = tl.load(p_gate, mask=m_row, other=0.0).to(tl.float32)
    b_branch = tl.load(branch + o_in[:, None] + o_column[None, :], mask=m_tile, other=0.0)
    b_dgate = tl.sum(b_grad * b_branch.to(tl.float32), 1)
    tl.store(p_dgate, b_dgate.to(p_dgate.dtype.element_ty), mask=m_row)
    b_d = b_grad * b_gate[:, None]
    tl.store(d_branch + o_out, b_d.to(d_branch.dtype.element_ty), mask=m_tile)
