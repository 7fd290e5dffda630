"""What runs while values are tried: the operators' calls, and whether what they give is right."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType

import torch
from torch import Tensor

from nsa_port import reference
from nsa_port.bench.shapes import Heads, Shape
from nsa_port.conformance import hold, tolerance
from nsa_port.conformance.case import Context, backend_named
from nsa_port.conformance.inputs import Inputs
from nsa_port.conformance.tolerance import Measurement
from nsa_port.kernels.geometry import Layout, NSAConfig

Outputs = tuple[Tensor, ...]

BRANCHES = {
    "compressed": "compressed_attention",
    "selected": "selected_attention",
    "window": "window_attention",
}
CALLS = ("select", *BRANCHES, *(f"{branch}_backward" for branch in BRANCHES))
"""What can be called, by the names of `candidates.Kernel.calls`."""


@dataclass
class Calls:
    """The operators of a module of kernels on one set of random inputs.

    Args:
        module: the kernels' module, as a backend names it.
        empty: all tensors are zeros and no result is used, for a driver that only compiles.
    """

    module: str
    backend: str
    heads: Heads
    length: int
    dtype: str
    device: str
    empty: bool = False
    config: NSAConfig = field(default_factory=NSAConfig)

    def prepare(self, name: str) -> None:
        """Make what a call takes from another, with the table's values."""
        _ = self._forwards["compressed" if name == "select" else name.removesuffix("_backward")]

    def run(self, name: str) -> Outputs:
        """The outputs of a call of `CALLS`."""
        if name == "select":
            _, lse = self._forwards["compressed"]
            tail = (self.config, Layout(self.length), self._scale)
            return (self._kernels.select_blocks(self.q, self.k_cmp, lse, *tail),)
        branch = name.removesuffix("_backward")
        if branch == name:
            return self._forward(name)
        out, lse = self._forwards[branch]
        operator: Callable[..., Outputs] = getattr(self._kernels, f"{BRANCHES[branch]}_backward")
        tail = (self.config, Layout(self.length), self._scale)
        return operator(self.grad, None, *self._tensors(branch), out, lse, *tail)

    def faults(self, name: str, outputs: Outputs) -> list[str]:
        """What is wrong with a call's outputs by the suite's rule, against float64."""
        context = Context(backend_named(self.backend), torch.device(self.device), self.q.dtype)
        if name == "select":
            hold.selection(context, self._as_call(), outputs[0])
        else:
            exact, plain, exponent, terms = self._expected(name)
            names = ("dq", "dk", "dv") if name.endswith("_backward") else ("out", "lse")
            for part, *tensors in zip(names, outputs, exact, plain, strict=True):
                context.compare(part, *tensors, exponent=exponent, terms=terms)
        return [*context.failures, *(_text(m) for m in context.measurements if not m.holds)]

    def differences(self, name: str, outputs: Outputs, before: Outputs) -> list[str]:
        """Where a call's outputs and those of other values differ by more than rounding may do."""
        if name == "select":
            return []  # which of two blocks of nearly equal scores comes first is open
        exponent = tolerance.largest_exponent(self._forwards[name.removesuffix("_backward")][1])
        terms = hold.largest(before)
        found = [
            measurement
            for part, (mine, theirs) in enumerate(zip(outputs, before, strict=True))
            for measurement in tolerance.measure(
                f"output {part} against the table's values",
                mine,
                theirs.double(),
                theirs,
                exponent=exponent,
                terms=terms,
            )
        ]
        return [_text(measurement) for measurement in found if not measurement.holds]

    # ----------------------------------------------------------------------- inputs

    @cached_property
    def q(self) -> Tensor:
        return self._random(self.length, self.heads.heads, self.heads.key_dim)

    @cached_property
    def k(self) -> Tensor:
        return self._random(self.length, self.heads.kv_heads, self.heads.key_dim)

    @cached_property
    def v(self) -> Tensor:
        return self._random(self.length, self.heads.kv_heads, self.heads.value_dim)

    @cached_property
    def k_cmp(self) -> Tensor:
        blocks = self.config.num_compressed(self.length)
        return self._random(blocks, self.heads.kv_heads, self.heads.key_dim)

    @cached_property
    def v_cmp(self) -> Tensor:
        blocks = self.config.num_compressed(self.length)
        return self._random(blocks, self.heads.kv_heads, self.heads.value_dim)

    @cached_property
    def grad(self) -> Tensor:
        return self._random(self.length, self.heads.heads, self.heads.value_dim)

    @cached_property
    def indices(self) -> Tensor:
        size = (self.length, self.heads.kv_heads, self.config.num_selected)
        if self.empty:
            return torch.zeros(1, *size, dtype=torch.int32, device=self.device)
        return random_selection(self.length, self.heads.kv_heads, self.config, self.device)

    @cached_property
    def _shape(self) -> Shape:
        return Shape.of(self.length, self.heads, dtype=self.dtype, device=self.device)

    def _random(self, *size: int) -> Tensor:
        drawn = self._shape.random(*size)
        return drawn.zero_() if self.empty else drawn

    # ----------------------------------------------------------------------- calls

    @cached_property
    def _kernels(self) -> ModuleType:
        return importlib.import_module(self.module)

    @property
    def _scale(self) -> float:
        return self.heads.key_dim**-0.5

    def _tensors(self, branch: str) -> Outputs:
        if branch == "compressed":
            return (self.q, self.k_cmp, self.v_cmp)
        if branch == "window":
            return (self.q, self.k, self.v)
        return (self.q, self.k, self.v, self.indices)

    def _forward(self, branch: str) -> Outputs:
        operator: Callable[..., Outputs] = getattr(self._kernels, BRANCHES[branch])
        return operator(*self._tensors(branch), self.config, Layout(self.length), self._scale)

    @cached_property
    def _forwards(self) -> _Forwards:
        return _Forwards(self)

    # ----------------------------------------------------------------------- the reference

    def _as_call(self) -> Inputs:
        gates = torch.ones(*self.q.shape[:3], 3, dtype=self.q.dtype, device=self.device)
        tensors = (self.q, self.k_cmp, self.v_cmp, self.k, self.v, self.k, self.v, gates)
        return Inputs(*tensors, self.config, self._scale)

    def _expected(self, name: str) -> tuple[Outputs, Outputs, float, float]:
        """The reference's answer in float64 and in the call's dtype; and what rounding goes by."""
        if name not in self._answers:
            (exact, lse), (plain, _) = (
                self._reference(name, dtype)
                for dtype in (torch.float64, tolerance.plain_dtype(self.q.dtype))
            )
            terms = hold.largest(exact) if name.endswith("_backward") else 0.0
            self._answers[name] = (exact, plain, tolerance.largest_exponent(lse), terms)
        return self._answers[name]

    @cached_property
    def _answers(self) -> dict[str, tuple[Outputs, Outputs, float, float]]:
        return {}

    def _reference(self, name: str, dtype: torch.dtype) -> tuple[Outputs, Tensor]:
        branch = name.removesuffix("_backward")
        leaves, rest = self._tensors(branch)[:3], self._tensors(branch)[3:]
        leaves = tuple(leaf.detach().to(dtype).requires_grad_() for leaf in leaves)
        options = {"num_keys": self.length} if branch == "compressed" else {}
        operator: Callable[..., tuple[Tensor, Tensor]] = getattr(reference, BRANCHES[branch])
        out, lse = operator(*leaves, *rest, self.config, scale=self._scale, **options)
        lse = lse.detach()
        if branch == name:
            return (out.detach(), lse), lse
        return torch.autograd.grad(out, leaves, self.grad.to(dtype)), lse


