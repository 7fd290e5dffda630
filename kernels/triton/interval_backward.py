"""Gradients of attention over an interval of keys per query: the compressed branch and the window.

Two passes, no atomics: `dq` by query tile, as in the forward pass, and `dk, dv` by key block, which
walks the query tiles that see the block. A long block's heads may be spread over several programs;
their float32 parts are then added in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_port.kernels.geometry import Layout, NSAConfig
from nsa_port.kernels.triton.bounds import (
    Kind,
    QueryBounds,
    cut_tiles,
    query_bounds,
    query_ranges,
    tile_of,
)
from nsa_port.kernels.triton.host import (
    LOG2_E,
    arch_of,
    cdiv,
    last_contiguous,
    split_arguments,
    split_head,
    strides,
    tuned,
)
from nsa_port.kernels.triton.interval import hopper_values
from nsa_port.kernels.triton.preparation import backward_rows
from nsa_port.kernels.triton.replay import repeats
from nsa_port.kernels.triton.sums import sum_parts
from nsa_port.kernels.triton.tiles import (
    dot,
    dot_split,
    key_spans,
    load_rows,
    store_rows,
)

_ENOUGH_PROGRAMS = 1024
"""Programs that fill any chip several times over: heads are spread until there are as many."""


@repeats
def compressed_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    config: NSAConfig,
    layout: Layout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `compressed_attention`. `dq, dk, dv`."""
    bounds = query_bounds(Kind.COMPRESSED, q.shape[1], k.shape[1], config, layout, q.device)
    cu_rows = layout.compressed_cu_seqlens(config) if layout.packed else None
    grad_out = last_contiguous(grad_out)
    rows = BackwardRows(grad_out, *backward_rows(grad_out, grad_lse, out, lse, by_head=True))
    return interval_backward(rows, q, k, v, bounds, cu_rows, layout, scale)


@repeats
def window_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    config: NSAConfig,
    layout: Layout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `window_attention`. `dq, dk, dv`."""
    bounds = query_bounds(Kind.WINDOW, q.shape[1], k.shape[1], config, layout, q.device)
    cu_rows = layout.cu_seqlens_k
    grad_out = last_contiguous(grad_out)
    rows = BackwardRows(grad_out, *backward_rows(grad_out, grad_lse, out, lse, by_head=True))
    return interval_backward(rows, q, k, v, bounds, cu_rows, layout, scale)


class BackwardRows(NamedTuple):
    """What the gradients need of each row: `grad_out [B, T, H, Dv]` and, float32 `[B, H, T]`,
    what `backward_rows` makes."""

    grad_out: Tensor
    lse_log2: Tensor
    delta: Tensor


class Problem(NamedTuple):
    """What the backward kernels have in common, as `interval_backward` takes it."""

    rows: BackwardRows
    q: Tensor
    k: Tensor
    v: Tensor
    bounds: QueryBounds
    layout: Layout
    scale: float
    gate: Tensor | None


def interval_backward(
    rows: BackwardRows,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: QueryBounds,
    cu_rows: Tensor | None,
    layout: Layout,
    scale: float,
    *,
    gate: Tensor | None = None,
    dq: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`dq, dk, dv`, contiguous, in the inputs' dtypes.

    `cu_rows` is the key rows' cu_seqlens. `gate`, float32 `[B, H, T]`, multiplies every row's
    probabilities: then `grad_out` is the gradient of the gated output, and `delta` its sum with the
    output before the gate. A given `dq`, contiguous, is added to.
    """
    problem = Problem(rows, q, k, v, bounds, layout, scale, gate)
    add_dq = dq is not None
    if dq is None:
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if dq.numel():
        values = hopper_values("hopper_dq", q, k, rows.grad_out, v)
        if values is None:
            _query_gradients(problem, dq, add_dq)
        else:
            from nsa_port.kernels.triton.interval_backward_hopper import query_gradients

            query_gradients(problem, dq, add_dq, values)
    return dq, *_key_gradients(problem, cu_rows)


