"""Selected attention for a CPU: one key block at a time, with all the queries that chose it.

Pairs of a query and a block are sorted by block. A block's queries are gathered, meet its keys in
one GEMM, and leave a normalised partial output with its logsumexp (forward) or add to `dq`
(backward; a block holds each query at most once, so nothing collides). `dk` and `dv` of a block
are written by that block alone. Queries are in order of position: those that do not see all of a
block come first among its queries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nsa_port.kernels.eager.listed import distinct_blocks
from nsa_port.kernels.eager.ranged import LOG2_E
from nsa_port.kernels.eager.rows import accumulation_dtype, empty_results
from nsa_port.kernels.eager.spans import Span, for_each_span
from nsa_port.kernels.geometry import Layout, NSAConfig

_PARTIAL = 1 << 25  # elements of partial outputs that a worker holds: 128 MB in float32
_TILE = 1 << 18  # logits of a tile: 1 MB in float32


class Group(NamedTuple):
    """Sorted pairs `start .. stop`, all of one block; the first `masked` do not see all of it."""

    block: int
    start: int
    stop: int
    masked: int


class Pairs(NamedTuple):
    """The (query, block) pairs of one head and a chunk of queries, sorted by block.

    Attributes:
        query: int64 `[pairs]`, rows of the chunk.
        slot: int64 `[c, n]`, one more than where each query's pairs went; 0 where it has none.
        groups: how the sorted pairs split into blocks.
    """

    query: Tensor
    slot: Tensor
    groups: list[Group]


def sort_pairs(
    blocks: Tensor, position: Tensor, num_blocks: int, block_size: int, most: int
) -> Pairs:
    """Sort `blocks [c, n]` (-1 for none) of queries at `position [c]`, ascending.

    `most` is how many pairs a group may have.
    """
    n = blocks.shape[1]
    flat = blocks.masked_fill(blocks < 0, num_blocks).flatten()
    order = flat.sort(stable=True).indices
    cut = position[:, None] < blocks * block_size + (block_size - 1)
    masked = torch.bincount(flat[cut.flatten()], minlength=num_blocks + 1).tolist()
    counts = torch.bincount(flat, minlength=num_blocks + 1)
    stops = [0, *counts.cumsum(0).tolist()]
    groups = []
    for block in range(num_blocks):
        first, stop = stops[block], stops[block + 1]
        for start in range(first, stop, most):
            hidden = min(max(first + masked[block] - start, 0), most)
            groups.append(Group(block, start, min(start + most, stop), hidden))
    order = order[: stops[num_blocks]]
    slot = torch.zeros_like(flat).index_copy_(0, order, torch.arange(1, order.shape[0] + 1))
    return Pairs(order.div(n, rounding_mode="floor"), slot.view(-1, n), groups)


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    config: NSAConfig,
    layout: Layout,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Eq. 11, 12. `out, lse`."""
    out, lse = empty_results(q, v)

    def attend(span: Span) -> None:
        head = _Head.of(span, q, k, v, indices, config, scale)
        own_out, own_lse = span.take(out), span.take(lse)
        t, G, Dv = own_out.shape
        step = min(t, max(1, _PARTIAL // (indices.shape[3] * G * Dv)))
        part = head.v.new_empty(indices.shape[3] * step + 1, G, Dv)
        for a in range(0, t, step):
            rows = slice(a, a + step)
            head.forward(rows, part, own_out[rows], own_lse[rows])
        span.put(out, own_out)
        span.put(lse, own_lse)

    if indices.shape[3]:
        for_each_span(attend, layout, config, q, 0, k.shape[2], _keys_per_query(indices, config))
    return out, lse


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
    """Add to `dq`, return `dk, dv`."""
    dk, dv = k.new_zeros(k.shape), v.new_zeros(v.shape)

    def add(span: Span) -> None:
        head = _Head.of(span, q, k, v, indices, config, scale * LOG2_E)
        own_dq = span.take(dq)
        own = (span.take(grad_out), span.take(delta), span.take(lse))
        own_dk, own_dv = head.backward(*own, own_dq, scale)
        span.put(dq, own_dq)
        dk[span.batch, span.keys, span.head] = own_dk.to(dk.dtype)
        dv[span.batch, span.keys, span.head] = own_dv.to(dv.dtype)

    if indices.shape[3]:
        for_each_span(add, layout, config, q, 0, k.shape[2], _keys_per_query(indices, config))
    return dk, dv


def _keys_per_query(indices: Tensor, config: NSAConfig) -> int:
    return indices.shape[3] * config.select_block_size


class _Head(NamedTuple):
    """One span: `q [t, G, Dk]`, `k [s, Dk]` times a factor, `v [s, Dv]`, `blocks [t, n]`."""

    span: Span
    q: Tensor
    k: Tensor
    v: Tensor
    blocks: Tensor
    block_size: int

    @classmethod
    def of(
        cls,
        span: Span,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        indices: Tensor,
        config: NSAConfig,
        factor: float,
    ) -> _Head:
        dtype, size = accumulation_dtype(q.dtype), config.select_block_size
        keys, values = (x[span.batch, span.keys, span.head].to(dtype) for x in (k, v))
        chosen = span.take_shared(indices)[:, None]
        blocks = distinct_blocks(chosen, span.position, size)[:, 0]
        keys = (keys * factor).contiguous()
        return cls(span, span.take(q), keys, values.contiguous(), blocks, size)

    def sort(self, rows: slice) -> Pairs:
        num_blocks = -(-self.k.shape[0] // self.block_size)
        most = max(1, _TILE // (self.block_size * self.q.shape[1]))
        position = self.span.position[rows]
        return sort_pairs(self.blocks[rows], position, num_blocks, self.block_size, most)

    def gather(self, x: Tensor, query: Tensor) -> Tensor:
        """Rows `[R * G, D]` of `x [t, G, D]`, in the dtype of the softmax."""
        return x.flatten(1).index_select(0, query).to(self.k.dtype).view(-1, x.shape[2])

    def logits(self, group: Group, query: Tensor, q_rows: Tensor, minus: Tensor | None) -> Tensor:
        """`q . k - minus` of a group's queries, -inf where the key is past one. `[R * G, m]`."""
        low, G = group.block * self.block_size, self.q.shape[1]
        keys = self.k[low : low + self.block_size].t()
        x = q_rows @ keys if minus is None else torch.addmm(minus, q_rows, keys, beta=-1)
        if group.masked:
            position = self.span.position.index_select(0, query[: group.masked])
            hidden = torch.arange(low, low + x.shape[1]) > position[:, None]
            x[: group.masked * G].view(-1, G, x.shape[1]).masked_fill_(hidden[:, None], -torch.inf)
        return x

    def forward(self, rows: slice, part: Tensor, out: Tensor, lse: Tensor) -> None:
        """Fill `out [c, G, Dv]` and `lse [c, G]` of the queries in `rows`.

        `part [at least 1 + c * n, G, Dv]` is room for the pairs' partial outputs.
        """
        c, G = lse.shape
        pairs = self.sort(rows)
        n = pairs.slot.shape[1]
        part[0] = 0  # what a query without a pair in some slot adds
        part_lse = self.v.new_full((pairs.query.shape[0] + 1, G), -torch.inf)
        for group in pairs.groups:
            query = pairs.query[group.start : group.stop] + rows.start
            x = self.logits(group, query, self.gather(self.q, query), None)
            p = torch.softmax(x, -1)
            # The largest probability is exp(highest - lse).
            log_sum = x.amax(-1).sub_(p.amax(-1).log_())
            slots = slice(group.start + 1, group.stop + 1)
            part_lse[slots] = log_sum.view(-1, G)
            low = group.block * self.block_size
            torch.mm(p, self.v[low : low + self.block_size], out=part[slots].flatten(0, 1))
        gathered = part_lse.index_select(0, pairs.slot.flatten()).view(c, n, G)
        total = gathered.logsumexp(1)
        weight = (gathered - total.masked_fill(total == -torch.inf, 0)[:, None]).exp_()
        source = pairs.slot[:, None] * G + torch.arange(G)[:, None]
        merged = torch.nn.functional.embedding_bag(
            source.view(c * G, n),
            part.flatten(0, 1),
            mode="sum",
            per_sample_weights=weight.transpose(1, 2).reshape(c * G, n),
        )
        out.copy_(merged.view(out.shape))
        lse.copy_(total)

    def backward(
        self, grad_out: Tensor, delta: Tensor, lse: Tensor, dq: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Add to `dq [t, G, Dk]`, return `dk [s, Dk], dv [s, Dv]`; `k` is times `scale / ln 2`."""
        t, size = self.q.shape[0], self.block_size
        pairs = self.sort(slice(0, t))
        sorted_lse = (lse * LOG2_E).index_select(0, pairs.query)
        sorted_delta = delta.index_select(0, pairs.query)
        total = torch.zeros(t, dq[0].numel(), dtype=dq.dtype)
        dk, dv = torch.zeros_like(self.k), torch.zeros_like(self.v)
        for group in pairs.groups:
            chosen = slice(group.start, group.stop)
            keys = slice(group.block * size, (group.block + 1) * size)
            query = pairs.query[chosen]
            q_rows, grad_rows = self.gather(self.q, query), self.gather(grad_out, query)
            p = self.logits(group, query, q_rows, sorted_lse[chosen].view(-1, 1)).exp2_()
            dv[keys].addmm_(p.t(), grad_rows)
            minus = sorted_delta[chosen].view(-1, 1)
            dp = torch.addmm(minus, grad_rows, self.v[keys].t(), beta=-1).mul_(p)
            dk[keys].addmm_(dp.t(), q_rows, alpha=scale)
            total.index_add_(0, query, (dp @ self.k[keys]).view(-1, total.shape[1]))
        dq.add_(total.view(dq.shape), alpha=1 / LOG2_E)
        return dk, dv
