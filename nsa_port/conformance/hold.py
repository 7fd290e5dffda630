"""What most cases come down to: hold a call's forward, choice of blocks and backward to the
reference."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nsa_port import functional, reference
from nsa_port.backends.interface import WholeForward
from nsa_port.conformance import tolerance
from nsa_port.conformance.case import Context
from nsa_port.conformance.inputs import NAMES, Inputs, like, run, run_reference
from nsa_port.conformance.tolerance import Measurement
from nsa_port.kernels.geometry import Layout

_BRANCHES = ("out", "o_cmp", "o_slc", "o_win", "lse")


@dataclass(frozen=True, slots=True)
class References:
    """The same call twice: in float64, and plainly in its own dtype; see `tolerance`."""

    exact: Inputs
    plain: Inputs

    @property
    def both(self) -> tuple[Inputs, Inputs]:
        return self.exact, self.plain


def references(context: Context, inputs: Inputs) -> References:
    exact, plain = (partial(form, context) for form in (to_exact, to_plain))
    return References(inputs.to(context.reference_device).map(exact), inputs.map(plain))


def to_exact(context: Context, tensor: Tensor) -> Tensor:
    return tensor.detach().to(context.reference_device, torch.float64)


def to_plain(context: Context, tensor: Tensor) -> Tensor:
    return tensor.detach().to(tolerance.plain_dtype(tensor.dtype))


def forward(context: Context, inputs: Inputs) -> WholeForward:
    """Compare every output of the operator, and what it returns without gradients."""
    got = run(inputs, context.name, needs_grad=True)
    outputs(context, inputs, got)
    with torch.no_grad():
        alone = run(inputs, context.name)
    with context.under("without gradients"):
        outputs(context, inputs, alone, ("out", "lse"))
    return got


def outputs(
    context: Context, inputs: Inputs, got: WholeForward, names: tuple[str, ...] = _BRANCHES
) -> None:
    """Compare outputs that the backend gave for a call, its choice of blocks among them."""
    selection(context, inputs, got.indices)
    both = references(context, inputs)
    exact = run_reference(both.exact, got.indices.to(both.exact.q.device))
    plain = run_reference(both.plain, got.indices)
    exponent = tolerance.largest_exponent(exact.lse)
    for name in names:
        given = (getattr(result, name) for result in (got, exact, plain))
        context.compare(name, *given, exponent=exponent)


def function(context: Context, inputs: Inputs) -> Tensor:
    """`nsa_port.nsa_attention` with the backend forced."""
    return functional.nsa_attention(
        *inputs.tensors, inputs.cfg, **inputs.where, backend=context.name
    )


def backward(context: Context, inputs: Inputs, *, seed: int = 99) -> tuple[Tensor, ...]:
    """Compare the gradients of all eight tensors, given the backend's own choice of blocks."""
    return _differentiated(context, inputs, seed)[1]


def both_ways(context: Context, inputs: Inputs) -> WholeForward:
    """`forward` and `backward`; where kernels are slow, of one and the same call."""
    if not context.slow:
        got = forward(context, inputs)
        backward(context, inputs)
        return got
    got, _ = _differentiated(context, inputs, 99)
    got = WholeForward(*(tensor.detach() for tensor in got))
    outputs(context, inputs, got)
    return got


def _differentiated(
    context: Context, inputs: Inputs, seed: int
) -> tuple[WholeForward, tuple[Tensor, ...]]:
    leaves = inputs.leaves()
    got = run(leaves, context.name, needs_grad=True)
    grad = like(got.out, seed)
    gradients = torch.autograd.grad(got.out, leaves.tensors, grad)
    compare_gradients(context, inputs, got.indices, grad, gradients)
    return got, gradients


def compare_gradients(
    context: Context,
    inputs: Inputs,
    indices: Tensor,
    grad: Tensor,
    gradients: tuple[Tensor, ...],
) -> None:
    """Compare gradients that the backend gave for a call, its choice of blocks and `grad`."""
    selection(context, inputs, indices)
    both = references(context, inputs)
    exact, lse = _reference_gradients(both.exact, indices, grad)
    plain, _ = _reference_gradients(both.plain, indices, grad)
    exponent, terms = tolerance.largest_exponent(lse), largest(exact)
    for name, actual, wanted, rough in zip(NAMES, gradients, exact, plain, strict=True):
        context.compare(f"d{name}", actual, wanted, rough, exponent=exponent, terms=terms)


def window_rows(
    context: Context,
    rows: Inputs,
    actual: tuple[Tensor, Tensor],
    grad: Tensor,
    gradient: Tensor,
) -> None:
    """Compare some rows of window attention: `out, lse`, and the gradient of their queries."""
    found = []
    for given in references(context, rows).both:
        q = given.q.requires_grad_()
        out, lse = reference.window_attention(q, given.k_win, given.v_win, given.cfg, **given.where)
        (dq,) = torch.autograd.grad(out, q, grad.to(out))
        found.append((out, lse, dq))
    exponent = tolerance.largest_exponent(found[0][1])
    for name, mine, exact, plain in zip(
        ("out", "lse", "dq"), (*actual, gradient), *found, strict=True
    ):
        context.compare(name, mine, exact, plain, exponent=exponent)


