"""From compressed probabilities to chosen blocks (Eq. 9 to 12), shared by both forms."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_port.kernels.geometry import NSAConfig

_FORCED = 0x7FFFFFFF  # above every finite float's bits


def block_scores(shared: Tensor, config: NSAConfig, num_blocks: int) -> Tensor:
    """Eq. 9: `[..., C]` probabilities of a sequence's compressed blocks to `[..., num_blocks]`."""
    per_select = config.select_block_size // config.block_stride
    per_compressed = config.block_size // config.block_stride
    first, weights = config.score_weights()
    count = len(weights)
    right = (num_blocks - 1) * per_select + count + first - shared.shape[-1]
    windows = torch.nn.functional.pad(shared, (-first, right)).unfold(-1, count, per_select)
    if per_compressed == 1:
        return windows.sum(-1)
    rank = torch.arange(count, device=shared.device)
    weight = torch.minimum(rank + 1, count - rank).clamp(max=per_compressed)
    return (windows * weight.to(shared.dtype)).sum(-1)


def choose_blocks(scores: Tensor, position: Tensor, config: NSAConfig) -> Tensor:
    """The blocks of highest score among the candidates; int32 `[..., n]`.

    Args:
        scores: `[..., blocks]`, at least as many blocks as any position has candidates.
        position: integers that broadcast to `[..., 1]`; -1 has no candidate.
    """
    num_blocks = scores.shape[-1]
    kept = min(config.num_selected, num_blocks)
    block = torch.arange(num_blocks, device=scores.device)
    own = position.div(config.select_block_size, rounding_mode="floor")
    forced = (block < config.init_blocks) | (block > own - config.local_blocks)
    chosen = _ranking(scores.device.type, scores.dtype)(scores, block, forced, block > own, kept)
    chosen = chosen.masked_fill(chosen > own, num_blocks).to(torch.int32).sort(dim=-1).values
    chosen = chosen.masked_fill(chosen == num_blocks, -1)
    missing = config.num_selected - kept
    return torch.nn.functional.pad(chosen, (0, missing), value=-1) if missing else chosen


def _ranking(device_type: str, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    """Where integers of 64 bits are cheap, `topk` over unique keys is several times faster."""
    unique = device_type in ("cpu", "cuda") and dtype == torch.float32
    return _highest_by_key if unique else _highest_by_sort


def _highest_by_sort(
    scores: Tensor, block: Tensor, forced: Tensor, later: Tensor, kept: int
) -> Tensor:
    ranked = scores.masked_fill(forced, torch.inf).masked_fill_(later, -1)
    return ranked.sort(dim=-1, descending=True, stable=True).indices[..., :kept]


def _highest_by_key(
    scores: Tensor, block: Tensor, forced: Tensor, later: Tensor, kept: int
) -> Tensor:
    """Scores are not negative, so their bits order as they do; the index makes the keys unique."""
    bits = scores.contiguous().view(torch.int32) & _FORCED
    keys = bits.masked_fill_(forced, _FORCED).to(torch.int64).bitwise_left_shift_(31)
    keys += _FORCED - block
    keys.masked_fill_(later, -1)
    top = keys.topk(kept, dim=-1).values
    return torch.where(top < 0, scores.shape[-1], _FORCED - (top & _FORCED))
