"""The kernel of `selected` that goes by block, for Hopper, in Gluon: blocks of 64 tokens.

What it computes is what the Triton kernel of the same name does. Here the rows of the tiles after
this one are on their way while it is multiplied, and results leave through the shared memory that
the tile's rows came in, 16 bytes a thread.
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

from nsa_port.kernels.tables import Values
from nsa_port.kernels.triton.host import strides
from nsa_port.kernels.triton.lists_hopper import copy_rows, load_keys, load_work, store_partial

BLOCK_N = 64
_DIMS = ((64, 64), (128, 128), (192, 128))


def takes(q: Tensor, v: Tensor, values: Values) -> bool:
    """Whether the kernel can run on these tensors: it copies 16 bytes at a time, unchecked."""
    group = q.shape[2] // v.shape[2]
    if q.element_size() != 2 or (q.shape[-1], v.shape[-1]) not in _DIMS:
        return False
    if group > values["BLOCK_M"] or group & (group - 1):
        return False
    return q.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in strides(q))


def constants(q: Tensor, v: Tensor, values: Values) -> dict[str, int]:
    """The constants that this kernel takes where the Triton one has others."""
    key_dim, value_dim = q.shape[-1], v.shape[-1]
    return {
        "DIM_V": value_dim,
        "K_REST": key_dim - value_dim,
        "CLOSE": strides(q)[-1] in (0, key_dim),
        "BLOCK_M": values["BLOCK_M"],
        "STAGES": values["num_stages"],
        "num_warps": values["BLOCK_M"] // 16,
    }


@gluon.jit(do_not_specialize=["first_query", "T", "S", "B", "blocks", "bins", "stride_bounds"])
def _by_block_kernel(
    q,
    k,
    v,
    rows,
    upper,
    sequence,
    cu_keys,
    entries,
    starts,
    counts,
    segment_ends,
    work_bins,
    partial_out,
    partial_lse,
    scale_log2,
    first_query,
    T,
    S,
    B,
    HK,
    blocks,
    bins,
    stride_bounds,
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
    NEGATIVE_SCALE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    DIM_V: gl.constexpr,
    K_REST: gl.constexpr,
    BLOCK_M: gl.constexpr,
    CLOSE: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    """One program: one segment of a block's list against the block's keys.

    Whatever is left to be gone through by block is seen to the end by all who chose it (`EVEN` of
    `share_blocks`): nothing is masked. `CLOSE` says that heads lie side by side in memory.
    """
    MAIN: gl.constexpr = DIM_V
    DIM_K: gl.constexpr = MAIN + K_REST
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, MAIN, 16])
    OF_ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    QUERIES: gl.constexpr = BLOCK_M // G
    QUERY_WARPS: gl.constexpr = min(num_warps, QUERIES)
    ROWS: gl.constexpr = 256 // MAIN
    COPY: gl.constexpr = gl.BlockedLayout(
        [1, 1, 8], [ROWS // min(G, ROWS), min(G, ROWS), MAIN // 8],
        [QUERY_WARPS, num_warps // QUERY_WARPS, 1], [2, 1, 0],
    )  # fmt: skip
    COPY_REST: gl.constexpr = gl.BlockedLayout(
        [1, 1, 8], [4 // min(G, 4), min(G, 4), 8],
        [QUERY_WARPS, num_warps // QUERY_WARPS, 1], [2, 1, 0],
    )  # fmt: skip
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [ROWS, MAIN // 8], [num_warps, 1], [1, 0])
    LOAD_REST: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])

    i_bin, start, count, _ = load_work(
        gl.program_id(0), starts, counts, segment_ends, work_bins, bins, SEGMENT
    )
    if count == 0:
        return
    i_kv = (i_bin // blocks % HK).to(gl.int64)
    i_batch = (i_bin // blocks // HK).to(gl.int64)
    p_entries = entries + start
    entry = gl.load(p_entries)
    i_query = first_query + entry // SLOTS
    first_key = gl.load(rows + ((i_batch * T + i_query) * HK + i_kv) * SLOTS + entry % SLOTS)

    DTYPE: gl.constexpr = q.dtype.element_ty
    MAIN_SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, MAIN], DTYPE)
    REST_SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, 64], DTYPE)
    s_k = gl.allocate_shared_memory(DTYPE, [BLOCK_N, MAIN], MAIN_SHARED)
    s_v = gl.allocate_shared_memory(DTYPE, [BLOCK_N, MAIN], MAIN_SHARED)
    s_q = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, MAIN], MAIN_SHARED)
    s_k_rest, s_q_rest = s_k, s_q
    if K_REST:
        s_k_rest = gl.allocate_shared_memory(DTYPE, [BLOCK_N, 64], REST_SHARED)
        s_q_rest = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, 64], REST_SHARED)

    i_first = first_query.to(gl.int64)
    p_q = q + i_batch * stride_qb + i_first * stride_qt + i_kv * G * stride_qh
    p_partial = partial_out + (i_batch * HK + i_kv) * SLOTS * (G * DIM_V)
    p_lse = partial_lse + (i_batch * HK + i_kv) * SLOTS * G
    stride_out = B * HK * SLOTS * G
    for i_stage in gl.static_range(STAGES - 1):
        copy_rows(
            s_q.index(i_stage), p_q, p_entries, i_stage * QUERIES, count, stride_qt, stride_qh,
            SLOTS, G, DIM_K, COPY, CLOSE,
        )  # fmt: skip
        if K_REST:
            copy_rows(
                s_q_rest.index(i_stage), p_q + MAIN, p_entries, i_stage * QUERIES, count, stride_qt,
                stride_qh, SLOTS, G, DIM_K, COPY_REST, CLOSE,
            )  # fmt: skip
        async_copy.commit_group()
    p_k = k + i_batch * stride_kb + i_kv * stride_kh
    p_v = v + i_batch * stride_vb + i_kv * stride_vh
    o_key = first_key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, LOAD))
    s_k.store(load_keys(p_k, o_key.to(gl.int64) * stride_ks, o_key < S, MAIN, LOAD))
    s_v.store(load_keys(p_v, o_key.to(gl.int64) * stride_vs, o_key < S, MAIN, LOAD))
    if K_REST:
        o_key = first_key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, LOAD_REST))
        o_rest = o_key.to(gl.int64) * stride_ks
        s_k_rest.store(load_keys(p_k + MAIN, o_rest, o_key < S, 64, LOAD_REST))

    b_zeros = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout=SCORES)
    b_no_out = gl.zeros([BLOCK_M, MAIN], gl.float32, layout=SUMS)
    for i_tile in range(gl.cdiv(count, QUERIES)):
        i_entry = i_tile * QUERIES
        this = i_tile % STAGES
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        gl.thread_barrier()
        b_s = warpgroup_mma(
            s_q.index(this), s_k.permute((1, 0)), b_zeros, use_acc=False, is_async=True
        )
        if K_REST:
            b_s = warpgroup_mma(s_q_rest.index(this), s_k_rest.permute((1, 0)), b_s, is_async=True)
        # The buffer of the tile before this one: its rows, and its results, have left it.
        i_next = i_entry + (STAGES - 1) * QUERIES
        other = (i_tile + STAGES - 1) % STAGES
        copy_rows(
            s_q.index(other), p_q, p_entries, i_next, count, stride_qt, stride_qh, SLOTS, G, DIM_K,
            COPY, CLOSE,
        )  # fmt: skip
        if K_REST:
            copy_rows(
                s_q_rest.index(other), p_q + MAIN, p_entries, i_next, count, stride_qt, stride_qh,
                SLOTS, G, DIM_K, COPY_REST, CLOSE,
            )  # fmt: skip
        async_copy.commit_group()
        b_s = warpgroup_mma_wait(0, deps=[b_s])
        if NEGATIVE_SCALE:
            b_s = -b_s
        b_max = gl.max(b_s, 1) * scale_log2
        b_p = gl.exp2(b_s * scale_log2 - b_max[:, None])
        b_sum = gl.sum(b_p, 1)
        b_p = gl.convert_layout(b_p.to(DTYPE), gl.DotOperandLayout(0, SUMS, 2))
        b_out = warpgroup_mma(b_p, s_v, b_no_out, use_acc=False, is_async=True)
        o_row = gl.arange(0, BLOCK_M, layout=OF_ROW)
        o_entry = i_entry + o_row // G
        b_entry = gl.load(p_entries + gl.minimum(o_entry, count - 1))
        o_lse = (b_entry // SLOTS).to(gl.int64) * stride_out + b_entry % SLOTS * G + o_row % G
        gl.store(p_lse + o_lse, b_max + gl.log2(b_sum), mask=o_entry < count)
        # Named so that its registers keep what is being read from them.
        b_out, b_p = warpgroup_mma_wait(0, deps=[b_out, b_p])
        b_out /= gl.convert_layout(b_sum, gl.SliceLayout(1, SUMS))[:, None]
        # Both products of the tile are done in every warp: its rows make room for its results.
        gl.thread_barrier()
        s_q.index(this).store(b_out.to(DTYPE))
        gl.thread_barrier()
        store_partial(
            s_q.index(this), p_partial, p_entries, i_entry, count, stride_out * DIM_V, SLOTS, 1, G,
            DIM_V, COPY,
        )  # fmt: skip
    async_copy.wait_group(0)
