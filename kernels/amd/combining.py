"""The gated sum of the three branches (Eq. 5): one wave takes heads of one query.

The grid has an axis for each of query, heads and batch, so that nothing is divided: an integer
division costs about thirty vector instructions, as many as a wave needs to sum a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_port.kernels.amd.grids import MOST_LAYERS, rows_of_a_wave
from nsa_port.kernels.triton import combining
from nsa_port.kernels.triton.host import (
    cdiv,
    last_contiguous,
    next_power_of_2,
    on_device_of,
    strides,
)


def combine(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor) -> Tensor:
    """`g_cmp o_cmp + g_slc o_slc + g_win o_win`, summed in float32. `[B, T, H, Dv]`."""
    B, T, H, Dv = o_cmp.shape
    if B > MOST_LAYERS:
        return combining.combine(o_cmp, o_slc, o_win, gates)
    out = torch.empty((B, T, H, Dv), dtype=o_cmp.dtype, device=o_cmp.device)
    if out.numel():
        heads = rows_of_a_wave(H, Dv)
        with on_device_of(o_cmp):
            _combine_kernel[(T, cdiv(H, heads), B)](
                o_cmp,
                o_slc,
                o_win,
                gates,
                out,
                T,
                H,
                *strides(o_cmp),
                *strides(o_slc),
                *strides(o_win),
                *gates.stride(),
                **_sizes(H, Dv, heads),
            )
    return out


def combine_backward(
    grad: Tensor, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `combine`: `d_cmp, d_slc, d_win` and `dgates [B, T, H, 3]`."""
    B, T, H, Dv = o_cmp.shape
    if B > MOST_LAYERS:
        return combining.combine_backward(grad, o_cmp, o_slc, o_win, gates)
    grad = last_contiguous(grad)
    d_cmp, d_slc, d_win = (
        torch.empty((B, T, H, Dv), dtype=branch.dtype, device=branch.device)
        for branch in (o_cmp, o_slc, o_win)
    )
    dgates = torch.empty((B, T, H, 3), dtype=gates.dtype, device=gates.device)
    if dgates.numel():
        heads = rows_of_a_wave(H, Dv)
        with on_device_of(o_cmp):
            _combine_backward_kernel[(T, cdiv(H, heads), B)](
                grad,
                o_cmp,
                o_slc,
                o_win,
                gates,
                d_cmp,
                d_slc,
                d_win,
                dgates,
                T,
                H,
                *strides(grad),
                *strides(o_cmp),
                *strides(o_slc),
                *strides(o_win),
                *gates.stride(),
                **_sizes(H, Dv, heads),
            )
    return d_cmp, d_slc, d_win, dgates


def _sizes(H: int, Dv: int, heads: int) -> dict[str, int | bool]:
    width = next_power_of_2(Dv)
    return {
        "DIM": Dv,
        "WIDTH": width,
        "HEADS": heads,
        "MASKED": H % heads != 0 or Dv != width,
        "num_warps": 1,
        "num_stages": 1,
    }


