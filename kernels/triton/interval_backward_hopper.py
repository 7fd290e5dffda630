"""Gradients of attention over an interval of keys, written for Hopper's own instructions.

The same computations as `_interval_dq_kernel`, where a warpgroup has 64 queries, and as
`_interval_dkdv_kernel`, where it has 64 key rows.
"""

from __future__ import annotations

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

from nsa_port.kernels.tables import Values
from nsa_port.kernels.triton.bounds import Tiles, cut_tiles, key_ranges
from nsa_port.kernels.triton.hopper import (
    clean_rows,
    count_steps,
    describe,
    locate,
    next_stage,
    queries_and_heads,
    tile_of_step,
)
from nsa_port.kernels.triton.host import LOG2_E, multiprocessors, split_head, strides
from nsa_port.kernels.triton.interval_backward import Problem

KEYS = 128
"""Key rows of a program's tile of `dk, dv`, half of them each warpgroup's."""


def query_gradients(problem: Problem, dq: Tensor, add_dq: bool, values: Values) -> None:
    """Write `dq`, or add to it."""
    rows, q, k, v, bounds, layout, scale, gate = problem
    B, T, H, Dk = q.shape
    key, value = split_head(Dk), split_head(v.shape[3])
    block_n = values["BLOCK_N"]
    queries, heads = queries_and_heads(q, v.shape[2])
    tiles = cut_tiles(T, queries, layout.cu_seqlens)
    total = tiles.count * B * (H // heads)
    _hopper_dq_kernel[(min(total, multiprocessors(q.device)),)](
        describe(q, 64, key.main),
        describe(q, 64, key.rest),
        describe(rows.grad_out, 64, value.main),
        describe(k, block_n, key.main),
        describe(k, block_n, key.rest),
        describe(v, block_n, value.main),
        rows.lse_log2,
        rows.delta,
        gate,
        tiles.first,
        tiles.stop,
        bounds.lower,
        bounds.upper,
        key_ranges(bounds, tiles, queries, block_n),
        dq,
        scale * LOG2_E,
        scale,
        T,
        H,
        H // v.shape[2],
        tiles.count,
        total,
        bounds.stride,
        0 if bounds.stride == 0 else tiles.count * 4,
        ADD_DQ=add_dq,
        K_MAIN=key.main,
        K_REST=key.rest,
        V_MAIN=value.main,
        BLOCK_N=block_n,
        STAGES=values["num_stages"],
        ROW_STAGES=values["row_stages"],
        HEADS=heads,
        num_warps=values["num_warps"],
    )


def key_gradients(
    problem: Problem, keys: Tiles, ranges: Tensor, dk: Tensor, dv: Tensor, values: Values
) -> None:
    """Write `dk` and `dv`, `[splits, B, S, HK, D]`; `keys` are tiles of `KEYS` rows."""
    rows, q, k, v, bounds, _, scale, gate = problem
    T, H, Dk = q.shape[1:]
    B, S, HK, Dv = v.shape
    splits, block_m = dk.shape[0], values["BLOCK_M"]
    key = split_head(Dk)
    _hopper_dkdv_kernel[(keys.count * B * HK * splits,)](
        describe(q, block_m, key.main),
        describe(q, block_m, key.rest),
        describe(rows.grad_out, block_m, Dv),
        k,
        v,
        rows.lse_log2,
        rows.delta,
        gate,
        keys.first,
        keys.stop,
        bounds.lower,
        bounds.upper,
        ranges,
        dk,
        dv,
        scale * LOG2_E,
        scale,
        T,
        S,
        B,
        HK,
        H // HK,
        splits,
        bounds.stride,
        0 if bounds.stride == 0 else keys.count * 4,
        *strides(k),
        *strides(v),
        K_MAIN=key.main,
        K_REST=key.rest,
        V_MAIN=Dv,
        BLOCK_M=block_m,
        STAGES=values["num_stages"],
        num_warps=values["num_warps"],
    )


_LENGTHS = ["T", "S", "B", "splits", "stride_bounds", "stride_ranges"]


@gluon.jit(do_not_specialize=_LENGTHS)
def _hopper_dkdv_kernel(
    q_main,
    q_rest,
    grad_main,
    k,
    v,
    lse_log2,
    delta,
    gate,
    tile_first,
    tile_stop,
    lower,
    upper,
    ranges,
    dk,
    dv,
    scale_log2,
    scale,
    T,
    S,
    B,
    HK,
    G,
    splits,
    stride_bounds,
    stride_ranges,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    K_MAIN: gl.constexpr,
    K_REST: gl.constexpr,
    V_MAIN: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One program: `dk, dv` of 128 key rows from one part of the group's heads."""
    columns = B * HK * splits
    i_tile = gl.program_id(0) // columns
    i_split = gl.program_id(0) % columns % splits
    i_kv = (gl.program_id(0) % columns // splits % HK).to(gl.int64)
    i_batch = (gl.program_id(0) % columns // splits // HK).to(gl.int64)
    if tile_first is None:
        first = i_tile * 128
        last = gl.minimum(first + 128, S)
    else:
        first = gl.load(tile_first + i_tile)
        last = gl.load(tile_stop + i_tile)

    dtype: gl.constexpr = k.dtype.element_ty
    k_main = _load_keys(
        k + i_batch * stride_kb + i_kv * stride_kh, stride_ks, first, last, 0, K_MAIN
    )
    k_rest = k_main
    if K_REST:
        p_k = k + i_batch * stride_kb + i_kv * stride_kh
        k_rest = _load_keys(p_k, stride_ks, first, last, K_MAIN, K_REST)
    v_main = _load_keys(
        v + i_batch * stride_vb + i_kv * stride_vh, stride_vs, first, last, 0, V_MAIN
    )
    fence_async_shared()

    p_span = ranges + i_batch * stride_ranges + i_tile * 4
    start, full_start, stop = gl.load(p_span), gl.load(p_span + 1), gl.load(p_span + 3)
    full_stop = full_start + (gl.load(p_span + 2) - full_start) // BLOCK_M * BLOCK_M
    heads = G // splits
    i_head = (i_kv * G + i_split * heads).to(gl.int32)

    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=4)
    q_buffer = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_M, 1, K_MAIN], tile)
    q_rest_buffer = q_buffer
    if K_REST:
        q_rest_buffer = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_M, 1, K_REST], tile)
    grad_buffer = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_M, 1, V_MAIN], tile)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lse_buffer = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], flat)
    delta_buffer = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], flat)
    gate_buffer = lse_buffer
    if gate is not None:
        gate_buffer = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], flat)
    lower_buffer = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_M], flat)
    upper_buffer = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_M], flat)
    counter: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    # The last one is for tiles that are to be cleaned first, see `clean_rows`.
    full = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], counter)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], counter)
    mbarrier.init(full.index(STAGES), count=1)
    for i_stage in gl.static_range(STAGES):
        mbarrier.init(full.index(i_stage), count=1)
        mbarrier.init(empty.index(i_stage), count=2)
    fence_async_shared()

    o_stats = (i_batch * HK * G + i_head) * T
    p_lse = lse_log2 + o_stats
    p_gate = p_lse
    if gate is not None:
        p_gate = gate + o_stats
    q_tiles = (q_main, q_main)
    if K_REST:
        q_tiles = (q_main, q_rest)
    p_lower = lower + i_batch * stride_bounds
    p_upper = upper + i_batch * stride_bounds
    o_out = (i_split * B + i_batch) * S * HK + i_kv
    buffers = (
        q_buffer, q_rest_buffer, grad_buffer, lse_buffer, delta_buffer, gate_buffer,
        lower_buffer, upper_buffer,
    )  # fmt: skip
    span = (start, full_start, full_stop, stop)
    keys = (k_main, k_rest, v_main)
    outputs = (dk, dv, o_out, HK, scale)
    inputs = (q_tiles, grad_main, p_lse, delta + o_stats, p_gate)
    p_bounds = (p_lower, p_upper)
    where = (i_batch.to(gl.int32), i_head, T)
    GATED: gl.constexpr = gate is not None
    PACKED: gl.constexpr = tile_first is not None
    gl.warp_specialize(
        [
            (
                _consume_rows,
                (keys, buffers, full, empty, span, heads, first, last, outputs, scale_log2,
                 0, GATED, K_MAIN, K_REST, V_MAIN, BLOCK_M, STAGES),
            ),
            (
                _consume_rows,
                (keys, buffers, full, empty, span, heads, first, last, outputs, scale_log2,
                 1, GATED, K_MAIN, K_REST, V_MAIN, BLOCK_M, STAGES),
            ),
            (
                _fetch_rows,
                (inputs, p_bounds, buffers, full, empty, span, heads, where,
                 GATED, PACKED, K_MAIN, K_REST, V_MAIN, BLOCK_M, STAGES),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def _load_keys(p_base, stride, first, last, START: gl.constexpr, WIDTH: gl.constexpr):
    """Columns of 128 key rows in shared memory, a half for each warpgroup; 0 from `last` on."""
    dtype: gl.constexpr = p_base.dtype.element_ty
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    keys = gl.allocate_shared_memory(dtype, [2, 64, WIDTH], layout)
    lanes: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    for half in gl.static_range(2):
        o_key = first + half * 64 + gl.arange(0, 64, gl.SliceLayout(1, lanes))
        o_column = START + gl.arange(0, WIDTH, gl.SliceLayout(0, lanes))
        p_tile = p_base + o_key.to(gl.int64)[:, None] * stride + o_column[None, :]
        keys.index(half).store(gl.load(p_tile, mask=(o_key < last)[:, None], other=0.0))
    return keys


@gluon.jit
def _fetch_rows(
    inputs, p_bounds, buffers, full, empty, span, heads, where,
    GATED: gl.constexpr, PACKED: gl.constexpr, K_MAIN: gl.constexpr, K_REST: gl.constexpr,
    V_MAIN: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The fetching warp of `dk, dv`: fill the buffers of step after step as they become free."""
    q_tiles, grad_main, p_lse, p_delta, p_gate = inputs
    p_lower, p_upper = p_bounds
    q_buffer, q_rest_buffer, grad_buffer, lse_buffer, delta_buffer, gate_buffer = buffers[:6]
    lower_buffer, upper_buffer = buffers[6:]
    i_batch, i_head, T = where
    lanes: gl.constexpr = gl.BlockedLayout([BLOCK_M // 32], [32], [1], [0])
    i_stage, parity, copied = 0, 1, 0
    surplus = span[0] - (span[3] - BLOCK_M)
    masked, steps = count_steps(span, BLOCK_M)
    for phase in gl.static_range(2):
        for i_member in range(heads):
            for i_step in range(0 if phase == 0 else masked, masked if phase == 0 else steps):
                i_query, nominal, end = tile_of_step(i_step, span, BLOCK_M)
                o_query = i_query + gl.arange(0, BLOCK_M, lanes)
                m_row = (o_query >= nominal) & (o_query < end)
                o_stats = i_member * T + o_query
                b_lse = gl.load(p_lse + o_stats, mask=m_row, other=float("inf"))
                b_delta = gl.load(p_delta + o_stats, mask=m_row, other=0.0)
                b_gate = b_delta
                if GATED:
                    b_gate = gl.load(p_gate + o_stats, mask=m_row, other=0.0)
                b_lower, b_upper = o_query, o_query
                if phase == 0:
                    b_lower = gl.load(p_lower + o_query, mask=m_row, other=0)
                    b_upper = gl.load(p_upper + o_query, mask=m_row, other=0)
                mbarrier.wait(empty.index(i_stage), parity)
                lse_buffer.index(i_stage).store(b_lse)
                delta_buffer.index(i_stage).store(b_delta)
                if GATED:
                    gate_buffer.index(i_stage).store(b_gate)
                if phase == 0:
                    lower_buffer.index(i_stage).store(b_lower)
                    upper_buffer.index(i_stage).store(b_upper)
                gl.thread_barrier()
                i_barrier = i_stage
                if PACKED and phase == 0:
                    i_barrier = gl.where(surplus > 0, STAGES, i_stage)
                filled = full.index(i_barrier)
                mbarrier.expect(filled, 2 * BLOCK_M * (K_MAIN + K_REST + V_MAIN))
                o_tile = [i_batch, i_query, i_head + i_member, 0]
                tma.async_copy_global_to_shared(q_tiles[0], o_tile, filled, q_buffer.index(i_stage))
                tma.async_copy_global_to_shared(
                    grad_main, o_tile, filled, grad_buffer.index(i_stage)
                )
                if K_REST:
                    o_tile = [i_batch, i_query, i_head + i_member, K_MAIN]
                    tma.async_copy_global_to_shared(
                        q_tiles[1], o_tile, filled, q_rest_buffer.index(i_stage)
                    )
                if PACKED and phase == 0:  # noqa: SIM102 (one is known when the kernel is compiled)
                    if surplus > 0:
                        mbarrier.wait(filled, copied)
                        copied ^= 1
                        clean_rows(q_buffer.index(i_stage), surplus)
                        clean_rows(grad_buffer.index(i_stage), surplus)
                        if K_REST:
                            clean_rows(q_rest_buffer.index(i_stage), surplus)
                        mbarrier.arrive(full.index(i_stage), count=1)
                i_stage, parity = next_stage(i_stage, parity, STAGES)


@gluon.jit
def _consume_rows(
    keys, buffers, full, empty, span, heads, first, last, outputs, scale_log2,
    HALF: gl.constexpr, GATED: gl.constexpr, K_MAIN: gl.constexpr, K_REST: gl.constexpr,
    V_MAIN: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A multiplying warpgroup of `dk, dv`: its 64 key rows, in every step that is fetched."""
    k_main, k_rest, v_main = keys
    q_buffer, q_rest_buffer, grad_buffer, lse_buffer, delta_buffer, gate_buffer = buffers[:6]
    lower_buffer, upper_buffer = buffers[6:]
    dk, dv, o_out, HK, scale = outputs
    dtype: gl.constexpr = k_main.dtype
    by_query: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    by_key_dim: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K_MAIN, 16])
    by_value_dim: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V_MAIN, 16])
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    b_k, b_v = k_main.index(HALF), v_main.index(HALF)
    b_k_rest = k_rest.index(HALF)
    o_key = first + HALF * 64 + gl.arange(0, 64, gl.SliceLayout(1, by_query))
    b_dk = gl.zeros([64, K_MAIN], gl.float32, by_key_dim)
    b_dv = gl.zeros([64, V_MAIN], gl.float32, by_value_dim)
    rest: gl.constexpr = K_REST if K_REST else K_MAIN
    by_rest: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, rest, 16])
    b_dk_rest = gl.zeros([64, rest], gl.float32, by_rest)
    zeros = gl.zeros([64, BLOCK_M], gl.float32, by_query)
    i_stage, parity = 0, 0
    masked, steps = count_steps(span, BLOCK_M)
    for phase in gl.static_range(2):
        for _ in range(heads * (masked if phase == 0 else steps - masked)):
            mbarrier.wait(full.index(i_stage), parity)
            b_q = q_buffer.index(i_stage)._reinterpret(dtype, [BLOCK_M, K_MAIN], tile)
            b_q_rest = q_rest_buffer.index(i_stage)._reinterpret(dtype, [BLOCK_M, rest], tile)
            b_grad = grad_buffer.index(i_stage)._reinterpret(dtype, [BLOCK_M, V_MAIN], tile)
            # [64, BLOCK_M]
            b_s = warpgroup_mma(b_k, b_q.permute((1, 0)), zeros, use_acc=False, is_async=True)
            if K_REST:
                b_s = warpgroup_mma(b_k_rest, b_q_rest.permute((1, 0)), b_s, is_async=True)
            b_dp = warpgroup_mma(b_v, b_grad.permute((1, 0)), zeros, use_acc=False, is_async=True)
            b_lse = lse_buffer.index(i_stage).load(gl.SliceLayout(0, by_query))
            b_s = warpgroup_mma_wait(1, deps=(b_s,))
            b_p = gl.exp2(b_s * scale_log2 - b_lse[None, :])
            if phase == 0:
                b_lower = lower_buffer.index(i_stage).load(gl.SliceLayout(0, by_query))
                b_upper = upper_buffer.index(i_stage).load(gl.SliceLayout(0, by_query))
                m_seen = (o_key[:, None] >= b_lower[None, :]) & (o_key[:, None] < b_upper[None, :])
                b_p = gl.where(m_seen, b_p, 0.0)
            if GATED:
                b_gate = gate_buffer.index(i_stage).load(gl.SliceLayout(0, by_query))
                b_p *= b_gate[None, :]
            b_p16 = gl.convert_layout(b_p.to(dtype), gl.DotOperandLayout(0, by_value_dim, 2))
            b_dv = warpgroup_mma(b_p16, b_grad, b_dv, is_async=True)
            b_delta = delta_buffer.index(i_stage).load(gl.SliceLayout(0, by_query))
            b_dp = warpgroup_mma_wait(1, deps=(b_dp,))
            b_ds = (b_p * (b_dp - b_delta[None, :])).to(dtype)
            b_ds16 = gl.convert_layout(b_ds, gl.DotOperandLayout(0, by_key_dim, 2))
            b_dk = warpgroup_mma(b_ds16, b_q, b_dk, is_async=True)
            if K_REST:
                b_ds_rest = gl.convert_layout(b_ds, gl.DotOperandLayout(0, by_rest, 2))
                b_dk_rest = warpgroup_mma(b_ds_rest, b_q_rest, b_dk_rest, is_async=True)
                b_dk, b_dv, b_dk_rest = warpgroup_mma_wait(0, deps=(b_dk, b_dv, b_dk_rest))
            else:
                b_dk, b_dv = warpgroup_mma_wait(0, deps=(b_dk, b_dv))
            mbarrier.arrive(empty.index(i_stage), count=1)
            i_stage, parity = next_stage(i_stage, parity, STAGES)

    DIM_K: gl.constexpr = K_MAIN + K_REST
    _store(dk, b_dk * scale, o_out, HK, first + HALF * 64, last, 0, DIM_K, by_key_dim)
    _store(dv, b_dv, o_out, HK, first + HALF * 64, last, 0, V_MAIN, by_value_dim)
    if K_REST:
        _store(dk, b_dk_rest * scale, o_out, HK, first + HALF * 64, last, K_MAIN, DIM_K, by_rest)


