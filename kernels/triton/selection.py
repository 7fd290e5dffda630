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
    split_head,
    strides,
    tuned,
)
from nsa_port.kernels.triton.interval import hopper_values
from nsa_port.kernels.triton.replay import repeats
from nsa_port.kernels.triton.scores import _block_scores_kernel, _few_scores_kernel
from nsa_port.kernels.triton.tiles import LARGEST, count_bits, count_bits_of_four

_SCORE_BYTES = 2**28
"""Room for the scores of the queries that are worked on at a time."""

_TOP_BLOCKS = (128, 256, 512, 1024, 2048, 4096)
"""Blocks a top-n program holds in registers; beyond the last it reads them again at each step."""

_HELD_BY_WARP = 1024
"""Blocks that one warp holds, 32 in each lane."""

_FEW_QUERIES = 16
"""Up to so many, as in decoding, a query's heads are the rows of a tile, not the queries of a head.
"""

_FEW_HEADS = 32
"""Larger groups fill a tile either way."""

ALIGNED = tl.constexpr(4)
"""A row of scores has a multiple of so many columns, and a lane holds blocks by as many."""

FEW = tl.constexpr(4)
"""So many blocks above the wanted ones are dropped one by one."""


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
    }
    _compile_every_width(arguments, indices, config, form)
    held = found.blocks <= width
    rows = found.count * found.block_m * B
    _top_blocks_kernel[(rows, HK)](*arguments, **form, **_width(width, held))


