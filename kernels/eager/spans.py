"""The sequences of a call as the host sees them: what the block-major form works through."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_port.kernels.eager import workers
from nsa_port.kernels.geometry import Layout, NSAConfig


class Span(NamedTuple):
    """One sequence of one batch entry, and one KV head of it; rows that see nothing are left out.

    Attributes:
        batch: the batch entry.
        head: the KV head.
        columns: the query heads of its group.
        queries: its rows on the query axis: a slice, or int64 indices that order them by position.
        position: int64 `[t]`, ascending.
        positions: the same numbers on the host.
        keys: its rows on the key axis.
        blocks: its rows on the axis of compressed blocks.
    """

    batch: int
    head: int
    columns: slice
    queries: slice | Tensor
    position: Tensor
    positions: Sequence[int]
    keys: slice
    blocks: slice

    def take(self, x: Tensor) -> Tensor:
        """Its part `[t, G, ...]` of `x [B, T, H, ...]`: a view where it can be, else a copy."""
        return self._rows(x[self.batch, :, self.columns])

    def take_shared(self, x: Tensor) -> Tensor:
        """Its part `[t, ...]` of `x [B, T, HK, ...]`, which the group shares."""
        return self._rows(x[self.batch, :, self.head])

    def put(self, x: Tensor, rows: Tensor) -> None:
        """Write back what `take` gave, after it was changed in place."""
        if isinstance(self.queries, Tensor):
            x[self.batch, :, self.columns].index_copy_(0, self.queries, rows)

    def put_shared(self, x: Tensor, rows: Tensor) -> None:
        """Write back what `take_shared` gave, after it was changed in place."""
        if isinstance(self.queries, Tensor):
            x[self.batch, :, self.head].index_copy_(0, self.queries, rows)

    def _rows(self, x: Tensor) -> Tensor:
        if isinstance(self.queries, slice):
            return x[self.queries]
        return x.index_select(0, self.queries)


def for_each_span(
    function: Callable[[Span], None],
    layout: Layout,
    config: NSAConfig,
    q: Tensor,
    num_blocks: int,
    kv_heads: int,
    keys_per_query: int,
) -> None:
    """Call `function` for every sequence with queries and every KV head, in threads.

    `keys_per_query` only says how much work there is.
    """
    B, T, H, D = q.shape
    tasks = [
        partial(function, span)
        for span in spans(layout, config, B, T, num_blocks, kv_heads, H // kv_heads)
    ]
    workers.run(tasks, B * T * H * D * keys_per_query)


def spans(
    layout: Layout,
    config: NSAConfig,
    batch: int,
    num_queries: int,
    num_blocks: int,
    kv_heads: int,
    groups: int,
) -> Iterator[Span]:
    """Every span with at least one query. Reads positions and bounds on the host."""
    if layout.packed:
        assert layout.cu_seqlens is not None and layout.cu_seqlens_k is not None
        compressed = layout.compressed_cu_seqlens(config)
        bounds = [x.tolist() for x in (layout.cu_seqlens, layout.cu_seqlens_k, compressed)]
    else:
        bounds = [[0, num_queries], [0, layout.num_keys], [0, num_blocks]]
    for entry in range(batch):
        for n in range(len(bounds[0]) - 1):
            queries, keys, blocks = (slice(x[n], x[n + 1]) for x in bounds)
            order, position, positions = _by_position(layout, entry, queries, keys)
            for head in range(kv_heads if len(positions) else 0):
                columns = slice(head * groups, (head + 1) * groups)
                yield Span(entry, head, columns, order, position, positions, keys, blocks)


def _by_position(
    layout: Layout, entry: int, queries: slice, keys: slice
) -> tuple[slice | Tensor, Tensor, Sequence[int]]:
    num_keys = keys.stop - keys.start
    if layout.positions is None:
        positions = range(num_keys - (queries.stop - queries.start), num_keys)
        return queries, torch.arange(positions.start, positions.stop), positions
    given = layout.positions if layout.positions.dim() == 1 else layout.positions[entry]
    position, order = given[queries].long().sort(stable=True)
    padded = int((position < 0).sum())
    position, order = position[padded:], order[padded:] + queries.start
    return order, position, position.tolist()
