"""Native Sparse Attention as the paper defines it: the one oracle that every backend is held to.

Written to be read beside arXiv 2502.11089 (equation numbers below), with dense masks and plain
autograd: memory is quadratic in the length. The functions have the signatures of `nsa_port`'s own
(`backend` is accepted and ignored). Feed float64 tensors for the exact answer; with other dtypes
this is the plain PyTorch run of the same maths, softmax in float32, that tolerances derive from.

Symbols: B batch, T queries, S keys, H query heads, HK key/value heads, G = H / HK, l block_size,
d block_stride, m select_block_size, n num_selected, w window_size, p a query's position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from nsa_port.kernels.geometry import NSAConfig

__all__ = [
    "combine",
    "compressed_attention",
    "mean_compress",
    "nsa_attention",
    "select_blocks",
    "selected_attention",
    "window_attention",
]


def mean_compress(
    k: Tensor,
    cfg: NSAConfig,
    *,
    cu_seqlens: Tensor | None = None,
    num_blocks: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Eq. 7 with phi = mean: block i is the average of tokens `[i d, i d + l)`. `[B, C, HK, D]`."""
    if cu_seqlens is not None:
        parts = [mean_compress(k[:, a:b], cfg) for a, b in _spans(cu_seqlens)]
        blocks = torch.cat([k[:, :0], *parts], dim=1)
    elif k.shape[1] < cfg.block_size:
        blocks = k[:, :0]
    else:
        blocks = k.unfold(1, cfg.block_size, cfg.block_stride).mean(-1)
    missing = 0 if num_blocks is None else num_blocks - blocks.shape[1]
    return torch.nn.functional.pad(blocks, (0, 0, 0, 0, 0, missing)) if missing else blocks


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    cfg: NSAConfig,
    *,
    num_keys: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    positions: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Eq. 8: softmax over the compressed blocks that are complete at the query. `out, lse`."""
    if cu_seqlens is not None:
        out, lse = _per_sequence(
            lambda S, pos, q, k, v: compressed_attention(
                q, k, v, cfg, num_keys=S, scale=scale, positions=pos
            ),
            (q,),
            (k_cmp, v_cmp),
            cfg.num_compressed,
            cu_seqlens,
            cu_seqlens_k,
            positions,
        )
        return out, lse
    S = q.shape[1] if num_keys is None else num_keys
    visible = _visible_compressed(_positions(q, S, positions), k_cmp.shape[1], cfg)
    return _attend(q, k_cmp, v_cmp, visible[:, :, None], scale)


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    cfg: NSAConfig,
    *,
    num_keys: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    positions: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Eq. 9 to 11: the blocks each query and KV head attends to. int32 `[B, T, HK, n]`."""
    if cu_seqlens is not None:
        return _per_sequence(
            lambda S, pos, q, lse, k: (
                select_blocks(q, k, lse, cfg, num_keys=S, scale=scale, positions=pos),
            ),
            (q, lse),
            (k_cmp,),
            cfg.num_compressed,
            cu_seqlens,
            cu_seqlens_k,
            positions,
        )[0]
    S = q.shape[1] if num_keys is None else num_keys
    scores = block_scores(q, k_cmp, lse, cfg, num_keys=num_keys, scale=scale, positions=positions)
    pos = _positions(q, S, positions)[:, :, None, None]
    block = torch.arange(scores.shape[-1], device=q.device)
    own = pos.div(cfg.select_block_size, rounding_mode="floor")
    candidate = block <= own
    forced = (block < cfg.init_blocks) | (block > own - cfg.local_blocks)
    ranked = scores.masked_fill(forced, torch.inf).masked_fill(~candidate, -torch.inf)
    n = min(cfg.num_selected, scores.shape[-1])
    chosen = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    chosen = chosen.masked_fill(~candidate.expand_as(scores).gather(-1, chosen), scores.shape[-1])
    chosen = chosen.sort(dim=-1).values
    chosen = chosen.masked_fill(chosen == scores.shape[-1], -1)
    return torch.nn.functional.pad(chosen, (0, cfg.num_selected - n), value=-1).to(torch.int32)


