"""Where each query may look: the half-open interval of key rows it sees, per kind of attention.

This is the one place that knows of packed sequences and given positions.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_port.kernels.geometry import Layout, NSAConfig
from nsa_port.kernels.triton.host import bits_of
from nsa_port.kernels.triton.tiles import LARGEST, find_interval, tile_extent

_BLOCK = 256
_TILES = 128


class Kind(IntEnum):
    """What a query at position `p` of its sequence sees."""

    CAUSAL = 0
    """Keys `0 .. p`."""
    WINDOW = 1
    """Keys `p - w + 1 .. p`."""
    COMPRESSED = 2
    """Compressed blocks that are complete at `p`."""


class QueryBounds(NamedTuple):
    """Each query's key rows `lower .. upper - 1` and its packed sequence, int32 `[B or 1, T]`.

    Rows are counted along the key tensor's own axis. `lower == upper` where nothing is seen, but
    `lower` is the sequence's first row all the same (window: only where something is seen).
    """

    lower: Tensor
    upper: Tensor
    sequence: Tensor

    @property
    def stride(self) -> int:
        """From one batch to the next; 0 where all batches share the bounds."""
        return self.lower.shape[1] if self.lower.shape[0] > 1 else 0


def query_bounds(
    kind: Kind, num_queries: int, num_rows: int, config: NSAConfig, layout: Layout, device: torch.device
) -> QueryBounds:
    """The bounds of `num_queries` queries over a key tensor of `num_rows` rows.

    Whatever the tensors of `layout` hold, all bounds lie in `0 .. num_rows`.
    """
    positions = layout.positions
    batches = positions.shape[0] if positions is not None and positions.dim() == 2 else 1
    shape = (batches, num_queries)
    bounds = QueryBounds(
        *(torch.empty(shape, dtype=torch.int32, device=device) for _ in QueryBounds._fields)
    )
    if layout.cu_seqlens is None or layout.cu_seqlens_k is None:
        cu_queries = cu_keys = cu_rows = None
        sequences = 1
    else:
        cu_queries, cu_keys = layout.cu_seqlens.contiguous(), layout.cu_seqlens_k.contiguous()
        compressed = kind == Kind.COMPRESSED
        cu_rows = layout.compressed_cu_seqlens(config) if compressed else cu_keys
        sequences = cu_queries.shape[0] - 1
    if positions is not None:
        positions = positions.contiguous()
    grid = (batches * triton.cdiv(num_queries, _BLOCK),)
    if grid[0]:
        _query_bounds_kernel[grid](
            positions,
            cu_queries,
            cu_keys,
            cu_rows,
            *bounds,
            num_queries,
            layout.num_keys,
            num_rows,
            sequences,
            bits_of(sequences),
            config.block_size,
            config.block_stride,
            min(config.window_size, 2**30),
            KIND=int(kind),
            BLOCK=_BLOCK,
        )
    return bounds


_LENGTHS = [
    "T", "S", "num_rows", "num_sequences", "search_steps",
    "block_size", "block_stride", "window_size",
]  # fmt: skip


@triton.jit(do_not_specialize=_LENGTHS)
def _query_bounds_kernel(
    positions,
    cu_queries,
    cu_keys,
    cu_rows,
    lower,
    upper,
    sequence,
    T,
    S,
    num_rows,
    num_sequences,
    search_steps,
    block_size,
    block_stride,
    window_size,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: `BLOCK` queries of one batch."""
    tiles = tl.cdiv(T, BLOCK)
    i_batch = tl.program_id(0) // tiles
    o_query = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    m_query = o_query < T
    if cu_queries is None:
        b_sequence = tl.zeros_like(o_query)
        m_known = m_query
        b_keys = tl.zeros_like(o_query) + S
        b_first = tl.zeros_like(o_query)
        b_position = o_query + (S - T)
    else:
        b_sequence = find_interval(cu_queries + 1, o_query, num_sequences, search_steps)
        m_known = m_query & (b_sequence < num_sequences)
        b_sequence = tl.minimum(b_sequence, num_sequences - 1)
        b_keys = tl.load(cu_keys + b_sequence + 1, mask=m_query, other=0)
        b_keys -= tl.load(cu_keys + b_sequence, mask=m_query, other=0)
        b_first = tl.load(cu_rows + b_sequence, mask=m_query, other=0)
        b_position = o_query - tl.load(cu_queries + b_sequence + 1, mask=m_query, other=0) + b_keys
    if positions is not None:
        p_position = positions + i_batch.to(tl.int64) * T + o_query
        b_position = tl.load(p_position, mask=m_query, other=-1)
    b_position = tl.maximum(tl.minimum(b_position, b_keys - 1), -1)
    if KIND == 2:
        complete = (b_position + 1 - block_size) // block_stride + 1
        b_upper = tl.where(b_position + 1 < block_size, 0, complete)
    else:
        b_upper = b_position + 1
    b_lower = tl.zeros_like(b_upper)
    if KIND == 1:
        b_lower = tl.maximum(b_upper - window_size, 0)
    b_upper = tl.where(m_known, b_upper, b_lower)
    b_lower = tl.maximum(tl.minimum(b_first + b_lower, num_rows), 0)
    b_upper = tl.maximum(tl.minimum(b_first + b_upper, num_rows), b_lower)
    o_out = i_batch.to(tl.int64) * T + o_query
    tl.store(lower + o_out, b_lower, mask=m_query)
    tl.store(upper + o_out, b_upper, mask=m_query)
    tl.store(sequence + o_out, b_sequence, mask=m_query)


