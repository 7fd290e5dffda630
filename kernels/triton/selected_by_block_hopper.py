"""The kernel of `selected` that goes by block, for Hopper: the keys of a block stay where they are.

One warp, or four, fetch the rows of queries that chose the block ahead of time, tile by tile, and
the keys and values of the next block; two warpgroups multiply, each every second tile. Results
leave from registers, see `partials_hopper`.
"""

from __future__ import annotations

import torch
import triton.experimental.gluon as gluon
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton import constexpr_function
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsa_port.kernels.tables import Values
from nsa_port.kernels.triton.hopper import copy_tile, describe, next_stage, note, noted
from nsa_port.kernels.triton.host import LOG2_E, cdiv, multiprocessors, split_head, strides
from nsa_port.kernels.triton.lists import BlockLists
from nsa_port.kernels.triton.lists_hopper import load_work
from nsa_port.kernels.triton.partials_hopper import layout_of_partials, to_partials
from nsa_port.kernels.triton.selected_hopper import SELECT


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    lists: BlockLists,
    first_query: int,
    partial_out: Tensor,
    partial_lse: Tensor,
    scale: float,
    heads: int,
    values: Values,
) -> None:
    """Fill the partial results of the lists' entries.

    `partial_out` is `[B, HK, queries, n, heads * Dv]`, ordered as in `partials_hopper`;
    `partial_lse` is the same without `Dv`, to base 2, never 0, and must have been 0 before. `scale`
    is positive.
    """
    _, T, H, Dk = q.shape
    HK, Dv = v.shape[2:]
    n = rows.shape[3]
    key, value = split_head(Dk), split_head(Dv)
    items = torch.empty((lists.work + 1, 4), dtype=torch.int32, device=q.device)
    _items_kernel[(cdiv(lists.work + 1, 128),)](
        rows, lists.entries, lists.starts, lists.counts, lists.segment_ends, lists.work_bins,
        items, lists.work, first_query, T, HK, lists.blocks, lists.bins,
        SLOTS=n, SEGMENT=lists.segment, num_warps=4,
    )  # fmt: skip
    stride_b, stride_t, stride_h = strides(q)
    _hopper_by_block_kernel[(min(lists.work, multiprocessors(q.device)),)](
        q,
        describe(q, 1, min(64, key.main), heads) if heads >= 8 else None,
        describe(q, 1, min(64, key.rest), heads) if heads >= 8 else None,
        describe(k, SELECT, min(64, key.main), 1),
        describe(k, SELECT, min(64, key.rest), 1),
        describe(v, SELECT, min(64, value.main), 1),
        items,
        lists.entries,
        partial_out,
        partial_lse,
        max(scale * LOG2_E, 1e-30),
        lists.work,
        first_query,
        partial_out.shape[2],
        HK,
        H // HK,
        stride_b,
        stride_t,
        stride_h,
        SLOTS=n,
        HEADS=heads,
        K_MAIN=key.main,
        K_REST=key.rest,
        V_MAIN=value.main,
        STAGES=values["num_stages"],
        KEY_STAGES=values["key_stages"],
        num_warps=values["num_warps"],
    )


