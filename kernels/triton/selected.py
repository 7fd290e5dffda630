"""Attention over the blocks that each query chose, in two designs.

By query: one program takes a few neighbouring queries, with the heads of a group as rows. Blocks
that they share are loaded once for all of them, the others once for the query that chose them.

By block, for small groups: blocks that few neighbours share are left to programs that keep the keys
of a block and gather the queries that chose it, so that keys are loaded once per segment of the
block's list. Each (query, block) gives a normalised partial output and its lse; a last kernel
merges them in the order of the slots. Queries are worked on a bounded number at a time, which
bounds the partial outputs. On Hopper that pays for groups of up to 16 heads where sequences are
long, and the kernel that walks shared blocks merges the partial outputs too.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_port.kernels.geometry import Layout, NSAConfig
from nsa_port.kernels.tables import Values
from nsa_port.kernels.triton.bounds import Kind, QueryBounds, cut_tiles, query_bounds, tile_of
from nsa_port.kernels.triton.host import (
    LOG2_E,
    arch_of,
    cdiv,
    launch_options,
    next_power_of_2,
    split_arguments,
    split_head,
    strides,
    tuned,
)
from nsa_port.kernels.triton.interval import hopper_values
from nsa_port.kernels.triton.lists import block_keys, block_lists, load_work
from nsa_port.kernels.triton.replay import repeats
from nsa_port.kernels.triton.sharing import COUNTS, FIELDS, most_queries, share_blocks
from nsa_port.kernels.triton.splitting import Merge, Splits, merge_splits, split_keys, split_range
from nsa_port.kernels.triton.tiles import LOG2_E as LOG2_E_DEVICE
from nsa_port.kernels.triton.tiles import LOG_2, dot, dot_split, load_rows, store_rows

PARTIAL_BYTES = 2**30
"""Room for the partial results of the queries that are worked on at a time."""
_SMALL_GROUP = 8
SMALL_GROUP_BYTES = 2**31
"""The same for small groups in the forward's kernels for Hopper, for fewer launches. The rows of
large groups' queries, which many blocks gather, would no longer stay in the cache."""


