"""Which chosen blocks neighbouring queries share, and which are left to one query alone.

A tile of neighbouring queries chooses some blocks together: the first block, its own, and whatever
else its queries agree on. Such a block is loaded once for the tile and attended to with all its
rows; a block that too few queries of the tile chose is cheaper to gather for each.

Small tiles compare the blocks of all their queries. Of large ones a few queries stand for all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_port.kernels.triton.bounds import QueryBounds, Tiles, tile_of
from nsa_port.kernels.triton.host import next_power_of_2
from nsa_port.kernels.triton.tiles import LARGEST, any_of, count_bits, named_before

FIELDS = tl.constexpr(3)
"""A shared block's numbers: its first key row, the queries of the tile that chose it, as bits, and
the first row past what any of them sees of it."""

COUNTS = tl.constexpr(3)
"""A tile's numbers: shared blocks that all who chose them see to the end, shared blocks, and the
most blocks left to one query."""

WIDE_FIELDS = tl.constexpr(4)
"""The same in tiles of more than 32 queries: the last has the bits of those behind."""

UNROLLED = tl.constexpr(4)
"""Queries of a tile whose blocks are read at once."""

_SAMPLED = 4
"""Queries of a large tile whose blocks may be shared."""

_LARGEST_TILE = 2**15
"""Comparisons of one query's blocks with those of a whole tile."""


@triton.constexpr_function
def fields_of(queries: int) -> int:
    """How many numbers a shared block has in tiles of so many queries."""
    return (FIELDS if queries <= 32 else WIDE_FIELDS).value


class SharedBlocks(NamedTuple):
    """The blocks of tiles of `queries` neighbouring queries of one batch and KV head.

    Args:
        shared: int32 `[B, HK, tiles, kept, FIELDS or WIDE_FIELDS]`, the blocks that at least
            `least` queries of a tile chose, and those that not all who chose them see to the end;
            these come last.
        counts: int32 `[B, HK, tiles, COUNTS]`.
        own: int32 `[B, T, HK, n]`, the first key rows of each query's other blocks. Then come
            negative numbers: `-2 - row` for a block that the query chose and sees to the end, which
            may be read in place of none, and -1 where it has none.
    """

    shared: Tensor
    counts: Tensor
    own: Tensor