def block_scores(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    cfg: NSAConfig,
    *,
    num_keys: int | None = None,
    scale: float | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Eq. 9 and 10, not packed: what each selection block weighs. `[B, T, HK, blocks]`."""
    S = q.shape[1] if num_keys is None else num_keys
    visible = _visible_compressed(_positions(q, S, positions), k_cmp.shape[1], cfg)
    logits = _logits(q, k_cmp, scale)
    p_cmp = torch.exp(logits - lse.to(logits.dtype)[..., None])
    p_cmp = torch.where(visible[:, :, None], p_cmp, 0)
    B, T, H, C = p_cmp.shape
    HK = k_cmp.shape[2]
    shared = p_cmp.view(B, T, HK, H // HK, C).sum(3)
    first, weights = cfg.score_weights()
    per_select = cfg.select_block_size // cfg.block_stride
    scores = shared.new_zeros(*shared.shape[:-1], cfg.num_select_blocks(S))
    for j in range(scores.shape[-1]):
        for i, weight in enumerate(weights, start=j * per_select + first):
            if 0 <= i < C:
                scores[..., j] += weight * shared[..., i]
    return scores


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    cfg: NSAConfig,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    positions: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Eq. 11, 12: one softmax over all tokens of the chosen blocks with key <= p. `out, lse`."""
    if cu_seqlens is not None:
        out, lse = _per_sequence(
            lambda S, pos, q, idx, k, v: selected_attention(
                q, k, v, idx, cfg, scale=scale, positions=pos
            ),
            (q, idx),
            (k, v),
            int,
            cu_seqlens,
            cu_seqlens_k,
            positions,
        )
        return out, lse
    S = k.shape[1]
    pos = _positions(q, S, positions)[:, :, None, None]
    key = torch.arange(S, device=q.device)
    block_of_key = key.div(cfg.select_block_size, rounding_mode="floor")
    chosen = torch.zeros(*idx.shape[:3], S, dtype=torch.bool, device=q.device)
    for slot in range(idx.shape[-1]):
        chosen |= block_of_key == idx[..., slot, None]
    return _attend(q, k, v, chosen & (key <= pos), scale)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cfg: NSAConfig,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    positions: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Section 3.3.3: softmax over the keys with `p - w < key <= p`. `out, lse`."""
    if cu_seqlens is not None:
        out, lse = _per_sequence(
            lambda S, pos, q, k, v: window_attention(q, k, v, cfg, scale=scale, positions=pos),
            (q,),
            (k, v),
            int,
            cu_seqlens,
            cu_seqlens_k,
            positions,
        )
        return out, lse
    pos = _positions(q, k.shape[1], positions)[:, :, None, None]
    key = torch.arange(k.shape[1], device=q.device)
    return _attend(q, k, v, (pos - cfg.window_size < key) & (key <= pos), scale)


def combine(
    o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor, *, backend: str | None = None
) -> Tensor:
    """Eq. 5: `g_cmp o_cmp + g_slc o_slc + g_win o_win`."""
    g_cmp, g_slc, g_win = gates.expand(*o_cmp.shape[:-1], 3).unsqueeze(-1).unbind(-2)
    return (g_cmp * o_cmp + g_slc * o_slc + g_win * o_win).to(o_cmp.dtype)


def nsa_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    cfg: NSAConfig,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    positions: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Eq. 5: three branches, each with its own keys, values and softmax. `[B, T, H, Dv]`."""
    where: dict[str, Any] = {
        "scale": scale,
        "cu_seqlens": cu_seqlens,
        "cu_seqlens_k": cu_seqlens_k,
        "positions": positions,
    }
    S = k_slc.shape[1]
    o_cmp, lse = compressed_attention(q, k_cmp, v_cmp, cfg, num_keys=S, **where)
    with torch.no_grad():  # section 3.3.2: the choice of blocks is not differentiated
        idx = select_blocks(q, k_cmp, lse, cfg, num_keys=S, **where)
    o_slc, _ = selected_attention(q, k_slc, v_slc, idx, cfg, **where)
    o_win, _ = window_attention(q, k_win, v_win, cfg, **where)
    return combine(o_cmp, o_slc, o_win, gates)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of q `[B, T, H, Dk]` where visible `[B, T, HK or 1, N]` allows it."""
    B, T, H, _ = q.shape
    HK = k.shape[2]
    visible = visible.expand(B, T, HK, k.shape[1]).repeat_interleave(H // HK, dim=2)
    sees_any = visible.any(-1, keepdim=True)
    logits = _logits(q, k, scale).masked_fill(~visible, -torch.inf)
    logits = torch.where(sees_any, logits, 0)  # an empty row must not make NaN
    p = torch.where(visible, logits.softmax(-1), 0)
    grouped = p.to(v.dtype).view(B, T, HK, H // HK, k.shape[1])
    out = torch.einsum("bthgs,bshd->bthgd", grouped, v).reshape(B, T, H, v.shape[-1])
    if k.shape[1] == 0:
        return out, logits.new_full((B, T, H), -torch.inf)
    lse = logits.logsumexp(-1).masked_fill(~sees_any[..., 0], -torch.inf)
    return out, lse


def _logits(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """`scale * q . k` of every head, `[B, T, H, N]`, in the dtype of the softmax."""
    B, T, H, Dk = q.shape
    grouped = q.reshape(B, T, k.shape[2], H // k.shape[2], Dk)
    logits = torch.einsum("bthgd,bshd->bthgs", grouped, k).reshape(B, T, H, k.shape[1])
    softmax_dtype = torch.promote_types(q.dtype, torch.float32)
    return logits.to(softmax_dtype) * (Dk**-0.5 if scale is None else scale)


def _visible_compressed(pos: Tensor, num_blocks: int, cfg: NSAConfig) -> Tensor:
    """Whether block i is complete at each query: `i d + l - 1 <= p`. `[B, T, num_blocks]`."""
    last = torch.arange(num_blocks, device=pos.device) * cfg.block_stride + cfg.block_size - 1
    return last <= pos[:, :, None]


def _positions(q: Tensor, S: int, positions: Tensor | None) -> Tensor:
    """Each query's position, `[B, T]`: given, or the last T of S."""
    B, T = q.shape[:2]
    if positions is None:
        positions = torch.arange(S - T, S, device=q.device)
    return positions.expand(B, T)


def _spans(cu_seqlens: Tensor) -> Iterator[tuple[int, int]]:
    bounds = cu_seqlens.tolist()
    return zip(bounds[:-1], bounds[1:], strict=True)


def _per_sequence(
    function: Callable[..., tuple[Tensor, ...]],
    per_query: tuple[Tensor, ...],
    per_key: tuple[Tensor, ...],
    keys_of: Callable[[int], int],
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, ...]:
    """Run `function(S, positions, *per_query, *per_key)` on each packed sequence by itself.

    `keys_of(S)` says how many rows of the `per_key` tensors a sequence of S tokens has.
    """
    results, start = [], 0
    lengths = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    for (a, b), (k_start, k_end) in zip(_spans(cu_seqlens), _spans(lengths), strict=True):
        S = k_end - k_start
        stop = start + keys_of(S)
        queries = [tensor[:, a:b] for tensor in per_query]
        keys = [tensor[:, start:stop] for tensor in per_key]
        own = _positions(queries[0], S, None if positions is None else positions[..., a:b])
        results.append(function(S, own, *queries, *keys))
        start = stop
    return tuple(torch.cat(parts, dim=1) for parts in zip(*results, strict=True))
