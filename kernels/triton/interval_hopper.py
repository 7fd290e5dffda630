"""Attention over an interval of keys, written for Hopper's own instructions.

The same computation as `_interval_forward_kernel`. A warpgroup has 64 queries, and multiplies one
tile's probabilities with its values while it takes the exponentials of the next.
"""

from __future__ import annotations

from typing import NamedTuple

import triton.experimental.gluon as gluon
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsa_port.kernels.geometry import Layout
from nsa_port.kernels.tables import Values
from nsa_port.kernels.triton.bounds import QueryBounds, cut_tiles, key_ranges
from nsa_port.kernels.triton.hopper import (
    clean_rows,
    count_steps,
    describe,
    locate,
    next_stage,
    queries_and_heads,
    tile_of_step,
)
from nsa_port.kernels.triton.host import LOG2_E, multiprocessors, split_head


class SumWith(NamedTuple):
    """What is added up with the result while it is at hand: Eq. 5 with the result as its last term.

    Args:
        first, second: the other terms, contiguous.
        gates: `[B, T, H, 3]`, the result's the last.
        out: receives the sum, in float32 until it is rounded.
        keep: whether the result itself is written too.
    """

    first: Tensor
    second: Tensor
    gates: Tensor
    out: Tensor
    keep: bool


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: QueryBounds,
    layout: Layout,
    scale: float,
    out: Tensor,
    lse: Tensor,
    values: Values,
    sum_with: SumWith | None = None,
) -> None:
    """Fill `out` and `lse` with the softmax over each query's interval; `scale` is positive."""
    B, T, H, Dk = q.shape
    first, second, gates, total_out, keep = sum_with or (None, None, None, None, True)
    key, value = split_head(Dk), split_head(v.shape[3])
    block_n = values["BLOCK_N"]
    row_stages, stages = values["row_stages"], values["num_stages"]
    # Entries with tiles for the gated sum leave room for results in shared memory. Tiles of packed
    # sequences may end in the middle, where the copy engine cannot stop.
    staged = "sum_stages" in values and layout.cu_seqlens is None
    if staged and sum_with is not None:
        block_n, row_stages, stages = values["sum_block_n"], 1, values["sum_stages"]
    terms = (first, second, out, total_out) if staged else (None,) * 4
    queries, heads = queries_and_heads(q, v.shape[2])
    tiles = cut_tiles(T, queries, layout.cu_seqlens)
    total = tiles.count * B * (H // heads)
    _hopper_forward_kernel[(min(total, multiprocessors(q.device)),)](
        describe(q, 64, key.main),
        describe(q, 64, key.rest),
        describe(k, block_n, key.main),
        describe(k, block_n, key.rest),
        describe(v, block_n, value.main),
        *(None if term is None else describe(term, 64, value.main) for term in terms),
        tiles.first,
        tiles.stop,
        bounds.lower,
        bounds.upper,
        key_ranges(bounds, tiles, queries, block_n),
        out,
        lse,
        first,
        second,
        gates,
        total_out,
        scale * LOG2_E,
        T,
        H,
        H // v.shape[2],
        tiles.count,
        total,
        bounds.stride,
        0 if bounds.stride == 0 else tiles.count * 4,
        *((0, 0, 0, 0) if gates is None else gates.stride()),
        KEEP=keep,
        K_MAIN=key.main,
        K_REST=key.rest,
        V_MAIN=value.main,
        BLOCK_N=block_n,
        STAGES=stages,
        ROW_STAGES=row_stages,
        STAGED=staged,
        HEADS=heads,
        num_warps=values["num_warps"],
    )


_LENGTHS = [
    "T", "tiles", "total", "stride_bounds", "stride_spans", "stride_gb", "stride_gt", "stride_gh",
    "stride_gg",
]  # fmt: skip


@gluon.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=["lse"])
def _hopper_forward_kernel(
    q_main,
    q_rest,
    k_main,
    k_rest,
    v_main,
    first_tiles,
    second_tiles,
    out_tiles,
    total_tiles,
    tile_first,
    tile_stop,
    lower,
    upper,
    spans,
    out,
    lse,
    first,
    second,
    gates,
    total_out,
    scale_log2,
    T,
    H,
    G,
    tiles,
    total,
    stride_bounds,
    stride_spans,
    stride_gb,
    stride_gt,
    stride_gh,
    stride_gg,
    KEEP: gl.constexpr,
    K_MAIN: gl.constexpr,
    K_REST: gl.constexpr,
    V_MAIN: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    ROW_STAGES: gl.constexpr,
    STAGED: gl.constexpr,
    HEADS: gl.constexpr,
):
    """One program of as many as the device has multiprocessors: every so manieth tile.

    If `STAGED`, results go, and the terms of the gated sum come, through shared memory.
    """
    SUM: gl.constexpr = gates is not None
    dtype: gl.constexpr = out.dtype.element_ty
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=4)
    rest: gl.constexpr = K_REST if K_REST else K_MAIN
    q_buffer = gl.allocate_shared_memory(dtype, [2 * ROW_STAGES, 1, 64, 1, K_MAIN], tile)
    k_buffer = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_N, 1, K_MAIN], tile)
    v_buffer = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_N, 1, V_MAIN], tile)
    q_rest_buffer, k_rest_buffer = q_buffer, k_buffer
    q_tiles, k_tiles = (q_main, q_main), (k_main, k_main)
    if K_REST:
        q_rest_buffer = gl.allocate_shared_memory(dtype, [2 * ROW_STAGES, 1, 64, 1, rest], tile)
        k_rest_buffer = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_N, 1, rest], tile)
        q_tiles, k_tiles = (q_main, q_rest), (k_main, k_rest)
    counter: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_ready = gl.allocate_shared_memory(gl.int64, [2 * ROW_STAGES, 1], counter)
    k_ready = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], counter)
    # The last one is for tiles that are to be cleaned first, see `clean_rows`.
    v_ready = gl.allocate_shared_memory(gl.int64, [2 * STAGES + 1, 1], counter)
    # The first barriers say that buffers are filled, those behind that both warpgroups are done.
    for i_stage in gl.static_range(ROW_STAGES):
        mbarrier.init(q_ready.index(i_stage), count=1)
        mbarrier.init(q_ready.index(ROW_STAGES + i_stage), count=2)
    for i_stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i_stage), count=1)
        mbarrier.init(v_ready.index(i_stage), count=1)
        mbarrier.init(k_ready.index(STAGES + i_stage), count=2)
        mbarrier.init(v_ready.index(STAGES + i_stage), count=2)
    mbarrier.init(v_ready.index(2 * STAGES), count=1)
    terms, terms_ready = q_buffer, q_ready
    if STAGED:
        terms = gl.allocate_shared_memory(dtype, [4 if SUM else 2, 1, 64, 1, V_MAIN], tile)
        terms_ready = gl.allocate_shared_memory(gl.int64, [2, 1], counter)
        mbarrier.init(terms_ready.index(0), count=1)
        mbarrier.init(terms_ready.index(1), count=2)
    fence_async_shared()

    buffers = (q_buffer, q_rest_buffer, k_buffer, k_rest_buffer, v_buffer, terms)
    ready = (q_ready, k_ready, v_ready, terms_ready)
    where = (tile_first, spans, stride_spans, T, H, G, tiles, total)
    results = (out, lse, lower, upper, stride_bounds, tile_stop)
    gated = (first, second, gates, total_out, stride_gb, stride_gt, stride_gh, stride_gg)
    stored = (out_tiles, total_tiles)
    gl.warp_specialize(
        [
            (
                _consume_staged if STAGED else _consume,
                (buffers, ready, where, results, gated, stored, scale_log2,
                 0, KEEP, K_MAIN, K_REST, V_MAIN, BLOCK_N, STAGES, ROW_STAGES, HEADS),
            ),
            (
                _consume_staged if STAGED else _consume,
                (buffers, ready, where, results, gated, stored, scale_log2,
                 1, KEEP, K_MAIN, K_REST, V_MAIN, BLOCK_N, STAGES, ROW_STAGES, HEADS),
            ),
            (
                _fetch,
                (q_tiles, k_tiles, v_main, (first_tiles, second_tiles), buffers, ready, where,
                 K_MAIN, K_REST, V_MAIN, BLOCK_N, STAGES, ROW_STAGES, STAGED and SUM, HEADS),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def _fetch(
    q_tiles, k_tiles, v_main, term_tiles, buffers, ready, where,
    K_MAIN: gl.constexpr, K_REST: gl.constexpr, V_MAIN: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    ROW_STAGES: gl.constexpr, TERMS: gl.constexpr, HEADS: gl.constexpr,
):  # fmt: skip
    """The fetching warp: fill every buffer as soon as it is free."""
    q_buffer, q_rest_buffer, k_buffer, k_rest_buffer, v_buffer, terms = buffers
    q_ready, k_ready, v_ready, terms_ready = ready
    total = where[7]
    i_stage, parity, i_rows, q_parity, copied, terms_parity = 0, 1, 0, 1, 0, 0
    for i_work in range(gl.program_id(0), total, gl.num_programs(0)):
        _i_tile, i_batch, i_head, i_kv, first, span = locate(i_work, where, HEADS)
        _masked, steps = count_steps(span, BLOCK_N)
        surplus = span[0] - (span[3] - BLOCK_N)
        mbarrier.wait(q_ready.index(ROW_STAGES + i_rows), q_parity)
        filled = q_ready.index(i_rows)
        mbarrier.expect(filled, 2 * 128 * (K_MAIN + K_REST))
        for half in gl.static_range(2):
            i_row = first + half * 64 if HEADS == 1 else first
            i_member = i_head if HEADS == 1 else i_head + half
            o_tile, i_buffer = [i_batch, i_row, i_member, 0], 2 * i_rows + half
            tma.async_copy_global_to_shared(q_tiles[0], o_tile, filled, q_buffer.index(i_buffer))
            if K_REST:
                o_tile = [i_batch, i_row, i_member, K_MAIN]
                tma.async_copy_global_to_shared(
                    q_tiles[1], o_tile, filled, q_rest_buffer.index(i_buffer)
                )
        i_rows, q_parity = next_stage(i_rows, q_parity, ROW_STAGES)
        for i_step in range(steps):
            i_key, _nominal, _end = tile_of_step(i_step, span, BLOCK_N)
            filled = k_ready.index(i_stage)
            mbarrier.wait(k_ready.index(STAGES + i_stage), parity)
            mbarrier.expect(filled, 2 * BLOCK_N * (K_MAIN + K_REST))
            tma.async_copy_global_to_shared(
                k_tiles[0], [i_batch, i_key, i_kv, 0], filled, k_buffer.index(i_stage)
            )
            if K_REST:
                tma.async_copy_global_to_shared(
                    k_tiles[1], [i_batch, i_key, i_kv, K_MAIN], filled,
                    k_rest_buffer.index(i_stage),
                )  # fmt: skip
            i_barrier = i_stage
            if where[0] is not None:
                i_barrier = gl.where(surplus > 0, 2 * STAGES, i_stage)
            filled = v_ready.index(i_barrier)
            mbarrier.wait(v_ready.index(STAGES + i_stage), parity)
            mbarrier.expect(filled, 2 * BLOCK_N * V_MAIN)
            tma.async_copy_global_to_shared(
                v_main, [i_batch, i_key, i_kv, 0], filled, v_buffer.index(i_stage)
            )
            if where[0] is not None:  # noqa: SIM102 (one is known when the kernel is compiled)
                if surplus > 0:
                    mbarrier.wait(filled, copied)
                    copied ^= 1
                    clean_rows(v_buffer.index(i_stage), surplus)
                    mbarrier.arrive(v_ready.index(i_stage), count=1)
            i_stage, parity = next_stage(i_stage, parity, STAGES)
        if TERMS:
            # Early in a tile its warpgroups see that the last one's results have left.
            mbarrier.wait(terms_ready.index(1), terms_parity)
            terms_parity ^= 1
            filled = terms_ready.index(0)
            mbarrier.expect(filled, 2 * 2 * 128 * V_MAIN)
            for half in gl.static_range(2):
                i_row = first + half * 64 if HEADS == 1 else first
                i_member = i_head if HEADS == 1 else i_head + half
                for i_term in gl.static_range(2):
                    tma.async_copy_global_to_shared(
                        term_tiles[i_term], [i_batch, i_row, i_member, 0], filled,
                        terms.index(2 * i_term + half),
                    )  # fmt: skip


@gluon.jit
def _scores(
    q, q_rest, k_buffer, k_rest_buffer, i_stage,
    K_MAIN: gl.constexpr, K_REST: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Start `q @ k.T`. `[64, BLOCK_N]`."""
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    by_key: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    zeros = gl.zeros([64, BLOCK_N], gl.float32, by_key)
    b_k = k_buffer.index(i_stage)._reinterpret(q.dtype, [BLOCK_N, K_MAIN], tile)
    b_s = warpgroup_mma(q, b_k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    if K_REST:
        b_k = k_rest_buffer.index(i_stage)._reinterpret(q.dtype, [BLOCK_N, K_REST], tile)
        b_s = warpgroup_mma(q_rest, b_k.permute((1, 0)), b_s, is_async=True)
    return b_s


@gluon.jit
def _soften(
    b_s, running_max, running_sum, b_lower, b_upper, i_key, nominal, scale_log2,
    MASKED: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """One step of the softmax. `p [64, BLOCK_N]` and the new maximum, sum and decay, `[64]`."""
    by_key: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    if MASKED:
        o_key = i_key + gl.arange(0, BLOCK_N, gl.SliceLayout(0, by_key))
        b_first = gl.maximum(b_lower, nominal)
        m_seen = (o_key[None, :] >= b_first[:, None]) & (o_key[None, :] < b_upper[:, None])
        b_s = gl.where(m_seen, b_s, float("-inf"))
    next_max = gl.maximum(running_max, gl.max(b_s, 1) * scale_log2)
    shift = next_max
    if MASKED:
        # A row that has seen nothing yet must not compute -inf - -inf.
        shift = gl.where(next_max == float("-inf"), 0.0, next_max)
    b_p = gl.exp2(b_s * scale_log2 - shift[:, None])
    decay = gl.exp2(running_max - shift)
    running_sum = running_sum * decay + gl.sum(b_p, 1)
    return b_p, next_max, running_sum, decay


@gluon.jit
def _consume(
    buffers, ready, where, results, gated, _stored, scale_log2,
    HALF: gl.constexpr, KEEP: gl.constexpr, K_MAIN: gl.constexpr, K_REST: gl.constexpr,
    V_MAIN: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    ROW_STAGES: gl.constexpr, HEADS: gl.constexpr,
):  # fmt: skip
    """A multiplying warpgroup: its 64 queries of every tile."""
    out = results[0]
    T, H, total = where[3], where[4], where[7]
    lanes: gl.constexpr = gl.BlockedLayout([1, 8], [256 // V_MAIN, V_MAIN // 8], [4, 1], [1, 0])
    stages = (0, 0, 0, 0)
    for i_work in range(gl.program_id(0), total, gl.num_programs(0)):
        rows = _look_up(i_work, where, results, HALF, HEADS, BLOCK_N)
        accumulator, running_sum, stages = _attend_tile(
            rows, stages, buffers, ready, where, results, scale_log2,
            HALF, K_MAIN, K_REST, V_MAIN, BLOCK_N, STAGES, ROW_STAGES, False,
        )  # fmt: skip
        i_batch, i_head, first, last = rows[0], rows[1], rows[2], rows[3]
        accumulator /= running_sum[:, None]
        b_out = gl.convert_layout(accumulator.to(out.dtype.element_ty), lanes)
        o_query = first + gl.arange(0, 64, gl.SliceLayout(1, lanes))
        o_row = ((i_batch.to(gl.int64) * T + o_query) * H + i_head) * V_MAIN
        o_column = gl.arange(0, V_MAIN, gl.SliceLayout(0, lanes))
        o_out = o_row[:, None] + o_column[None, :]
        m_row = o_query < last
        if KEEP:
            gl.store(out + o_out, b_out, mask=m_row[:, None])
        if gated[2] is not None:
            b_gates = _load_gates(rows, gated, lanes)
            b_first = gl.load(gated[0] + o_out, mask=m_row[:, None], other=0.0)
            b_second = gl.load(gated[1] + o_out, mask=m_row[:, None], other=0.0)
            b_total = _add_up(b_gates, b_first, b_second, b_out)
            gl.store(gated[3] + o_out, b_total, mask=m_row[:, None])


@gluon.jit
def _consume_staged(
    buffers, ready, where, results, gated, stored, scale_log2,
    HALF: gl.constexpr, KEEP: gl.constexpr, K_MAIN: gl.constexpr, K_REST: gl.constexpr,
    V_MAIN: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    ROW_STAGES: gl.constexpr, HEADS: gl.constexpr,
):  # fmt: skip
    """The same through shared memory, where the gated sum's terms give results their places.

    What depends on memory alone is loaded a tile ahead.
    """
    terms, terms_ready = buffers[5], ready[3]
    total = where[7]
    dtype: gl.constexpr = terms.dtype
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    by_value: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V_MAIN, 16])
    SUM: gl.constexpr = gated[2] is not None
    s_first = terms.index(HALF)._reinterpret(dtype, [64, V_MAIN], tile)
    if SUM:
        s_second = terms.index(2 + HALF)._reinterpret(dtype, [64, V_MAIN], tile)
    stages, terms_parity = (0, 0, 0, 0), 0
    i_work = gl.program_id(0)
    next_rows = _look_up(i_work, where, results, HALF, HEADS, BLOCK_N)
    next_gates = _load_gates(next_rows, gated, by_value)
    while i_work < total:
        rows, b_gates = next_rows, next_gates
        i_work += gl.num_programs(0)
        next_rows = _look_up(
            gl.minimum(i_work, total - 1), where, results, HALF, HEADS, BLOCK_N
        )  # fmt: skip
        next_gates = _load_gates(next_rows, gated, by_value)
        accumulator, running_sum, stages = _attend_tile(
            rows, stages, buffers, ready, where, results, scale_log2,
            HALF, K_MAIN, K_REST, V_MAIN, BLOCK_N, STAGES, ROW_STAGES, SUM,
        )  # fmt: skip
        b_out = (accumulator * (1.0 / running_sum)[:, None]).to(dtype)
        o_tile = [rows[0], rows[2], rows[1], 0]
        if SUM:
            mbarrier.wait(terms_ready.index(0), terms_parity)
            terms_parity ^= 1
            b_first, b_second = s_first.load(by_value), s_second.load(by_value)
            s_first.store(_add_up(b_gates, b_first, b_second, b_out))
            if KEEP:
                s_second.store(b_out)
            fence_async_shared()
            gl.thread_barrier()
            tma.async_copy_shared_to_global(stored[1], o_tile, terms.index(HALF))
            if KEEP:
                tma.async_copy_shared_to_global(stored[0], o_tile, terms.index(2 + HALF))
        else:
            # Until the last tile's result has left.
            tma.store_wait(0)
            gl.thread_barrier()
            s_first.store(b_out)
            fence_async_shared()
            gl.thread_barrier()
            tma.async_copy_shared_to_global(stored[0], o_tile, terms.index(HALF))
    tma.store_wait(0)


@gluon.jit
def _look_up(
    i_work, where, results, HALF: gl.constexpr, HEADS: gl.constexpr, BLOCK_N: gl.constexpr
):  # fmt: skip
    """A warpgroup's rows of a tile, as `_attend_tile` takes them.

    These are the batch, the head, the first query and the one past the last, the span of the tile's
    keys, and what each query sees of it.
    """
    _out, _lse, lower, upper, stride_bounds, tile_stop = results
    by_key: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    i_tile, i_batch, i_head, _i_kv, first, span = locate(i_work, where, HEADS)
    if HEADS == 2:
        i_head += HALF
    last = gl.minimum(first + 128 // HEADS, where[3])
    if tile_stop is not None:
        last = gl.load(tile_stop + i_tile)
    if HEADS == 1:
        first += HALF * 64
    o_query = first + gl.arange(0, 64, gl.SliceLayout(1, by_key))
    o_bounds = i_batch * stride_bounds + o_query
    b_lower = gl.load(lower + o_bounds, mask=o_query < last, other=0)
    b_upper = gl.load(upper + o_bounds, mask=o_query < last, other=0)
    return i_batch, i_head, first, last, span, b_lower, b_upper


@gluon.jit
def _load_gates(rows, gated, LAYOUT: gl.constexpr):
    """The three gates of each row; nothing where there is no gated sum."""
    i_batch, i_head, first, last = rows[0], rows[1], rows[2], rows[3]
    _, _, gates, _, stride_b, stride_t, stride_h, stride_g = gated
    if gates is None:
        return 0, 0, 0
    else:
        o_query = first + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
        p_gate = gates + i_batch.to(gl.int64) * stride_b + o_query.to(gl.int64) * stride_t
        p_gate += i_head.to(gl.int64) * stride_h
        m_row = o_query < last
        return (
            gl.load(p_gate, mask=m_row, other=0.0).to(gl.float32),
            gl.load(p_gate + stride_g, mask=m_row, other=0.0).to(gl.float32),
            gl.load(p_gate + 2 * stride_g, mask=m_row, other=0.0).to(gl.float32),
        )


@gluon.jit
def _attend_tile(
    rows, stages, buffers, ready, where, results, scale_log2,
    HALF: gl.constexpr, K_MAIN: gl.constexpr, K_REST: gl.constexpr, V_MAIN: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, ROW_STAGES: gl.constexpr, TERMS: gl.constexpr,
):  # fmt: skip
    """Attend with a warpgroup's rows of a tile and store their lse.

    Returns the sums of values and what to divide them by, and the stages after the tile. If
    `TERMS`, the fetching warp is told that it may bring the tile's.
    """
    q_buffer, q_rest_buffer, k_buffer, k_rest_buffer, v_buffer, _ = buffers
    q_ready, k_ready, v_ready, terms_ready = ready
    i_batch, i_head, first, last, span, b_lower, b_upper = rows
    i_stage, parity, i_rows, q_parity = stages
    lse, T, H = results[1], where[3], where[4]
    dtype: gl.constexpr = q_buffer.dtype
    rest: gl.constexpr = K_REST if K_REST else K_MAIN
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    by_key: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    by_value: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V_MAIN, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, by_value, 2)
    row: gl.constexpr = gl.SliceLayout(1, by_key)
    out_row: gl.constexpr = gl.SliceLayout(1, by_value)
    masked, steps = count_steps(span, BLOCK_N)
    running_max = gl.full([64], float("-inf"), gl.float32, row)
    running_sum = gl.zeros([64], gl.float32, row)
    accumulator = gl.zeros([64, V_MAIN], gl.float32, by_value)
    b_q = q_buffer.index(2 * i_rows + HALF)._reinterpret(dtype, [64, K_MAIN], tile)
    b_q_rest = q_rest_buffer.index(2 * i_rows + HALF)._reinterpret(dtype, [64, rest], tile)
    mbarrier.wait(q_ready.index(i_rows), q_parity)
    if steps > 0:
        mbarrier.wait(k_ready.index(i_stage), parity)
        b_s = _scores(b_q, b_q_rest, k_buffer, k_rest_buffer, i_stage, K_MAIN, K_REST, BLOCK_N)
        b_s = warpgroup_mma_wait(0, deps=(b_s,))
        mbarrier.arrive(k_ready.index(STAGES + i_stage), count=1)
        i_key, nominal, _end = tile_of_step(0, span, BLOCK_N)
        b_p, running_max, running_sum, decay = _soften(
            b_s, running_max, running_sum, b_lower, b_upper, i_key, nominal, scale_log2,
            True, BLOCK_N,
        )  # fmt: skip
        b_p = gl.convert_layout(b_p.to(dtype), operand)
        if TERMS:
            tma.store_wait(0)
            mbarrier.arrive(terms_ready.index(1), count=1)
        for phase in gl.static_range(2):
            step_start = 1 if phase == 0 else gl.maximum(masked, 1)
            for i_step in range(step_start, masked if phase == 0 else steps):
                i_before, parity_before = i_stage, parity
                i_stage, parity = next_stage(i_stage, parity, STAGES)
                mbarrier.wait(k_ready.index(i_stage), parity)
                b_s = _scores(
                    b_q, b_q_rest, k_buffer, k_rest_buffer, i_stage, K_MAIN, K_REST, BLOCK_N
                )
                mbarrier.wait(v_ready.index(i_before), parity_before)
                b_v = v_buffer.index(i_before)._reinterpret(dtype, [BLOCK_N, V_MAIN], tile)
                accumulator = warpgroup_mma(b_p, b_v, accumulator, is_async=True)
                b_s = warpgroup_mma_wait(1, deps=(b_s,))
                mbarrier.arrive(k_ready.index(STAGES + i_stage), count=1)
                i_key, nominal, _end = tile_of_step(i_step, span, BLOCK_N)
                b_next, running_max, running_sum, decay = _soften(
                    b_s, running_max, running_sum, b_lower, b_upper, i_key, nominal, scale_log2,
                    phase == 0, BLOCK_N,
                )  # fmt: skip
                b_next = gl.convert_layout(b_next.to(dtype), operand)
                # Long since passed; but it keeps ptxas from taking the exponentials after the
                # product that they are to overlap.
                mbarrier.wait(q_ready.index(i_rows), q_parity)
                accumulator, b_p = warpgroup_mma_wait(0, deps=(accumulator, b_next))
                mbarrier.arrive(v_ready.index(STAGES + i_before), count=1)
                accumulator *= gl.convert_layout(decay, out_row)[:, None]
        mbarrier.arrive(q_ready.index(ROW_STAGES + i_rows), count=1)
        mbarrier.wait(v_ready.index(i_stage), parity)
        b_v = v_buffer.index(i_stage)._reinterpret(dtype, [BLOCK_N, V_MAIN], tile)
        accumulator = warpgroup_mma(b_p, b_v, accumulator, is_async=True)
        accumulator = warpgroup_mma_wait(0, deps=(accumulator,))
        mbarrier.arrive(v_ready.index(STAGES + i_stage), count=1)
        i_stage, parity = next_stage(i_stage, parity, STAGES)
    else:
        mbarrier.arrive(q_ready.index(ROW_STAGES + i_rows), count=1)
        if TERMS:
            tma.store_wait(0)
            mbarrier.arrive(terms_ready.index(1), count=1)

    i_rows, q_parity = next_stage(i_rows, q_parity, ROW_STAGES)
    m_empty = running_sum == 0.0
    running_sum = gl.where(m_empty, 1.0, running_sum)
    b_lse = (running_max + gl.log2(running_sum)) * 0.6931471805599453
    b_lse = gl.where(m_empty, float("-inf"), b_lse)
    o_query = first + gl.arange(0, 64, row)
    o_row = (i_batch.to(gl.int64) * T + o_query) * H + i_head
    gl.store(lse + o_row, b_lse, mask=o_query < last)
    running_sum = gl.convert_layout(running_sum, out_row)
    return accumulator, running_sum, (i_stage, parity, i_rows, q_parity)


@gluon.jit
def _add_up(b_gates, b_first, b_second, b_out):
    """The gated sum of the three terms' rows, of which `b_out` is the last; rounded like it."""
    b_total = b_gates[0][:, None] * b_first.to(gl.float32)
    b_total += b_gates[1][:, None] * b_second.to(gl.float32)
    b_total += b_gates[2][:, None] * b_out.to(gl.float32)
    return b_total.to(b_out.dtype)