def _query_gradients(problem: Problem, dq: Tensor, add_dq: bool) -> None:
    """Write `dq`, or add to it."""
    rows, q, k, v, bounds, layout, scale, gate = problem
    B, T, H, Dk = q.shape
    HK, Dv = v.shape[2:]
    values = tuned(arch_of(q), "interval_dq", q.element_size(), Dk, Dv)
    tiles = cut_tiles(T, values["BLOCK_M"], layout.cu_seqlens)
    _interval_dq_kernel[(tiles.count * B * H,)](
        rows.grad_out,
        q,
        k,
        v,
        rows.lse_log2,
        rows.delta,
        gate,
        tiles.first,
        tiles.stop,
        bounds.lower,
        bounds.upper,
        dq,
        scale * LOG2_E,
        scale,
        T,
        H,
        H // HK,
        tiles.count,
        bounds.stride,
        *strides(rows.grad_out),
        *strides(q),
        *strides(k),
        *strides(v),
        ADD_DQ=add_dq,
        **split_arguments(split_head(Dk), split_head(Dv)),
        **values,
    )


def _key_gradients(problem: Problem, cu_rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """`dk, dv`."""
    rows, q, k, v, bounds, layout, scale, gate = problem
    B, T, H, Dk = q.shape
    S, HK, Dv = v.shape[1:]
    # Padded rows may hold anything, which only the kernel for any chip looks out for.
    padded = layout.positions is not None
    on_hopper = None if padded else hopper_values("hopper_dkdv", q, rows.grad_out, v)
    values = on_hopper or tuned(arch_of(q), "interval_dkdv", q.element_size(), Dk, Dv)
    widest = values.pop("widest", 0)
    block_n = values["BLOCK_N"]
    keys = cut_tiles(S, block_n, cu_rows)
    splits = _splits(cdiv(S, block_n) * B * HK, H // HK)
    dtype = torch.float32 if splits > 1 else k.dtype
    # Rows that belong to no packed sequence are in no tile.
    allocate = torch.empty if cu_rows is None else torch.zeros
    dk = allocate((splits, B, S, HK, Dk), dtype=dtype, device=k.device)
    dv = allocate((splits, B, S, HK, Dv), dtype=dtype, device=v.device)
    if keys.count * B:
        ranges = query_ranges(bounds, S, keys, layout.cu_seqlens, block_n)
        if on_hopper is not None:
            from nsa_port.kernels.triton.interval_backward_hopper import key_gradients

            key_gradients(problem, keys, ranges, dk, dv, values)
        else:
            _interval_dkdv_kernel[(keys.count * B * HK * splits,)](
                rows.grad_out,
                q,
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
                *strides(rows.grad_out),
                *strides(q),
                *strides(k),
                *strides(v),
                PADDED=padded,
                **split_arguments(split_head(Dk, widest), split_head(Dv, widest)),
                **values,
            )
    return sum_parts(dk, dv, k.dtype)


def _splits(programs: int, G: int) -> int:
    """Over how many programs to spread the heads that share a key block; divides `G`."""
    for splits in range(1, G + 1):
        if G % splits == 0 and programs * splits >= _ENOUGH_PROGRAMS:
            return splits
    return G


@triton.jit(do_not_specialize=["T", "tiles", "stride_bounds"])
def _interval_dq_kernel(
    grad_out,
    q,
    k,
    v,
    lse_log2,
    delta,
    gate,
    tile_first,
    tile_stop,
    lower,
    upper,
    dq,
    scale_log2,
    scale,
    T,
    H,
    G,
    tiles,
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
    ADD_DQ: tl.constexpr,
    DIM_K: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_REST: tl.constexpr,
    DIM_V: tl.constexpr,
    V_MAIN: tl.constexpr,
    V_REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DEPTH: tl.constexpr = 0,
):
    """One program: `dq` of `BLOCK_M` queries of one head."""
    columns = tl.num_programs(0) // tiles
    i_tile = tiles - 1 - tl.program_id(0) // columns
    i_batch = (tl.program_id(0) % columns // H).to(tl.int64)
    i_head = (tl.program_id(0) % columns % H).to(tl.int64)
    i_kv = i_head // G
    first, stop = tile_of(tile_first, tile_stop, i_tile, BLOCK_M, T)
    o_query = first + tl.arange(0, BLOCK_M)
    m_row = o_query < stop
    o_bounds = i_batch * stride_bounds + o_query
    b_lower = tl.load(lower + o_bounds, mask=m_row, other=0)
    b_upper = tl.load(upper + o_bounds, mask=m_row, other=0)
    start, full_start, full_stop, stop = key_spans(b_lower, b_upper, m_row, BLOCK_N)
    # Rows that see nothing may hold anything, NaN too.
    m_seeing = m_row & (b_lower < b_upper)

    p_q = q + i_batch * stride_qb + i_head * stride_qh
    p_grad = grad_out + i_batch * stride_gb + i_head * stride_gh
    o_q = o_query.to(tl.int64) * stride_qt
    o_grad = o_query.to(tl.int64) * stride_gt
    b_q = load_rows(p_q, o_q, m_seeing, 0, K_MAIN, DIM_K, True)
    b_grad = load_rows(p_grad, o_grad, m_seeing, 0, V_MAIN, DIM_V, True)
    b_q_rest, b_grad_rest = b_q, b_grad
    if K_REST:
        b_q_rest = load_rows(p_q, o_q, m_seeing, K_MAIN, K_REST, DIM_K, True)
    if V_REST:
        b_grad_rest = load_rows(p_grad, o_grad, m_seeing, V_MAIN, V_REST, DIM_V, True)
    o_stats = (i_batch * H + i_head) * T + o_query
    b_lse = tl.load(lse_log2 + o_stats, mask=m_seeing, other=float("inf"))
    b_delta = tl.load(delta + o_stats, mask=m_seeing, other=0.0)
    b_gate = None
    if gate is not None:
        b_gate = tl.load(gate + o_stats, mask=m_seeing, other=0.0)

    p_k = k + i_batch * stride_kb + i_kv * stride_kh
    p_v = v + i_batch * stride_vb + i_kv * stride_vh
    b_dq = tl.zeros([BLOCK_M, K_MAIN], tl.float32)
    b_dq_rest = tl.zeros([BLOCK_M, K_REST if K_REST else 1], tl.float32)
    for phase in tl.static_range(3):
        span_start = start if phase == 0 else (full_start if phase == 1 else full_stop)
        span_stop = full_start if phase == 0 else (full_stop if phase == 1 else stop)
        b_dq, b_dq_rest = _add_dq(
            b_dq, b_dq_rest, b_q, b_q_rest, b_grad, b_grad_rest, b_lse, b_delta, b_gate,
            b_lower, b_upper, p_k, p_v, stride_ks, stride_vs, span_start, span_stop, scale_log2,
            phase != 1, DIM_K, K_MAIN, K_REST, DIM_V, V_MAIN, V_REST, BLOCK_N, DEPTH,
        )  # fmt: skip

    o_out = ((i_batch * T + o_query) * H + i_head) * DIM_K
    b_dq *= scale
    if ADD_DQ:
        b_dq += load_rows(dq, o_out, m_row, 0, K_MAIN, DIM_K, True)
    store_rows(dq, b_dq, o_out, m_row, 0, K_MAIN, DIM_K)
    if K_REST:
        b_dq_rest *= scale
        if ADD_DQ:
            b_dq_rest += load_rows(dq, o_out, m_row, K_MAIN, K_REST, DIM_K, True)
        store_rows(dq, b_dq_rest, o_out, m_row, K_MAIN, K_REST, DIM_K)


@triton.jit
def _add_dq(
    b_dq, b_dq_rest, b_q, b_q_rest, b_grad, b_grad_rest, b_lse, b_delta, b_gate,
    b_lower, b_upper, p_k, p_v, stride_ks, stride_vs, start, stop, scale_log2,
    MASKED: tl.constexpr,
    DIM_K: tl.constexpr, K_MAIN: tl.constexpr, K_REST: tl.constexpr,
    DIM_V: tl.constexpr, V_MAIN: tl.constexpr, V_REST: tl.constexpr,
    BLOCK_N: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Add what the key rows `start .. stop - 1` contribute to `dq`, but for the scale."""
    for i_key in range(start, stop, BLOCK_N):
        o_key = i_key + tl.arange(0, BLOCK_N)
        m_key = o_key < stop
        o_k = o_key.to(tl.int64) * stride_ks
        o_v = o_key.to(tl.int64) * stride_vs
        b_k = load_rows(p_k, o_k, m_key, 0, K_MAIN, DIM_K, MASKED)
        b_v = load_rows(p_v, o_v, m_key, 0, V_MAIN, DIM_V, MASKED)
        b_k_rest, b_v_rest = b_k, b_v
        if K_REST:
            b_k_rest = load_rows(p_k, o_k, m_key, K_MAIN, K_REST, DIM_K, MASKED)
        if V_REST:
            b_v_rest = load_rows(p_v, o_v, m_key, V_MAIN, V_REST, DIM_V, MASKED)
        # [BLOCK_M, BLOCK_N]
        b_s = dot_split(b_q, b_q_rest, b_k, b_k_rest, K_REST, DEPTH)
        b_p = tl.exp2(b_s * scale_log2 - b_lse[:, None])
        if MASKED:
            m_seen = (o_key[None, :] >= b_lower[:, None]) & (o_key[None, :] < b_upper[:, None])
            b_p = tl.where(m_seen, b_p, 0.0)
        if b_gate is not None:
            b_p *= b_gate[:, None]
        b_dp = dot_split(b_grad, b_grad_rest, b_v, b_v_rest, V_REST, DEPTH)
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k.dtype)
        b_dq = dot(b_ds, b_k, b_dq)
        if K_REST:
            b_dq_rest = dot(b_ds, b_k_rest, b_dq_rest)
    return b_dq, b_dq_rest


@triton.jit(do_not_specialize=["T", "S", "B", "splits", "stride_bounds", "stride_ranges"])
def _interval_dkdv_kernel(
    grad_out,
    q,
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
    PADDED: tl.constexpr,
    DIM_K: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_REST: tl.constexpr,
    DIM_V: tl.constexpr,
    V_MAIN: tl.constexpr,
    V_REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DEPTH: tl.constexpr = 0,
    RELOAD: tl.constexpr = 0,
):
    """One program: `dk, dv` of one tile of key rows from one part of the group's heads."""
    columns = B * HK * splits
    i_tile = tl.program_id(0) // columns
    i_split = tl.program_id(0) % columns % splits
    i_kv = (tl.program_id(0) % columns // splits % HK).to(tl.int64)
    i_batch = (tl.program_id(0) % columns // splits // HK).to(tl.int64)
    first, last = tile_of(tile_first, tile_stop, i_tile, BLOCK_N, S)
    o_key = first + tl.arange(0, BLOCK_N)
    m_key = o_key < last

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
    p_range = ranges + i_batch * stride_ranges + i_tile * 4
    start, stop = tl.load(p_range), tl.load(p_range + 3)
    full_start, full_stop = tl.load(p_range + 1), tl.load(p_range + 2)
    full_stop = full_start + (full_stop - full_start) // BLOCK_M * BLOCK_M
    heads = G // splits
    i_head = i_kv * G + i_split * heads
    p_q = q + i_batch * stride_qb + i_head * stride_qh
    p_grad = grad_out + i_batch * stride_gb + i_head * stride_gh
    o_stats = (i_batch * HK * G + i_head) * T
    p_gate = gate
    if gate is not None:
        p_gate += o_stats
    if RELOAD:
        # One loop for all: what three of them need takes registers before the first.
        full_start = stop
    for phase in tl.static_range(1 if RELOAD else 3):
        span_start = start if phase == 0 else (full_start if phase == 1 else full_stop)
        span_stop = full_start if phase == 0 else (full_stop if phase == 1 else stop)
        b_dk, b_dk_rest, b_dv, b_dv_rest = _add_dkdv(
            b_dk, b_dk_rest, b_dv, b_dv_rest, b_k, b_k_rest, b_v, b_v_rest, o_key,
            p_k, o_k, p_v, o_v, m_key, p_q, p_grad,
            lse_log2 + o_stats, delta + o_stats, p_gate,
            lower + i_batch * stride_bounds, upper + i_batch * stride_bounds,
            stride_qt, stride_qh, stride_gt, stride_gh, T, heads, span_start, span_stop, scale_log2,
            phase != 1, PADDED, DIM_K, K_MAIN, K_REST, DIM_V, V_MAIN, V_REST, BLOCK_M, DEPTH,
            RELOAD,
        )  # fmt: skip

    o_out = ((i_split * B + i_batch) * S + o_key) * HK + i_kv
    store_rows(dk, b_dk * scale, o_out * DIM_K, m_key, 0, K_MAIN, DIM_K)
    store_rows(dv, b_dv, o_out * DIM_V, m_key, 0, V_MAIN, DIM_V)
    if K_REST:
        store_rows(dk, b_dk_rest * scale, o_out * DIM_K, m_key, K_MAIN, K_REST, DIM_K)
    if V_REST:
        store_rows(dv, b_dv_rest, o_out * DIM_V, m_key, V_MAIN, V_REST, DIM_V)


@triton.jit
def _add_dkdv(
    b_dk, b_dk_rest, b_dv, b_dv_rest, b_k, b_k_rest, b_v, b_v_rest, o_key,
    p_k, o_k, p_v, o_v, m_key, p_q, p_grad, p_lse, p_delta, p_gate, p_lower, p_upper,
    stride_qt, stride_qh, stride_gt, stride_gh, T, heads, start, stop, scale_log2,
    MASKED: tl.constexpr, PADDED: tl.constexpr,
    DIM_K: tl.constexpr, K_MAIN: tl.constexpr, K_REST: tl.constexpr,
    DIM_V: tl.constexpr, V_MAIN: tl.constexpr, V_REST: tl.constexpr,
    BLOCK_M: tl.constexpr, DEPTH: tl.constexpr, RELOAD: tl.constexpr,
):  # fmt: skip
    """Add what the queries `start .. stop - 1` of some heads contribute, `dk` but for the scale.

    With `RELOAD`, keys and values are loaded at each step: kept, they would fill the registers in
    the form that products take them in.

    One loop over heads and queries: nested loops keep Triton from overlapping the outer's steps.
    """
    # A step's numbers per row are loaded in the step before: as part of the loop's own pipeline
    # they would be copied to shared memory four bytes at a time, by every thread.
    o_query = start + tl.arange(0, BLOCK_M)
    i_query, i_head = start, (start * 0).to(tl.int64)
    b_lse = tl.load(p_lse + o_query, mask=o_query < stop, other=float("inf"))
    b_delta = tl.load(p_delta + o_query, mask=o_query < stop, other=0.0)
    for _ in range(heads * tl.cdiv(stop - start, BLOCK_M)):
        o_query = i_query + tl.arange(0, BLOCK_M)
        m_row = o_query < stop
        if MASKED:
            b_lower = tl.load(p_lower + o_query, mask=m_row, other=0)
            b_upper = tl.load(p_upper + o_query, mask=m_row, other=0)
            if PADDED:
                # Padded rows may hold anything, NaN too.
                m_row &= b_lower < b_upper
                b_delta = tl.where(m_row, b_delta, 0.0)
        o_q = o_query.to(tl.int64) * stride_qt
        o_grad = o_query.to(tl.int64) * stride_gt
        p_q_head, p_grad_head = p_q + i_head * stride_qh, p_grad + i_head * stride_gh
        b_q = load_rows(p_q_head, o_q, m_row, 0, K_MAIN, DIM_K, MASKED)
        b_q_rest = b_q
        if K_REST:
            b_q_rest = load_rows(p_q_head, o_q, m_row, K_MAIN, K_REST, DIM_K, MASKED)
        if RELOAD:
            # A condition that always holds, of which the compiler only sees that it may change.
            m_now = m_key & (i_query < stop)
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
        if MASKED:
            m_seen = (o_key[:, None] >= b_lower[None, :]) & (o_key[:, None] < b_upper[None, :])
            b_p = tl.where(m_seen, b_p, 0.0)
        if p_gate is not None:
            b_gate = tl.load(p_gate + i_head * T + o_query, mask=m_row, other=0.0)
            b_p *= b_gate[None, :]
        b_grad = load_rows(p_grad_head, o_grad, m_row, 0, V_MAIN, DIM_V, MASKED)
        b_grad_rest = b_grad
        if V_REST:
            b_grad_rest = load_rows(p_grad_head, o_grad, m_row, V_MAIN, V_REST, DIM_V, MASKED)
        b_dv = dot(b_p.to(b_grad.dtype), b_grad, b_dv)
        if V_REST:
            b_dv_rest = dot(b_p.to(b_grad.dtype), b_grad_rest, b_dv_rest)
        b_dp = dot_split(b_v, b_v_rest, b_grad, b_grad_rest, V_REST, DEPTH)
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
        b_dk = dot(b_ds, b_q, b_dk)
        if K_REST:
            b_dk_rest = dot(b_ds, b_q_rest, b_dk_rest)
        i_query += BLOCK_M
        m_done = i_query >= stop
        i_query = tl.where(m_done, start, i_query)
        i_head = tl.where(m_done, i_head + 1, i_head)
        o_query = i_query + tl.arange(0, BLOCK_M)
        m_row = (o_query < stop) & (i_head < heads)
        o_stats = i_head * T + o_query
        b_lse = tl.load(p_lse + o_stats, mask=m_row, other=float("inf"))
        b_delta = tl.load(p_delta + o_stats, mask=m_row, other=0.0)
    return b_dk, b_dk_rest, b_dv, b_dv_rest
