"""What every attention backward needs first, per row: its lse to base 2, and `delta`.

A row is one head of one query.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_port.kernels.triton.host import cdiv, last_contiguous, next_power_of_2, strides
from nsa_port.kernels.triton.tiles import LOG2_E, split_row

_ROWS = 16
_TILE = 8
"""Queries and heads of a tile: 8 floats fill a sector of memory in either layout."""


def backward_rows(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *, by_head: bool
) -> tuple[Tensor, Tensor]:
    """`lse_log2` and `delta = sum(grad_out * out) - grad_lse` of every row, float32.

    With them `p = exp2(s_log2 - lse_log2)` and `ds = p (dp - delta)`. Rows that see nothing get
    `lse_log2 = inf`, so that their `p` is 0 whatever `s` is. Laid out `[B, H, T]` if `by_head`,
    else `[B, T, H]`.
    """
    B, T, H, Dv = out.shape
    shape = (B, H, T) if by_head else (B, T, H)
    lse_log2 = torch.empty(shape, dtype=torch.float32, device=out.device)
    delta = torch.empty_like(lse_log2)
    rows = B * T * H
    if rows:
        lse = last_contiguous(lse)
        grad_lse = None if grad_lse is None else last_contiguous(grad_lse)
        _backward_rows_kernel[(cdiv(rows, _ROWS),)](
            grad_out,
            grad_lse,
            out,
            lse,
            lse_log2,
            delta,
            rows,
            T,
            H,
            *strides(grad_out),
            *strides(out),
            *strides(lse),
            *((0, 0) if grad_lse is None else strides(grad_lse)),
            T * H,
            *((1, T) if by_head else (H, 1)),
            DIM_V=Dv,
            WIDTH=next_power_of_2(Dv),
            ROWS=_ROWS,
            num_warps=4,
        )
    return lse_log2, delta


_LENGTHS = [
    "rows", "T",
    "stride_lb", "stride_lt", "stride_glb", "stride_glt",
    "stride_ob", "stride_ot", "stride_oh",
]  # fmt: skip


@triton.jit(do_not_specialize=_LENGTHS)
def _backward_rows_kernel(
    grad_out,
    grad_lse,
    out,
    lse,
    lse_log2,
    delta,
    rows,
    T,
    H,
    stride_gb,
    stride_gt,
    stride_gh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_lb,
    stride_lt,
    stride_glb,
    stride_glt,
    stride_ob,
    stride_ot,
    stride_oh,
    DIM_V: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: `ROWS` rows, each a head of a query."""
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    o_batch, o_query, o_head = split_row(o_row, T, H)
    o_column = tl.arange(0, WIDTH)
    m_tile = m_row[:, None] & (o_column < DIM_V)[None, :]
    o_grad = o_batch * stride_gb + o_query * stride_gt + o_head * stride_gh
    o_value = o_batch * stride_vb + o_query * stride_vt + o_head * stride_vh
    b_grad = tl.load(grad_out + o_grad[:, None] + o_column[None, :], mask=m_tile, other=0.0)
    b_out = tl.load(out + o_value[:, None] + o_column[None, :], mask=m_tile, other=0.0)
    # [ROWS]
    b_delta = tl.sum(b_grad.to(tl.float32) * b_out.to(tl.float32), 1)
    if grad_lse is not None:
        p_grad_lse = grad_lse + o_batch * stride_glb + o_query * stride_glt + o_head
        b_delta -= tl.load(p_grad_lse, mask=m_row, other=0.0).to(tl.float32)
    p_lse = lse + o_batch * stride_lb + o_query * stride_lt + o_head
    b_lse = tl.load(p_lse, mask=m_row, other=0.0).to(tl.float32)
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2_E)
    o_target = o_batch * stride_ob + o_query * stride_ot + o_head * stride_oh
    tl.store(lse_log2 + o_target, b_lse, mask=m_row)
    tl.store(delta + o_target, b_delta, mask=m_row)


class BranchRows(NamedTuple):
    """What the backward of one gated branch needs per row, float32.

    With them and the gradient of the gated sum itself, `p = gate exp2(s_log2 - lse_log2)` and
    `ds = p (dp - delta)`.
    """

    lse_log2: Tensor
    delta: Tensor
    gate: Tensor


