"""What completes attention by block on Hopper: blocks that a tile shares, and partial results.

A tile of neighbouring queries, with the heads of a group as rows, walks the blocks that its queries
share as `selected_hopper` does. Then come, through the same buffers, the partial results that
`selected_by_block_hopper` left for its queries, slot by slot.
"""

from __future__ import annotations

import triton.experimental.gluon as gluon
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton import constexpr_function
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa_port.kernels.tables import Values
from nsa_port.kernels.triton.bounds import QueryBounds, Tiles
from nsa_port.kernels.triton.hopper import copy_tile, describe, next_stage
from nsa_port.kernels.triton.host import LOG2_E, multiprocessors, next_power_of_2, split_head
from nsa_port.kernels.triton.partials_hopper import from_partials, layout_of_partials
from nsa_port.kernels.triton.selected_hopper import (
    SELECT,
    attend_block,
    fetch_block,
    load_block,
    tile_at,
)
from nsa_port.kernels.triton.sharing import SharedBlocks, fields_of


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shares: SharedBlocks,
    tiles: Tiles,
    sequences: int,
    bounds: QueryBounds,
    first_query: int,
    last_query: int,
    partial_out: Tensor,
    partial_lse: Tensor,
    scale: float,
    heads: int,
    out: Tensor,
    lse: Tensor,
    values: Values,
) -> None:
    """Fill `out` and `lse` of the queries `first_query .. last_query`.

    `tiles` are of `64 // heads` queries of `sequences` packed sequences; `partial_out` and
    `partial_lse` are as `selected_by_block_hopper.attend` leaves them. `scale` is positive.
    """
    B, T, H, Dk = q.shape
    HK, Dv = v.shape[2:]
    n = shares.own.shape[3]
    key, value = split_head(Dk), split_head(Dv)
    size = 64 // heads
    # Each packed sequence but the last may end in a tile that is not full.
    first_tile = first_query // size
    some_tiles = min(tiles.count, last_query // size + sequences) - first_tile
    total = some_tiles * B * HK
    chunk = partial_out.shape[2]
    rows, columns = partial_shape(heads, Dv)
    shape, box = [B * HK * chunk, n, rows, columns], [size, 1, rows, columns]
    layout = gl.NVMMASharedLayout(0, 16, rank=4)
    partials = TensorDescriptor(
        partial_out, shape, [n * heads * Dv, heads * Dv, columns, 1], box, layout
    )
    programs = multiprocessors(q.device) * values["programs"]
    _hopper_merge_kernel[(min(total, programs),)](
        describe(q, size, min(64, key.main), heads),
        describe(q, size, min(64, key.rest), heads),
        describe(k, SELECT, min(64, key.main), 1),
        describe(k, SELECT, min(64, key.rest), 1),
        describe(v, SELECT, min(64, value.main), 1),
        partials,
        partial_lse,
        tiles.first,
        tiles.stop,
        shares.shared,
        shares.counts,
        bounds.lower,
        bounds.upper,
        out,
        lse,
        max(scale * LOG2_E, 1e-30),
        T,
        HK,
        H // HK,
        shares.shared.shape[3],
        tiles.count,
        first_tile,
        some_tiles,
        total,
        first_query,
        last_query + 1,
        chunk,
        bounds.stride,
        SLOTS=n,
        WIDTH_SLOTS=max(8, next_power_of_2(n)),
        HEADS=heads,
        K_MAIN=key.main,
        K_REST=key.rest,
        V_MAIN=value.main,
        STAGES=values["num_stages"],
        num_warps=values["num_warps"],
        maxnreg=65536 // (256 * values["programs"]),
    )


@constexpr_function
def partial_shape(heads, width):
    """A query's partial results of one slot, cut as the copy engine takes them."""
    columns = min(heads * width, 256)
    return heads * width // columns, columns


@gluon.jit(
    do_not_specialize=[
        "T", "tiles", "first_tile", "some_tiles", "total", "first_query", "end_query", "chunk",
        "stride_bounds",
    ],
    do_not_specialize_on_alignment=["lse"],
)  # fmt: skip
def _hopper_merge_kernel(
    q_main, q_rest, k_main, k_rest, v_main, partials, partial_lse, tile_first, tile_stop, shared,
    counts, lower, upper, out, lse, scale_log2, T, HK, G, kept, tiles, first_tile, some_tiles,
    total, first_query, end_query, chunk, stride_bounds,
    SLOTS: gl.constexpr, WIDTH_SLOTS: gl.constexpr, HEADS: gl.constexpr, K_MAIN: gl.constexpr,
    K_REST: gl.constexpr, V_MAIN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One program of a few per multiprocessor: every so manieth tile."""
    dtype: gl.constexpr = out.dtype.element_ty
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    rest: gl.constexpr = K_REST if K_REST else K_MAIN
    q_buffer = gl.allocate_shared_memory(dtype, [1, 64, K_MAIN], tile)
    k_buffer = gl.allocate_shared_memory(dtype, [STAGES, 64, K_MAIN], tile)
    v_buffer = gl.allocate_shared_memory(dtype, [STAGES, 64, V_MAIN], tile)
    q_rest_buffer, k_rest_buffer = q_buffer, k_buffer
    if K_REST:
        q_rest_buffer = gl.allocate_shared_memory(dtype, [1, 64, rest], tile)
        k_rest_buffer = gl.allocate_shared_memory(dtype, [STAGES, 64, rest], tile)
    counter: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], counter)
    k_ready = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], counter)
    v_ready = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], counter)
    # The first barriers say that buffers are filled, those behind that they are free.
    for i_barrier in gl.static_range(2):
        mbarrier.init(q_ready.index(i_barrier), count=1)
    for i_barrier in gl.static_range(2 * STAGES):
        mbarrier.init(k_ready.index(i_barrier), count=1)
        mbarrier.init(v_ready.index(i_barrier), count=1)
    fence_async_shared()

    buffers = (q_buffer, q_rest_buffer, k_buffer, k_rest_buffer, v_buffer)
    ready = (q_ready, k_ready, v_ready)
    where = (tile_first, tile_stop, T, HK, tiles, first_tile, some_tiles, first_query, end_query)
    lists = (shared, counts, kept)
    results = (out, lse, lower, upper, stride_bounds)
    gl.warp_specialize(
        [
            (
                _consume,
                (buffers, ready, where, lists, results, partial_lse, scale_log2, G, total, chunk,
                 SLOTS, WIDTH_SLOTS, HEADS, K_MAIN, K_REST, V_MAIN, STAGES),
            ),
            (
                _fetch,
                (q_main, q_rest, k_main, k_rest, v_main, partials, buffers, ready, where, lists,
                 G, total, chunk, HEADS, K_MAIN, K_REST, V_MAIN, STAGES),
            ),
        ],
        [1],
        [32],
    )  # fmt: skip


@gluon.jit
def _locate(i_work, where, SIZE: gl.constexpr):
    """A tile's number, batch, key head, and queries `first .. stop - 1`; none if outside."""
    tile_first, tile_stop, T, HK, tiles, first_tile, some_tiles, first_query, end_query = where
    i_tile = first_tile + i_work % some_tiles
    i_group = i_work // some_tiles
    first, stop = tile_at(tile_first, tile_stop, i_tile, SIZE, T)
    stop = gl.where((stop <= first_query) | (first >= end_query), first, stop)
    return i_group.to(gl.int64) * tiles + i_tile, i_group // HK, i_group % HK, first, stop


@gluon.jit
def _load_counts(counts, i_shares):
    """A tile's shared blocks that all who chose them see to the end, all shared ones, own ones."""
    p_counts = counts + i_shares * 3
    return gl.load(p_counts), gl.load(p_counts + 1), gl.load(p_counts + 2)


@gluon.jit
def _share_out(shared_count, own_count):
    """How many pairs of slots there are, and how many follow each of a tile's shared blocks.

    Products and what comes from memory then keep each other company.
    """
    pairs = (own_count + 1) // 2
    shared_count = gl.maximum(shared_count, 1)
    return pairs, (pairs + shared_count - 1) // shared_count


@gluon.jit
def _fetch_partials(
    partials, buffers, ready, i_partial, start, stop, own_count, i_stage, parity,
    HEADS: gl.constexpr, V_MAIN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fetch the partial results of pairs of slots; returns the stage after them."""
    _, _, k_buffer, _, v_buffer = buffers
    _, k_ready, v_ready = ready
    QUERIES: gl.constexpr = 64 // HEADS
    SHAPE: gl.constexpr = partial_shape(HEADS, V_MAIN)
    flat: gl.constexpr = gl.NVMMASharedLayout(0, 16, rank=4)
    dtype: gl.constexpr = k_buffer.dtype
    for i_pair in range(start, stop):
        i_slot = 2 * i_pair
        filled = k_ready.index(i_stage)
        mbarrier.wait(k_ready.index(STAGES + i_stage), parity)
        mbarrier.expect(filled, 2 * 64 * V_MAIN)
        rows = k_buffer.index(i_stage)._reinterpret(dtype, [QUERIES, 1, SHAPE[0], SHAPE[1]], flat)
        tma.async_copy_global_to_shared(partials, [i_partial, i_slot, 0, 0], filled, rows)
        filled = v_ready.index(i_stage)
        mbarrier.wait(v_ready.index(STAGES + i_stage), parity)
        m_more = i_slot + 1 < own_count
        mbarrier.expect(filled, 2 * 64 * V_MAIN, pred=m_more)
        rows = v_buffer.index(i_stage)._reinterpret(dtype, [QUERIES, 1, SHAPE[0], SHAPE[1]], flat)
        tma.async_copy_global_to_shared(
            partials, [i_partial, i_slot + 1, 0, 0], filled, rows, pred=m_more
        )
        mbarrier.arrive(filled, count=1, pred=i_slot + 1 >= own_count)
        i_stage, parity = next_stage(i_stage, parity, STAGES)
    return i_stage, parity


@gluon.jit
def _fetch(
    q_main, q_rest, k_main, k_rest, v_main, partials, buffers, ready, where, lists, G, total, chunk,
    HEADS: gl.constexpr, K_MAIN: gl.constexpr, K_REST: gl.constexpr, V_MAIN: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The fetching warp: fill every buffer as soon as it is free."""
    q_buffer, q_rest_buffer = buffers[0], buffers[1]
    q_ready = ready[0]
    shared, counts, kept = lists
    HK, first_query = where[3], where[7]
    QUERIES: gl.constexpr = 64 // HEADS
    NUMBERS: gl.constexpr = fields_of(QUERIES)
    i_stage, parity, q_parity = 0, 1, 1
    i_shares, i_batch, i_kv, first, stop = _locate(gl.program_id(0), where, QUERIES)
    _, shared_count, own_count = _load_counts(counts, i_shares)
    i_row = gl.load(shared + i_shares * kept * NUMBERS)
    for i_work in range(gl.program_id(0), total, gl.num_programs(0)):
        # The next tile's, so that nobody waits for them.
        i_next = gl.minimum(i_work + gl.num_programs(0), total - 1)
        next_shares, next_batch, next_kv, next_first, next_stop = _locate(i_next, where, QUERIES)
        _, next_shared, next_own = _load_counts(counts, next_shares)
        next_row = gl.load(shared + next_shares * kept * NUMBERS)
        if first < stop:
            p_shared = shared + i_shares * kept * NUMBERS
            mbarrier.wait(q_ready.index(1), q_parity)
            q_parity ^= 1
            filled = q_ready.index(0)
            mbarrier.expect(filled, 2 * 64 * (K_MAIN + K_REST))
            copy_tile(q_main, i_batch, first, i_kv * G, 0, filled, q_buffer.index(0), K_MAIN,
                      QUERIES, HEADS, 0)  # fmt: skip
            if K_REST:
                copy_tile(q_rest, i_batch, first, i_kv * G, K_MAIN, filled, q_rest_buffer.index(0),
                          K_REST, QUERIES, HEADS, 0)  # fmt: skip
            i_partial = (i_batch * HK + i_kv) * chunk + first - first_query
            pairs, each = _share_out(shared_count, own_count)
            for i_block in range(shared_count):
                following_row = gl.load(
                    p_shared + NUMBERS * gl.minimum(i_block + 1, shared_count - 1)
                )
                i_stage, parity = fetch_block(
                    k_main, k_rest, v_main, buffers, ready, i_row, i_batch, i_kv, i_stage, parity,
                    K_MAIN, K_REST, V_MAIN, STAGES,
                )  # fmt: skip
                i_row = following_row
                i_pair = gl.minimum(i_block * each, pairs)
                i_stage, parity = _fetch_partials(
                    partials, buffers, ready, i_partial, i_pair, gl.minimum(i_pair + each, pairs),
                    own_count, i_stage, parity, HEADS, V_MAIN, STAGES,
                )  # fmt: skip
            i_stage, parity = _fetch_partials(
                partials, buffers, ready, i_partial, gl.minimum(shared_count * each, pairs), pairs,
                own_count, i_stage, parity, HEADS, V_MAIN, STAGES,
            )  # fmt: skip
        i_shares, i_batch, i_kv, first, stop = (
            next_shares, next_batch, next_kv, next_first, next_stop
        )  # fmt: skip
        shared_count, own_count, i_row = next_shared, next_own, next_row


@gluon.jit
def _widen_some(b_tile, m_row):
    """A tile as float32, zeros in rows where `m_row [64, 1]` is false, whatever the tile has."""
    if b_tile.dtype == gl.bfloat16:
        # Two neighbours with two instructions: the upper half, and the lower one moved up.
        b_factor, b_mask = gl.where(m_row, 0x10000, 0), gl.where(m_row, -0x10000, 0)
        return gl.inline_asm_elementwise(
            "mul.lo.u32 $0, $2, $3; and.b32 $1, $2, $6;", "=r,=r,r,r,r,r,r",
            [b_tile, b_factor, b_mask], gl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return gl.where(m_row, b_tile.to(gl.float32), 0.0)


@constexpr_function
def _layout_of_rows(WIDTH):
    """`[64, WIDTH]` with 8 neighbours a thread, in warps that have the rows of a product's."""
    WIDTH = getattr(WIDTH, "value", WIDTH)
    panels = [[0, column] for column in (32, 64, 128) if column < WIDTH]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0], [0, 16], *panels],
        lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, WIDTH],
    )


