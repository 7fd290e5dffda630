"""Where every query stands on the key axis, as tensors: no host synchronisation, always in bounds.

Positions are local to a query's sequence; `first_key` and `first_block` carry them over to the
(packed) key axis and to the axis of compressed blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_port.kernels.geometry import Layout, NSAConfig


class QueryRows(NamedTuple):
    """What each query needs to know, int64 `[B, T]` each (expanded where it is the same for all).

    Attributes:
        position: of the query in its sequence; -1 where the row sees nothing.
        first_key: the token on the key axis at which the query's sequence starts.
        first_block: the compressed block at which it starts.
    """

    position: Tensor
    first_key: Tensor
    first_block: Tensor

    def slice(self, start: int, stop: int) -> QueryRows:
        return QueryRows(*(tensor[:, start:stop] for tensor in self))


class Sequences(NamedTuple):
    """The packed sequences' bounds, clamped to the tensors they index; int64 `[N]` each."""

    of_query: Tensor
    query_stop: Tensor
    first_key: Tensor
    length: Tensor
    first_block: Tensor


def sequences(layout: Layout, config: NSAConfig, num_queries: int) -> Sequences:
    """The sequences of a packed layout and, `[T]`, which of them each query belongs to."""
    assert layout.cu_seqlens is not None and layout.cu_seqlens_k is not None
    count = layout.cu_seqlens.shape[0] - 1
    of_query = Layout.sequence_of(layout.cu_seqlens, num_queries).clamp(max=count - 1)
    bounds = layout.cu_seqlens_k.long().clamp(0, layout.num_keys)
    first_block = layout.compressed_cu_seqlens(config)[:-1].long()
    length = (bounds[1:] - bounds[:-1]).clamp(min=0)
    return Sequences(of_query, layout.cu_seqlens[1:].long(), bounds[:-1], length, first_block)


def query_rows(
    layout: Layout, config: NSAConfig, batch: int, num_queries: int, device: torch.device
) -> QueryRows:
    """`QueryRows` of a layout; `T` and the number of sequences must not be 0."""
    shape = (batch, num_queries)
    given = layout.positions
    if layout.packed:
        own = sequences(layout, config, num_queries)
        length = own.length[own.of_query]
        first_key = own.first_key[own.of_query].expand(shape)
        first_block = own.first_block[own.of_query].expand(shape)
        if given is None:
            index = torch.arange(num_queries, device=device)
            position = index - own.query_stop[own.of_query] + length
        else:
            position = given.long()
        position = torch.minimum(position, length - 1).clamp(min=-1)
    else:
        first_key = first_block = torch.zeros((), dtype=torch.long, device=device).expand(shape)
        if given is None:
            start = layout.num_keys - num_queries
            position = torch.arange(start, layout.num_keys, device=device)
        else:
            position = given.long().clamp(-1, layout.num_keys - 1)
    return QueryRows(position.expand(shape), first_key, first_block)


def position_limit(layout: Layout, num_queries: int, stop: int) -> int:
    """One more than the highest position the host can rule in for queries before `stop`."""
    if layout.packed or layout.positions is not None:
        return layout.num_keys
    return layout.num_keys - num_queries + stop


def chunks(total: int, elements_per_row: int, budget: int) -> Iterator[tuple[int, int]]:
    """Ranges that cover `total` rows, each of at most `budget` elements and at least one row."""
    step = max(1, budget // max(1, elements_per_row))
    for start in range(0, total, step):
        yield start, min(start + step, total)


def element_budget(device: torch.device) -> int:
    """How many logits to hold at once: they should stay in a CPU's cache, or fill a GPU."""
    return 1 << 20 if device.type == "cpu" else 1 << 27


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`out, lse` of rows that see nothing: 0 and -inf."""
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    return out, q.new_full(q.shape[:3], -torch.inf, dtype=accumulation_dtype(q.dtype))


def delta_of(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, dtype: torch.dtype) -> Tensor:
    """`sum(dO * O) - dlse [B, T, H]`: what the softmax's backward subtracts from `dO . v`."""
    delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1)
    return delta if grad_lse is None else delta - grad_lse.to(dtype)


def heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`[B, N, HK, D]` to `[B * HK, N, D]` in `dtype`; a view where that is possible."""
    return x.transpose(1, 2).to(dtype).flatten(0, 1)


def heads_last(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `heads_first`: contiguous, with the shape and dtype of `like`."""
    B, N, HK, D = like.shape
    return x.view(B, HK, N, D).transpose(1, 2).to(like.dtype).contiguous()


def zeros_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous zeros of the shape of `x`, whatever its strides."""
    return x.new_zeros(x.shape, dtype=dtype)


def group_rows(x: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """`[B, c, H, D]` to `[B * HK, c * G, D]`: the rows that meet one head's keys."""
    B, c, H, D = x.shape
    grouped = x.unflatten(2, (kv_heads, H // kv_heads)).transpose(1, 2).to(dtype)
    return grouped.reshape(B * kv_heads, c * (H // kv_heads), D)


def group_values(x: Tensor, kv_heads: int) -> Tensor:
    """`[B, c, H]` to `[B * HK, c * G, 1]`, in the order of `group_rows`."""
    return group_rows(x.unsqueeze(-1), kv_heads, x.dtype)


def ungroup_rows(x: Tensor, batch: int, kv_heads: int, groups: int) -> Tensor:
    """The inverse of `group_rows`: a `[B, c, H, D]` tensor (a copy)."""
    rows, D = x.shape[1] // groups, x.shape[-1]
    grouped = x.view(batch, kv_heads, rows, groups, D).transpose(1, 2)
    return grouped.reshape(batch, rows, kv_heads * groups, D)