def gated_rows(
    grad: Tensor,
    outputs: tuple[Tensor, Tensor, Tensor],
    lse: Tensor,
    gates: Tensor,
    dense: bool,
) -> tuple[tuple[BranchRows, ...], Tensor]:
    """Of the gated sum (Eq. 5): each branch's rows, and `dgates [B, T, H, 3]`.

    The rows of the compressed branch and the window are laid out `[B, H, T]`, those of the
    selected `[B, T, H]` unless that is `dense` attention too, as their kernels read them. A gate's
    gradient is the branch's `delta`.
    """
    B, T, H, Dv = outputs[0].shape
    rows = torch.empty((3, 3, B * T * H), dtype=torch.float32, device=grad.device)
    dgates = torch.empty((B, T, H, 3), dtype=gates.dtype, device=grad.device)
    grid = (cdiv(T, _TILE) * cdiv(H, _TILE) * B,)
    if rows.numel():
        _gated_rows_kernel[grid](
            grad,
            *outputs,
            lse,
            gates,
            rows,
            dgates,
            B,
            T,
            H,
            *strides(grad),
            *gates.stride(),
            DIM_V=Dv,
            DENSE=dense,
            WIDTH=next_power_of_2(Dv),
            TILE=_TILE,
            num_warps=8,
        )
    found = rows.view(9, B, H, T).unbind(0)
    selected = found[3:6] if dense else [row.view(B, T, H) for row in found[3:6]]
    return (BranchRows(*found[:3]), BranchRows(*selected), BranchRows(*found[6:])), dgates


@triton.jit(do_not_specialize=["B", "T", "stride_tb", "stride_tt", "stride_th", "stride_tg"])
def _gated_rows_kernel(
    grad,
    o_cmp,
    o_slc,
    o_win,
    lse,
    gates,
    rows,
    dgates,
    B,
    T,
    H,
    stride_gb,
    stride_gt,
    stride_gh,
    stride_tb,
    stride_tt,
    stride_th,
    stride_tg,
    DENSE: tl.constexpr,
    DIM_V: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: `TILE` heads of `TILE` queries; the branch outputs are contiguous."""
    head_tiles = tl.cdiv(H, TILE)
    query_tiles = tl.cdiv(T, TILE)
    i_batch = (tl.program_id(0) // (head_tiles * query_tiles)).to(tl.int64)
    i_tile = tl.program_id(0) % (head_tiles * query_tiles)
    o_query = i_tile // head_tiles * TILE + tl.arange(0, TILE * TILE) // TILE
    o_head = i_tile % head_tiles * TILE + tl.arange(0, TILE * TILE) % TILE
    m_row = (o_query < T) & (o_head < H)
    o_query, o_head = o_query.to(tl.int64), o_head.to(tl.int64)
    o_column = tl.arange(0, WIDTH)
    m_tile = m_row[:, None] & (o_column < DIM_V)[None, :]
    o_grad = i_batch * stride_gb + o_query * stride_gt + o_head * stride_gh
    b_grad = tl.load(grad + o_grad[:, None] + o_column[None, :], mask=m_tile, other=0.0)
    b_grad = b_grad.to(tl.float32)
    o_row = (i_batch * T + o_query) * H + o_head
    o_by_head = (i_batch * H + o_head) * T + o_query
    o_out = o_row[:, None] * DIM_V + o_column[None, :]
    p_gate = gates + i_batch * stride_tb + o_query * stride_tt + o_head * stride_th
    count = B.to(tl.int64) * T * H
    for branch in tl.static_range(3):
        output = o_cmp if branch == 0 else (o_slc if branch == 1 else o_win)
        o_target = o_row if branch == 1 and not DENSE else o_by_head
        b_out = tl.load(output + o_out, mask=m_tile, other=0.0).to(tl.float32)
        # [TILE * TILE]; rows that see nothing may be padding, whose gradient is anything.
        b_lse = tl.load(lse + branch * count + o_row, mask=m_row, other=0.0)
        m_empty = b_lse == float("-inf")
        b_lse = tl.where(m_empty, float("inf"), b_lse * LOG2_E)
        b_delta = tl.where(m_empty, 0.0, tl.sum(b_grad * b_out, 1))
        b_gate = tl.load(p_gate + branch * stride_tg, mask=m_row, other=0.0).to(tl.float32)
        p_rows = rows + 3 * branch * count + o_target
        tl.store(p_rows, b_lse, mask=m_row)
        tl.store(p_rows + count, b_delta, mask=m_row)
        tl.store(p_rows + 2 * count, b_gate, mask=m_row)
        p_dgate = dgates + o_row * 3 + branch
        tl.store(p_dgate, b_delta.to(p_dgate.dtype.element_ty), mask=m_row)