def largest(tensors: Iterable[Tensor]) -> float:
    """The largest magnitude in any of the tensors."""
    return max((float(t.abs().max()) for t in tensors if t.numel()), default=0.0)


def selection(context: Context, inputs: Inputs, indices: Tensor) -> None:
    """Hold a choice of blocks to the reference's: spec's rule for comparing choices."""
    if indices.dtype != torch.int32:
        context.failures.append(f"indices are {indices.dtype}, not torch.int32")
        return
    worst = Measurement("choice of blocks", 0.0, 0.0)
    start = 0
    for sequence in inputs.sequences():
        stop = start + sequence.q.shape[1]
        if stop > start and sequence.num_keys:
            found = _sequence_selection(context, sequence, indices[:, start:stop])
            worst = max(worst, found, key=lambda m: (m.ratio, m.budget))
        elif (indices[:, start:stop] != -1).any():
            context.failures.append("a sequence without keys has chosen blocks")
        start = stop
    context.measurements.append(worst)


def _sequence_selection(context: Context, inputs: Inputs, indices: Tensor) -> Measurement:
    both = references(context, inputs)
    exact, expected, lse = _score(both.exact)
    plain = _score(both.plain)[0].to(exact.device)
    chosen = indices.to(exact.device).long()
    cfg, blocks = inputs.cfg, exact.shape[-1]
    S, T = inputs.num_keys, inputs.q.shape[1]
    positions = Layout(S, positions=inputs.positions).query_positions(T, exact.device)
    positions = positions[:, :, None, None]
    own = positions.div(cfg.select_block_size, rounding_mode="floor")
    context.require(
        bool(((chosen >= -1) & (chosen <= own)).all()),
        "a block that starts after its query is chosen (candidates are blocks 0 .. p // m)",
    )
    given = chosen.ne(-1)
    ordered = (chosen[..., 1:] > chosen[..., :-1]) | ~given[..., 1:]
    context.require(
        bool((ordered & (given[..., 1:] <= given[..., :-1])).all()),
        "indices are not distinct, ascending and padded with -1 at the end",
    )
    context.require(
        torch.equal(given.sum(-1), expected.ne(-1).sum(-1)),
        "not min(n, candidates) blocks are chosen",
    )
    mine, theirs = _as_mask(chosen, blocks), _as_mask(expected, blocks)
    block = torch.arange(blocks, device=exact.device)
    forced = ((block < cfg.init_blocks) | (block > own - cfg.local_blocks)) & (block <= own)
    context.require(not (forced & ~mine).any(), "a forced block (first or local) is not chosen")
    lost, gained = theirs & ~mine, mine & ~theirs
    budgets = tolerance.score_budgets(plain, exact, inputs.q.dtype, tolerance.largest_exponent(lse))
    differs = lost.any(-1) & gained.any(-1)
    if not differs.any():
        return Measurement("choice of blocks", 0.0, float(budgets.max()))
    context.note(f"{int(differs.sum())} rows choose another block of equal score within budget")
    best_lost = exact.masked_fill(~lost, -torch.inf).argmax(-1, keepdim=True)
    least_gained = exact.masked_fill(~gained, torch.inf).argmin(-1, keepdim=True)
    at = torch.cat((best_lost, least_gained), -1)
    scores, allowed = exact.gather(-1, at), budgets.gather(-1, at).amax(-1)
    gap = (scores[..., 0] - scores[..., 1]).clamp(min=0)
    found = [
        Measurement("choice of blocks (score gap)", float(a), float(b))
        for a, b in zip(gap[differs], allowed[differs], strict=True)
    ]
    return max(found, key=lambda m: m.ratio)


def _score(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The block scores of a call that is not packed, the reference's choice by them, the lse."""
    where: dict[str, Any] = {
        "num_keys": inputs.num_keys,
        "scale": inputs.scale,
        "positions": inputs.positions,
    }
    q, k_cmp, cfg = inputs.q, inputs.k_cmp, inputs.cfg
    _, lse = reference.compressed_attention(q, k_cmp, inputs.v_cmp, cfg, **where)
    scores = reference.block_scores(q, k_cmp, lse, cfg, **where)
    return scores, reference.select_blocks(q, k_cmp, lse, cfg, **where).long(), lse


def _as_mask(indices: Tensor, blocks: int) -> Tensor:
    mask = torch.zeros(*indices.shape[:-1], blocks + 1, dtype=torch.bool, device=indices.device)
    inside = (indices >= 0) & (indices < blocks)
    return mask.scatter(-1, torch.where(inside, indices, blocks), True)[..., :blocks]


def _reference_gradients(
    inputs: Inputs, indices: Tensor, grad: Tensor
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The gradients, and the lse of the three branches."""
    leaves = inputs.leaves()
    result = run_reference(leaves, indices.to(leaves.q.device))
    out = result.out
    found = torch.autograd.grad(out, leaves.tensors, grad.to(out), allow_unused=True)
    gradients = tuple(
        torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip(leaves.tensors, found, strict=True)
    )
    return gradients, result.lse.detach()