@gluon.jit
def _load_tile(
    partial_lse, lists, bounds, where, tile, chunk,
    SLOTS: gl.constexpr, WIDTH_SLOTS: gl.constexpr, HEADS: gl.constexpr,
):  # fmt: skip
    """What a tile starts from: its slots' lse, its rows' bounds, and its first shared block."""
    shared, _, kept = lists
    lower, upper, stride_bounds = bounds
    HK, first_query, end_query = where[3], where[7], where[8]
    i_shares, i_batch, i_kv, first, stop = tile
    by_slot: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH_SLOTS, 16])
    score_row: gl.constexpr = gl.SliceLayout(
        1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    )
    o_slot = gl.arange(0, WIDTH_SLOTS, gl.SliceLayout(0, by_slot))
    o_row = gl.arange(0, 64, gl.SliceLayout(1, by_slot))
    o_query = first + o_row // HEADS
    m_query = (o_query < stop) & (o_query >= first_query) & (o_query < end_query)
    o_lse = (i_batch * HK + i_kv).to(gl.int64) * chunk + o_query - first_query
    o_lse = o_lse * (SLOTS * HEADS) + o_row % HEADS
    p_lse = partial_lse + o_lse[:, None] + (o_slot * HEADS)[None, :]
    b_lse = gl.load(p_lse, mask=m_query[:, None] & (o_slot < SLOTS)[None, :], other=0.0)
    o_query = first + gl.arange(0, 64, score_row) // HEADS
    o_bounds = i_batch.to(gl.int64) * stride_bounds + o_query
    b_lower = gl.load(lower + o_bounds, mask=o_query < stop, other=0)
    b_upper = gl.load(upper + o_bounds, mask=o_query < stop, other=0)
    NUMBERS: gl.constexpr = fields_of(64 // HEADS)
    block = load_block(shared + i_shares * kept * NUMBERS, 0, 0, NUMBERS)
    return b_lse, b_lower, b_upper, block


@gluon.jit
def _add_partials(
    buffers, ready, state, b_lse, start, stop, scale_log2, i_stage, parity, HEADS: gl.constexpr,
    WIDTH_SLOTS: gl.constexpr, V_MAIN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Add the partial results of pairs of slots to the state that `attend_block` has.

    `b_lse` holds all slots' of the tile, to base 2, -inf for none.
    """
    _, _, k_buffer, _, v_buffer = buffers
    _, k_ready, v_ready = ready
    largest, total_sum, accumulator = state
    by_slot: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH_SLOTS, 16])
    by_value: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V_MAIN, 16])
    score_row: gl.constexpr = largest.type.layout
    LAYOUT: gl.constexpr = layout_of_partials(HEADS, V_MAIN)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    o_slot = gl.arange(0, WIDTH_SLOTS, gl.SliceLayout(0, by_slot))
    shift = gl.where(largest == float("-inf"), 0.0, largest * scale_log2)
    b_weights = gl.exp2(b_lse - gl.convert_layout(shift, gl.SliceLayout(1, by_slot))[:, None])
    for i_pair in range(start, stop):
        for half in gl.static_range(2):
            m_slot = (o_slot == 2 * i_pair + half)[None, :]
            weight = gl.sum(gl.where(m_slot, b_weights, 0.0), 1)
            total_sum += gl.convert_layout(weight, score_row)
            weight = gl.convert_layout(weight, gl.SliceLayout(1, by_value))[:, None]
            buffer = k_buffer if half == 0 else v_buffer
            barriers = k_ready if half == 0 else v_ready
            mbarrier.wait(barriers.index(i_stage), parity)
            rows = buffer.index(i_stage)._reinterpret(
                buffer.dtype, [64 // HEADS, HEADS * V_MAIN], plain
            )
            b_out = from_partials(rows.load(LAYOUT), HEADS, V_MAIN, by_value)
            # What no one left there may be anything.
            accumulator += _widen_some(b_out, weight > 0.0) * weight
        # What was read must have arrived before the copy engine may write there.
        fence_async_shared()
        mbarrier.arrive(k_ready.index(STAGES + i_stage), count=1)
        mbarrier.arrive(v_ready.index(STAGES + i_stage), count=1)
        i_stage, parity = next_stage(i_stage, parity, STAGES)
    return (largest, total_sum, accumulator), i_stage, parity


@gluon.jit
def _consume(
    buffers, ready, where, lists, results, partial_lse, scale_log2, G, total, chunk,
    SLOTS: gl.constexpr, WIDTH_SLOTS: gl.constexpr, HEADS: gl.constexpr, K_MAIN: gl.constexpr,
    K_REST: gl.constexpr, V_MAIN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The multiplying warpgroup."""
    q_ready = ready[0]
    out, lse, lower, upper, stride_bounds = results
    shared, counts, kept = lists
    dtype: gl.constexpr = out.dtype.element_ty
    QUERIES: gl.constexpr = 64 // HEADS
    NUMBERS: gl.constexpr = fields_of(QUERIES)
    by_value: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V_MAIN, 16])
    row: gl.constexpr = gl.SliceLayout(1, by_value)
    score_row: gl.constexpr = gl.SliceLayout(
        1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    )
    ROWS: gl.constexpr = _layout_of_rows(V_MAIN)
    bounds = (lower, upper, stride_bounds)
    i_stage, parity, q_parity = 0, 0, 0
    tile = _locate(gl.program_id(0), where, QUERIES)
    whole_count, shared_count, own_count = _load_counts(counts, tile[0])
    b_lse, b_lower, b_upper, block = _load_tile(
        partial_lse, lists, bounds, where, tile, chunk, SLOTS, WIDTH_SLOTS, HEADS
    )
    for i_work in range(gl.program_id(0), total, gl.num_programs(0)):
        # The next tile's, so that nobody waits for them.
        i_next = gl.minimum(i_work + gl.num_programs(0), total - 1)
        next_tile = _locate(i_next, where, QUERIES)
        next_whole, next_shared, next_own = _load_counts(counts, next_tile[0])
        next_lse, next_lower, next_upper, next_block = _load_tile(
            partial_lse, lists, bounds, where, next_tile, chunk, SLOTS, WIDTH_SLOTS, HEADS
        )
        i_shares, _, _, first, stop = tile
        if first < stop:
            p_shared = shared + i_shares * kept * NUMBERS
            b_lse = gl.where(b_lse == 0.0, float("-inf"), b_lse)
            b_upper = gl.where(b_upper > b_lower, b_upper, 0)
            # This always holds. It is there because the compiler takes for constant what a loop
            # carries and uses for nothing but the bounds of loops in it.
            m_any = (whole_count | shared_count | own_count) >= 0
            mbarrier.wait(q_ready.index(0), q_parity, pred=m_any)
            q_parity ^= 1
            # The largest of the slots' is where sums start from, so that they do not grow by it.
            largest = gl.convert_layout(gl.max(b_lse, 1) * (1.0 / scale_log2), score_row)
            accumulator = gl.zeros([64, V_MAIN], gl.float32, by_value)
            state = (largest, gl.zeros([64], gl.float32, score_row), accumulator)
            pairs, each = _share_out(shared_count, own_count)
            for MASKED in gl.static_range(2):
                start = 0 if MASKED == 0 else whole_count
                for i_block in range(start, whole_count if MASKED == 0 else shared_count):
                    following = load_block(p_shared, i_block + 1, shared_count, NUMBERS)
                    state, i_stage, parity = attend_block(
                        buffers, ready, block, state, b_upper, scale_log2, i_stage, parity,
                        MASKED, HEADS, K_REST, V_MAIN, STAGES,
                    )  # fmt: skip
                    block = following
                    i_pair = gl.minimum(i_block * each, pairs)
                    state, i_stage, parity = _add_partials(
                        buffers, ready, state, b_lse, i_pair, gl.minimum(i_pair + each, pairs),
                        scale_log2, i_stage, parity, HEADS, WIDTH_SLOTS, V_MAIN, STAGES,
                    )  # fmt: skip
            mbarrier.arrive(q_ready.index(1), count=1)
            state, i_stage, parity = _add_partials(
                buffers, ready, state, b_lse, gl.minimum(shared_count * each, pairs), pairs,
                scale_log2, i_stage, parity, HEADS, WIDTH_SLOTS, V_MAIN, STAGES,
            )  # fmt: skip
            largest, total_sum, accumulator = state
            running_max = largest * scale_log2
            # Queries that see nothing may hold anything, NaN too.
            m_some = (total_sum > 0.0) & (b_upper > 0)
            total_sum = gl.where(m_some, total_sum, 1.0)
            b_final = (running_max + gl.log2(total_sum)) * 0.6931471805599453
            b_final = gl.where(m_some, b_final, float("-inf"))
            _store_lse(lse, b_final, where, tile, G, HEADS)
            b_factor = gl.where(m_some, 1.0 / total_sum, 0.0)
            b_factor = gl.convert_layout(b_factor, row)[:, None]
            b_out = gl.where(b_factor > 0.0, accumulator * b_factor, 0.0).to(dtype)
            _store_out(out, gl.convert_layout(b_out, ROWS), where, tile, G, HEADS)
        tile, whole_count, shared_count, own_count = next_tile, next_whole, next_shared, next_own
        b_lse, b_lower, b_upper, block = next_lse, next_lower, next_upper, next_block