def query_ranges(bounds: QueryBounds, num_rows: int, block_m: int, block_n: int) -> Tensor:
    """For each block of `block_n` key rows, the tiles of `block_m` queries that see any of it.

    int32 `[B or 1, blocks, 4]`: `first, full_first, full_stop, stop`. Tiles outside
    `first .. stop - 1` see nothing of the block; every query of the tiles `full_first ..
    full_stop - 1` sees all of it.
    """
    batches, num_queries = bounds.lower.shape
    tiles, blocks = triton.cdiv(num_queries, block_m), triton.cdiv(num_rows, block_n)
    device = bounds.lower.device
    extents = torch.empty((batches, 4, tiles), dtype=torch.int32, device=device)
    ranges = torch.empty((batches, blocks, 4), dtype=torch.int32, device=device)
    if tiles:
        _tile_extents_kernel[(batches * tiles,)](
            bounds.lower, bounds.upper, extents, num_queries, tiles, BLOCK_M=block_m, num_warps=1
        )
    if blocks:
        _query_ranges_kernel[(batches * blocks,)](
            extents, ranges, tiles, blocks, BLOCK_N=block_n, TILES=_TILES, num_warps=1
        )
    return ranges


@triton.jit(do_not_specialize=["T", "tiles"])
def _tile_extents_kernel(lower, upper, extents, T, tiles, BLOCK_M: tl.constexpr):
    """One program: the extent of one query tile."""
    i_batch = tl.program_id(0) // tiles
    i_tile = tl.program_id(0) % tiles
    o_query = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_query = o_query < T
    o_in = i_batch.to(tl.int64) * T + o_query
    b_lower = tl.load(lower + o_in, mask=m_query, other=0)
    b_upper = tl.load(upper + o_in, mask=m_query, other=0)
    some_lower, some_upper, all_lower, all_upper = tile_extent(b_lower, b_upper, m_query)
    p_out = extents + i_batch.to(tl.int64) * 4 * tiles + i_tile
    tl.store(p_out, some_lower)
    tl.store(p_out + tiles, some_upper)
    tl.store(p_out + 2 * tiles, all_lower)
    tl.store(p_out + 3 * tiles, all_upper)


@triton.jit(do_not_specialize=["tiles", "blocks"])
def _query_ranges_kernel(
    extents, ranges, tiles, blocks, BLOCK_N: tl.constexpr, TILES: tl.constexpr
):
    """One program: one block of key rows against all query tiles.

    Where queries stand in any order, the tiles that see all of the block may lie apart; only the
    first run of them is reported as full.
    """
    i_batch = tl.program_id(0) // blocks
    i_block = tl.program_id(0) % blocks
    start, stop = i_block * BLOCK_N, i_block * BLOCK_N + BLOCK_N
    p_extents = extents + i_batch.to(tl.int64) * 4 * tiles
    range_first, range_stop, full_first = tiles, 0, tiles
    for i_tile in range(0, tiles, TILES):
        o_tile = i_tile + tl.arange(0, TILES)
        m_some, m_all = _see_block(p_extents, o_tile, tiles, start, stop)
        range_first = tl.minimum(range_first, tl.min(tl.where(m_some, o_tile, tiles), 0))
        range_stop = tl.maximum(range_stop, tl.max(tl.where(m_some, o_tile + 1, 0), 0))
        full_first = tl.minimum(full_first, tl.min(tl.where(m_all, o_tile, tiles), 0))
    full_first = tl.minimum(full_first, range_stop)
    full_stop = range_stop
    for i_tile in range(full_first // TILES * TILES, range_stop, TILES):
        o_tile = i_tile + tl.arange(0, TILES)
        m_some, m_all = _see_block(p_extents, o_tile, tiles, start, stop)
        m_break = (m_all == 0) & (o_tile > full_first)
        full_stop = tl.minimum(full_stop, tl.min(tl.where(m_break, o_tile, tiles), 0))
    p_out = ranges + (i_batch.to(tl.int64) * blocks + i_block) * 4
    tl.store(p_out, tl.minimum(range_first, range_stop))
    tl.store(p_out + 1, full_first)
    tl.store(p_out + 2, full_stop)
    tl.store(p_out + 3, range_stop)


@triton.jit
def _see_block(p_extents, o_tile, tiles, start, stop):
    """Which tiles see some and which see all of the key rows `start .. stop - 1`."""
    m_tile = o_tile < tiles
    b_some_lower = tl.load(p_extents + o_tile, mask=m_tile, other=LARGEST)
    b_some_upper = tl.load(p_extents + tiles + o_tile, mask=m_tile, other=0)
    b_all_lower = tl.load(p_extents + 2 * tiles + o_tile, mask=m_tile, other=LARGEST)
    b_all_upper = tl.load(p_extents + 3 * tiles + o_tile, mask=m_tile, other=0)
    m_some = (b_some_lower < stop) & (b_some_upper > start)
    return m_some, (b_all_lower <= start) & (b_all_upper >= stop)
