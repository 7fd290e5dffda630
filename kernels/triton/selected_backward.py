"""Gradients of attention over chosen blocks, in one pass by block.

One program keeps a block's keys and walks a segment of the queries that chose it: `dk` and `dv`
stay in registers, and `dq` leaves as one partial per (query, slot), which a second kernel adds up
in the order of the slots. A block whose list is one segment adds straight to the float32 totals,
which no other program touches; longer lists leave one partial per segment, added in order by a
third kernel. No atomics: twice the same input gives twice the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_port.kernels.geometry import Layout, NSAConfig
from nsa_port.kernels.triton.bounds import Kind, QueryBounds, query_bounds
from nsa_port.kernels.triton.host import (
    HAS_HOPPER_GLUON,
    LOG2_E,
    arch_of,
    cdiv,
    last_contiguous,
    launch_options,
    next_power_of_2,
    split_arguments,
    split_head,
    strides,
    tuned,
)
from nsa_port.kernels.triton.lists import block_keys, block_lists, block_rows, load_work
from nsa_port.kernels.triton.preparation import backward_rows
from nsa_port.kernels.triton.replay import repeats
from nsa_port.kernels.triton.selected import query_chunk
from nsa_port.kernels.triton.sums import sum_parts
from nsa_port.kernels.triton.tiles import dot, dot_split, load_rows, store_rows


@repeats
def selected_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    out: Tensor,
    lse: Tensor,
    config: NSAConfig,
    layout: Layout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `selected_attention`. `dq, dk, dv`, contiguous, in their inputs' dtypes."""
    T, S = q.shape[1], k.shape[1]
    grad_out = last_contiguous(grad_out)
    bounds = query_bounds(Kind.CAUSAL, T, S, config, layout, q.device)
    stats = backward_rows(grad_out, grad_lse, out, lse, by_head=False)
    return selected_gradients((grad_out, *stats), q, k, v, indices, bounds, config, layout, scale)


