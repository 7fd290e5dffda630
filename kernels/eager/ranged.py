"""Attention of position-ordered queries over a range of keys each, tile by tile, for a CPU.

Both the compressed branch (the complete blocks) and the window let query `p` see one range of keys
whose ends never go back as `p` grows. A tile of neighbouring queries therefore sees one slice of
keys, with a triangle hidden at either end. A tile's logits, probabilities and their gradient are
`[c * G, N]`; the backward pass takes exponentials in base 2, which PyTorch computes faster.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_port.kernels.eager.rows import accumulation_dtype
from nsa_port.kernels.eager.spans import Span

LOG2_E = math.log2(math.e)
_TILE = 1 << 18  # logits of a tile: 1 MB in float32
_MOST_QUERIES = 128


class Range(NamedTuple):
    """The keys a query sees: `first(p) <= key < stop(p)`, for a number or a tensor `p`.

    `first` may be negative and `stop` of a tensor may be past the last key.
    """

    first: Callable
    stop: Callable


class Tile(NamedTuple):
    """Queries `a .. b` of a span with keys `low .. high`.

    Every query sees the keys from `all_see` to `some_see_not`, if there are any; some do not see
    those before, some do not see those after.
    """

    a: int
    b: int
    low: int
    high: int
    all_see: int
    some_see_not: int


class Head(NamedTuple):
    """A span's queries beside its keys.

    Attributes:
        span: where they stand.
        visible: which keys each query sees.
        q: `[t, G, Dk]`, in the dtype of the call.
        k: `[N, Dk]` times a factor, in the dtype of the softmax.
        v: `[N, Dv]`.
    """

    span: Span
    visible: Range
    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def of(
        cls,
        span: Span,
        rows: slice,
        visible: Range,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        factor: float,
    ) -> Head:
        """`rows` are the span's keys in `k` and `v`; without a `v` only logits are wanted."""
        dtype = accumulation_dtype(q.dtype)
        keys, values = (
            None if x is None else x[span.batch, rows, span.head].to(dtype) for x in (k, v)
        )
        assert keys is not None
        keys = (keys * factor).contiguous()
        values = keys if values is None else values.contiguous()
        return cls(span, visible, span.take(q), keys, values)

    def tiles(self) -> Iterator[Tile]:
        """Cover all queries that see a key, in tiles that fit a cache."""
        positions, (first, stop) = self.span.positions, self.visible
        a = bisect_left(positions, 1, key=stop)
        while a < len(positions):
            low = max(0, first(positions[a]))
            width = stop(positions[a]) - low
            most = max(8, min(_MOST_QUERIES, _TILE // (self.q.shape[1] * width)))
            b = bisect_left(positions, positions[a] + most, a, min(a + most, len(positions)))
            last = positions[b - 1]
            yield Tile(a, b, low, stop(last), first(last), stop(positions[a]))
            a = b

    def rows(self, x: Tensor, tile: Tile) -> Tensor:
        """`x [t, G, D]` to the tile's `[c * G, D]`, in the dtype of the softmax."""
        return x[tile.a : tile.b].to(self.k.dtype).reshape(-1, x.shape[2])

    def column(self, x: Tensor, tile: Tile) -> Tensor:
        """`x [t, G]` to the tile's `[c * G, 1]`."""
        return x[tile.a : tile.b].reshape(-1, 1)

    def logits(self, tile: Tile, q_rows: Tensor, minus: Tensor | None = None) -> Tensor:
        """`q . k - minus`, -inf where the query does not see the key. `[c * G, N]`."""
        keys = self.k[tile.low : tile.high].t()
        x = q_rows @ keys if minus is None else torch.addmm(minus, q_rows, keys, beta=-1)
        position = self.span.position[tile.a : tile.b, None]
        grouped = x.view(tile.b - tile.a, -1, x.shape[1])
        if tile.some_see_not < tile.high:
            key = torch.arange(tile.some_see_not, tile.high)
            hidden = key >= self.visible.stop(position)
            grouped[..., tile.some_see_not - tile.low :].masked_fill_(hidden[:, None], -torch.inf)
        if tile.all_see > tile.low:
            key = torch.arange(tile.low, tile.all_see)
            hidden = key < self.visible.first(position)
            grouped[..., : tile.all_see - tile.low].masked_fill_(hidden[:, None], -torch.inf)
        return x

    def forward(
        self, out: Tensor, lse: Tensor, use: Callable[[Tile, Tensor], None] | None = None
    ) -> None:
        """Fill `out [t, G, Dv]` and `lse [t, G]`, and show every tile's probabilities to `use`."""
        for tile in self.tiles():
            x = self.logits(tile, self.rows(self.q, tile))
            p = torch.softmax(x, -1)
            # The largest probability is exp(highest - lse).
            log_sum = x.amax(-1).sub_(p.amax(-1).log_())
            part = p @ self.v[tile.low : tile.high]
            rows = slice(tile.a, tile.b)
            out[rows] = part.view(out[rows].shape)
            lse[rows] = log_sum.view(lse[rows].shape)
            if use is not None:
                use(tile, p)

    def backward(
        self, grad_out: Tensor, delta: Tensor, lse: Tensor, dq: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Add to `dq [t, G, Dk]`, return `dk, dv [N, D]`; `k` must be times `scale / ln 2`."""
        dk, dv = torch.zeros_like(self.k), torch.zeros_like(self.v)
        for tile in self.tiles():
            keys = slice(tile.low, tile.high)
            q_rows, grad_rows = self.rows(self.q, tile), self.rows(grad_out, tile)
            p = self.logits(tile, q_rows, self.column(lse, tile) * LOG2_E).exp2_()
            dv[keys].addmm_(p.t(), grad_rows)
            minus = self.column(delta, tile)
            dp = torch.addmm(minus, grad_rows, self.v[keys].t(), beta=-1).mul_(p)
            dk[keys].addmm_(dp.t(), q_rows, alpha=scale)
            rows = dq[tile.a : tile.b]
            rows.add_((dp @ self.k[keys]).view(rows.shape), alpha=1 / LOG2_E)
        return dk, dv
