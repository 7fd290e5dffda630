"""Scores of blocks, written for Hopper's own instructions.

The same computation as `_block_scores_kernel`. Two warpgroups share 64 queries, whose heads pass by
one after another, and have 128 compressed keys each, which stay for all heads of a group. Each
takes the exponentials of one head while it multiplies the next, of the next tile too.
"""

from __future__ import annotations

import torch
import triton.experimental.gluon as gluon
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa_port.kernels.tables import Values
from nsa_port.kernels.triton.bounds import QueryBounds, Tiles
from nsa_port.kernels.triton.hopper import describe, next_stage, note, noted
from nsa_port.kernels.triton.host import LOG2_E, cdiv, multiprocessors, split_head

BLOCK_M = 64
BLOCK_N = 128
"""Queries of a tile, and compressed keys of each warpgroup."""

_FIELDS = gl.constexpr(8)
_OFFSETS = gl.constexpr(4)
"""Numbers that say what a warpgroup's tile is, see `_announce`."""

Descriptors = tuple[TensorDescriptor | None, ...]


def takes(q: Tensor, k: Tensor, blocks: int) -> bool:
    """Whether heads come in pairs, as this kernel walks them, and a tile's scores are not too wide.

    Offsets inside a tile of scores are int32.
    """
    B, C, HK, _ = k.shape
    widest = 2 * max(blocks, C) + 8
    return q.shape[2] // HK % 2 == 0 and BLOCK_M * B * HK * widest < 2**31


def describe_tiles(q: Tensor, k: Tensor) -> Descriptors:
    """What `_hopper_scores_kernel` copies tiles by."""
    key = split_head(q.shape[3])
    return (
        describe(q, BLOCK_M, key.main),
        describe(q, BLOCK_M, key.rest),
        describe(k, BLOCK_N, key.main),
        describe(k, BLOCK_N, key.rest),
    )


def write_scores(
    described: Descriptors,
    lse: Tensor,
    scores: Tensor,
    counter: Tensor,
    tiles: Tiles,
    visible: QueryBounds,
    scale: float,
    columns: int,
    chunk: tuple[int, int, int],
    keys: torch.Size,
    form: dict[str, int],
    values: Values,
) -> None:
    """Fill `scores` for a chunk: its first query tile, its query tiles and its key tiles.

    `counter[0]` is 0, `keys` the shape of the compressed keys, and `lse` contiguous float32.
    """
    first_tile, count, key_tiles = chunk
    B, T, H = lse.shape
    HK = keys[2]
    total = count * cdiv(key_tiles, 2) * B * HK
    _hopper_scores_kernel[(min(total, multiprocessors(lse.device)),)](
        *described,
        lse,
        scores,
        counter,
        tiles.first,
        tiles.stop,
        visible.lower,
        visible.upper,
        scale * LOG2_E,
        first_tile,
        count,
        T,
        B,
        HK,
        H // HK,
        columns,
        key_tiles,
        visible.stride,
        STAGES=values["num_stages"],
        KEY_STAGES=values["key_stages"],
        num_warps=values["num_warps"],
        **form,
    )


_LENGTHS = ["first_tile", "tiles", "T", "B", "columns", "key_tiles", "stride_bounds"]


