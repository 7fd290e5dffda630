"""The backward kernel of `selected_backward` for Hopper, in Gluon: 16-bit types, tiles of 128 rows.

What it computes, and its arguments, are those of the Triton kernel of the same name. Here the order
of the work is ours: the rows of the tile after the next are on their way, and the products of the
next tile are being computed, while this tile's `dq` is written. Two groups of four warps share a
block's keys; what passes between them, and `dq` on its way out, goes through shared memory.

`s_` names are tiles in shared memory, `t_` products that are still being computed.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsa_port.kernels.triton.host import strides
from nsa_port.kernels.triton.lists_hopper import (
    copy_rows,
    find_block,
    load_keys,
    load_work,
    store_block,
    store_partial,
)

BLOCK_N = 64
_BLOCK_M = 128
_DIMS = ((64, 64), (128, 128), (192, 128))


def takes(grad_out: Tensor, q: Tensor, v: Tensor) -> bool:
    """Whether the kernel can run on these tensors: it copies 16 bytes at a time, unchecked."""
    group = q.shape[2] // v.shape[2]
    if q.element_size() != 2 or (q.shape[-1], v.shape[-1]) not in _DIMS:
        return False
    if group > _BLOCK_M or group & (group - 1):
        return False
    return all(
        tensor.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in strides(tensor))
        for tensor in (grad_out, q)
    )


def constants(grad_out: Tensor, q: Tensor) -> dict[str, int]:
    """The constants that this kernel takes where the Triton one has others."""
    key_dim, value_dim = q.shape[-1], grad_out.shape[-1]
    close = strides(q)[-1] in (0, key_dim) and strides(grad_out)[-1] in (0, value_dim)
    dims = {"DIM_V": value_dim, "K_REST": key_dim - value_dim}
    return {**dims, "CLOSE": close, "BLOCK_M": _BLOCK_M, "num_warps": 8}


@gluon.jit
def _copy_tile(
    s_q, s_q_rest, s_grad, s_lse, s_delta, s_gate, s_upper, p_q, p_grad, p_lse, p_delta, p_gate,
    p_upper, p_entries, slot, i_entry, count, HK, stride_qt, stride_qh, stride_gt, stride_gh,
    SLOTS: gl.constexpr, G: gl.constexpr, DIM_K: gl.constexpr, COPY: gl.constexpr,
    COPY_REST: gl.constexpr, LINE: gl.constexpr, CLOSE: gl.constexpr,
):  # fmt: skip
    """Start copying all that belongs to a tile. Past the list's end that is its last entry."""
    DIM_V: gl.constexpr = s_grad.shape[2]
    copy_rows(
        s_q.index(slot), p_q, p_entries, i_entry, count, stride_qt, stride_qh, SLOTS, G, DIM_K,
        COPY, CLOSE,
    )  # fmt: skip
    if s_q_rest is not None:
        copy_rows(
            s_q_rest.index(slot), p_q + DIM_V, p_entries, i_entry, count, stride_qt, stride_qh,
            SLOTS, G, DIM_K, COPY_REST, CLOSE,
        )  # fmt: skip
    copy_rows(
        s_grad.index(slot), p_grad, p_entries, i_entry, count, stride_gt, stride_gh, SLOTS, G,
        DIM_V, COPY, CLOSE,
    )  # fmt: skip
    o_row = i_entry * G + gl.arange(0, s_lse.shape[1], layout=LINE)
    o_local = gl.load(p_entries + gl.minimum(o_row // G, count - 1)) // SLOTS
    o_statistics = o_local.to(gl.int64) * (HK * G) + o_row % G
    async_copy.async_copy_global_to_shared(s_lse.index(slot), p_lse + o_statistics)
    async_copy.async_copy_global_to_shared(s_delta.index(slot), p_delta + o_statistics)
    if p_gate is not None:
        async_copy.async_copy_global_to_shared(s_gate.index(slot), p_gate + o_statistics)
    # Masked, and so filled with 0: rows past the list's end see nothing.
    p_upper = p_upper + o_local
    async_copy.async_copy_global_to_shared(s_upper.index(slot), p_upper, mask=o_row < count * G)
    async_copy.commit_group()


@gluon.jit
def _start_scores(s_k, s_k_rest, s_v, s_q, s_q_rest, s_grad, slot, b_zeros):
    """Start `q @ k.T` and `grad_out @ v.T` of a tile, transposed: `[BLOCK_N, BLOCK_M]`."""
    s_q_tile = s_q.index(slot).permute((1, 0))
    t_s = warpgroup_mma(s_k, s_q_tile, b_zeros, use_acc=False, is_async=True)
    if s_q_rest is not None:
        t_s = warpgroup_mma(s_k_rest, s_q_rest.index(slot).permute((1, 0)), t_s, is_async=True)
    s_grad_tile = s_grad.index(slot).permute((1, 0))
    t_dp = warpgroup_mma(s_v, s_grad_tile, b_zeros, use_acc=False, is_async=True)
    return t_s, t_dp


@gluon.jit
def _probabilities(b_s, s_lse, s_upper, s_gate, slot, b_key, scale_log2, GATED: gl.constexpr):
    """What `exp2` and the gate make of a tile's scores."""
    OF_ROW: gl.constexpr = gl.SliceLayout(0, b_s.type.layout)
    b_p = gl.exp2(b_s * scale_log2 - s_lse.index(slot).load(OF_ROW)[None, :])
    b_p = gl.where(b_key[:, None] < s_upper.index(slot).load(OF_ROW)[None, :], b_p, 0.0)
    if GATED:
        b_p *= s_gate.index(slot).load(OF_ROW)[None, :]
    return b_p


_LENGTHS = ["first_query", "T", "S", "B", "blocks", "bins", "stride_bounds"]


@gluon.jit(do_not_specialize=_LENGTHS)
def _by_block_backward_kernel(
    grad_out,
    q,
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
    partial_dq,
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
    BLOCK_M: gl.constexpr,
    CLOSE: gl.constexpr,
):
    """One program: one segment of a block's list against `BLOCK_N` of the block's keys.

    `CLOSE` says that heads lie side by side in memory.
    """
    MAIN: gl.constexpr = DIM_V
    DIM_K: gl.constexpr = MAIN + K_REST
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, BLOCK_M // 2, 16]
    )
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, MAIN // 2, 16]
    )
    SUMS_REST: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, 32, 16]
    )
    DQ: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, MAIN, 16]
    )
    DQ_REST: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, 64, 16]
    )
    OF_ROW: gl.constexpr = gl.SliceLayout(0, SCORES)
    # 16 bytes a thread; a warp's rows are of one query where the group is wide enough.
    QUERIES: gl.constexpr = BLOCK_M // G
    QUERY_WARPS: gl.constexpr = min(8, QUERIES)
    ROWS: gl.constexpr = 256 // MAIN
    COPY: gl.constexpr = gl.BlockedLayout(
        [1, 1, 8], [ROWS // min(G, ROWS), min(G, ROWS), MAIN // 8],
        [QUERY_WARPS, 8 // QUERY_WARPS, 1], [2, 1, 0],
    )  # fmt: skip
    COPY_REST: gl.constexpr = gl.BlockedLayout(
        [1, 1, 8], [4 // min(G, 4), min(G, 4), 8], [QUERY_WARPS, 8 // QUERY_WARPS, 1], [2, 1, 0]
    )
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [ROWS, MAIN // 8], [8, 1], [1, 0])
    LOAD_REST: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    # With a rest there is no room, in registers and in shared memory, to be a tile ahead.
    AHEAD: gl.constexpr = K_REST == 0

    i_part = gl.program_id(0) % PARTS
    i_work = gl.program_id(0) // PARTS
    i_bin, start, count, _ = load_work(
        i_work, starts, counts, segment_ends, work_bins, bins, SEGMENT
    )
    if count == 0:
        return
    i_kv = (i_bin // blocks % HK).to(gl.int64)
    i_batch = (i_bin // blocks // HK).to(gl.int64)
    p_entries = entries + start
    first_key, stop = find_block(
        p_entries, i_batch, i_kv, rows, sequence, cu_keys, first_query, T, S, HK, stride_bounds,
        SLOTS, SELECT,
    )  # fmt: skip
    first_key += i_part * BLOCK_N

    DTYPE: gl.constexpr = q.dtype.element_ty
    MAIN_SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, MAIN], DTYPE)
    REST_SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, 64], DTYPE)
    P_SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], DTYPE)
    LINE_SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    s_k = gl.allocate_shared_memory(DTYPE, [BLOCK_N, MAIN], MAIN_SHARED)
    s_v = gl.allocate_shared_memory(DTYPE, [BLOCK_N, MAIN], MAIN_SHARED)
    s_q = gl.allocate_shared_memory(DTYPE, [2, BLOCK_M, MAIN], MAIN_SHARED)
    s_grad = gl.allocate_shared_memory(DTYPE, [2, BLOCK_M, MAIN], MAIN_SHARED)
    s_ds = gl.allocate_shared_memory(DTYPE, [BLOCK_N, BLOCK_M], P_SHARED)
    s_p = s_ds
    if AHEAD:
        s_p = gl.allocate_shared_memory(DTYPE, [BLOCK_N, BLOCK_M], P_SHARED)
    if K_REST:
        s_k_rest = gl.allocate_shared_memory(DTYPE, [BLOCK_N, 64], REST_SHARED)
        s_q_rest = gl.allocate_shared_memory(DTYPE, [2, BLOCK_M, 64], REST_SHARED)
    else:
        s_k_rest = None
        s_q_rest = None
    s_lse = gl.allocate_shared_memory(gl.float32, [2, BLOCK_M], LINE_SHARED)
    s_delta = gl.allocate_shared_memory(gl.float32, [2, BLOCK_M], LINE_SHARED)
    s_upper = gl.allocate_shared_memory(gl.int32, [2, BLOCK_M], LINE_SHARED)
    if gate is None:
        s_gate = s_lse
    else:
        s_gate = gl.allocate_shared_memory(gl.float32, [2, BLOCK_M], LINE_SHARED)

    p_k = k + i_batch * stride_kb + i_kv * stride_kh
    p_v = v + i_batch * stride_vb + i_kv * stride_vh
    o_key = first_key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, LOAD))
    s_k.store(load_keys(p_k, o_key.to(gl.int64) * stride_ks, o_key < stop, MAIN, LOAD))
    s_v.store(load_keys(p_v, o_key.to(gl.int64) * stride_vs, o_key < stop, MAIN, LOAD))
    if K_REST:
        o_key = first_key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, LOAD_REST))
        o_row = o_key.to(gl.int64) * stride_ks
        s_k_rest.store(load_keys(p_k + MAIN, o_row, o_key < stop, 64, LOAD_REST))
    fence_async_shared()

    i_first = first_query.to(gl.int64)
    p_q = q + i_batch * stride_qb + i_first * stride_qt + i_kv * G * stride_qh
    p_grad = grad_out + i_batch * stride_gb + i_first * stride_gt + i_kv * G * stride_gh
    p_upper = upper + i_batch * stride_bounds + first_query
    o_statistics = ((i_batch * T + i_first) * HK + i_kv) * G
    p_lse = lse_log2 + o_statistics
    p_delta = delta + o_statistics
    p_gate = None if gate is None else gate + o_statistics
    p_partial = partial_dq + ((i_batch * HK + i_kv) * SLOTS * PARTS + i_part) * (G * DIM_K)

    _copy_tile(
        s_q, s_q_rest, s_grad, s_lse, s_delta, s_gate, s_upper, p_q, p_grad, p_lse, p_delta,
        p_gate, p_upper, p_entries, 0, 0, count, HK, stride_qt, stride_qh,
        stride_gt, stride_gh, SLOTS, G, DIM_K, COPY, COPY_REST, LINE, CLOSE,
    )  # fmt: skip
    if AHEAD:
        _copy_tile(
            s_q, s_q_rest, s_grad, s_lse, s_delta, s_gate, s_upper, p_q, p_grad, p_lse, p_delta,
            p_gate, p_upper, p_entries, 1, QUERIES, count, HK, stride_qt, stride_qh,
            stride_gt, stride_gh, SLOTS, G, DIM_K, COPY, COPY_REST, LINE, CLOSE,
        )  # fmt: skip
    b_dk = gl.zeros([BLOCK_N, MAIN], gl.float32, layout=SUMS)
    b_dv = gl.zeros([BLOCK_N, MAIN], gl.float32, layout=SUMS)
    if K_REST:
        b_dk_rest = gl.zeros([BLOCK_N, 64], gl.float32, layout=SUMS_REST)
        b_no_rest = gl.zeros([BLOCK_M, 64], gl.float32, layout=DQ_REST)
    b_zeros = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout=SCORES)
    b_no_dq = gl.zeros([BLOCK_M, MAIN], gl.float32, layout=DQ)
    # Keys past the block are seen by nobody.
    b_key = first_key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, SCORES))
    b_key = gl.where(b_key < stop, b_key, 2147483647)
    stride_out = B * HK * SLOTS * PARTS * G * DIM_K
    if AHEAD:
        async_copy.wait_group(1)
        gl.thread_barrier()
        t_s, t_dp = _start_scores(s_k, s_k_rest, s_v, s_q, s_q_rest, s_grad, 0, b_zeros)
        b_s = warpgroup_mma_wait(1, deps=[t_s])
        b_p = _probabilities(b_s, s_lse, s_upper, s_gate, 0, b_key, scale_log2, gate is not None)
        b_dp = warpgroup_mma_wait(0, deps=[t_dp])
    for i_tile in range(gl.cdiv(count, QUERIES)):
        i_entry = i_tile * QUERIES
        this = i_tile % 2
        other = 1 - this
        s_q_tile, s_grad_tile = s_q.index(this), s_grad.index(this)
        if not AHEAD:
            async_copy.wait_group(0)
            gl.thread_barrier()
            t_s, t_dp = _start_scores(s_k, s_k_rest, s_v, s_q, s_q_rest, s_grad, this, b_zeros)
            _copy_tile(
                s_q, s_q_rest, s_grad, s_lse, s_delta, s_gate, s_upper, p_q, p_grad, p_lse, p_delta,
                p_gate, p_upper, p_entries, other, i_entry + QUERIES, count, HK, stride_qt,
                stride_qh, stride_gt, stride_gh, SLOTS, G, DIM_K, COPY, COPY_REST, LINE, CLOSE,
            )  # fmt: skip
            b_s = warpgroup_mma_wait(1, deps=[t_s])
            b_p = _probabilities(
                b_s, s_lse, s_upper, s_gate, this, b_key, scale_log2, gate is not None
            )
        s_p.store(b_p.to(DTYPE))
        if not AHEAD:
            fence_async_shared()
            gl.thread_barrier()
            t_dv = warpgroup_mma(s_p, s_grad_tile, b_dv, is_async=True)
            b_dp = warpgroup_mma_wait(1, deps=[t_dp])
        b_delta = s_delta.index(this).load(OF_ROW) * scale
        b_ds = (b_p * (b_dp * scale - b_delta[None, :])).to(DTYPE)
        if not AHEAD:
            b_dv = warpgroup_mma_wait(0, deps=[t_dv])
            gl.thread_barrier()
        s_ds.store(b_ds)
        if AHEAD:
            async_copy.wait_group(0)
        fence_async_shared()
        gl.thread_barrier()
        if AHEAD:
            t_dv = warpgroup_mma(s_p, s_grad_tile, b_dv, is_async=True)
        t_dq = warpgroup_mma(s_ds.permute((1, 0)), s_k, b_no_dq, use_acc=False, is_async=True)
        t_dk = warpgroup_mma(s_ds, s_q_tile, b_dk, is_async=True)
        if AHEAD:
            t_s, t_dp = _start_scores(s_k, s_k_rest, s_v, s_q, s_q_rest, s_grad, other, b_zeros)
            b_dv, b_dq = warpgroup_mma_wait(3, deps=[t_dv, t_dq])
            gl.thread_barrier()
        else:
            s_q_end = s_q_rest.index(this)
            t_dq_rest = warpgroup_mma(
                s_ds.permute((1, 0)), s_k_rest, b_no_rest, use_acc=False, is_async=True
            )
            t_dk_rest = warpgroup_mma(s_ds, s_q_end, b_dk_rest, is_async=True)
            b_dq = warpgroup_mma_wait(3, deps=[t_dq])
        # The tile's rows of `grad_out` have been used, and make room for those of `dq`.
        s_grad_tile.store(b_dq.to(DTYPE))
        store_partial(
            s_grad_tile, p_partial, p_entries, i_entry, count, stride_out, SLOTS, PARTS, G, DIM_K,
            COPY,
        )  # fmt: skip
        if AHEAD:
            b_dk = warpgroup_mma_wait(2, deps=[t_dk])
            gl.thread_barrier()
            _copy_tile(
                s_q, s_q_rest, s_grad, s_lse, s_delta, s_gate, s_upper, p_q, p_grad, p_lse, p_delta,
                p_gate, p_upper, p_entries, this, i_entry + 2 * QUERIES, count, HK, stride_qt,
                stride_qh, stride_gt, stride_gh, SLOTS, G, DIM_K, COPY, COPY_REST, LINE, CLOSE,
            )  # fmt: skip
            b_s = warpgroup_mma_wait(1, deps=[t_s])
            b_p = _probabilities(
                b_s, s_lse, s_upper, s_gate, other, b_key, scale_log2, gate is not None
            )
            b_dp = warpgroup_mma_wait(0, deps=[t_dp])
        else:
            b_dk, b_dq_rest, b_dk_rest = warpgroup_mma_wait(0, deps=[t_dk, t_dq_rest, t_dk_rest])
            gl.thread_barrier()
            s_q_end.store(b_dq_rest.to(DTYPE))
            store_partial(
                s_q_end, p_partial + MAIN, p_entries, i_entry, count, stride_out, SLOTS, PARTS, G,
                DIM_K, COPY_REST,
            )  # fmt: skip
    async_copy.wait_group(0)

    # Found again rather than kept in registers all along.
    i_bin = gl.load(work_bins + i_work)
    i_kv = (i_bin // blocks % HK).to(gl.int64)
    i_batch = (i_bin // blocks // HK).to(gl.int64)
    if not K_REST:
        b_dk_rest = b_dk
    store_block(
        b_dk, b_dk_rest, b_dv, b_key, i_batch, i_kv, i_part, i_work, starts, counts, segment_ends,
        work_bins, long_ends, partial_dkdv, dk, dv, S, HK, bins, PARTS, SEGMENT, K_REST,
    )  # fmt: skip
