"""The sequences of a call as the host sees them: what the block-major form works through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_port.kernels.geometry import Layout, NSAConfig


class Span(NamedTuple):
    """One sequence of one batch entry; rows that see nothing are left out.

    Attributes:
        batch: the batch entry.
        queries: its rows on the query axis: a slice, or int64 indices that order them by position.
        position: int64 `[t]`, ascending.
        positions: the same numbers on the host.
        keys: its rows on the key axis.
        blocks: its rows on the axis of compressed blocks.
    """

    batch: int
    queries: slice | Tensor
    position: Tensor
    positions: Sequence[int]
    keys: slice
    blocks: slice

    def take(self, x: Tensor) -> Tensor:
        """The span's rows of `x [B, T, ...]`: a view where they lie together, else a copy."""
        rows = x[self.batch]
        if isinstance(self.queries, slice):
            return rows[self.queries]
        return rows.index_select(0, self.queries)

    def put(self, x: Tensor, rows: Tensor) -> None:
        """Write back what `take` gave, after it was changed in place."""
        if isinstance(self.queries, Tensor):
            x[self.batch].index_copy_(0, self.queries, rows)


def spans(
    layout: Layout, config: NSAConfig, batch: int, num_queries: int, num_blocks: int
) -> Iterator[Span]:
    """Every span with at least one query. Reads positions and bounds on the host."""
    if not layout.packed:
        for entry in range(batch):
            yield from _span(
                layout,
                entry,
                slice(0, num_queries),
                slice(0, layout.num_keys),
                slice(0, num_blocks),
            )
        return
    assert layout.cu_seqlens is not None and layout.cu_seqlens_k is not None
    queries, keys = layout.cu_seqlens.tolist(), layout.cu_seqlens_k.tolist()
    blocks = layout.compressed_cu_seqlens(config).tolist()
    for entry in range(batch):
        for n in range(len(queries) - 1):
            yield from _span(
                layout, entry, *(slice(x[n], x[n + 1]) for x in (queries, keys, blocks))
            )


def _span(layout: Layout, entry: int, queries: slice, keys: slice, blocks: slice) -> Iterator[Span]:
    num_queries, num_keys = queries.stop - queries.start, keys.stop - keys.start
    if layout.positions is None:
        if num_queries:
            positions = range(num_keys - num_queries, num_keys)
            position = torch.arange(positions.start, positions.stop)
            yield Span(entry, queries, position, positions, keys, blocks)
        return
    given = layout.positions if layout.positions.dim() == 1 else layout.positions[entry]
    position, order = given[queries].long().sort(stable=True)
    padded = int((position < 0).sum())
    position, order = position[padded:], order[padded:]
    if position.numel():
        yield Span(entry, order + queries.start, position, position.tolist(), keys, blocks)
