"""Attention over an interval of keys per query: the compressed branch and the window.

Both are the same computation once `bounds.py` has said which rows a query sees, so they share
their kernels: a flash-style softmax over tiles of keys, where tiles that every query of the
program sees in full are neither masked nor bounds-checked.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_port.kernels.geometry import Layout, NSAConfig
from nsa_port.kernels.tables import Values
from nsa_port.kernels.triton.bounds import Kind, QueryBounds, cut_tiles, query_bounds, tile_of
from nsa_port.kernels.triton.host import (
    HAS_HOPPER_GLUON,
    LOG2_E,
    arch_of,
    split_arguments,
    split_head,
    strides,
    tuned,
)
from nsa_port.kernels.triton.replay import repeats
from nsa_port.kernels.triton.splitting import Merge, Splits, merge_splits, split_keys, split_range
from nsa_port.kernels.triton.tiles import (
    LOG_2,
    dot,
    dot_split,
    key_spans,
    load_rows,
    store_rows,
)


@repeats
def compressed_attention(
    q: Tensor, k: Tensor, v: Tensor, config: NSAConfig, layout: Layout, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax over the compressed blocks that are complete at each query (Eq. 8). `out, lse`."""
    bounds = query_bounds(Kind.COMPRESSED, q.shape[1], k.shape[1], config, layout, q.device)
    return interval_attention(q, k, v, bounds, layout, scale)


