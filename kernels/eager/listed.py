"""Attention over a list of key blocks per query, without data-dependent shapes.

The selected branch is one such list; the window of a packed call or of one with positions is
another (the blocks that the window touches). Forward and dq gather each query's blocks. dk and dv
sort the (query, block) pairs by block, cut every block's pairs into segments of equal size, and
add the segments in a fixed order, so that no two programs ever add to one address.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nsa_port.kernels.eager.products import operand_dtype, product
from nsa_port.kernels.eager.rows import (
    QueryRows,
    chunks,
    element_budget,
    empty_results,
    query_rows,
    sequences,
)
from nsa_port.kernels.eager.softmax import attend, probabilities
from nsa_port.kernels.geometry import Layout, NSAConfig

_WINDOW_BLOCK = 64
_LONGEST_SEGMENT = 1024


class BlockList(NamedTuple):
    """Which keys each query sees: those of its blocks with `lowest <= key <= position`.

    Attributes:
        rows: where the queries stand.
        lowest: int64 `[B, T]`, the first visible key of the query's sequence.
        blocks: int64 `[B, T, HK, n]`, blocks of the query's sequence; -1 where there is none.
        block_size: tokens per block.
    """

    rows: QueryRows
    lowest: Tensor
    blocks: Tensor
    block_size: int


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    config: NSAConfig,
    layout: Layout,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Eq. 11, 12: one softmax over the tokens of the chosen blocks. `out, lse`."""
    if not q.numel() or not k.numel():
        return empty_results(q, v)
    return _forward(q, k, v, _chosen(q, indices, config, layout), scale)


