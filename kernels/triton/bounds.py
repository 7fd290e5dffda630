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
from nsa_port.kernels.triton.host import bits_of, cdiv
from nsa_port.kernels.triton.tiles import LARGEST, find_interval, key_spans, tile_extent

_BLOCK = 256
_PART_QUERIES = 32
_PARTS = 256


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
    kind: Kind,
    num_queries: int,
    num_rows: int,
    config: NSAConfig,
    layout: Layout,
    device: torch.device,
) -> QueryBounds:
    """The bounds of `num_queries` queries over a key tensor of `num_rows` rows.

    Whatever the tensors of `layout` hold, all bounds lie in `0 .. num_rows`.
    """
    return _bounds((kind,), num_queries, num_rows, num_rows, config, layout, device)[0]


def all_bounds(
    num_queries: int,
    num_keys: int,
    num_blocks: int,
    config: NSAConfig,
    layout: Layout,
    device: torch.device,
) -> tuple[QueryBounds, ...]:
    """`query_bounds` of every `Kind`, in its order: over `num_blocks` rows where compressed."""
    return _bounds(tuple(Kind), num_queries, num_keys, num_blocks, config, layout, device)


def _bounds(
    kinds: tuple[Kind, ...],
    num_queries: int,
    num_keys: int,
    num_blocks: int,
    config: NSAConfig,
    layout: Layout,
    device: torch.device,
) -> tuple[QueryBounds, ...]:
    """Bounds of successive kinds, in one launch."""
    positions = layout.positions
    batches = positions.shape[0] if positions is not None and positions.dim() == 2 else 1
    # Each starts at a multiple of 16 bytes: Triton compiles apart what is aligned and what is not.
    size = batches * num_queries
    stride = cdiv(size, 4) * 4
    bounds = torch.empty((len(kinds), 3, stride), dtype=torch.int32, device=device)
    cu_queries, cu_keys, cu_blocks, sequences = layout.cu_seqlens, layout.cu_seqlens_k, None, 1
    if cu_queries is None or cu_keys is None:
        cu_queries = cu_keys = None
    else:
        cu_queries, cu_keys = cu_queries.contiguous(), cu_keys.contiguous()
        if Kind.COMPRESSED in kinds:
            cu_blocks = layout.compressed_cu_seqlens(config)
        sequences = cu_queries.shape[0] - 1
    if positions is not None:
        positions = positions.contiguous()
    programs = batches * cdiv(num_queries, _BLOCK)
    if programs:
        _query_bounds_kernel[(programs, len(kinds))](
            positions,
            cu_queries,
            cu_keys,
            cu_blocks,
            bounds,
            int(kinds[0]),
            num_queries,
            layout.num_keys,
            num_keys,
            num_blocks,
            stride,
            sequences,
            bits_of(sequences),
            config.block_size,
            config.block_stride,
            min(config.window_size, 2**30),
            BLOCK=_BLOCK,
        )
    rows = bounds.as_strided((3 * len(kinds), batches, num_queries), (stride, num_queries, 1))
    found = rows.unbind(0)
    return tuple(QueryBounds(*found[i : i + 3]) for i in range(0, len(found), 3))


_LENGTHS = [
    "first_kind", "T", "S", "num_keys", "num_blocks", "stride", "num_sequences", "search_steps",
    "block_size", "block_stride", "window_size",
]  # fmt: skip


@triton.jit(do_not_specialize=_LENGTHS)
def _query_bounds_kernel(
    positions,
    cu_queries,
    cu_keys,
    cu_blocks,
    bounds,
    first_kind,
    T,
    S,
    num_keys,
    num_blocks,
    stride,
    num_sequences,
    search_steps,
    block_size,
    block_stride,
    window_size,
    BLOCK: tl.constexpr,
):
    """One program: one kind of bounds for `BLOCK` queries of one batch."""
    kind = first_kind + tl.program_id(1)
    tiles = tl.cdiv(T, BLOCK)
    i_batch = tl.program_id(0) // tiles
    o_query = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    m_query = o_query < T
    num_rows = tl.where(kind == 2, num_blocks, num_keys)
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
        b_first = tl.load(cu_keys + b_sequence, mask=m_query, other=0)
        b_keys = tl.load(cu_keys + b_sequence + 1, mask=m_query, other=0) - b_first
        if cu_blocks is not None:
            m_block = m_query & (kind == 2)
            b_first = tl.load(cu_blocks + b_sequence, mask=m_block, other=0) + tl.where(
                kind == 2, 0, b_first
            )
        b_position = o_query - tl.load(cu_queries + b_sequence + 1, mask=m_query, other=0) + b_keys
    if positions is not None:
        p_position = positions + i_batch.to(tl.int64) * T + o_query
        b_position = tl.load(p_position, mask=m_query, other=-1)
    b_position = tl.maximum(tl.minimum(b_position, b_keys - 1), -1)
    b_complete = (b_position + 1 - block_size) // block_stride + 1
    b_complete = tl.where(b_position + 1 < block_size, 0, b_complete)
    b_upper = tl.where(kind == 2, b_complete, b_position + 1)
    b_lower = tl.where(kind == 1, tl.maximum(b_upper - window_size, 0), 0)
    b_upper = tl.where(m_known, b_upper, b_lower)
    b_lower = tl.maximum(tl.minimum(b_first + b_lower, num_rows), 0)
    b_upper = tl.maximum(tl.minimum(b_first + b_upper, num_rows), b_lower)
    # [kind, lower / upper / sequence, batch, query]
    stride = stride.to(tl.int64)
    p_out = bounds + tl.program_id(1) * 3 * stride + i_batch.to(tl.int64) * T + o_query
    tl.store(p_out, b_lower, mask=m_query)
    tl.store(p_out + stride, b_upper, mask=m_query)
    tl.store(p_out + 2 * stride, b_sequence, mask=m_query)


