"""The backward kernel of `selected_backward` for Hopper, for groups of many heads, in Gluon.

What it computes, and its arguments, are those of the Triton kernel of the same name. Two programs
share a multiprocessor, so that one multiplies while the other takes exponentials. In each, two
warps bring rows of `q` and of `grad_out` for the tile after this one, and a third takes away those
of `dq`: the four warps that multiply wait for nothing but each other and what has arrived.

`s_` names are tiles in shared memory, `t_` products that are still being computed.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa_port.kernels.triton.hopper import describe, next_stage
from nsa_port.kernels.triton.interval import is_addressable
from nsa_port.kernels.triton.lists_hopper import find_block, load_keys, load_work, store_block

BLOCK_N = 64
_LEAST_GROUP = 8
"""The heads of a query are copied at a time, to 8 rows of shared memory or a multiple."""

_SHAPES = {(64, 64): (64, 3), (128, 128): (64, 2), (192, 128): (32, 3)}
"""Key and value dimension -> rows of a tile, and for how many tiles there is room.

As many as two programs' registers and shared memory hold.
"""


def takes(grad_out: Tensor, q: Tensor, v: Tensor) -> bool:
    """Whether the kernel can run on these tensors."""
    group = q.shape[2] // v.shape[2]
    if q.element_size() != 2 or (q.shape[-1], v.shape[-1]) not in _SHAPES:
        return False
    rows, _ = _SHAPES[q.shape[-1], v.shape[-1]]
    if group < _LEAST_GROUP or rows % group:
        return False
    return is_addressable(grad_out) and is_addressable(q)


def described(
    grad_out: Tensor, q: Tensor, partial_dq: Tensor
) -> tuple[TensorDescriptor, TensorDescriptor, TensorDescriptor]:
    """The tensors as what is copied at a time: 64 columns of one query's heads, or partial `dq`."""
    G, Dk = partial_dq.shape[-2:]
    partials = partial_dq.view(-1, G, Dk)
    shape = list(partials.shape)
    layout = gl.NVMMASharedLayout(128, 16, rank=3)
    return (
        describe(grad_out, 1, 64, G),
        describe(q, 1, 64, G),
        TensorDescriptor(partials, shape, [G * Dk, Dk, 1], [1, G, 64], layout),
    )


def constants(grad_out: Tensor, q: Tensor) -> dict[str, int]:
    """The constants that this kernel takes where the Triton one has others."""
    key_dim, value_dim = q.shape[-1], grad_out.shape[-1]
    rows, stages = _SHAPES[key_dim, value_dim]
    return {
        "DIM_V": value_dim,
        "K_REST": key_dim - value_dim,
        "ROWS": rows,
        "STAGES": stages,
        "num_warps": 4,
        "maxnreg": 128,
    }


_LENGTHS = ["first_query", "T", "S", "B", "blocks", "bins", "stride_bounds"]


