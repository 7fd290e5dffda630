"""The branches without data-dependent shapes or host synchronisation: what any device can run.

Dense calls know their bounds on the host and slice; packed ones and those with positions mask.
Logits are `[B * HK, c * G, N]` for a chunk of `c` queries, so memory stays linear in T.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nsa_port.kernels.eager import listed
from nsa_port.kernels.eager.products import operand_dtype, product
from nsa_port.kernels.eager.rows import (
    QueryRows,
    accumulation_dtype,
    chunks,
    element_budget,
    empty_results,
    group_rows,
    group_values,
    heads_first,
    heads_last,
    position_limit,
    query_rows,
    ungroup_rows,
    zeros_of,
)
from nsa_port.kernels.eager.selection import block_scores, choose_blocks
from nsa_port.kernels.eager.softmax import attend, attend_backward
from nsa_port.kernels.geometry import Layout, NSAConfig

selected_attention = listed.selected_attention
selected_gradients = listed.selected_gradients


def compressed_attention(
    q: Tensor, k: Tensor, v: Tensor, config: NSAConfig, layout: Layout, scale: float
) -> tuple[Tensor, Tensor]:
    """Eq. 8 over the blocks that are complete at the query. `out, lse`."""
    B, T, H, _ = q.shape
    C, HK = k.shape[1:3]
    out, lse = empty_results(q, v)
    if out.numel() == 0 or C == 0:
        return out, lse
    rows = query_rows(layout, config, B, T, q.device)
    inputs = _Compressed.of(q, k, v, None, layout)
    for a, b in chunks(T, B * H * C, element_budget(q.device)):
        limit = _block_limit(config, layout, T, b, C)
        if limit == 0:
            continue
        visible = _visible_blocks(rows.slice(a, b), config, limit, HK, H // HK)
        logits = inputs.logits(a, b, limit, scale)
        part, part_lse = attend(logits, visible, inputs.v[:, :limit])
        out[:, a:b] = ungroup_rows(part, B, HK, H // HK)
        lse[:, a:b] = ungroup_rows(part_lse, B, HK, H // HK).squeeze(-1)
    return out, lse


def compressed_attention_and_blocks(
    q: Tensor, k: Tensor, v: Tensor, config: NSAConfig, layout: Layout, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 8 to 12. `out, lse, indices`."""
    out, lse = compressed_attention(q, k, v, config, layout, scale)
    return out, lse, select_blocks(q, k, lse, config, layout, scale)


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
    B, T, H, _ = q.shape
    C, HK = k.shape[1:3]
    if q.numel() == 0 or C == 0:
        return k.new_zeros(k.shape), v.new_zeros(v.shape)
    rows = query_rows(layout, config, B, T, q.device)
    inputs = _Compressed.of(q, k, v, grad_out, layout)
    dk, dv = (zeros_of(x, dq.dtype) for x in (inputs.k, inputs.v))
    for a, b in chunks(T, 2 * B * H * C, element_budget(q.device)):
        limit = _block_limit(config, layout, T, b, C)
        if limit == 0:
            continue
        part = attend_backward(
            inputs.logits(a, b, limit, scale),
            _visible_blocks(rows.slice(a, b), config, limit, HK, H // HK),
            inputs.rows(inputs.q, a, b),
            inputs.k[:, :limit],
            inputs.v[:, :limit],
            inputs.rows(inputs.grad_out, a, b),
            group_values(lse[:, a:b], HK),
            group_values(delta[:, a:b], HK),
            scale,
        )
        dq[:, a:b] += ungroup_rows(part[0], B, HK, H // HK)
        dk[:, :limit] += part[1]
        dv[:, :limit] += part[2]
    return heads_last(dk, k), heads_last(dv, v)


def select_blocks(
    q: Tensor, k_cmp: Tensor, lse: Tensor, config: NSAConfig, layout: Layout, scale: float
) -> Tensor:
    """Eq. 9 to 12: the blocks each query and KV head attends to. int32 `[B, T, HK, n]`."""
    B, T, H, _ = q.shape
    C, HK = k_cmp.shape[1:3]
    G = H // HK
    indices = q.new_full((B, T, HK, config.num_selected), -1, dtype=torch.int32)
    if q.shape[0] * T * HK == 0 or layout.num_keys == 0:
        return indices
    rows = query_rows(layout, config, B, T, q.device)
    inputs = _Compressed.of(q, k_cmp, None, None, layout)
    dtype = accumulation_dtype(q.dtype)
    for a, b in chunks(T, B * H * max(C, 1), element_budget(q.device)):
        own = rows.slice(a, b)
        limit = _block_limit(config, layout, T, b, C)
        num_blocks = config.num_select_blocks(position_limit(layout, T, b))
        if limit == 0:
            scores = torch.zeros(B, b - a, HK, num_blocks, dtype=dtype, device=q.device)
        else:
            visible = _visible_blocks(own, config, limit, HK, G)
            logits = inputs.logits(a, b, limit, scale)
            p = logits.sub_(group_values(lse[:, a:b].to(dtype), HK))
            p = p.masked_fill_(~visible, -torch.inf).exp_()
            shared = p.view(B, HK, b - a, G, limit).sum(3).transpose(1, 2)
            if layout.packed:
                shared = _from_own_start(shared, own.first_block)
            scores = block_scores(shared, config, num_blocks)
        indices[:, a:b] = choose_blocks(scores, own.position[:, :, None, None], config)
    return indices


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, config: NSAConfig, layout: Layout, scale: float
) -> tuple[Tensor, Tensor]:
    """Section 3.3.3: the keys with `p - w < key <= p`. `out, lse`."""
    if layout.packed or layout.positions is not None:
        return listed.window_attention(q, k, v, config, layout, scale)
    B, T, H, _ = q.shape
    HK = k.shape[2]
    out, lse = empty_results(q, v)
    dtype = operand_dtype(q)
    before = max(0, layout.num_keys - T - config.window_size + 1)  # keys that no window reaches
    kh, vh = (heads_first(x[:, before:], dtype) for x in (k, v))
    for a, b, low, high in _bands(config, layout, B * H, T, q.device):
        band = slice(low - before, high - before)
        logits = product(group_rows(q[:, a:b], HK, dtype), kh[:, band].transpose(1, 2))
        visible = _visible_band(config, layout, T, a, b, low, high, H // HK, q.device)
        part, part_lse = attend(logits.mul_(scale), visible, vh[:, band])
        out[:, a:b] = ungroup_rows(part, B, HK, H // HK)
        lse[:, a:b] = ungroup_rows(part_lse, B, HK, H // HK).squeeze(-1)
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
    if layout.packed or layout.positions is not None:
        return listed.window_gradients(grad_out, delta, q, k, v, lse, dq, config, layout, scale)
    B, T, H, _ = q.shape
    HK, dtype = k.shape[2], operand_dtype(q)
    kh, vh = heads_first(k, dtype), heads_first(v, dtype)
    dk, dv = (zeros_of(x, dq.dtype) for x in (kh, vh))
    for a, b, low, high in _bands(config, layout, 2 * B * H, T, q.device):
        q_rows = group_rows(q[:, a:b], HK, dtype)
        part = attend_backward(
            product(q_rows, kh[:, low:high].transpose(1, 2)).mul_(scale),
            _visible_band(config, layout, T, a, b, low, high, H // HK, q.device),
            q_rows,
            kh[:, low:high],
            vh[:, low:high],
            group_rows(grad_out[:, a:b], HK, dtype),
            group_values(lse[:, a:b], HK),
            group_values(delta[:, a:b], HK),
            scale,
        )
        dq[:, a:b] += ungroup_rows(part[0], B, HK, H // HK)
        dk[:, low:high] += part[1]
        dv[:, low:high] += part[2]
    return heads_last(dk, k), heads_last(dv, v)


class _Compressed(NamedTuple):
    """The compressed branch's inputs; when packed, with NaN and inf kept out of the products.

    A packed GEMM runs over all sequences and masks afterwards, but `0 * NaN` is NaN. So tokens
    that are not finite are replaced by 0 and their NaN is added to the logits instead, where the
    mask keeps it inside its own sequence.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    kv_heads: int
    query_poison: Tensor | None
    key_poison: Tensor | None

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor | None, grad_out: Tensor | None, layout: Layout
    ) -> _Compressed:
        dtype, kv_heads = operand_dtype(q), k.shape[2]
        kh = heads_first(k, dtype)
        vh = kh if v is None else heads_first(v, dtype)
        grad_out = q if grad_out is None else grad_out
        if not layout.packed:
            return cls(q, kh, vh, grad_out, kv_heads, None, None)
        dtype = accumulation_dtype(q.dtype)
        query_poison = _poison(q, dtype) + _poison(grad_out, dtype)
        key_poison = _poison(kh, dtype) + _poison(vh, dtype)
        q, kh, vh, grad_out = (
            tensor.masked_fill(~tensor.isfinite(), 0) for tensor in (q, kh, vh, grad_out)
        )
        return cls(q, kh, vh, grad_out, kv_heads, query_poison, key_poison)

    def rows(self, x: Tensor, a: int, b: int) -> Tensor:
        return group_rows(x[:, a:b], self.kv_heads, self.k.dtype)

    def logits(self, a: int, b: int, limit: int, scale: float) -> Tensor:
        """`scale * q . k` of queries a to b and the first blocks. `[B * HK, c * G, limit]`."""
        logits = product(self.rows(self.q, a, b), self.k[:, :limit].transpose(1, 2))
        logits.mul_(scale)
        if self.query_poison is not None and self.key_poison is not None:
            logits += group_values(self.query_poison[:, a:b], self.kv_heads)
            logits += self.key_poison[:, None, :limit]
        return logits


def _poison(x: Tensor, dtype: torch.dtype) -> Tensor:
    """NaN where a token holds anything that is not finite, else 0. `[...]` without channels."""
    finite = x.isfinite().all(-1)
    return torch.zeros(finite.shape, dtype=dtype, device=x.device).masked_fill_(~finite, torch.nan)


def _block_limit(config: NSAConfig, layout: Layout, T: int, stop: int, C: int) -> int:
    """How many compressed blocks queries before `stop` may see, as far as the host knows."""
    if layout.packed:
        return C
    return min(C, config.num_compressed(position_limit(layout, T, stop)))


def _visible_blocks(
    rows: QueryRows, config: NSAConfig, limit: int, kv_heads: int, groups: int
) -> Tensor:
    """bool `[B * HK, c * G, limit]`: complete blocks of the query's own sequence."""
    count = (rows.position + 1 - config.block_size).div(
        config.block_stride, rounding_mode="floor"
    ) + 1
    block = torch.arange(limit, device=count.device) - rows.first_block[..., None]
    visible = (block >= 0) & (block < count[..., None])
    B, c, _ = visible.shape
    return (
        visible[:, None, :, None]
        .expand(B, kv_heads, c, groups, limit)
        .reshape(B * kv_heads, c * groups, limit)
    )


def _from_own_start(shared: Tensor, first_block: Tensor) -> Tensor:
    """Shift `[B, c, HK, C]` so that each row starts at its own sequence's first block."""
    C = shared.shape[-1]
    source = first_block[..., None, None] + torch.arange(C, device=shared.device)
    inside = source < C
    gathered = shared.gather(-1, source.clamp(max=C - 1).expand(shared.shape))
    return gathered.masked_fill_(~inside, 0)


def _bands(
    config: NSAConfig, layout: Layout, rows: int, T: int, device: torch.device
) -> list[tuple[int, int, int, int]]:
    """Chunks of queries `a, b` with the keys `low, high` that their windows cover together."""
    w, offset = config.window_size, layout.num_keys - T
    step = max(16, min(512, w))
    step = max(1, min(step, element_budget(device) // max(1, rows * (step + w))))
    bands = []
    for a in range(0, T if rows else 0, step):
        b = min(a + step, T)
        bands.append((a, b, max(0, offset + a - w + 1), offset + b))
    return bands


def _visible_band(
    config: NSAConfig,
    layout: Layout,
    T: int,
    a: int,
    b: int,
    low: int,
    high: int,
    groups: int,
    device: torch.device,
) -> Tensor:
    """bool `[c * G, high - low]`: `p - w < key <= p`."""
    position = torch.arange(a, b, device=device) + (layout.num_keys - T)
    distance = position[:, None] - torch.arange(low, high, device=device)
    visible = (distance >= 0) & (distance < config.window_size)
    return visible[:, None].expand(b - a, groups, high - low).flatten(0, 1)
