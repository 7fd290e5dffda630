"""Which queries chose each block: a counting sort of the chosen blocks, stable and without sorting.

Attention over chosen blocks is fast where a block's keys are loaded once for all the queries that
chose it. The lists that this needs are built on the device, without asking it for a size: counts
per part of the queries, an exclusive sum over the parts, then each part fills its share of every
list in the order of its queries. The same input always gives the same lists.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_port.kernels.triton.bounds import QueryBounds
from nsa_port.kernels.triton.host import cdiv, next_power_of_2
from nsa_port.kernels.triton.tiles import named_before, split_row

_CHUNKS = 32
"""So many chunks of queries are listed with the same launches: there is more to do at once."""

_PARTS = 512
_MOST_PARTS = 2048
"""At most so many parts of one chunk, and of all that are listed together: with them the counts
take memory linear in the length."""

_PART_QUERIES = 16
"""A part is no smaller, so that short inputs are not all overhead."""

_ROWS = 16
_SCAN_PARTS = 64
_SCAN_BINS = 32
_SEGMENT_BINS = 512


def block_rows(indices: Tensor, bounds: QueryBounds, select_block_size: int) -> Tensor:
    """The first key row of each chosen block, -1 for what is nothing to attend to.

    int32 `[B, T, HK, n]`. A block that is named twice, starts after the query or lies outside the
    sequence becomes -1, so that whatever `indices` holds, a row is one that the query may read, and
    no row comes twice.
    """
    B, T, HK, n = indices.shape
    rows = torch.empty((B, T, HK, n), dtype=torch.int32, device=indices.device)
    if rows.numel():
        stride_b, stride_t, stride_h = indices.stride()[:-1]
        _block_rows_kernel[(cdiv(B * T * HK, _ROWS),)](
            indices,
            rows,
            bounds.lower,
            bounds.upper,
            B * T * HK,
            T,
            HK,
            n,
            bounds.stride,
            stride_b,
            stride_t,
            stride_h,
            select_block_size,
            SLOTS=next_power_of_2(n),
            ROWS=_ROWS,
            num_warps=4,
        )
    return rows


@triton.jit(do_not_specialize=["count", "T", "stride_bounds", "stride_b", "stride_t", "stride_h"])
def _block_rows_kernel(
    indices,
    rows,
    lower,
    upper,
    count,
    T,
    HK,
    n,
    stride_bounds,
    stride_b,
    stride_t,
    stride_h,
    select_block_size,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: the blocks of `ROWS` rows, each a query and KV head."""
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < count
    o_batch, o_query, o_kv = split_row(o_row, T, HK)
    o_slot = tl.arange(0, SLOTS)
    m_slot = m_row[:, None] & (o_slot < n)[None, :]
    p_index = indices + o_batch * stride_b + o_query * stride_t + o_kv * stride_h
    b_block = tl.load(p_index[:, None] + o_slot[None, :], mask=m_slot, other=-1)
    b_first = tl.load(lower + o_batch * stride_bounds + o_query, mask=m_row, other=0)
    b_stop = tl.load(upper + o_batch * stride_bounds + o_query, mask=m_row, other=0)
    # Not by comparing rows, which may overflow for an index that is far out of range.
    b_blocks = tl.cdiv(b_stop - b_first, select_block_size)
    m_block = (b_block >= 0) & (b_block < b_blocks[:, None])
    m_block &= named_before(b_block, o_slot) == 0
    b_row = tl.where(m_block, b_first[:, None] + b_block * select_block_size, -1)
    tl.store(rows + o_row.to(tl.int64)[:, None] * n + o_slot[None, :], b_row, mask=m_slot)


class BlockLists(NamedTuple):
    """Per block, KV head and batch (a bin), the queries `first_query ..` that chose it.

    A bin is `(batch * HK + kv_head) * blocks + block`, the block by its `block_number`. Long lists
    are cut into segments of `segment` entries, and one work item is one segment; `work` counts more
    of them than there are, the surplus having no bin.

    Args:
        entries: `query * n + slot`, queries counted from `first_query`; int32.
        starts, counts: each bin's part of `entries`; int32 `[bins]`.
        segment_ends: inclusive sum of each bin's segments; int32 `[bins]`.
        long_ends: the same of the bins with more than one segment alone; int32 `[bins]`.
        work_bins: the bin of each work item, `bins` or more for the surplus; int32 `[work]`.
    """

    entries: Tensor
    starts: Tensor
    counts: Tensor
    segment_ends: Tensor
    long_ends: Tensor
    work_bins: Tensor
    blocks: int
    segment: int

    @property
    def work(self) -> int:
        return self.work_bins.shape[0]

    @property
    def bins(self) -> int:
        return self.counts.shape[0]


