"""Attention over the blocks that each query chose, for GPUs with MFMA (gfx9).

One wave attends with 16 rows: with so few rows more waves would only repeat each other's products.
Keys and values go straight to registers (`matrix_tiles`).

By wave, the rows are heads of one query. Blocks that the query sees in full, all but its own, take
no mask anywhere, and a slot without a block costs a scalar branch.

By tile, for groups that leave half of the rows empty or more, they are all heads of as many
neighbouring queries as fit: each block that any of them chose is attended to once, with the rows of
the queries that did not choose it left as they are. Neighbours choose much the same blocks.

Other GPUs, and what the table gives to the kernel by block, go to the shared kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from nsa_port.kernels.amd.chips import CHIPS, LARGEST_OFFSET, dies_of
from nsa_port.kernels.amd.matrix_tiles import (
    as_left_operand,
    load_keys,
    load_queries,
    load_values,
    scores_layout,
    store_result,
)
from nsa_port.kernels.amd.placement import item_of, workgroups
from nsa_port.kernels.geometry import Layout, NSAConfig
from nsa_port.kernels.triton import selected
from nsa_port.kernels.triton.bounds import Kind, QueryBounds, cut_tiles, query_bounds, tile_of
from nsa_port.kernels.triton.host import (
    LOG2_E,
    arch_of,
    cdiv,
    next_power_of_2,
    on_device_of,
    split_arguments,
    split_head,
    strides,
    tuned,
)
from nsa_port.kernels.triton.lists import block_rows
from nsa_port.kernels.triton.sharing import COUNTS, FIELDS, most_queries, share_blocks
from nsa_port.kernels.triton.splitting import leaves_idle, merge_splits, split_keys, split_range
from nsa_port.kernels.triton.tiles import LOG_2

_BY_WAVE, _BY_TILE = "selected_by_wave", "selected_by_tile"
_ROWS = 16
"""Of MFMA's tile."""