@gluon.jit(do_not_specialize=_LENGTHS)
def _hopper_scores_kernel(
    q_main,
    q_rest,
    k_main,
    k_rest,
    lse,
    scores,
    counter,
    tile_first,
    tile_stop,
    lower,
    upper,
    scale_log2,
    first_tile,
    tiles,
    T,
    B,
    HK,
    G,
    columns,
    key_tiles,
    stride_bounds,
    PER_SELECT: gl.constexpr,
    PER_COMPRESSED: gl.constexpr,
    FOLDED: gl.constexpr,
    ALIGNED: gl.constexpr,
    K_MAIN: gl.constexpr,
    K_REST: gl.constexpr,
    STAGES: gl.constexpr,
    KEY_STAGES: gl.constexpr,
):
    """As many programs as the device has multiprocessors; each takes the next tile when it can.

    `counter` is 0 at first. Which program takes which tile changes nothing.
    """
    dtype: gl.constexpr = q_main.dtype
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=4)
    rest: gl.constexpr = K_REST if K_REST else K_MAIN
    q_buffer = gl.allocate_shared_memory(dtype, [STAGES, 1, 64, 1, K_MAIN], tile)
    k_buffer = gl.allocate_shared_memory(dtype, [KEY_STAGES, 1, 128, 1, K_MAIN], tile)
    q_rest_buffer, k_rest_buffer = q_buffer, k_buffer
    q_tiles, k_tiles = (q_main, q_main), (k_main, k_main)
    if K_REST:
        q_rest_buffer = gl.allocate_shared_memory(dtype, [STAGES, 1, 64, 1, rest], tile)
        k_rest_buffer = gl.allocate_shared_memory(dtype, [KEY_STAGES, 1, 128, 1, rest], tile)
        q_tiles, k_tiles = (q_main, q_rest), (k_main, k_rest)
    word: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_ready = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], word)
    k_ready = gl.allocate_shared_memory(gl.int64, [2 * KEY_STAGES, 1], word)
    scale = gl.allocate_shared_memory(gl.float32, [1, 1], word)
    alike: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    scale.index(0).store(gl.full([1], scale_log2, gl.float32, alike))
    row_stride = gl.allocate_shared_memory(gl.int32, [1, 1], word)
    row_stride.index(0).store(gl.full([1], B * HK * columns, gl.int32, alike))
    fields = gl.allocate_shared_memory(gl.int32, [2 * KEY_STAGES * _FIELDS, 1], word)
    offsets = gl.allocate_shared_memory(gl.int64, [2 * KEY_STAGES * _OFFSETS, 1], word)
    notes = (fields, offsets)
    # The first barriers say that buffers are filled, those behind that they are done with: queries
    # by both warpgroups, keys by the one they are for.
    for i_stage in gl.static_range(STAGES):
        mbarrier.init(q_ready.index(i_stage), count=1)
        mbarrier.init(q_ready.index(STAGES + i_stage), count=2)
    for i_stage in gl.static_range(KEY_STAGES):
        mbarrier.init(k_ready.index(i_stage), count=1)
        mbarrier.init(k_ready.index(KEY_STAGES + i_stage), count=1)
    fence_async_shared()

    buffers = (q_buffer, q_rest_buffer, k_buffer, k_rest_buffer)
    ready = (q_ready, k_ready, notes, scale, row_stride)
    where = (
        tile_first, tile_stop, lower, upper, stride_bounds, first_tile, tiles, T, B, HK, G, columns,
    )  # fmt: skip
    rows = (lse, upper, scores, columns, HK * G, G)
    gl.warp_specialize(
        [
            (
                _consume,
                (buffers, ready, rows, 0, PER_SELECT, PER_COMPRESSED, FOLDED, ALIGNED,
                 K_MAIN, K_REST, STAGES, KEY_STAGES),
            ),
            (
                _consume,
                (buffers, ready, rows, 1, PER_SELECT, PER_COMPRESSED, FOLDED, ALIGNED,
                 K_MAIN, K_REST, STAGES, KEY_STAGES),
            ),
            (
                _fetch_keys,
                (k_tiles, buffers, ready, where, counter, key_tiles, K_MAIN, K_REST, KEY_STAGES),
            ),
            (_fetch_queries, (q_tiles, buffers, ready, G, K_MAIN, K_REST, STAGES, KEY_STAGES)),
        ],
        [4, 1, 1],
        [232, 40, 40],
    )  # fmt: skip


@gluon.jit
def _draw(counter, where, key_tiles):
    """The next tile that has anything to score, drawn from `counter`.

    Query tile (-1 if there is none left), its first query and the one past its last, the first row
    of its keys, batch, KV head, first key tile, how many keys any query sees, and how many all do.
    """
    tile_first, tile_stop, lower, upper, stride_bounds = where[:5]
    first_tile, tiles, T, B, HK = where[5:10]
    LARGEST: gl.constexpr = 2**31 - 1
    lanes: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    pairs = (key_tiles + 1) // 2
    each = pairs * B * HK
    i_tile, first, stop, base, i_batch, i_kv, i_key_tile = -1, 0, 0, 0, 0, 0, 0
    seen, all_seen = 0, 0
    searching = True
    while searching:
        i_work = gl.atomic_add(counter, 1, sem="relaxed")
        # Late tiles come first: where attention is causal they have the most to do.
        i_tile = tiles - 1 - i_work // each
        searching = i_tile >= 0
        if searching:
            i_key_tile = i_work % each // (B * HK) * 2
            i_batch = i_work // HK % B
            i_kv = i_work % HK
            first = (first_tile + i_tile) * 64
            stop = gl.minimum(first + 64, T)
            if tile_first is not None:
                first = gl.load(tile_first + first_tile + i_tile)
                stop = gl.load(tile_stop + first_tile + i_tile)
            o_query = first + gl.arange(0, 64, lanes)
            o_bounds = i_batch.to(gl.int64) * stride_bounds
            b_upper = gl.load(upper + o_bounds + o_query, mask=o_query < stop, other=0)
            base = gl.load(lower + o_bounds + gl.minimum(first, T - 1))
            seen = gl.max(b_upper, 0) - base
            all_seen = gl.min(gl.where(o_query < stop, b_upper, LARGEST), 0) - base
            searching = i_key_tile * 128 >= seen
    return gl.maximum(i_tile, -1), first, stop, base, i_batch, i_kv, i_key_tile, seen, all_seen