@gluon.jit(do_not_specialize=["work", "first_query", "T", "blocks", "bins"])
def _items_kernel(
    rows, entries, starts, counts, segment_ends, work_bins, items, work, first_query, T, HK, blocks,
    bins, SLOTS: gl.constexpr, SEGMENT: gl.constexpr,
):  # fmt: skip
    """One program: 128 work items, each as four numbers.

    These are the block's first key row, the batch and KV head, where the entries start, and how
    many there are, 0 for surplus items. Surplus items come last, and there is one at least: its
    first number, 0, is where items are drawn from.
    """
    o_work = gl.program_id(0) * 128 + gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    m_work = o_work <= work
    i_bin, start, count, _ = load_work(
        gl.minimum(o_work, work - 1), starts, counts, segment_ends, work_bins, bins, SEGMENT
    )
    m_some = (count > 0) & (o_work < work)
    count = gl.where(m_some, count, 0)
    entry = gl.load(entries + start, mask=m_some, other=0)
    i_group = i_bin // blocks
    i_query = first_query + entry // SLOTS
    i_row = (i_group // HK).to(gl.int64) * T + i_query
    i_row = (i_row * HK + i_group % HK) * SLOTS + entry % SLOTS
    row = gl.load(rows + i_row, mask=m_some, other=0)
    gl.store(items + o_work * 4, row, mask=m_work)
    gl.store(items + o_work * 4 + 1, i_group, mask=m_work)
    # Surplus items start anywhere, and the kernel looks ahead to where items start.
    gl.store(items + o_work * 4 + 2, gl.where(m_some, start, 0), mask=m_work)
    gl.store(items + o_work * 4 + 3, count, mask=m_work)


@gluon.jit(do_not_specialize=["work", "first_query", "queries"])
def _hopper_by_block_kernel(
    q, q_main, q_rest, k_main, k_rest, v_main, items, entries, partial_out, partial_lse, scale_log2,
    work, first_query, queries, HK, G, stride_qb, stride_qt, stride_qh,
    SLOTS: gl.constexpr, HEADS: gl.constexpr, K_MAIN: gl.constexpr, K_REST: gl.constexpr,
    V_MAIN: gl.constexpr, STAGES: gl.constexpr, KEY_STAGES: gl.constexpr,
):  # fmt: skip
    """As many programs as the device has multiprocessors; each takes the next item when it can.

    Which program takes which changes nothing. Whatever is left to be gone through by block is seen
    to the end by all who chose it (`EVEN` of `share_blocks`): nothing is masked.
    """
    dtype: gl.constexpr = partial_out.dtype.element_ty
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    rest: gl.constexpr = K_REST if K_REST else K_MAIN
    q_buffer = gl.allocate_shared_memory(dtype, [STAGES, 64, K_MAIN], tile)
    k_buffer = gl.allocate_shared_memory(dtype, [KEY_STAGES, 64, K_MAIN], tile)
    v_buffer = gl.allocate_shared_memory(dtype, [KEY_STAGES, 64, V_MAIN], tile)
    q_rest_buffer, k_rest_buffer = q_buffer, k_buffer
    if K_REST:
        q_rest_buffer = gl.allocate_shared_memory(dtype, [STAGES, 64, rest], tile)
        k_rest_buffer = gl.allocate_shared_memory(dtype, [KEY_STAGES, 64, rest], tile)
    counter: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_ready = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], counter)
    k_ready = gl.allocate_shared_memory(gl.int64, [2 * KEY_STAGES, 1], counter)
    # The first barriers say that buffers are filled, those behind that they are free.
    for i_barrier in gl.static_range(STAGES):
        mbarrier.init(q_ready.index(i_barrier), count=1 if HEADS >= 8 else 128)
        mbarrier.init(q_ready.index(STAGES + i_barrier), count=1)
    for i_barrier in gl.static_range(KEY_STAGES):
        mbarrier.init(k_ready.index(i_barrier), count=1)
        mbarrier.init(k_ready.index(KEY_STAGES + i_barrier), count=2)
    fence_async_shared()

    buffers = (q_buffer, q_rest_buffer, k_buffer, k_rest_buffer, v_buffer)
    # What the keys in a buffer are for.
    notes = gl.allocate_shared_memory(gl.int32, [3 * KEY_STAGES, 1], counter)
    ready = (q_ready, k_ready, notes)
    lists = (items, entries, work, queries)
    rows = (q, q_main, q_rest, first_query, HK, G, stride_qb, stride_qt, stride_qh)
    keys = (k_main, k_rest, v_main)
    results = (partial_out, partial_lse, scale_log2)
    gl.warp_specialize(
        [
            (
                _consume,
                (buffers, ready, lists, results,
                 0, SLOTS, HEADS, K_REST, V_MAIN, STAGES, KEY_STAGES),
            ),
            (
                _consume,
                (buffers, ready, lists, results,
                 1, SLOTS, HEADS, K_REST, V_MAIN, STAGES, KEY_STAGES),
            ),
            (
                _fetch,
                (buffers, ready, lists, rows, keys,
                 SLOTS, HEADS, K_MAIN, K_REST, V_MAIN, STAGES, KEY_STAGES),
            ),
        ],
        [4, 1 if HEADS >= 8 else 4],
        [208, 64] if HEADS >= 8 else [200, 88],
    )  # fmt: skip


@gluon.jit
def _load_item(items, i_work, work):
    """A work item's first key row, batch and KV head, first entry and number of entries."""
    p_item = items + gl.minimum(i_work, work) * 4
    return gl.load(p_item), gl.load(p_item + 1), gl.load(p_item + 2), gl.load(p_item + 3)


