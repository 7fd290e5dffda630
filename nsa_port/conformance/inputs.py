"""The calls that cases make: seeded inputs, and the reference over the very same tensors.

Symbols are spec's: B batch, T queries, S keys, H query heads, HK key/value heads, `Dk`, `Dv`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from nsa_port import reference
from nsa_port.backends.interface import WholeForward
from nsa_port.kernels.geometry import Layout, NSAConfig

COMPACT = NSAConfig(
    block_size=16,
    block_stride=8,
    select_block_size=32,
    num_selected=5,
    init_blocks=1,
    local_blocks=2,
    window_size=48,
)
"""The paper's proportions at half its block sizes: short sequences already choose freely."""

Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
NAMES = ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates")


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a call of `nsa_attention`.

    Args:
        S: keys, T by default.
        lengths: packs sequences of (queries, keys); replaces T, S and B.
    """

    T: int = 235
    S: int | None = None
    B: int = 1
    H: int = 4
    HK: int = 2
    Dk: int = 32
    Dv: int = 32
    cfg: NSAConfig = COMPACT
    scale: float | None = None
    lengths: tuple[tuple[int, int], ...] = ()

    def smaller(self) -> Shape:
        """One KV head instead of two, and as few tokens as still leave blocks to choose from."""
        heads = (self.H // 2, 1) if self.HK == 2 else (self.H, self.HK)
        enough = (self.cfg.num_selected + 1) * self.cfg.select_block_size
        T = min(self.T, enough - 5) if self.S is None else self.T
        return replace(self, T=T, H=heads[0], HK=heads[1])


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """The arguments of one call of `nsa_attention`."""

    q: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    k_slc: Tensor
    v_slc: Tensor
    k_win: Tensor
    v_win: Tensor
    gates: Tensor
    cfg: NSAConfig
    scale: float | None = None
    cu_seqlens: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    positions: Tensor | None = None

    @property
    def tensors(self) -> Tensors:
        """The differentiable ones, in the order of `NAMES`."""
        return (
            self.q,
            self.k_cmp,
            self.v_cmp,
            self.k_slc,
            self.v_slc,
            self.k_win,
            self.v_win,
            self.gates,
        )

    @property
    def num_keys(self) -> int:
        return self.k_slc.shape[1]

    @property
    def where(self) -> dict[str, Any]:
        """What every attention function takes besides tensors and config."""
        names = ("scale", "cu_seqlens", "cu_seqlens_k", "positions")
        return {name: getattr(self, name) for name in names}

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """The same call with `function` applied to every differentiable tensor."""
        changed: dict[str, Any] = {name: function(getattr(self, name)) for name in NAMES}
        return replace(self, **changed)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Inputs:
        moved = self.map(lambda tensor: tensor.detach().to(device, dtype))
        integers: dict[str, Any] = {
            field.name: value.to(device)
            for field in fields(self)
            if field.name not in NAMES and isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(moved, **integers)

    def leaves(self) -> Inputs:
        """The same values as leaves that ask for gradients; strides are kept."""
        return self.map(lambda tensor: tensor.detach().requires_grad_())

    def sequences(self) -> list[Inputs]:
        """Each packed sequence as a call of its own; the call itself if it is not packed."""
        if self.cu_seqlens is None:
            return [self]
        cu_k = self.cu_seqlens if self.cu_seqlens_k is None else self.cu_seqlens_k
        layout = Layout(self.num_keys, self.cu_seqlens, cu_k)
        spans = [
            _spans(cu) for cu in (self.cu_seqlens, cu_k, layout.compressed_cu_seqlens(self.cfg))
        ]
        return [
            replace(
                self,
                q=self.q[:, queries],
                gates=self.gates.expand(*self.q.shape[:3], 3)[:, queries],
                k_cmp=self.k_cmp[:, blocks],
                v_cmp=self.v_cmp[:, blocks],
                k_slc=self.k_slc[:, keys],
                v_slc=self.v_slc[:, keys],
                k_win=self.k_win[:, keys],
                v_win=self.v_win[:, keys],
                cu_seqlens=None,
                cu_seqlens_k=None,
                positions=None if self.positions is None else self.positions[..., queries],
            )
            for queries, keys, blocks in zip(*spans, strict=True)
        ]


def make(shape: Shape, dtype: torch.dtype, device: torch.device, *, seed: int = 0) -> Inputs:
    """Standard normal tensors (queries twice as large, so that softmax has something to choose),
    the same values on every device, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = shape.lengths
    T = sum(queries for queries, _ in lengths) if lengths else shape.T
    S = sum(keys for _, keys in lengths) if lengths else (shape.T if shape.S is None else shape.S)
    count = shape.cfg.num_compressed
    C = sum(count(keys) for _, keys in lengths) if lengths else count(S)

    def normal(tokens: int, heads: int, dim: int) -> Tensor:
        values = torch.randn(shape.B, tokens, heads, dim, generator=generator)
        return values.to(device, dtype)

    H, HK, Dk, Dv = shape.H, shape.HK, shape.Dk, shape.Dv
    return Inputs(
        q=normal(T, H, Dk) * 2,
        k_cmp=normal(C, HK, Dk),
        v_cmp=normal(C, HK, Dv),
        k_slc=normal(S, HK, Dk),
        v_slc=normal(S, HK, Dv),
        k_win=normal(S, HK, Dk),
        v_win=normal(S, HK, Dv),
        gates=normal(T, H, 3).sigmoid(),
        cfg=shape.cfg,
        scale=shape.scale,
        cu_seqlens=cumulative([queries for queries, _ in lengths], device) if lengths else None,
        cu_seqlens_k=cumulative([keys for _, keys in lengths], device) if lengths else None,
    )


