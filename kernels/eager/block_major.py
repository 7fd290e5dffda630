"""The branches for a CPU: tiles that fit its cache, bounded by what the host knows."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_port.kernels.eager import pairs
from nsa_port.kernels.eager.ranged import LOG2_E, Head, Range, Tile
from nsa_port.kernels.eager.rows import empty_results
from nsa_port.kernels.eager.selection import block_scores, choose_blocks
from nsa_port.kernels.eager.spans import Span, for_each_span
from nsa_port.kernels.geometry import Layout, NSAConfig

selected_attention = pairs.selected_attention
selected_gradients = pairs.selected_gradients

_QUERIES_PER_CHOICE = 256


def compressed_attention(
    q: Tensor, k: Tensor, v: Tensor, config: NSAConfig, layout: Layout, scale: float
) -> tuple[Tensor, Tensor]:
    """Eq. 8. `out, lse`."""
    out, lse = empty_results(q, v)
    _compressed(q, k, v, out, lse, None, config, layout, scale)
    return out, lse


def compressed_attention_and_blocks(
    q: Tensor, k: Tensor, v: Tensor, config: NSAConfig, layout: Layout, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 8 to 12; the probabilities serve both. `out, lse, indices`."""
    out, lse = empty_results(q, v)
    indices = _no_blocks(q, k, config)
    _compressed(q, k, v, out, lse, indices, config, layout, scale)
    return out, lse, indices


def select_blocks(
    q: Tensor, k_cmp: Tensor, lse: Tensor, config: NSAConfig, layout: Layout, scale: float
) -> Tensor:
    """Eq. 9 to 12. int32 `[B, T, HK, n]`."""
    C, HK = k_cmp.shape[1:3]
    indices = _no_blocks(q, k_cmp, config)

    def choose(span: Span) -> None:
        visible = _complete_blocks(config, span)
        head = Head.of(span, span.blocks, visible, q, k_cmp, None, scale * LOG2_E)
        own_lse, chosen = span.take(lse), span.take_shared(indices)
        choice = _Choice(chosen, span, config)
        for tile in head.tiles():
            minus = head.column(own_lse, tile) * LOG2_E
            choice.add(tile, head.logits(tile, head.rows(head.q, tile), minus).exp2_())
        choice.finish()
        span.put_shared(indices, chosen)

    for_each_span(choose, layout, config, q, C, HK, C)
    return indices


def compressed_gradients(
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
    """Add to `dq`, return `dk, dv`."""
    C, HK = k.shape[1:3]
    dk, dv = k.new_zeros(k.shape), v.new_zeros(v.shape)

    def add(span: Span) -> None:
        visible = _complete_blocks(config, span)
        head = Head.of(span, span.blocks, visible, q, k, v, scale * LOG2_E)
        _add_gradients(head, span.blocks, grad_out, delta, lse, dq, dk, dv, scale)

    for_each_span(add, layout, config, q, C, HK, C)
    return dk, dv


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, config: NSAConfig, layout: Layout, scale: float
) -> tuple[Tensor, Tensor]:
    """Section 3.3.3. `out, lse`."""
    out, lse = empty_results(q, v)

    def attend(span: Span) -> None:
        own_out, own_lse = span.take(out), span.take(lse)
        Head.of(span, span.keys, _window(config), q, k, v, scale).forward(own_out, own_lse)
        span.put(out, own_out)
        span.put(lse, own_lse)

    for_each_span(attend, layout, config, q, 0, k.shape[2], config.window_size)
    return out, lse


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
    """Add to `dq`, return `dk, dv`."""
    dk, dv = k.new_zeros(k.shape), v.new_zeros(v.shape)

    def add(span: Span) -> None:
        head = Head.of(span, span.keys, _window(config), q, k, v, scale * LOG2_E)
        _add_gradients(head, span.keys, grad_out, delta, lse, dq, dk, dv, scale)

    for_each_span(add, layout, config, q, 0, k.shape[2], config.window_size)
    return dk, dv


def _window(config: NSAConfig) -> Range:
    return Range(lambda p: p - config.window_size + 1, lambda p: p + 1)


def _complete_blocks(config: NSAConfig, span: Span) -> Range:
    """Blocks `i` with `i d + l - 1 <= p`, of those that there are."""
    num_blocks = span.blocks.stop - span.blocks.start

    def stop(p: int | Tensor) -> int | Tensor:
        count = (p + 1 - config.block_size) // config.block_stride + 1
        return min(count, num_blocks) if isinstance(count, int) else count

    return Range(lambda p: 0, stop)


def _no_blocks(q: Tensor, k: Tensor, config: NSAConfig) -> Tensor:
    shape = (*q.shape[:2], k.shape[2], config.num_selected)
    return q.new_full(shape, -1, dtype=torch.int32)


def _compressed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor | None,
    config: NSAConfig,
    layout: Layout,
    scale: float,
) -> None:
    C, HK = k.shape[1:3]

    def attend(span: Span) -> None:
        own_out, own_lse = span.take(out), span.take(lse)
        head = Head.of(span, span.blocks, _complete_blocks(config, span), q, k, v, scale)
        if indices is None:
            head.forward(own_out, own_lse)
        else:
            chosen = span.take_shared(indices)
            choice = _Choice(chosen, span, config)
            head.forward(own_out, own_lse, choice.add)
            choice.finish()
            span.put_shared(indices, chosen)
        span.put(out, own_out)
        span.put(lse, own_lse)

    for_each_span(attend, layout, config, q, C, HK, C)


def _add_gradients(
    head: Head,
    rows: slice,
    grad_out: Tensor,
    delta: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    scale: float,
) -> None:
    span = head.span
    own_dq = span.take(dq)
    own = (span.take(grad_out), span.take(delta), span.take(lse))
    own_dk, own_dv = head.backward(*own, own_dq, scale)
    span.put(dq, own_dq)
    dk[span.batch, rows, span.head] = own_dk.to(dk.dtype)
    dv[span.batch, rows, span.head] = own_dv.to(dv.dtype)


class _Choice:
    """Collects the tiles' probabilities, summed over the group, and chooses blocks from them.

    Queries before the first complete block come in no tile; their candidates all score 0.
    """

    def __init__(self, indices: Tensor, span: Span, config: NSAConfig) -> None:
        self._indices, self._span, self._config = indices, span, config
        self._done = 0
        self._tiles: list[tuple[Tile, Tensor]] = []

    def add(self, tile: Tile, p: Tensor) -> None:
        """`p [c * G, N]` of the next tile."""
        shared = p.view(tile.b - tile.a, -1, p.shape[1]).sum(1)
        self._tiles.append((tile, shared))
        if tile.b - self._done >= _QUERIES_PER_CHOICE:
            self._choose(tile.b)

    def finish(self) -> None:
        """Choose for the rows that are left."""
        if self._done < len(self._span.positions):
            self._choose(len(self._span.positions))

    def _choose(self, stop: int) -> None:
        widest = self._tiles[-1][0].high if self._tiles else 0
        dtype = self._tiles[-1][1].dtype if self._tiles else torch.float32
        shared = torch.zeros(stop - self._done, widest, dtype=dtype)
        for tile, part in self._tiles:
            shared[tile.a - self._done : tile.b - self._done, : tile.high] = part
        num_blocks = self._config.num_select_blocks(self._span.positions[stop - 1] + 1)
        scores = block_scores(shared, self._config, num_blocks)
        position = self._span.position[self._done : stop, None]
        self._indices[self._done : stop] = choose_blocks(scores, position, self._config)
        self._tiles.clear()
        self._done = stop
