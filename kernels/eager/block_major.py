"""The branches for a CPU: tiles that fit its cache, bounded by what the host knows."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_port.kernels.eager import pairs, ranged
from nsa_port.kernels.eager.ranged import LOG2_E, Heads, Range, Tile
from nsa_port.kernels.eager.rows import empty_results
from nsa_port.kernels.eager.selection import block_scores, choose_blocks
from nsa_port.kernels.eager.spans import Span, spans
from nsa_port.kernels.geometry import Layout, NSAConfig

selected_attention = pairs.selected_attention
selected_gradients = pairs.selected_gradients

_QUERIES_PER_CHOICE = 256


def compressed_attention(
    q: Tensor, k: Tensor, v: Tensor, config: NSAConfig, layout: Layout, scale: float
) -> tuple[Tensor, Tensor]:
    """Eq. 8. `out, lse`."""
    out, lse = empty_results(q, v)
    for span in spans(layout, config, q.shape[0], q.shape[1], k.shape[1]):
        _compressed_span(span, q, k, v, out, lse, None, config, scale)
    return out, lse


def compressed_attention_and_blocks(
    q: Tensor, k: Tensor, v: Tensor, config: NSAConfig, layout: Layout, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 8 to 12; the probabilities serve both. `out, lse, indices`."""
    out, lse = empty_results(q, v)
    indices = _no_blocks(q, k, config)
    for span in spans(layout, config, q.shape[0], q.shape[1], k.shape[1]):
        _compressed_span(span, q, k, v, out, lse, indices, config, scale)
    return out, lse, indices


def select_blocks(
    q: Tensor, k_cmp: Tensor, lse: Tensor, config: NSAConfig, layout: Layout, scale: float
) -> Tensor:
    """Eq. 9 to 12. int32 `[B, T, HK, n]`."""
    indices = _no_blocks(q, k_cmp, config)
    for span in spans(layout, config, q.shape[0], q.shape[1], k_cmp.shape[1]):
        keys = k_cmp[span.batch, span.blocks]
        heads = Heads.of(span, q, keys, _complete_blocks(config, keys.shape[0]), scale * LOG2_E)
        own_lse = span.take(lse).unsqueeze(-1) * LOG2_E
        chosen = span.take(indices)
        choice = _Choice(chosen, span, config, heads.k.dtype)
        for tile in heads.tiles():
            x = heads.logits(tile, heads.rows(heads.q, tile), heads.rows(own_lse, tile))
            choice.add(tile, x.exp2_())
        choice.finish()
        span.put(indices, chosen)
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
    dk, dv = k.new_zeros(k.shape), v.new_zeros(v.shape)
    for span in spans(layout, config, q.shape[0], q.shape[1], k.shape[1]):
        visible = _complete_blocks(config, span.blocks.stop - span.blocks.start)
        inputs = (grad_out, delta, q, k, v, lse, dq, dk, dv)
        _ranged_gradients(span, span.blocks, visible, *inputs, scale)
    return dk, dv


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, config: NSAConfig, layout: Layout, scale: float
) -> tuple[Tensor, Tensor]:
    """Section 3.3.3. `out, lse`."""
    out, lse = empty_results(q, v)
    for span in spans(layout, config, q.shape[0], q.shape[1], 0):
        own_out, own_lse = span.take(out), span.take(lse)
        keys, values = k[span.batch, span.keys], v[span.batch, span.keys]
        heads = Heads.of(span, q, keys, _window(config), scale)
        ranged.forward(heads, values, own_out, own_lse)
        span.put(out, own_out)
        span.put(lse, own_lse)
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
    for span in spans(layout, config, q.shape[0], q.shape[1], 0):
        inputs = (grad_out, delta, q, k, v, lse, dq, dk, dv)
        _ranged_gradients(span, span.keys, _window(config), *inputs, scale)
    return dk, dv


