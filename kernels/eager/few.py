"""`nsa_attention` for a few queries on a CPU, as in decoding: one query after the other.

The host knows each query's position, so what it sees of the compressed keys and of the window is a
slice, and only its chosen blocks are gathered. What counts here is how few operations it takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_port.kernels.eager import workers
from nsa_port.kernels.eager.rows import accumulation_dtype, empty_results
from nsa_port.kernels.eager.selection import block_scores
from nsa_port.kernels.eager.spans import Span, spans
from nsa_port.kernels.geometry import Layout, NSAConfig


def branches(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    config: NSAConfig,
    layout: Layout,
    scale: float,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The three branches' `out`s and `lse`s in order, and the chosen blocks."""
    B, T, H, _ = q.shape
    HK, n = k_slc.shape[2], config.num_selected
    results = [empty_results(q, v) for v in (v_cmp, v_slc, v_win)]
    indices = q.new_full((B, T, HK, n), -1, dtype=torch.int32)
    scaled = (q.to(accumulation_dtype(q.dtype)) * scale).unflatten(2, (HK, H // HK))
    w = config.window_size
    keys = n * config.select_block_size + w + k_cmp.shape[1]
    with workers.sized_for(q.numel() * keys):
        for span in spans(layout, config, B, T, k_cmp.shape[1], 1, H):
            own_cmp, own_slc, own_win = (
                (k[span.batch, rows], v[span.batch, rows])
                for k, v, rows in (
                    (k_cmp, v_cmp, span.blocks),
                    (k_slc, v_slc, span.keys),
                    (k_win, v_win, span.keys),
                )
            )
            for row, p in zip(_rows(span), span.positions, strict=True):
                at = (span.batch, row)
                into = [(out[at], lse[at]) for out, lse in results]
                visible = min(config.num_compressed(p + 1), own_cmp[0].shape[0])
                probabilities = _attend_slice(scaled[at], *own_cmp, 0, visible, *into[0])
                chosen = _choose(probabilities, p, HK, config)
                indices[at][:, : chosen.shape[1]] = chosen
                _attend_blocks(scaled[at], *own_slc, chosen, p, config, *into[1])
                _attend_slice(scaled[at], *own_win, max(0, p + 1 - w), p + 1, *into[2])
    outs, lses = ([result[part] for result in results] for part in range(2))
    return outs, lses, indices


def _rows(span: Span) -> list[int] | range:
    queries = span.queries
    if isinstance(queries, slice):
        return range(queries.start, queries.stop)
    rows: list[int] = queries.tolist()
    return rows


def _attend_slice(
    q: Tensor, k: Tensor, v: Tensor, first: int, stop: int, out: Tensor, lse: Tensor
) -> Tensor | None:
    """Fill `out [H, Dv]`, `lse [H]` from keys `first .. stop`; return `p [HK, G, N]`, if any."""
    if stop <= first:
        return None
    keys, values = (x.narrow(0, first, stop - first).to(q.dtype) for x in (k, v))
    return _finish(torch.bmm(q, keys.permute(1, 2, 0)), values.transpose(0, 1), out, lse)


def _finish(x: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    p = torch.softmax(x, -1)
    out.copy_(torch.bmm(p, v).view(out.shape))
    # The largest probability is exp(highest - lse).
    lse.copy_(x.amax(-1).sub_(p.amax(-1).log_()).view(lse.shape))
    return p


def _choose(p: Tensor | None, position: int, kv_heads: int, config: NSAConfig) -> Tensor:
    """int64 `[HK, at most n]`, ascending: the blocks of one query."""
    own = position // config.select_block_size
    if p is None or own < config.num_selected:
        count = min(own + 1, config.num_selected)
        if p is not None or count == own + 1:
            return torch.arange(count).expand(kv_heads, count)
        scores = torch.zeros(kv_heads, own + 1)
    else:
        scores = block_scores(p.sum(1), config, own + 1)
    scores[:, : config.init_blocks] = torch.inf
    scores[:, own + 1 - min(config.local_blocks, own + 1) :] = torch.inf
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[:, : config.num_selected].sort(dim=-1).values


def _attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    position: int,
    config: NSAConfig,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Fill `out [H, Dv]`, `lse [H]` from the chosen blocks' tokens up to the query."""
    HK, m = k.shape[1], config.select_block_size
    token = (chosen[..., None] * m + torch.arange(m)).view(HK, -1)
    source = token.clamp(max=position).mul_(HK).add_(torch.arange(HK)[:, None]).view(-1)
    k_rows, v_rows = (
        x.reshape(-1, x.shape[2]).index_select(0, source).to(q.dtype).view(HK, -1, x.shape[2])
        for x in (k, v)
    )
    x = torch.bmm(q, k_rows.transpose(1, 2))
    if (position + 1) % m:  # the last block chosen may reach past the query
        later = token[:, None, -m:] > position
        x[..., -m:].masked_fill_(later, -torch.inf)
    _finish(x, v_rows, out, lse)
