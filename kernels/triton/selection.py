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
    next_power_of_2,
    on_device_of,
    split_head,
    strides,
    tuned,
)
from nsa_port.kernels.triton.tiles import LOG2_E as LOG2_E_DEVICE
from nsa_port.kernels.triton.tiles import LARGEST, dot_split, load_rows

_SCORE_BYTES = 2**28
"""Room for the scores of the queries that are worked on at a time."""

_TOP_BLOCKS = (128, 256, 512, 1024, 2048, 4096)
"""Blocks a top-n program holds in registers; beyond the last it reads them again at each step."""

_HELD_BY_WARP = 1024
"""Blocks that one warp holds, 32 in each lane."""

_ALIGNED = 4
"""A row of scores has a multiple of so many columns, so that they are loaded four at a time."""

FEW = tl.constexpr(4)
"""Surplus blocks that are dropped one by one."""


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
        found.first_tile,
        T,
        B,
        HK,
        found.columns,
        visible.stride,
        causal.stride,
        n,
        config.local_blocks,
        first_weight,
        len(weights),
        per_compressed,
    )
    width = next((size for size in _TOP_BLOCKS if found.blocks <= size), _TOP_BLOCKS[-1])
    form = {
        "SELECT": config.select_block_size,
        "PER_SELECT": per_select,
        "INITIAL": config.init_blocks,
        "BLOCK_M": found.block_m,
        "SLOTS": next_power_of_2(n),
        "FOLDED": found.folded,
        "ALIGNED": _ALIGNED,
    }
    _compile_every_width(arguments, indices, config, form)
    held = found.blocks <= width
    rows = found.count * found.block_m * B
    _top_blocks_kernel[(rows, HK)](*arguments, **form, **_width(width, held))