@gluon.jit
def _draw(items, work):
    """The next work item that no program has, beyond the one that each begins with."""
    return gl.num_programs(0) + gl.atomic_add(items + work * 4, 1, sem="relaxed")


@gluon.jit
def _announce(notes, i_keys, i_group, start, count, HEADS: gl.constexpr):
    """Say what the keys in a buffer are for."""
    WARPS: gl.constexpr = 1 if HEADS >= 8 else 4
    note(notes, i_keys * 3, i_group, WARPS)
    note(notes, i_keys * 3 + 1, start, WARPS)
    note(notes, i_keys * 3 + 2, count, WARPS)
    gl.thread_barrier()


@gluon.jit
def _load_entries(entries, start, i_entry, count, o_entry, COUNT: gl.constexpr):
    """The entries from `i_entry` on, the last one in place of those behind it.

    `COUNT` scalars, or with 0 those at `o_entry`.
    """
    if COUNT == 0:
        return gl.load(entries + start + gl.maximum(gl.minimum(i_entry + o_entry, count - 1), 0))
    elif COUNT == 1:
        return (gl.load(entries + start + gl.maximum(gl.minimum(i_entry, count - 1), 0)),)
    else:
        half: gl.constexpr = COUNT // 2
        first = _load_entries(entries, start, i_entry, count, o_entry, half)
        return first + _load_entries(entries, start, i_entry + half, count, o_entry, half)


@gluon.jit
def _fetch(
    buffers, ready, lists, rows, keys,
    SLOTS: gl.constexpr, HEADS: gl.constexpr, K_MAIN: gl.constexpr, K_REST: gl.constexpr,
    V_MAIN: gl.constexpr, STAGES: gl.constexpr, KEY_STAGES: gl.constexpr,
):  # fmt: skip
    """The fetching warps: fill every buffer as soon as it is free.

    Numbers that addresses depend on are loaded ahead: entries two tiles, work items two items.
    """
    q_buffer, q_rest_buffer, k_buffer, k_rest_buffer, v_buffer = buffers
    q_ready, k_ready, notes = ready
    items, entries, work, _ = lists
    q, q_main, q_rest, first_query, HK, G, stride_qb, stride_qt, stride_qh = rows
    k_main, k_rest, v_main = keys
    QUERIES: gl.constexpr = 64 // HEADS
    DIM: gl.constexpr = K_MAIN + K_REST
    LANES: gl.constexpr = _lanes(K_MAIN)
    REST_LANES: gl.constexpr = _lanes(K_REST if K_REST else K_MAIN)
    SCALARS: gl.constexpr = QUERIES if HEADS >= 8 else 0
    o_entry = 0
    if HEADS < 8:
        o_entry = gl.arange(0, 64, gl.SliceLayout(1, LANES)) // HEADS
    i_stage, parity, i_keys, keys_parity = 0, 1, 0, 1
    i_row, i_group, start, count = _load_item(items, gl.program_id(0), work)
    next_row, next_group, next_start, next_count = _load_item(items, _draw(items, work), work)
    i_last = _draw(items, work)
    listed = _load_entries(entries, start, 0, count, o_entry, SCALARS)
    following = _load_entries(entries, start, QUERIES, count, o_entry, SCALARS)
    while count > 0:
        last_row, last_group, last_start, last_count = _load_item(items, i_last, work)
        i_last = _draw(items, work)
        next_listed = _load_entries(entries, next_start, 0, next_count, o_entry, SCALARS)
        next_following = _load_entries(entries, next_start, QUERIES, next_count, o_entry, SCALARS)
        i_batch, i_kv = i_group // HK, i_group % HK
        filled = k_ready.index(i_keys)
        mbarrier.wait(k_ready.index(KEY_STAGES + i_keys), keys_parity)
        _announce(notes, i_keys, i_group, start, count, HEADS)
        mbarrier.expect(filled, 2 * 64 * (DIM + V_MAIN))
        copy_tile(k_main, i_batch, i_row, i_kv, 0, filled, k_buffer.index(i_keys), K_MAIN, 64, 1, 0)
        if K_REST:
            copy_tile(k_rest, i_batch, i_row, i_kv, K_MAIN, filled, k_rest_buffer.index(i_keys),
                      K_REST, 64, 1, 0)  # fmt: skip
        copy_tile(v_main, i_batch, i_row, i_kv, 0, filled, v_buffer.index(i_keys), V_MAIN, 64, 1, 0)
        i_keys, keys_parity = next_stage(i_keys, keys_parity, KEY_STAGES)
        p_q = q + i_batch.to(gl.int64) * stride_qb + first_query.to(gl.int64) * stride_qt
        p_q += i_kv * G * stride_qh
        for i_entry in range(0, count, QUERIES):
            behind = _load_entries(entries, start, i_entry + 2 * QUERIES, count, o_entry, SCALARS)
            filled = q_ready.index(i_stage)
            mbarrier.wait(q_ready.index(STAGES + i_stage), parity)
            if HEADS >= 8:
                mbarrier.expect(filled, 2 * 64 * DIM)
                for i_query in gl.static_range(QUERIES):
                    i_token = first_query + listed[i_query] // SLOTS
                    copy_tile(q_main, i_batch, i_token, i_kv * G, 0, filled,
                              q_buffer.index(i_stage), K_MAIN, 1, HEADS,
                              i_query * HEADS)  # fmt: skip
                    if K_REST:
                        copy_tile(q_rest, i_batch, i_token, i_kv * G, K_MAIN, filled,
                                  q_rest_buffer.index(i_stage), K_REST, 1, HEADS,
                                  i_query * HEADS)  # fmt: skip
            else:
                _copy_rows(q_buffer.index(i_stage), p_q, listed, stride_qt, stride_qh, G,
                           SLOTS, HEADS)  # fmt: skip
                if K_REST:
                    b_entry = gl.convert_layout(listed, gl.SliceLayout(1, REST_LANES))
                    _copy_rows(q_rest_buffer.index(i_stage), p_q + K_MAIN, b_entry, stride_qt,
                               stride_qh, G, SLOTS, HEADS)  # fmt: skip
                async_copy.mbarrier_arrive(filled, increment_count=False)
            i_stage, parity = next_stage(i_stage, parity, STAGES)
            listed, following = following, behind
        i_row, i_group, start, count = next_row, next_group, next_start, next_count
        next_row, next_group, next_start, next_count = last_row, last_group, last_start, last_count
        listed, following = next_listed, next_following
    # The end is announced as an item too.
    mbarrier.wait(k_ready.index(KEY_STAGES + i_keys), keys_parity)
    _announce(notes, i_keys, i_group, start, 0, HEADS)
    mbarrier.arrive(k_ready.index(i_keys), count=1)


