"""The choice of blocks: scores from a second pass over the compressed keys, then an exact top-n.

Scores of a bounded number of queries at a time are kept, so that memory stays linear in the length.
Queries are cut into tiles that never cross from one packed sequence into the next; a tile's
compressed keys then start at one row, and block grids line up with key tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_port.kernels.geometry import Layout, NSAConfig
from nsa_port.kernels.triton.bounds import (
    Kind,
    QueryBounds,
    Tiles,
    cut_tiles,
    query_bounds,
    tile_of,
)
from nsa_port.kernels.triton.host import (
    LOG2_E,
    arch_of,
    cdiv,
    last_contiguous,
    launch_options,
    next_power_of_2,
    on_device_of,
    split_head,
    strides,
    tuned,
)
from nsa_port.kernels.triton.tiles import LOG2_E as LOG2_E_DEVICE
from nsa_port.kernels.triton.tiles import dot_split, load_rows, split_row

_SCORE_BYTES = 2**28
"""Room for the scores of the queries that are worked on at a time."""

_TOP_BLOCKS = (128, 256, 512, 1024, 4096)
"""Blocks a top-n program holds in registers; beyond the last it reads them again at each step."""

_FEWEST_SLOTS = 16
"""Groups of blocks from which the search starts; with 1 or 2, each lane would hold every block of
its rows, and LLVM takes minutes, or does not end, over so many registers."""

_FEW_QUERIES = 16
"""Up to so many, as in decoding, a query's heads are the rows of a tile, not the queries of a head.
"""

_FEW_HEADS = 32
"""Larger groups fill a tile either way."""

_ALIGNED = 4
"""A row of scores has a multiple of so many columns, so that they are loaded four at a time."""

FORCED = tl.constexpr(0x7F800000)
"""The rank of a forced block: infinity's."""


@dataclass(frozen=True, slots=True)
class Scored:
    """The scores of `count` query tiles from `first_tile` on, and what bounds the choice from them.

    scores: `[count * block_m, B, HK, columns]`, as `_block_scores_kernel` leaves them, folded or
        not; never written where not `scored`, and then every score is 0.
    blocks: the most candidates that any of the queries has.
    """

    scores: Tensor
    columns: int
    folded: bool
    scored: bool
    tiles: Tiles
    first_tile: int
    count: int
    block_m: int
    visible: QueryBounds
    causal: QueryBounds
    blocks: int


def choose_blocks(indices: Tensor, found: Scored, config: NSAConfig) -> None:
    """Write the best blocks of the scored queries to `indices [B, T, HK, n]`."""
    B, T, HK, n = indices.shape
    per_select = config.select_block_size // config.block_stride
    per_compressed = config.block_size // config.block_stride
    first_weight, weights = config.score_weights()
    rows = found.count * found.block_m * B * HK
    tiles, visible, causal = found.tiles, found.visible, found.causal
    arguments = (
        found.scores,
        indices,
        tiles.first,
        tiles.stop,
        visible.lower,
        visible.upper if found.scored else visible.lower,
        causal.lower,
        causal.upper,
        rows,
        found.first_tile,
        T,
        B,
        HK,
        found.columns,
        visible.stride,
        causal.stride,
        config.select_block_size,
        n,
        config.init_blocks,
        config.local_blocks,
        first_weight,
        len(weights),
        per_compressed,
        per_select,
    )
    width = next((size for size in _TOP_BLOCKS if found.blocks <= size), _TOP_BLOCKS[-1])
    form = {
        "BLOCK_M": found.block_m,
        "SLOTS": max(_FEWEST_SLOTS, next_power_of_2(n)),
        "FOLDED": found.folded,
        "ALIGNED": _ALIGNED,
    }
    _compile_every_width(arguments, indices, config, form)
    held = found.blocks <= width
    _top_blocks_kernel[(cdiv(rows, _rows_of(width)),)](*arguments, **form, **_width(width, held))


