"""Level 2: backward, each operator alone and all of them together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nsa_port import functional, reference
from nsa_port.conformance import hold, tolerance
from nsa_port.conformance.case import Case, Context
from nsa_port.conformance.inputs import COMPACT, Inputs, Shape, like
from nsa_port.conformance.level1 import ALL_DTYPES, PAPER_BLOCKS, inputs, random_indices

Function = Callable[..., tuple[Tensor, ...]]


def gradients(
    context: Context,
    tensors: Sequence[Tensor],
    actual: Function,
    oracle: Function,
    *,
    use: Sequence[int] = (0,),
) -> None:
    """Compare the gradients of `tensors` through the outputs that `use` names."""

    def differentiate(function: Function, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in given]
        outputs = [function(*leaves)[at] for at in use]
        outputs = [torch.where(out.isfinite(), out, 0) for out in outputs]  # an empty row's lse
        upstream = [like(out, 77 + at).to(context.dtype).to(out) for at, out in enumerate(outputs)]
        found = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)
        return tuple(
            torch.zeros_like(leaf) if grad is None else grad
            for leaf, grad in zip(leaves, found, strict=True)
        )

    got = differentiate(actual, tensors)
    plain = differentiate(oracle, [hold.to_plain(context, tensor) for tensor in tensors])
    exactly = [hold.to_exact(context, tensor) for tensor in tensors]
    exact = differentiate(oracle, exactly)
    _, *lse = oracle(*exactly)
    exponent = max(map(tolerance.largest_exponent, lse), default=0.0)
    terms = hold.largest(exact)
    for at, (mine, wanted, rough) in enumerate(zip(got, exact, plain, strict=True)):
        name = f"gradient of argument {at}"
        context.compare(name, mine, wanted, rough, exponent=exponent, terms=terms)


def _attention(name: str) -> Callable[[Context], None]:
    """Gradients of q, k and v through the output, through the lse, and through both."""

    def check(context: Context) -> None:
        given = inputs(context)
        indices = random_indices(given)
        tensors, actual, oracle = _branch(context, given, name, indices)
        for use, label in (((0,), "out"), ((1,), "lse"), ((0, 1), "out and lse")):
            with context.under(f"through {label}"):
                gradients(context, tensors, actual, oracle, use=use)

    return check


def _branch(
    context: Context, given: Inputs, name: str, indices: Tensor
) -> tuple[tuple[Tensor, ...], Function, Function]:
    """The tensors of a branch, the backend's function of them, and the reference's."""
    where: dict[str, Any] = {"cfg": given.cfg}
    if name == "compressed":
        tensors, both = (given.q, given.k_cmp, given.v_cmp), "compressed_attention"
    elif name == "selected":
        tensors, both = (given.q, given.k_slc, given.v_slc), "selected_attention"
        where["idx"] = indices
    else:
        tensors, both = (given.q, given.k_win, given.v_win), "window_attention"
    return (
        tensors,
        partial(getattr(functional, both), **where, backend=context.name),
        partial(getattr(reference, both), **where),
    )


def _mean_compress(context: Context) -> None:
    k = inputs(context).k_slc
    gradients(
        context,
        (k,),
        lambda t: (functional.mean_compress(t, COMPACT, backend=context.name),),
        lambda t: (reference.mean_compress(t, COMPACT),),
    )


def _combine(context: Context) -> None:
    values = inputs(context).v_slc.repeat(1, 1, 2, 1)
    branches = [like(values, seed) for seed in (1, 2, 3)]
    T, H = values.shape[1:3]
    for shape in ((1, T, H, 3), (3,), (T, 1, 3)):
        gates = like(values.new_empty(shape), 4).sigmoid()
        with context.under(f"gates {list(shape)}"):
            gradients(
                context,
                (*branches, gates),
                lambda *t: (functional.combine(*t, backend=context.name),),
                lambda *t: (reference.combine(*t),),
            )


def _whole(shape: Shape) -> Callable[[Context], None]:
    def check(context: Context) -> None:
        hold.backward(context, inputs(context, shape))

    return check


def _broadcast_gates(context: Context) -> None:
    given = inputs(context)
    hold.backward(context, replace(given, gates=given.gates[:, :1, :, :]))


def _empty_rows(context: Context) -> None:
    """Queries that see no compressed block pass no gradient to it, and no NaN to anything."""
    given = inputs(context, Shape(T=COMPACT.block_size - 1))
    found = hold.backward(context, given)
    context.require(all(bool(t.isfinite().all()) for t in found), "a gradient is NaN")
    visible = inputs(context, Shape(T=COMPACT.block_size + 3))
    leaf = visible.q.detach().requires_grad_()
    out, _ = functional.compressed_attention(
        leaf, visible.k_cmp, visible.v_cmp, visible.cfg, backend=context.name
    )
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    context.require(not grad[:, : COMPACT.block_size - 1].any(), "an empty row has a gradient")


def _extra_outputs(context: Context) -> None:
    """The choice of blocks carries no gradient; each input's gradient has its form."""
    given = inputs(context).leaves()
    out = hold.function(context, given)
    found = torch.autograd.grad(out, given.tensors, torch.ones_like(out))
    for leaf, grad in zip(given.tensors, found, strict=True):
        context.require(
            grad.shape == leaf.shape and grad.dtype == leaf.dtype,
            f"a gradient is {list(grad.shape)} {grad.dtype} for {list(leaf.shape)} {leaf.dtype}",
        )
    indices = functional.select_blocks(
        given.q,
        given.k_cmp,
        out.new_zeros(out.shape[:3], dtype=torch.float32),
        given.cfg,
        backend=context.name,
    )
    context.require(not indices.requires_grad, "the choice of blocks asks for gradients")


def _case(name: str, title: str, check: Callable[[Context], None], shows: str) -> Case:
    return Case(name, 2, title, shows, check, dtypes=ALL_DTYPES)


CASES = (
    _case(
        "mean-compress-backward",
        "Gradient of mean compression",
        _mean_compress,
        "phi and the raw tokens learn the wrong thing",
    ),
    _case(
        "compressed-attention-backward",
        "Gradients of compressed attention, also through lse",
        _attention("compressed"),
        "phi learns the wrong thing",
    ),
    _case(
        "selected-attention-backward",
        "Gradients of selected attention, also through lse",
        _attention("selected"),
        "keys and values of chosen blocks learn the wrong thing",
    ),
    _case(
        "window-attention-backward",
        "Gradients of window attention, also through lse",
        _attention("window"),
        "keys and values of the window learn the wrong thing",
    ),
    _case(
        "combine-backward",
        "Gradients of the gated sum, gates of any shape",
        _combine,
        "gates learn the wrong thing",
    ),
    _case(
        "nsa-attention-backward",
        "All eight gradients of NSA, batch of 2",
        _whole(Shape(B=2)),
        "training goes wrong",
    ),
    _case(
        "nsa-attention-backward-paper-blocks",
        "All eight gradients with the paper's block sizes",
        _whole(Shape(T=450, cfg=PAPER_BLOCKS)),
        "training in the paper's setting goes wrong",
    ),
    _case(
        "broadcast-gates-backward",
        "Gradient of gates that broadcast over time",
        _broadcast_gates,
        "a shared gate gets the gradient of one position",
    ),
    _case(
        "empty-rows-backward",
        "Rows that see nothing have zero gradients, never NaN",
        _empty_rows,
        "one short sequence turns the weights into NaN",
    ),
    Case(
        "gradient-forms",
        2,
        "Gradients have their input's shape and dtype; the choice has none",
        "autograd would reject or convert what the backend returns",
        _extra_outputs,
    ),
)
