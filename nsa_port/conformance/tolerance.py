"""How close to the float64 reference is close enough: the one rule, for everything.

    error(backend) <= 2 x (error(plain) + band)

Both errors are measured against the reference in float64 (`exact`). `plain` is the reference
itself run in the call's own dtype: plain PyTorch, the same maths. So the budget comes from the
data, and no table of tolerances exists that could be widened. `band` is what rounding alone may
do where the plain run is exact by luck, at the scale of the largest exact value: see `band`.

A call in float64 has no more exact reference than itself. There `plain` runs in float32, and its
error shrinks by the ratio of the two dtypes' eps to what the reference's own rounding comes to.

Two errors are held to the rule at once: the largest absolute difference, which finds one wrong
element, and the relative Frobenius norm, which finds many slightly wrong ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 2.0
STORED = 1.0
"""eps of the call's dtype: half for rounding the result, half for an operand of the last product."""

COMPUTED = 8.0
"""eps of the dtype that softmax and sums run in, float32 for 16-bit calls: two each for a logit,
for the probability that backward rebuilds from lse, for the order of a product's sum, and for the
row sum of `grad * out`, which takes the place of a sum over all keys."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One comparison: it holds while `error <= budget`; an infinite error can never hold."""

    name: str
    error: float
    budget: float

    @property
    def ratio(self) -> float:
        """How much of the budget is used: 0 is exact, up to 1 holds."""
        if self.error <= 0:
            return 0.0
        return self.error / self.budget if self.budget > 0 else math.inf

    @property
    def holds(self) -> bool:
        return self.ratio <= 1


def plain_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which dtype the plain run of a call in `dtype` is done."""
    return torch.float32 if dtype == torch.float64 else dtype


def measure(name: str, actual: Tensor, exact: Tensor, plain: Tensor) -> tuple[Measurement, ...]:
    """Hold `actual` to the rule. Infinities (an empty row's lse) must be where `exact` has them.

    `plain` has the `plain_dtype` of `actual`, `exact` is float64, all have the same shape.
    """
    if actual.shape != exact.shape:
        raise AssertionError(f"{name} has shape {list(actual.shape)}, not {list(exact.shape)}")
    if plain_dtype(actual.dtype) != plain.dtype:
        raise AssertionError(f"{name} is {actual.dtype}, not {plain.dtype}")
    rounding = band(actual.dtype)
    shrink = _shrink(actual.dtype)
    exact = exact.detach()
    actual, plain = (tensor.detach().to(exact) for tensor in (actual, plain))
    infinite = exact.isinf()
    if not torch.equal(actual.isfinite(), ~infinite) or (actual != exact)[infinite].any():
        return (Measurement(name, math.inf, 0.0),)
    actual, plain, exact = (t.masked_fill(infinite, 0) for t in (actual, plain, exact))
    if not exact.numel():
        return (Measurement(name, 0.0, 0.0),)
    return (
        Measurement(
            f"{name} (largest)",
            _largest(actual - exact),
            FACTOR * (shrink * _largest(plain - exact) + rounding * _largest(exact)),
        ),
        Measurement(
            f"{name} (norm)",
            _norm(actual - exact, exact),
            FACTOR * (shrink * _norm(plain - exact, exact) + rounding * bool(exact.any())),
        ),
    )


def band(dtype: torch.dtype) -> float:
    """The relative error that rounding alone may cause in a result of `dtype`."""
    computed = torch.promote_types(dtype, torch.float32)
    return STORED * torch.finfo(dtype).eps + COMPUTED * torch.finfo(computed).eps


def _shrink(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / torch.finfo(plain_dtype(dtype)).eps


def score_budgets(plain: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The rule's budget for every block score `[..., blocks]` of a call in `dtype`.

    Scores are float32, or float64 for float64 calls. They are exponentials, so that their errors
    are relative ones: a row's largest counts for all its blocks. Where float32 underflows, the
    plain run's own loss counts.
    """
    computed = torch.promote_types(dtype, torch.float32)
    error = (plain.to(exact) - exact).abs()
    underflows = exact < torch.finfo(computed).tiny / torch.finfo(computed).eps
    relative = (error / exact).masked_fill(underflows, 0).amax(-1, keepdim=True)
    relative = (_shrink(computed) * relative + band(computed)) * exact
    return FACTOR * torch.where(underflows, error + relative, relative)


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())


def _norm(difference: Tensor, exact: Tensor) -> float:
    """The Frobenius norm relative to that of `exact`; absolute where `exact` is all zero."""
    scale = float(exact.norm())
    return float(difference.norm()) / (scale or 1.0)