@constexpr_function
def _lanes(width):
    """How four warps copy `[64, width]`, 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // width, width // 8], [4, 1], [1, 0])


@gluon.jit
def _copy_rows(
    s_rows, p_base, b_entry, stride_t, stride_h, G, SLOTS: gl.constexpr, HEADS: gl.constexpr
):  # fmt: skip
    """Start copying rows, or the first columns of rows, of the entries `b_entry [64]`."""
    LANES: gl.constexpr = _lanes(s_rows.shape[1])
    o_member = gl.arange(0, 64, gl.SliceLayout(1, LANES)) % HEADS
    o_query = (b_entry // SLOTS).to(gl.int64) * stride_t + gl.minimum(o_member, G - 1) * stride_h
    o_column = gl.arange(0, s_rows.shape[1], gl.SliceLayout(0, LANES))
    async_copy.async_copy_global_to_shared(s_rows, p_base + o_query[:, None] + o_column[None, :])


@gluon.jit
def _consume(
    buffers, ready, lists, results,
    WHO: gl.constexpr, SLOTS: gl.constexpr, HEADS: gl.constexpr, K_REST: gl.constexpr,
    V_MAIN: gl.constexpr, STAGES: gl.constexpr, KEY_STAGES: gl.constexpr,
):  # fmt: skip
    """A multiplying warpgroup: every second tile of all that the program works on."""
    q_buffer, q_rest_buffer, k_buffer, k_rest_buffer, v_buffer = buffers
    q_ready, k_ready, notes = ready
    _items, entries, _work, queries = lists
    partial_out, partial_lse, scale_log2 = results
    dtype: gl.constexpr = q_buffer.dtype
    QUERIES: gl.constexpr = 64 // HEADS
    by_key: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    by_value: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V_MAIN, 16])
    row: gl.constexpr = gl.SliceLayout(1, by_key)
    LAYOUT: gl.constexpr = layout_of_partials(HEADS, V_MAIN)
    i_stage, parity, i_keys, keys_parity = WHO, 0, 0, 0
    o_row = gl.arange(0, 64, row)
    o_query = gl.arange(0, QUERIES, gl.SliceLayout(1, LAYOUT))
    o_inside = gl.arange(0, HEADS * V_MAIN, gl.SliceLayout(0, LAYOUT))
    # Tiles of the items before.
    done = 0
    searching = True
    while searching:
        mbarrier.wait(k_ready.index(i_keys), keys_parity)
        i_group, start = noted(notes, i_keys * 3), noted(notes, i_keys * 3 + 1)
        count = noted(notes, i_keys * 3 + 2)
        searching = count > 0
        if searching:
            p_entries = entries + start
            i_first = i_group.to(gl.int64) * queries * SLOTS
            p_out = partial_out + i_first * (HEADS * V_MAIN)
            p_lse = partial_lse + i_first * HEADS
            tiles = gl.cdiv(count, QUERIES)
            b_k = k_buffer.index(i_keys).permute((1, 0))
            b_k_rest = k_rest_buffer.index(i_keys).permute((1, 0))
            b_v = v_buffer.index(i_keys)
            # Not the start of the loop: the compiler overlooks there that `done` changes.
            before = (done + WHO) & 1
            for i_mine in range((tiles - before + 1) // 2):
                i_tile = 2 * i_mine + before
                o_entry = i_tile * QUERIES + o_row // HEADS
                b_entry = gl.load(p_entries + gl.minimum(o_entry, count - 1))
                o_listed = i_tile * QUERIES + o_query
                b_listed = gl.load(p_entries + gl.minimum(o_listed, count - 1))
                mbarrier.wait(q_ready.index(i_stage), parity)
                if HEADS < 8:
                    # The rows were not written by the copy engine: the products have to see them.
                    fence_async_shared()
                b_s = gl.zeros([64, 64], gl.float32, by_key)
                b_s = warpgroup_mma(q_buffer.index(i_stage), b_k, b_s, use_acc=False, is_async=True)
                if K_REST:
                    b_s = warpgroup_mma(q_rest_buffer.index(i_stage), b_k_rest, b_s, is_async=True)
                b_s = warpgroup_mma_wait(0, deps=(b_s,))
                mbarrier.arrive(q_ready.index(STAGES + i_stage), count=1)
                b_max = gl.max(b_s, 1) * scale_log2
                b_p = gl.exp2(b_s * scale_log2 - b_max[:, None])
                b_sum = gl.sum(b_p, 1)
                b_p = gl.convert_layout(b_p.to(dtype), gl.DotOperandLayout(0, by_value, 2))
                b_out = gl.zeros([64, V_MAIN], gl.float32, by_value)
                b_out = warpgroup_mma(b_p, b_v, b_out, use_acc=False, is_async=True)
                o_lse = b_entry.to(gl.int64) * HEADS + o_row % HEADS
                b_lse = b_max + gl.log2(b_sum)
                b_lse = gl.where(b_lse == 0.0, 1e-30, b_lse)
                gl.store(p_lse + o_lse, b_lse, mask=o_entry < count)
                b_out, b_p = warpgroup_mma_wait(0, deps=(b_out, b_p))
                b_out *= gl.convert_layout(1.0 / b_sum, gl.SliceLayout(1, by_value))[:, None]
                b_out = to_partials(b_out.to(dtype), HEADS, LAYOUT)
                o_out = b_listed.to(gl.int64) * (HEADS * V_MAIN)
                # Nobody reads them before the next kernel: they make room for the queries' rows.
                gl.store(p_out + o_out[:, None] + o_inside[None, :], b_out,
                         mask=(o_listed < count)[:, None], cache_modifier=".cs")  # fmt: skip
                i_stage += 2
                m_wrap = i_stage >= STAGES
                i_stage = gl.where(m_wrap, WHO, i_stage)
                parity = gl.where(m_wrap, parity ^ 1, parity)
            mbarrier.arrive(k_ready.index(KEY_STAGES + i_keys), count=1)
            i_keys, keys_parity = next_stage(i_keys, keys_parity, KEY_STAGES)
        done += gl.cdiv(count, QUERIES)
