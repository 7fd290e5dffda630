"""What every attention backward needs first, per row: its lse to base 2, and `delta`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_port.kernels.triton.host import last_contiguous, strides
from nsa_port.kernels.triton.tiles import LOG2_E, split_row

_ROWS = 16


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
        _backward_rows_kernel[(triton.cdiv(rows, _ROWS),)](
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
            WIDTH=triton.next_power_of_2(Dv),
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
