"""Attention over chosen blocks, written for Hopper's own instructions: groups of 9 to 16 heads.

The same computation as `_by_query_kernel`: four neighbouring queries, with the heads of a group as
rows, first walk the blocks that they share and then each the blocks of its own. What limits it is
how fast keys and values come from the L2 cache, so a warp does nothing but fetch them ahead of
time. A stage holds one shared block, or a quarter of each query's own block.
"""

from __future__ import annotations

import triton.experimental.gluon as gluon
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsa_port.kernels.tables import Values
from nsa_port.kernels.triton.bounds import QueryBounds, Tiles
from nsa_port.kernels.triton.hopper import copy_tile, describe, next_stage
from nsa_port.kernels.triton.host import LOG2_E, multiprocessors, split_head
from nsa_port.kernels.triton.sharing import WIDE_FIELDS, SharedBlocks

QUERIES = 4
SELECT = 64
"""Tokens of a block that the kernel is written for."""
HEADS = 16


def takes(group: int, select_block_size: int) -> bool:
    """Whether the kernel is written for these."""
    return HEADS // 2 < group <= HEADS and select_block_size == SELECT


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shares: SharedBlocks,
    tiles: Tiles,
    bounds: QueryBounds,
    scale: float,
    out: Tensor,
    lse: Tensor,
    values: Values,
) -> None:
    """Fill `out` and `lse` with the softmax over the chosen blocks; `scale` is positive."""
    B, T, H, Dk = q.shape
    S, HK, Dv = v.shape[1:]
    key, value = split_head(Dk), split_head(Dv)
    total = tiles.count * B * HK
    programs = multiprocessors(q.device) * values["programs"]
    part = SELECT // QUERIES
    _hopper_selected_kernel[(min(total, programs),)](
        describe(q, QUERIES, min(64, key.main), HEADS),
        describe(q, QUERIES, min(64, key.rest), HEADS),
        *(
            describe(k, rows, min(64, width), 1)
            for width in (key.main, key.rest)
            for rows in (SELECT, part)
        ),
        *(describe(v, rows, min(64, value.main), 1) for rows in (SELECT, part)),
        tiles.first,
        tiles.stop,
        shares.shared,
        shares.counts,
        shares.own,
        bounds.lower,
        bounds.upper,
        out,
        lse,
        max(scale * LOG2_E, 1e-30),
        T,
        S,
        HK,
        H // HK,
        shares.own.shape[3],
        shares.shared.shape[3],
        tiles.count,
        total,
        bounds.stride,
        K_MAIN=key.main,
        K_REST=key.rest,
        V_MAIN=value.main,
        STAGES=values["num_stages"],
        num_warps=values["num_warps"],
        maxnreg=65536 // (256 * values["programs"]),
    )