def _width(width: int, held: bool) -> dict[str, int]:
    num_warps = max(1, width // _HELD_BY_WARP)
    lanes = min(32 * num_warps, width // _ALIGNED)
    return {"BLOCK_J": width, "LANES": lanes, "HELD": held, "num_warps": num_warps}


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
        _top_blocks_kernel.warmup(*arguments, grid=(1, 1), **form, **_width(width, held))


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
    positions_known = layout.cu_seqlens is None and layout.positions is None
    for first_tile in range(0, tiles.count, chunk):
        count = min(chunk, tiles.count - first_tile)
        if positions_known:
            seen = layout.num_keys - T + min(T, (first_tile + count) * block_m)
            blocks = max(1, config.num_select_blocks(seen))
            num_compressed = max(1, min(C, config.num_compressed(seen)))
        key_tiles = cdiv(num_compressed, block_n)
        if scored:
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
                PER_SELECT=per_select,
                PER_COMPRESSED=per_compressed,
                FOLDED=folded,
                ALIGNED=_ALIGNED,
                DIM_K=Dk,
                K_MAIN=split_head(Dk).main,
                K_REST=split_head(Dk).rest,
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


@triton.jit(do_not_specialize=_LENGTHS)
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
    if FOLDED:
        BLOCKS: tl.constexpr = BLOCK_N // PER_SELECT
        o_inside = tl.arange(0, PER_SELECT)
        # Key i overlaps its own block by min(l / d, m / d - i), the next by the rest of l / d.
        own_weight = tl.minimum(PER_SELECT - o_inside, PER_COMPRESSED).to(tl.float32)
        b_blocks = tl.reshape(b_probability, [BLOCK_M, BLOCKS, PER_SELECT])
        b_own = tl.sum(b_blocks * own_weight[None, None, :], 2)
        b_carried = tl.sum(b_blocks * (PER_COMPRESSED - own_weight)[None, None, :], 2)
        o_block = i_key_tile * BLOCKS + tl.arange(0, BLOCKS)
        p_out = scores + o_out[:, None] + o_block[None, :]
        tl.store(p_out, b_own, mask=m_row[:, None] & (o_block < columns // 2)[None, :])
        m_out = m_row[:, None] & (o_block + 1 < columns // 2)[None, :]
        tl.store(p_out + columns // 2 + 1, b_carried, mask=m_out)
    else:
        o_column = i_key_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        m_out = m_row[:, None] & (o_column < columns)[None, :]
        tl.store(scores + o_out[:, None] + o_column[None, :], b_probability, mask=m_out)


_LENGTHS = ["first_tile", "T", "B", "columns", "stride_visible", "stride_causal"]


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
    first_tile,
    T,
    B,
    HK,
    columns,
    stride_visible,
    stride_causal,
    n,
    local_blocks,
    first_weight,
    num_weights,
    per_compressed,
    SELECT: tl.constexpr,
    PER_SELECT: tl.constexpr,
    INITIAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
    LANES: tl.constexpr,
    SLOTS: tl.constexpr,
    FOLDED: tl.constexpr,
    HELD: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One program: the best `n` blocks of one row, which is a query and KV head, ascending.

    Forced blocks are the first and the last ones and need no rank. Of the others, `wanted` are to
    be chosen: those that rank at `low` or above. Where to look for it is found among the best of
    groups of blocks first, `ALIGNED` for each lane: at least `wanted` blocks rank as high as the
    `wanted`-th best of these, and seldom many more. If they are few they are dropped one by one,
    else the interval that has the rank is halved. Of equals the first ones are taken.
    """
    i_kv = tl.program_id(1)
    i_batch = (tl.program_id(0) % B).to(tl.int64)
    i_local = tl.program_id(0) // B
    first, stop = tile_of(tile_first, tile_stop, first_tile + i_local // BLOCK_M, BLOCK_M, T)
    i_query = first + i_local % BLOCK_M
    if i_query >= stop:
        return
    o_bound = i_batch * stride_visible + i_query
    visible = tl.load(visible_upper + o_bound) - tl.load(visible_lower + o_bound)
    o_bound = i_batch * stride_causal + i_query
    seen = tl.load(causal_upper + o_bound) - tl.load(causal_lower + o_bound)
    # Blocks up to the query's own; `free .. local - 1` are not forced.
    candidates = tl.cdiv(seen, SELECT)
    free = tl.minimum(INITIAL, candidates)
    local = tl.maximum(free, candidates - local_blocks)
    wanted = tl.minimum(n - (candidates - (local - free)), local - free)
    p_out = indices + ((i_batch * T + i_query) * HK + i_kv) * n
    # The slots of all but the `wanted`: forced blocks before and after them, then none.
    o_slot = tl.arange(0, SLOTS)
    unwanted = local - free - wanted
    b_slot = tl.where(o_slot < free, o_slot, o_slot + unwanted)
    b_slot = tl.where(o_slot < candidates - unwanted, b_slot, -1)
    m_slot = (o_slot < n) & ((o_slot < free) | (o_slot >= free + wanted))
    tl.store(p_out + o_slot, b_slot, mask=m_slot)
    if wanted <= 0:
        return

    # Spelt out, since `tl.multiple_of` says nothing of a kernel's argument.
    columns = columns // ALIGNED * ALIGNED
    visible = tl.cdiv(visible, PER_SELECT) if FOLDED else tl.minimum(visible, columns)
    p_scores = scores + (tl.program_id(0).to(tl.int64) * HK + i_kv) * columns
    row = (
        p_scores, local, visible, columns, first_weight, num_weights, per_compressed,
        PER_SELECT, INITIAL, FOLDED, ALIGNED,
    )  # fmt: skip
    o_block = tl.arange(0, BLOCK_J)
    stop = BLOCK_J if HELD else local
    b_held = _ranks(row, o_block)
    low, count = 0, local - free
    if unwanted > 0:
        b_groups = _best_of_groups(b_held, LANES, ALIGNED)
        for i_block in range(BLOCK_J, stop, BLOCK_J):
            b_ranks = _ranks(row, i_block + o_block)
            b_groups = tl.maximum(b_groups, _best_of_groups(b_ranks, LANES, ALIGNED))
        low, best = _group_rank(b_groups, wanted, LANES)
        count = _count_above(low - 1, b_held, row, o_block, stop)
        high = best
        while (count > wanted) & (low < high):
            few = count - wanted <= FEW
            trial = high - ((high - low) >> 1)
            if few:
                trial = _next_rank(low, b_held, row, o_block, stop)
            found = _count_above(trial - 1, b_held, row, o_block, stop)
            if found >= wanted:
                low = trial
                count = found
            else:
                # Nothing ranks between `low` and the next rank.
                high = low if few else trial - 1
    # How many of those that rank at `low` itself are taken.
    equals = count
    if count > wanted:
        equals = wanted - _count_above(low, b_held, row, o_block, stop)
    p_out += free
    for i_block in range(0, stop, BLOCK_J):
        b_ranks = b_held
        if not HELD:
            b_ranks = _ranks(row, i_block + o_block)
        b_taken = _as_bits(b_ranks >= low, LANES, ALIGNED)
        if count > wanted:
            b_equal = _as_bits(b_ranks == low, LANES, ALIGNED)
            b_first, total = _firsts(b_equal)
            b_left, passed = b_equal, 0
            while tl.max((b_left != 0).to(tl.int32), 0) > 0:
                _, o_place = _lowest(b_left, b_first, passed)
                b_bit = b_left & -b_left
                b_taken = tl.where(o_place < equals, b_taken, b_taken & ~b_bit)
                b_left ^= b_bit
                passed += 1
            equals -= total
        b_first, total = _firsts(b_taken)
        passed = 0
        while tl.max((b_taken != 0).to(tl.int32), 0) > 0:
            o_bit, o_place = _lowest(b_taken, b_first, passed)
            o_taken = o_bit // ALIGNED * (LANES * ALIGNED) + o_bit % ALIGNED
            o_taken += i_block + tl.arange(0, LANES) * ALIGNED
            tl.store(p_out + o_place, o_taken, mask=b_taken != 0)
            b_taken &= b_taken - 1
            passed += 1
        p_out += total


@triton.jit
def _as_bits(m_block, LANES: tl.constexpr, ALIGNED: tl.constexpr):
    """Which of each lane's blocks, in ascending order of bits. int32 `[LANES]`."""
    CHUNKS: tl.constexpr = m_block.shape[0] // (LANES * ALIGNED)
    b_bit = 1 << (tl.arange(0, CHUNKS) * ALIGNED)[:, None] + tl.arange(0, ALIGNED)[None, :]
    m_block = tl.reshape(m_block, [CHUNKS, LANES, ALIGNED])
    return tl.sum(tl.sum(tl.where(m_block, b_bit[:, None, :], 0), 2), 0)


@triton.jit
def _firsts(b_bits):
    """What to add to a lane's number of lower bits for a bit's place among all lanes' in the order
    of blocks, two chunks in an integer `[4, LANES]`; and how many bits there are.
    """
    # Four bits are one chunk's; the upper half's chunks come after all of the lower half's.
    b_counts = b_bits - ((b_bits >> 1) & 0x55555555)
    b_counts = (b_counts & 0x33333333) + ((b_counts >> 2) & 0x33333333)
    b_counts = (b_counts[None, :] >> (4 * tl.arange(0, 4))[:, None]) & 0x000F000F
    b_totals = tl.sum(b_counts, 1)
    b_others = b_totals[:, None] - b_counts
    b_first = tl.cumsum(b_counts, 1) - b_counts + tl.cumsum(b_others, 0) - b_others
    total = tl.sum(b_totals, 0)
    return b_first + (tl.sum(b_others, 0) << 16)[None, :], (total >> 16) + (total & 0xFFFF)


@triton.jit
def _lowest(b_bits, b_first, passed):
    """The lowest bit of each lane after `passed` lower ones: its number and its place."""
    b_bit = (b_bits & -b_bits).to(tl.float32).to(tl.int32, bitcast=True)
    o_bit = ((b_bit >> 23) & 0xFF) - 127
    m_pair = (tl.arange(0, 4)[:, None] == (o_bit // 4 % 4)[None, :])
    b_pair = tl.sum(tl.where(m_pair, b_first, 0), 0)
    return o_bit, (tl.where(o_bit < 16, b_pair, b_pair >> 16) & 0xFFFF) + passed


@triton.jit
def _best_of_groups(b_ranks, LANES: tl.constexpr, ALIGNED: tl.constexpr):
    """The best rank of each `LANES * ALIGNED`-th block on from each of the first. `[LANES, ALIGNED]`."""
    CHUNKS: tl.constexpr = b_ranks.shape[0] // (LANES * ALIGNED)
    return tl.max(tl.reshape(b_ranks, [CHUNKS, LANES, ALIGNED]), 0)


@triton.jit
def _group_rank(b_groups, wanted, LANES: tl.constexpr):
    """The rank of the `wanted`-th best of some groups, 0 where it is not known, and the best one."""
    b_lanes = tl.max(b_groups, 1)
    best = tl.max(b_lanes, 0)
    # One group of each lane ranks at least as high as the worst lane's best.
    low = tl.where(wanted <= LANES, tl.maximum(tl.min(b_lanes, 0), 0), 0)
    count = tl.sum(tl.sum((b_groups >= low).to(tl.int32), 1), 0)
    high = best
    while (count > wanted) & (low < high):
        trial = high - ((high - low) >> 1)
        found = tl.sum(tl.sum((b_groups >= trial).to(tl.int32), 1), 0)
        if found >= wanted:
            low = trial
            count = found
        else:
            high = trial - 1
    low = tl.min(tl.min(tl.where(b_groups >= low, b_groups, best), 1), 0)
    return tl.where(count >= wanted, low, 0), best


@triton.jit
def _count_above(rank, b_held, row, o_block, stop):
    """How many blocks of a row rank above `rank`; what is not held is read again."""
    count = tl.sum((b_held > rank).to(tl.int32), 0)
    for i_block in range(b_held.shape[0], stop, b_held.shape[0]):
        b_ranks = _ranks(row, i_block + o_block)
        count += tl.sum((b_ranks > rank).to(tl.int32), 0)
    return count


@triton.jit
def _next_rank(rank, b_held, row, o_block, stop):
    """The lowest rank above `rank`; what is not held is read again."""
    following = tl.min(tl.where(b_held > rank, b_held, LARGEST), 0)
    for i_block in range(b_held.shape[0], stop, b_held.shape[0]):
        b_ranks = _ranks(row, i_block + o_block)
        following = tl.minimum(following, tl.min(tl.where(b_ranks > rank, b_ranks, LARGEST), 0))
    return following


@triton.jit
def _ranks(row, o_block):
    """The ranks of some blocks: the bits of their scores, -1 for none and for a forced one."""
    (
        p_scores, local, visible, columns, first_weight, num_weights, per_compressed,
        PER_SELECT, INITIAL, FOLDED, ALIGNED,
    ) = row  # fmt: skip
    # Block j's own compressed keys start at j m / d: whatever lies past the visible ones is 0.
    if FOLDED:
        # So many blocks have something carried to them by the one before.
        carried = tl.where(visible > 0, visible + 1, 0)
        # Masks for `ALIGNED` blocks at once keep loads as wide.
        m_own = o_block < tl.cdiv(tl.minimum(visible, local), ALIGNED) * ALIGNED
        m_carried = o_block < tl.cdiv(tl.minimum(carried, local), ALIGNED) * ALIGNED
        b_own = tl.load(p_scores + o_block, mask=m_own)
        p_carried = p_scores + columns // (2 * ALIGNED) * ALIGNED
        b_carried = tl.load(p_carried + o_block, mask=m_carried)
        if INITIAL == 0:
            b_carried = tl.where(o_block > 0, b_carried, 0.0)
        if visible < local:
            b_own = tl.where(o_block < visible, b_own, 0.0)
            b_carried = tl.where(o_block < carried, b_carried, 0.0)
        b_score = tl.abs(b_own) + tl.abs(b_carried)
    else:
        b_score = tl.zeros(o_block.shape, tl.float32)
        for i_weight in range(num_weights):
            o_key = o_block * PER_SELECT + first_weight + i_weight
            m_key = (o_block < local) & (o_key >= 0) & (o_key < visible)
            b_p = tl.load(p_scores + o_key, mask=m_key, other=0.0)
            b_score += b_p * tl.minimum(
                tl.minimum(i_weight + 1, num_weights - i_weight), per_compressed
            )
        b_score = tl.abs(b_score)
    m_free = (o_block >= INITIAL) & (o_block < local)
    return tl.where(m_free, b_score.to(tl.int32, bitcast=True), -1)