class _Forwards(dict[str, Outputs]):
    """Each branch's `out, lse`, which its backward and the choice of blocks take, made once.

    By the table's values, or not at all where nothing is run.
    """

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self._calls = calls

    def __missing__(self, branch: str) -> Outputs:
        calls = self._calls
        if calls.empty:
            lse = torch.zeros(1, calls.length, calls.heads.heads, device=calls.device)
            self[branch] = (torch.zeros_like(calls.grad), lse)
        else:
            self[branch] = calls._forward(branch)
        return self[branch]


def random_selection(T: int, HK: int, config: NSAConfig, device: str) -> Tensor:
    """Uniformly random blocks beside the forced ones, ascending: the worst case for sharing."""
    m, n = config.select_block_size, config.num_selected
    blocks = config.num_select_blocks(T)
    parts = []
    for first in range(0, T, 8192):
        own = torch.arange(first, min(first + 8192, T), device=device) // m
        score = torch.rand(len(own), HK, blocks, device=device)
        block = torch.arange(blocks, device=device)
        distance = own[:, None] - block
        forced = (block < config.init_blocks) | (distance < config.local_blocks)
        score.masked_fill_(forced[:, None], 2.0).masked_fill_((distance < 0)[:, None], -1.0)
        value, index = score.topk(min(n, blocks), -1)
        index = index.masked_fill(value < 0, blocks).sort(-1).values
        parts.append(index.masked_fill(index == blocks, -1).to(torch.int32))
    chosen = torch.cat(parts)[None]
    return torch.nn.functional.pad(chosen, (0, n - chosen.shape[-1]), value=-1).contiguous()


def _text(measurement: Measurement) -> str:
    return (
        f"{measurement.name}: error {measurement.error:.3g}, the suite allows "
        f"{measurement.budget:.3g}"
    )