def cumulative(lengths: Sequence[int], device: torch.device) -> Tensor:
    """int32 `[N + 1]`: where each sequence begins, and the end of the last."""
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return ends.to(device)


def like(tensor: Tensor, seed: int) -> Tensor:
    """Standard normal values with `tensor`'s shape, dtype and device: an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator).to(tensor)


def operator_arguments(inputs: Inputs, backend: str, *, needs_grad: bool = False) -> tuple:
    """What every attention operator of `torch.ops.nsa_port` ends with."""
    scale = inputs.q.shape[-1] ** -0.5 if inputs.scale is None else inputs.scale
    cu_k = inputs.cu_seqlens if inputs.cu_seqlens_k is None else inputs.cu_seqlens_k
    return (
        inputs.cfg.as_ints(),
        inputs.num_keys,
        scale,
        inputs.cu_seqlens,
        cu_k,
        inputs.positions,
        needs_grad,
        backend,
    )


def run(inputs: Inputs, backend: str, *, needs_grad: bool = False) -> WholeForward:
    """The operator under `nsa_port.nsa_attention`, which also tells the branches, the lse and the
    choice of blocks; branches are empty without `needs_grad`."""
    where = operator_arguments(inputs, backend, needs_grad=needs_grad)
    return WholeForward(*torch.ops.nsa_port.nsa_attention(*inputs.tensors, *where))


def run_reference(inputs: Inputs, indices: Tensor) -> WholeForward:
    """The reference's branches and output, given the choice of blocks."""
    cfg, where = inputs.cfg, inputs.where
    o_cmp, lse_cmp = reference.compressed_attention(
        inputs.q, inputs.k_cmp, inputs.v_cmp, cfg, num_keys=inputs.num_keys, **where
    )
    o_slc, lse_slc = reference.selected_attention(
        inputs.q, inputs.k_slc, inputs.v_slc, indices, cfg, **where
    )
    o_win, lse_win = reference.window_attention(inputs.q, inputs.k_win, inputs.v_win, cfg, **where)
    out = reference.combine(o_cmp, o_slc, o_win, inputs.gates)
    return WholeForward(out, o_cmp, o_slc, o_win, torch.stack((lse_cmp, lse_slc, lse_win)), indices)


def _spans(cu_seqlens: Tensor) -> list[slice]:
    bounds = cu_seqlens.tolist()
    return [slice(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
