"""Which chosen blocks neighbouring queries share, and which are left to one query alone.

A tile of neighbouring queries chooses some blocks together: the first block, its own, and whatever
else its queries agree on. Such a block is loaded once for the tile and attended to with all its
rows; a block that too few queries of the tile chose is cheaper to gather for each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_port.kernels.triton.bounds import QueryBounds, Tiles, tile_of
from nsa_port.kernels.triton.host import next_power_of_2

FIELDS = tl.constexpr(3)
"""A shared block's numbers: its first key row, the queries of the tile that chose it, as bits, and
the first row past what any of them sees of it."""

COUNTS = tl.constexpr(3)
"""A tile's numbers: shared blocks that all who chose them see to the end, shared blocks, and the
most blocks left to one query."""

UNROLLED = tl.constexpr(4)
"""Queries of a tile whose blocks are read at once."""

_LARGEST_TILE = 2**15
"""Comparisons of one query's blocks with those of a whole tile."""


class SharedBlocks(NamedTuple):
    """The blocks of tiles of `queries` neighbouring queries of one batch and KV head.

    Args:
        shared: int32 `[B, HK, tiles, kept, FIELDS]`, the blocks that at least `least` queries of a
            tile chose, and those that not all who chose them see to the end; these come last.
        counts: int32 `[B, HK, tiles, COUNTS]`.
        own: int32 `[B, T, HK, n]`, the first key rows of each query's other blocks. Then come
            negative numbers: `-2 - row` for a block that the query chose and sees to the end, which
            may be read in place of none, and -1 where it has none.
    """

    shared: Tensor
    counts: Tensor
    own: Tensor