def most_queries(num_selected: int) -> int:
    """Up to how many queries of a tile all are compared: that stays in registers."""
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
    `indices` holds. `queries` is a power of two, at most 64; `least` at most that.
    Unless `even`, every shared block counts as one that is not seen to the end.

    Tiles of more than 16 queries share a block that all see to the end only if one of a few of
    their queries chose it. That finds what nearly all chose, and is several times cheaper.
    """
    B, T, HK, n = indices.shape
    slots = next_power_of_2(n)
    sampled = _SAMPLED if queries > 16 else 0
    fields = fields_of(queries)
    # A query sees all blocks but the one it stands in to the end.
    kept = min(queries * n, queries * n // least + queries)
    shapes = (
        (B, HK, tiles.count, kept, fields),
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
        kept,
        bounds.stride,
        stride_b,
        stride_t,
        stride_h,
        select_block_size,
        N=n,
        QUERIES=queries,
        SLOTS=slots,
        SAMPLED=sampled,
        FIELDS=fields,
        LEAST=least,
        EVEN=even,
        CLOSE=bool(sampled) and indices.is_contiguous(),
        num_warps=max(1, min(8, (sampled or queries) * slots**2 // (512 if sampled else 2048))),
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
    kept,
    stride_bounds,
    stride_b,
    stride_t,
    stride_h,
    select_block_size,
    N: tl.constexpr,
    QUERIES: tl.constexpr,
    SLOTS: tl.constexpr,
    SAMPLED: tl.constexpr,
    FIELDS: tl.constexpr,
    LEAST: tl.constexpr,
    EVEN: tl.constexpr,
    CLOSE: tl.constexpr,
):
    """One program: one tile of one batch and KV head.

    `SAMPLED` queries stand for all; 0 if all are compared. `CLOSE` says that indices lie side by
    side: several are then read at once.
    """
    i_tile = tl.program_id(0) % tiles
    i_kv = (tl.program_id(0) // tiles % HK).to(tl.int64)
    i_batch = (tl.program_id(0) // tiles // HK).to(tl.int64)
    first, stop = tile_of(tile_first, tile_stop, i_tile, QUERIES, T)
    p_lower = lower + i_batch * stride_bounds
    p_upper = upper + i_batch * stride_bounds
    p_index = indices + i_batch * stride_b + i_kv * stride_h
    p_shared = shared + tl.program_id(0).to(tl.int64) * kept * FIELDS
    tile = (p_index, p_lower, p_upper, first, stop, T, stride_t, select_block_size)
    if SAMPLED:
        if CLOSE:
            p_close = indices + (i_batch * T * HK + i_kv) * N
            tile = (p_close, p_lower, p_upper, first, stop, T, HK * N, select_block_size)
        front, count = _list_sampled(
            p_shared, tile, N, QUERIES, SLOTS, SAMPLED, FIELDS, LEAST, EVEN
        )
        count += _list_last(p_shared + count * FIELDS, tile, N, QUERIES, SLOTS, SAMPLED, FIELDS)
        # What is listed is read again, by all.
        tl.debug_barrier()

    o_member = tl.arange(0, QUERIES)
    o_slot = tl.arange(0, SLOTS)
    o_query = first + o_member
    m_query = o_query < stop
    m_slot = m_query[:, None] & (o_slot < N)[None, :]
    p_slot = p_index + (o_query.to(tl.int64) * stride_t)[:, None] + o_slot[None, :]
    b_block = tl.load(p_slot, mask=m_slot, other=-1)
    b_first = tl.load(p_lower + o_query, mask=m_query, other=0)
    b_seen = tl.load(p_upper + o_query, mask=m_query, other=0)
    # Not by comparing rows, which may overflow for an index that is far out of range.
    b_blocks = tl.cdiv(b_seen - b_first, select_block_size)
    m_block = (b_block >= 0) & (b_block < b_blocks[:, None])
    m_block &= named_before(b_block, o_slot) == 0
    b_row = tl.where(m_block, b_first[:, None] + b_block * select_block_size, -1)
    m_readable = m_block & (b_row + select_block_size <= b_seen[:, None])
    b_readable = tl.max(tl.where(m_readable, b_row, -1), 1)
    b_none = tl.where(b_readable < 0, -1, -2 - b_readable)

    if SAMPLED:
        m_own = m_block
        for i_listed in range(count):
            m_own &= b_row != tl.load(p_shared + i_listed * FIELDS)
    else:
        b_start = tl.where(m_block, b_row, LARGEST)
        b_queries, b_least, b_end = _who_chose(b_block, b_start, tile, N, QUERIES, SLOTS)
        m_whole = b_row + select_block_size <= b_least
        m_shared = m_block & ((count_bits(b_queries) >= LEAST) | (m_whole == 0))
        # Of the queries that share a block, the first one lists it.
        m_listed = m_shared & ((b_queries & ((1 << o_member) - 1)[:, None]) == 0)
        front, count = _list(
            p_shared, b_row, b_queries, b_end, m_listed, m_whole & EVEN, select_block_size, FIELDS
        )
        m_own = m_block & (m_shared == 0)

    b_own = m_own.to(tl.int32)
    b_left = tl.sum(b_own, 1)
    b_before = tl.cumsum(b_own, 1) - b_own
    o_target = tl.where(b_own > 0, b_before, b_left[:, None] + o_slot[None, :] - b_before)
    p_own = own + ((i_batch * T + first) * HK + i_kv) * N
    o_target += (o_member * HK * N)[:, None]
    _store(p_own, o_target, tl.where(b_own > 0, b_row, b_none[:, None]), m_slot)
    p_counts = counts + tl.program_id(0).to(tl.int64) * COUNTS
    tl.store(p_counts, front)
    tl.store(p_counts + 1, count)
    tl.store(p_counts + 2, tl.max(b_left, 0))


@triton.jit
def _list_sampled(
    p_shared, tile, N: tl.constexpr, QUERIES: tl.constexpr, SLOTS: tl.constexpr,
    SAMPLED: tl.constexpr, FIELDS: tl.constexpr, LEAST: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """List the blocks to share that some of a tile's `SAMPLED` queries chose; `_list`'s numbers."""
    p_index, p_lower, p_upper, first, stop, _, stride_t, select_block_size = tile
    o_place = tl.arange(0, SAMPLED * SLOTS)[None, :]
    o_slot = o_place % SLOTS
    o_query = first + o_place // SLOTS * (QUERIES // SAMPLED)
    m_place = (o_query < stop) & (o_slot < N)
    p_block = p_index + o_query.to(tl.int64) * stride_t + o_slot
    b_block = tl.load(p_block, mask=m_place, other=-1)
    b_first = tl.load(p_lower + o_query, mask=m_place, other=0)
    b_seen = tl.load(p_upper + o_query, mask=m_place, other=0)
    m_block = (b_block >= 0) & (b_block < tl.cdiv(b_seen - b_first, select_block_size))
    b_row = tl.where(m_block, b_first + b_block * select_block_size, LARGEST)
    b_queries, b_least, b_end = _who_chose(b_block, b_row, tile, N, QUERIES, SLOTS)
    m_whole = b_row <= b_least - select_block_size
    m_listed = m_block & ((count_bits(b_queries) >= LEAST) | (m_whole == 0))
    # Of the queries that share a block, the first one lists it, and where it names it first.
    o_before = tl.arange(0, SLOTS)[:, None, None]
    p_before = (p_index + o_query.to(tl.int64) * stride_t)[None, :, :] + o_before
    b_before = tl.load(p_before, mask=m_place[None, :, :] & (o_before < N), other=-1)
    m_listed &= any_of((b_before == b_block[None, :, :]) & (o_before < o_slot[None, :, :])) == 0
    b_earlier = tl.zeros_like(b_queries)
    for i_sample in tl.static_range(SAMPLED):
        bit = tl.full([], 1 << i_sample * (QUERIES // SAMPLED), b_queries.dtype)
        b_earlier |= tl.where(o_place // SLOTS > i_sample, bit, 0)
    m_listed &= (b_queries & b_earlier) == 0
    return _list(
        p_shared, b_row, b_queries, b_end, m_listed, m_whole & EVEN, select_block_size, FIELDS
    )


@triton.jit
def _list_last(
    p_shared, tile, N: tl.constexpr, QUERIES: tl.constexpr, SLOTS: tl.constexpr,
    SAMPLED: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """List the other blocks that not all of a tile's queries who chose them see to the end.

    Such a block is the last that one of them sees. Returns how many these are.
    """
    _, p_lower, p_upper, first, stop, _, _, select_block_size = tile
    o_member = tl.arange(0, QUERIES)[None, :]
    m_query = first + o_member < stop
    b_first = tl.load(p_lower + first + o_member, mask=m_query, other=0)
    b_seen = tl.load(p_upper + first + o_member, mask=m_query, other=0) - b_first
    b_block = tl.where(b_seen % select_block_size > 0, b_seen // select_block_size, -1)
    b_row = tl.where(b_block >= 0, b_first + b_block * select_block_size, LARGEST)
    m_block = b_row < LARGEST
    m_block &= _sampled_chose(b_block, b_row, tile, N, QUERIES, SLOTS, SAMPLED) == 0
    count = 0
    # Hardly ever: they are what everybody chooses.
    if tl.max(tl.max(m_block.to(tl.int32), 1), 0) > 0:
        for i_other in range(QUERIES):
            seen = tl.load(p_upper + first + i_other, mask=first + i_other < stop, other=0)
            m_same = (b_row < seen) & (seen < b_row + select_block_size)
            m_block &= (m_same & (i_other < o_member)) == 0
        b_queries, b_least, b_end = _who_chose(b_block, b_row, tile, N, QUERIES, SLOTS)
        m_listed = m_block & (b_row > b_least - select_block_size)
        count = _list(
            p_shared, b_row, b_queries, b_end, m_listed, b_row < 0, select_block_size, FIELDS
        )[1]
    return count


@triton.jit
def _who_chose(b_block, b_start, tile, N: tl.constexpr, QUERIES: tl.constexpr, SLOTS: tl.constexpr):
    """Which queries of a tile chose each block, as bits, and the least and the most they see.

    One sequence's queries count blocks from the same row, so a block is one that they see if its
    row is.
    """
    p_index, _, p_upper, first, stop, T, stride_t, _ = tile
    BITS: tl.constexpr = tl.int64 if QUERIES > 32 else tl.int32
    o_slot = tl.arange(0, SLOTS)
    b_queries = tl.zeros(b_block.shape, BITS)
    b_least = tl.full(b_block.shape, LARGEST, tl.int32)
    b_end = tl.zeros(b_block.shape, tl.int32)
    one = tl.full([], 1, BITS)
    for i_other in tl.range(QUERIES, loop_unroll_factor=UNROLLED):
        # What is no query of the tile's sees nothing, whatever it chose.
        i_query = first + i_other
        seen = tl.load(p_upper + i_query, mask=i_query < stop, other=0)
        p_theirs = p_index + tl.minimum(i_query, T - 1).to(tl.int64) * stride_t + o_slot
        b_theirs = tl.load(p_theirs) if N == SLOTS else tl.load(p_theirs, mask=o_slot < N, other=-1)
        m_chose = any_of(b_theirs[:, None, None] == b_block[None, :, :]) & (b_start < seen)
        b_queries |= tl.where(m_chose, one << i_other, 0)
        b_least = tl.minimum(b_least, tl.where(m_chose, seen, LARGEST))
        b_end = tl.maximum(b_end, tl.where(m_chose, seen, 0))
    return b_queries, b_least, b_end


@triton.jit
def _sampled_chose(
    b_block, b_row, tile, N: tl.constexpr, QUERIES: tl.constexpr, SLOTS: tl.constexpr,
    SAMPLED: tl.constexpr,
):  # fmt: skip
    """Which blocks one of a tile's `SAMPLED` queries chose."""
    p_index, _, p_upper, first, stop, _, stride_t, _ = tile
    o_slot = tl.arange(0, SLOTS)
    m_chose = b_row < 0
    for i_sample in range(SAMPLED):
        i_query = first + i_sample * (QUERIES // SAMPLED)
        seen = tl.load(p_upper + i_query, mask=i_query < stop, other=0)
        p_theirs = p_index + i_query.to(tl.int64) * stride_t + o_slot
        b_theirs = tl.load(p_theirs, mask=(o_slot < N) & (i_query < stop), other=-1)
        m_chose |= any_of(b_theirs[:, None, None] == b_block[None, :, :]) & (b_row < seen)
    return m_chose


@triton.jit
def _list(
    p_shared, b_row, b_queries, b_end, m_listed, m_whole, select_block_size, FIELDS: tl.constexpr
):
    """Write a list of shared blocks, those that are seen to the end first.

    Returns how many these are, and how many all.
    """
    m_front = m_listed & m_whole
    # Both kinds are counted at once, one in the lower half and one in the upper.
    b_listed = tl.where(m_listed, tl.where(m_front, 1, 1 << 16), 0)
    b_total = tl.sum(b_listed, 1)
    b_before = (tl.cumsum(b_total, 0) - b_total)[:, None] + tl.cumsum(b_listed, 1) - b_listed
    total = tl.sum(b_total, 0)
    front, back = total & 0xFFFF, total >> 16
    o_listed = tl.where(m_front, b_before & 0xFFFF, front + (b_before >> 16)) * FIELDS
    _store(p_shared, o_listed, b_row, m_listed)
    _store(p_shared + 1, o_listed, b_queries.to(tl.int32), m_listed)
    _store(p_shared + 2, o_listed, tl.minimum(b_end, b_row + select_block_size), m_listed)
    if FIELDS == WIDE_FIELDS:
        _store(p_shared + 3, o_listed, (b_queries >> 32).to(tl.int32), m_listed)
    return front, front + back


@triton.jit
def _store(p_base, o_tile, b_tile, m_tile):
    """A store to scattered places. Triton gives its first dimension's to neighbouring lanes, which
    is the one that they have already if the tile is transposed.
    """
    o_tile, b_tile, m_tile = o_tile.trans(1, 0), b_tile.trans(1, 0), m_tile.trans(1, 0)
    tl.store(p_base + o_tile, b_tile, mask=m_tile)