@repeats
def window_attention(
    q: Tensor, k: Tensor, v: Tensor, config: NSAConfig, layout: Layout, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax over the last `window_size` keys of each query. `out, lse`."""
    bounds = query_bounds(Kind.WINDOW, q.shape[1], k.shape[1], config, layout, q.device)
    return interval_attention(q, k, v, bounds, layout, scale, config.window_size)


def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: QueryBounds,
    layout: Layout,
    scale: float,
    most_keys: int | None = None,
    lse: Tensor | None = None,
    merge: Merge = merge_splits,
) -> tuple[Tensor, Tensor]:
    """Softmax over each query's interval of key rows. `out [B, T, H, Dv]`, `lse [B, T, H]`.

    No query sees more than `most_keys` rows. A given `lse`, contiguous, is written to. Both are
    there once `merge` has been called and has merged them.
    """
    B, T, H, Dk = q.shape
    HK, Dv = v.shape[2:]
    G = H // HK
    out = torch.empty((B, T, H, Dv), dtype=q.dtype, device=q.device)
    if lse is None:
        lse = torch.empty((B, T, H), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    values = hopper_values("hopper_forward", q, k, v) if scale > 0 else None
    if values is not None:
        from nsa_port.kernels.triton.interval_hopper import attend

        attend(q, k, v, bounds, layout, scale, out, lse, values)
        merge(Splits(1, 1, False, out, lse), out, lse)
        return out, lse
    config = tuned(arch_of(q), "interval_forward", q.element_size(), Dk, Dv)
    # Few queries, as in decoding: fill the tile with the heads that share these keys instead.
    heads = G if config["BLOCK_M"] >= T * 2 and config["BLOCK_M"] >= G else 1
    few = config.pop("few_rows", 0), config.pop("few_warps", 0)
    if heads > 1 and few[0] >= T * G:
        config["BLOCK_M"], config["num_warps"] = few
    tiles = cut_tiles(T, config["BLOCK_M"] // heads, layout.cu_seqlens)
    programs = tiles.count * B * (H // heads)
    splits = split_keys(programs, k.shape[1], most_keys, out, lse)
    _interval_forward_kernel[(programs * splits.number,)](
        q,
        k,
        v,
        tiles.first,
        tiles.stop,
        bounds.lower,
        bounds.upper,
        splits.out,
        splits.lse,
        abs(scale) * LOG2_E,
        T,
        H,
        G,
        tiles.count,
        splits.number,
        bounds.stride,
        *strides(q),
        *strides(k),
        *strides(v),
        HEADS=heads,
        SPLIT=splits.active,
        NEGATIVE_SCALE=scale < 0,
        **split_arguments(split_head(Dk), split_head(Dv)),
        **config,
    )
    merge(splits, out, lse)
    return out, lse


def hopper_values(kernel: str, q: Tensor, *others: Tensor) -> Values | None:
    """The tuned values of a kernel written for Hopper, None where it cannot take these tensors.

    The last tensor gives the value dimension. Such kernels copy tiles with the tensor memory
    accelerator, which wants addresses that are multiples of 16 bytes, and they pay from a number of
    queries on.
    """
    if arch_of(q) != "sm_90" or not HAS_HOPPER_GLUON:
        return None
    try:
        dims = (q.shape[3], others[-1].shape[3])
        values = tuned("sm_90", kernel, q.element_size(), *dims)
    except ValueError:
        return None
    if q.shape[1] < values["fewest_queries"]:
        return None
    return values if all(is_addressable(tensor) for tensor in (q, *others)) else None


def is_addressable(tensor: Tensor) -> bool:
    """Whether the tensor memory accelerator can copy tiles of `[B, T, H, D]`."""
    *strides, last = tensor.stride()
    if last != 1 or tensor.data_ptr() % 16 or not tensor.numel():
        return False
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, strides, strict=False):
        if length != 1 and (stride <= 0 or stride * size % 16):
            return False
    return True


@triton.jit(
    do_not_specialize=["T", "tiles", "splits", "stride_bounds"],
    do_not_specialize_on_alignment=["lse"],
)
def _interval_forward_kernel(
    q,
    k,
    v,
    tile_first,
    tile_stop,
    lower,
    upper,
    out,
    lse,
    scale_log2,
    T,
    H,
    G,
    tiles,
    splits,
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
    HEADS: tl.constexpr,
    SPLIT: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr,
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
    """One program: one tile of queries; a row is a query and one of `HEADS` heads of a group.

    Late tiles start first: where attention is causal they have the most to do. With `SPLIT`,
    `splits` programs share the keys of a tile.
    """
    i_program = tl.program_id(0)
    columns = tl.num_programs(0) // tiles
    i_split = (i_program % splits).to(tl.int64)
    if SPLIT:
        i_program //= splits
        columns //= splits
    head_groups = H // HEADS
    i_tile = tiles - 1 - i_program // columns
    i_batch = (i_program % columns // head_groups).to(tl.int64)
    i_head = i_program % columns % head_groups * HEADS
    i_kv = (i_head // G).to(tl.int64)
    first, stop = tile_of(tile_first, tile_stop, i_tile, BLOCK_M // HEADS, T)
    o_query = first + tl.arange(0, BLOCK_M) // HEADS
    m_row = o_query < stop
    o_head = i_head + tl.arange(0, BLOCK_M) % HEADS

    p_q = q + i_batch * stride_qb
    o_q = o_query.to(tl.int64) * stride_qt + o_head.to(tl.int64) * stride_qh
    b_q = load_rows(p_q, o_q, m_row, 0, K_MAIN, DIM_K, True)
    b_q_rest = b_q
    if K_REST:
        b_q_rest = load_rows(p_q, o_q, m_row, K_MAIN, K_REST, DIM_K, True)
    if NEGATIVE_SCALE:
        b_q, b_q_rest = -b_q, -b_q_rest

    o_bounds = i_batch * stride_bounds + o_query
    b_lower = tl.load(lower + o_bounds, mask=m_row, other=0)
    b_upper = tl.load(upper + o_bounds, mask=m_row, other=0)
    start, full_start, full_stop, stop = key_spans(b_lower, b_upper, m_row, BLOCK_N)
    if SPLIT:
        first_step, last_step = split_range(0, tl.cdiv(stop - start, BLOCK_N), i_split, splits)
        stop = tl.minimum(start + last_step * BLOCK_N, stop)
        start = tl.minimum(start + first_step * BLOCK_N, stop)
        full_start = tl.minimum(tl.maximum(full_start, start), stop)
        full_stop = tl.minimum(tl.maximum(full_stop, full_start), stop)

    p_k = k + i_batch * stride_kb + i_kv * stride_kh
    p_v = v + i_batch * stride_vb + i_kv * stride_vh
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, V_MAIN], tl.float32)
    accumulator_rest = tl.zeros([BLOCK_M, V_REST if V_REST else 1], tl.float32)
    for phase in tl.static_range(3):
        span_start = start if phase == 0 else (full_start if phase == 1 else full_stop)
        span_stop = full_start if phase == 0 else (full_stop if phase == 1 else stop)
        running_max, running_sum, accumulator, accumulator_rest = _attend(
            running_max, running_sum, accumulator, accumulator_rest,
            b_q, b_q_rest, b_lower, b_upper, p_k, p_v, stride_ks, stride_vs,
            span_start, span_stop, scale_log2,
            phase != 1, DIM_K, K_MAIN, K_REST, DIM_V, V_MAIN, V_REST, BLOCK_N, DEPTH,
        )  # fmt: skip

    m_empty = running_sum == 0.0
    running_sum = tl.where(m_empty, 1.0, running_sum)
    b_lse = tl.where(m_empty, float("-inf"), (running_max + tl.log2(running_sum)) * LOG_2)
    o_out = ((i_batch * T + o_query) * H + o_head).to(tl.int64)
    if SPLIT:
        o_out += i_split * (columns // head_groups) * T * H
    tl.store(lse + o_out, b_lse, mask=m_row)
    o_out *= DIM_V
    store_rows(out, accumulator / running_sum[:, None], o_out, m_row, 0, V_MAIN, DIM_V)
    if V_REST:
        b_out = accumulator_rest / running_sum[:, None]
        store_rows(out, b_out, o_out, m_row, V_MAIN, V_REST, DIM_V)


@triton.jit
def _attend(
    running_max, running_sum, accumulator, accumulator_rest,
    b_q, b_q_rest, b_lower, b_upper, p_k, p_v, stride_ks, stride_vs,
    start, stop, scale_log2,
    MASKED: tl.constexpr,
    DIM_K: tl.constexpr, K_MAIN: tl.constexpr, K_REST: tl.constexpr,
    DIM_V: tl.constexpr, V_MAIN: tl.constexpr, V_REST: tl.constexpr,
    BLOCK_N: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Continue the softmax over the key rows `start .. stop - 1`; returns the running state."""
    for i_key in range(start, stop, BLOCK_N):
        o_key = i_key + tl.arange(0, BLOCK_N)
        m_key = o_key < stop
        o_k = o_key.to(tl.int64) * stride_ks
        b_k = load_rows(p_k, o_k, m_key, 0, K_MAIN, DIM_K, MASKED)
        b_k_rest = b_k
        if K_REST:
            b_k_rest = load_rows(p_k, o_k, m_key, K_MAIN, K_REST, DIM_K, MASKED)
        # [BLOCK_M, BLOCK_N]
        b_s = dot_split(b_q, b_q_rest, b_k, b_k_rest, K_REST, DEPTH)
        if MASKED:
            m_seen = (o_key[None, :] >= b_lower[:, None]) & (o_key[None, :] < b_upper[:, None])
            b_s = tl.where(m_seen, b_s * scale_log2, float("-inf"))
            next_max = tl.maximum(running_max, tl.max(b_s, 1))
            # A row that has seen nothing yet must not compute -inf - -inf.
            shift = tl.where(next_max == float("-inf"), 0.0, next_max)
            b_p = tl.exp2(b_s - shift[:, None])
        else:
            next_max = tl.maximum(running_max, tl.max(b_s, 1) * scale_log2)
            shift = next_max
            b_p = tl.exp2(b_s * scale_log2 - shift[:, None])
        decay = tl.exp2(running_max - shift)
        running_max = next_max
        running_sum = running_sum * decay + tl.sum(b_p, 1)
        o_v = o_key.to(tl.int64) * stride_vs
        b_v = load_rows(p_v, o_v, m_key, 0, V_MAIN, DIM_V, MASKED)
        accumulator = dot(b_p.to(b_v.dtype), b_v, accumulator * decay[:, None])
        if V_REST:
            b_v = load_rows(p_v, o_v, m_key, V_MAIN, V_REST, DIM_V, MASKED)
            accumulator_rest = dot(b_p.to(b_v.dtype), b_v, accumulator_rest * decay[:, None])
    return running_max, running_sum, accumulator, accumulator_rest
