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
"""eps of the call's dtype: half for rounding the result, half for an operand of its product."""

COMPUTED = 4.0
"""eps of the dtype that softmax and sums run in, float32 for 16-bit calls: two for the order of a
product's sum, two for the row sum of `grad * out` that takes the place of a sum over all keys."""

EXPONENT = 1.0
"""eps of that dtype for each unit of the largest exponent: half for rounding a logit, half for
rounding the lse that backward rebuilds probabilities from. What is an absolute error of an
exponent is a relative one of its exponential."""


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


def measure(
    name: str,
    actual: Tensor,
    exact: Tensor,
    plain: Tensor,
    *,
    exponent: float = 0.0,
    terms: float = 0.0,
) -> tuple[Measurement, ...]:
    """Hold `actual` to the rule. Infinities (an empty row's lse) must be where `exact` has them.

    Args:
        actual, exact, plain: of the same shape; `exact` in float64, `plain` in the `plain_dtype`
            of `actual`.
        exponent: the largest exponent that went into it, see `largest_exponent`.
        terms: the size of what was summed. It is the scale of rounding where all of it cancels,
            as in the gradient of a softmax over one key.
    """
    if actual.shape != exact.shape:
        raise AssertionError(f"{name} has shape {list(actual.shape)}, not {list(exact.shape)}")
    if plain_dtype(actual.dtype) != plain.dtype:
        raise AssertionError(f"{name} is {actual.dtype}, not {plain.dtype}")
    rounding = band(actual.dtype, exponent)
    shrink = _shrink(actual.dtype)
    exact = exact.detach()
    actual, plain = (tensor.detach().to(exact) for tensor in (actual, plain))
    infinite = exact.isinf()
    if not torch.equal(actual.isfinite(), ~infinite) or (actual != exact)[infinite].any():
        return (Measurement(name, math.inf, 0.0),)
    if not exact.numel():
        return (Measurement(name, 0.0, 0.0),)
    error, plain_error = ((t - exact).masked_fill(infinite, 0) for t in (actual, plain))
    exact = exact.masked_fill(infinite, 0)
    largest = Measurement(
        f"{name} (largest)",
        _largest(error),
        FACTOR * (shrink * _largest(plain_error) + rounding * (_largest(exact) or terms)),
    )
    norm = float(exact.norm())
    if not norm:
        return (largest,)
    budget = FACTOR * (shrink * float(plain_error.norm()) / norm + rounding)
    return largest, Measurement(f"{name} (norm)", float(error.norm()) / norm, budget)


def band(dtype: torch.dtype, exponent: float = 0.0) -> float:
    """The relative error that rounding alone may cause in a result of `dtype`."""
    computed = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return STORED * torch.finfo(dtype).eps + (COMPUTED + EXPONENT * exponent) * computed


def largest_exponent(lse: Tensor) -> float:
    """The largest finite magnitude of the log-sum-exps of a call."""
    finite = lse[lse.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _shrink(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / torch.finfo(plain_dtype(dtype)).eps


def score_budgets(plain: Tensor, exact: Tensor, dtype: torch.dtype, exponent: float) -> Tensor:
    """The rule's budget for every block score `[..., blocks]` of a call in `dtype`.

    Scores are float32, or float64 for float64 calls. They are exponentials, so that their errors
    are relative ones: a row's largest counts for all its blocks. Where float32 underflows, the
    plain run's own loss counts.
    """
    computed = torch.promote_types(dtype, torch.float32)
    error = (plain.to(exact) - exact).abs()
    underflows = exact < torch.finfo(computed).tiny / torch.finfo(computed).eps
    relative = (error / exact).masked_fill(underflows, 0).amax(-1, keepdim=True)
    relative = (_shrink(computed) * relative + band(computed, exponent)) * exact
    return FACTOR * torch.where(underflows, error + relative, relative)


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())