@gluon.jit(
    do_not_specialize=["T", "S", "tiles", "total", "stride_bounds"],
    do_not_specialize_on_alignment=["lse"],
)
def _hopper_selected_kernel(
    q_main, q_rest, k_main, k_main_part, k_rest, k_rest_part, v_main, v_main_part,
    tile_first, tile_stop, shared, counts, own, lower, upper, out, lse, scale_log2,
    T, S, HK, G, n, kept, tiles, total, stride_bounds,
    K_MAIN: gl.constexpr, K_REST: gl.constexpr, V_MAIN: gl.constexpr, STAGES: gl.constexpr,
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
    where = (tile_first, tile_stop, T, HK, G, tiles, total)
    lists = (shared, counts, own, n, kept)
    results = (out, lse, lower, upper, stride_bounds)
    gl.warp_specialize(
        [
            (
                _consume,
                (buffers, ready, where, lists, results, scale_log2,
                 K_MAIN, K_REST, V_MAIN, STAGES),
            ),
            (
                _fetch,
                (q_main, q_rest, k_main, k_main_part, k_rest, k_rest_part, v_main, v_main_part,
                 buffers, ready, where, lists, S, K_MAIN, K_REST, V_MAIN, STAGES),
            ),
        ],
        [1],
        [40],
    )  # fmt: skip


@gluon.jit
def _locate(i_work, where):
    """A tile's number, batch, key head, and queries `first .. stop - 1`.

    All tiles of a key head run one after the other: its keys and values stay in the cache.
    """
    tile_first, tile_stop, T, HK, _, tiles, _ = where
    i_tile = i_work % tiles
    i_kv = i_work // tiles % HK
    i_batch = i_work // tiles // HK
    first, stop = tile_at(tile_first, tile_stop, i_tile, 4, T)
    return i_work.to(gl.int64), i_batch, i_kv, first, stop


@gluon.jit
def tile_at(tile_first, tile_stop, i_tile, SIZE: gl.constexpr, T):
    """`bounds.tile_of`: the first token of a tile and the one past its last."""
    first = i_tile * SIZE
    stop = gl.minimum(first + SIZE, T)
    if tile_first is not None:
        first = gl.load(tile_first + i_tile)
        stop = gl.load(tile_stop + i_tile)
    return first, stop


@gluon.jit
def _fetch(
    q_main, q_rest, k_main, k_main_part, k_rest, k_rest_part, v_main, v_main_part,
    buffers, ready, where, lists, S,
    K_MAIN: gl.constexpr, K_REST: gl.constexpr, V_MAIN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The fetching warp: fill every buffer as soon as it is free."""
    q_buffer, q_rest_buffer, k_buffer, k_rest_buffer, v_buffer = buffers
    q_ready, k_ready, v_ready = ready
    shared, counts, own, n, kept = lists
    T, HK, G, total = where[2], where[3], where[4], where[6]
    i_stage, parity, q_parity = 0, 1, 1
    for i_work in range(gl.program_id(0), total, gl.num_programs(0)):
        i_shares, i_batch, i_kv, first, stop = _locate(i_work, where)
        if first < stop:
            p_counts = counts + i_shares * 3
            shared_count = gl.load(p_counts + 1)
            own_count = gl.load(p_counts + 2)
            p_shared = shared + i_shares * kept * 3
            i_row = gl.load(p_shared)
            mbarrier.wait(q_ready.index(1), q_parity)
            q_parity ^= 1
            filled = q_ready.index(0)
            mbarrier.expect(filled, 2 * 64 * (K_MAIN + K_REST))
            copy_tile(
                q_main, i_batch, first, i_kv * G, 0, filled, q_buffer.index(0), K_MAIN, 4, 16, 0
            )
            if K_REST:
                copy_tile(q_rest, i_batch, first, i_kv * G, K_MAIN, filled, q_rest_buffer.index(0),
                      K_REST, 4, 16, 0)  # fmt: skip
            for i_block in range(shared_count):
                i_next = gl.load(p_shared + 3 * gl.minimum(i_block + 1, shared_count - 1))
                i_stage, parity = fetch_block(
                    k_main, k_rest, v_main, buffers, ready, i_row, i_batch, i_kv, i_stage, parity,
                    K_MAIN, K_REST, V_MAIN, STAGES,
                )  # fmt: skip
                i_row = i_next
            stride = HK * n
            p_own = own + ((i_batch.to(gl.int64) * T + first) * HK + i_kv) * n
            last = stop - 1 - first
            p_1 = p_own + gl.minimum(1, last) * stride
            p_2 = p_own + gl.minimum(2, last) * stride
            p_3 = p_own + gl.minimum(3, last) * stride
            row_0, row_1, row_2, row_3 = gl.load(p_own), gl.load(p_1), gl.load(p_2), gl.load(p_3)
            for i_block in range(own_count):
                i_next = gl.minimum(i_block + 1, own_count - 1)
                next_0, next_1 = gl.load(p_own + i_next), gl.load(p_1 + i_next)
                next_2, next_3 = gl.load(p_2 + i_next), gl.load(p_3 + i_next)
                rows = (
                    _readable(row_0, last < 0, S), _readable(row_1, last < 1, S),
                    _readable(row_2, last < 2, S), _readable(row_3, last < 3, S),
                )  # fmt: skip
                for part in gl.static_range(4):
                    filled = k_ready.index(i_stage)
                    mbarrier.wait(k_ready.index(STAGES + i_stage), parity)
                    mbarrier.expect(filled, 2 * 64 * (K_MAIN + K_REST))
                    for i_query in gl.static_range(4):
                        copy_tile(k_main_part, i_batch, rows[i_query] + part * 16, i_kv, 0, filled,
                              k_buffer.index(i_stage), K_MAIN, 16, 1, i_query * 16)  # fmt: skip
                        if K_REST:
                            copy_tile(k_rest_part, i_batch, rows[i_query] + part * 16, i_kv, K_MAIN,
                                  filled, k_rest_buffer.index(i_stage), K_REST, 16, 1,
                                  i_query * 16)  # fmt: skip
                    filled = v_ready.index(i_stage)
                    mbarrier.wait(v_ready.index(STAGES + i_stage), parity)
                    mbarrier.expect(filled, 2 * 64 * V_MAIN)
                    for i_query in gl.static_range(4):
                        copy_tile(v_main_part, i_batch, rows[i_query] + part * 16, i_kv, 0, filled,
                              v_buffer.index(i_stage), V_MAIN, 16, 1, i_query * 16)  # fmt: skip
                    i_stage, parity = next_stage(i_stage, parity, STAGES)
                row_0, row_1, row_2, row_3 = next_0, next_1, next_2, next_3


@gluon.jit
def fetch_block(
    k_main, k_rest, v_main, buffers, ready, i_row, i_batch, i_kv, i_stage, parity,
    K_MAIN: gl.constexpr, K_REST: gl.constexpr, V_MAIN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fetch the block at `i_row`; returns the stage after it."""
    _, _, k_buffer, k_rest_buffer, v_buffer = buffers
    _, k_ready, v_ready = ready
    filled = k_ready.index(i_stage)
    mbarrier.wait(k_ready.index(STAGES + i_stage), parity)
    mbarrier.expect(filled, 2 * 64 * (K_MAIN + K_REST))
    copy_tile(k_main, i_batch, i_row, i_kv, 0, filled, k_buffer.index(i_stage), K_MAIN,
              64, 1, 0)  # fmt: skip
    if K_REST:
        copy_tile(k_rest, i_batch, i_row, i_kv, K_MAIN, filled,
                  k_rest_buffer.index(i_stage), K_REST, 64, 1, 0)  # fmt: skip
    filled = v_ready.index(i_stage)
    mbarrier.wait(v_ready.index(STAGES + i_stage), parity)
    mbarrier.expect(filled, 2 * 64 * V_MAIN)
    copy_tile(v_main, i_batch, i_row, i_kv, 0, filled, v_buffer.index(i_stage), V_MAIN,
              64, 1, 0)  # fmt: skip
    return next_stage(i_stage, parity, STAGES)


@gluon.jit
def _readable(row, m_absent, S):
    """The row itself; for none, a row that the query sees anyway; without one, a row of zeros.

    Zeros are what lies past the tensor's last row. To fetch those takes longer than others.
    """
    row = gl.where(row < -1, -2 - row, row)
    return gl.where((row < 0) | m_absent, S, row)


@gluon.jit
def soften(b_s, m_chose, running_max, running_sum, scale_log2):
    """Probabilities of a tile of scores, what to scale the rows' sums by, their new max and sum.

    Scores are not scaled yet, nor is the max. Rows with `m_chose` false keep what they have.
    """
    AXIS: gl.constexpr = len(b_s.shape) - 1
    next_max = gl.maximum(running_max, gl.max(b_s, AXIS))
    next_max = gl.where(m_chose, next_max, running_max)
    shift = gl.where(m_chose, next_max * scale_log2, float("inf"))
    b_p = gl.exp2(b_s * scale_log2 - gl.expand_dims(shift, AXIS))
    decay = gl.where(m_chose, gl.exp2(running_max * scale_log2 - shift), 1.0)
    return b_p, decay, next_max, running_sum * decay + gl.sum(b_p, AXIS)


@gluon.jit
def _clean_behind(tile, count):
    """Clear the rows of a tile in shared memory from `count` on."""
    rows: gl.constexpr = tile.shape[0]
    width: gl.constexpr = tile.shape[1]
    lanes: gl.constexpr = gl.BlockedLayout([1, 8], [256 // width, width // 8], [4, 1], [1, 0])
    for i_row in gl.static_range(0, rows, 32):
        if count < i_row + 32:
            part = tile.slice(i_row, 32)
            o_row = i_row + gl.arange(0, 32, gl.SliceLayout(1, lanes))
            b_part = gl.where((o_row < count)[:, None], part.load(lanes), 0.0)
            part.store(b_part.to(tile.dtype))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def load_block(p_shared, i_block, count, FIELDS: gl.constexpr = 3):
    """A shared block's three numbers, the last block's for those behind it."""
    p_block = p_shared + gl.minimum(i_block, gl.maximum(count - 1, 0)) * FIELDS
    queries = gl.load(p_block + 1)
    if FIELDS == WIDE_FIELDS:
        queries = (queries.to(gl.int64) & 0xFFFFFFFF) | (gl.load(p_block + 3).to(gl.int64) << 32)
    return gl.load(p_block), queries, gl.load(p_block + 2)


@gluon.jit
def attend_block(
    buffers, ready, block, state, b_upper, scale_log2, i_stage, parity,
    MASKED: gl.constexpr, HEADS: gl.constexpr, K_REST: gl.constexpr, V_MAIN: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Attend to a block that a tile's queries share, `HEADS` rows each.

    The state is each row's largest score and sum, and the sums of values. Returns the next state
    and the stage after the block.
    """
    q_buffer, q_rest_buffer, k_buffer, k_rest_buffer, v_buffer = buffers
    _, k_ready, v_ready = ready
    i_key, queries, end = block
    running_max, running_sum, accumulator = state
    dtype: gl.constexpr = q_buffer.dtype
    by_key: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    by_value: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V_MAIN, 16])
    o_row = gl.arange(0, 64, gl.SliceLayout(1, by_key))
    m_chose = ((queries >> (o_row // HEADS)) & 1) > 0
    mbarrier.wait(k_ready.index(i_stage), parity)
    b_s = gl.zeros([64, 64], gl.float32, by_key)
    b_k = k_buffer.index(i_stage).permute((1, 0))
    b_s = warpgroup_mma(q_buffer.index(0), b_k, b_s, use_acc=False, is_async=True)
    if K_REST:
        b_k = k_rest_buffer.index(i_stage).permute((1, 0))
        b_s = warpgroup_mma(q_rest_buffer.index(0), b_k, b_s, is_async=True)
    b_s = warpgroup_mma_wait(0, deps=(b_s,))
    mbarrier.arrive(k_ready.index(STAGES + i_stage), count=1)
    b_v = v_buffer.index(i_stage)
    if MASKED:
        seen = end - i_key
        o_key = gl.arange(0, 64, gl.SliceLayout(0, by_key))
        b_seen = gl.where(m_chose, gl.minimum(b_upper - i_key, seen), 0)
        b_s = gl.where(o_key[None, :] < b_seen[:, None], b_s, float("-inf"))
        m_chose = b_seen > 0
        mbarrier.wait(v_ready.index(i_stage), parity)
        # What nobody sees may be anything, and 0 times NaN is NaN.
        if seen < 64:
            _clean_behind(b_v, seen)
    b_p, decay, running_max, running_sum = soften(
        b_s, m_chose, running_max, running_sum, scale_log2
    )
    accumulator *= gl.convert_layout(decay, gl.SliceLayout(1, by_value))[:, None]
    b_p = gl.convert_layout(b_p.to(dtype), gl.DotOperandLayout(0, by_value, 2))
    mbarrier.wait(v_ready.index(i_stage), parity)
    accumulator = warpgroup_mma(b_p, b_v, accumulator, is_async=True)
    accumulator = warpgroup_mma_wait(0, deps=(accumulator,))
    mbarrier.arrive(v_ready.index(STAGES + i_stage), count=1)
    i_stage, parity = next_stage(i_stage, parity, STAGES)
    return (running_max, running_sum, accumulator), i_stage, parity


@gluon.jit
def _consume(
    buffers, ready, where, lists, results, scale_log2,
    K_MAIN: gl.constexpr, K_REST: gl.constexpr, V_MAIN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The multiplying warpgroup. A warp has the heads of one query."""
    q_buffer, q_rest_buffer, k_buffer, k_rest_buffer, v_buffer = buffers
    q_ready, k_ready, v_ready = ready
    out, lse, lower, upper, stride_bounds = results
    shared, counts, own, n, kept = lists
    T, HK, G, total = where[2], where[3], where[4], where[6]
    dtype: gl.constexpr = q_buffer.dtype
    rest: gl.constexpr = K_REST if K_REST else K_MAIN
    box: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=3)
    by_key: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    by_value: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V_MAIN, 16])
    row: gl.constexpr = gl.SliceLayout(1, by_key)
    # The same registers hold the same numbers in both: rows of a warp are the heads of a query.
    batch: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [4, 1, 1], [1, 16, 8])
    batch_row: gl.constexpr = gl.SliceLayout(2, batch)
    query: gl.constexpr = gl.SliceLayout(1, batch_row)
    batch_q: gl.constexpr = gl.DotOperandLayout(0, batch, 2)
    batch_k: gl.constexpr = gl.DotOperandLayout(1, batch, 2)
    b_q = q_buffer.index(0)
    b_q_rest = q_rest_buffer.index(0)
    q_heads = b_q._reinterpret(dtype, [4, 16, K_MAIN], box)
    q_rest_heads = b_q_rest._reinterpret(dtype, [4, 16, rest], box)
    i_stage, parity, q_parity = 0, 0, 0
    for i_work in range(gl.program_id(0), total, gl.num_programs(0)):
        i_shares, i_batch, i_kv, first, stop = _locate(i_work, where)
        if first < stop:
            p_counts = counts + i_shares * 3
            whole_count = gl.load(p_counts)
            shared_count = gl.load(p_counts + 1)
            own_count = gl.load(p_counts + 2)
            p_shared = shared + i_shares * kept * 3
            p_bounds = upper + i_batch.to(gl.int64) * stride_bounds
            mbarrier.wait(q_ready.index(0), q_parity)
            q_parity ^= 1
            o_query = first + gl.arange(0, 64, row) // 16
            b_upper = gl.load(p_bounds + o_query, mask=o_query < stop, other=0)
            running_max = gl.full([64], float("-inf"), gl.float32, row)
            running_sum = gl.zeros([64], gl.float32, row)
            accumulator = gl.zeros([64, V_MAIN], gl.float32, by_value)
            state = (running_max, running_sum, accumulator)
            block = load_block(p_shared, 0, shared_count)
            for MASKED in gl.static_range(2):
                start = 0 if MASKED == 0 else whole_count
                for i_block in range(start, whole_count if MASKED == 0 else shared_count):
                    following = load_block(p_shared, i_block + 1, shared_count)
                    state, i_stage, parity = attend_block(
                        buffers, ready, block, state, b_upper, scale_log2, i_stage, parity,
                        MASKED, 16, K_REST, V_MAIN, STAGES,
                    )  # fmt: skip
                    block = following
            running_max, running_sum, accumulator = state

            b_q_own = q_heads.load(batch_q)
            b_q_rest_own = b_q_own
            if K_REST:
                b_q_rest_own = q_rest_heads.load(batch_q)
            fence_async_shared()
            mbarrier.arrive(q_ready.index(1), count=1)
            own_max = gl.convert_layout(running_max.reshape([4, 16]), batch_row)
            own_sum = gl.convert_layout(running_sum.reshape([4, 16]), batch_row)
            own_out = gl.convert_layout(
                accumulator.reshape([4, 16, V_MAIN]), batch, assert_trivial=True
            )
            o_member = gl.arange(0, 4, query)
            o_query = first + o_member
            m_query = o_query < stop
            p_own = own + ((i_batch.to(gl.int64) * T + o_query) * HK + i_kv) * n
            b_row = gl.load(p_own, mask=m_query, other=-1)
            # A fence before a stage is given back: what was read of it must have arrived before the
            # copy engine, which does not see these reads, may write there.
            for i_block in range(own_count):
                m_chose = gl.expand_dims(b_row >= 0, 1)
                b_row = gl.load(p_own + gl.minimum(i_block + 1, n - 1), mask=m_query, other=-1)
                for _part in gl.static_range(4):
                    mbarrier.wait(k_ready.index(i_stage), parity)
                    b_k = k_buffer.index(i_stage)._reinterpret(dtype, [4, 16, K_MAIN], box)
                    b_k = b_k.permute((0, 2, 1)).load(batch_k)
                    b_s = gl.zeros([4, 16, 16], gl.float32, batch)
                    b_s = mma_v2(b_q_own, b_k, b_s)
                    if K_REST:
                        b_k = k_rest_buffer.index(i_stage)._reinterpret(dtype, [4, 16, rest], box)
                        b_k = b_k.permute((0, 2, 1)).load(batch_k)
                        b_s = mma_v2(b_q_rest_own, b_k, b_s)
                    fence_async_shared()
                    mbarrier.arrive(k_ready.index(STAGES + i_stage), count=1)
                    b_p, decay, own_max, own_sum = soften(
                        b_s, m_chose, own_max, own_sum, scale_log2
                    )
                    own_out *= gl.expand_dims(decay, 2)
                    b_p = gl.convert_layout(b_p.to(dtype), batch_q)
                    mbarrier.wait(v_ready.index(i_stage), parity)
                    b_v = v_buffer.index(i_stage)._reinterpret(dtype, [4, 16, V_MAIN], box)
                    own_out = mma_v2(b_p, b_v.load(batch_k), own_out)
                    fence_async_shared()
                    mbarrier.arrive(v_ready.index(STAGES + i_stage), count=1)
                    i_stage, parity = next_stage(i_stage, parity, STAGES)

            o_head = gl.arange(0, 16, gl.SliceLayout(0, batch_row))
            m_row = gl.expand_dims(m_query, 1) & gl.expand_dims(o_head < G, 0)
            # Queries that see nothing may hold anything, NaN too.
            b_last = gl.load(p_bounds + o_query, mask=m_query, other=0)
            p_lower = lower + i_batch.to(gl.int64) * stride_bounds
            m_seeing = b_last > gl.load(p_lower + o_query, mask=m_query, other=0)
            m_some = (own_sum > 0.0) & gl.expand_dims(m_seeing, 1)
            own_sum = gl.where(m_some, own_sum, 1.0)
            b_lse = (own_max * scale_log2 + gl.log2(own_sum)) * 0.6931471805599453
            b_lse = gl.where(m_some, b_lse, float("-inf"))
            o_out = (i_batch.to(gl.int64) * T + gl.expand_dims(o_query, 1)) * HK + i_kv
            o_out = o_out * G + gl.expand_dims(o_head, 0)
            gl.store(lse + o_out, b_lse, mask=m_row)
            own_out = gl.where(gl.expand_dims(m_some, 2), own_out / gl.expand_dims(own_sum, 2), 0.0)
            o_column = gl.arange(0, V_MAIN, gl.SliceLayout(0, gl.SliceLayout(1, batch)))
            o_column = gl.expand_dims(gl.expand_dims(o_column, 0), 1)
            p_out = out + gl.expand_dims(o_out, 2) * V_MAIN + o_column
            gl.store(p_out, own_out.to(dtype), mask=gl.expand_dims(m_row, 2))