def _window(config: NSAConfig) -> Range:
    return Range(lambda p: p - config.window_size + 1, lambda p: p + 1)


def _complete_blocks(config: NSAConfig, num_blocks: int) -> Range:
    """Blocks `i` with `i d + l - 1 <= p`, of those that there are."""

    def stop(p):  # type: ignore[no-untyped-def]
        count = (p + 1 - config.block_size) // config.block_stride + 1
        return min(count, num_blocks) if isinstance(count, int) else count

    return Range(lambda p: p * 0, stop)


def _no_blocks(q: Tensor, k: Tensor, config: NSAConfig) -> Tensor:
    shape = (*q.shape[:2], k.shape[2], config.num_selected)
    return q.new_full(shape, -1, dtype=torch.int32)


def _compressed_span(
    span: Span,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor | None,
    config: NSAConfig,
    scale: float,
) -> None:
    own_out, own_lse = span.take(out), span.take(lse)
    keys, values = k[span.batch, span.blocks], v[span.batch, span.blocks]
    heads = Heads.of(span, q, keys, _complete_blocks(config, keys.shape[0]), scale)
    if indices is None:
        ranged.forward(heads, values, own_out, own_lse)
    else:
        chosen = span.take(indices)
        choice = _Choice(chosen, span, config, heads.k.dtype)
        ranged.forward(heads, values, own_out, own_lse, choice.add)
        choice.finish()
        span.put(indices, chosen)
    span.put(out, own_out)
    span.put(lse, own_lse)


def _ranged_gradients(
    span: Span,
    rows: slice,
    visible: Range,
    grad_out: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    scale: float,
) -> None:
    heads = Heads.of(span, q, k[span.batch, rows], visible, scale * LOG2_E)
    own = [span.take(x) for x in (grad_out, delta, lse)]
    own_dq = span.take(dq)
    own_dk = torch.zeros_like(heads.k)
    own_dv = heads.k.new_zeros(*heads.k.shape[:2], v.shape[-1])
    ranged.backward(heads, v[span.batch, rows], *own, own_dq, own_dk, own_dv, scale)
    span.put(dq, own_dq)
    dk[span.batch, rows] = own_dk.transpose(0, 1).to(dk.dtype)
    dv[span.batch, rows] = own_dv.transpose(0, 1).to(dv.dtype)


class _Choice:
    """Collects the tiles' probabilities, summed over the group, and chooses blocks from them.

    Queries before the first complete block come in no tile; their candidates all score 0.
    """

    def __init__(self, indices: Tensor, span: Span, config: NSAConfig, dtype: torch.dtype) -> None:
        self._indices, self._span, self._config, self._dtype = indices, span, config, dtype
        self._done = 0
        self._tiles: list[tuple[Tile, Tensor]] = []

    def add(self, tile: Tile, p: Tensor) -> None:
        """`p [HK, c * G, N]` of the next tile."""
        shared = p.unflatten(1, (tile.b - tile.a, -1)).sum(2).transpose(0, 1)
        self._tiles.append((tile, shared))
        if tile.b - self._done >= _QUERIES_PER_CHOICE:
            self._choose(tile.b)

    def finish(self) -> None:
        """Choose for the rows that are left."""
        if self._done < len(self._span.positions):
            self._choose(len(self._span.positions))

    def _choose(self, stop: int) -> None:
        rows, widest = slice(self._done, stop), self._tiles[-1][0].high if self._tiles else 0
        shared = torch.zeros(stop - self._done, self._indices.shape[1], widest, dtype=self._dtype)
        for tile, part in self._tiles:
            shared[tile.a - self._done : tile.b - self._done, :, : tile.high] = part
        num_blocks = self._config.num_select_blocks(self._span.positions[stop - 1] + 1)
        scores = block_scores(shared, self._config, num_blocks)
        position = self._span.position[rows, None, None]
        self._indices[rows] = choose_blocks(scores, position, self._config)
        self._tiles.clear()
        self._done = stop
