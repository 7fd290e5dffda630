"""Attention over the blocks that each query chose, in two designs.

By query: one program gathers a query's blocks and attends with the heads of a group as rows. Keys
are loaded once per query, which suits few queries and wide groups.

By block: one program keeps a block's keys and gathers the queries that chose it, so that keys are
loaded once per segment of the block's list. Each (query, block) gives a normalised partial output
and its lse; a second kernel merges them in the order of the slots. Queries are worked on a bounded
number at a time, which bounds the partial outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_port.kernels.geometry import Layout, NSAConfig
from nsa_port.kernels.triton.bounds import Kind, QueryBounds, query_bounds
from nsa_port.kernels.triton.host import (
    LOG2_E,
    arch_of,
    launch_options,
    on_device_of,
    split_arguments,
    split_head,
    strides,
    tuned,
)
from nsa_port.kernels.triton.lists import block_keys, block_lists, block_rows, load_work
from nsa_port.kernels.triton.selected_tiles import by_tile, tile_values
from nsa_port.kernels.triton.tiles import LOG_2, dot, dot_split, load_rows, store_rows

PARTIAL_BYTES = 2**31
"""Room for the partial results of the queries that are worked on at a time."""


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    config: NSAConfig,
    layout: Layout,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One softmax over all visible tokens of the chosen blocks (Eq. 11, 12). `out, lse`."""
    with on_device_of(q):
        bounds = query_bounds(Kind.CAUSAL, q.shape[1], k.shape[1], config, layout, q.device)
        return attend_selected(q, k, v, indices, bounds, config, layout, scale)


