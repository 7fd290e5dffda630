"""Mean pooling of tokens into overlapping compressed blocks (Eq. 7 with phi = mean)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_port.kernels.geometry import Layout, NSAConfig
from nsa_port.kernels.triton.host import (
    bits_of,
    cdiv,
    last_contiguous,
    next_power_of_2,
    on_device_of,
    strides,
)
from nsa_port.kernels.triton.tiles import find_interval

_ROWS = 16
_TOKENS = 16


def mean_compress(x: Tensor, config: NSAConfig, layout: Layout, num_blocks: int) -> Tensor:
    """Block `i` is the average of tokens `[i d, i d + l)` of its sequence.

    `[B, num_blocks, HK, D]`; rows past the last block are 0.
    """
    with on_device_of(x):
        tokens = min(_TOKENS, next_power_of_2(config.block_size))
        return _launch(
            _mean_compress_kernel, x, config, layout, num_blocks, 1, TOKENS=tokens, num_warps=1
        )


def mean_compress_backward(grad: Tensor, config: NSAConfig, layout: Layout) -> Tensor:
    """Each token's gradient is the sum over the blocks that hold it, over `l`."""
    with on_device_of(grad):
        return _launch(
            _mean_compress_backward_kernel, last_contiguous(grad), config, layout, layout.num_keys,
            _ROWS, ROWS=_ROWS, num_warps=4,
        )  # fmt: skip


def _launch(
    kernel: triton.JITFunction,
    x: Tensor,
    config: NSAConfig,
    layout: Layout,
    num_rows: int,
    rows: int,
    **sizes: int,
) -> Tensor:
    """Run either kernel: each row of the result is a mean over a few rows of `x`.

    A program has `rows` of them, each a KV head of a block or token.
    """
    B, num_inputs, HK, D = x.shape
    y = torch.empty((B, num_rows, HK, D), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    if layout.cu_seqlens_k is None:
        cu_tokens = cu_blocks = None
        sequences = 1
    else:
        cu_tokens = layout.cu_seqlens_k.contiguous()
        cu_blocks = layout.compressed_cu_seqlens(config)
        sequences = cu_tokens.shape[0] - 1
    kernel[(cdiv(num_rows * HK, rows) * B,)](
        x,
        y,
        cu_tokens,
        cu_blocks,
        num_inputs,
        num_rows,
        layout.num_keys,
        sequences,
        bits_of(sequences),
        HK,
        config.block_size,
        config.block_stride,
        *strides(x),
        DIM=D,
        WIDTH=next_power_of_2(D),
        **sizes,
    )
    return y


_LENGTHS = ["num_inputs", "num_rows", "num_tokens", "num_sequences", "search_steps"]


@triton.jit(do_not_specialize=_LENGTHS)
def _mean_compress_kernel(
    x,
    y,
    cu_tokens,
    cu_blocks,
    num_inputs,
    num_rows,
    num_tokens,
    num_sequences,
    search_steps,
    HK,
    block_size,
    block_stride,
    stride_xb,
    stride_xt,
    stride_xh,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One program: a KV head of a compressed block.

    `TOKENS` of the block are read at once: one after the other would be waited for one by one.
    """
    rows = num_rows * HK
    i_batch = (tl.program_id(0) // rows).to(tl.int64)
    i_row = tl.program_id(0) % rows
    i_block = i_row // HK
    if cu_tokens is None:
        first = i_block * block_stride
        stop = num_tokens
    else:
        b_sequence = find_interval(
            cu_blocks + 1, i_block + tl.arange(0, 1), num_sequences, search_steps
        )
        m_known = b_sequence < num_sequences
        b_block = i_block - tl.load(cu_blocks + b_sequence, mask=m_known, other=0)
        b_first = tl.load(cu_tokens + b_sequence, mask=m_known, other=0) + b_block * block_stride
        first = tl.sum(b_first, 0)
        stop = tl.sum(tl.load(cu_tokens + b_sequence + 1, mask=m_known, other=0), 0)
    # A block that the sequence does not fill is past the last: 0.
    is_block = (first >= 0) & (first + block_size <= tl.minimum(stop, num_inputs))
    o_column = tl.arange(0, WIDTH)
    p_x = x + i_batch * stride_xb + (i_row % HK).to(tl.int64) * stride_xh + o_column[None, :]
    total = tl.zeros([TOKENS, WIDTH], tl.float32)
    for i_token in range(0, tl.where(is_block, block_size, 0), TOKENS):
        o_inside = i_token + tl.arange(0, TOKENS)
        m_tile = (o_inside < block_size)[:, None] & (o_column < DIM)[None, :]
        o_token = (first + o_inside).to(tl.int64)
        total += tl.load(p_x + o_token[:, None] * stride_xt, mask=m_tile, other=0.0).to(tl.float32)
    b_mean = tl.sum(total, 0) / block_size
    p_out = y + (i_batch * rows + i_row) * DIM + o_column
    tl.store(p_out, b_mean.to(y.dtype.element_ty), mask=o_column < DIM)


@triton.jit(do_not_specialize=_LENGTHS)
def _mean_compress_backward_kernel(
    x,
    y,
    cu_tokens,
    cu_blocks,
    num_inputs,
    num_rows,
    num_tokens,
    num_sequences,
    search_steps,
    HK,
    block_size,
    block_stride,
    stride_xb,
    stride_xt,
    stride_xh,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: `ROWS` rows of `y`, each a KV head of a token; `x` is the blocks' gradient."""
    programs = tl.cdiv(num_rows * HK, ROWS)
    i_batch = (tl.program_id(0) // programs).to(tl.int64)
    o_row = (tl.program_id(0) % programs) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < num_rows * HK
    b_token = o_row // HK
    if cu_tokens is None:
        b_first = tl.zeros_like(b_token)
        b_length = b_first + num_tokens
    else:
        b_sequence = find_interval(cu_tokens + 1, b_token, num_sequences, search_steps)
        m_known = m_row & (b_sequence < num_sequences)
        b_start = tl.load(cu_tokens + b_sequence, mask=m_known, other=0)
        b_length = tl.load(cu_tokens + b_sequence + 1, mask=m_known, other=0) - b_start
        b_first = tl.load(cu_blocks + b_sequence, mask=m_known, other=0)
        b_token -= b_start
    blocks = tl.where(b_length < block_size, 0, (b_length - block_size) // block_stride + 1)
    # Blocks that hold a token start at most l - 1 tokens before it.
    b_last = b_token // block_stride
    o_column = tl.arange(0, WIDTH)
    p_x = (
        x + i_batch * stride_xb + (o_row % HK).to(tl.int64)[:, None] * stride_xh + o_column[None, :]
    )
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for i_back in range(block_size // block_stride):
        b_block = b_last - i_back
        m_block = m_row & (b_block >= 0) & (b_block < blocks)
        o_block = (b_first + b_block).to(tl.int64)
        m_block &= (o_block >= 0) & (o_block < num_inputs)
        m_tile = m_block[:, None] & (o_column < DIM)[None, :]
        total += tl.load(p_x + o_block[:, None] * stride_xt, mask=m_tile, other=0.0).to(tl.float32)
    o_out = (i_batch * num_rows * HK + o_row)[:, None] * DIM + o_column[None, :]
    m_tile = m_row[:, None] & (o_column < DIM)[None, :]
    tl.store(y + o_out, (total / block_size).to(y.dtype.element_ty), mask=m_tile)
