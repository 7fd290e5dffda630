"""Scores of the choice of blocks: probabilities of compressed keys, summed over a group's heads.

By tiles of queries, or, for the few of decoding, by query with its heads as rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa_port.kernels.triton.bounds import tile_of
from nsa_port.kernels.triton.tiles import LOG2_E, dot_split, load_rows

_LENGTHS = [
    "first_tile", "T", "C", "B", "columns", "key_tiles", "stride_bounds", "stride_lb", "stride_lt",
]  # fmt: skip


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=["lse"])
def _block_scores_kernel(
    q,
    k,
    lse,
    scores,
    tile_first,
    tile_stop,
    lower,
    upper,
    scale_log2,
    first_tile,
    T,
    C,
    B,
    HK,
    G,
    columns,
    key_tiles,
    stride_bounds,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_lb,
    stride_lt,
    PER_SELECT: tl.constexpr,
    PER_COMPRESSED: tl.constexpr,
    FOLDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    DIM_K: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DEPTH: tl.constexpr = 0,
):
    """One program: `BLOCK_M` queries against `BLOCK_N` compressed keys, summed over the group.

    Unfolded, the summed probabilities themselves are stored. Folded, Eq. 9's overlap map is applied
    as far as one block's own compressed keys go: half a row for what each block has of its own,
    half for what the block before it passes on. Tiles that no query sees are not written.
    """
    i_tile = tl.program_id(0) // (key_tiles * B * HK)
    i_key_tile = tl.program_id(0) // (B * HK) % key_tiles
    i_batch = (tl.program_id(0) // HK % B).to(tl.int64)
    i_kv = (tl.program_id(0) % HK).to(tl.int64)
    first, stop = tile_of(tile_first, tile_stop, first_tile + i_tile, BLOCK_M, T)
    if first >= stop:
        return
    o_query = first + tl.arange(0, BLOCK_M)
    m_row = o_query < stop
    base = tl.load(lower + i_batch * stride_bounds + first)
    p_upper = upper + i_batch * stride_bounds + o_query
    if base + i_key_tile * BLOCK_N >= tl.max(tl.load(p_upper, mask=m_row, other=0), 0):
        return
    o_key = base + i_key_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_key = o_key < C
    p_k = k + i_batch * stride_kb + i_kv * stride_kh
    o_k = o_key.to(tl.int64) * stride_ks
    b_k = load_rows(p_k, o_k, m_key, 0, K_MAIN, DIM_K, True)
    b_k_rest = b_k
    if K_REST:
        b_k_rest = load_rows(p_k, o_k, m_key, K_MAIN, K_REST, DIM_K, True)
    b_probability = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    o_q = o_query.to(tl.int64) * stride_qt
    p_lse = lse + i_batch * stride_lb + o_query.to(tl.int64) * stride_lt
    p_q = q + i_batch * stride_qb + i_kv * G * stride_qh
    p_lse += i_kv * G
    for _ in range(G):
        b_q = load_rows(p_q, o_q, m_row, 0, K_MAIN, DIM_K, True)
        b_q_rest = b_q
        if K_REST:
            b_q_rest = load_rows(p_q, o_q, m_row, K_MAIN, K_REST, DIM_K, True)
        b_lse = tl.load(p_lse, mask=m_row, other=0.0).to(tl.float32) * LOG2_E
        b_s = dot_split(b_q, b_q_rest, b_k, b_k_rest, K_REST, DEPTH)
        b_probability += tl.exp2(b_s * scale_log2 - b_lse[:, None])
        p_q += stride_qh
        p_lse += 1
    # Offsets and masks anew, so that none is kept in registers throughout the loop.
    b_seen = tl.load(p_upper, mask=m_row, other=0) - (base + i_key_tile * BLOCK_N)
    b_probability = tl.where(tl.arange(0, BLOCK_N)[None, :] < b_seen[:, None], b_probability, 0.0)
    m_row = tl.arange(0, BLOCK_M) < stop - first
    o_row = (i_tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = tl.multiple_of(columns, ALIGNED)
    o_out = ((o_row * B + i_batch) * HK + i_kv) * columns
    _store_scores(
        scores + o_out, b_probability, m_row, i_key_tile, columns, PER_SELECT, PER_COMPRESSED,
        FOLDED,
    )  # fmt: skip


@triton.jit
def _store_scores(
    p_rows, b_probability, m_row, i_key_tile, columns, PER_SELECT: tl.constexpr,
    PER_COMPRESSED: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    """Store summed probabilities `[ROWS, BLOCK_N]`, folded into blocks or as they are."""
    ROWS: tl.constexpr = b_probability.shape[0]
    BLOCK_N: tl.constexpr = b_probability.shape[1]
    if FOLDED:
        BLOCKS: tl.constexpr = BLOCK_N // PER_SELECT
        o_inside = tl.arange(0, PER_SELECT)
        # Key i overlaps its own block by min(l / d, m / d - i), the next by the rest of l / d.
        own_weight = tl.minimum(PER_SELECT - o_inside, PER_COMPRESSED).to(tl.float32)
        b_blocks = tl.reshape(b_probability, [ROWS, BLOCKS, PER_SELECT])
        b_own = tl.sum(b_blocks * own_weight[None, None, :], 2)
        b_carried = tl.sum(b_blocks * (PER_COMPRESSED - own_weight)[None, None, :], 2)
        o_block = i_key_tile * BLOCKS + tl.arange(0, BLOCKS)
        p_out = p_rows[:, None] + o_block[None, :]
        tl.store(p_out, b_own, mask=m_row[:, None] & (o_block < columns // 2)[None, :])
        m_out = m_row[:, None] & (o_block + 1 < columns // 2)[None, :]
        tl.store(p_out + columns // 2 + 1, b_carried, mask=m_out)
    else:
        o_column = i_key_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        m_out = m_row[:, None] & (o_column < columns)[None, :]
        tl.store(p_rows[:, None] + o_column[None, :], b_probability, mask=m_out)


@triton.jit(do_not_specialize=_LENGTHS[1:], do_not_specialize_on_alignment=["lse"])
def _few_scores_kernel(
    q,
    k,
    lse,
    scores,
    lower,
    upper,
    scale_log2,
    T,
    C,
    B,
    HK,
    G,
    columns,
    key_tiles,
    stride_bounds,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_lb,
    stride_lt,
    HEADS: tl.constexpr,
    PER_SELECT: tl.constexpr,
    PER_COMPRESSED: tl.constexpr,
    FOLDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    DIM_K: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DEPTH: tl.constexpr = 0,
):
    """One program: what `_block_scores_kernel` does, for one query, whose heads are the rows."""
    i_query = (tl.program_id(0) // (key_tiles * B * HK)).to(tl.int64)
    i_key_tile = tl.program_id(0) // (B * HK) % key_tiles
    i_batch = (tl.program_id(0) // HK % B).to(tl.int64)
    i_kv = (tl.program_id(0) % HK).to(tl.int64)
    base = tl.load(lower + i_batch * stride_bounds + i_query) + i_key_tile * BLOCK_N
    seen = tl.load(upper + i_batch * stride_bounds + i_query) - base
    if seen <= 0:
        return
    o_inside = tl.arange(0, BLOCK_N)
    o_k = (base + o_inside).to(tl.int64) * stride_ks
    m_key = o_inside < tl.minimum(seen, C - base)
    o_head = tl.arange(0, HEADS)
    m_head = o_head < G
    p_q = q + i_batch * stride_qb + i_query * stride_qt + i_kv * G * stride_qh
    p_k = k + i_batch * stride_kb + i_kv * stride_kh
    b_q = load_rows(p_q, o_head * stride_qh, m_head, 0, K_MAIN, DIM_K, True)
    b_k = load_rows(p_k, o_k, m_key, 0, K_MAIN, DIM_K, True)
    b_q_rest, b_k_rest = b_q, b_k
    if K_REST:
        b_q_rest = load_rows(p_q, o_head * stride_qh, m_head, K_MAIN, K_REST, DIM_K, True)
        b_k_rest = load_rows(p_k, o_k, m_key, K_MAIN, K_REST, DIM_K, True)
    p_lse = lse + i_batch * stride_lb + i_query * stride_lt + i_kv * G + o_head
    # Heads that do not exist add nothing.
    b_lse = tl.load(p_lse, mask=m_head, other=float("inf")).to(tl.float32) * LOG2_E
    # [HEADS, BLOCK_N]
    b_s = dot_split(b_q, b_q_rest, b_k, b_k_rest, K_REST, DEPTH)
    b_p = tl.sum(tl.exp2(b_s * scale_log2 - b_lse[:, None]), 0)
    b_p = tl.where(m_key, b_p, 0.0)
    columns = tl.multiple_of(columns, ALIGNED)
    o_row = ((i_query * B + i_batch) * HK + i_kv) * columns + tl.arange(0, 1)
    _store_scores(
        scores + o_row, b_p[None, :], o_row >= 0, i_key_tile, columns, PER_SELECT, PER_COMPRESSED,
        FOLDED,
    )  # fmt: skip