def _width(width: int, held: bool) -> dict[str, int]:
    num_warps = max(1, width // _HELD_BY_WARP)
    lanes = min(32 * num_warps, width // ALIGNED.value)
    chunks = width // (lanes * ALIGNED.value)
    return {"CHUNKS": chunks, "LANES": lanes, "HELD": held, "num_warps": num_warps}


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


@repeats
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
    blocks = max(1, config.num_select_blocks(layout.num_keys))
    hopper = hopper_values("hopper_scores", q, k_cmp)
    if hopper is not None:
        from nsa_port.kernels.triton import selection_hopper

        if selection_hopper.takes(q, k_cmp, blocks):
            block_m, block_n = selection_hopper.BLOCK_M, selection_hopper.BLOCK_N
        else:
            hopper = None
    tiles = cut_tiles(T, block_m, layout.cu_seqlens)
    # Where all blocks fit, all candidates are chosen: nothing is scored and every score reads as 0.
    scored = C > 0 and blocks > n

    per_select = config.select_block_size // config.block_stride
    per_compressed = config.block_size // config.block_stride
    folded = config.score_map == "overlap" and block_n % per_select == 0 and _is_power(per_select)
    num_compressed = max(1, min(C, config.num_compressed(layout.num_keys)))
    columns = cdiv(blocks if folded else num_compressed, ALIGNED.value) * ALIGNED.value
    columns *= 2 if folded else 1
    chunk = max(1, min(tiles.count, _SCORE_BYTES // (4 * B * HK * columns * block_m)))
    scores = torch.empty(
        (chunk * block_m, B, HK, columns) if scored else (1,), dtype=torch.float32, device=q.device
    )
    form = {
        "PER_SELECT": per_select,
        "PER_COMPRESSED": per_compressed,
        "FOLDED": folded,
        "ALIGNED": ALIGNED.value,
        "K_MAIN": split_head(Dk).main,
        "K_REST": split_head(Dk).rest,
    }
    if hopper is not None and scored:
        described = selection_hopper.describe_tiles(q, k_cmp)
        lse = lse.float().contiguous()
        counters = torch.zeros((cdiv(tiles.count, chunk), 4), dtype=torch.int32, device=q.device)
    few = T <= _FEW_QUERIES and H // HK <= _FEW_HEADS and layout.cu_seqlens is None
    positions_known = layout.cu_seqlens is None and layout.positions is None
    for first_tile in range(0, tiles.count, chunk):
        count = min(chunk, tiles.count - first_tile)
        if positions_known:
            seen = layout.num_keys - T + min(T, (first_tile + count) * block_m)
            blocks = max(1, config.num_select_blocks(seen))
            num_compressed = max(1, min(C, config.num_compressed(seen)))
        key_tiles = cdiv(num_compressed, block_n)
        if scored and hopper is not None:
            selection_hopper.write_scores(
                described, lse, scores, counters[first_tile // chunk], tiles, visible, scale,
                columns, (first_tile, count, key_tiles), k_cmp.shape, form, hopper,
            )  # fmt: skip
        elif scored and few:
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
                DIM_K=Dk,
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
                DIM_K=Dk,
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
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
    SLOTS: tl.constexpr,
    FOLDED: tl.constexpr,
    HELD: tl.constexpr,
):
    """One program: the best `n` blocks of one row, which is a query and KV head, ascending.

    Scores are not negative, so they order as the integers their bits spell, here called ranks.
    Forced blocks are the first and the last ones and need none. Of the others, `wanted` are to be
    chosen: those that rank at `low` or above. A first `low` is the `wanted`-th best of the best of
    groups of blocks, `ALIGNED` groups to a lane: at least `wanted` blocks rank as high, and seldom
    many more. A few more are dropped one by one, else the interval that holds the rank is halved.
    Of equals the first ones are taken.
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
    # [LANES, CHUNKS, ALIGNED]: the blocks a lane holds. Triton deals out the first dimension first,
    # which leaves the others to one lane.
    WIDTH: tl.constexpr = CHUNKS * LANES * ALIGNED
    o_chunk = tl.arange(0, CHUNKS)[None, :, None] * (LANES * ALIGNED)
    o_lane = tl.arange(0, LANES)[:, None, None] * ALIGNED
    row = (
        p_scores, o_chunk + tl.arange(0, ALIGNED)[None, None, :], o_lane, INITIAL, local, visible,
        columns, first_weight, num_weights, per_compressed, PER_SELECT,
    )  # fmt: skip
    stop = WIDTH if HELD else local
    b_held = _ranks(row, 0, FOLDED)
    low = 0
    if unwanted > 0:
        b_groups = tl.max(b_held, 1)
        for i_block in range(WIDTH, stop, WIDTH):
            b_groups = tl.maximum(b_groups, tl.max(_ranks(row, i_block, FOLDED), 1))
        low, high = _group_rank(b_groups, wanted)
    else:
        high = low
    b_taken, count = _above(low - 1, b_held, row, stop, WIDTH, FOLDED)
    while (count > wanted) & (low < high):
        few = count - wanted <= FEW
        trial = high - ((high - low) >> 1)
        if few:
            trial = _next_rank(low, b_held, row, stop, WIDTH, FOLDED)
        b_found, found = _above(trial - 1, b_held, row, stop, WIDTH, FOLDED)
        if found >= wanted:
            low = trial
            count = found
            b_taken = b_found
        else:
            # Nothing ranks between `low` and the next rank.
            high = low if few else trial - 1
    # How many of those that rank at `low` itself are taken.
    equals = count
    if count > wanted:
        equals = wanted - _above(low, b_held, row, stop, WIDTH, FOLDED)[1]
    p_out += free
    for i_block in range(0, stop, WIDTH):
        b_ranks = b_held
        if not HELD:
            b_ranks = _ranks(row, i_block, FOLDED)
            b_taken = _as_bits(b_ranks >= low)
        if count > wanted:
            b_equal = _as_bits(b_ranks == low)
            b_first, total, most = _firsts(b_equal, CHUNKS)
            for passed in range(most):
                _, o_place = _lowest(b_equal, b_first, passed)
                b_bit = b_equal & -b_equal
                b_taken = tl.where(o_place < equals, b_taken, b_taken & ~b_bit)
                b_equal ^= b_bit
            equals -= total
        b_first, total, most = _firsts(b_taken, CHUNKS)
        for passed in range(most):
            o_bit, o_place = _lowest(b_taken, b_first, passed)
            o_taken = o_bit // ALIGNED * (LANES * ALIGNED) + o_bit % ALIGNED
            o_taken += i_block + tl.arange(0, LANES) * ALIGNED
            tl.store(p_out + o_place, o_taken, mask=b_taken != 0)
            b_taken &= b_taken - 1
        p_out += total


@triton.jit
def _as_bits(m_block):
    """Which of the (at most 32) blocks of each lane, as bits in ascending order. `[LANES]`."""
    o_bit = (tl.arange(0, m_block.shape[1]) * ALIGNED)[:, None] + tl.arange(0, ALIGNED)[None, :]
    return tl.sum(tl.sum(tl.where(m_block, (1 << o_bit)[None, :, :], 0), 2), 1)


@triton.jit
def _firsts(b_bits, CHUNKS: tl.constexpr):
    """Where each lane's bits go if all lanes' are counted in the order of their blocks.

    `[at most 4, LANES]`: of each chunk of four bits, the place of its first bit less how many lower
    ones the lane has; chunks 0 to 3 in the lower halves, 4 to 7 in the upper ones. Then how many
    bits there are, and the most that any lane has.
    """
    b_counts = count_bits_of_four(b_bits)
    o_chunk = tl.arange(0, min(CHUNKS, 4))
    b_counts = (b_counts[None, :] >> (4 * o_chunk)[:, None]) & 0x000F000F
    b_total = tl.sum(b_counts, 1)[:, None]
    b_others = b_total - b_counts
    b_first = tl.cumsum(b_counts, 1) - b_counts + tl.cumsum(b_others, 0) - b_others
    # All of the lower halves come before the upper ones.
    b_first += (tl.sum(b_others, 0) << 16)[None, :]
    b_lane = tl.sum(b_counts, 0)
    total = tl.sum(tl.sum(b_total, 1), 0)
    most = tl.max((b_lane >> 16) + (b_lane & 0xFFFF), 0)
    return b_first, (total >> 16) + (total & 0xFFFF), most


@triton.jit
def _lowest(b_bits, b_first, passed):
    """Each lane's lowest bit, after `passed` lower ones: its number and its place."""
    b_float = (b_bits & -b_bits).to(tl.float32)
    o_bit = ((b_float.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127
    CHUNKS: tl.constexpr = b_first.shape[0]
    m_chunk = tl.arange(0, CHUNKS)[:, None] == (o_bit // 4 % CHUNKS)[None, :]
    b_place = tl.sum(tl.where(m_chunk, b_first, 0), 0)
    return o_bit, (tl.where(o_bit < 16, b_place, b_place >> 16) & 0xFFFF) + passed


@triton.jit
def _group_rank(b_groups, wanted):
    """The rank of the `wanted`-th best group, 0 where there may be fewer, and of the best one."""
    b_lanes = tl.max(b_groups, 1)
    high = tl.max(b_lanes, 0)
    best = high
    # One group of each lane ranks at least as high as the worst lane's best.
    low = tl.where(wanted <= b_lanes.shape[0], tl.maximum(tl.min(b_lanes, 0), 0), 0)
    count = tl.sum(tl.sum((b_groups >= low).to(tl.int32), 1), 0)
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
def _above(rank, b_held, row, stop, WIDTH: tl.constexpr, FOLDED: tl.constexpr):
    """Which of the blocks that are held rank above `rank`, as bits, and how many of the whole row.

    What is not held is read again.
    """
    b_bits = _as_bits(b_held > rank)
    b_count = count_bits(b_bits)
    for i_block in range(WIDTH, stop, WIDTH):
        b_count += count_bits(_as_bits(_ranks(row, i_block, FOLDED) > rank))
    return b_bits, tl.sum(b_count, 0)


@triton.jit
def _next_rank(rank, b_held, row, stop, WIDTH: tl.constexpr, FOLDED: tl.constexpr):
    """The lowest rank above `rank`; what is not held is read again."""
    b_next = tl.min(tl.min(tl.where(b_held > rank, b_held, LARGEST), 2), 1)
    for i_block in range(WIDTH, stop, WIDTH):
        b_ranks = _ranks(row, i_block, FOLDED)
        b_ranks = tl.where(b_ranks > rank, b_ranks, LARGEST)
        b_next = tl.minimum(b_next, tl.min(tl.min(b_ranks, 2), 1))
    return tl.min(b_next, 0)


@triton.jit
def _ranks(row, i_block, FOLDED: tl.constexpr):
    """The ranks of the blocks from `i_block` on: the bits of their scores, -1 for none and for a
    forced one. `[LANES, CHUNKS, ALIGNED]`.
    """
    (
        p_scores, o_block, o_lane, initial, local, visible, columns, first_weight, num_weights,
        per_compressed, per_select,
    ) = row  # fmt: skip
    # Limits are counted from the lane's first block, so that the blocks it holds are constants.
    i_first = i_block + o_lane
    # Block j's own compressed keys start at j m / d: whatever lies past the visible ones is 0.
    if FOLDED:
        # So many blocks have something carried to them by the one before.
        carried = tl.where(visible > 0, visible + 1, 0)
        # Masks for `ALIGNED` blocks at once keep loads as wide.
        m_own = o_block < tl.cdiv(tl.minimum(visible, local), ALIGNED) * ALIGNED - i_first
        m_carried = o_block < tl.cdiv(tl.minimum(carried, local), ALIGNED) * ALIGNED - i_first
        p_scores += i_first
        b_own = tl.load(p_scores + o_block, mask=m_own)
        p_scores += columns // (2 * ALIGNED) * ALIGNED
        b_carried = tl.load(p_scores + o_block, mask=m_carried)
        b_carried = tl.where(o_block > -i_first, b_carried, 0.0)
        if visible < local:
            b_own = tl.where(o_block < visible - i_first, b_own, 0.0)
            b_carried = tl.where(o_block < carried - i_first, b_carried, 0.0)
        b_score = tl.abs(b_own) + tl.abs(b_carried)
    else:
        o_first = (i_first + o_block) * per_select + first_weight
        m_block = o_block < local - i_first
        b_score = tl.zeros(o_first.shape, tl.float32)
        for i_weight in range(num_weights):
            o_key = o_first + i_weight
            m_key = m_block & (o_key >= 0) & (o_key < visible)
            b_p = tl.load(p_scores + o_key, mask=m_key, other=0.0)
            b_score += b_p * tl.minimum(
                tl.minimum(i_weight + 1, num_weights - i_weight), per_compressed
            )
        b_score = tl.abs(b_score)
    m_free = (o_block >= initial - i_first) & (o_block < local - i_first)
    return tl.where(m_free, b_score.to(tl.int32, bitcast=True), -1)