class Tiles(NamedTuple):
    """Tokens cut into tiles of a fixed size that never cross into the next packed sequence.

    `first`, `stop` and `sequence` are int32 `[count]`; `count` is an upper bound known on the
    host, and surplus tiles are empty. All three are None where there is one sequence, whose tiles
    a kernel finds by itself, see `tile_of`.
    """

    first: Tensor | None
    stop: Tensor | None
    sequence: Tensor | None
    count: int  # type: ignore[assignment]


def cut_tiles(num_tokens: int, size: int, cu_seqlens: Tensor | None) -> Tiles:
    """The tiles of `size` tokens; all lie in `0 .. num_tokens` whatever `cu_seqlens` holds."""
    if cu_seqlens is None:
        return Tiles(None, None, None, cdiv(num_tokens, size))
    cu_seqlens = cu_seqlens.to(torch.int32)
    sequences = cu_seqlens.shape[0] - 1
    count = num_tokens // size + sequences
    number = (cu_seqlens.diff() + (size - 1)).div(size, rounding_mode="floor").clamp(min=0)
    ends = number.cumsum(0, dtype=torch.int32)
    tile = torch.arange(count, dtype=torch.int32, device=cu_seqlens.device)
    sequence = torch.searchsorted(ends, tile, right=True, out_int32=True).clamp(max=sequences - 1)
    first = cu_seqlens[sequence] + (tile - (ends - number)[sequence]) * size
    first = first.clamp(0, num_tokens)
    stop = torch.minimum(first + size, cu_seqlens[sequence + 1]).clamp(max=num_tokens)
    return Tiles(first, stop, sequence, count)


@triton.jit
def tile_of(tile_first, tile_stop, i_tile, SIZE: tl.constexpr, num_tokens):
    """The first token of a tile and the one past its last."""
    if tile_first is None:
        first = i_tile * SIZE
        stop = tl.minimum(first + SIZE, num_tokens)
    else:
        first = tl.load(tile_first + i_tile)
        stop = tl.load(tile_stop + i_tile)
    return first, stop


def query_ranges(
    bounds: QueryBounds, num_rows: int, keys: Tiles, cu_queries: Tensor | None, block_n: int
) -> Tensor:
    """For each tile of `block_n` key rows, the queries that may see any of it.

    int32 `[B or 1, tiles, 4]`: `start, full_start, full_stop, stop`. Queries outside `start ..
    stop - 1` see nothing of the tile or belong to another sequence; those of `full_start ..
    full_stop - 1` see all of it.
    """
    batches, num_queries = bounds.lower.shape
    parts = cdiv(num_queries, _PART_QUERIES)
    device = bounds.lower.device
    extents = torch.empty((batches, 4, parts), dtype=torch.int32, device=device)
    ranges = torch.empty((batches, keys.count, 4), dtype=torch.int32, device=device)
    if parts:
        _extents_kernel[(batches * parts,)](
            bounds.lower,
            bounds.upper,
            extents,
            num_queries,
            parts,
            QUERIES=_PART_QUERIES,
            num_warps=1,
        )
    if keys.count:
        _query_ranges_kernel[(batches * keys.count,)](
            extents,
            ranges,
            keys.first,
            keys.stop,
            keys.sequence,
            cu_queries,
            num_queries,
            num_rows,
            parts,
            keys.count,
            BLOCK_N=block_n,
            QUERIES=_PART_QUERIES,
            PARTS=_PARTS,
            num_warps=1,
        )
    return ranges