def block_lists(
    rows: Tensor,
    bounds: QueryBounds,
    num_keys: int,
    num_sequences: int,
    select_block_size: int,
    chunk: int,
    segment: int,
) -> Iterator[tuple[int, int, BlockLists]]:
    """Of every `chunk` queries in turn the first, their number, and the lists of `block_rows`."""
    T = rows.shape[1]
    for start in range(0, T, chunk * _CHUNKS):
        stop = min(start + chunk * _CHUNKS, T)
        listed = _list_chunks(
            rows, bounds, num_keys, num_sequences, select_block_size, start, stop, chunk, segment
        )
        for first, lists in zip(range(start, stop, chunk), listed, strict=True):
            yield first, min(chunk, stop - first), lists


def _list_chunks(
    rows: Tensor,
    bounds: QueryBounds,
    num_keys: int,
    num_sequences: int,
    select_block_size: int,
    first_query: int,
    end_query: int,
    chunk: int,
    segment: int,
) -> list[BlockLists]:
    """The lists over every `chunk` of the queries `first_query .. end_query - 1`."""
    B, T, HK, n = rows.shape
    device = rows.device
    blocks = num_keys // select_block_size + num_sequences
    bins = B * HK * blocks
    num_queries = end_query - first_query
    chunks = cdiv(num_queries, chunk)
    part = max(_PART_QUERIES, cdiv(num_queries, min(_PARTS * chunks, _MOST_PARTS)))
    parts = cdiv(chunk, part)
    offsets = torch.zeros((chunks, parts, bins), dtype=torch.int32, device=device)
    # Each starts at a multiple of 16 bytes, which Triton compiles apart from any other.
    of_bins = torch.empty((chunks, 4, cdiv(bins, 4) * 4), dtype=torch.int32, device=device)
    counts, starts, segment_ends, long_ends = of_bins[:, :, :bins].unbind(1)
    listed = B * chunk * HK * n
    entries = torch.empty((chunks, cdiv(listed, 4) * 4), dtype=torch.int32, device=device)
    slots = next_power_of_2(n)
    common = (
        rows, bounds.sequence, offsets, first_query, chunk, end_query, T, HK, n, part, blocks,
        bins, bounds.stride, select_block_size,
    )  # fmt: skip
    grid = (parts * B * HK, chunks)
    _count_kernel[grid](*common, SLOTS=slots, QUERIES=max(1, 256 // slots), num_warps=4)
    work = bins + listed // segment
    work_bins = torch.empty((chunks, cdiv(work, 4) * 4), dtype=torch.int32, device=device)
    strides = (of_bins.stride(0), work_bins.stride(0))
    _scan_kernel[(cdiv(bins, _SCAN_BINS), chunks)](
        offsets, counts, work_bins, parts, bins, work, *strides,
        PARTS=_SCAN_PARTS, BINS=_SCAN_BINS, num_warps=4,
    )  # fmt: skip
    _segments_kernel[(cdiv(bins, _SEGMENT_BINS), chunks)](
        counts, starts, segment_ends, long_ends, work_bins, bins, *strides,
        SEGMENT=segment, BINS=_SEGMENT_BINS, num_warps=4,
    )  # fmt: skip
    _fill_kernel[grid](
        *common, starts, entries, strides[0], entries.shape[1], SLOTS=slots, num_warps=1
    )
    return [
        BlockLists(
            entries[i],
            starts[i],
            counts[i],
            segment_ends[i],
            long_ends[i],
            work_bins[i, :work],
            blocks,
            segment,
        )
        for i in range(chunks)
    ]


@triton.jit(do_not_specialize=["bins", "stride_bins", "stride_work"])
def _segments_kernel(
    counts, starts, segment_ends, long_ends, work_bins, bins, stride_bins, stride_work,
    SEGMENT: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """One program: where the lists of `BINS` bins start, and which work items are their segments.

    Each adds up all of a chunk's bins before its own: that is little, and all programs run at once.
    """
    i_chunk = tl.program_id(1).to(tl.int64)
    counts += i_chunk * stride_bins
    starts += i_chunk * stride_bins
    segment_ends += i_chunk * stride_bins
    long_ends += i_chunk * stride_bins
    work_bins += i_chunk * stride_work
    o_bin = tl.arange(0, BINS)
    b_entries = tl.zeros([BINS], tl.int32)
    b_segments = tl.zeros([BINS], tl.int32)
    b_long = tl.zeros([BINS], tl.int32)
    for i_bin in range(0, tl.program_id(0) * BINS, BINS):
        b_count = tl.load(counts + i_bin + o_bin)
        b_number, b_of_long = _segments_of(b_count, SEGMENT)
        b_entries += b_count
        b_segments += b_number
        b_long += b_of_long
    o_bin += tl.program_id(0) * BINS
    m_bin = o_bin < bins
    b_count = tl.load(counts + o_bin, mask=m_bin, other=0)
    b_number, b_of_long = _segments_of(b_count, SEGMENT)
    b_start = tl.sum(b_entries, 0) + tl.cumsum(b_count, 0) - b_count
    tl.store(starts + o_bin, b_start, mask=m_bin)
    b_end = tl.sum(b_segments, 0) + tl.cumsum(b_number, 0)
    tl.store(segment_ends + o_bin, b_end, mask=m_bin)
    tl.store(long_ends + o_bin, tl.sum(b_long, 0) + tl.cumsum(b_of_long, 0), mask=m_bin)
    for i_segment in range(tl.max(b_number, 0)):
        p_work = work_bins + b_end - b_number + i_segment
        tl.store(p_work, o_bin, mask=i_segment < b_number)


@triton.jit
def _segments_of(b_count, SEGMENT: tl.constexpr):
    """How many segments lists of such lengths have; and the same, but 0 where it is just one."""
    b_number = (b_count + SEGMENT - 1) // SEGMENT
    return b_number, tl.where(b_number > 1, b_number, 0)


_NOT_SPECIALIZED = [
    "first_query", "chunk", "end_query", "T", "part", "blocks", "bins", "stride_bounds",
]  # fmt: skip


@triton.jit
def block_number(b_row, b_sequence, blocks, select_block_size):
    """A number below `blocks` for the block that starts at a key row, of its own.

    Within a sequence `row // m` grows by one from block to block; the sequence's number keeps its
    first block apart from the last, perhaps partial, block of the sequence before. The first block
    of all, which most queries choose, stays the first; after it come those of the latest queries,
    whose neighbours all choose them: work that is long begins early.
    """
    number = b_row // select_block_size + b_sequence
    return tl.where(number == 0, 0, blocks - number)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _count_kernel(
    rows,
    sequence,
    offsets,
    first_query,
    chunk,
    end_query,
    T,
    HK,
    n,
    part,
    blocks,
    bins,
    stride_bounds,
    select_block_size,
    SLOTS: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """One program: how often one part's queries chose each block of one batch and KV head.

    The counts are integers, so that the order in which they are raised does not matter.
    """
    parts = tl.cdiv(chunk, part)
    i_chunk = tl.program_id(1).to(tl.int64)
    first_query += tl.program_id(1) * chunk
    i_part = tl.program_id(0) % parts
    i_bin = tl.program_id(0) // parts
    i_kv = i_bin % HK
    i_batch = (i_bin // HK).to(tl.int64)
    o_slot = tl.arange(0, SLOTS)
    p_offsets = offsets + (i_chunk * parts + i_part) * bins + i_bin * blocks
    stop = tl.minimum(tl.minimum((i_part + 1) * part, chunk), end_query - first_query)
    for i_query in range(i_part * part, stop, QUERIES):
        o_query = i_query + tl.arange(0, QUERIES)
        m_query = o_query < stop
        o_query += first_query
        b_sequence = tl.load(sequence + i_batch * stride_bounds + o_query, mask=m_query, other=0)
        o_row = ((i_batch * T + o_query) * HK + i_kv) * n
        m_slot = m_query[:, None] & (o_slot < n)[None, :]
        b_row = tl.load(rows + o_row[:, None] + o_slot[None, :], mask=m_slot, other=-1)
        b_block = block_number(b_row, b_sequence[:, None], blocks, select_block_size)
        tl.atomic_add(p_offsets + b_block, 1, mask=b_row >= 0, sem="relaxed")


@triton.jit(do_not_specialize=["parts", "bins", "work", "stride_bins", "stride_work"])
def _scan_kernel(
    offsets, counts, work_bins, parts, bins, work, stride_bins, stride_work, PARTS: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    """One program: exclusive sums over a chunk's parts, in place, and the totals, of `BINS` bins.

    All programs together say of every work item that it has no bin.
    """
    i_chunk = tl.program_id(1).to(tl.int64)
    offsets += i_chunk * parts * bins
    counts += i_chunk * stride_bins
    work_bins += i_chunk * stride_work
    for i_work in range(tl.program_id(0) * BINS, work, tl.num_programs(0) * BINS):
        o_work = i_work + tl.arange(0, BINS)
        tl.store(work_bins + o_work, tl.zeros([BINS], tl.int32) + bins, mask=o_work < work)
    o_bin = tl.program_id(0) * BINS + tl.arange(0, BINS)
    m_bin = o_bin < bins
    total = tl.zeros([BINS], tl.int32)
    for i_part in range(0, parts, PARTS):
        o_part = i_part + tl.arange(0, PARTS)
        m_tile = (o_part < parts)[:, None] & m_bin[None, :]
        p_tile = offsets + o_part.to(tl.int64)[:, None] * bins + o_bin[None, :]
        b_count = tl.load(p_tile, mask=m_tile, other=0)
        tl.store(p_tile, tl.cumsum(b_count, 0) - b_count + total[None, :], mask=m_tile)
        total += tl.sum(b_count, 0)
    tl.store(counts + o_bin, total, mask=m_bin)


@triton.jit(do_not_specialize=[*_NOT_SPECIALIZED, "stride_bins", "stride_entries"])
def _fill_kernel(
    rows,
    sequence,
    offsets,
    first_query,
    chunk,
    end_query,
    T,
    HK,
    n,
    part,
    blocks,
    bins,
    stride_bounds,
    select_block_size,
    starts,
    entries,
    stride_bins,
    stride_entries,
    SLOTS: tl.constexpr,
):
    """One program: one part's entries in the lists of one batch and KV head.

    `offsets` serves as the program's own cursors. A query names no block twice, so its slots do not
    meet; the barrier lets the next query see how far they moved.
    """
    parts = tl.cdiv(chunk, part)
    i_chunk = tl.program_id(1).to(tl.int64)
    first_query += tl.program_id(1) * chunk
    i_part = tl.program_id(0) % parts
    i_bin = tl.program_id(0) // parts
    i_kv = i_bin % HK
    i_batch = (i_bin // HK).to(tl.int64)
    o_slot = tl.arange(0, SLOTS)
    p_offsets = offsets + (i_chunk * parts + i_part) * bins + i_bin * blocks
    p_starts = starts + i_chunk * stride_bins + i_bin * blocks
    entries += i_chunk * stride_entries
    stop = tl.minimum(tl.minimum((i_part + 1) * part, chunk), end_query - first_query)
    for i_query in range(i_part * part, stop):
        b_sequence = tl.load(sequence + i_batch * stride_bounds + first_query + i_query)
        o_row = ((i_batch * T + first_query + i_query) * HK + i_kv) * n + o_slot
        b_row = tl.load(rows + o_row, mask=o_slot < n, other=-1)
        m_row = b_row >= 0
        b_block = block_number(b_row, b_sequence, blocks, select_block_size)
        b_offset = tl.load(p_offsets + b_block, mask=m_row, other=0)
        o_entry = tl.load(p_starts + b_block, mask=m_row, other=0) + b_offset
        tl.store(entries + o_entry, i_query * n + o_slot, mask=m_row)
        tl.store(p_offsets + b_block, b_offset + 1, mask=m_row)
        tl.debug_barrier()


@triton.jit
def load_work(i_work, starts, counts, segment_ends, work_bins, bins, SEGMENT: tl.constexpr):
    """A work item's bin and its part of `entries`: `(bin, start, count)`; count 0 for surplus."""
    i_bin = tl.load(work_bins + i_work)
    m_bin = i_bin < bins
    total = tl.load(counts + i_bin, mask=m_bin, other=0)
    segments = (total + SEGMENT - 1) // SEGMENT
    i_segment = i_work - (tl.load(segment_ends + i_bin, mask=m_bin, other=0) - segments)
    start = tl.load(starts + i_bin, mask=m_bin, other=0) + i_segment * SEGMENT
    count = tl.minimum(total - i_segment * SEGMENT, SEGMENT)
    return i_bin, start, tl.where(m_bin, count, 0)


@triton.jit
def block_keys(
    entry, i_batch, i_kv, i_part, rows, sequence, cu_keys, first_query, T, S, HK, stride_bounds,
    SLOTS: tl.constexpr, SELECT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The key rows of one part of a block, found through any entry of its list, and which exist."""
    i_query = first_query + entry // SLOTS
    i_row = tl.load(rows + ((i_batch * T + i_query) * HK + i_kv) * SLOTS + entry % SLOTS)
    if cu_keys is None:
        stop = S
    else:
        i_sequence = tl.load(sequence + i_batch * stride_bounds + i_query)
        stop = tl.minimum(tl.load(cu_keys + i_sequence + 1), S)
    o_inside = i_part * BLOCK_N + tl.arange(0, BLOCK_N)
    o_key = i_row + o_inside
    return o_key, (o_inside < SELECT) & (o_key < stop)
