"""Level 4: the operators are what PyTorch expects of operators."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nsa_port import functional
from nsa_port.conformance import hold
from nsa_port.conformance.case import Case, Context
from nsa_port.conformance.inputs import COMPACT, NAMES, Inputs, Shape, like, operator_arguments
from nsa_port.conformance.level1 import inputs, random_indices

_SMALL = Shape(T=70, H=2, HK=1, Dk=16, Dv=16)


def _opcheck(operator: str) -> Callable[[Context], None]:
    def check(context: Context) -> None:
        given = inputs(context, _SMALL).leaves()
        with torch.no_grad():
            arguments = _arguments(context, operator, given)
        torch.library.opcheck(getattr(torch.ops.nsa_port, operator).default, arguments)

    return check


def _arguments(context: Context, operator: str, given: Inputs) -> tuple:
    where = operator_arguments(given, context.name, needs_grad=operator != "select_blocks")
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = given.tensors
    if operator == "mean_compress":
        return (k_slc, COMPACT.as_ints(), None, None, context.name)
    if operator == "compressed_attention":
        return (q, k_cmp, v_cmp, *where)
    if operator == "select_blocks":
        _, lse = functional.compressed_attention(q, k_cmp, v_cmp, given.cfg, backend=context.name)
        return (q.detach(), k_cmp.detach(), lse, *where)
    if operator == "selected_attention":
        return (q, k_slc, v_slc, random_indices(given), *where)
    if operator == "window_attention":
        return (q, k_win, v_win, *where)
    if operator == "combine":
        branches = (like(q, seed).requires_grad_() for seed in (1, 2, 3))
        return (*branches, gates, context.name)
    return (*given.tensors, *where)


def _compile(context: Context) -> None:
    """One graph for forward and backward, and the same numbers as without it."""
    torch._dynamo.reset()
    backend = "inductor" if context.device.type == "cuda" else "aot_eager"
    context.note(f"torch.compile(fullgraph=True, backend={backend!r})")

    def call(*tensors: Tensor) -> Tensor:
        return functional.nsa_attention(
            *tensors,  # type: ignore[misc, arg-type]
            cfg=COMPACT,
            backend=context.name,
        )

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for T in (70, 101, 235):
        given = inputs(context, Shape(T=T)).leaves()
        with context.under(f"T={T}"):
            expected, actual = call(*given.tensors), compiled(*given.tensors)
            context.same("out", actual, expected)
            grad = like(expected, 99)
            found = torch.autograd.grad(actual, given.tensors, grad)
            wanted = torch.autograd.grad(expected, given.tensors, grad)
            for name, a, b in zip(NAMES, found, wanted, strict=True):
                context.same(f"d{name}", a, b)
    torch._dynamo.reset()


def _export(context: Context) -> None:
    """The exported program computes what the function computes."""

    class Attention(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return functional.nsa_attention(
                *tensors,  # type: ignore[misc, arg-type]
                cfg=COMPACT,
                backend=context.name,
            )

    given = inputs(context, Shape(T=100))
    program = torch.export.export(Attention(), given.tensors)
    other = inputs(context, Shape(T=100), seed=1)
    context.same("out", program.module()(*other.tensors), hold.function(context, other))


CASES = (
    *(
        Case(
            f"opcheck-{operator.replace('_', '-')}",
            4,
            f"torch.library.opcheck of {operator}",
            "the operator's schema, fake or autograd formula does not match what it does",
            _opcheck(operator),
            dtypes=(torch.float32,),
        )
        for operator in (
            "mean_compress",
            "compressed_attention",
            "select_blocks",
            "selected_attention",
            "window_attention",
            "combine",
            "nsa_attention",
        )
    ),
    Case(
        "compile",
        4,
        "torch.compile(fullgraph=True), forward and backward, is bit-equal",
        "models do not compile, or compute something else when they do",
        _compile,
    ),
    Case(
        "export",
        4,
        "torch.export is bit-equal",
        "models do not export, or compute something else when they do",
        _export,
        dtypes=(torch.float32,),
    ),
)