_NOT_SPECIALIZED = ["T", "stride_gb", "stride_gt", "stride_gh", "stride_gg"]


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _combine_kernel(
    o_cmp,
    o_slc,
    o_win,
    gates,
    out,
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
    HEADS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One program: `HEADS` heads of one query."""
    i_query, i_batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    first_head = tl.program_id(1) * HEADS
    m_head, m_tile = _masks(first_head, H, DIM, WIDTH, HEADS)
    p_gate = gates + i_batch * stride_gb + i_query * stride_gt + first_head * stride_gh
    p_in = o_cmp + i_batch * stride_cb + i_query * stride_ct + first_head * stride_ch
    total = _gated(p_in, stride_ch, p_gate, stride_gh, m_head, m_tile, WIDTH, HEADS, MASKED)
    p_in = o_slc + i_batch * stride_sb + i_query * stride_st + first_head * stride_sh
    p_gate += stride_gg
    total += _gated(p_in, stride_sh, p_gate, stride_gh, m_head, m_tile, WIDTH, HEADS, MASKED)
    p_in = o_win + i_batch * stride_wb + i_query * stride_wt + first_head * stride_wh
    p_gate += stride_gg
    total += _gated(p_in, stride_wh, p_gate, stride_gh, m_head, m_tile, WIDTH, HEADS, MASKED)
    p_out = out + ((i_batch * T + i_query) * H + first_head) * DIM
    _store(p_out, total, DIM, m_tile, WIDTH, HEADS, MASKED)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
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
    HEADS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One program: `HEADS` heads of one query."""
    i_query, i_batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    first_head = tl.program_id(1) * HEADS
    m_head, m_tile = _masks(first_head, H, DIM, WIDTH, HEADS)
    p_in = grad + i_batch * stride_ob + i_query * stride_ot + first_head * stride_oh
    b_grad = _load(p_in, stride_oh, m_tile, WIDTH, HEADS, MASKED)
    p_gate = gates + i_batch * stride_gb + i_query * stride_gt + first_head * stride_gh
    o_out = (i_batch * T + i_query) * H + first_head
    p_dgate = dgates + o_out * 3
    p_in = o_cmp + i_batch * stride_cb + i_query * stride_ct + first_head * stride_ch
    _ungate(
        p_in, stride_ch, d_cmp + o_out * DIM, p_gate, stride_gh, p_dgate, b_grad, m_head, m_tile,
        DIM, WIDTH, HEADS, MASKED,
    )  # fmt: skip
    p_in = o_slc + i_batch * stride_sb + i_query * stride_st + first_head * stride_sh
    p_gate += stride_gg
    _ungate(
        p_in, stride_sh, d_slc + o_out * DIM, p_gate, stride_gh, p_dgate + 1, b_grad, m_head,
        m_tile, DIM, WIDTH, HEADS, MASKED,
    )  # fmt: skip
    p_in = o_win + i_batch * stride_wb + i_query * stride_wt + first_head * stride_wh
    p_gate += stride_gg
    _ungate(
        p_in, stride_wh, d_win + o_out * DIM, p_gate, stride_gh, p_dgate + 2, b_grad, m_head,
        m_tile, DIM, WIDTH, HEADS, MASKED,
    )  # fmt: skip


@triton.jit
def _masks(first_head, H, DIM: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr):
    m_head = first_head + tl.arange(0, HEADS) < H
    return m_head, m_head[:, None] & (tl.arange(0, WIDTH) < DIM)[None, :]


@triton.jit
def _load(p_in, stride, m_tile, WIDTH: tl.constexpr, HEADS: tl.constexpr, MASKED: tl.constexpr):
    """`[HEADS, WIDTH]` in float32."""
    tl.assume(stride >= 0)
    p_tile = p_in + tl.arange(0, HEADS)[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    if MASKED:
        return tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
    return tl.load(p_tile).to(tl.float32)


@triton.jit
def _store(
    p_out, b_tile, stride, m_tile,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    p_tile = p_out + tl.arange(0, HEADS)[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    b_tile = b_tile.to(p_out.dtype.element_ty)
    if MASKED:
        tl.store(p_tile, b_tile, mask=m_tile)
    else:
        tl.store(p_tile, b_tile)


@triton.jit
def _gated(
    p_in, stride, p_gate, stride_gate, m_head, m_tile,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A branch's tile times its gates, in float32."""
    b_gate = tl.load(p_gate + tl.arange(0, HEADS) * stride_gate, mask=m_head, other=0.0)
    b_branch = _load(p_in, stride, m_tile, WIDTH, HEADS, MASKED)
    return b_gate.to(tl.float32)[:, None] * b_branch


@triton.jit
def _ungate(
    p_in, stride, p_out, p_gate, stride_gate, p_dgate, b_grad, m_head, m_tile,
    DIM: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write one branch's gradient and its gates'."""
    o_head = tl.arange(0, HEADS)
    b_gate = tl.load(p_gate + o_head * stride_gate, mask=m_head, other=0.0).to(tl.float32)
    b_branch = _load(p_in, stride, m_tile, WIDTH, HEADS, MASKED)
    b_dgate = tl.sum(b_grad * b_branch, 1).to(p_dgate.dtype.element_ty)
    tl.store(p_dgate + o_head * 3, b_dgate, mask=m_head)
    _store(p_out, b_grad * b_gate[:, None], DIM, m_tile, WIDTH, HEADS, MASKED)
