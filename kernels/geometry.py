"""The arithmetic of blocks and positions that every operator shares.

`NSAConfig` says how tokens form blocks, `Layout` where the queries stand among the keys.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

import torch
from torch import Tensor

SCORE_MAPS = ("overlap", "literal")


@dataclass(frozen=True, slots=True)
class NSAConfig:
    """The block geometry of Native Sparse Attention; checks itself and cannot change.

    The defaults are the paper's setting (arXiv 2502.11089, section 4.1).

    Args:
        block_size: tokens in a compression block, `l`; a multiple of `block_stride`.
        block_stride: tokens between the starts of two compression blocks, `d`.
        select_block_size: tokens in a selection block, `m`; a multiple of `block_stride`, at
            least `block_size`.
        num_selected: blocks chosen per query and KV head, `n`, the forced ones included.
        init_blocks: how many of the first blocks are always chosen.
        local_blocks: how many blocks up to and including the query's own are always chosen.
        window_size: keys the window sees, the query's own among them, `w`.
        score_map: how compressed probabilities become block scores (Eq. 9). `"overlap"` counts
            the overlap of the two blocks; `"literal"` is the equation read with 0-based indices.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is out of range, or the sizes do not fit together.
    """

    block_size: int = 32
    block_stride: int = 16
    select_block_size: int = 64
    num_selected: int = 16
    init_blocks: int = 1
    local_blocks: int = 2
    window_size: int = 512
    score_map: str = "overlap"

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name in ("block_size", "select_block_size"):
            if getattr(self, name) % self.block_stride:
                raise ValueError(
                    f"block_stride must divide {name}, got block_stride={self.block_stride} "
                    f"and {name}={getattr(self, name)}"
                )
        if self.block_size > self.select_block_size:
            raise ValueError(
                f"block_size must not exceed select_block_size, got {self.block_size} "
                f"> {self.select_block_size}"
            )
        if self.num_selected < self.init_blocks + self.local_blocks:
            raise ValueError(
                f"num_selected must hold init_blocks + local_blocks, got {self.num_selected} "
                f"< {self.init_blocks} + {self.local_blocks}"
            )
        if self.score_map not in SCORE_MAPS:
            raise ValueError(f"score_map must be one of {SCORE_MAPS}, got {self.score_map!r}")

    def num_compressed(self, num_tokens: int) -> int:
        """Compressed blocks of a sequence of `num_tokens` tokens; trailing tokens are in none."""
        if num_tokens < self.block_size:
            return 0
        return (num_tokens - self.block_size) // self.block_stride + 1

    def num_select_blocks(self, num_tokens: int) -> int:
        """Selection blocks of a sequence of `num_tokens` tokens; the last may be partial."""
        return (num_tokens + self.select_block_size - 1) // self.select_block_size

    def score_weights(self) -> tuple[int, tuple[int, ...]]:
        """`(first, weights)` of Eq. 9.

        Block `j` scores `sum_k weights[k] p_cmp[j m / d + first + k]`; compressed blocks outside
        the sequence count as 0.
        """
        per_select = self.select_block_size // self.block_stride
        per_compressed = self.block_size // self.block_stride
        count = per_select + per_compressed - 1
        weights = tuple(min(k + 1, per_compressed, count - k) for k in range(count))
        first = -(per_compressed - 1) if self.score_map == "overlap" else 1 - count
        return first, weights

    def as_ints(self) -> list[int]:
        """The fields as integers, in order: the form in which operators take a config."""
        *sizes, score_map = (getattr(self, field.name) for field in fields(self))
        return [*sizes, SCORE_MAPS.index(score_map)]

    @classmethod
    def from_ints(cls, values: list[int]) -> NSAConfig:
        """The inverse of `as_ints`."""
        return _config_of(tuple(int(value) for value in values))


@functools.lru_cache(maxsize=256)
def _config_of(values: tuple[int, ...]) -> NSAConfig:
    size, stride, select, n, init, local, w, score_map = values
    return NSAConfig(size, stride, select, n, init, local, w, SCORE_MAPS[score_map])


_LEAST = {
    "block_size": 1,
    "block_stride": 1,
    "select_block_size": 1,
    "num_selected": 1,
    "init_blocks": 0,
    "local_blocks": 0,
    "window_size": 1,
}


@dataclass(frozen=True, slots=True)
class Layout:
    """Where queries and keys stand: one dense batch, or sequences packed one after the other.

    Args:
        num_keys: `S`, the tokens on the key axis; when packed, where an operator has no raw keys,
            at least the tokens of the longest sequence.
        cu_seqlens: int32 `[N + 1]`, the first query of each packed sequence; None when dense.
        cu_seqlens_k: the same for the keys; given whenever `cu_seqlens` is.
        positions: int32 `[T]` or `[B, T]`, each query's position inside its own sequence, where
            they are not the last ones. -1 marks a padded row, which sees nothing.
    """

    num_keys: int
    cu_seqlens: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    positions: Tensor | None = None

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    def query_positions(self, num_queries: int, device: torch.device) -> Tensor:
        """int32 `[1, T]` or `[B, T]`: every query's position inside its own sequence."""
        if self.positions is not None:
            return self.positions if self.positions.dim() == 2 else self.positions[None]
        index = torch.arange(num_queries, dtype=torch.int32, device=device)
        if self.cu_seqlens is None or self.cu_seqlens_k is None:
            return (index + (self.num_keys - num_queries))[None]
        sequence = self.sequence_of(self.cu_seqlens, num_queries)
        end_q, end_k = self.cu_seqlens[1:][sequence], self.cu_seqlens_k[1:][sequence]
        start_k = self.cu_seqlens_k[:-1][sequence]
        return (index - end_q + end_k - start_k).to(torch.int32)[None]

    @staticmethod
    def sequence_of(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
        """int64 `[num_tokens]`: the packed sequence each token belongs to."""
        index = torch.arange(num_tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
        return torch.searchsorted(cu_seqlens[1:].contiguous(), index, right=True)

    def compressed_cu_seqlens(self, config: NSAConfig) -> Tensor:
        """int32 `[N + 1]`: the first compressed block of each packed sequence."""
        assert self.cu_seqlens_k is not None, "only packed layouts have compressed cu_seqlens"
        lengths = self.cu_seqlens_k[1:] - self.cu_seqlens_k[:-1]
        counts = (lengths - config.block_size).div(config.block_stride, rounding_mode="floor") + 1
        counts = counts.clamp(min=0)
        return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