@triton.jit(do_not_specialize=["T", "parts"])
def _extents_kernel(lower, upper, extents, T, parts, QUERIES: tl.constexpr):
    """One program: the key rows that some and that every query of one part of the queries sees."""
    i_batch = (tl.program_id(0) // parts).to(tl.int64)
    i_part = tl.program_id(0) % parts
    o_query = i_part * QUERIES + tl.arange(0, QUERIES)
    m_query = o_query < T
    b_lower = tl.load(lower + i_batch * T + o_query, mask=m_query, other=0)
    b_upper = tl.load(upper + i_batch * T + o_query, mask=m_query, other=0)
    some_lower, some_upper, all_lower, all_upper = tile_extent(b_lower, b_upper, m_query)
    p_out = extents + i_batch * 4 * parts + i_part
    tl.store(p_out, some_lower)
    tl.store(p_out + parts, some_upper)
    tl.store(p_out + 2 * parts, all_lower)
    tl.store(p_out + 3 * parts, all_upper)


@triton.jit(do_not_specialize=["T", "S", "parts", "tiles"])
def _query_ranges_kernel(
    extents,
    ranges,
    tile_first,
    tile_stop,
    tile_sequence,
    cu_queries,
    T,
    S,
    parts,
    tiles,
    BLOCK_N: tl.constexpr,
    QUERIES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One program: one tile of key rows against all parts of the queries.

    The full queries are the first run of parts that see the whole tile, which is all of them where
    the queries stand in order.
    """
    i_batch = (tl.program_id(0) // tiles).to(tl.int64)
    i_tile = tl.program_id(0) % tiles
    first, last = tile_of(tile_first, tile_stop, i_tile, BLOCK_N, S)
    p_extents = extents + i_batch * 4 * parts
    start, stop, full_start = parts, 0, parts
    for i_part in range(0, parts, PARTS):
        o_part = i_part + tl.arange(0, PARTS)
        m_part = o_part < parts
        b_lower = tl.load(p_extents + o_part, mask=m_part, other=LARGEST)
        b_upper = tl.load(p_extents + parts + o_part, mask=m_part, other=0)
        m_some = (b_lower < last) & (b_upper > first) & (first < last)
        start = tl.minimum(start, tl.min(tl.where(m_some, o_part, parts), 0))
        stop = tl.maximum(stop, tl.max(tl.where(m_some, o_part + 1, 0), 0))
        m_full = m_some & _sees_all(p_extents, o_part, m_part, parts, first, last)
        full_start = tl.minimum(full_start, tl.min(tl.where(m_full, o_part, parts), 0))
    full_stop = stop
    for i_part in range(full_start // PARTS * PARTS, stop, PARTS):
        o_part = i_part + tl.arange(0, PARTS)
        m_full = _sees_all(p_extents, o_part, o_part < parts, parts, first, last)
        m_end = (o_part >= full_start) & (m_full == 0)
        full_stop = tl.minimum(full_stop, tl.min(tl.where(m_end, o_part, parts), 0))
    start, stop = start * QUERIES, tl.minimum(stop * QUERIES, T)
    full_start, full_stop = full_start * QUERIES, full_stop * QUERIES
    if cu_queries is not None:
        i_sequence = tl.load(tile_sequence + i_tile)
        start = tl.maximum(start, tl.load(cu_queries + i_sequence))
        stop = tl.minimum(stop, tl.load(cu_queries + i_sequence + 1))
    start = tl.maximum(start, 0)
    stop = tl.maximum(stop, start)
    full_start = tl.minimum(tl.maximum(full_start, start), stop)
    p_out = ranges + (i_batch * tiles + i_tile) * 4
    tl.store(p_out, start)
    tl.store(p_out + 1, full_start)
    tl.store(p_out + 2, tl.minimum(tl.maximum(full_stop, full_start), stop))
    tl.store(p_out + 3, stop)


@triton.jit
def _sees_all(p_extents, o_part, m_part, parts, first, last):
    """Whether all queries of each part see all key rows `first .. last - 1`."""
    b_lower = tl.load(p_extents + 2 * parts + o_part, mask=m_part, other=LARGEST)
    b_upper = tl.load(p_extents + 3 * parts + o_part, mask=m_part, other=0)
    return (b_lower <= first) & (b_upper >= last)


def key_ranges(bounds: QueryBounds, tiles: Tiles, block_m: int, block_n: int) -> Tensor:
    """For each tile of `block_m` queries, the key rows that it walks, see `key_spans`.

    int32 `[B or 1, tiles, 4]`: `start, full_start, full_stop, stop`.
    """
    batches, num_queries = bounds.lower.shape
    shape = (batches, tiles.count, 4)
    ranges = torch.empty(shape, dtype=torch.int32, device=bounds.lower.device)
    if tiles.count:
        _key_ranges_kernel[(batches * tiles.count,)](
            bounds.lower,
            bounds.upper,
            ranges,
            tiles.first,
            tiles.stop,
            num_queries,
            tiles.count,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=1,
        )
    return ranges


@triton.jit(do_not_specialize=["T", "tiles"])
def _key_ranges_kernel(
    lower,
    upper,
    ranges,
    tile_first,
    tile_stop,
    T,
    tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: one tile of queries."""
    i_batch = (tl.program_id(0) // tiles).to(tl.int64)
    i_tile = tl.program_id(0) % tiles
    first, last = tile_of(tile_first, tile_stop, i_tile, BLOCK_M, T)
    o_query = first + tl.arange(0, BLOCK_M)
    m_query = o_query < last
    b_lower = tl.load(lower + i_batch * T + o_query, mask=m_query, other=0)
    b_upper = tl.load(upper + i_batch * T + o_query, mask=m_query, other=0)
    start, full_start, full_stop, stop = key_spans(b_lower, b_upper, m_query, BLOCK_N)
    p_out = ranges + (i_batch * tiles + i_tile) * 4
    tl.store(p_out, start)
    tl.store(p_out + 1, full_start)
    tl.store(p_out + 2, full_stop)
    tl.store(p_out + 3, stop)