def attend_selected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    bounds: QueryBounds,
    config: NSAConfig,
    layout: Layout,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`selected_attention` with the causal bounds at hand, on the current device."""
    B, T, H, Dk = q.shape
    HK, Dv = v.shape[2:]
    out = torch.empty((B, T, H, Dv), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, T, H), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    values = tile_values(q, v)
    if values is not None:
        by_tile(q, k, v, indices, bounds, config, layout, scale, values, out, lse)
        return out, lse
    rows = block_rows(indices, bounds, config.select_block_size)
    tuned_block = tuned(arch_of(q), "selected_by_block", q.element_size(), Dk, Dv)
    if tuned_block["largest_group"] >= H // HK and tuned_block["fewest_queries"] <= T:
        _by_block(q, k, v, rows, bounds, config, layout, scale, tuned_block, out, lse)
    else:
        _by_query(q, k, v, rows, bounds, config, scale, out, lse)
    return out, lse


def _by_query(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    bounds: QueryBounds,
    config: NSAConfig,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    B, T, H, Dk = q.shape
    HK, Dv = v.shape[2:]
    G = H // HK
    heads = min(64, max(16, triton.next_power_of_2(G)))
    _by_query_kernel[(T * B * HK * triton.cdiv(G, heads),)](
        q,
        k,
        v,
        rows,
        bounds.upper,
        out,
        lse,
        abs(scale) * LOG2_E,
        T,
        B,
        HK,
        G,
        bounds.stride,
        *strides(q),
        *strides(k),
        *strides(v),
        SLOTS=config.num_selected,
        SELECT=config.select_block_size,
        HEADS=heads,
        NEGATIVE_SCALE=scale < 0,
        **split_arguments(split_head(Dk), split_head(Dv)),
        **tuned(arch_of(q), "selected_by_query", q.element_size(), Dk, Dv),
    )


def _by_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    bounds: QueryBounds,
    config: NSAConfig,
    layout: Layout,
    scale: float,
    tuned_block: dict[str, int],
    out: Tensor,
    lse: Tensor,
) -> None:
    B, T, H, Dk = q.shape
    S, HK, Dv = v.shape[1:]
    G, n = H // HK, config.num_selected
    block_n = min(tuned_block["BLOCK_N"], max(16, triton.next_power_of_2(config.select_block_size)))
    parts = triton.cdiv(config.select_block_size, block_n)
    chunk = query_chunk(T, B * H * n * parts * (Dv * q.element_size() + 4))
    partial_shape = (chunk, B, HK, n * parts, G)
    partial_out = torch.empty((*partial_shape, Dv), dtype=q.dtype, device=q.device)
    partial_lse = torch.empty(partial_shape, dtype=torch.float32, device=q.device)
    cu_keys = None if layout.cu_seqlens_k is None else layout.cu_seqlens_k.contiguous()
    sequences = 1 if cu_keys is None else cu_keys.shape[0] - 1
    heads = split_arguments(split_head(Dk), split_head(Dv))
    for first in range(0, T, chunk):
        count = min(chunk, T - first)
        lists = block_lists(
            rows, bounds, S, sequences, config.select_block_size, first, count,
            tuned_block["segment"],
        )  # fmt: skip
        _by_block_kernel[(lists.work * parts,)](
            q,
            k,
            v,
            rows,
            bounds.upper,
            bounds.sequence,
            cu_keys,
            lists.entries,
            lists.starts,
            lists.counts,
            lists.segment_ends,
            lists.work_bins,
            partial_out,
            partial_lse,
            abs(scale) * LOG2_E,
            first,
            T,
            S,
            B,
            HK,
            lists.blocks,
            lists.bins,
            bounds.stride,
            *strides(q),
            *strides(k),
            *strides(v),
            G=G,
            SLOTS=n,
            SELECT=config.select_block_size,
            PARTS=parts,
            SEGMENT=tuned_block["segment"],
            NEGATIVE_SCALE=scale < 0,
            **heads,
            BLOCK_M=tuned_block["BLOCK_M"],
            BLOCK_N=block_n,
            **launch_options(tuned_block),
        )
        _merge_kernel[(count * B * HK,)](
            partial_out,
            partial_lse,
            rows,
            out,
            lse,
            first,
            T,
            B,
            HK,
            G=G,
            HEADS=triton.next_power_of_2(G),
            SLOTS=n,
            PARTS=parts,
            DIM_V=Dv,
            WIDTH=triton.next_power_of_2(Dv),
            num_warps=4,
        )


def query_chunk(num_queries: int, bytes_per_query: int) -> int:
    """How many queries to work on at a time so that their partial results fit, in equal parts."""
    most = max(64, PARTIAL_BYTES // bytes_per_query)
    return triton.cdiv(num_queries, triton.cdiv(num_queries, most))


@triton.jit(do_not_specialize=["T", "B", "stride_bounds"])
def _by_query_kernel(
    q,
    k,
    v,
    rows,
    upper,
    out,
    lse,
    scale_log2,
    T,
    B,
    HK,
    G,
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
    SLOTS: tl.constexpr,
    SELECT: tl.constexpr,
    HEADS: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr,
    DIM_K: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_REST: tl.constexpr,
    DIM_V: tl.constexpr,
    V_MAIN: tl.constexpr,
    V_REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: `HEADS` heads of one query and KV head, over all slots.

    The loop has no branch, which would keep Triton from overlapping loads with arithmetic: tokens
    that are not to be seen are masked.
    """
    head_tiles = tl.cdiv(G, HEADS)
    i_query = tl.program_id(0) // (B * HK * head_tiles)
    i_batch = (tl.program_id(0) // (HK * head_tiles) % B).to(tl.int64)
    i_kv = (tl.program_id(0) // head_tiles % HK).to(tl.int64)
    o_member = tl.program_id(0) % head_tiles * HEADS + tl.arange(0, HEADS)
    m_row = o_member < G
    o_head = i_kv * G + o_member

    p_q = q + i_batch * stride_qb + i_query.to(tl.int64) * stride_qt
    b_q = load_rows(p_q, o_head * stride_qh, m_row, 0, K_MAIN, DIM_K, True)
    b_q_rest = b_q
    if K_REST:
        b_q_rest = load_rows(p_q, o_head * stride_qh, m_row, K_MAIN, K_REST, DIM_K, True)
    if NEGATIVE_SCALE:
        b_q, b_q_rest = -b_q, -b_q_rest
    stop = tl.load(upper + i_batch * stride_bounds + i_query)
    o_query = i_batch * T + i_query
    p_rows = rows + (o_query * HK + i_kv) * SLOTS
    p_k = k + i_batch * stride_kb + i_kv * stride_kh
    p_v = v + i_batch * stride_vb + i_kv * stride_vh

    running_max = tl.full([HEADS], float("-inf"), tl.float32)
    running_sum = tl.zeros([HEADS], tl.float32)
    accumulator = tl.zeros([HEADS, V_MAIN], tl.float32)
    accumulator_rest = tl.zeros([HEADS, V_REST if V_REST else 1], tl.float32)
    for i_token in range(0, SLOTS * SELECT, BLOCK_N):
        if SELECT % BLOCK_N == 0:
            i_row = tl.load(p_rows + i_token // SELECT)
            o_key = i_row + i_token % SELECT + tl.arange(0, BLOCK_N)
            m_key = (i_row >= 0) & (o_key < stop)
        else:
            o_token = i_token + tl.arange(0, BLOCK_N)
            b_row = tl.load(p_rows + o_token // SELECT, mask=o_token < SLOTS * SELECT, other=-1)
            o_key = b_row + o_token % SELECT
            m_key = (b_row >= 0) & (o_key < stop)
        o_k = o_key.to(tl.int64) * stride_ks
        b_k = load_rows(p_k, o_k, m_key, 0, K_MAIN, DIM_K, True)
        b_k_rest = b_k
        if K_REST:
            b_k_rest = load_rows(p_k, o_k, m_key, K_MAIN, K_REST, DIM_K, True)
        # [HEADS, BLOCK_N]
        b_s = dot_split(b_q, b_q_rest, b_k, b_k_rest, K_REST)
        b_s = tl.where(m_key[None, :], b_s * scale_log2, float("-inf"))
        next_max = tl.maximum(running_max, tl.max(b_s, 1))
        shift = tl.where(next_max == float("-inf"), 0.0, next_max)
        b_p = tl.exp2(b_s - shift[:, None])
        decay = tl.exp2(running_max - shift)
        running_max = next_max
        running_sum = running_sum * decay + tl.sum(b_p, 1)
        o_v = o_key.to(tl.int64) * stride_vs
        b_v = load_rows(p_v, o_v, m_key, 0, V_MAIN, DIM_V, True)
        accumulator = dot(b_p.to(b_v.dtype), b_v, accumulator * decay[:, None])
        if V_REST:
            b_v = load_rows(p_v, o_v, m_key, V_MAIN, V_REST, DIM_V, True)
            accumulator_rest = dot(b_p.to(b_v.dtype), b_v, accumulator_rest * decay[:, None])

    m_empty = running_sum == 0.0
    running_sum = tl.where(m_empty, 1.0, running_sum)
    b_lse = tl.where(m_empty, float("-inf"), (running_max + tl.log2(running_sum)) * LOG_2)
    o_out = o_query * HK * G + o_head
    tl.store(lse + o_out, b_lse, mask=m_row)
    o_out *= DIM_V
    store_rows(out, accumulator / running_sum[:, None], o_out, m_row, 0, V_MAIN, DIM_V)
    if V_REST:
        b_out = accumulator_rest / running_sum[:, None]
        store_rows(out, b_out, o_out, m_row, V_MAIN, V_REST, DIM_V)


@triton.jit(do_not_specialize=["first_query", "T", "S", "B", "blocks", "bins", "stride_bounds"])
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
    G: tl.constexpr,
    SLOTS: tl.constexpr,
    SELECT: tl.constexpr,
    PARTS: tl.constexpr,
    SEGMENT: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr,
    DIM_K: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_REST: tl.constexpr,
    DIM_V: tl.constexpr,
    V_MAIN: tl.constexpr,
    V_REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: one segment of a block's list against `BLOCK_N` of the block's keys.

    Rows are the heads of the listed queries, one query after the other, `BLOCK_M` at a time.
    """
    i_part = tl.program_id(0) % PARTS
    i_bin, start, count = load_work(
        tl.program_id(0) // PARTS, starts, counts, segment_ends, work_bins, bins, SEGMENT
    )
    if count == 0:
        return
    i_kv = (i_bin // blocks % HK).to(tl.int64)
    i_batch = (i_bin // blocks // HK).to(tl.int64)
    p_entries = entries + start
    o_key, m_key = block_keys(
        tl.load(p_entries), i_batch, i_kv, i_part, rows, sequence, cu_keys, first_query, T, S, HK,
        stride_bounds, SLOTS, SELECT, BLOCK_N,
    )  # fmt: skip
    p_k = k + i_batch * stride_kb + i_kv * stride_kh
    p_v = v + i_batch * stride_vb + i_kv * stride_vh
    o_k = o_key.to(tl.int64) * stride_ks
    o_v = o_key.to(tl.int64) * stride_vs
    b_k = load_rows(p_k, o_k, m_key, 0, K_MAIN, DIM_K, True)
    b_v = load_rows(p_v, o_v, m_key, 0, V_MAIN, DIM_V, True)
    b_k_rest, b_v_rest = b_k, b_v
    if K_REST:
        b_k_rest = load_rows(p_k, o_k, m_key, K_MAIN, K_REST, DIM_K, True)
    if V_REST:
        b_v_rest = load_rows(p_v, o_v, m_key, V_MAIN, V_REST, DIM_V, True)
    # Keys past the block are seen by nobody: their row is beyond any query's.
    o_key = tl.where(m_key, o_key, S)

    p_q = q + i_batch * stride_qb + i_kv * G * stride_qh
    for i_row in range(0, count * G, BLOCK_M):
        o_row = i_row + tl.arange(0, BLOCK_M)
        m_row = o_row < count * G
        b_entry = tl.load(p_entries + o_row // G, mask=m_row, other=0)
        o_query = b_entry // SLOTS
        o_member = o_row % G
        o_q = (first_query + o_query).to(tl.int64) * stride_qt + o_member.to(tl.int64) * stride_qh
        b_q = load_rows(p_q, o_q, m_row, 0, K_MAIN, DIM_K, True)
        b_q_rest = b_q
        if K_REST:
            b_q_rest = load_rows(p_q, o_q, m_row, K_MAIN, K_REST, DIM_K, True)
        if NEGATIVE_SCALE:
            b_q, b_q_rest = -b_q, -b_q_rest
        p_upper = upper + i_batch * stride_bounds + first_query + o_query
        b_upper = tl.load(p_upper, mask=m_row, other=0)
        # [BLOCK_M, BLOCK_N]
        b_s = dot_split(b_q, b_q_rest, b_k, b_k_rest, K_REST)
        b_s = tl.where(o_key[None, :] < b_upper[:, None], b_s * scale_log2, float("-inf"))
        b_max = tl.max(b_s, 1)
        m_empty = b_max == float("-inf")
        b_p = tl.exp2(b_s - tl.where(m_empty, 0.0, b_max)[:, None])
        b_sum = tl.where(m_empty, 1.0, tl.sum(b_p, 1))
        b_p = (b_p / b_sum[:, None]).to(b_v.dtype)
        o_out = ((o_query.to(tl.int64) * B + i_batch) * HK + i_kv) * (SLOTS * PARTS)
        o_out = (o_out + b_entry % SLOTS * PARTS + i_part) * G + o_member
        tl.store(partial_lse + o_out, b_max + tl.log2(b_sum), mask=m_row)
        b_out = tl.dot(b_p, b_v, input_precision="ieee")
        store_rows(partial_out, b_out, o_out * DIM_V, m_row, 0, V_MAIN, DIM_V)
        if V_REST:
            b_out = tl.dot(b_p, b_v_rest, input_precision="ieee")
            store_rows(partial_out, b_out, o_out * DIM_V, m_row, V_MAIN, V_REST, DIM_V)


@triton.jit(do_not_specialize=["first_query", "T", "B"])
def _merge_kernel(
    partial_out,
    partial_lse,
    rows,
    out,
    lse,
    first_query,
    T,
    B,
    HK,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    PARTS: tl.constexpr,
    DIM_V: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program: the merged output of one query and KV head."""
    i_kv = tl.program_id(0) % HK
    i_batch = (tl.program_id(0) // HK % B).to(tl.int64)
    i_query = first_query + tl.program_id(0) // HK // B
    o_target = (i_batch * T + i_query) * HK + i_kv
    o_partial = tl.program_id(0).to(tl.int64) * (SLOTS * PARTS)
    o_head = tl.arange(0, HEADS)
    m_head = o_head < G
    o_column = tl.arange(0, WIDTH)
    m_tile = m_head[:, None] & (o_column < DIM_V)[None, :]

    running_max = tl.full([HEADS], float("-inf"), tl.float32)
    running_sum = tl.zeros([HEADS], tl.float32)
    accumulator = tl.zeros([HEADS, WIDTH], tl.float32)
    for i_partial in range(SLOTS * PARTS):
        m_slot = m_head & (tl.load(rows + o_target * SLOTS + i_partial // PARTS) >= 0)
        o_row = (o_partial + i_partial) * G + o_head
        b_lse = tl.load(partial_lse + o_row, mask=m_slot, other=float("-inf"))
        p_out = partial_out + o_row[:, None] * DIM_V + o_column[None, :]
        b_out = tl.load(p_out, mask=m_tile & m_slot[:, None], other=0.0).to(tl.float32)
        next_max = tl.maximum(running_max, b_lse)
        shift = tl.where(next_max == float("-inf"), 0.0, next_max)
        decay, weight = tl.exp2(running_max - shift), tl.exp2(b_lse - shift)
        running_max = next_max
        running_sum = running_sum * decay + weight
        accumulator = accumulator * decay[:, None] + b_out * weight[:, None]

    m_empty = running_sum == 0.0
    running_sum = tl.where(m_empty, 1.0, running_sum)
    b_lse = tl.where(m_empty, float("-inf"), (running_max + tl.log2(running_sum)) * LOG_2)
    o_row = o_target * G + o_head
    tl.store(lse + o_row, b_lse, mask=m_head)
    b_out = (accumulator / running_sum[:, None]).to(out.dtype.element_ty)
    tl.store(out + o_row[:, None] * DIM_V + o_column[None, :], b_out, mask=m_tile)