def selected_gradients(
    grad_out: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    lse: Tensor,
    dq: Tensor,
    config: NSAConfig,
    layout: Layout,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Add to `dq`, return `dk, dv` of the selected branch."""
    if not q.numel() or not k.numel():
        return k.new_zeros(k.shape), v.new_zeros(v.shape)
    listed = _chosen(q, indices, config, layout)
    _query_gradients(grad_out, delta, q, k, v, lse, dq, listed, scale)
    return _key_gradients(grad_out, delta, q, k, v, lse, listed, config, layout, scale)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, config: NSAConfig, layout: Layout, scale: float
) -> tuple[Tensor, Tensor]:
    """The window branch of any layout. `out, lse`."""
    if not q.numel() or not k.numel():
        return empty_results(q, v)
    return _forward(q, k, v, _window(q, k, config, layout), scale)


def window_gradients(
    grad_out: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    dq: Tensor,
    config: NSAConfig,
    layout: Layout,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Add to `dq`, return `dk, dv` of the window branch of any layout."""
    if not q.numel() or not k.numel():
        return k.new_zeros(k.shape), v.new_zeros(v.shape)
    listed = _window(q, k, config, layout)
    _query_gradients(grad_out, delta, q, k, v, lse, dq, listed, scale)
    return _key_gradients(grad_out, delta, q, k, v, lse, listed, config, layout, scale)


def distinct_blocks(indices: Tensor, position: Tensor, block_size: int) -> Tensor:
    """int64 `[..., HK, n]`: each block once and only candidates, -1 elsewhere.

    Args:
        indices: int32 `[..., HK, n]`, anything at all.
        position: `[...]`.
    """
    blocks = indices.sort(dim=-1).values
    own = position.div(block_size, rounding_mode="floor")[..., None, None]
    wrong = (blocks < 0) | (blocks > own)
    wrong[..., 1:] |= blocks[..., 1:] == blocks[..., :-1]
    return blocks.long().masked_fill_(wrong, -1)


def _chosen(q: Tensor, indices: Tensor, config: NSAConfig, layout: Layout) -> BlockList:
    rows = query_rows(layout, config, q.shape[0], q.shape[1], q.device)
    m = config.select_block_size
    blocks = distinct_blocks(indices, rows.position, m)
    return BlockList(rows, torch.zeros_like(rows.position), blocks, m)


def _window(q: Tensor, k: Tensor, config: NSAConfig, layout: Layout) -> BlockList:
    rows = query_rows(layout, config, q.shape[0], q.shape[1], q.device)
    size = _WINDOW_BLOCK
    count = min((config.window_size + size - 2) // size + 1, -(-layout.num_keys // size))
    lowest = (rows.position + 1 - config.window_size).clamp(min=0)
    own = rows.position.div(size, rounding_mode="floor")
    blocks = own[..., None] - torch.arange(count - 1, -1, -1, device=q.device)
    blocks = blocks.masked_fill(blocks < lowest.div(size, rounding_mode="floor")[..., None], -1)
    return BlockList(rows, lowest, blocks[:, :, None].expand(-1, -1, k.shape[2], -1), size)


def _gather_step(q: Tensor, k: Tensor, v: Tensor, listed: BlockList) -> list[tuple[int, int]]:
    keys = listed.blocks.shape[-1] * listed.block_size
    per_query = keys * (q.shape[2] + k.shape[2] * (k.shape[3] + v.shape[3]))
    return list(chunks(q.shape[1], q.shape[0] * per_query, element_budget(q.device)))


class _Tile(NamedTuple):
    """A chunk of queries with its own copy of the keys each sees; `N = n * block_size`."""

    q: Tensor
    k: Tensor
    v: Tensor
    visible: Tensor
    logits: Tensor


def _gather(
    q: Tensor, k: Tensor, v: Tensor, listed: BlockList, a: int, b: int, scale: float
) -> _Tile:
    """`q [B, c, HK, G, Dk]`, `k, v [B, c, HK, N, D]`, `visible [B, c, HK, 1, N]`."""
    B, S, HK, _ = k.shape
    dtype = operand_dtype(q)
    blocks, rows = listed.blocks[:, a:b], listed.rows.slice(a, b)
    position = rows.position[:, :, None, None]
    offset = torch.arange(listed.block_size, device=q.device)
    key = (blocks[..., None] * listed.block_size + offset).flatten(-2)
    visible = (key >= listed.lowest[:, a:b, None, None]) & (key <= position) & (key >= 0)
    # Hidden keys read the query's own token: what they hold must not come from elsewhere.
    key = torch.where(visible, key, position) + rows.first_key[:, :, None, None]
    head = torch.arange(HK, device=q.device)[:, None]
    batch = torch.arange(B, device=q.device)[:, None, None, None]
    flat = ((key.clamp_(0, S - 1) + batch * S) * HK + head).flatten()
    k_rows = k.reshape(B * S * HK, -1).index_select(0, flat).to(dtype).view(*key.shape, -1)
    v_rows = v.reshape(B * S * HK, -1).index_select(0, flat).to(dtype).view(*key.shape, -1)
    q_rows = q[:, a:b].unflatten(2, (HK, -1)).to(dtype)
    logits = product(q_rows, k_rows.transpose(-1, -2)).mul_(scale)
    return _Tile(q_rows, k_rows, v_rows, visible.unsqueeze(3), logits)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, listed: BlockList, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = empty_results(q, v)
    for a, b in _gather_step(q, k, v, listed):
        tile = _gather(q, k, v, listed, a, b, scale)
        part, part_lse = attend(tile.logits, tile.visible, tile.v)
        out[:, a:b] = part.flatten(2, 3)
        lse[:, a:b] = part_lse.flatten(2)
    return out, lse


def _query_gradients(
    grad_out: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    dq: Tensor,
    listed: BlockList,
    scale: float,
) -> None:
    HK = k.shape[2]
    for a, b in _gather_step(q, k, v, listed):
        tile = _gather(q, k, v, listed, a, b, scale)
        _, dlogits = probabilities(
            tile.logits,
            tile.visible,
            tile.v,
            grad_out[:, a:b].unflatten(2, (HK, -1)).to(tile.v.dtype),
            lse[:, a:b].unflatten(2, (HK, -1)).unsqueeze(-1),
            delta[:, a:b].unflatten(2, (HK, -1)).unsqueeze(-1),
            scale,
        )
        empty = (lse[:, a:b] == -torch.inf).unsqueeze(-1)
        dq[:, a:b] += product(dlogits, tile.k).flatten(2, 3).masked_fill_(empty, 0)


class _BlockTable(NamedTuple):
    """The blocks of all sequences and batch entries, numbered one after the other.

    Attributes:
        of_query: `[B, T]`, the first block of the query's sequence.
        first_row, last_row: `[blocks]`, rows of the flattened `[B * S]` key axis.
        first_key: `[blocks]`, the block's first token inside its sequence.
        of_key: `[B, S]`, the block each token lies in.
    """

    of_query: Tensor
    first_row: Tensor
    last_row: Tensor
    first_key: Tensor
    of_key: Tensor


def _dense_blocks(B: int, S: int, size: int, rows: QueryRows) -> _BlockTable:
    device = rows.position.device
    per_batch = -(-S // size)
    block = torch.arange(B * per_batch, device=device)
    batch = block // per_batch
    first_key = block % per_batch * size
    index = torch.arange(B, device=device)[:, None] * per_batch
    return _BlockTable(
        index.expand(rows.position.shape),
        batch * S + first_key,
        batch * S + (first_key + size - 1).clamp(max=S - 1),
        first_key,
        index + torch.arange(S, device=device) // size,
    )


def _packed_blocks(
    layout: Layout, config: NSAConfig, S: int, size: int, rows: QueryRows
) -> _BlockTable:
    assert layout.cu_seqlens_k is not None
    own = sequences(layout, config, rows.position.shape[1])
    device, count = rows.position.device, own.length.shape[0]
    stops = ((own.length + size - 1) // size).cumsum(0)
    starts = torch.nn.functional.pad(stops[:-1], (1, 0))
    block = torch.arange(S // size + count, device=device)
    sequence = torch.searchsorted(stops, block, right=True).clamp(max=count - 1)
    first_key = (block - starts[sequence]) * size
    last_key = torch.minimum(first_key + size, own.length[sequence]) - 1
    first_row = own.first_key[sequence]
    key_sequence = Layout.sequence_of(layout.cu_seqlens_k, S).clamp(max=count - 1)
    local = torch.arange(S, device=device) - own.first_key[key_sequence]
    return _BlockTable(
        starts[own.of_query][None],
        (first_row + first_key).clamp(0, S - 1),
        (first_row + last_key).clamp(0, S - 1),
        first_key,
        (starts[key_sequence] + local // size).clamp(0, block.shape[0] - 1)[None],
    )


class _Segments(NamedTuple):
    """Runs of at most `length` sorted pairs that share a block and a head.

    Attributes:
        block_head: `[segments]`, `block * HK + head`; equal ones are neighbours.
        first, stop: `[segments]`, the run of sorted pairs; empty for segments not in use.
        order: `[pairs]`, from sorted pair to pair `((b * T + t) * HK + head) * n + slot`.
        of_block: `[blocks * HK]`, each block's first segment.
        used: `[blocks * HK]`, whether any query chose the block.
        length: pairs in a full segment.
        longest: segments that one block may have.
    """

    block_head: Tensor
    first: Tensor
    stop: Tensor
    order: Tensor
    of_block: Tensor
    used: Tensor
    length: int
    longest: int


def _cut_into_segments(pairs: Tensor, num_blocks: int, num_queries: int) -> _Segments:
    """Sort the pairs by block; `pairs` is int64 `[...]` with values in `0 .. num_blocks`."""
    flat = pairs.flatten().to(torch.int32)
    ordered, order = flat.sort(stable=True)
    table = torch.arange(num_blocks, dtype=torch.int32, device=flat.device)
    start = torch.searchsorted(ordered, table)
    stop = torch.searchsorted(ordered, table, right=True)
    length = min(_LONGEST_SEGMENT, max(16, flat.numel() // max(1, num_blocks)))
    cumulative = ((stop - start + length - 1) // length).cumsum(0)
    count = flat.numel() // length + min(num_blocks, flat.numel())
    segment = torch.arange(count, device=flat.device)
    block_head = torch.searchsorted(cumulative, segment, right=True)
    in_use = block_head < num_blocks
    block_head = block_head.clamp(max=num_blocks - 1)
    of_block = torch.nn.functional.pad(cumulative[:-1], (1, 0))
    first = start[block_head] + (segment - of_block[block_head]) * length
    last = torch.minimum(first + length, stop[block_head])
    return _Segments(
        torch.where(in_use, block_head, num_blocks),
        first,
        torch.where(in_use, last, first),
        order,
        of_block.clamp(max=count - 1),
        stop > start,
        length,
        -(-num_queries // length),
    )


def _key_gradients(
    grad_out: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    listed: BlockList,
    config: NSAConfig,
    layout: Layout,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`dk, dv`: one partial sum per segment, then an ordered sum over a block's segments."""
    B, T, H, Dk = q.shape
    S, HK, Dv = k.shape[1], k.shape[2], v.shape[3]
    G, size, n, device = H // HK, listed.block_size, listed.blocks.shape[-1], q.device
    if layout.packed:
        table = _packed_blocks(layout, config, S, size, listed.rows)
    else:
        table = _dense_blocks(B, S, size, listed.rows)
    num_blocks = table.first_row.shape[0] * HK
    head = torch.arange(HK, device=device)[:, None]
    block = table.of_query[:, :, None, None] + listed.blocks
    pairs = (block * HK + head).masked_fill_(listed.blocks < 0, num_blocks)
    cut = _cut_into_segments(pairs.clamp_(0, num_blocks), num_blocks, T)

    dtype = operand_dtype(q)
    q_rows, grad_rows = q.reshape(-1, G, Dk), grad_out.reshape(-1, G, Dv)
    k_rows, v_rows = k.reshape(-1, Dk), v.reshape(-1, Dv)
    lse_rows, delta_rows = lse.reshape(-1, G, 1), delta.reshape(-1, G, 1)
    position, lowest = listed.rows.position.flatten(), listed.lowest.flatten()
    count = cut.first.shape[0]
    dk = torch.zeros(count, size, Dk, dtype=lse.dtype, device=device)
    dv = torch.zeros(count, size, Dv, dtype=lse.dtype, device=device)
    offset = torch.arange(size, device=device)
    slot = torch.arange(cut.length, device=device)
    per_segment = cut.length * G * (2 * size + Dk + Dv)
    for a, b in chunks(count, per_segment, element_budget(device)):
        # Slots past a segment's end repeat its last pair, which is of the same sequence.
        sorted_pair = torch.minimum(cut.first[a:b, None] + slot, cut.stop[a:b, None] - 1)
        row = cut.order[sorted_pair.clamp(0, cut.order.shape[0] - 1)] // n  # [s, R]
        valid = cut.first[a:b, None] + slot < cut.stop[a:b, None]
        block_head = cut.block_head[a:b].clamp(max=num_blocks - 1)
        block = block_head // HK
        last = table.last_row[block, None]
        key_row = torch.minimum(table.first_row[block, None] + offset, last)
        key_row = key_row * HK + block_head[:, None] % HK  # [s, m]
        key = table.first_key[block, None, None] + offset  # [s, 1, m]
        query = row // HK
        visible = (key <= position[query][..., None]) & (key >= lowest[query][..., None])
        visible &= valid[..., None]
        visible &= (table.first_row[block, None] + offset <= last)[:, None]
        visible = visible[:, :, None].expand(-1, -1, G, -1).flatten(1, 2)  # [s, R * G, m]
        flat_row, flat_key = row.flatten(), key_row.flatten()
        shape = (b - a, cut.length * G, -1)
        q_part = q_rows.index_select(0, flat_row).to(dtype).view(shape)
        grad_part = grad_rows.index_select(0, flat_row).to(dtype).view(shape)
        k_part = k_rows.index_select(0, flat_key).to(dtype).view(b - a, size, Dk)
        v_part = v_rows.index_select(0, flat_key).to(dtype).view(b - a, size, Dv)
        p, dlogits = probabilities(
            product(q_part, k_part.transpose(1, 2)).mul_(scale),
            visible,
            v_part,
            grad_part,
            lse_rows.index_select(0, flat_row).view(shape),
            delta_rows.index_select(0, flat_row).view(shape),
            scale,
        )
        dk[a:b] = product(dlogits.transpose(1, 2), q_part)
        dv[a:b] = product(p.transpose(1, 2), grad_part)
    block_head = table.of_key[..., None] * HK + torch.arange(HK, device=device)  # [B, S, HK]
    key_offset = torch.arange(B * S, device=device).view(B, S)
    key_offset = (key_offset - table.first_row[table.of_key]).clamp(0, size - 1)[..., None]
    source = cut.of_block[block_head] * size + key_offset
    unused = ~cut.used[block_head][..., None]
    dk, dv = (
        _sum_runs(part, cut.block_head, cut.longest)
        .flatten(0, 1)
        .index_select(0, source.flatten())
        .view(*source.shape, -1)
        .masked_fill_(unused, 0)
        for part in (dk, dv)
    )
    return dk.to(k.dtype), dv.to(v.dtype)


def _sum_runs(parts: Tensor, owner: Tensor, longest: int) -> Tensor:
    """Add up neighbouring `parts` of the same owner; the first of each run then holds the sum."""
    step = 1
    while step < min(longest, parts.shape[0]):
        same = (owner[step:] == owner[:-step])[:, None, None]
        added = torch.where(same, parts[step:], 0)
        parts = torch.cat([parts[:-step] + added, parts[-step:]])
        step *= 2
    return parts
