"""Attention over chosen blocks by tiles of neighbouring queries, for groups that fill matrix units.

A block that several queries of the tile chose is loaded once and multiplied with all their rows;
the others are loaded once for the query that chose them. Where neighbours agree, that is several
times fewer loads and products than query by query.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nsa_port.kernels.geometry import Layout, NSAConfig
from nsa_port.kernels.tables import Values, load_table
from nsa_port.kernels.triton.bounds import QueryBounds, cut_tiles, tile_of
from nsa_port.kernels.triton.host import (
    LOG2_E,
    arch_of,
    split_arguments,
    split_head,
    strides,
    tuned,
)
from nsa_port.kernels.triton.sharing import COUNTS, FIELDS, most_queries, share_blocks
from nsa_port.kernels.triton.tiles import LOG_2, dot, dot_split, load_rows, store_rows

_KERNEL = "selected_by_tile"


def tile_values(q: Tensor, v: Tensor) -> Values | None:
    """The tuned values, None where the table has none for these tensors."""
    arch = arch_of(q)
    if _KERNEL not in load_table(arch):
        return None
    try:
        values = tuned(arch, _KERNEL, q.element_size(), q.shape[3], v.shape[3])
    except ValueError:
        return None
    group = q.shape[2] // v.shape[2]
    return values if q.shape[1] >= values["fewest_queries"] and group >= 9 else None


def by_tile(
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
    """Attend to all chosen blocks, into `out` and `lse`."""
    B, T, H, Dk = q.shape
    HK, Dv = v.shape[2:]
    G, m, n = H // HK, config.select_block_size, config.num_selected
    heads = min(values["BLOCK_M"], max(16, triton.next_power_of_2(G)))
    queries = min(values["BLOCK_M"] // heads, most_queries(n))
    largest = max(16, triton.next_power_of_2(m))
    block_n, own_n = (min(values[name], largest) for name in ("BLOCK_N", "OWN_N"))
    even = m % block_n == 0 and m % own_n == 0
    # With more heads than the matrix units' 16 rows, every block is worth a tile of its own.
    least = min(values["least_sharing"] if heads == 16 and even else 1, queries)
    tiles = cut_tiles(T, queries, layout.cu_seqlens)
    shares = share_blocks(indices, bounds, m, tiles, queries, least, even)
    _by_tile_kernel[(tiles.count * B * HK * triton.cdiv(G, heads),)](
        q,
        k,
        v,
        tiles.first,
        tiles.stop,
        *shares,
        bounds.lower,
        bounds.upper,
        out,
        lse,
        # Never 0, which would turn the infinity of what is not seen into NaN.
        max(abs(scale) * LOG2_E, 1e-30),
        tiles.count,
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
        OWN=least > 1,
        NEGATIVE_SCALE=scale < 0,
        **split_arguments(split_head(Dk), split_head(Dv)),
        BLOCK_N=block_n,
        OWN_N=own_n,
        num_warps=values["num_warps"],
        num_stages=values["num_stages"],
    )


@triton.jit(do_not_specialize=["tiles", "T", "stride_bounds"])
def _by_tile_kernel(
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
    NEGATIVE_SCALE: tl.constexpr,
    DIM_K: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_REST: tl.constexpr,
    DIM_V: tl.constexpr,
    V_MAIN: tl.constexpr,
    V_REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OWN_N: tl.constexpr,
):
    """One program: `HEADS` heads of `QUERIES` neighbouring queries of one sequence and KV head.

    First the blocks that the queries share, one product for all rows, then those left to one
    query, as a batch of products. The loops have no branch, which would keep Triton from
    overlapping loads with arithmetic, and only blocks that not all queries see to the end are
    masked token by token. The strides of tokens are constants: an address is then one sum.
    """
    ROWS: tl.constexpr = QUERIES * HEADS
    head_tiles = tl.cdiv(G, HEADS)
    i_head_tile = tl.program_id(0) % head_tiles
    # All tiles of a KV head run one after the other: its keys and values stay in the cache.
    i_shares = tl.program_id(0) // head_tiles
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
            b_s = dot_split(b_q, b_q_rest, b_k, b_k_rest, K_REST)
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
        start, end = end, tl.load(p_counts + 1) * PARTS

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