def _rows_of(width: int) -> int:
    return max(1, 1024 // width)


def _width(width: int, held: bool) -> dict[str, int]:
    num_warps = max(1, width // 1024)
    return {"BLOCK_J": width, "ROWS": _rows_of(width), "HELD": held, "num_warps": num_warps}


_compiled: set[tuple[Any, ...]] = set()
"""For which devices, configs and forms every width has been compiled."""


def _compile_every_width(
    arguments: tuple[Any, ...], indices: Tensor, config: NSAConfig, form: dict[str, int]
) -> None:
    """With the first length on an NVIDIA GPU, compile for all others: none stops for it later."""
    if not arch_of(indices).startswith("sm_"):
        return
    key = (triton.runtime.driver.active.get_current_device(), config, *form.values())
    if key in _compiled:
        return
    _compiled.add(key)
    for width, held in (*((size, True) for size in _TOP_BLOCKS), (_TOP_BLOCKS[-1], False)):
        _top_blocks_kernel.warmup(*arguments, grid=(1,), **form, **_width(width, held))


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    config: NSAConfig,
    layout: Layout,
    scale: float,
    *,
    choose: Callable[[Tensor, Scored, NSAConfig], None] = choose_blocks,
) -> Tensor:
    """The blocks each query and KV head attends to (Eq. 9 to 11). int32 `[B, T, HK, n]`.

    `choose` is for a kernel of another folder in place of `choose_blocks`.
    """
    T, C = q.shape[1], k_cmp.shape[1]
    with on_device_of(q):
        visible = query_bounds(Kind.COMPRESSED, T, C, config, layout, q.device)
        causal = query_bounds(Kind.CAUSAL, T, layout.num_keys, config, layout, q.device)
        return blocks_of(q, k_cmp, lse, visible, causal, config, layout, scale, choose=choose)


def blocks_of(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    visible: QueryBounds,
    causal: QueryBounds,
    config: NSAConfig,
    layout: Layout,
    scale: float,
    *,
    choose: Callable[[Tensor, Scored, NSAConfig], None] = choose_blocks,
) -> Tensor:
    """`select_blocks` with the bounds at hand, on the current device."""
    lse = last_contiguous(lse)
    B, T, H, Dk = q.shape
    C, HK = k_cmp.shape[1:3]
    n = config.num_selected
    indices = torch.empty((B, T, HK, n), dtype=torch.int32, device=q.device)
    if indices.numel() == 0:
        return indices
    tuned_scores = tuned(arch_of(q), "block_scores", q.element_size(), Dk)
    block_m, block_n = tuned_scores["BLOCK_M"], tuned_scores["BLOCK_N"]
    tiles = cut_tiles(T, block_m, layout.cu_seqlens)
    blocks = max(1, config.num_select_blocks(layout.num_keys))
    # Where all blocks fit, all candidates are chosen: nothing is scored and every score reads as 0.
    scored = C > 0 and blocks > n

    per_select = config.select_block_size // config.block_stride
    per_compressed = config.block_size // config.block_stride
    folded = config.score_map == "overlap" and block_n % per_select == 0 and _is_power(per_select)
    num_compressed = max(1, min(C, config.num_compressed(layout.num_keys)))
    columns = cdiv(blocks if folded else num_compressed, _ALIGNED) * _ALIGNED
    columns *= 2 if folded else 1
    chunk = max(1, min(tiles.count, _SCORE_BYTES // (4 * B * HK * columns * block_m)))
    scores = torch.empty(
        (chunk * block_m, B, HK, columns) if scored else (1,), dtype=torch.float32, device=q.device
    )
    form = {
        "PER_SELECT": per_select,
        "PER_COMPRESSED": per_compressed,
        "FOLDED": folded,
        "ALIGNED": _ALIGNED,
        "DIM_K": Dk,
        "K_MAIN": split_head(Dk).main,
        "K_REST": split_head(Dk).rest,
    }
    few = T <= _FEW_QUERIES and H // HK <= _FEW_HEADS and layout.cu_seqlens is None
    positions_known = layout.cu_seqlens is None and layout.positions is None
    for first_tile in range(0, tiles.count, chunk):
        count = min(chunk, tiles.count - first_tile)
        if positions_known:
            seen = layout.num_keys - T + min(T, (first_tile + count) * block_m)
            blocks = max(1, config.num_select_blocks(seen))
            num_compressed = max(1, min(C, config.num_compressed(seen)))
        key_tiles = cdiv(num_compressed, block_n)
        if scored and few:
            _few_scores_kernel[(T * key_tiles * B * HK,)](
                q,
                k_cmp,
                lse,
                scores,
                visible.lower,
                visible.upper,
                scale * LOG2_E,
                T,
                C,
                B,
                HK,
                H // HK,
                columns,
                key_tiles,
                visible.stride,
                *strides(q),
                *strides(k_cmp),
                *strides(lse),
                HEADS=max(16, next_power_of_2(H // HK)),
                BLOCK_N=block_n,
                **form,
                **launch_options(tuned_scores),
            )
        elif scored:
            _block_scores_kernel[(count * key_tiles * B * HK,)](
                q,
                k_cmp,
                lse,
                scores,
                tiles.first,
                tiles.stop,
                visible.lower,
                visible.upper,
                scale * LOG2_E,
                first_tile,
                T,
                C,
                B,
                HK,
                H // HK,
                columns,
                key_tiles,
                visible.stride,
                *strides(q),
                *strides(k_cmp),
                *strides(lse),
                **form,
                **tuned_scores,
            )
        found = Scored(
            scores, columns, folded, scored, tiles, first_tile, count, block_m, visible, causal,
            blocks,
        )  # fmt: skip
        choose(indices, found, config)
    return indices


def _is_power(number: int) -> bool:
    return number & (number - 1) == 0


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
        b_lse = tl.load(p_lse, mask=m_row, other=0.0).to(tl.float32) * LOG2_E_DEVICE
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


@triton.jit(
    do_not_specialize=[
        "T",
        "C",
        "B",
        "columns",
        "key_tiles",
        "stride_bounds",
        "stride_lb",
        "stride_lt",
    ],
    do_not_specialize_on_alignment=["lse"],
)
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
    b_lse = tl.load(p_lse, mask=m_head, other=float("inf")).to(tl.float32) * LOG2_E_DEVICE
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


_LENGTHS = ["rows", "first_tile", "T", "B", "columns", "stride_visible", "stride_causal"]


@triton.jit(do_not_specialize=_LENGTHS)
def _top_blocks_kernel(
    scores,
    indices,
    tile_first,
    tile_stop,
    visible_lower,
    visible_upper,
    causal_lower,
    causal_upper,
    rows,
    first_tile,
    T,
    B,
    HK,
    columns,
    stride_visible,
    stride_causal,
    select_block_size,
    n,
    init_blocks,
    local_blocks,
    first_weight,
    num_weights,
    per_compressed,
    per_select,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    FOLDED: tl.constexpr,
    HELD: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One program: the best `n` blocks of `ROWS` rows, each a query and KV head, ascending.

    Scores are not negative, so they order as the integers their bits spell, here called ranks. The
    interval that holds the n-th best rank is halved until it holds nothing else, or until exactly
    `n` blocks rank above its middle. What lies above is taken, and of its equals the first ones.
    """
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    o_row = tl.minimum(o_row, rows - 1)
    o_local, o_batch, i_kv = split_row(o_row, B, HK)
    o_row = o_row.to(tl.int64)
    o_tile = first_tile + o_local // BLOCK_M
    b_first, b_stop = tile_of(tile_first, tile_stop, o_tile, BLOCK_M, T)
    o_query = b_first + o_local % BLOCK_M
    m_row &= o_query < b_stop
    if tl.max(m_row.to(tl.int32), 0) == 0:
        return
    p_visible = o_batch * stride_visible + o_query
    b_visible = tl.load(visible_upper + p_visible, mask=m_row, other=0)
    b_visible -= tl.load(visible_lower + p_visible, mask=m_row, other=0)
    p_causal = o_batch * stride_causal + o_query
    b_seen = tl.load(causal_upper + p_causal, mask=m_row, other=0)
    b_seen -= tl.load(causal_lower + p_causal, mask=m_row, other=0)
    # [ROWS, 1]: blocks up to the query's own.
    b_candidates = tl.cdiv(b_seen, select_block_size)[:, None]
    b_visible = (b_visible if FOLDED else tl.minimum(b_visible, columns))[:, None]
    columns = tl.multiple_of(columns, 2 * ALIGNED if FOLDED else ALIGNED)
    p_scores = scores + (o_row * columns)[:, None]
    p_out = indices + (((o_batch * T + o_query) * HK + i_kv) * n)[:, None]

    o_slot = tl.arange(0, SLOTS)[None, :]
    m_padding = m_row[:, None] & (o_slot < n) & (o_slot >= b_candidates)
    tl.store(p_out + o_slot, tl.full([ROWS, SLOTS], -1, tl.int32), mask=m_padding)
    o_block = tl.arange(0, BLOCK_J)[None, :]
    stop = BLOCK_J if HELD else tl.max(b_candidates)
    b_held = _ranks(
        p_scores, o_block, b_candidates, b_visible, columns, init_blocks, local_blocks,
        first_weight, num_weights, per_compressed, per_select, FOLDED,
    )  # fmt: skip
    b_low, b_high = _rank_interval(
        b_held, p_scores, o_block, stop, b_candidates, b_visible, columns, init_blocks,
        local_blocks, first_weight, num_weights, per_compressed, per_select, FOLDED, ROWS, BLOCK_J,
        SLOTS,
    )  # fmt: skip
    b_count = _count_from(
        b_high, b_held, p_scores, o_block, stop, b_candidates, b_visible, columns, init_blocks,
        local_blocks, first_weight, num_weights, per_compressed, per_select, FOLDED, BLOCK_J,
    )  # fmt: skip
    # Where the forced blocks fill all slots, or all candidates fit, there is nothing to search.
    b_low = tl.where(b_count >= n, FORCED, b_low)
    m_open = (b_count < n) & (tl.sum(b_candidates, 1) > n) & (b_high - b_low > 1)
    while tl.max(m_open.to(tl.int32), 0) > 0:
        b_trial = b_low + (b_high - b_low) // 2
        b_count = _count_from(
            b_trial, b_held, p_scores, o_block, stop, b_candidates, b_visible, columns,
            init_blocks, local_blocks, first_weight, num_weights, per_compressed, per_select,
            FOLDED, BLOCK_J,
        )  # fmt: skip
        b_low = tl.where(m_open & (b_count >= n), b_trial, b_low)
        b_high = tl.where(m_open & (b_count < n), b_trial, b_high)
        m_open = m_open & (b_count != n) & (b_high - b_low > 1)
    b_above = _count_from(
        b_low + 1, b_held, p_scores, o_block, stop, b_candidates, b_visible, columns,
        init_blocks, local_blocks, first_weight, num_weights, per_compressed, per_select,
        FOLDED, BLOCK_J,
    )  # fmt: skip
    # [ROWS, 1]: equals still to take, and slots already filled.
    b_left = n - b_above[:, None]
    b_filled = tl.zeros([ROWS, 1], tl.int32)
    for i_block in range(0, stop, BLOCK_J):
        b_ranks = b_held
        if not HELD:
            b_ranks = _ranks(
                p_scores, i_block + o_block, b_candidates, b_visible, columns, init_blocks,
                local_blocks, first_weight, num_weights, per_compressed, per_select, FOLDED,
            )  # fmt: skip
        m_above, m_equal = b_ranks > b_low[:, None], b_ranks == b_low[:, None]
        # Both running counts in one scan: those above in the lower half, the equals in the upper.
        b_running = tl.cumsum(m_above.to(tl.int32) + (m_equal.to(tl.int32) << 16), 1)
        b_equals = b_running >> 16
        m_taken = m_above | (m_equal & (b_equals <= b_left))
        o_target = b_filled + (b_running & 0xFFFF) + tl.minimum(b_equals, b_left) - 1
        b_block = tl.zeros([ROWS, BLOCK_J], tl.int32) + (i_block + o_block)
        tl.store(p_out + o_target, b_block, mask=m_row[:, None] & m_taken & (o_target < n))
        b_left -= tl.sum(m_equal.to(tl.int32), 1)[:, None]
        b_left = tl.maximum(b_left, 0)
        b_filled += tl.sum(m_taken.to(tl.int32), 1)[:, None]


@triton.jit
def _rank_interval(
    b_held, p_scores, o_block, stop, b_candidates, b_visible, columns, init_blocks, local_blocks,
    first_weight, num_weights, per_compressed, per_select, FOLDED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_J: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Where to look for the rank of each row's n-th best block: `low <= rank < high`.

    `high` is just above the best block that is not forced. Of `SLOTS >= n` groups of blocks, each
    has one that ranks at least as high as the worst group's best, which makes `low`.
    """
    b_best = tl.max(tl.where(b_held == FORCED, -1, b_held), 1)
    for i_block in range(BLOCK_J, stop, BLOCK_J):
        b_ranks = _ranks(
            p_scores, i_block + o_block, b_candidates, b_visible, columns, init_blocks,
            local_blocks, first_weight, num_weights, per_compressed, per_select, FOLDED,
        )  # fmt: skip
        b_best = tl.maximum(b_best, tl.max(tl.where(b_ranks == FORCED, -1, b_ranks), 1))
    b_low = tl.zeros([ROWS], tl.int32)
    if SLOTS < BLOCK_J:
        b_groups = tl.max(tl.reshape(b_held, [ROWS, BLOCK_J // SLOTS, SLOTS]), 1)
        b_low = tl.maximum(tl.min(b_groups, 1), 0)
    return b_low, b_best + 1


@triton.jit
def _count_from(
    b_trial, b_held, p_scores, o_block, stop, b_candidates, b_visible, columns,
    init_blocks, local_blocks, first_weight, num_weights, per_compressed, per_select,
    FOLDED: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """How many blocks of each row rank at `b_trial` or above; what is not held is read again."""
    b_count = tl.sum((b_held >= b_trial[:, None]).to(tl.int32), 1)
    for i_block in range(BLOCK_J, stop, BLOCK_J):
        b_ranks = _ranks(
            p_scores, i_block + o_block, b_candidates, b_visible, columns, init_blocks,
            local_blocks, first_weight, num_weights, per_compressed, per_select, FOLDED,
        )  # fmt: skip
        b_count += tl.sum((b_ranks >= b_trial[:, None]).to(tl.int32), 1)
    return b_count


@triton.jit
def _ranks(
    p_scores, o_block, b_candidates, b_visible, columns, init_blocks, local_blocks,
    first_weight, num_weights, per_compressed, per_select, FOLDED: tl.constexpr,
):  # fmt: skip
    """A block's rank: the bits of its score, infinity's if forced, -1 for no candidate."""
    m_candidate = o_block < b_candidates
    # Block j's own compressed keys start at j m / d: whatever lies past the visible ones is 0.
    if FOLDED:
        m_own = m_candidate & (o_block * per_select < b_visible)
        m_carried = m_candidate & (o_block > 0) & ((o_block - 1) * per_select < b_visible)
        b_score = tl.load(p_scores + o_block, mask=m_own, other=0.0)
        b_score += tl.load(p_scores + columns // 2 + o_block, mask=m_carried, other=0.0)
    else:
        b_score = tl.zeros_like(m_candidate.to(tl.float32))
        for i_weight in range(num_weights):
            o_key = o_block * per_select + first_weight + i_weight
            m_key = m_candidate & (o_key >= 0) & (o_key < b_visible)
            b_p = tl.load(p_scores + o_key, mask=m_key, other=0.0)
            b_score += b_p * tl.minimum(
                tl.minimum(i_weight + 1, num_weights - i_weight), per_compressed
            )
    b_ranks = tl.maximum(b_score.to(tl.int32, bitcast=True), 0)
    m_forced = (o_block < init_blocks) | (o_block >= b_candidates - local_blocks)
    b_ranks = tl.where(m_forced, FORCED, b_ranks)
    return tl.where(m_candidate, b_ranks, -1)
