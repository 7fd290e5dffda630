"""The operators as PyTorch sees them: schemas, fakes, autograd, compile, export."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import nsa_port
from nsa_port import NSAConfig, registry
from nsa_port.backends.interface import OPERATORS

CFG = NSAConfig(8, 4, 16, 4, 1, 1, 24)
CU = torch.tensor([0, 5, 5, 42, 70], dtype=torch.int32)


def inputs(T: int = 70, B: int = 1, *, grad: bool = True, seed: int = 0) -> tuple[Tensor, ...]:
    """q, k, v of each branch (raw), gates; H=4, HK=2, Dk=8, Dv=6, float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        tensor = torch.randn(*shape, dtype=torch.float64, generator=generator)
        return tensor.requires_grad_(grad)

    keys = [normal(B, T, 2, size) for size in (8, 6) * 3]
    gates = torch.rand(B, T, 4, 3, dtype=torch.float64, generator=generator)
    return (normal(B, T, 4, 8), *keys, gates.requires_grad_(grad))


def whole(module: object, *tensors: Tensor, **where: Tensor | None) -> Tensor:
    """mean_compress and nsa_attention of `nsa_port` or `nsa_port.reference`."""
    q, k1, v1, k2, v2, k3, v3, gates = tensors
    cu = where.get("cu_seqlens")
    k_cmp = module.mean_compress(k1, CFG, cu_seqlens=cu)  # type: ignore[attr-defined]
    v_cmp = module.mean_compress(v1, CFG, cu_seqlens=cu)  # type: ignore[attr-defined]
    return module.nsa_attention(q, k_cmp, v_cmp, k2, v2, k3, v3, gates, CFG, **where)  # type: ignore[attr-defined]


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("cu", [None, CU], ids=["dense", "packed"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradients_reach_every_input(cu: Tensor | None, compiled: bool) -> None:
    tensors = inputs()
    run: Callable = lambda *t: whole(nsa_port, *t, cu_seqlens=cu)  # noqa: E731
    if compiled:
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    out, expected = run(*tensors), whole(nsa_port.reference, *tensors, cu_seqlens=cu)
    assert_same((out,), (expected,))
    grad = torch.randn_like(expected)
    assert_same(
        torch.autograd.grad(out, tensors, grad), torch.autograd.grad(expected, tensors, grad)
    )


def test_one_graph_serves_every_batch_and_length() -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    run = torch.compile(lambda *t: whole(nsa_port, *t), fullgraph=True, dynamic=True, backend=count)
    for B, T in ((7, 70), (3, 41), (5, 129)):  # no size equals another: dynamo would guard on it
        tensors = inputs(T, B, grad=False)
        assert_same((run(*tensors),), (whole(nsa_port.reference, *tensors),))
    assert len(graphs) == 1


def test_exports_with_dynamic_batch_and_length() -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
            return whole(nsa_port, q, k, v, k, v, k, v, gates)

    def four(T: int, B: int) -> tuple[Tensor, ...]:
        tensors = inputs(T, B, grad=False)
        return (*tensors[:3], tensors[-1])

    sizes = {0: torch.export.Dim("B", max=64), 1: torch.export.Dim("T", min=16, max=1 << 20)}
    program = torch.export.export(Model(), four(70, 2), dynamic_shapes=(sizes,) * 4)
    targets = {str(node.target) for node in program.graph.nodes if "nsa_port" in str(node.target)}
    assert targets == {"nsa_port.mean_compress.default", "nsa_port.nsa_attention.default"}
    q, k, v, gates = four(133, 3)
    assert_same(
        (program.module()(q, k, v, gates),),
        (whole(nsa_port.reference, q, k, v, k, v, k, v, gates),),
    )


def where(num_keys: int, *, needs_grad: bool = True, cu: Tensor | None = None) -> tuple:
    return (CFG.as_ints(), num_keys, 0.3, cu, cu, None, needs_grad, "")


@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck(operator: str) -> None:
    q, k1, v1, k2, v2, k3, v3, gates = inputs(41)
    k_cmp, v_cmp = (nsa_port.mean_compress(t, CFG).detach().requires_grad_() for t in (k1, v1))
    _, lse = nsa_port.compressed_attention(q, k_cmp, v_cmp, CFG, scale=0.3)
    idx = nsa_port.select_blocks(q, k_cmp, lse, CFG, scale=0.3)
    o = torch.randn(1, 41, 4, 6, dtype=torch.float64, requires_grad=True)
    arguments = {
        "nsa_attention": (q, k_cmp, v_cmp, k2, v2, k3, v3, gates, *where(41)),
        "mean_compress": (k1, CFG.as_ints(), None, None, ""),
        "compressed_attention": (q, k_cmp, v_cmp, *where(41)),
        "select_blocks": (q.detach(), k_cmp.detach(), lse.detach(), *where(41, needs_grad=False)),
        "selected_attention": (q, k2, v2, idx, *where(41)),
        "window_attention": (q, k2, v2, *where(41)),
        "combine": (o, o.detach().clone(), o.detach() * 2, gates, ""),
    }[operator]
    torch.library.opcheck(getattr(torch.ops.nsa_port, operator).default, arguments)


@pytest.mark.parametrize(
    "operator", [name for name in OPERATORS if name not in ("select_blocks", "nsa_attention")]
)
def test_opcheck_of_backward(operator: str) -> None:
    q, k1, v1, k2, v2, _, _, gates = inputs(41, grad=False)
    k_cmp, v_cmp = (nsa_port.mean_compress(t, CFG) for t in (k1, v1))
    o, lse = nsa_port.compressed_attention(q, k_cmp, v_cmp, CFG, scale=0.3)
    idx = nsa_port.select_blocks(q, k_cmp, lse, CFG, scale=0.3)
    slc = nsa_port.selected_attention(q, k2, v2, idx, CFG, scale=0.3)
    win = nsa_port.window_attention(q, k2, v2, CFG, scale=0.3)
    grad, grad_lse = torch.randn_like(o), torch.randn_like(lse)
    arguments = {
        "mean_compress": (torch.randn_like(k_cmp), k1, CFG.as_ints(), None, ""),
        "compressed_attention": (grad, grad_lse, q, k_cmp, v_cmp, o, lse, *where(41)),
        "selected_attention": (grad, None, q, k2, v2, idx, *slc, *where(41)),
        "window_attention": (grad, None, q, k2, v2, *win, *where(41)),
        "combine": (grad, o, o.clone(), o * 2, gates, ""),
    }[operator]
    torch.library.opcheck(getattr(torch.ops.nsa_port, f"{operator}_backward").default, arguments)


def test_lse_is_differentiable() -> None:
    q, k1, v1, *_ = inputs(41)
    k_cmp, v_cmp = (nsa_port.mean_compress(t, CFG) for t in (k1, v1))
    results = []
    for module in (nsa_port, nsa_port.reference):
        out, lse = module.compressed_attention(q, k_cmp, v_cmp, CFG)
        loss = (out**2).sum() + torch.where(lse.isfinite(), lse, 0).sin().sum()
        results.append(torch.autograd.grad(loss, (q, k1, v1), retain_graph=True))
    assert_same(*results)


def test_gradients_of_broadcast_gates_have_their_shape() -> None:
    tensors = inputs(41)
    for shape in ((3,), (1, 41, 1, 3), (1, 1, 4, 1)):
        gates = torch.rand(shape, dtype=torch.float64, requires_grad=True)
        out = whole(nsa_port, *tensors[:-1], gates)
        expected = whole(nsa_port.reference, *tensors[:-1], gates)
        assert_same(
            torch.autograd.grad(out.sum(), (gates,)), torch.autograd.grad(expected.sum(), (gates,))
        )


def test_backward_runs_where_forward_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs(41)
    with nsa_port.use_backend("torch"):
        out = whole(nsa_port, *tensors)
    asked: list[str] = []
    choose = registry.choose

    def spy(problem: object, device: object, request: str, **part: bool) -> object:
        asked.append(request)
        return choose(problem, device, request, **part)  # type: ignore[arg-type]

    monkeypatch.setattr(registry, "choose", spy)
    monkeypatch.setenv("NSA_PORT_BACKEND", "cuda")
    torch.autograd.grad(out.sum(), tensors)
    assert set(asked) == {"torch"}


def test_outputs_share_no_memory_with_inputs_or_each_other() -> None:
    q, k1, v1, *_, gates = inputs(41, grad=False)
    k_cmp, v_cmp = (nsa_port.mean_compress(t, CFG) for t in (k1, v1))
    given = (q, k_cmp, v_cmp, k1, v1, k1, v1, gates)
    results = torch.ops.nsa_port.nsa_attention(*given, *where(41))
    pointers = [t.untyped_storage().data_ptr() for t in (*results, *set(given))]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_results(dtype: torch.dtype) -> None:
    q, k1, v1, k2, v2, *_ = (t.to(dtype) for t in inputs(41, grad=False))
    out, lse = nsa_port.window_attention(q, k2, v2, CFG)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    k_cmp = nsa_port.mean_compress(k1, CFG)
    assert nsa_port.select_blocks(q, k_cmp, lse, CFG).dtype == torch.int32
    gates = torch.rand(3)
    v_cmp = nsa_port.mean_compress(v1, CFG)
    assert nsa_port.nsa_attention(q, k_cmp, v_cmp, k2, v2, k2, v2, gates, CFG).dtype == dtype


def test_a_transform_of_something_else_may_call_what_has_gradients() -> None:
    q, *keys, gates = inputs(20)

    def times(x: Tensor) -> Tensor:
        return x * whole(nsa_port, q, *keys, gates).sum()

    one = torch.ones((), dtype=torch.float64)
    assert_same((torch.func.grad(times)(one),), (times(one),))