def selected_gradients(
    grad_rows: tuple[Tensor, Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    bounds: QueryBounds,
    config: NSAConfig,
    layout: Layout,
    scale: float,
    *,
    gate: Tensor | None = None,
    dq: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`dq, dk, dv` of attention over the blocks `indices`, from what is known of each row, on the
    current device.

    Args:
        grad_rows: `grad_out`, whose last dimension is contiguous, and `lse_log2` and `delta` of
            `backward_rows`, `[B, T, H]`.
        bounds: what each query sees, of `Kind.CAUSAL`.
        gate: multiplies each row's probabilities, and so all of its gradients; float32
            `[B, T, H]`. `delta` is then that of the output before the gate.
        dq: contiguous; what it holds is added to, and it is returned. A new tensor if not given.
    """
    B, T, H, Dk = q.shape
    S, HK, Dv = v.shape[1:]
    G, n = H // HK, config.num_selected
    grad_out, lse_log2, delta = grad_rows
    add_dq = dq is not None
    if dq is None:
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.zeros((1, B, S, HK, Dk), dtype=torch.float32, device=k.device)
    dv = torch.zeros((1, B, S, HK, Dv), dtype=torch.float32, device=v.device)
    if dq.numel() == 0:
        return dq, dk[0].to(k.dtype), dv[0].to(v.dtype)
    rows = block_rows(indices, bounds, config.select_block_size)
    values = tuned(arch_of(q), "selected_backward", q.element_size(), Dk, Dv)
    # As many rows in a program for small groups as for 16 heads, whose the table's values are.
    segment = values["segment"] * max(1, 16 // G)
    block_n = min(values["BLOCK_N"], max(16, next_power_of_2(config.select_block_size)))
    parts = cdiv(config.select_block_size, block_n)
    chunk = query_chunk(T, B * H * n * parts * Dk * q.element_size())
    partial_dq = torch.empty((chunk, B, HK, n * parts, G, Dk), dtype=q.dtype, device=q.device)
    # Lists of more than one segment have less than two segments per `segment` entries.
    segments = 2 * (B * chunk * HK * n // segment)
    partial_shape = (segments * parts * block_n, Dk + Dv)
    partial_dkdv = torch.empty(partial_shape, dtype=torch.float32, device=q.device)
    cu_keys = None if layout.cu_seqlens_k is None else layout.cu_seqlens_k.contiguous()
    sequences = 1 if cu_keys is None else cu_keys.shape[0] - 1
    sizes = {
        "SLOTS": n,
        "SELECT": config.select_block_size,
        "PARTS": parts,
        "SEGMENT": segment,
        "BLOCK_N": block_n,
    }
    kernel, tensors, constants = _kernel_for(values, block_n, grad_out, q, v, partial_dq)
    every = block_lists(rows, bounds, S, sequences, config.select_block_size, chunk, segment)
    for first, count, lists in every:
        kernel[(lists.work * parts,)](
            *tensors[:2],
            k,
            v,
            lse_log2,
            delta,
            gate,
            rows,
            bounds.upper,
            bounds.sequence,
            cu_keys,
            lists.entries,
            lists.starts,
            lists.counts,
            lists.segment_ends,
            lists.work_bins,
            lists.long_ends,
            tensors[2],
            partial_dkdv,
            dk,
            dv,
            scale * LOG2_E,
            scale,
            first,
            T,
            S,
            B,
            HK,
            lists.blocks,
            lists.bins,
            bounds.stride,
            *strides(grad_out),
            *strides(q),
            *strides(k),
            *strides(v),
            G=G,
            **sizes,
            **constants,
        )
        _add_segments_kernel[(lists.bins * parts,)](
            partial_dkdv,
            rows,
            bounds.sequence,
            cu_keys,
            lists.entries,
            lists.starts,
            lists.counts,
            lists.long_ends,
            dk,
            dv,
            first,
            T,
            S,
            HK,
            lists.blocks,
            bounds.stride,
            **sizes,
            DIM_K=Dk,
            DIM_V=Dv,
            WIDTH_K=next_power_of_2(Dk),
            WIDTH_V=next_power_of_2(Dv),
            num_warps=8,
        )
        _sum_dq_kernel[(count * B * HK,)](
            partial_dq,
            rows,
            dq,
            first,
            T,
            B,
            HK,
            G=G,
            HEADS=next_power_of_2(G),
            SLOTS=n,
            PARTS=parts,
            DIM_K=Dk,
            WIDTH=next_power_of_2(Dk),
            ADD=add_dq,
            num_warps=4,
        )
    return dq, *sum_parts(dk, dv, k.dtype)


def _kernel_for(
    values: dict[str, int],
    block_n: int,
    grad_out: Tensor,
    q: Tensor,
    v: Tensor,
    partial_dq: Tensor,
) -> tuple[Any, tuple[Any, Any, Any], dict[str, int]]:
    """The kernel to run, `grad_out, q, partial_dq` as it takes them, and its own constants."""
    tensors = grad_out, q, partial_dq
    if values.get("gluon") and HAS_HOPPER_GLUON:
        # Not at the top: Gluon is there for Hopper alone.
        from nsa_port.kernels.triton import selected_backward_hopper as hopper
        from nsa_port.kernels.triton import selected_backward_wide_hopper as wide

        if block_n == wide.BLOCK_N and wide.takes(grad_out, q, v):
            kernel = wide._by_block_backward_kernel
            return kernel, wide.described(*tensors), wide.constants(grad_out, q)
        if block_n == hopper.BLOCK_N and hopper.takes(grad_out, q, v):
            return hopper._by_block_backward_kernel, tensors, hopper.constants(grad_out, q)
    dims = split_arguments(split_head(q.shape[-1]), split_head(v.shape[-1]))
    return _by_block_backward_kernel, tensors, {
        **dims, "BLOCK_M": values["BLOCK_M"], **launch_options(values)
    }  # fmt: skip


_LENGTHS = ["first_query", "T", "S", "B", "blocks", "bins", "stride_bounds"]


@triton.jit(do_not_specialize=_LENGTHS)
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
    G: tl.constexpr,
    SLOTS: tl.constexpr,
    SELECT: tl.constexpr,
    PARTS: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIM_K: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_REST: tl.constexpr,
    DIM_V: tl.constexpr,
    V_MAIN: tl.constexpr,
    V_REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DEPTH: tl.constexpr = 0,
    RELOAD: tl.constexpr = 0,
):
    """One program: one segment of a block's list against `BLOCK_N` of the block's keys.

    With `RELOAD`, keys and values are loaded at each step: kept, they would fill the registers in
    the form that products take them in.
    """
    i_part = tl.program_id(0) % PARTS
    i_work = tl.program_id(0) // PARTS
    i_bin, start, count = load_work(i_work, starts, counts, segment_ends, work_bins, bins, SEGMENT)
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
    b_dk = tl.zeros([BLOCK_N, K_MAIN], tl.float32)
    b_dv = tl.zeros([BLOCK_N, V_MAIN], tl.float32)
    b_dk_rest = tl.zeros([BLOCK_N, K_REST if K_REST else 1], tl.float32)
    b_dv_rest = tl.zeros([BLOCK_N, V_REST if V_REST else 1], tl.float32)
    # Keys past the block are seen by nobody: their row is beyond any query's.
    b_key = tl.where(m_key, o_key, S)

    p_q = q + i_batch * stride_qb + i_kv * G * stride_qh
    p_grad = grad_out + i_batch * stride_gb + i_kv * G * stride_gh
    for i_row in range(0, count * G, BLOCK_M):
        o_row = i_row + tl.arange(0, BLOCK_M)
        m_row = o_row < count * G
        b_entry = tl.load(p_entries + o_row // G, mask=m_row, other=0)
        o_local = b_entry // SLOTS
        o_query = (first_query + o_local).to(tl.int64)
        o_member = (o_row % G).to(tl.int64)
        o_q = o_query * stride_qt + o_member * stride_qh
        o_grad = o_query * stride_gt + o_member * stride_gh
        b_q = load_rows(p_q, o_q, m_row, 0, K_MAIN, DIM_K, True)
        b_grad = load_rows(p_grad, o_grad, m_row, 0, V_MAIN, DIM_V, True)
        b_q_rest, b_grad_rest = b_q, b_grad
        if K_REST:
            b_q_rest = load_rows(p_q, o_q, m_row, K_MAIN, K_REST, DIM_K, True)
        if V_REST:
            b_grad_rest = load_rows(p_grad, o_grad, m_row, V_MAIN, V_REST, DIM_V, True)
        b_upper = tl.load(upper + i_batch * stride_bounds + o_query, mask=m_row, other=0)
        o_stats = ((i_batch * T + o_query) * HK + i_kv) * G + o_member
        b_lse = tl.load(lse_log2 + o_stats, mask=m_row, other=float("inf"))
        b_delta = tl.load(delta + o_stats, mask=m_row, other=0.0)
        if RELOAD:
            # A condition that always holds, of which the compiler only sees that it may change.
            m_now = m_key & (i_row < count * G)
            b_k = load_rows(p_k, o_k, m_now, 0, K_MAIN, DIM_K, True)
            b_v = load_rows(p_v, o_v, m_now, 0, V_MAIN, DIM_V, True)
            b_k_rest, b_v_rest = b_k, b_v
            if K_REST:
                b_k_rest = load_rows(p_k, o_k, m_now, K_MAIN, K_REST, DIM_K, True)
            if V_REST:
                b_v_rest = load_rows(p_v, o_v, m_now, V_MAIN, V_REST, DIM_V, True)
        # [BLOCK_N, BLOCK_M]
        b_s = dot_split(b_k, b_k_rest, b_q, b_q_rest, K_REST, DEPTH)
        b_p = tl.exp2(b_s * scale_log2 - b_lse[None, :])
        b_p = tl.where(b_key[:, None] < b_upper[None, :], b_p, 0.0)
        if gate is not None:
            b_p *= tl.load(gate + o_stats, mask=m_row, other=0.0)[None, :]
        b_dp = dot_split(b_v, b_v_rest, b_grad, b_grad_rest, V_REST, DEPTH)
        b_dv = dot(b_p.to(b_grad.dtype), b_grad, b_dv)
        if V_REST:
            b_dv_rest = dot(b_p.to(b_grad.dtype), b_grad_rest, b_dv_rest)
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
        b_dk = dot(b_ds, b_q, b_dk)
        if K_REST:
            b_dk_rest = dot(b_ds, b_q_rest, b_dk_rest)
        o_out = ((o_local.to(tl.int64) * B + i_batch) * HK + i_kv) * (SLOTS * PARTS)
        o_out = ((o_out + b_entry % SLOTS * PARTS + i_part) * G + o_member) * DIM_K
        b_dq = tl.dot(tl.trans(b_ds), b_k, input_precision="ieee")
        store_rows(partial_dq, b_dq * scale, o_out, m_row, 0, K_MAIN, DIM_K)
        if K_REST:
            b_dq = tl.dot(tl.trans(b_ds), b_k_rest, input_precision="ieee")
            store_rows(partial_dq, b_dq * scale, o_out, m_row, K_MAIN, K_REST, DIM_K)

    b_dk *= scale
    b_dk_rest *= scale
    total = tl.load(counts + i_bin)
    if total <= SEGMENT:
        o_out = (i_batch * S + o_key) * HK + i_kv
        _add_rows(dk, b_dk, o_out * DIM_K, m_key, 0, K_MAIN, DIM_K)
        _add_rows(dv, b_dv, o_out * DIM_V, m_key, 0, V_MAIN, DIM_V)
        if K_REST:
            _add_rows(dk, b_dk_rest, o_out * DIM_K, m_key, K_MAIN, K_REST, DIM_K)
        if V_REST:
            _add_rows(dv, b_dv_rest, o_out * DIM_V, m_key, V_MAIN, V_REST, DIM_V)
    else:
        # Segments of long lists are stored side by side: dk in the first columns, dv after them.
        i_segment = tl.load(long_ends + i_bin) - (tl.load(segment_ends + i_bin) - i_work)
        o_out = (i_segment * PARTS + i_part).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        o_out *= DIM_K + DIM_V
        store_rows(partial_dkdv, b_dk, o_out, m_key, 0, K_MAIN, DIM_K)
        store_rows(partial_dkdv + DIM_K, b_dv, o_out, m_key, 0, V_MAIN, DIM_V)
        if K_REST:
            store_rows(partial_dkdv, b_dk_rest, o_out, m_key, K_MAIN, K_REST, DIM_K)
        if V_REST:
            store_rows(partial_dkdv + DIM_K, b_dv_rest, o_out, m_key, V_MAIN, V_REST, DIM_V)


@triton.jit
def _add_rows(
    p_base, b_tile, o_row, m_row, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr
):
    """Add a tile to rows in memory that no other program touches meanwhile."""
    b_tile += load_rows(p_base, o_row, m_row, START, WIDTH, DIM, True)
    store_rows(p_base, b_tile, o_row, m_row, START, WIDTH, DIM)


@triton.jit(do_not_specialize=["first_query", "T", "S", "blocks", "stride_bounds"])
def _add_segments_kernel(
    partial_dkdv,
    rows,
    sequence,
    cu_keys,
    entries,
    starts,
    counts,
    long_ends,
    dk,
    dv,
    first_query,
    T,
    S,
    HK,
    blocks,
    stride_bounds,
    SLOTS: tl.constexpr,
    SELECT: tl.constexpr,
    PARTS: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIM_K: tl.constexpr,
    DIM_V: tl.constexpr,
    WIDTH_K: tl.constexpr,
    WIDTH_V: tl.constexpr,
):
    """One program: add the segments of one block's long list to `dk` and `dv`, in order."""
    i_part = tl.program_id(0) % PARTS
    i_bin = tl.program_id(0) // PARTS
    total = tl.load(counts + i_bin)
    if total <= SEGMENT:
        return
    i_kv = (i_bin // blocks % HK).to(tl.int64)
    i_batch = (i_bin // blocks // HK).to(tl.int64)
    entry = tl.load(entries + tl.load(starts + i_bin))
    o_key, m_key = block_keys(
        entry, i_batch, i_kv, i_part, rows, sequence, cu_keys, first_query, T, S, HK,
        stride_bounds, SLOTS, SELECT, BLOCK_N,
    )  # fmt: skip
    b_dk = tl.zeros([BLOCK_N, WIDTH_K], tl.float32)
    b_dv = tl.zeros([BLOCK_N, WIDTH_V], tl.float32)
    stop = tl.load(long_ends + i_bin)
    for i_segment in range(stop - tl.cdiv(total, SEGMENT), stop):
        o_in = (i_segment * PARTS + i_part).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        o_in *= DIM_K + DIM_V
        b_dk += load_rows(partial_dkdv, o_in, m_key, 0, WIDTH_K, DIM_K, True)
        b_dv += load_rows(partial_dkdv + DIM_K, o_in, m_key, 0, WIDTH_V, DIM_V, True)
    o_out = (i_batch * S + o_key) * HK + i_kv
    _add_rows(dk, b_dk, o_out * DIM_K, m_key, 0, WIDTH_K, DIM_K)
    _add_rows(dv, b_dv, o_out * DIM_V, m_key, 0, WIDTH_V, DIM_V)


@triton.jit(do_not_specialize=["first_query", "T", "B"])
def _sum_dq_kernel(
    partial_dq,
    rows,
    dq,
    first_query,
    T,
    B,
    HK,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    PARTS: tl.constexpr,
    DIM_K: tl.constexpr,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
):
    """One program: `dq` of one query and KV head, added up in the order of its slots."""
    i_kv = tl.program_id(0) % HK
    i_batch = (tl.program_id(0) // HK % B).to(tl.int64)
    i_query = first_query + tl.program_id(0) // HK // B
    o_target = (i_batch * T + i_query) * HK + i_kv
    o_partial = tl.program_id(0).to(tl.int64) * (SLOTS * PARTS)
    o_head = tl.arange(0, HEADS)
    m_head = o_head < G
    o_column = tl.arange(0, WIDTH)
    m_tile = m_head[:, None] & (o_column < DIM_K)[None, :]
    total = tl.zeros([HEADS, WIDTH], tl.float32)
    for i_partial in range(SLOTS * PARTS):
        m_slot = tl.load(rows + o_target * SLOTS + i_partial // PARTS) >= 0
        o_in = ((o_partial + i_partial) * G + o_head) * DIM_K
        p_in = partial_dq + o_in[:, None] + o_column[None, :]
        total += tl.load(p_in, mask=m_tile & m_slot, other=0.0).to(tl.float32)
    o_out = (o_target * G + o_head) * DIM_K
    p_out = dq + o_out[:, None] + o_column[None, :]
    if ADD:
        total += tl.load(p_out, mask=m_tile, other=0.0).to(tl.float32)
    tl.store(p_out, total.to(dq.dtype.element_ty), mask=m_tile)
