"""Mean pooling of tokens into overlapping compressed blocks (Eq. 7 with phi = mean), not packed.

The grid has an axis for each of rows, KV heads and batch, so that nothing is divided. Backwards,
the `block_stride` tokens between two blocks' starts have one gradient, found once and written to
all. Packed sequences go to the shared kernels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_port.kernels.amd.grids import MOST_LAYERS, rows_of_a_wave
from nsa_port.kernels.geometry import Layout, NSAConfig
from nsa_port.kernels.triton import compression
from nsa_port.kernels.triton.host import (
    cdiv,
    last_contiguous,
    next_power_of_2,
    on_device_of,
    strides,
)

_LARGEST_STRIDE = 64
"""Beyond, the tile of tokens that share a gradient would not fit the registers."""


def mean_compress(x: Tensor, config: NSAConfig, layout: Layout, num_blocks: int) -> Tensor:
    """Block `i` is the average of tokens `[i d, i d + l)`; rows past the last block are 0.

    `[B, num_blocks, HK, D]`.
    """
    B, S, HK, D = x.shape
    if layout.packed or max(B, HK) > MOST_LAYERS:
        return compression.mean_compress(x, config, layout, num_blocks)
    y = torch.empty((B, num_blocks, HK, D), dtype=x.dtype, device=x.device)
    if y.numel():
        rows = rows_of_a_wave(num_blocks, D)
        with on_device_of(x):
            _mean_kernel[(cdiv(num_blocks, rows), HK, B)](
                x,
                y,
                min(S, layout.num_keys),
                num_blocks,
                HK,
                *strides(x),
                SIZE=config.block_size,
                STRIDE=config.block_stride,
                DIM=D,
                WIDTH=next_power_of_2(D),
                ROWS=rows,
                num_warps=1,
                num_stages=1,
            )
    return y


def mean_compress_backward(grad: Tensor, config: NSAConfig, layout: Layout) -> Tensor:
    """Each token's gradient is the sum over the blocks that hold it, over `l`."""
    B, C, HK, D = grad.shape
    small = config.block_stride <= _LARGEST_STRIDE
    if layout.packed or max(B, HK) > MOST_LAYERS or not small:
        return compression.mean_compress_backward(grad, config, layout)
    grad, S = last_contiguous(grad), layout.num_keys
    dx = torch.empty((B, S, HK, D), dtype=grad.dtype, device=grad.device)
    if dx.numel():
        with on_device_of(grad):
            _mean_backward_kernel[(cdiv(S, config.block_stride), HK, B)](
                grad,
                dx,
                min(C, config.num_compressed(S)),
                S,
                HK,
                *strides(grad),
                SIZE=config.block_size,
                STRIDE=config.block_stride,
                DIM=D,
                WIDTH=next_power_of_2(D),
                ROWS=next_power_of_2(config.block_stride),
                num_warps=1,
                num_stages=1,
            )
    return dx


@triton.jit(do_not_specialize=["S", "C"])
def _mean_kernel(
    x,
    y,
    S,
    C,
    HK,
    stride_xb,
    stride_xt,
    stride_xh,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: `ROWS` compressed blocks of one KV head."""
    first = tl.program_id(0) * ROWS
    i_kv, i_batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_row, o_column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    m_column = (o_column < DIM)[None, :]
    m_tile = ((first + o_row) * STRIDE + SIZE <= S)[:, None] & m_column
    tl.assume(stride_xt >= 0)
    p_x = x + i_batch * stride_xb + i_kv * stride_xh + first.to(tl.int64) * STRIDE * stride_xt
    o_tile = o_row[:, None] * (STRIDE * stride_xt) + o_column[None, :]
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for _ in range(SIZE):
        total += tl.load(p_x + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        p_x += stride_xt
    p_y = y + ((i_batch * C + first) * HK + i_kv) * DIM
    b_y = (total * (1.0 / SIZE)).to(y.dtype.element_ty)
    m_tile = (first + o_row < C)[:, None] & m_column
    tl.store(p_y + o_row[:, None] * (HK * DIM) + o_column[None, :], b_y, mask=m_tile)


@triton.jit(do_not_specialize=["S", "C"])
def _mean_backward_kernel(
    grad,
    dx,
    C,
    S,
    HK,
    stride_gb,
    stride_gt,
    stride_gh,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: the tokens of one KV head from one block's start to the next."""
    i_chunk = tl.program_id(0)
    i_kv, i_batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_column = tl.arange(0, WIDTH)
    m_column = o_column < DIM
    p_grad = grad + i_batch * stride_gb + i_kv * stride_gh
    total = tl.zeros([WIDTH], tl.float32)
    for i_back in tl.static_range(SIZE // STRIDE):
        i_block = i_chunk - i_back
        if (i_block >= 0) & (i_block < C):
            p_row = p_grad + i_block.to(tl.int64) * stride_gt
            total += tl.load(p_row + o_column, mask=m_column, other=0.0).to(tl.float32)
    first = i_chunk * STRIDE
    o_row = tl.arange(0, ROWS)
    p_dx = dx + ((i_batch * S + first) * HK + i_kv) * DIM
    b_dx = (total * (1.0 / SIZE)).to(dx.dtype.element_ty)
    m_tile = ((o_row < STRIDE) & (first + o_row < S))[:, None] & m_column[None, :]
    p_tile = p_dx + o_row[:, None] * (HK * DIM) + o_column[None, :]
    tl.store(p_tile, tl.broadcast_to(b_dx[None, :], [ROWS, WIDTH]), mask=m_tile)