@gluon.jit
def _announce(notes, i_note, where, i_tile, first, count, i_batch, i_kv, base, i_key_tile, full):
    """Say what the keys of a slot are for.

    Besides, where the tile's rows begin in `lse`, in the scores and in the bounds, so that the
    warpgroups need not know how.
    """
    stride_bounds = where[4]
    T, B, HK, G, columns = where[7:]
    fields, offsets = notes
    o_note = i_note * _FIELDS
    note(fields, o_note, i_tile, 1)
    note(fields, o_note + 1, first, 1)
    note(fields, o_note + 2, count, 1)
    note(fields, o_note + 3, i_batch, 1)
    note(fields, o_note + 4, i_kv * G, 1)
    note(fields, o_note + 5, base, 1)
    note(fields, o_note + 6, i_key_tile, 1)
    note(fields, o_note + 7, full, 1)
    i_batch = i_batch.to(gl.int64)
    o_lse = ((i_batch * T + first) * HK + i_kv) * G
    o_scores = ((i_tile.to(gl.int64) * 64 * B + i_batch) * HK + i_kv) * columns
    o_note = i_note * _OFFSETS
    note(offsets, o_note, o_lse, 1)
    note(offsets, o_note + 1, o_scores, 1)
    note(offsets, o_note + 2, i_batch * stride_bounds + first, 1)
    gl.thread_barrier()


