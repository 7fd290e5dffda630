"""Attention of position-ordered queries over a range of keys each, tile by tile, for a CPU.

Both the compressed branch (the complete blocks) and the window let query `p` see one range of keys
whose ends never go back as `p` grows. A tile of neighbouring queries therefore sees one slice of
keys, with a triangle hidden at either end. Logits, probabilities and their gradients of a tile are
`[HK, c * G, N]`; exponentials of the backward pass are in base 2, which PyTorch computes faster.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from nsa_port.kernels.eager.spans import Span

LOG2_E = math.log2(math.e)
_TILE = 1 << 20  # logits of a tile: 4 MB in float32
_MOST_ROWS = 128

Number = TypeVar("Number", int, Tensor)


class Range(NamedTuple):
    """The keys a query sees: `first(p) <= key < stop(p)`; `first` may be negative."""

    first: Callable
    stop: Callable


class Tile(NamedTuple):
    """Queries `a .. b` of a span with keys `low .. high`.

    Keys before `hidden_from` are visible to every query as far as the right end goes, keys from
    `hidden_to` on as far as the left end goes.
    """

    a: int
    b: int
    low: int
    high: int
    hidden_to: int
    hidden_from: int


def tiles(span: Span, visible: Range, heads: int) -> Iterator[Tile]:
    """Cover all queries that see a key; what a tile holds stays near the size of the cache."""
    positions = span.positions
    a = bisect_left(positions, 1, key=visible.stop)
    while a < len(positions):
        low = max(0, visible.first(positions[a]))
        width = visible.stop(positions[a]) - low
        rows = max(8, min(_MOST_ROWS, _TILE // (heads * width)))
        b = bisect_left(positions, positions[a] + rows, a, min(a + rows, len(positions)))
        last = positions[b - 1]
        yield Tile(a, b, low, visible.stop(last), visible.first(last), visible.stop(positions[a]))
        a = b


class Heads(NamedTuple):
    """A span's queries beside its keys, `[t, H, D]` and `[HK, N, D]`."""

    q: Tensor
    k: Tensor
    span: Span
    visible: Range

    @classmethod
    def of(cls, span: Span, q: Tensor, k: Tensor, visible: Range, factor: float) -> Heads:
        """`factor` is multiplied into the keys; the softmax's dtype follows from them."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        keys = (k.transpose(0, 1).to(dtype) * factor).contiguous()
        return cls(span.take(q), keys, span, visible)

    def tiles(self) -> Iterator[Tile]:
        return tiles(self.span, self.visible, self.q.shape[1])

    def rows(self, x: Tensor, tile: Tile) -> Tensor:
        """`[t, H, D]` to the tile's `[HK, c * G, D]`."""
        HK, D = self.k.shape[0], x.shape[-1]
        grouped = x[tile.a : tile.b].unflatten(1, (HK, -1)).transpose(0, 1)
        return grouped.to(self.k.dtype).reshape(HK, -1, D)

    def unrow(self, x: Tensor, tile: Tile) -> Tensor:
        """The inverse of `rows`, as `[c, HK, G, D]` without a copy."""
        return x.unflatten(1, (tile.b - tile.a, -1)).transpose(0, 1)

    def logits(self, tile: Tile, q_rows: Tensor, minus: Tensor | None = None) -> Tensor:
        """`q . k - minus`, -inf where the query does not see the key. `[HK, c * G, N]`."""
        keys = self.k[:, tile.low : tile.high].transpose(1, 2)
        x = (
            torch.bmm(q_rows, keys)
            if minus is None
            else torch.baddbmm(minus, q_rows, keys, beta=-1)
        )
        self._hide(x, tile)
        return x

    def _hide(self, x: Tensor, tile: Tile) -> None:
        position = self.span.position[tile.a : tile.b, None]
        grouped = x.unflatten(1, (tile.b - tile.a, -1))
        if tile.hidden_from < tile.high:
            key = torch.arange(tile.hidden_from, tile.high)
            hidden = key >= self.visible.stop(position)
            grouped[..., tile.hidden_from - tile.low :].masked_fill_(hidden[:, None], -torch.inf)
        if tile.hidden_to > tile.low:
            key = torch.arange(tile.low, tile.hidden_to)
            hidden = key < self.visible.first(position)
            grouped[..., : tile.hidden_to - tile.low].masked_fill_(hidden[:, None], -torch.inf)


def forward(
    heads: Heads,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    use: Callable[[Tile, Tensor], None] | None = None,
) -> None:
    """Fill `out [t, H, Dv]` and `lse [t, H]`, and show every tile's probabilities to `use`."""
    values = v.transpose(0, 1).to(heads.k.dtype).contiguous()
    HK = values.shape[0]
    for tile in heads.tiles():
        x = heads.logits(tile, heads.rows(heads.q, tile))
        p = torch.softmax(x, -1)
        # The largest probability is exp(highest - lse).
        log_sum = x.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log_()
        part = torch.bmm(p, values[:, tile.low : tile.high])
        rows = slice(tile.a, tile.b)
        out[rows].unflatten(1, (HK, -1)).copy_(heads.unrow(part, tile))
        lse[rows].unflatten(1, (HK, -1)).copy_(heads.unrow(log_sum, tile).squeeze(-1))
        if use is not None:
            use(tile, p)


def backward(
    heads: Heads,
    v: Tensor,
    grad_out: Tensor,
    delta: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    scale: float,
) -> None:
    """Add to `dq [t, H, Dk]` and to `dk, dv [HK, N, D]`; `heads` holds keys times `scale / ln 2`."""
    values = v.transpose(0, 1).to(heads.k.dtype).contiguous()
    for tile in heads.tiles():
        keys = slice(tile.low, tile.high)
        q_rows, grad_rows = heads.rows(heads.q, tile), heads.rows(grad_out, tile)
        p = heads.logits(tile, q_rows, heads.rows(lse.unsqueeze(-1), tile) * LOG2_E).exp2_()
        dv[:, keys].baddbmm_(p.transpose(1, 2), grad_rows)
        minus = heads.rows(delta.unsqueeze(-1), tile)
        dp = torch.baddbmm(minus, grad_rows, values[:, keys].transpose(1, 2), beta=-1).mul_(p)
        dk[:, keys].baddbmm_(dp.transpose(1, 2), q_rows, alpha=scale)
        part = heads.unrow(torch.bmm(dp, heads.k[:, keys]), tile)
        dq[tile.a : tile.b].unflatten(1, (heads.k.shape[0], -1)).add_(part, alpha=1 / LOG2_E)
