"""Selected attention for a CPU: one key block at a time, with all the queries that chose it.

Pairs of a query and a block are sorted by block. A block's queries are gathered, meet its keys in
one GEMM, and leave a normalised partial output with its logsumexp (forward) or add to `dq`
(backward; a block holds each query at most once, so nothing collides). `dk` and `dv` of a block
are written by that block alone. Queries are in order of position: those that do not see all of a
block come first among its queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_port.kernels.eager.ranged import LOG2_E
from nsa_port.kernels.eager.rows import accumulation_dtype, empty_results
from nsa_port.kernels.eager.listed import distinct_blocks
from nsa_port.kernels.eager.spans import Span, spans
from nsa_port.kernels.geometry import Layout, NSAConfig

_PARTIAL_ROWS = 1 << 19  # partial outputs held at once: 128 MB at 64 channels in float32
_TILE_ROWS = 1 << 13  # rows of one GEMM


class Group(NamedTuple):
    """Sorted pairs `start .. stop`, all of one block; the first `masked` do not see all of it."""

    block: int
    start: int
    stop: int
    masked: int


class Pairs(NamedTuple):
    """The (query, block) pairs of one head and a chunk of queries, sorted by block.

    Attributes:
        query: `[pairs]`, rows of the chunk.
        slot: `[c, n]`, where each query's pairs went; the number of pairs where it has none.
        groups: how the sorted pairs split into blocks.
    """

    query: Tensor
    slot: Tensor
    groups: list[Group]


def sort_pairs(
    blocks: Tensor, position: Tensor, num_blocks: int, block_size: int, group_size: int
) -> Pairs:
    """Sort `blocks [c, n]` (-1 for none) of queries at `position [c]`, ascending."""
    n = blocks.shape[1]
    flat = blocks.masked_fill(blocks < 0, num_blocks).flatten()
    ordered, order = flat.sort(stable=True)
    counts = torch.bincount(flat, minlength=num_blocks + 1)
    cut = position[:, None] < blocks * block_size + (block_size - 1)
    masked = torch.bincount(flat[cut.flatten()], minlength=num_blocks + 1).tolist()
    stops = counts.cumsum(0).tolist()
    valid = stops[num_blocks - 1]
    slot = torch.empty_like(order).index_copy_(0, order, torch.arange(order.shape[0]))
    step = max(1, _TILE_ROWS // group_size)
    groups = []
    for block in range(num_blocks):
        first, stop = stops[block - 1] if block else 0, stops[block]
        for start in range(first, stop, step):
            hidden = min(max(first + masked[block] - start, 0), step)
            groups.append(Group(block, start, min(start + step, stop), hidden))
    query = order[:valid].div(n, rounding_mode="floor")
    return Pairs(query, slot.clamp_(max=valid).view(-1, n), groups)


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
    HK, n = indices.shape[2:]
    if n == 0:
        return out, lse
    step = max(1, _PARTIAL_ROWS // (n * (q.shape[2] // HK)))
    for head in _heads(q, k, v, indices, config, layout, scale):
        head_out, head_lse = (head.span.take(x) for x in (out, lse))
        columns = head.columns
        for a in range(0, head.q.shape[0], step):
            rows = slice(a, a + step)
            head.forward(rows, head_out[rows, columns], head_lse[rows, columns])
        head.span.put(out, head_out)
        head.span.put(lse, head_lse)
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
    if indices.shape[3] == 0:
        return dk, dv
    for head in _heads(q, k, v, indices, config, layout, scale * LOG2_E):
        own = [head.span.take(x)[:, head.columns] for x in (grad_out, delta, lse)]
        head_dq = head.span.take(dq)
        head_dk, head_dv = head.backward(*own, head_dq[:, head.columns], scale)
        head.span.put(dq, head_dq)
        for whole, part in ((dk, head_dk), (dv, head_dv)):
            whole[head.span.batch, head.span.keys, head.index] = part
    return dk, dv


class _Head(NamedTuple):
    """One span and KV head: `q [t, G, Dk]`, `k [s, Dk]` times a factor, `v [s, Dv]`."""

    span: Span
    index: int
    columns: slice
    q: Tensor
    k: Tensor
    v: Tensor
    blocks: Tensor
    block_size: int

    def sort(self, rows: slice) -> Pairs:
        num_blocks = -(-self.k.shape[0] // self.block_size)
        return sort_pairs(
            self.blocks[rows],
            self.span.position[rows],
            num_blocks,
            self.block_size,
            self.q.shape[1],
        )

    def logits(self, group: Group, query: Tensor, q_rows: Tensor, minus: Tensor | None) -> Tensor:
        """`q . k - minus` of a group's queries, -inf where the key is past one. `[R * G, m]`."""
        low = group.block * self.block_size
        keys = self.k[low : low + self.block_size].t()
        x = q_rows @ keys if minus is None else torch.addmm(minus, q_rows, keys, beta=-1)
        if group.masked:
            position = self.span.position.index_select(0, query[: group.masked])
            hidden = torch.arange(low, low + x.shape[1]) > position[:, None]
            G = self.q.shape[1]
            x[: group.masked * G].unflatten(0, (-1, G)).masked_fill_(hidden[:, None], -torch.inf)
        return x

    def forward(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Fill `out [c, G, Dv]` and `lse [c, G]`."""
        q = self.q[rows].flatten(1)
        c, G = out.shape[:2]
        pairs = self.sort(rows)
        count, n = pairs.query.shape[0], pairs.slot.shape[1]
        part = self.v.new_empty(count * G + 1, self.v.shape[1])
        part[-1] = 0
        part_lse = self.v.new_full((count + 1, G), -torch.inf)
        for group in pairs.groups:
            query = pairs.query[group.start : group.stop]
            q_rows = q.index_select(0, query).view(-1, self.q.shape[2])
            x = self.logits(group, query + rows.start, q_rows, None)
            p = torch.softmax(x, -1)
            # The largest probability is exp(highest - lse).
            log_sum = x.amax(-1).sub_(p.amax(-1).log_())
            part_lse[group.start : group.stop] = log_sum.view(-1, G)
            low = group.block * self.block_size
            target = part[group.start * G : group.stop * G]
            torch.mm(p, self.v[low : low + self.block_size], out=target)
        gathered = part_lse.index_select(0, pairs.slot.flatten()).view(c, n, G)
        total = gathered.logsumexp(1)
        weight = (gathered - total.masked_fill(total == -torch.inf, 0)[:, None]).exp_()
        source = pairs.slot[:, None] * G + torch.arange(G)[:, None]
        out.copy_(
            torch.nn.functional.embedding_bag(
                source.clamp_(max=count * G).view(c * G, n),
                part,
                mode="sum",
                per_sample_weights=weight.transpose(1, 2).reshape(c * G, n),
            ).view(out.shape)
        )
        lse.copy_(total)

    def backward(
        self, grad_out: Tensor, delta: Tensor, lse: Tensor, dq: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Add to `dq [t, G, Dk]`, return `dk [s, Dk], dv [s, Dv]`; `k` is times `scale / ln 2`."""
        t, G, Dk = self.q.shape
        dtype, size = self.k.dtype, self.block_size
        pairs = self.sort(slice(0, t))
        q, grad = self.q.flatten(1), grad_out.to(dtype).reshape(t, -1)
        sorted_lse = (lse * LOG2_E).index_select(0, pairs.query)
        sorted_delta = delta.index_select(0, pairs.query)
        total = torch.zeros_like(q)
        dk, dv = torch.zeros_like(self.k), torch.zeros_like(self.v)
        for group in pairs.groups:
            chosen = slice(group.start, group.stop)
            keys = slice(group.block * size, (group.block + 1) * size)
            query = pairs.query[chosen]
            q_rows = q.index_select(0, query).view(-1, Dk)
            grad_rows = grad.index_select(0, query).view(q_rows.shape[0], -1)
            p = self.logits(group, query, q_rows, sorted_lse[chosen].view(-1, 1)).exp2_()
            dv[keys].addmm_(p.t(), grad_rows)
            minus = sorted_delta[chosen].view(-1, 1)
            dp = torch.addmm(minus, grad_rows, self.v[keys].t(), beta=-1).mul_(p)
            dk[keys].addmm_(dp.t(), q_rows)
            total.index_add_(0, query, (dp @ self.k[keys]).view(-1, G * Dk))
        dq.add_(total.view(dq.shape), alpha=1 / LOG2_E)
        return dk.mul_(scale), dv


def _heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    config: NSAConfig,
    layout: Layout,
    factor: float,
) -> Iterator[_Head]:
    """Every span and KV head that has queries and keys."""
    dtype = accumulation_dtype(q.dtype)
    (B, T, H, _), HK = q.shape, k.shape[2]
    for span in spans(layout, config, B, T, 0):
        own_q, own_indices = span.take(q), span.take(indices)
        blocks = distinct_blocks(own_indices, span.position, config.select_block_size)
        for h in range(HK):
            columns = slice(h * (H // HK), (h + 1) * (H // HK))
            yield _Head(
                span,
                h,
                columns,
                own_q[:, columns].to(dtype).contiguous(),
                (k[span.batch, span.keys, h].to(dtype) * factor).contiguous(),
                v[span.batch, span.keys, h].to(dtype).contiguous(),
                blocks[:, h],
                config.select_block_size,
            )