@gluon.jit(do_not_specialize=_LENGTHS)
def _by_block_backward_kernel(
    grad_tiles,
    q_tiles,
    k,
    v,
    lse_log2,
    delta,
    gate,
    rows,
    upper,
    sequence,
    cu_keys,
    entries,
    starts,
    counts,
    segment_ends,
    work_bins,
    long_ends,
    partial_tiles,
    partial_dkdv,
    dk,
    dv,
    scale_log2,
    scale,
    first_query,
    T,
    S,
    B,
    HK,
    blocks,
    bins,
    stride_bounds,
    stride_gb,
    stride_gt,
    stride_gh,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    G: gl.constexpr,
    SLOTS: gl.constexpr,
    SELECT: gl.constexpr,
    PARTS: gl.constexpr,
    SEGMENT: gl.constexpr,
    BLOCK_N: gl.constexpr,
    DIM_V: gl.constexpr,
    K_REST: gl.constexpr,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One program: one segment of a block's list against `BLOCK_N` of the block's keys."""
    i_part = gl.program_id(0) % PARTS
    i_work = gl.program_id(0) // PARTS
    i_bin, start, count, _ = load_work(
        i_work, starts, counts, segment_ends, work_bins, bins, SEGMENT
    )
    if count == 0:
        return
    i_kv = i_bin // blocks % HK
    i_batch = i_bin // blocks // HK

    DTYPE: gl.constexpr = k.dtype.element_ty
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, ROWS], DTYPE)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    s_k = gl.allocate_shared_memory(DTYPE, [1, BLOCK_N, DIM_V], TILE)
    s_v = gl.allocate_shared_memory(DTYPE, [1, BLOCK_N, DIM_V], TILE)
    s_q = gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, DIM_V], TILE)
    s_grad = gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, DIM_V], TILE)
    s_k_rest, s_q_rest = s_k, s_q
    if K_REST:
        s_k_rest = gl.allocate_shared_memory(DTYPE, [1, BLOCK_N, K_REST], TILE)
        s_q_rest = gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, K_REST], TILE)
    s_ds = gl.allocate_shared_memory(DTYPE, [1, BLOCK_N, ROWS], DS)
    s_lse = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], FLAT)
    s_delta = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], FLAT)
    s_upper = gl.allocate_shared_memory(gl.int32, [STAGES, ROWS], FLAT)
    s_gate = s_lse
    if gate is not None:
        s_gate = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], FLAT)
    # Of `q` and of `grad_out`: a tile's rows have arrived; their place is free again. `dq` has
    # arrived in the place of the latter.
    filled = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], FLAT)
    free = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], FLAT)
    used = gl.allocate_shared_memory(gl.int64, [STAGES, 1], FLAT)
    for i_stage in gl.static_range(STAGES):
        # Each lane of the fetching warp says so of what it copied itself, the TMA of its part.
        mbarrier.init(filled.index(i_stage), count=33)
        mbarrier.init(filled.index(STAGES + i_stage), count=33)
        mbarrier.init(used.index(i_stage), count=1)
    for i_stage in gl.static_range(2 * STAGES):
        mbarrier.init(free.index(i_stage), count=1)
    fence_async_shared()

    keys = (s_k, s_k_rest, s_v, s_ds)
    buffers = (s_q, s_q_rest, s_grad, s_lse, s_delta, s_gate, s_upper)
    barriers = (filled, free, used)
    where = (i_batch, i_kv, i_part, count, first_query, B, HK)
    p_entries = entries + start
    gl.warp_specialize(
        [
            (
                _multiply,
                (keys, buffers, barriers, k, v, gate, rows, sequence, cu_keys,
                 starts, counts, segment_ends, work_bins, long_ends, partial_dkdv, dk, dv,
                 scale_log2, scale, T, S, blocks, bins, stride_bounds,
                 stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
                 i_work, p_entries, where, G, SLOTS, SELECT, PARTS, SEGMENT, STAGES, K_REST),
            ),
            (
                _fetch_queries,
                (q_tiles, lse_log2, gate, upper, p_entries, buffers, barriers, where, T,
                 stride_bounds, G, SLOTS, STAGES, K_REST),
            ),
            (
                _fetch_gradients,
                (grad_tiles, delta, p_entries, buffers, barriers, where, T, G, SLOTS, STAGES),
            ),
            (
                _take_away,
                (partial_tiles, p_entries, buffers, barriers, where, G, SLOTS, PARTS, STAGES,
                 K_REST),
            ),
        ],
        [1, 1, 1],
        [24, 24, 24],
    )  # fmt: skip


@gluon.jit
def _pieces(s_rows, G: gl.constexpr):
    """A tile as what is copied at a time: pieces of 64 columns, and in these one of each query."""
    ROWS: gl.constexpr = s_rows.shape[0]
    COUNT: gl.constexpr = s_rows.shape[1] // 64 * (ROWS // G)
    PIECE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=4)
    return s_rows._reinterpret(s_rows.dtype, [COUNT, 1, 1, G, 64], PIECE)


@gluon.jit
def _entries(p_entries, i_entry, count, QUERIES: gl.constexpr):
    """A tile's entries, those past the list's end being its last."""
    entries = ()
    for i_piece in gl.static_range(QUERIES):
        entry = gl.load(p_entries + gl.minimum(i_entry + i_piece, count - 1))
        entries += (entry,)  # type: ignore[assignment]
    return entries


@gluon.jit
def _line_offsets(p_entries, i_entry, where, T, G: gl.constexpr, QUERIES: gl.constexpr,
                  SLOTS: gl.constexpr):  # fmt: skip
    """Where the numbers of a tile's rows are, one of each row; 16 bytes are a lane's."""
    i_batch, i_kv, _, count, first_query, _, HK = where
    LINE: gl.constexpr = gl.BlockedLayout([1, 4], [128 // G, G // 4], [1, 1], [1, 0])
    o_entry = i_entry + gl.arange(0, QUERIES, gl.SliceLayout(1, LINE))
    o_local = gl.load(p_entries + gl.minimum(o_entry, count - 1)) // SLOTS
    o_first = ((i_batch.to(gl.int64) * T + first_query) * HK + i_kv) * G
    o_member = gl.arange(0, G, gl.SliceLayout(0, LINE))[None, :]
    return o_first + (o_local.to(gl.int64) * (HK * G))[:, None] + o_member


@gluon.jit
def _fetch_queries(
    q_tiles, lse_log2, gate, upper, p_entries, buffers, barriers, where, T, stride_bounds,
    G: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr, K_REST: gl.constexpr,
):  # fmt: skip
    """A fetching warp: fill each stage with rows of `q`, and what the scores need, once free."""
    s_q, s_q_rest, _, s_lse, _, s_gate, s_upper = buffers
    filled, free, _ = barriers
    i_batch, i_kv, _, count, first_query, _, _ = where
    ROWS: gl.constexpr = s_q.shape[1]
    DIM_V: gl.constexpr = s_q.shape[2]
    QUERIES: gl.constexpr = ROWS // G
    SINGLE: gl.constexpr = gl.BlockedLayout([1, 1], [32 // min(G, 32), min(G, 32)], [1, 1], [1, 0])
    p_upper = upper + i_batch.to(gl.int64) * stride_bounds + first_query
    i_stage, parity = 0, 1
    for i_entry in range(0, count, QUERIES):
        o_line = _line_offsets(p_entries, i_entry, where, T, G, QUERIES, SLOTS)
        o_entry = i_entry + gl.arange(0, QUERIES, gl.SliceLayout(1, SINGLE))
        o_local = gl.load(p_entries + gl.minimum(o_entry, count - 1)) // SLOTS
        o_none = gl.zeros([QUERIES, G], gl.int32, SINGLE)
        mbarrier.wait(free.index(i_stage), parity)
        s_line = s_lse.index(i_stage).reshape((QUERIES, G))
        async_copy.async_copy_global_to_shared(s_line, lse_log2 + o_line)
        if gate is not None:
            s_line = s_gate.index(i_stage).reshape((QUERIES, G))
            async_copy.async_copy_global_to_shared(s_line, gate + o_line)
        # Masked, and so filled with 0: rows past the list's end see nothing.
        s_line = s_upper.index(i_stage).reshape((QUERIES, G))
        m_line = (o_entry < count)[:, None] & (o_none == 0)
        async_copy.async_copy_global_to_shared(
            s_line, p_upper + (o_local[:, None] + o_none), mask=m_line
        )
        arrived = filled.index(i_stage)
        async_copy.mbarrier_arrive(arrived, increment_count=False)
        mbarrier.expect(arrived, 2 * ROWS * (DIM_V + K_REST))
        for i_piece in range(QUERIES):
            entry = gl.load(p_entries + gl.minimum(i_entry + i_piece, count - 1))
            i_query = first_query + entry // SLOTS
            for panel in gl.static_range(DIM_V // 64):
                s_piece = _pieces(s_q.index(i_stage), G).index(panel * QUERIES + i_piece)
                at = [i_batch, i_query, i_kv * G, panel * 64]
                tma.async_copy_global_to_shared(q_tiles, at, arrived, s_piece)
            for panel in gl.static_range(K_REST // 64):
                s_piece = _pieces(s_q_rest.index(i_stage), G).index(panel * QUERIES + i_piece)
                at = [i_batch, i_query, i_kv * G, DIM_V + panel * 64]
                tma.async_copy_global_to_shared(q_tiles, at, arrived, s_piece)
        i_stage, parity = next_stage(i_stage, parity, STAGES)


@gluon.jit
def _fetch_gradients(
    grad_tiles, delta, p_entries, buffers, barriers, where, T,
    G: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A fetching warp: fill each stage with rows of `grad_out` and their `delta`, once free."""
    s_grad, s_delta = buffers[2], buffers[4]
    filled, free, _ = barriers
    i_batch, i_kv, _, count, first_query, _, _ = where
    ROWS: gl.constexpr = s_grad.shape[1]
    DIM_V: gl.constexpr = s_grad.shape[2]
    QUERIES: gl.constexpr = ROWS // G
    i_stage, parity = 0, 1
    for i_entry in range(0, count, QUERIES):
        o_line = _line_offsets(p_entries, i_entry, where, T, G, QUERIES, SLOTS)
        mbarrier.wait(free.index(STAGES + i_stage), parity)
        s_line = s_delta.index(i_stage).reshape((QUERIES, G))
        async_copy.async_copy_global_to_shared(s_line, delta + o_line)
        arrived = filled.index(STAGES + i_stage)
        async_copy.mbarrier_arrive(arrived, increment_count=False)
        mbarrier.expect(arrived, 2 * ROWS * DIM_V)
        for i_piece in range(QUERIES):
            entry = gl.load(p_entries + gl.minimum(i_entry + i_piece, count - 1))
            i_query = first_query + entry // SLOTS
            for panel in gl.static_range(DIM_V // 64):
                s_piece = _pieces(s_grad.index(i_stage), G).index(panel * QUERIES + i_piece)
                at = [i_batch, i_query, i_kv * G, panel * 64]
                tma.async_copy_global_to_shared(grad_tiles, at, arrived, s_piece)
        i_stage, parity = next_stage(i_stage, parity, STAGES)


@gluon.jit
def _take_away(
    partial_tiles, p_entries, buffers, barriers, where, G: gl.constexpr, SLOTS: gl.constexpr,
    PARTS: gl.constexpr, STAGES: gl.constexpr, K_REST: gl.constexpr,
):  # fmt: skip
    """The warp that copies each tile's `dq` to the places of its entries' slots."""
    s_grad, s_q_rest = buffers[2], buffers[1]
    _, free, used = barriers
    i_batch, i_kv, i_part, count, _, B, HK = where
    ROWS: gl.constexpr = s_grad.shape[1]
    DIM_V: gl.constexpr = s_grad.shape[2]
    QUERIES: gl.constexpr = ROWS // G
    i_stage, parity = 0, 0
    for i_entry in range(0, count, QUERIES):
        tile_entries = _entries(p_entries, i_entry, count, QUERIES)
        mbarrier.wait(used.index(i_stage), parity)
        for i_piece in gl.static_range(QUERIES):
            if i_entry + i_piece < count:
                entry = tile_entries[i_piece]
                i_out = (entry // SLOTS * B + i_batch) * HK + i_kv
                i_out = (i_out * SLOTS + entry % SLOTS) * PARTS + i_part
                for panel in gl.static_range(DIM_V // 64):
                    s_piece = _pieces(s_grad.index(i_stage), G).index(panel * QUERIES + i_piece)
                    s_piece = s_piece.reshape((1, G, 64))
                    tma.async_copy_shared_to_global(partial_tiles, [i_out, 0, panel * 64], s_piece)
                for panel in gl.static_range(K_REST // 64):
                    s_piece = _pieces(s_q_rest.index(i_stage), G).index(panel * QUERIES + i_piece)
                    s_piece = s_piece.reshape((1, G, 64))
                    tma.async_copy_shared_to_global(
                        partial_tiles, [i_out, 0, DIM_V + panel * 64], s_piece
                    )
        tma.store_wait(0)
        mbarrier.arrive(free.index(STAGES + i_stage), count=1)
        if K_REST:
            mbarrier.arrive(free.index(i_stage), count=1)
        i_stage, parity = next_stage(i_stage, parity, STAGES)


@gluon.jit
def _multiply(
    keys, buffers, barriers, k, v, gate, rows, sequence, cu_keys,
    starts, counts, segment_ends, work_bins, long_ends, partial_dkdv, dk, dv, scale_log2, scale,
    T, S, blocks, bins, stride_bounds,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    i_work, p_entries, where,
    G: gl.constexpr, SLOTS: gl.constexpr, SELECT: gl.constexpr, PARTS: gl.constexpr,
    SEGMENT: gl.constexpr, STAGES: gl.constexpr, K_REST: gl.constexpr,
):  # fmt: skip
    """The multiplying warps: `dk` and `dv` of a segment, and `dq` in place of `grad_out`."""
    s_q, s_q_rest, s_grad, s_lse, s_delta, s_gate, s_upper = buffers
    filled, free, used = barriers
    i_batch, i_kv, i_part, count, first_query, _, HK = where
    s_k, s_k_rest, s_v, s_ds = _operands(keys, 0)
    DTYPE: gl.constexpr = s_k.dtype
    BLOCK_N: gl.constexpr = s_k.shape[0]
    DIM_V: gl.constexpr = s_v.shape[1]
    REST: gl.constexpr = s_k_rest.shape[1]
    ROWS: gl.constexpr = s_q.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM_V, 16])
    SUMS_REST: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, REST, 16])
    OF_ROW: gl.constexpr = gl.SliceLayout(0, SCORES)
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM_V, DIM_V // 8], [4, 1], [1, 0])
    LOAD_REST: gl.constexpr = gl.BlockedLayout([1, 8], [256 // REST, REST // 8], [4, 1], [1, 0])

    i_batch = i_batch.to(gl.int64)
    i_kv = i_kv.to(gl.int64)
    first_key, stop = find_block(
        p_entries, i_batch, i_kv, rows, sequence, cu_keys, first_query, T, S, HK, stride_bounds,
        SLOTS, SELECT,
    )  # fmt: skip
    first_key += i_part * BLOCK_N
    p_k = k + i_batch * stride_kb + i_kv * stride_kh
    p_v = v + i_batch * stride_vb + i_kv * stride_vh
    o_key = first_key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, LOAD))
    s_k.store(load_keys(p_k, o_key.to(gl.int64) * stride_ks, o_key < stop, DIM_V, LOAD))
    s_v.store(load_keys(p_v, o_key.to(gl.int64) * stride_vs, o_key < stop, DIM_V, LOAD))
    if K_REST:
        o_key = first_key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, LOAD_REST))
        o_row = o_key.to(gl.int64) * stride_ks
        s_k_rest.store(load_keys(p_k + DIM_V, o_row, o_key < stop, K_REST, LOAD_REST))
    fence_async_shared()
    gl.thread_barrier()

    b_dk = gl.zeros([BLOCK_N, DIM_V], gl.float32, SUMS)
    b_dv = gl.zeros([BLOCK_N, DIM_V], gl.float32, SUMS)
    b_dk_rest = gl.zeros([BLOCK_N, REST], gl.float32, SUMS_REST)
    b_zeros = gl.zeros([BLOCK_N, ROWS], gl.float32, SCORES)
    # Keys past the block are seen by nobody.
    b_key = first_key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, SCORES))
    b_key = gl.where(b_key < stop, b_key, 2147483647)
    i_stage, parity = 0, 0
    for _ in range(gl.cdiv(count, ROWS // G)):
        s_q_tile, s_grad_tile = s_q.index(i_stage), s_grad.index(i_stage)
        s_q_end = s_q_rest.index(i_stage)
        # Always 0, which the compiler cannot know: it would compute the addresses of all parts of
        # these before the loop, and keep them in registers.
        s_k, s_k_rest, s_v, s_ds = _operands(keys, i_stage // STAGES)
        mbarrier.wait(filled.index(i_stage), parity)
        # [BLOCK_N, ROWS]
        t_s = warpgroup_mma(s_k, s_q_tile.permute((1, 0)), b_zeros, use_acc=False, is_async=True)
        if K_REST:
            t_s = warpgroup_mma(s_k_rest, s_q_end.permute((1, 0)), t_s, is_async=True)
        mbarrier.wait(filled.index(STAGES + i_stage), parity)
        t_dp = warpgroup_mma(
            s_v, s_grad_tile.permute((1, 0)), b_zeros, use_acc=False, is_async=True
        )
        b_s = warpgroup_mma_wait(1, deps=[t_s])
        b_lse = s_lse.index(i_stage).load(OF_ROW)
        b_upper = s_upper.index(i_stage).load(OF_ROW)
        b_p = gl.exp2(b_s * scale_log2 - b_lse[None, :])
        b_p = gl.where(b_key[:, None] < b_upper[None, :], b_p, 0.0)
        if gate is not None:
            b_p *= s_gate.index(i_stage).load(OF_ROW)[None, :]
        b_p_left = gl.convert_layout(b_p.to(DTYPE), gl.DotOperandLayout(0, SUMS, 2))
        t_dv = warpgroup_mma(b_p_left, s_grad_tile, b_dv, is_async=True)
        b_delta = s_delta.index(i_stage).load(OF_ROW) * scale
        b_dp = warpgroup_mma_wait(1, deps=[t_dp])
        b_ds = (b_p * (b_dp * scale - b_delta[None, :])).to(DTYPE)
        s_ds.store(b_ds)
        # Behind the barrier, the tile's rows of `grad_out` make room for those of `dq`.
        b_dv = warpgroup_mma_wait(0, deps=[t_dv])
        fence_async_shared()
        gl.thread_barrier()
        # 64 columns at a time: all at once would not fit in the registers.
        t_dq = _start_dq(s_k.slice(0, 64, dim=1), s_ds)
        b_left = gl.convert_layout(b_ds, gl.DotOperandLayout(0, SUMS, 2))
        t_dk = warpgroup_mma(b_left, s_q_tile, b_dk, is_async=True)
        if K_REST:
            b_left = gl.convert_layout(b_ds, gl.DotOperandLayout(0, SUMS_REST, 2))
            t_dk_rest = warpgroup_mma(b_left, s_q_end, b_dk_rest, is_async=True)
            b_dq = warpgroup_mma_wait(2, deps=[t_dq])
            _store_dq(s_grad_tile.slice(0, 64, dim=1), b_dq)
            t_dq = _start_dq(s_k.slice(64, 64, dim=1), s_ds)
            t_dq_rest = _start_dq(s_k_rest, s_ds)
            b_dk, b_dk_rest, b_dq = warpgroup_mma_wait(1, deps=[t_dk, t_dk_rest, t_dq])
            _store_dq(s_grad_tile.slice(64, 64, dim=1), b_dq)
            b_dq = warpgroup_mma_wait(0, deps=[t_dq_rest])
            gl.thread_barrier()
            _store_dq(s_q_end, b_dq)
        else:
            b_dq = warpgroup_mma_wait(1, deps=[t_dq])
            _store_dq(s_grad_tile.slice(0, 64, dim=1), b_dq)
            if DIM_V > 64:
                t_dq = _start_dq(s_k.slice(64, 64, dim=1), s_ds)
                b_dk, b_dq = warpgroup_mma_wait(0, deps=[t_dk, t_dq])
                _store_dq(s_grad_tile.slice(64, 64, dim=1), b_dq)
            else:
                b_dk = warpgroup_mma_wait(0, deps=[t_dk])
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(used.index(i_stage), count=1)
        if not K_REST:
            mbarrier.arrive(free.index(i_stage), count=1)
        i_stage, parity = next_stage(i_stage, parity, STAGES)

    store_block(
        b_dk, b_dk_rest, b_dv, b_key, i_batch, i_kv, i_part, i_work, starts, counts, segment_ends,
        work_bins, long_ends, partial_dkdv, dk, dv, S, HK, bins, PARTS, SEGMENT, K_REST,
    )  # fmt: skip


@gluon.jit
def _operands(keys, i_buffer):
    """The tiles of `k`, `v` and `ds`, of which there is one each."""
    s_k, s_k_rest, s_v, s_ds = keys
    return s_k.index(i_buffer), s_k_rest.index(i_buffer), s_v.index(i_buffer), s_ds.index(i_buffer)


@gluon.jit
def _start_dq(s_k, s_ds):
    """Start `ds.T @ k` of 64 columns; its transpose where that has too few rows for a product."""
    ROWS: gl.constexpr = s_ds.shape[1]
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, min(ROWS, 64), 16])
    if ROWS < 64:
        b_zeros = gl.zeros([64, ROWS], gl.float32, DQ)
        return warpgroup_mma(s_k.permute((1, 0)), s_ds, b_zeros, use_acc=False, is_async=True)
    else:
        b_zeros = gl.zeros([ROWS, 64], gl.float32, DQ)
        return warpgroup_mma(s_ds.permute((1, 0)), s_k, b_zeros, use_acc=False, is_async=True)


@gluon.jit
def _store_dq(s_rows, b_dq):
    """Put what `_start_dq` computed into rows of shared memory."""
    if s_rows.shape[0] < 64:
        s_rows.permute((1, 0)).store(b_dq.to(s_rows.dtype))
    else:
        s_rows.store(b_dq.to(s_rows.dtype))