def most_queries(num_selected: int) -> int:
    """How many queries a tile may have: their bits and comparisons stay in registers."""
    slots = next_power_of_2(num_selected)
    return min(16, max(1, _LARGEST_TILE // slots**2))


def share_blocks(
    indices: Tensor,
    bounds: QueryBounds,
    select_block_size: int,
    tiles: Tiles,
    queries: int,
    least: int,
    even: bool,
) -> SharedBlocks:
    """Sort the chosen blocks `[B, T, HK, n]` into shared and own ones, by `tiles` of `queries`.

    What is nothing to attend to is in neither: a block that starts after the query, lies outside
    its sequence or is named a second time. So every row is one that its query may read, whatever
    `indices` holds. `queries` is a power of two, at most `most_queries(n)`; `least` at most that.
    Unless `even`, every shared block counts as one that is not seen to the end.
    """
    B, T, HK, n = indices.shape
    slots = next_power_of_2(n)
    # A query sees all blocks but the one it stands in to the end.
    kept = min(queries * n, queries * n // least + queries)
    shapes = (
        (B, HK, tiles.count, kept, FIELDS.value),
        (B, HK, tiles.count, COUNTS.value),
        (B, T, HK, n),
    )
    shares = SharedBlocks(
        *(torch.empty(shape, dtype=torch.int32, device=indices.device) for shape in shapes)
    )
    stride_b, stride_t, stride_h = indices.stride()[:-1]
    _share_blocks_kernel[(tiles.count * B * HK,)](
        indices,
        *shares,
        tiles.first,
        tiles.stop,
        bounds.lower,
        bounds.upper,
        tiles.count,
        T,
        HK,
        n,
        kept,
        bounds.stride,
        stride_b,
        stride_t,
        stride_h,
        select_block_size,
        QUERIES=queries,
        SLOTS=slots,
        LEAST=least,
        EVEN=even,
        num_warps=max(1, min(8, queries * slots**2 // 1024)),
    )
    return shares


@triton.jit(do_not_specialize=["tiles", "T", "stride_bounds", "stride_b", "stride_t", "stride_h"])
def _share_blocks_kernel(
    indices,
    shared,
    counts,
    own,
    tile_first,
    tile_stop,
    lower,
    upper,
    tiles,
    T,
    HK,
    n,
    kept,
    stride_bounds,
    stride_b,
    stride_t,
    stride_h,
    select_block_size,
    QUERIES: tl.constexpr,
    SLOTS: tl.constexpr,
    LEAST: tl.constexpr,
    EVEN: tl.constexpr,
):
    """One program: one tile of one batch and KV head."""
    i_tile = tl.program_id(0) % tiles
    i_kv = (tl.program_id(0) // tiles % HK).to(tl.int64)
    i_batch = (tl.program_id(0) // tiles // HK).to(tl.int64)
    first, stop = tile_of(tile_first, tile_stop, i_tile, QUERIES, T)
    p_lower = lower + i_batch * stride_bounds
    p_upper = upper + i_batch * stride_bounds
    p_index = indices + i_batch * stride_b + i_kv * stride_h
    o_member = tl.arange(0, QUERIES)
    o_slot = tl.arange(0, SLOTS)
    b_row, b_seen = _rows_and_stop(
        p_index, p_lower, p_upper, first + o_member, o_slot, stop, n, stride_t, select_block_size
    )
    # Comparisons reduce over the first dimension, which lies within a thread.
    m_same = tl.permute(b_row, (1, 0))[:, :, None] == b_row[None, :, :]
    m_same = m_same & (o_slot[:, None, None] < o_slot[None, None, :])
    b_row = tl.where(tl.max(m_same.to(tl.int32), 0) > 0, -1, b_row)
    m_readable = (b_row >= 0) & (b_row + select_block_size <= b_seen[:, None])
    b_readable = tl.max(tl.where(m_readable, b_row, -1), 1)
    b_none = tl.where(b_readable < 0, -1, -2 - b_readable)

    # [QUERIES, SLOTS]: who chose the block too, how many, and how much of it they see.
    b_queries = tl.zeros([QUERIES, SLOTS], tl.int32)
    b_count = tl.zeros([QUERIES, SLOTS], tl.int32)
    b_end = tl.zeros([QUERIES, SLOTS], tl.int32)
    b_whole = tl.zeros([QUERIES, SLOTS], tl.int32)
    for i_other in tl.range(QUERIES, loop_unroll_factor=UNROLLED):
        o_other = first + i_other + tl.arange(0, 1)
        b_theirs, b_stop = _rows_and_stop(
            p_index, p_lower, p_upper, o_other, o_slot, stop, n, stride_t, select_block_size
        )
        m_same = tl.permute(b_theirs, (1, 0))[:, :, None] == b_row[None, :, :]
        b_chose = tl.max(m_same.to(tl.int32), 0)
        b_chose = tl.where(b_row >= 0, b_chose, 0)
        b_queries |= b_chose << i_other
        b_count += b_chose
        b_end = tl.maximum(b_end, b_chose * b_stop[:, None])
        b_whole += tl.where(b_row + select_block_size <= b_stop[:, None], b_chose, 0)
    m_whole = b_whole == b_count
    m_shared = (b_row >= 0) & ((b_count >= LEAST) | (m_whole == 0))
    # Of the queries that share a block, the first one lists it.
    m_listed = m_shared & ((b_queries & ((1 << o_member) - 1)[:, None]) == 0)
    m_front = m_listed & m_whole & EVEN
    o_front, front = _ranks_of(m_front)
    o_back, back = _ranks_of(m_listed & (m_front == 0))
    o_listed = tl.where(m_front, o_front, front + o_back)
    p_shared = shared + (tl.program_id(0).to(tl.int64) * kept + o_listed) * FIELDS
    tl.store(p_shared, b_row, mask=m_listed)
    tl.store(p_shared + 1, b_queries, mask=m_listed)
    tl.store(p_shared + 2, tl.minimum(b_end, b_row + select_block_size), mask=m_listed)

    m_slot = (o_slot < n)[None, :]
    b_own = ((b_row >= 0) & (m_shared == 0)).to(tl.int32)
    b_left = tl.sum(b_own, 1)
    b_other = tl.where(m_slot, 1 - b_own, 0)
    o_target = tl.where(
        b_own > 0, tl.cumsum(b_own, 1) - 1, b_left[:, None] + tl.cumsum(b_other, 1) - 1
    )
    o_query = first + o_member
    p_own = own + (((i_batch * T + o_query) * HK + i_kv) * n)[:, None]
    m_own = m_slot & (o_query < stop)[:, None]
    tl.store(p_own + o_target, tl.where(b_own > 0, b_row, b_none[:, None]), mask=m_own)
    p_counts = counts + tl.program_id(0).to(tl.int64) * COUNTS
    tl.store(p_counts, front)
    tl.store(p_counts + 1, front + back)
    tl.store(p_counts + 2, tl.max(b_left, 0))


@triton.jit
def _ranks_of(m_listed):
    """How many true entries come before each one, row by row, and how many there are."""
    b_listed = m_listed.to(tl.int32)
    b_total = tl.sum(b_listed, 1)
    b_before = (tl.cumsum(b_total, 0) - b_total)[:, None]
    return b_before + tl.cumsum(b_listed, 1) - b_listed, tl.sum(b_total, 0)


@triton.jit
def _rows_and_stop(
    p_index, p_lower, p_upper, o_query, o_slot, stop, n, stride_t, select_block_size
):  # fmt: skip
    """The first key row of each block of some queries, -1 for none, and each query's last row + 1.

    `[QUERIES, SLOTS]` and `[QUERIES]`.
    """
    m_query = o_query < stop
    p_index += (o_query.to(tl.int64) * stride_t)[:, None]
    m_slot = m_query[:, None] & (o_slot < n)[None, :]
    b_block = tl.load(p_index + o_slot[None, :], mask=m_slot, other=-1)
    b_first = tl.load(p_lower + o_query, mask=m_query, other=0)
    b_stop = tl.load(p_upper + o_query, mask=m_query, other=0)
    # Not by comparing rows, which may overflow for an index that is far out of range.
    b_blocks = tl.cdiv(b_stop - b_first, select_block_size)
    m_block = (b_block >= 0) & (b_block < b_blocks[:, None])
    return tl.where(m_block, b_first[:, None] + b_block * select_block_size, -1), b_stop