@gluon.jit
def _fetch_keys(
    k_tiles, buffers, ready, where, counter, key_tiles,
    K_MAIN: gl.constexpr, K_REST: gl.constexpr, KEY_STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that draws tiles, and fetches the keys of both warpgroups as slots become free."""
    _q_buffer, _q_rest_buffer, k_buffer, k_rest_buffer = buffers
    _q_ready, k_ready, notes, _scale, _row_stride = ready
    i_slot, parity = 0, 1
    i_tile, first, stop, base, i_batch, i_kv, i_key_tile, seen, all_seen = _draw(
        counter, where, key_tiles
    )
    while i_tile >= 0:
        for half in gl.static_range(2):
            i_own_tile = i_key_tile + half
            i_key = i_own_tile * 128
            count = gl.where(i_key < seen, stop - first, 0)
            full = (i_key + 128 <= all_seen).to(gl.int32)
            filled = k_ready.index(i_slot)
            mbarrier.wait(k_ready.index(KEY_STAGES + i_slot), parity)
            _announce(
                notes, parity * KEY_STAGES + i_slot, where, i_tile, first, count, i_batch, i_kv,
                base, i_own_tile, full,
            )  # fmt: skip
            mbarrier.expect(filled, 2 * 128 * (K_MAIN + K_REST))
            tma.async_copy_global_to_shared(
                k_tiles[0], [i_batch, base + i_key, i_kv, 0], filled, k_buffer.index(i_slot)
            )
            if K_REST:
                tma.async_copy_global_to_shared(
                    k_tiles[1], [i_batch, base + i_key, i_kv, K_MAIN], filled,
                    k_rest_buffer.index(i_slot),
                )  # fmt: skip
            i_slot, parity = next_stage(i_slot, parity, KEY_STAGES)
        i_tile, first, stop, base, i_batch, i_kv, i_key_tile, seen, all_seen = _draw(
            counter, where, key_tiles
        )
    # The end is announced as a tile too, whose product is of what lies in the buffers.
    for _half in gl.static_range(2):
        mbarrier.wait(k_ready.index(KEY_STAGES + i_slot), parity)
        _announce(
            notes, parity * KEY_STAGES + i_slot, where, i_tile, first, 0, i_batch, i_kv, base,
            i_key_tile, 0,
        )  # fmt: skip
        mbarrier.arrive(k_ready.index(i_slot), count=1)
        i_slot, parity = next_stage(i_slot, parity, KEY_STAGES)


@gluon.jit
def _fetch_queries(
    q_tiles, buffers, ready, G,
    K_MAIN: gl.constexpr, K_REST: gl.constexpr, STAGES: gl.constexpr, KEY_STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that fetches the queries' heads."""
    q_buffer, q_rest_buffer, _k_buffer, _k_rest_buffer = buffers
    q_ready, k_ready, notes, _scale, _row_stride = ready
    fields = notes[0]
    i_stage, parity, i_slot, key_parity = 0, 1, 0, 0
    searching = True
    while searching:
        mbarrier.wait(k_ready.index(i_slot), key_parity)
        o_note = ((key_parity ^ 1) * KEY_STAGES + i_slot) * _FIELDS
        searching = noted(fields, o_note, 1) >= 0
        first, i_batch = noted(fields, o_note + 1, 1), noted(fields, o_note + 3, 1)
        i_head = noted(fields, o_note + 4, 1)
        # Both warpgroups take the first product of what follows before they see that it is the end.
        for i_member in range(gl.where(searching, G, 2)):
            filled = q_ready.index(i_stage)
            mbarrier.wait(q_ready.index(STAGES + i_stage), parity)
            mbarrier.expect(filled, 2 * 64 * (K_MAIN + K_REST))
            tma.async_copy_global_to_shared(
                q_tiles[0], [i_batch, first, i_head + i_member, 0], filled, q_buffer.index(i_stage)
            )
            if K_REST:
                tma.async_copy_global_to_shared(
                    q_tiles[1], [i_batch, first, i_head + i_member, K_MAIN], filled,
                    q_rest_buffer.index(i_stage),
                )  # fmt: skip
            i_stage, parity = next_stage(i_stage, parity, STAGES)
        i_slot, key_parity = _second_next(i_slot, key_parity, KEY_STAGES)


@gluon.jit
def _second_next(i_slot, parity, SLOTS: gl.constexpr):
    """The slot after the next, and the parity of the barriers there."""
    i_slot += 2
    m_wrap = i_slot >= SLOTS
    return gl.where(m_wrap, i_slot - SLOTS, i_slot), gl.where(m_wrap, parity ^ 1, parity)


@gluon.jit
def _product(buffers, i_stage, i_slot, K_MAIN: gl.constexpr, K_REST: gl.constexpr):
    """Start `q @ k.T`. `[64, 128]`."""
    q_buffer, q_rest_buffer, k_buffer, k_rest_buffer = buffers
    dtype: gl.constexpr = q_buffer.dtype
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    by_key: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    zeros = gl.zeros([64, 128], gl.float32, by_key)
    b_q = q_buffer.index(i_stage)._reinterpret(dtype, [64, K_MAIN], tile)
    b_k = k_buffer.index(i_slot)._reinterpret(dtype, [128, K_MAIN], tile)
    b_s = warpgroup_mma(b_q, b_k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    if K_REST:
        b_q = q_rest_buffer.index(i_stage)._reinterpret(dtype, [64, K_REST], tile)
        b_k = k_rest_buffer.index(i_slot)._reinterpret(dtype, [128, K_REST], tile)
        b_s = warpgroup_mma(b_q, b_k.permute((1, 0)), b_s, is_async=True)
    return b_s


@gluon.jit
def _rows_of(notes, i_note, rows):
    """Pointers to `lse` of the rows of a tile, and which rows there are."""
    lse, _upper, _scores, _columns, H, _G = rows
    fields, offsets = notes
    by_key: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    o_row = gl.arange(0, 64, gl.SliceLayout(1, by_key))
    p_lse = lse + noted(offsets, i_note * _OFFSETS) + o_row * H
    return p_lse, o_row < noted(fields, i_note * _FIELDS + 2)


@gluon.jit
def _consume(
    buffers, ready, rows,
    HALF: gl.constexpr, PER_SELECT: gl.constexpr, PER_COMPRESSED: gl.constexpr,
    FOLDED: gl.constexpr, ALIGNED: gl.constexpr, K_MAIN: gl.constexpr, K_REST: gl.constexpr,
    STAGES: gl.constexpr, KEY_STAGES: gl.constexpr,
):  # fmt: skip
    """A multiplying warpgroup: its keys of every tile.

    Exponentials stand between the start of the next product and the wait for it, and would not stay
    there: ptxas takes them before the one, to free registers, or after the other. It does not move
    them past a loop that waits for a barrier, be it long since passed, as long as they need what is
    loaded from shared memory after that, hence the scale. No product may be on its way where a loop
    starts again: ptxas would then wait for every single instruction of all products.
    """
    q_ready, k_ready, notes, scale, row_stride = ready
    G = rows[5]
    by_key: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    log2_e: gl.constexpr = 1.4426950408889634
    i_stage, parity, i_slot, key_parity = 0, 0, HALF, 0
    mbarrier.wait(k_ready.index(i_slot), key_parity)
    i_note = (key_parity ^ 1) * KEY_STAGES + i_slot
    i_tile = noted(notes[0], i_note * _FIELDS)
    p_lse, m_row = _rows_of(notes, i_note, rows)
    b_lse = gl.load(p_lse, mask=m_row, other=0.0)
    mbarrier.wait(q_ready.index(i_stage), parity)
    product = _product(buffers, i_stage, i_slot, K_MAIN, K_REST)
    even = warpgroup_mma_wait(0, deps=(product,))
    mbarrier.arrive(q_ready.index(STAGES + i_stage), count=1)
    i_stage, parity = next_stage(i_stage, parity, STAGES)
    mbarrier.wait(q_ready.index(i_stage), parity)
    while i_tile >= 0:
        b_p = gl.zeros([64, 128], gl.float32, by_key)
        for _ in range(1, G // 2):
            b_lse_odd = gl.load(p_lse + 1, mask=m_row, other=0.0)
            product = _product(buffers, i_stage, i_slot, K_MAIN, K_REST)
            mbarrier.wait(q_ready.index(i_stage), parity)
            scale_log2 = noted(scale, 0)
            b_p += gl.exp2(even * scale_log2 - (b_lse * log2_e)[:, None])
            i_before = i_stage
            i_stage, parity = next_stage(i_stage, parity, STAGES)
            mbarrier.wait(q_ready.index(i_stage), parity)
            odd = warpgroup_mma_wait(0, deps=(product,))
            mbarrier.arrive(q_ready.index(STAGES + i_before), count=1)
            p_lse += 2
            b_lse = gl.load(p_lse, mask=m_row, other=0.0)
            product = _product(buffers, i_stage, i_slot, K_MAIN, K_REST)
            mbarrier.wait(q_ready.index(i_stage), parity)
            scale_log2 = noted(scale, 0)
            b_p += gl.exp2(odd * scale_log2 - (b_lse_odd * log2_e)[:, None])
            i_before = i_stage
            i_stage, parity = next_stage(i_stage, parity, STAGES)
            mbarrier.wait(q_ready.index(i_stage), parity)
            even = warpgroup_mma_wait(0, deps=(product,))
            mbarrier.arrive(q_ready.index(STAGES + i_before), count=1)
        b_lse_odd = gl.load(p_lse + 1, mask=m_row, other=0.0)
        product = _product(buffers, i_stage, i_slot, K_MAIN, K_REST)
        i_before, parity_before, i_slot_before = i_stage, parity, i_slot
        i_stage, parity = next_stage(i_stage, parity, STAGES)
        i_slot, key_parity = _second_next(i_slot, key_parity, KEY_STAGES)
        mbarrier.wait(q_ready.index(i_before), parity_before)
        scale_log2 = noted(scale, 0)
        b_p += gl.exp2(even * scale_log2 - (b_lse * log2_e)[:, None])
        mbarrier.wait(k_ready.index(i_slot), key_parity)
        i_own_note, i_note = i_note, (key_parity ^ 1) * KEY_STAGES + i_slot
        i_tile = noted(notes[0], i_note * _FIELDS)
        p_lse, m_row = _rows_of(notes, i_note, rows)
        b_lse = gl.load(p_lse, mask=m_row, other=0.0)
        mbarrier.wait(q_ready.index(i_stage), parity)
        odd = warpgroup_mma_wait(0, deps=(product,))
        mbarrier.arrive(q_ready.index(STAGES + i_before), count=1)
        mbarrier.arrive(k_ready.index(KEY_STAGES + i_slot_before), count=1)
        product = _product(buffers, i_stage, i_slot, K_MAIN, K_REST)
        mbarrier.wait(q_ready.index(i_stage), parity)
        scale_log2 = noted(scale, 0)
        b_p += gl.exp2(odd * scale_log2 - (b_lse_odd * log2_e)[:, None])
        i_before = i_stage
        i_stage, parity = next_stage(i_stage, parity, STAGES)
        mbarrier.wait(q_ready.index(i_stage), parity)
        _store(
            rows, notes, row_stride, i_own_note, b_p,
            PER_SELECT, PER_COMPRESSED, FOLDED, ALIGNED, K_REST == 0 and PER_SELECT >= 4,
        )  # fmt: skip
        even = warpgroup_mma_wait(0, deps=(product,))
        mbarrier.arrive(q_ready.index(STAGES + i_before), count=1)


@gluon.jit
def _store(
    rows, notes, row_stride, i_note, b_p,
    PER_SELECT: gl.constexpr, PER_COMPRESSED: gl.constexpr, FOLDED: gl.constexpr,
    ALIGNED: gl.constexpr, STAGED: gl.constexpr,
):  # fmt: skip
    """Write what a tile's keys give, folded or not, see `_block_scores_kernel`.

    `STAGED` stores go through shared memory, so that a warp writes whole lines.
    """
    _lse, upper, scores, columns, _H, _G = rows
    fields, offsets = notes
    o_field, o_offset = i_note * _FIELDS, i_note * _OFFSETS
    by_key: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    count, i_column = noted(fields, o_field + 2), noted(fields, o_field + 6) * 128
    o_column = i_column + gl.arange(0, 128, gl.SliceLayout(0, by_key))
    if noted(fields, o_field + 7) == 0:
        o_row = gl.arange(0, 64, gl.SliceLayout(1, by_key))
        p_upper = upper + noted(offsets, o_offset + 2) + o_row
        b_seen = gl.load(p_upper, mask=o_row < count, other=0) - noted(fields, o_field + 5)
        b_p = gl.where(o_column[None, :] < b_seen[:, None], b_p, 0.0)
    columns = gl.multiple_of(columns, ALIGNED)
    p_out = scores + gl.multiple_of(noted(offsets, o_offset + 1), ALIGNED)
    # From shared memory, so that no product with it is kept in registers throughout.
    stride = gl.multiple_of(noted(row_stride, 0), ALIGNED)
    if FOLDED:
        BLOCKS: gl.constexpr = 128 // PER_SELECT
        # Key i overlaps its own block by min(l / d, m / d - i), the next by the rest of l / d.
        o_inside = o_column & (PER_SELECT - 1)
        own_weight = gl.minimum(PER_SELECT - o_inside, PER_COMPRESSED).to(gl.float32)
        b_own = gl.reshape(b_p * own_weight[None, :], [64, BLOCKS, PER_SELECT])
        b_own = gl.sum(b_own, 2)
        b_carried = b_p * (PER_COMPRESSED - own_weight)[None, :]
        b_carried = gl.sum(gl.reshape(b_carried, [64, BLOCKS, PER_SELECT]), 2)
        coalesced: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
        lanes: gl.constexpr = coalesced if STAGED else b_own.type.layout
        if STAGED:
            pairs: gl.constexpr = gl.BlockedLayout([1, 1, 2], [1, 32, 1], [4, 1, 1], [2, 1, 0])
            b_own, b_carried = gl.split(gl.convert_layout(gl.join(b_own, b_carried), pairs))
        b_own, b_carried = gl.convert_layout(b_own, lanes), gl.convert_layout(b_carried, lanes)
        o_row = gl.arange(0, 64, gl.SliceLayout(1, lanes))
        o_block = i_column // PER_SELECT + gl.arange(0, BLOCKS, gl.SliceLayout(0, lanes))
        p_out += (o_row * stride)[:, None] + o_block[None, :]
        m_row = (o_row < count)[:, None]
        gl.store(p_out, b_own, mask=m_row & (o_block < columns // 2)[None, :])
        m_out = m_row & (o_block + 1 < columns // 2)[None, :]
        gl.store(p_out + columns // 2 + 1, b_carried, mask=m_out)
    else:
        o_row = gl.arange(0, 64, gl.SliceLayout(1, by_key))
        p_out += (o_row * stride)[:, None] + o_column[None, :]
        m_out = (o_row < count)[:, None] & (o_column < columns)[None, :]
        gl.store(p_out, b_p, mask=m_out)
