"""Float32 parts of two gradients, added up in order and converted, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_port.kernels.triton.host import cdiv

_BLOCK = 1024
UNROLLED = tl.constexpr(5)
"""Of the parts after the first, which are mostly 15, 3 or 1."""


def sum_parts(dk: Tensor, dv: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`dk.sum(0)` and `dv.sum(0)` in `dtype`, of contiguous `[parts, ...]`."""
    if dk.shape[0] == 1 and dk.dtype == dtype:
        return dk[0], dv[0]
    parts, *shape_k = dk.shape
    of_k = torch.empty(shape_k, dtype=dtype, device=dk.device)
    of_v = torch.empty(dv.shape[1:], dtype=dtype, device=dv.device)
    programs_k, programs_v = cdiv(of_k.numel(), _BLOCK), cdiv(of_v.numel(), _BLOCK)
    if programs_k + programs_v:
        _sum_parts_kernel[(programs_k + programs_v,)](
            dk, dv, of_k, of_v, parts, of_k.numel(), of_v.numel(), programs_k, BLOCK=_BLOCK
        )
    return of_k, of_v


@triton.jit(do_not_specialize=["parts", "count_k", "count_v", "programs_k"])
def _sum_parts_kernel(dk, dv, of_k, of_v, parts, count_k, count_v, programs_k, BLOCK: tl.constexpr):
    """One program: `BLOCK` elements of one of the two."""
    i_program = tl.program_id(0)
    if i_program < programs_k:
        _sum_block(dk, of_k, i_program, parts, count_k, BLOCK)
    else:
        _sum_block(dv, of_v, i_program - programs_k, parts, count_v, BLOCK)


@triton.jit
def _sum_block(p_parts, p_sum, i_block, parts, count, BLOCK: tl.constexpr):
    """Add up one block of elements."""
    o_element = i_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_element = o_element < count
    b_sum = tl.load(p_parts + o_element, mask=m_element, other=0.0)
    # Unrolled: one part after the other would be waited for one by one.
    for i_part in tl.range(1, parts, loop_unroll_factor=UNROLLED):
        o_part = i_part * count.to(tl.int64) + o_element
        b_sum += tl.load(p_parts + o_part, mask=m_element, other=0.0)
    tl.store(p_sum + o_element, b_sum.to(p_sum.dtype.element_ty), mask=m_element)