@gluon.jit
def _store(
    p_base, b_tile, o_out, HK, first, last,
    START: gl.constexpr, DIM: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Store the key rows of a tile that exist."""
    o_key = first + gl.arange(0, b_tile.shape[0], gl.SliceLayout(1, layout))
    o_column = START + gl.arange(0, b_tile.shape[1], gl.SliceLayout(0, layout))
    o_row = (o_out + o_key.to(gl.int64) * HK) * DIM
    b_tile = b_tile.to(p_base.dtype.element_ty)
    p_tile = p_base + o_row[:, None] + o_column[None, :]
    gl.store(p_tile, b_tile, mask=(o_key < last)[:, None])


_DQ_LENGTHS = ["T", "tiles", "total", "stride_bounds", "stride_spans"]


@gluon.jit(do_not_specialize=_DQ_LENGTHS)
def _hopper_dq_kernel(
    q_main,
    q_rest,
    grad_main,
    k_main,
    k_rest,
    v_main,
    lse_log2,
    delta,
    gate,
    tile_first,
    tile_stop,
    lower,
    upper,
    spans,
    dq,
    scale_log2,
    scale,
    T,
    H,
    G,
    tiles,
    total,
    stride_bounds,
    stride_spans,
    ADD_DQ: gl.constexpr,
    K_MAIN: gl.constexpr,
    K_REST: gl.constexpr,
    V_MAIN: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    ROW_STAGES: gl.constexpr,
    HEADS: gl.constexpr,
):
    """One program of as many as the device has multiprocessors: every so manieth tile."""
    dtype: gl.constexpr = dq.dtype.element_ty
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=4)
    rest: gl.constexpr = K_REST if K_REST else K_MAIN
    q_buffer = gl.allocate_shared_memory(dtype, [2 * ROW_STAGES, 1, 64, 1, K_MAIN], tile)
    grad_buffer = gl.allocate_shared_memory(dtype, [2 * ROW_STAGES, 1, 64, 1, V_MAIN], tile)
    k_buffer = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_N, 1, K_MAIN], tile)
    v_buffer = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_N, 1, V_MAIN], tile)
    q_rest_buffer, k_rest_buffer = q_buffer, k_buffer
    q_tiles, k_tiles = (q_main, q_main), (k_main, k_main)
    if K_REST:
        q_rest_buffer = gl.allocate_shared_memory(dtype, [2 * ROW_STAGES, 1, 64, 1, rest], tile)
        k_rest_buffer = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_N, 1, rest], tile)
        q_tiles, k_tiles = (q_main, q_rest), (k_main, k_rest)
    counter: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    row_ready = gl.allocate_shared_memory(gl.int64, [2 * ROW_STAGES, 1], counter)
    # The last one is for tiles that are to be cleaned first, see `clean_rows`.
    key_ready = gl.allocate_shared_memory(gl.int64, [2 * STAGES + 1, 1], counter)
    mbarrier.init(key_ready.index(2 * STAGES), count=1)
    for i_stage in gl.static_range(ROW_STAGES):
        mbarrier.init(row_ready.index(i_stage), count=1)
        mbarrier.init(row_ready.index(ROW_STAGES + i_stage), count=2)
    for i_stage in gl.static_range(STAGES):
        mbarrier.init(key_ready.index(i_stage), count=1)
        mbarrier.init(key_ready.index(STAGES + i_stage), count=2)
    fence_async_shared()

    buffers = (q_buffer, q_rest_buffer, grad_buffer, k_buffer, k_rest_buffer, v_buffer)
    ready = (row_ready, key_ready)
    where = (tile_first, spans, stride_spans, T, H, G, tiles, total)
    rows = (lse_log2, delta, gate, lower, upper, stride_bounds, tile_stop)
    results = (dq, scale_log2, scale)
    gl.warp_specialize(
        [
            (
                _consume_dq,
                (buffers, ready, where, rows, results,
                 0, ADD_DQ, K_MAIN, K_REST, V_MAIN, BLOCK_N, STAGES, ROW_STAGES, HEADS),
            ),
            (
                _consume_dq,
                (buffers, ready, where, rows, results,
                 1, ADD_DQ, K_MAIN, K_REST, V_MAIN, BLOCK_N, STAGES, ROW_STAGES, HEADS),
            ),
            (
                _fetch_keys,
                (q_tiles, grad_main, k_tiles, v_main, buffers, ready, where,
                 K_MAIN, K_REST, V_MAIN, BLOCK_N, STAGES, ROW_STAGES, HEADS),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def _fetch_keys(
    q_tiles, grad_main, k_tiles, v_main, buffers, ready, where,
    K_MAIN: gl.constexpr, K_REST: gl.constexpr, V_MAIN: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    ROW_STAGES: gl.constexpr, HEADS: gl.constexpr,
):  # fmt: skip
    """The fetching warp of `dq`: fill every buffer as soon as it is free."""
    q_buffer, q_rest_buffer, grad_buffer, k_buffer, k_rest_buffer, v_buffer = buffers
    row_ready, key_ready = ready
    total = where[7]
    i_stage, parity, i_rows, row_parity, copied = 0, 1, 0, 1, 0
    for i_work in range(gl.program_id(0), total, gl.num_programs(0)):
        _i_tile, i_batch, i_head, i_kv, first, span = locate(i_work, where, HEADS)
        _masked, steps = count_steps(span, BLOCK_N)
        surplus = span[0] - (span[3] - BLOCK_N)
        mbarrier.wait(row_ready.index(ROW_STAGES + i_rows), row_parity)
        filled = row_ready.index(i_rows)
        mbarrier.expect(filled, 2 * 128 * (K_MAIN + K_REST + V_MAIN))
        for half in gl.static_range(2):
            i_row = first + half * 64 if HEADS == 1 else first
            i_member = i_head if HEADS == 1 else i_head + half
            o_tile, i_buffer = [i_batch, i_row, i_member, 0], 2 * i_rows + half
            tma.async_copy_global_to_shared(q_tiles[0], o_tile, filled, q_buffer.index(i_buffer))
            tma.async_copy_global_to_shared(grad_main, o_tile, filled, grad_buffer.index(i_buffer))
            if K_REST:
                o_tile = [i_batch, i_row, i_member, K_MAIN]
                tma.async_copy_global_to_shared(
                    q_tiles[1], o_tile, filled, q_rest_buffer.index(i_buffer)
                )
        i_rows, row_parity = next_stage(i_rows, row_parity, ROW_STAGES)
        for i_step in range(steps):
            i_key, _nominal, _end = tile_of_step(i_step, span, BLOCK_N)
            i_barrier = i_stage
            if where[0] is not None:
                i_barrier = gl.where(surplus > 0, 2 * STAGES, i_stage)
            filled = key_ready.index(i_barrier)
            mbarrier.wait(key_ready.index(STAGES + i_stage), parity)
            mbarrier.expect(filled, 2 * BLOCK_N * (K_MAIN + K_REST + V_MAIN))
            o_tile = [i_batch, i_key, i_kv, 0]
            tma.async_copy_global_to_shared(k_tiles[0], o_tile, filled, k_buffer.index(i_stage))
            tma.async_copy_global_to_shared(v_main, o_tile, filled, v_buffer.index(i_stage))
            if K_REST:
                tma.async_copy_global_to_shared(
                    k_tiles[1], [i_batch, i_key, i_kv, K_MAIN], filled,
                    k_rest_buffer.index(i_stage),
                )  # fmt: skip
            if where[0] is not None:  # noqa: SIM102 (one is known when the kernel is compiled)
                if surplus > 0:
                    mbarrier.wait(filled, copied)
                    copied ^= 1
                    clean_rows(k_buffer.index(i_stage), surplus)
                    if K_REST:
                        clean_rows(k_rest_buffer.index(i_stage), surplus)
                    mbarrier.arrive(key_ready.index(i_stage), count=1)
            i_stage, parity = next_stage(i_stage, parity, STAGES)


@gluon.jit
def _consume_dq(
    buffers, ready, where, rows, results,
    HALF: gl.constexpr, ADD_DQ: gl.constexpr,
    K_MAIN: gl.constexpr, K_REST: gl.constexpr, V_MAIN: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    ROW_STAGES: gl.constexpr, HEADS: gl.constexpr,
):  # fmt: skip
    """A multiplying warpgroup of `dq`: its 64 queries of every tile."""
    q_buffer, q_rest_buffer, grad_buffer, k_buffer, k_rest_buffer, v_buffer = buffers
    row_ready, key_ready = ready
    lse_log2, delta, gate, lower, upper, stride_bounds, tile_stop = rows
    dq, scale_log2, scale = results
    T, H, total = where[3], where[4], where[7]
    dtype: gl.constexpr = q_buffer.dtype
    rest: gl.constexpr = K_REST if K_REST else K_MAIN
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    by_key: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    by_dim: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K_MAIN, 16])
    by_rest: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, rest, 16])
    row: gl.constexpr = gl.SliceLayout(1, by_key)
    OFFSET: gl.constexpr = HALF * 64 if HEADS == 1 else 0
    zeros = gl.zeros([64, BLOCK_N], gl.float32, by_key)
    i_stage, parity, i_rows, row_parity = 0, 0, 0, 0
    for i_work in range(gl.program_id(0), total, gl.num_programs(0)):
        i_tile, i_batch, i_head, _i_kv, first, span = locate(i_work, where, HEADS)
        masked, steps = count_steps(span, BLOCK_N)
        if HEADS == 2:
            i_head += HALF
        last = gl.minimum(first + 128 // HEADS, T)
        if tile_stop is not None:
            last = gl.load(tile_stop + i_tile)
        o_query = first + OFFSET + gl.arange(0, 64, row)
        m_row = o_query < last
        b_lower = gl.load(lower + i_batch * stride_bounds + o_query, mask=m_row, other=0)
        b_upper = gl.load(upper + i_batch * stride_bounds + o_query, mask=m_row, other=0)
        o_stats = (i_batch * H + i_head) * T + o_query
        b_lse = gl.load(lse_log2 + o_stats, mask=m_row, other=float("inf"))
        b_delta = gl.load(delta + o_stats, mask=m_row, other=0.0)
        b_gate = b_delta
        if gate is not None:
            b_gate = gl.load(gate + o_stats, mask=m_row, other=0.0)
        b_dq = gl.zeros([64, K_MAIN], gl.float32, by_dim)
        b_dq_rest = gl.zeros([64, rest], gl.float32, by_rest)
        i_buffer = 2 * i_rows + HALF
        b_q = q_buffer.index(i_buffer)._reinterpret(dtype, [64, K_MAIN], tile)
        b_q_rest = q_rest_buffer.index(i_buffer)._reinterpret(dtype, [64, rest], tile)
        b_grad = grad_buffer.index(i_buffer)._reinterpret(dtype, [64, V_MAIN], tile)
        mbarrier.wait(row_ready.index(i_rows), row_parity)
        for phase in gl.static_range(2):
            for i_step in range(0 if phase == 0 else masked, masked if phase == 0 else steps):
                mbarrier.wait(key_ready.index(i_stage), parity)
                b_k = k_buffer.index(i_stage)._reinterpret(dtype, [BLOCK_N, K_MAIN], tile)
                b_k_rest = k_rest_buffer.index(i_stage)._reinterpret(dtype, [BLOCK_N, rest], tile)
                b_v = v_buffer.index(i_stage)._reinterpret(dtype, [BLOCK_N, V_MAIN], tile)
                b_s = warpgroup_mma(b_q, b_k.permute((1, 0)), zeros, use_acc=False, is_async=True)
                if K_REST:
                    b_s = warpgroup_mma(b_q_rest, b_k_rest.permute((1, 0)), b_s, is_async=True)
                b_dp = warpgroup_mma(
                    b_grad, b_v.permute((1, 0)), zeros, use_acc=False, is_async=True
                )
                b_s = warpgroup_mma_wait(1, deps=(b_s,))
                b_p = gl.exp2(b_s * scale_log2 - b_lse[:, None])
                if gate is not None:
                    b_p *= b_gate[:, None]
                b_dp = warpgroup_mma_wait(0, deps=(b_dp,))
                b_ds = b_p * (b_dp - b_delta[:, None])
                if phase == 0:
                    i_key, nominal, _end = tile_of_step(i_step, span, BLOCK_N)
                    o_key = i_key + gl.arange(0, BLOCK_N, gl.SliceLayout(0, by_key))
                    b_first = gl.maximum(b_lower, nominal)
                    m_seen = (o_key[None, :] >= b_first[:, None]) & (
                        o_key[None, :] < b_upper[:, None]
                    )
                    b_ds = gl.where(m_seen, b_ds, 0.0)
                b_ds = b_ds.to(dtype)
                b_left = gl.convert_layout(b_ds, gl.DotOperandLayout(0, by_dim, 2))
                b_dq = warpgroup_mma(b_left, b_k, b_dq, is_async=True)
                if K_REST:
                    b_left_rest = gl.convert_layout(b_ds, gl.DotOperandLayout(0, by_rest, 2))
                    b_dq_rest = warpgroup_mma(b_left_rest, b_k_rest, b_dq_rest, is_async=True)
                    b_dq, b_dq_rest = warpgroup_mma_wait(0, deps=(b_dq, b_dq_rest))
                else:
                    b_dq = warpgroup_mma_wait(0, deps=(b_dq,))
                mbarrier.arrive(key_ready.index(STAGES + i_stage), count=1)
                i_stage, parity = next_stage(i_stage, parity, STAGES)
        mbarrier.arrive(row_ready.index(ROW_STAGES + i_rows), count=1)
        i_rows, row_parity = next_stage(i_rows, row_parity, ROW_STAGES)
        o_out = ((i_batch.to(gl.int64) * T + first + OFFSET) * H + i_head) * (K_MAIN + K_REST)
        m_seeing = b_lower < b_upper
        count = last - first - OFFSET
        stride = H * (K_MAIN + K_REST)
        _store_dq(dq + o_out, b_dq * scale, m_seeing, count, stride, ADD_DQ)
        if K_REST:
            _store_dq(dq + o_out + K_MAIN, b_dq_rest * scale, m_seeing, count, stride, ADD_DQ)


@gluon.jit
def _store_dq(p_base, b_tile, m_seeing, count, stride, ADD_DQ: gl.constexpr):
    """Store, or add, the rows of a tile that exist; 0 where a row sees nothing."""
    width: gl.constexpr = b_tile.shape[1]
    own: gl.constexpr = b_tile.type.layout
    m_seeing = gl.convert_layout(m_seeing, gl.SliceLayout(1, own))
    b_tile = gl.where(m_seeing[:, None], b_tile, 0.0)
    if ADD_DQ:
        o_row = gl.arange(0, 64, gl.SliceLayout(1, own))
        o_column = gl.arange(0, width, gl.SliceLayout(0, own))
        p_tile = p_base + (o_row.to(gl.int64) * stride)[:, None] + o_column[None, :]
        b_tile += gl.load(p_tile, mask=(o_row < count)[:, None], other=0.0).to(gl.float32)
    lanes: gl.constexpr = gl.BlockedLayout([1, 8], [256 // width, width // 8], [4, 1], [1, 0])
    b_tile = gl.convert_layout(b_tile.to(p_base.dtype.element_ty), lanes)
    o_row = gl.arange(0, 64, gl.SliceLayout(1, lanes))
    o_column = gl.arange(0, width, gl.SliceLayout(0, lanes))
    p_tile = p_base + (o_row.to(gl.int64) * stride)[:, None] + o_column[None, :]
    gl.store(p_tile, b_tile, mask=(o_row < count)[:, None])
