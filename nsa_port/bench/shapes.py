"""What is measured: the sizes of an attention, and the inputs that are drawn for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from nsa_port.kernels.geometry import NSAConfig

SELECTIONS = ("random", "correlated")
NEIGHBOURS = 4
"""Neighbouring queries whose choices of blocks are compared."""

_TOKENS_PER_TOPIC = 64
_OWN_SHARE = 0.03
"""Of a correlated query's variance, what it does not share with its neighbours. Of the paper's 16
blocks each, four queries then choose about 19 different ones at 8k tokens, 22 at 64k."""


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of an attention; `name` is what results call it."""

    name: str
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int


STANDARD = {
    shape.name: shape
    for shape in (
        Heads("A1", 64, 4, 192, 128),
        Heads("A2", 64, 4, 128, 128),
        Heads("B", 32, 8, 128, 128),
    )
}
"""A1 is the paper's setting, A2 the same with one width, B one with small groups."""

DEFAULT = Heads("16,2,64,64", 16, 2, 64, 64)


def parse_heads(text: str) -> Heads:
    """A name of `STANDARD`, or `H,HK,Dk,Dv`; raises ValueError with what may be given."""
    if text in STANDARD:
        return STANDARD[text]
    sizes = text.split(",")
    if len(sizes) != 4 or not all(size.strip().isdigit() and int(size) for size in sizes):
        names = ", ".join(STANDARD)
        raise ValueError(f"a shape is one of {names}, or H,HK,Dk,Dv such as 64,4,192,128: {text!r}")
    H, HK, Dk, Dv = map(int, sizes)
    if H % HK:
        raise ValueError(f"{HK} key/value heads do not divide {H} heads: {text!r}")
    return Heads(f"{H},{HK},{Dk},{Dv}", H, HK, Dk, Dv)


@dataclass(frozen=True)
class Shape:
    """One problem: a causal self-attention of `length` tokens, or one query over a cache."""

    length: int
    heads: int = 16
    kv_heads: int = 2
    key_dim: int = 64
    value_dim: int = 64
    batch: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    backend: str | None = None
    selection: str = "random"
    config: NSAConfig = field(default_factory=NSAConfig)

    @classmethod
    def of(cls, length: int, heads: Heads, **others: Any) -> Shape:
        sizes = (heads.heads, heads.kv_heads, heads.key_dim, heads.value_dim)
        return cls(length, *sizes, **others)

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def random(self, *shape: int, grad: bool = False) -> Tensor:
        made = torch.empty(self.batch, *shape, dtype=self.torch_dtype, device=self.device)
        return made.normal_().requires_grad_(grad)

    def queries(self, grad: bool = False) -> Tensor:
        """`q [B, length, H, Dk]`, independent of each other or mostly alike among neighbours."""
        q = self.random(self.length, self.heads, self.key_dim)
        if self.selection == "correlated":
            topics = -(-self.length // _TOKENS_PER_TOPIC)
            shared = self.random(topics, self.heads, self.key_dim)
            shared = shared.repeat_interleave(_TOKENS_PER_TOPIC, 1)[:, : self.length]
            q = q * _OWN_SHARE**0.5 + shared * (1 - _OWN_SHARE) ** 0.5
        return q.requires_grad_(grad)

    def keys(self, grad: bool = False) -> tuple[Tensor, Tensor]:
        """`k, v [B, length, HK, D]`."""
        k = self.random(self.length, self.kv_heads, self.key_dim, grad=grad)
        return k, self.random(self.length, self.kv_heads, self.value_dim, grad=grad)

    def gates(self, length: int, grad: bool = False) -> Tensor:
        gates = torch.empty(
            self.batch, length, self.heads, 3, dtype=self.torch_dtype, device=self.device
        )
        return gates.uniform_().requires_grad_(grad)


def mean_union(indices: Tensor) -> float:
    """How many different blocks `NEIGHBOURS` queries in a row choose, on average.

    `indices [B, T, HK, n]` as `select_blocks` gives them; trailing queries are left out.
    """
    B, T, HK, n = indices.shape
    groups = T // NEIGHBOURS
    chosen = indices[:, : groups * NEIGHBOURS].reshape(B, groups, NEIGHBOURS, HK, n)
    chosen = chosen.transpose(2, 3).reshape(B, groups, HK, NEIGHBOURS * n).sort(-1).values
    first = pad(chosen[..., 1:] != chosen[..., :-1], (1, 0), value=True)
    return float((first & (chosen >= 0)).sum(-1).double().mean())