_MOST_ROWS = 64
"""Of a tile, whatever its kind."""


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
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`selected_attention` with the causal bounds at hand, on the current device.

    A given `lse`, contiguous, is written to.
    """
    if not _serves(q, k, v, config):
        return selected.attend_selected(q, k, v, indices, bounds, config, layout, scale, lse)
    B, T, H, Dk = q.shape
    HK, Dv = v.shape[2:]
    G = H // HK
    out = torch.empty((B, T, H, Dv), dtype=q.dtype, device=q.device)
    if lse is None:
        lse = torch.empty((B, T, H), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    chip = CHIPS[arch_of(q)]
    dies = dies_of(arch_of(q), q.device)
    queries = _queries_of_a_tile(B, T, HK, G, config.num_selected, q.device)
    kernel = _BY_TILE if queries > 1 else _BY_WAVE
    values = dict(tuned(arch_of(q), kernel, q.element_size(), Dk, Dv))
    depth = min(chip.depths[q.element_size()], split_head(Dk).main)
    whole_block = max(16, depth, next_power_of_2(config.select_block_size))
    values["BLOCK_N"] = min(values["BLOCK_N"], whole_block)
    common = {
        "SELECT": config.select_block_size,
        "NEGATIVE_SCALE": scale < 0,
        "DIES": dies,
        "MFMA_VERSION": chip.mfma_version,
        "MFMA_DEPTH": depth,
        "ROUNDS_BFLOAT16": chip.rounds_bfloat16,
        **split_arguments(split_head(Dk), split_head(Dv)),
    }
    scale_log2 = abs(scale) * LOG2_E
    if queries > 1:
        tiles = cut_tiles(T, queries, layout.cu_seqlens)
        even = config.select_block_size % values["BLOCK_N"] == 0
        shares = share_blocks(indices, bounds, config.select_block_size, tiles, queries, 1, even)
        items = B * HK * tiles.count
        _by_tile_kernel[(workgroups(items, dies),)](
            q,
            k,
            v,
            tiles.first,
            tiles.stop,
            shares.shared,
            shares.counts,
            bounds.lower,
            bounds.upper,
            out,
            lse,
            scale_log2,
            items,
            tiles.count,
            T,
            HK,
            G,
            shares.shared.shape[3],
            bounds.stride,
            *strides(q),
            *strides(k),
            *strides(v),
            QUERIES=queries,
            ROWS=_ROWS,
            **common,
            **values,
        )
        return out, lse
    heads = min(values.pop("most_heads"), max(_ROWS, next_power_of_2(G)))
    items = B * HK * cdiv(G, heads) * T
    most_keys = config.num_selected * config.select_block_size
    splits = split_keys(items, most_keys, most_keys, out, lse)
    items *= splits.number
    rows = block_rows(indices, bounds, config.select_block_size)
    _by_wave_kernel[(workgroups(items, dies),)](
        q,
        k,
        v,
        rows,
        bounds.upper,
        splits.out,
        splits.lse,
        scale_log2,
        items,
        splits.number,
        B,
        T,
        HK,
        G,
        bounds.stride,
        *strides(q),
        *strides(k),
        *strides(v),
        SLOTS=config.num_selected,
        HEADS=heads,
        SPLIT=splits.active,
        **common,
        **values,
    )
    merge_splits(splits, out, lse)
    return out, lse


def _queries_of_a_tile(
    B: int, T: int, HK: int, G: int, num_selected: int, device: torch.device
) -> int:
    """How many queries a wave takes together; 1, and so by wave, where that fills no GPU."""
    queries = min(max(1, _ROWS // next_power_of_2(G)), most_queries(num_selected))
    return 1 if leaves_idle(B * HK * cdiv(T, queries), device) else queries


def _serves(q: Tensor, k: Tensor, v: Tensor, config: NSAConfig) -> bool:
    """Whether the kernel here is the one to take."""
    T, H, Dk = q.shape[1:]
    HK, Dv = v.shape[2:]
    arch = arch_of(q)
    if arch not in CHIPS:
        return False
    by_block = tuned(arch, "selected_by_block", q.element_size(), Dk, Dv)
    if by_block["largest_group"] >= H // HK and by_block["fewest_queries"] <= T:
        return False
    if not tuned(arch, _BY_WAVE, q.element_size(), Dk, Dv)["most_heads"]:
        return False
    return max(*q.stride()[1:3], k.stride(1), v.stride(1)) * _MOST_ROWS < LARGEST_OFFSET


@gluon.jit(do_not_specialize=["items", "splits", "B", "T", "stride_bounds"])
def _by_wave_kernel(
    q,
    k,
    v,
    rows,
    upper,
    out,
    lse,
    scale_log2,
    items,
    splits,
    B,
    T,
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
    SLOTS: gl.constexpr,
    SELECT: gl.constexpr,
    HEADS: gl.constexpr,
    SPLIT: gl.constexpr,
    NEGATIVE_SCALE: gl.constexpr,
    DIM_K: gl.constexpr,
    K_MAIN: gl.constexpr,
    K_REST: gl.constexpr,
    DIM_V: gl.constexpr,
    V_MAIN: gl.constexpr,
    V_REST: gl.constexpr,
    BLOCK_N: gl.constexpr,
    DIES: gl.constexpr,
    MFMA_VERSION: gl.constexpr,
    MFMA_DEPTH: gl.constexpr,
    ROUNDS_BFLOAT16: gl.constexpr,
):
    """One program, one wave: `HEADS` heads of one query and KV head, over all slots.

    With `SPLIT`, `splits` programs share the slots.

    Items are ordered by batch and KV head, then by query: neighbours choose much the same blocks.
    """
    i_item = item_of(gl.program_id(0), items, DIES)
    if i_item >= items:
        return
    LAYOUT: gl.constexpr = scores_layout(MFMA_VERSION, MFMA_DEPTH)
    i_split = (i_item % splits).to(gl.int64)
    if SPLIT:
        i_item //= splits
    head_tiles = (G + HEADS - 1) // HEADS
    i_query = i_item // head_tiles % T
    i_column = i_item // head_tiles // T
    i_kv = (i_column % HK).to(gl.int64)
    i_batch = (i_column // HK).to(gl.int64)
    first_head = i_item % head_tiles * HEADS
    i_head = i_kv * G + first_head
    heads = G - first_head

    p_q = q + i_batch * stride_qb + i_query.to(gl.int64) * stride_qt + i_head * stride_qh
    b_q = load_queries(p_q, 0, stride_qh, 1, heads, 0, K_MAIN, DIM_K, HEADS, HEADS, LAYOUT)
    b_q_rest = b_q
    if K_REST:
        b_q_rest = load_queries(
            p_q, 0, stride_qh, 1, heads, K_MAIN, K_REST, DIM_K, HEADS, HEADS, LAYOUT
        )
    if NEGATIVE_SCALE:
        b_q, b_q_rest = -b_q, -b_q_rest
    stop = gl.load(upper + i_batch * stride_bounds + i_query)
    o_query = i_batch * T + i_query
    p_rows = rows + (o_query * HK + i_kv) * SLOTS
    p_k = k + i_batch * stride_kb + i_kv * stride_kh
    p_v = v + i_batch * stride_vb + i_kv * stride_vh

    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    running_max = gl.full([HEADS], float("-inf"), gl.float32, ROW)
    running_sum = gl.full([HEADS], 0.0, gl.float32, ROW)
    accumulator = gl.full([HEADS, V_MAIN], 0.0, gl.float32, LAYOUT)
    accumulator_rest = gl.full([HEADS, V_REST if V_REST else 16], 0.0, gl.float32, LAYOUT)
    PARTS: gl.constexpr = (SELECT + BLOCK_N - 1) // BLOCK_N
    start, end = 0, SLOTS * PARTS
    if SPLIT:
        start, end = split_range(0, SLOTS * PARTS, i_split, splits)
    for i_part in range(start, end):
        i_row = gl.load(p_rows + i_part // PARTS)
        i_key = i_row + i_part % PARTS * BLOCK_N
        seen = gl.minimum(stop, i_row + SELECT) - i_key
        if (i_row >= 0) & (seen > 0):
            p_k_tile = p_k + i_key.to(gl.int64) * stride_ks
            p_v_tile = p_v + i_key.to(gl.int64) * stride_vs
            if seen >= BLOCK_N:
                running_max, running_sum, accumulator, accumulator_rest = _attend(
                    running_max, running_sum, accumulator, accumulator_rest, b_q, b_q_rest,
                    p_k_tile, p_v_tile, stride_ks, stride_vs, seen, seen, True, scale_log2, False,
                    False, HEADS, DIM_K, K_MAIN, K_REST, DIM_V, V_MAIN, V_REST, BLOCK_N,
                    ROUNDS_BFLOAT16, LAYOUT,
                )  # fmt: skip
            else:
                running_max, running_sum, accumulator, accumulator_rest = _attend(
                    running_max, running_sum, accumulator, accumulator_rest, b_q, b_q_rest,
                    p_k_tile, p_v_tile, stride_ks, stride_vs, seen, seen, True, scale_log2, False,
                    True, HEADS, DIM_K, K_MAIN, K_REST, DIM_V, V_MAIN, V_REST, BLOCK_N,
                    ROUNDS_BFLOAT16, LAYOUT,
                )  # fmt: skip

    m_empty = running_sum == 0.0
    running_sum = gl.where(m_empty, 1.0, running_sum)
    b_lse = gl.where(m_empty, float("-inf"), (running_max + gl.log2(running_sum)) * LOG_2)
    o_out = o_query * HK * G + i_head
    if SPLIT:
        o_out += i_split * B * T * HK * G
    o_head = gl.arange(0, HEADS, ROW)
    gl.store(lse + o_out + o_head, b_lse, mask=o_head < heads)
    p_out = out + o_out * DIM_V
    b_share = (1.0 / running_sum)[:, None]
    b_out = accumulator * b_share
    store_result(p_out, b_out, 0, DIM_V, 1, heads, 0, V_MAIN, DIM_V, HEADS, HEADS)
    if V_REST:
        b_out = accumulator_rest * b_share
        store_result(p_out, b_out, 0, DIM_V, 1, heads, V_MAIN, V_REST, DIM_V, HEADS, HEADS)


@gluon.jit(do_not_specialize=["items", "tiles", "T", "kept", "stride_bounds"])
def _by_tile_kernel(
    q,
    k,
    v,
    tile_first,
    tile_stop,
    shared,
    counts,
    lower,
    upper,
    out,
    lse,
    scale_log2,
    items,
    tiles,
    T,
    HK,
    G,
    kept,
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
    SELECT: gl.constexpr,
    QUERIES: gl.constexpr,
    ROWS: gl.constexpr,
    NEGATIVE_SCALE: gl.constexpr,
    DIM_K: gl.constexpr,
    K_MAIN: gl.constexpr,
    K_REST: gl.constexpr,
    DIM_V: gl.constexpr,
    V_MAIN: gl.constexpr,
    V_REST: gl.constexpr,
    BLOCK_N: gl.constexpr,
    DIES: gl.constexpr,
    MFMA_VERSION: gl.constexpr,
    MFMA_DEPTH: gl.constexpr,
    ROUNDS_BFLOAT16: gl.constexpr,
):
    """One program, one wave: all heads of `QUERIES` neighbouring queries of one KV head.

    First the blocks that those who chose them see to the end, then the others, masked by token.
    """
    i_item = item_of(gl.program_id(0), items, DIES)
    if i_item >= items:
        return
    first, stop = tile_of(tile_first, tile_stop, i_item % tiles, QUERIES, T)
    if first >= stop:
        return
    LAYOUT: gl.constexpr = scores_layout(MFMA_VERSION, MFMA_DEPTH)
    HEADS: gl.constexpr = ROWS // QUERIES
    i_kv = (i_item // tiles % HK).to(gl.int64)
    i_batch = (i_item // tiles // HK).to(gl.int64)
    queries = stop - first
    p_q = q + i_batch * stride_qb + first.to(gl.int64) * stride_qt + i_kv * G * stride_qh
    b_q = load_queries(p_q, stride_qt, stride_qh, queries, G, 0, K_MAIN, DIM_K, ROWS, HEADS, LAYOUT)
    b_q_rest = b_q
    if K_REST:
        b_q_rest = load_queries(
            p_q, stride_qt, stride_qh, queries, G, K_MAIN, K_REST, DIM_K, ROWS, HEADS, LAYOUT
        )
    if NEGATIVE_SCALE:
        b_q, b_q_rest = -b_q, -b_q_rest
    p_k = k + i_batch * stride_kb + i_kv * stride_kh
    p_v = v + i_batch * stride_vb + i_kv * stride_vh

    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    o_query = gl.arange(0, ROWS, ROW) // HEADS
    o_head = gl.arange(0, ROWS, ROW) % HEADS
    m_row = (o_query < queries) & (o_head < G)
    o_bound = i_batch * stride_bounds + first + o_query
    b_upper = gl.load(upper + o_bound, mask=m_row, other=0)
    m_seeing = b_upper > gl.load(lower + o_bound, mask=m_row, other=0)
    running_max = gl.full([ROWS], float("-inf"), gl.float32, ROW)
    running_sum = gl.full([ROWS], 0.0, gl.float32, ROW)
    accumulator = gl.full([ROWS, V_MAIN], 0.0, gl.float32, LAYOUT)
    accumulator_rest = gl.full([ROWS, V_REST if V_REST else 16], 0.0, gl.float32, LAYOUT)
    PARTS: gl.constexpr = (SELECT + BLOCK_N - 1) // BLOCK_N
    p_shared = shared + i_item.to(gl.int64) * kept * FIELDS
    p_counts = counts + i_item.to(gl.int64) * COUNTS
    start, end = 0, gl.load(p_counts) * PARTS
    for MASKED in gl.static_range(2):
        for i_part in range(start, end):
            p_block = p_shared + i_part // PARTS * FIELDS
            i_key = gl.load(p_block) + i_part % PARTS * BLOCK_N
            m_chose = ((gl.load(p_block + 1) >> o_query) & 1) > 0
            seen = gl.load(p_block + 2) - i_key
            b_seen = seen
            if MASKED:
                b_seen = gl.where(m_chose, gl.minimum(b_upper - i_key, seen), 0)
                m_chose = b_seen > 0
                b_seen = b_seen[:, None]
            p_k_tile = p_k + i_key.to(gl.int64) * stride_ks
            p_v_tile = p_v + i_key.to(gl.int64) * stride_vs
            running_max, running_sum, accumulator, accumulator_rest = _attend(
                running_max, running_sum, accumulator, accumulator_rest, b_q, b_q_rest,
                p_k_tile, p_v_tile, stride_ks, stride_vs, seen, b_seen, m_chose, scale_log2, True,
                MASKED == 1, ROWS, DIM_K, K_MAIN, K_REST, DIM_V, V_MAIN, V_REST, BLOCK_N,
                ROUNDS_BFLOAT16, LAYOUT,
            )  # fmt: skip
        start, end = end, gl.load(p_counts + 1) * PARTS

    # Rows that see nothing may hold anything.
    m_empty = (running_sum == 0.0) | (m_seeing == 0)
    running_sum = gl.where(m_empty, 1.0, running_sum)
    b_lse = gl.where(m_empty, float("-inf"), (running_max + gl.log2(running_sum)) * LOG_2)
    o_out = ((i_batch * T + first) * HK + i_kv) * G
    gl.store(lse + o_out + o_query * (HK * G) + o_head, b_lse, mask=m_row)
    p_out = out + o_out * DIM_V
    stride = HK * G * DIM_V
    b_share = (1.0 / running_sum)[:, None]
    b_out = gl.where(m_seeing[:, None], accumulator * b_share, 0.0)
    store_result(p_out, b_out, stride, DIM_V, queries, G, 0, V_MAIN, DIM_V, ROWS, HEADS)
    if V_REST:
        b_out = gl.where(m_seeing[:, None], accumulator_rest * b_share, 0.0)
        store_result(p_out, b_out, stride, DIM_V, queries, G, V_MAIN, V_REST, DIM_V, ROWS, HEADS)


@gluon.jit
def _attend(
    running_max, running_sum, accumulator, accumulator_rest, b_q, b_q_rest,
    p_k, p_v, stride_ks, stride_vs, seen, b_seen, m_chose, scale_log2,
    CHOOSING: gl.constexpr, MASKED: gl.constexpr, ROWS: gl.constexpr,
    DIM_K: gl.constexpr, K_MAIN: gl.constexpr, K_REST: gl.constexpr,
    DIM_V: gl.constexpr, V_MAIN: gl.constexpr, V_REST: gl.constexpr,
    BLOCK_N: gl.constexpr, ROUNDS_BFLOAT16: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Continue the softmax over `BLOCK_N` keys, or the first `seen`, one at least, if masked.

    Masked, each row sees its own first `b_seen` of them, and one at least. Rows that did not choose
    them, `m_chose`, if rows are `CHOOSING`, keep what they have.
    """
    b_k = load_keys(p_k, stride_ks, seen, 0, K_MAIN, DIM_K, BLOCK_N, MASKED, LAYOUT)
    b_v = load_values(p_v, stride_vs, seen, 0, V_MAIN, DIM_V, BLOCK_N, MASKED, LAYOUT)
    # [ROWS, BLOCK_N]
    b_s = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, LAYOUT)
    b_s = gl.amd.cdna3.mfma(b_q, b_k, b_s)
    if K_REST:
        b_k = load_keys(p_k, stride_ks, seen, K_MAIN, K_REST, DIM_K, BLOCK_N, MASKED, LAYOUT)
        b_s = gl.amd.cdna3.mfma(b_q_rest, b_k, b_s)
    if MASKED:
        o_key = gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
        b_s = gl.where(o_key[None, :] < b_seen, b_s * scale_log2, float("-inf"))
        next_max = gl.maximum(running_max, gl.max(b_s, 1))
    else:
        next_max = gl.maximum(running_max, gl.max(b_s, 1) * scale_log2)
        b_s = b_s * scale_log2
    shift = next_max
    if CHOOSING:
        next_max = gl.where(m_chose, next_max, running_max)
        shift = gl.where(m_chose, next_max, float("inf"))
    b_p = gl.exp2(b_s - shift[:, None])
    decay = gl.exp2(running_max - shift)
    if CHOOSING:
        decay = gl.where(m_chose, decay, 1.0)
    running_sum = running_sum * decay + gl.sum(b_p, 1)
    b_p = as_left_operand(b_p, b_v.dtype, ROUNDS_BFLOAT16, LAYOUT)
    accumulator = gl.amd.cdna3.mfma(b_p, b_v, accumulator * decay[:, None])
    if V_REST:
        b_v = load_values(p_v, stride_vs, seen, V_MAIN, V_REST, DIM_V, BLOCK_N, MASKED, LAYOUT)
        accumulator_rest = gl.amd.cdna3.mfma(b_p, b_v, accumulator_rest * decay[:, None])
    return next_max, running_sum, accumulator, accumulator_rest