@repeats
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
    merge: Merge = merge_splits,
) -> tuple[Tensor, Tensor]:
    """`selected_attention` with the causal bounds at hand, on the current device.

    A given `lse`, contiguous, is written to. Results are there once `merge` has merged them.
    """
    B, T, H, Dk = q.shape
    HK, Dv = v.shape[2:]
    out = torch.empty((B, T, H, Dv), dtype=q.dtype, device=q.device)
    if lse is None:
        lse = torch.empty((B, T, H), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    hopper = _by_block_values(q, k, v, config, scale)
    if hopper is not None and (H // HK <= _SMALL_GROUP or hopper["fewest_of_large"] <= T):
        _by_block_hopper(q, k, v, indices, bounds, config, layout, scale, hopper, out, lse)
        merge(Splits(1, 1, False, out, lse), out, lse)
        return out, lse
    if hopper is not None and not layout.packed:
        _compile_for_longer(q, k, v, indices, config, scale, hopper)
    values = tuned(arch_of(q), "selected_by_block", q.element_size(), Dk, Dv)
    by_block = values["largest_group"] >= H // HK and values["fewest_queries"] <= T
    least = values["least_sharing"] if by_block else 0
    # What goes by block is merged with what went by tile, which has to be there by then.
    first = merge_splits if by_block else merge
    own = _by_tile(q, k, v, indices, bounds, config, layout, scale, out, lse, least, first)
    if by_block:
        _by_block(q, k, v, own, bounds, config, layout, scale, values, out, lse)
        merge(Splits(1, 1, False, out, lse), out, lse)
    return out, lse


def _by_tile(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    bounds: QueryBounds,
    config: NSAConfig,
    layout: Layout,
    scale: float,
    out: Tensor,
    lse: Tensor,
    leaving: int,
    merge: Merge,
) -> Tensor:
    """Attend by tiles of queries; returns the rows of the blocks that are left, `[B, T, HK, n]`.

    `leaving` is 0 for all blocks, or how many queries of a tile must share a block for it not to be
    left to others. Rows are then packed as densely as the group allows.
    """
    B, T, H, Dk = q.shape
    HK, Dv = v.shape[2:]
    G, m, n = H // HK, config.select_block_size, config.num_selected
    hopper = hopper_values("hopper_selected", q, k, v) if scale > 0 and not leaving else None
    if hopper is not None:
        from nsa_port.kernels.triton import selected_hopper

        if selected_hopper.takes(G, m):
            queries = selected_hopper.QUERIES
            tiles = cut_tiles(T, queries, layout.cu_seqlens)
            shares = share_blocks(indices, bounds, m, tiles, queries, hopper["least_sharing"], True)
            selected_hopper.attend(q, k, v, shares, tiles, bounds, scale, out, lse, hopper)
            merge(Splits(1, 1, False, out, lse), out, lse)
            return shares.own
    values = tuned(arch_of(q), "selected_by_query", q.element_size(), Dk, Dv)
    heads = min(values["BLOCK_M"], max(4 if leaving else 16, next_power_of_2(G)))
    splits = split_keys(T * B * HK * cdiv(G, heads), n * m, n * m, out, lse)
    # With too few queries to fill the GPU none waits for another's blocks.
    queries = 1 if splits.active else min(values["BLOCK_M"] // heads, most_queries(n))
    heads = max(heads, 16 // queries)
    largest = max(16, next_power_of_2(m))
    block_n, own_n = (min(values[name], largest) for name in ("BLOCK_N", "OWN_N"))
    even = m % block_n == 0 and m % own_n == 0
    # With more heads than the matrix units' 16 rows, every block is worth a tile of its own.
    least = leaving or (values["least_sharing"] if heads == 16 and even else 1)
    tiles = cut_tiles(T, queries, layout.cu_seqlens)
    shares = share_blocks(indices, bounds, m, tiles, queries, min(least, queries), even)
    _by_query_kernel[(tiles.count * B * HK * cdiv(G, heads) * splits.number,)](
        q,
        k,
        v,
        tiles.first,
        tiles.stop,
        shares.shared,
        shares.counts,
        shares.own,
        bounds.lower,
        bounds.upper,
        splits.out,
        splits.lse,
        # Never 0, which would turn the infinity of what is not seen into NaN.
        max(abs(scale) * LOG2_E, 1e-30),
        tiles.count,
        splits.number,
        B,
        T,
        HK,
        G,
        n,
        shares.shared.shape[3],
        bounds.stride,
        *strides(q),
        *strides(k)[::2],
        *strides(v)[::2],
        STRIDE_KS=strides(k)[1],
        STRIDE_VS=strides(v)[1],
        SELECT=m,
        QUERIES=queries,
        HEADS=heads,
        OWN=not leaving and min(least, queries) > 1,
        SPLIT=splits.active,
        NEGATIVE_SCALE=scale < 0,
        **split_arguments(split_head(Dk), split_head(Dv)),
        BLOCK_N=block_n,
        OWN_N=own_n,
        **launch_options(values),
    )
    merge(splits, out, lse)
    return shares.own


def _by_block_values(
    q: Tensor, k: Tensor, v: Tensor, config: NSAConfig, scale: float
) -> Values | None:
    """The values of the kernels written for Hopper that attend by block, None if they cannot."""
    heads = next_power_of_2(q.shape[2] // v.shape[2])
    if scale <= 0 or heads > 16 or config.select_block_size != 64:
        return None
    return hopper_values("hopper_by_block", q, k, v)


_compiled: set[tuple[Any, ...]] = set()
"""For which calls the kernels of longer ones have been compiled."""


def _compile_for_longer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    config: NSAConfig,
    scale: float,
    values: Values,
) -> None:
    """With the first length, run what longer ones take on a part of it: none stops for it later."""
    key = (q.device, q.dtype, q.shape[2:], v.shape[2:], config)
    if key in _compiled:
        return
    _compiled.add(key)
    q, k, v, indices = (x[:, :_FEW] for x in (q, k, v, indices))
    layout = Layout(_FEW)
    bounds = query_bounds(Kind.CAUSAL, _FEW, _FEW, config, layout, q.device)
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    _by_block_hopper(q, k, v, indices, bounds, config, layout, scale, values, out, lse)


_FEW = 128
"""Queries of a run that is for compiling alone."""


def _by_block_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    bounds: QueryBounds,
    config: NSAConfig,
    layout: Layout,
    scale: float,
    values: Values,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Attend by block with the kernels written for Hopper, whose `values` these are."""
    merging = tuned("sm_90", "hopper_merge", q.element_size(), q.shape[3], v.shape[3])
    # Not at the top: Gluon is there for Hopper alone.
    from nsa_port.kernels.triton import selected_by_block_hopper, selected_merge_hopper

    B, T, H, _ = q.shape
    S, HK, Dv = v.shape[1:]
    m, n = config.select_block_size, config.num_selected
    heads = next_power_of_2(H // HK)
    size = 64 // heads
    tiles = cut_tiles(T, size, layout.cu_seqlens)
    least = max(2, cdiv(values["least_sharing"] * size, 16))
    shares = share_blocks(indices, bounds, m, tiles, size, least, True)
    # Whole tiles, as far as packed sequences do not cut others.
    query_bytes = B * HK * heads * n * (Dv * q.element_size() + 4)
    room = SMALL_GROUP_BYTES if H // HK <= _SMALL_GROUP else PARTIAL_BYTES
    chunk = cdiv(query_chunk(T, query_bytes, room), size) * size
    shape = (B, HK, chunk, n, heads)
    partial_out = torch.empty((*shape, Dv), dtype=q.dtype, device=q.device)
    sequences = 1 if layout.cu_seqlens is None else layout.cu_seqlens.shape[0] - 1
    key_sequences = 1 if layout.cu_seqlens_k is None else layout.cu_seqlens_k.shape[0] - 1
    every = block_lists(
        shares.own, bounds, S, key_sequences, m, chunk, values["segment_tiles"] * size
    )
    for first, count, lists in every:
        # What is in no list stays 0, which stands for none.
        partial_lse = torch.zeros(shape, dtype=torch.float32, device=q.device)
        selected_by_block_hopper.attend(
            q, k, v, shares.own, lists, first, partial_out, partial_lse, scale, heads, values
        )
        selected_merge_hopper.attend(
            q, k, v, shares, tiles, sequences, bounds, first, first + count - 1, partial_out,
            partial_lse, scale, heads, out, lse, merging,
        )  # fmt: skip


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
    """Attend to what is left of the blocks, and merge with what `out` and `lse` hold."""
    B, T, H, _ = q.shape
    S, HK, Dv = v.shape[1:]
    G, n = H // HK, config.num_selected
    block_n = min(tuned_block["BLOCK_N"], max(16, next_power_of_2(config.select_block_size)))
    parts = cdiv(config.select_block_size, block_n)
    chunk = query_chunk(T, B * H * n * parts * (Dv * q.element_size() + 4))
    partial_shape = (chunk, B, HK, n * parts, G)
    partial_out = torch.empty((*partial_shape, Dv), dtype=q.dtype, device=q.device)
    partial_lse = torch.empty(partial_shape, dtype=torch.float32, device=q.device)
    cu_keys = None if layout.cu_seqlens_k is None else layout.cu_seqlens_k.contiguous()
    sequences = 1 if cu_keys is None else cu_keys.shape[0] - 1
    every = block_lists(
        rows, bounds, S, sequences, config.select_block_size, chunk, tuned_block["segment"]
    )
    for first, count, lists in every:
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
            **split_arguments(split_head(q.shape[-1]), split_head(Dv)),
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
            HEADS=next_power_of_2(G),
            SLOTS=n,
            WIDTH_SLOTS=next_power_of_2(n),
            PARTS=parts,
            DIM_V=Dv,
            WIDTH=next_power_of_2(Dv),
            num_warps=4,
        )


def query_chunk(num_queries: int, bytes_per_query: int, room: int = PARTIAL_BYTES) -> int:
    """How many queries to work on at a time so that their partial results fit, in equal parts."""
    most = max(64, room // bytes_per_query)
    return cdiv(num_queries, cdiv(num_queries, most))


@triton.jit(
    do_not_specialize=["tiles", "splits", "B", "T", "stride_bounds"],
    do_not_specialize_on_alignment=["lse"],
)
def _by_query_kernel(
    q,
    k,
    v,
    tile_first,
    tile_stop,
    shared,
    counts,
    own,
    lower,
    upper,
    out,
    lse,
    scale_log2,
    tiles,
    splits,
    B,
    T,
    HK,
    G,
    n,
    kept,
    stride_bounds,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_vb,
    stride_vh,
    STRIDE_KS: tl.constexpr,
    STRIDE_VS: tl.constexpr,
    SELECT: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    OWN: tl.constexpr,
    SPLIT: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr,
    DIM_K: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_REST: tl.constexpr,
    DIM_V: tl.constexpr,
    V_MAIN: tl.constexpr,
    V_REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OWN_N: tl.constexpr,
    DEPTH: tl.constexpr = 0,
):
    """One program: `HEADS` heads of `QUERIES` neighbouring queries of one sequence and KV head.

    First the blocks that the queries share, one product for all rows, then those left to one
    query, as a batch of products. The loops have no branch, which would keep Triton from
    overlapping loads with arithmetic, and only blocks that not all queries see to the end are
    masked token by token. The strides of tokens are constants: an address is then one sum.
    """
    ROWS: tl.constexpr = QUERIES * HEADS
    head_tiles = tl.cdiv(G, HEADS)
    i_program = tl.program_id(0)
    i_split = (i_program % splits).to(tl.int64)
    if SPLIT:
        i_program //= splits
    i_head_tile = i_program % head_tiles
    # All tiles of a KV head run one after the other: its keys and values stay in the cache.
    i_shares = i_program // head_tiles
    i_tile = i_shares % tiles
    i_kv = (i_shares // tiles % HK).to(tl.int64)
    i_batch = (i_shares // tiles // HK).to(tl.int64)
    first, stop = tile_of(tile_first, tile_stop, i_tile, QUERIES, T)
    if first >= stop:
        return
    o_row = tl.arange(0, ROWS)
    o_query = (first + o_row // HEADS).to(tl.int64)
    o_member = i_head_tile * HEADS + o_row % HEADS
    m_row = (o_query < stop) & (o_member < G)
    p_bounds = i_batch * stride_bounds + o_query
    b_upper = tl.load(upper + p_bounds, mask=m_row, other=0)
    # Rows that see nothing may hold anything: they are read as 0.
    m_seeing = m_row & (b_upper > tl.load(lower + p_bounds, mask=m_row, other=0))
    p_q = q + i_batch * stride_qb
    o_q = o_query * stride_qt + (i_kv * G + o_member) * stride_qh
    b_q = load_rows(p_q, o_q, m_seeing, 0, K_MAIN, DIM_K, True)
    b_q_rest = b_q
    if K_REST:
        b_q_rest = load_rows(p_q, o_q, m_seeing, K_MAIN, K_REST, DIM_K, True)
    if NEGATIVE_SCALE:
        b_q, b_q_rest = -b_q, -b_q_rest
    p_k = k + i_batch * stride_kb + i_kv * stride_kh
    p_v = v + i_batch * stride_vb + i_kv * stride_vh

    running_max = tl.full([ROWS], float("-inf"), tl.float32)
    running_sum = tl.zeros([ROWS], tl.float32)
    accumulator = tl.zeros([ROWS, V_MAIN], tl.float32)
    accumulator_rest = tl.zeros([ROWS, V_REST if V_REST else 1], tl.float32)
    p_counts = counts + i_shares.to(tl.int64) * COUNTS
    p_shared = shared + i_shares.to(tl.int64) * kept * FIELDS
    PARTS: tl.constexpr = (SELECT + BLOCK_N - 1) // BLOCK_N
    o_inside = tl.arange(0, BLOCK_N)
    o_k = o_inside.to(tl.int64) * STRIDE_KS
    o_v = o_inside.to(tl.int64) * STRIDE_VS
    start, end = 0, tl.load(p_counts) * PARTS
    if SPLIT:
        low, high = split_range(0, tl.load(p_counts + 1) * PARTS, i_split, splits)
        start, end = low, tl.maximum(low, tl.minimum(end, high))
    for MASKED in tl.static_range(2):
        for i_part in range(start, end):
            p_block = p_shared + i_part // PARTS * FIELDS
            i_key = tl.load(p_block) + i_part % PARTS * BLOCK_N
            m_chose = ((tl.load(p_block + 1) >> (o_row // HEADS)) & 1) > 0
            m_key = o_inside >= 0
            if MASKED:
                seen = tl.load(p_block + 2) - i_key
                m_key = o_inside < seen
            p_k_tile = p_k + i_key.to(tl.int64) * STRIDE_KS
            b_k = load_rows(p_k_tile, o_k, m_key, 0, K_MAIN, DIM_K, MASKED)
            b_k_rest = b_k
            if K_REST:
                b_k_rest = load_rows(p_k_tile, o_k, m_key, K_MAIN, K_REST, DIM_K, MASKED)
            # [ROWS, BLOCK_N]
            b_s = dot_split(b_q, b_q_rest, b_k, b_k_rest, K_REST, DEPTH)
            if MASKED:
                b_seen = tl.where(m_chose, tl.minimum(b_upper - i_key, seen), 0)
                b_s = tl.where(o_inside[None, :] < b_seen[:, None], b_s, float("-inf"))
                m_chose = b_seen > 0
            b_p, decay, running_max, running_sum = _softmax_step(
                b_s, m_chose, running_max, running_sum, scale_log2
            )
            p_v_tile = p_v + i_key.to(tl.int64) * STRIDE_VS
            b_v = load_rows(p_v_tile, o_v, m_key, 0, V_MAIN, DIM_V, MASKED)
            accumulator = dot(b_p.to(b_v.dtype), b_v, accumulator * decay[:, None])
            if V_REST:
                b_v = load_rows(p_v_tile, o_v, m_key, V_MAIN, V_REST, DIM_V, MASKED)
                accumulator_rest = dot(b_p.to(b_v.dtype), b_v, accumulator_rest * decay[:, None])
        start, end = end, high if SPLIT else tl.load(p_counts + 1) * PARTS

    if OWN:
        OWN_PARTS: tl.constexpr = SELECT // OWN_N
        o_tile_query = first + tl.arange(0, QUERIES)
        m_query = o_tile_query < stop
        p_own = own + ((i_batch * T + o_tile_query) * HK + i_kv) * n
        running_max = tl.reshape(running_max, [QUERIES, HEADS])
        running_sum = tl.reshape(running_sum, [QUERIES, HEADS])
        accumulator = tl.reshape(accumulator, [QUERIES, HEADS, V_MAIN])
        accumulator_rest = tl.reshape(accumulator_rest, [QUERIES, HEADS, V_REST if V_REST else 1])
        o_q = tl.reshape(o_q, [QUERIES, HEADS])
        m_seeing = tl.reshape(m_seeing, [QUERIES, HEADS])
        b_q = _load_batch(p_q, o_q, m_seeing, 0, K_MAIN, DIM_K)
        b_q_rest = b_q
        if K_REST:
            b_q_rest = _load_batch(p_q, o_q, m_seeing, K_MAIN, K_REST, DIM_K)
        if NEGATIVE_SCALE:
            b_q, b_q_rest = -b_q, -b_q_rest
        o_inside = tl.arange(0, OWN_N)
        o_k = (o_inside.to(tl.int64) * STRIDE_KS)[None, :]
        o_v = (o_inside.to(tl.int64) * STRIDE_VS)[None, :]
        for i_part in range(tl.load(p_counts + 2) * OWN_PARTS):
            b_row = tl.load(p_own + i_part // OWN_PARTS, mask=m_query, other=-1)
            m_chose = b_row[:, None] >= 0
            m_key = tl.broadcast_to(m_chose, [QUERIES, OWN_N])
            b_row = (b_row + i_part % OWN_PARTS * OWN_N).to(tl.int64)[:, None]
            b_k = _load_batch(p_k, b_row * STRIDE_KS + o_k, m_key, 0, K_MAIN, DIM_K)
            # [QUERIES, HEADS, OWN_N]
            b_s = tl.dot(b_q, tl.permute(b_k, (0, 2, 1)), input_precision="ieee")
            if K_REST:
                b_k = _load_batch(p_k, b_row * STRIDE_KS + o_k, m_key, K_MAIN, K_REST, DIM_K)
                b_s = dot(b_q_rest, tl.permute(b_k, (0, 2, 1)), b_s)
            b_p, decay, running_max, running_sum = _softmax_step(
                b_s, m_chose, running_max, running_sum, scale_log2
            )
            b_v = _load_batch(p_v, b_row * STRIDE_VS + o_v, m_key, 0, V_MAIN, DIM_V)
            accumulator = dot(b_p.to(b_v.dtype), b_v, accumulator * decay[:, :, None])
            if V_REST:
                b_v = _load_batch(p_v, b_row * STRIDE_VS + o_v, m_key, V_MAIN, V_REST, DIM_V)
                accumulator_rest = dot(b_p.to(b_v.dtype), b_v, accumulator_rest * decay[:, :, None])
        running_max = tl.reshape(running_max, [ROWS])
        running_sum = tl.reshape(running_sum, [ROWS])
        accumulator = tl.reshape(accumulator, [ROWS, V_MAIN])
        accumulator_rest = tl.reshape(accumulator_rest, [ROWS, V_REST if V_REST else 1])

    running_max *= scale_log2
    m_empty = running_sum == 0.0
    running_sum = tl.where(m_empty, 1.0, running_sum)
    b_lse = tl.where(m_empty, float("-inf"), (running_max + tl.log2(running_sum)) * LOG_2)
    o_out = ((i_batch * T + o_query) * HK + i_kv) * G + o_member
    if SPLIT:
        o_out += i_split * B * T * HK * G
    tl.store(lse + o_out, b_lse, mask=m_row)
    o_out *= DIM_V
    store_rows(out, accumulator / running_sum[:, None], o_out, m_row, 0, V_MAIN, DIM_V)
    if V_REST:
        b_out = accumulator_rest / running_sum[:, None]
        store_rows(out, b_out, o_out, m_row, V_MAIN, V_REST, DIM_V)


@triton.jit
def _softmax_step(b_s, m_chose, running_max, running_sum, scale_log2):
    """Probabilities of a tile of scores, what to scale the rows' sums by, their new max and sum.

    Scores are not scaled yet, nor is the max. Rows with `m_chose` false keep what they have.
    """
    AXIS: tl.constexpr = len(b_s.shape) - 1
    next_max = tl.maximum(running_max, tl.max(b_s, AXIS))
    next_max = tl.where(m_chose, next_max, running_max)
    shift = tl.where(m_chose, next_max * scale_log2, float("inf"))
    b_p = tl.exp2(b_s * scale_log2 - tl.expand_dims(shift, AXIS))
    decay = tl.where(m_chose, tl.exp2(running_max * scale_log2 - shift), 1.0)
    return b_p, decay, next_max, running_sum * decay + tl.sum(b_p, AXIS)


@triton.jit
def _load_batch(
    p_base, o_row, m_row, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr
):  # fmt: skip
    """`load_rows` for a batch of tiles. `[BATCH, ROWS, WIDTH]`."""
    o_column = START + tl.arange(0, WIDTH)
    m_tile = m_row[:, :, None]
    if START + WIDTH > DIM:
        m_tile = m_tile & (o_column < DIM)[None, None, :]
    return tl.load(p_base + o_row[:, :, None] + o_column[None, None, :], mask=m_tile, other=0.0)


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
    DEPTH: tl.constexpr = 0,
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
        b_s = dot_split(b_q, b_q_rest, b_k, b_k_rest, K_REST, DEPTH)
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
    WIDTH_SLOTS: tl.constexpr,
    PARTS: tl.constexpr,
    DIM_V: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program: the output of one query and KV head, merged with its partial results."""
    i_kv = tl.program_id(0) % HK
    i_batch = (tl.program_id(0) // HK % B).to(tl.int64)
    i_query = first_query + tl.program_id(0) // HK // B
    o_target = (i_batch * T + i_query) * HK + i_kv
    o_partial = tl.program_id(0).to(tl.int64) * (SLOTS * PARTS)
    o_head = tl.arange(0, HEADS)
    m_head = o_head < G
    o_column = tl.arange(0, WIDTH)
    m_tile = m_head[:, None] & (o_column < DIM_V)[None, :]

    o_slot = tl.arange(0, WIDTH_SLOTS)
    b_row = tl.load(rows + o_target * SLOTS + o_slot, mask=o_slot < SLOTS, other=-1)
    o_row = o_target * G + o_head
    p_lse = lse + o_row
    p_final = out + o_row[:, None] * DIM_V + o_column[None, :]
    running_max = tl.load(p_lse, mask=m_head, other=0.0) * LOG2_E_DEVICE
    running_sum = tl.where(running_max == float("-inf"), 0.0, 1.0)
    accumulator = tl.load(p_final, mask=m_tile, other=0.0).to(tl.float32)
    # The blocks that are left come first.
    for i_partial in range(tl.sum((b_row >= 0).to(tl.int32), 0) * PARTS):
        o_row = (o_partial + i_partial) * G + o_head
        b_lse = tl.load(partial_lse + o_row, mask=m_head, other=float("-inf"))
        p_out = partial_out + o_row[:, None] * DIM_V + o_column[None, :]
        b_out = tl.load(p_out, mask=m_tile, other=0.0).to(tl.float32)
        next_max = tl.maximum(running_max, b_lse)
        shift = tl.where(next_max == float("-inf"), 0.0, next_max)
        decay, weight = tl.exp2(running_max - shift), tl.exp2(b_lse - shift)
        running_max = next_max
        running_sum = running_sum * decay + weight
        accumulator = accumulator * decay[:, None] + b_out * weight[:, None]

    m_empty = running_sum == 0.0
    running_sum = tl.where(m_empty, 1.0, running_sum)
    b_lse = tl.where(m_empty, float("-inf"), (running_max + tl.log2(running_sum)) * LOG_2)
    # Every warp has read what it starts from: one of them may now write over it.
    tl.debug_barrier()
    tl.store(p_lse, b_lse, mask=m_head)
    b_out = (accumulator / running_sum[:, None]).to(out.dtype.element_ty)
    tl.store(p_final, b_out, mask=m_tile)