@gluon.jit
def _results_of(o_row, where, tile, G, HEADS: gl.constexpr):
    """Where a tile's rows have their results, counted in heads, and whether they are to be stored.

    Rows of other tiles' queries are stored by others.
    """
    T, HK, first_query, end_query = where[2], where[3], where[7], where[8]
    _, i_batch, i_kv, first, stop = tile
    o_query, o_head = first + o_row // HEADS, o_row % HEADS
    m_row = (o_query < stop) & (o_query >= first_query) & (o_query < end_query) & (o_head < G)
    return ((i_batch.to(gl.int64) * T + o_query) * HK + i_kv) * G + o_head, m_row


@gluon.jit
def _store_lse(lse, b_lse, where, tile, G, HEADS: gl.constexpr):
    o_out, m_row = _results_of(gl.arange(0, 64, b_lse.type.layout), where, tile, G, HEADS)
    gl.store(lse + o_out, b_lse, mask=m_row)


@gluon.jit
def _store_out(out, b_out, where, tile, G, HEADS: gl.constexpr):
    WIDTH: gl.constexpr = b_out.shape[1]
    o_row = gl.arange(0, 64, gl.SliceLayout(1, b_out.type.layout))
    o_column = gl.arange(0, WIDTH, gl.SliceLayout(0, b_out.type.layout))
    o_out, m_row = _results_of(o_row, where, tile, G, HEADS)
    gl.store(out + o_out[:, None] * WIDTH + o_column[None, :], b_out, mask=m_row[:, None])
