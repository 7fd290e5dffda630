"""The choice of blocks: the shared scores, then an exact top-n that counts within lanes.

A lane holds up to 32 neighbouring blocks of a row, as many lanes as that takes hold the row, and a
wave as many rows as it has lanes for: with 2048 tokens a row is one lane's. Counting is then a
comparison and an addition for each block that a lane holds, whatever the number of rows, and little
or nothing crosses lanes.

Scores that are not folded (`score_map="literal"`, blocks that are no power of two of strides), rows
too long for a wave's registers, and indices beyond a buffer's reach go to the shared kernel.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from nsa_port.kernels.amd.chips import LARGEST_OFFSET, lanes_of
from nsa_port.kernels.geometry import NSAConfig
from nsa_port.kernels.triton import selection
from nsa_port.kernels.triton.bounds import tile_of
from nsa_port.kernels.triton.host import arch_of, cdiv, next_power_of_2
from nsa_port.kernels.triton.selection import Scored, choose_blocks

FORCED = gl.constexpr(0x7F800000)
"""The rank of a forced block: infinity's."""

_HELD = 32
"""Blocks that a lane holds if that is enough; rows that are too long for it take twice as many."""


def _choose_blocks(indices: Tensor, found: Scored, config: NSAConfig) -> None:
    """`choose_blocks` by the kernel here where it serves."""
    wave = lanes_of(arch_of(indices))
    width = max(4, next_power_of_2(found.blocks))
    far = indices.numel() >= LARGEST_OFFSET
    if not found.folded or far or width > 2 * _HELD * wave:
        choose_blocks(indices, found, config)
        return
    lanes = min(wave, cdiv(width, _HELD))
    B, T, HK, n = indices.shape
    rows = found.count * found.block_m * B * HK
    _top_blocks_kernel[(cdiv(rows, wave // lanes),)](
        found.scores,
        indices,
        found.tiles.first,
        found.tiles.stop,
        found.visible.lower,
        found.visible.upper,
        found.causal.lower,
        found.causal.upper,
        rows,
        found.first_tile,
        T,
        B,
        HK,
        found.columns // 2 if found.scored else 0,
        found.visible.stride,
        found.causal.stride,
        n,
        config.init_blocks,
        config.local_blocks,
        SELECT=config.select_block_size,
        PER_SELECT=config.select_block_size // config.block_stride,
        BLOCK_M=found.block_m,
        ROWS=wave // lanes,
        LANES=lanes,
        HELD=width // lanes,
        SLOTS=next_power_of_2(n),
        num_warps=1,
        num_stages=1,
    )


blocks_of = partial(selection.blocks_of, choose=_choose_blocks)
"""`select_blocks` with the bounds at hand, on the current device."""

select_blocks = partial(selection.select_blocks, choose=_choose_blocks)
"""The blocks each query and KV head attends to (Eq. 9 to 11). int32 `[B, T, HK, n]`."""


_LENGTHS = ["rows", "first_tile", "T", "B", "columns", "stride_visible", "stride_causal"]


@gluon.jit(do_not_specialize=_LENGTHS)
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
    n,
    init_blocks,
    local_blocks,
    SELECT: gl.constexpr,
    PER_SELECT: gl.constexpr,
    BLOCK_M: gl.constexpr,
    ROWS: gl.constexpr,
    LANES: gl.constexpr,
    HELD: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """One program, one wave: the best `n` blocks of `ROWS` rows, each a query and KV head.

    As the shared kernel does it: scores order as the integers their bits spell, here called ranks,
    and the interval that holds the n-th best rank is halved until exactly `n` blocks rank at its
    lower end or above, or until it holds nothing else; of equals the first ones are then taken.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1, HELD], [ROWS, LANES, 1], [1, 1, 1], [2, 1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))
    o_row = gl.program_id(0) * ROWS + gl.arange(0, ROWS, ROW)
    m_row = o_row < rows
    o_row = gl.minimum(o_row, rows - 1)
    o_local = o_row // HK
    i_kv = o_row % HK
    i_batch = o_local % B
    o_local = o_local // B
    o_tile = first_tile + o_local // BLOCK_M
    o_query, stop = tile_of(tile_first, tile_stop, o_tile, BLOCK_M, T)
    o_query += o_local % BLOCK_M
    m_row = m_row & (o_query < stop)
    if gl.max(m_row.to(gl.int32), 0) == 0:
        return
    o_bound = i_batch * stride_visible + o_query
    visible = gl.load(visible_upper + o_bound, mask=m_row, other=0)
    visible -= gl.load(visible_lower + o_bound, mask=m_row, other=0)
    o_bound = i_batch * stride_causal + o_query
    seen = gl.load(causal_upper + o_bound, mask=m_row, other=0)
    seen -= gl.load(causal_lower + o_bound, mask=m_row, other=0)
    # Blocks up to the query's own, and those with a visible compressed key.
    candidates = (seen + SELECT - 1) // SELECT
    scored = (visible + PER_SELECT - 1) // PER_SELECT
    o_out = ((i_batch * T + o_query) * HK + i_kv) * n

    # [ROWS, LANES, HELD]: of each row, lane and block that it holds. Bounds are counted from the
    # lane's first block, so that blocks are constants.
    first = (gl.arange(0, LANES, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT))) * HELD)[None, :]
    first = first[:, :, None]
    o_held = gl.arange(0, HELD, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, :][:, None, :]
    b_candidates = _as_tile(candidates) - first
    b_rank = _ranks(
        scores, _as_tile(o_row) * (2 * columns) + first, o_held, first, _as_tile(scored) - first,
        b_candidates, columns,
    )  # fmt: skip
    high = gl.max(gl.max(b_rank, 2), 1) + 1
    m_forced = (o_held < init_blocks - first) | (o_held >= b_candidates - local_blocks)
    b_rank = gl.where(m_forced & (b_rank >= 0), FORCED, b_rank)
    low = gl.full([ROWS], 0, gl.int32, ROW)
    # Of `SLOTS >= n` groups, each has a block that ranks at least as high as the worst one's best.
    GROUPS: gl.constexpr = SLOTS // LANES if SLOTS > LANES else 1
    if HELD > GROUPS:
        b_group = gl.max(gl.reshape(b_rank, [ROWS, LANES, HELD // GROUPS, GROUPS]), 2)
        b_group = gl.min(gl.min(b_group, 2), 1)
        low = gl.maximum(gl.convert_layout(b_group, ROW), 0)
    count = _count_from(b_rank, high)
    # How many blocks rank at `low` or above: more than n, where that is not known.
    taken = gl.where(count >= n, n, n + 1)
    low = gl.where(count >= n, FORCED, low)
    m_open = (count < n) & (candidates > n) & (high - low > 1)
    while gl.max(m_open.to(gl.int32), 0) > 0:
        trial = low + ((high - low) >> 1)
        count = _count_from(b_rank, trial)
        m_low = m_open & (count >= n)
        low = gl.where(m_low, trial, low)
        taken = gl.where(m_low, count, taken)
        high = gl.where(m_open & (count < n), trial, high)
        m_open = m_open & (count != n) & (high - low > 1)
    low = gl.where(candidates <= n, 0, low)
    if gl.max(((taken > n) & (candidates > n)).to(gl.int32), 0) > 0:
        left = n - _count_from(b_rank, low + 1)
        m_equal = b_rank == _as_tile(low)
        b_equals = _running(m_equal.to(gl.int32))
        b_rank = gl.where(m_equal & (b_equals > _as_tile(left)), -1, b_rank)
    m_taken = b_rank >= _as_tile(low)
    o_slot = _running(m_taken.to(gl.int32)) - 1
    b_block = first + o_held + gl.full([ROWS, LANES, HELD], 0, gl.int32, LAYOUT)
    m_taken = m_taken & (o_slot < n) & _as_tile(m_row)
    gl.amd.cdna3.buffer_store(b_block, indices, _as_tile(o_out) + o_slot, mask=m_taken)
    if gl.max((m_row & (candidates < n)).to(gl.int32), 0) > 0:
        b_none = gl.full([ROWS], -1, gl.int32, ROW)
        for i_slot in range(n):
            m_none = m_row & (i_slot >= candidates)
            gl.amd.cdna3.buffer_store(b_none, indices, o_out + i_slot, mask=m_none)


@gluon.jit
def _as_tile(b_row):
    """One value for each row. `[ROWS, 1, 1]`."""
    return b_row[:, None][:, :, None]


@gluon.jit
def _ranks(scores, o_first, o_held, first, b_scored, b_candidates, columns):
    """The bits of each block's score, -1 for no candidate.

    `columns` is a multiple of 4, so that four blocks are loaded at once.
    """
    columns = gl.multiple_of(columns, 4)
    o_first = gl.multiple_of(o_first, [1, 4, 1])
    m_column = first + o_held < columns
    b_own = gl.amd.cdna3.buffer_load(scores, o_first + o_held, mask=m_column, other=0.0)
    o_held_column = o_first + columns + o_held
    b_carried = gl.amd.cdna3.buffer_load(scores, o_held_column, mask=m_column, other=0.0)
    # A block's own compressed keys, and those of the block before it.
    b_score = gl.where(o_held < b_scored, b_own, 0.0)
    b_score += gl.where((o_held <= b_scored) & (o_held > -first), b_carried, 0.0)
    b_rank = gl.maximum(b_score.to(gl.int32, bitcast=True), 0)
    return gl.where(o_held < b_candidates, b_rank, -1)


@gluon.jit
def _count_from(b_rank, trial):
    """How many blocks of each row rank at `trial` or above."""
    return gl.sum(gl.sum((b_rank >= _as_tile(trial)).to(gl.int32), 2), 1)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _running(b_number):
    """The sum over each row's blocks up to and with each one."""
    ROWS: gl.constexpr = b_number.shape[0]
    LANES: gl.constexpr = b_number.shape[1]
    HELD: gl.constexpr = b_number.shape[2]
    FLAT: gl.constexpr = gl.BlockedLayout([1, HELD], [ROWS, LANES], [1, 1], [1, 0])
    b_flat = gl.convert_layout(gl.reshape(b_number, [ROWS, LANES * HELD]), FLAT)
    b_flat = gl.reshape(gl.associative_scan(b_flat, 1, _add), [ROWS, LANES, HELD])
    return gl.convert_layout(b_flat, b_number.type.layout)
