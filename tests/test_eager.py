"""The PyTorch kernels against the float64 reference, in both forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_port import reference
from nsa_port.kernels import eager as kernels
from nsa_port.kernels.eager import forms, workers
from nsa_port.kernels.eager.forms import Form
from nsa_port.kernels.geometry import Layout, NSAConfig
from tests.eager_cases import (
    CASES,
    SMALL,
    Case,
    assert_close,
    cumulative,
    make_inputs,
    reference_run,
)

eager: Any = kernels  # arguments are spread from lists below
by_name = {case.name: case for case in CASES}
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def form_name(form: Form) -> str:
    return form.name.lower()


in_every_form = pytest.mark.parametrize("form", Form, ids=form_name, indirect=True)
"""For the whole; a branch by itself has no form for few queries."""


@pytest.fixture(params=[Form.BLOCK_MAJOR, Form.STATIC], ids=form_name, autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Form:
    """Force one form on the CPU."""
    monkeypatch.setattr(forms, "choose", lambda *_: request.param)
    chosen: Form = request.param
    return chosen


def chosen_blocks(case: Case, q: Tensor, k_cmp: Tensor) -> Tensor:
    where = case.where if case.packed else {**case.where, "num_keys": case.S}
    _, lse = reference.compressed_attention(
        q.double(), k_cmp.double(), k_cmp.double(), case.config, scale=case.scale, **where
    )
    return reference.select_blocks(
        q.double(), k_cmp.double(), lse, case.config, scale=case.scale, **where
    )


def branch_arguments(operator: str, case: Case) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    x = make_inputs(case)
    grads = (x.grad, x.grad_lse)
    if operator == "compressed_attention":
        return [x.q, x.k_cmp, x.v_cmp], grads
    if operator == "window_attention":
        return [x.q, x.k_win, x.v_win], grads
    return [x.q, x.k_slc, x.v_slc, chosen_blocks(case, x.q, x.k_cmp)], grads


BRANCHES = ["compressed_attention", "selected_attention", "window_attention"]


@pytest.mark.parametrize("operator", BRANCHES)
@every_case
def test_branch_and_its_gradients_match_the_reference(operator: str, case: Case) -> None:
    tensors, grads = branch_arguments(operator, case)
    exact, exact_grads = reference_run(operator, case, tensors, grads, wide=True)
    plain, plain_grads = reference_run(operator, case, tensors, grads, wide=False)
    tail = (case.config, case.layout, case.scale)
    out, lse = getattr(eager, operator)(*tensors, *tail)
    assert out.dtype == case.dtype
    assert lse.dtype == torch.promote_types(case.dtype, torch.float32)
    assert out.is_contiguous()
    assert lse.is_contiguous()
    assert_close(out, exact[0], plain[0], "out")
    assert_close(lse, exact[1], plain[1], "lse")
    backward = getattr(eager, f"{operator}_backward")
    found = backward(grads[0], grads[1], *tensors, out, lse, *tail)
    for name, grad, *known in zip("qkv", found, exact_grads, plain_grads, strict=True):
        assert grad.dtype == case.dtype
        assert grad.is_contiguous()
        assert_close(grad, known[0], known[1], f"d{name}", source=grads[0], lse=lse)


@pytest.mark.parametrize("operator", BRANCHES)
def test_branch_gradients_without_a_gradient_of_lse(operator: str) -> None:
    case = by_name["plain"]
    tensors, (grad, _) = branch_arguments(operator, case)
    grads = (grad, torch.zeros(case.B, case.T, case.H))
    tail = (case.config, case.layout, case.scale)
    _, exact = reference_run(operator, case, tensors, grads, wide=True)
    _, plain = reference_run(operator, case, tensors, grads, wide=False)
    out, lse = getattr(eager, operator)(*tensors, *tail)
    found = getattr(eager, f"{operator}_backward")(grad, None, *tensors, out, lse, *tail)
    for name, *values in zip("qkv", found, exact, plain, strict=True):
        assert_close(values[0], values[1], values[2], f"d{name}", source=grad, lse=lse)


@every_case
def test_chosen_blocks_equal_the_reference(case: Case) -> None:
    x = make_inputs(case)
    _, lse = eager.compressed_attention(x.q, x.k_cmp, x.v_cmp, case.config, case.layout, case.scale)
    chosen = eager.select_blocks(x.q, x.k_cmp, lse, case.config, case.layout, case.scale)
    assert chosen.dtype == torch.int32
    assert torch.equal(chosen, chosen_blocks(case, x.q, x.k_cmp))


@every_case
def test_mean_compress_and_its_gradient_match_the_reference(case: Case) -> None:
    x = make_inputs(case).k_slc
    spare = case.spare_blocks
    cu = case.layout.cu_seqlens_k
    num_blocks = make_inputs(case).k_cmp.shape[1] + (2 if case.packed else 0)

    def run(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        y = reference.mean_compress(x, case.config, cu_seqlens=cu, num_blocks=num_blocks)
        (dx,) = torch.autograd.grad(
            y, x, grad.to(x.dtype), allow_unused=True, materialize_grads=True
        )
        return y.detach(), dx

    y = eager.mean_compress(x, case.config, case.layout, num_blocks)
    grad = torch.randn(y.shape).to(y.dtype)
    dx = eager.mean_compress_backward(grad, case.config, case.layout)
    exact, plain = run(x.double(), grad), run(x, grad)
    assert (y[:, num_blocks - spare :] == 0).all()
    assert_close(y, exact[0], plain[0], "y")
    assert_close(dx, exact[1], plain[1], "dx")


@pytest.mark.parametrize("name", ["plain", "batch", "bfloat16", "float64", "no_query"])
def test_combine_and_its_gradients_match_the_reference(name: str) -> None:
    x = make_inputs(by_name[name])
    outputs = [torch.randn(x.grad.shape).to(x.grad.dtype) for _ in range(3)]

    def run(tensors: list[Tensor]) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        out = reference.combine(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, x.grad.to(out.dtype))]

    out = eager.combine(*outputs, x.gates)
    found = [out, *eager.combine_backward(x.grad, *outputs, x.gates)]
    exact, plain = run([t.double() for t in (*outputs, x.gates)]), run([*outputs, x.gates])
    for what, *values in zip(
        ("out", "cmp", "slc", "win", "gates"), found, exact, plain, strict=True
    ):
        assert_close(values[0], values[1], values[2], what)


def test_combine_takes_expanded_gates() -> None:
    x = make_inputs(by_name["batch"])
    gates = torch.tensor([0.2, 0.5, 0.9]).expand(*x.grad.shape[:3], 3)
    outputs = [torch.randn(x.grad.shape) for _ in range(3)]
    dense = gates.contiguous()
    assert torch.equal(eager.combine(*outputs, gates), eager.combine(*outputs, dense))
    found = eager.combine_backward(x.grad, *outputs, gates)
    for a, b in zip(found, eager.combine_backward(x.grad, *outputs, dense), strict=True):
        assert torch.equal(a, b)


def run_everything(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """All operators, forward and backward, on given inputs."""
    x, tail = tensors, (case.config, case.layout, case.scale)
    results: dict[str, Tensor] = {}
    o_cmp, l_cmp = eager.compressed_attention(x["q"], x["k_cmp"], x["v_cmp"], *tail)
    indices = eager.select_blocks(x["q"], x["k_cmp"], l_cmp, *tail)
    o_slc, l_slc = eager.selected_attention(x["q"], x["k_slc"], x["v_slc"], indices, *tail)
    o_win, l_win = eager.window_attention(x["q"], x["k_win"], x["v_win"], *tail)
    results.update(o_cmp=o_cmp, l_cmp=l_cmp, indices=indices, o_slc=o_slc, l_slc=l_slc)
    results.update(o_win=o_win, l_win=l_win)
    grad = x["grad"]
    for key, found in {
        "cmp": eager.compressed_attention_backward(
            grad, None, x["q"], x["k_cmp"], x["v_cmp"], o_cmp, l_cmp, *tail
        ),
        "slc": eager.selected_attention_backward(
            grad, None, x["q"], x["k_slc"], x["v_slc"], indices, o_slc, l_slc, *tail
        ),
        "win": eager.window_attention_backward(
            grad, None, x["q"], x["k_win"], x["v_win"], o_win, l_win, *tail
        ),
    }.items():
        results.update(zip((f"dq_{key}", f"dk_{key}", f"dv_{key}"), found, strict=True))
    return results


def as_dict(case: Case) -> dict[str, Tensor]:
    x = make_inputs(case)
    return {name: getattr(x, name) for name in (*x.names, "grad")}


@pytest.mark.parametrize("name", ["batch", "packed", "shuffled", "bfloat16"])
def test_results_are_bit_equal_from_run_to_run(name: str) -> None:
    case = by_name[name]
    first, second = (run_everything(case, as_dict(case)) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["batch", "packed", "shuffled"])
def test_inputs_may_have_any_strides(name: str) -> None:
    case = by_name[name]
    dense = as_dict(case)
    strided = {}
    for key, x in dense.items():
        wide = torch.full((*x.shape[:2], x.shape[2] + 1, x.shape[3] + 3), torch.nan)
        view = wide[:, :, 1:, 2 : 2 + x.shape[3]]
        view.copy_(x)
        strided[key] = view
    expected, found = run_everything(case, dense), run_everything(case, strided)
    torch.testing.assert_close(found, expected)


def test_keys_may_be_expanded_over_the_batch() -> None:
    case = by_name["batch"]
    dense = as_dict(case)
    shared = {
        key: x[:1].expand_as(x) if key.startswith(("k_", "v_")) else x for key, x in dense.items()
    }
    expected = run_everything(case, {key: x.contiguous() for key, x in shared.items()})
    torch.testing.assert_close(run_everything(case, shared), expected)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["packed", "packed_cache", "packed_shuffled"])
def test_what_one_sequence_holds_never_reaches_another(name: str, poison: float) -> None:
    case = by_name[name]
    clean, dirty = as_dict(case), as_dict(case)
    sick = 2 if name == "packed_cache" else 3
    cu_q, cu_k = (bounds.tolist() for bounds in case.cu_seqlens)
    cu_c = case.layout.compressed_cu_seqlens(case.config).tolist()
    where = {"q": cu_q, "grad": cu_q, "gates": cu_q, "k_cmp": cu_c, "v_cmp": cu_c}
    for key, x in dirty.items():
        bounds = where.get(key, cu_k)
        x[:, bounds[sick] : bounds[sick + 1]] = poison
    expected, found = run_everything(case, clean), run_everything(case, dirty)
    for key, value in expected.items():
        bounds = cu_q
        if key in ("dk_cmp", "dv_cmp"):
            bounds = cu_c
        elif key.startswith(("dk", "dv")):
            bounds = cu_k
        healthy = torch.ones(value.shape[1], dtype=torch.bool)
        healthy[bounds[sick] : bounds[sick + 1]] = False
        assert torch.equal(value[:, healthy], found[key][:, healthy]), key


@pytest.mark.parametrize("name", ["batch", "holes_per_batch_entry"])
def test_what_one_batch_entry_or_group_holds_never_reaches_another(name: str) -> None:
    case = Case("two_by_two", B=2, positions=by_name[name].positions)
    clean, dirty = as_dict(case), as_dict(case)
    for key, x in dirty.items():
        half = x.shape[2] // 2
        x[1, :, half:] = torch.nan
        if key in ("q", "grad"):
            x[1, 3] = torch.nan
    expected, found = run_everything(case, clean), run_everything(case, dirty)
    for key, value in expected.items():
        assert torch.equal(value[0], found[key][0]), key
        if key.startswith(("dk", "dv")):
            continue  # token 3 of the second entry is sick in both groups
        half = value.shape[2] // 2
        rows = torch.arange(case.T) != 3
        assert torch.equal(value[1, rows, :half], found[key][1, rows, :half]), key


def test_a_nan_inside_the_own_sequence_is_not_swallowed() -> None:
    for name in ("plain", "packed"):
        case = by_name[name]
        for branch in ("cmp", "slc", "win"):
            tensors = as_dict(case)
            tensors[f"v_{branch}"][:] = torch.nan
            out = run_everything(case, tensors)[f"o_{branch}"]
            seen = run_everything(case, as_dict(case))[f"l_{branch}"] != -torch.inf
            assert out[seen].isnan().all(), (name, branch)


def test_padded_rows_give_and_take_nothing() -> None:
    case = by_name["holes_per_batch_entry"]
    tensors = as_dict(case)
    assert case.positions is not None
    padded = case.positions == -1
    for key in ("q", "grad"):
        tensors[key][padded] = torch.nan
    results = run_everything(case, tensors)
    for branch in ("cmp", "slc", "win"):
        assert (results[f"o_{branch}"][padded] == 0).all()
        assert (results[f"l_{branch}"][padded] == -torch.inf).all()
        assert (results[f"dq_{branch}"][padded] == 0).all()
        assert not results[f"dk_{branch}"].isnan().any()
        assert not results[f"dv_{branch}"].isnan().any()
    assert (results["indices"][padded] == -1).all()


def test_indices_out_of_range_are_ignored() -> None:
    case = by_name["batch"]
    x = make_inputs(case)
    tail = (case.config, case.layout, case.scale)
    sane = chosen_blocks(case, x.q, x.k_cmp)
    junk = torch.tensor([-7, 5_000, 2**31 - 1, -(2**31)], dtype=torch.int32)
    wild = torch.cat([sane, junk.expand(*sane.shape[:3], 4)], dim=-1)
    expected = eager.selected_attention(x.q, x.k_slc, x.v_slc, sane, *tail)
    found = eager.selected_attention(x.q, x.k_slc, x.v_slc, wild, *tail)
    torch.testing.assert_close(found, expected)
    grads = [
        eager.selected_attention_backward(
            x.grad, None, x.q, x.k_slc, x.v_slc, indices, *expected, *tail
        )
        for indices in (sane, wild)
    ]
    torch.testing.assert_close(*grads)


def test_a_block_named_twice_counts_once() -> None:
    case = by_name["plain"]
    x = make_inputs(case)
    tail = (case.config, case.layout, case.scale)
    once = chosen_blocks(case, x.q, x.k_cmp)
    twice = torch.cat([once, once], dim=-1)
    expected = eager.selected_attention(x.q, x.k_slc, x.v_slc, once, *tail)
    found = eager.selected_attention(x.q, x.k_slc, x.v_slc, twice, *tail)
    torch.testing.assert_close(found, expected)


def test_ties_go_to_the_lower_block() -> None:
    """Equal keys make equal scores in the middle of the sequence."""
    config = NSAConfig(4, 4, 4, 4, 1, 1, 4)
    q, k = torch.randn(1, 64, 2, 8), torch.ones(1, 16, 1, 8)
    layout = Layout(64)
    _, lse = eager.compressed_attention(q, k, k, config, layout, 1.0)
    chosen = eager.select_blocks(q, k, lse, config, layout, 1.0)
    assert chosen[0, 63, 0].tolist() == [0, 1, 2, 15]


def test_a_visible_block_whose_score_underflows_is_still_a_candidate() -> None:
    config = NSAConfig(4, 4, 4, 3, 0, 1, 4)
    q = torch.ones(1, 32, 1, 1)
    k = torch.full((1, 8, 1, 1), -300.0)
    k[0, 5] = 300.0
    layout = Layout(32)
    _, lse = eager.compressed_attention(q, k, k, config, layout, 1.0)
    chosen = eager.select_blocks(q, k, lse, config, layout, 1.0)
    assert chosen[0, 31, 0].tolist() == [0, 5, 7]


def test_inputs_are_left_as_they_were() -> None:
    for name in ("batch", "packed"):
        case = by_name[name]
        tensors = as_dict(case)
        before = {key: x.clone() for key, x in tensors.items()}
        run_everything(case, tensors)
        assert all(torch.equal(before[key], x) for key, x in tensors.items())


def test_cu_seqlens_that_point_nowhere_stay_in_bounds(form: Form) -> None:
    """Device tensors are not checked; what comes out is arbitrary, but nothing is read outside."""
    case = Case("wild", lengths=((20, 20), (30, 30)))
    tensors = as_dict(case)
    wild = Layout(50, cumulative([90, -60]), cumulative([400, -20]))
    if form is not Form.STATIC:
        pytest.skip("this form only takes CPU tensors, which are checked")
    tail = (SMALL, wild, 1.0)
    out, lse = eager.window_attention(tensors["q"], tensors["k_win"], tensors["v_win"], *tail)
    eager.window_attention_backward(
        tensors["grad"], None, tensors["q"], tensors["k_win"], tensors["v_win"], out, lse, *tail
    )
    eager.compressed_attention(tensors["q"], tensors["k_cmp"], tensors["v_cmp"], *tail)


@in_every_form
@every_case
def test_the_whole_and_its_gradients_match_the_reference(case: Case, form: Form) -> None:
    x = make_inputs(case)
    tail = (case.config, case.layout, case.scale)
    tensors = x.tensors()
    whole = eager.nsa_attention(*tensors, *tail, True)
    assert torch.equal(whole.indices, chosen_blocks(case, x.q, x.k_cmp))
    exact, exact_grads = reference_run("nsa_attention", case, tensors, (x.grad,), wide=True)
    plain, plain_grads = reference_run("nsa_attention", case, tensors, (x.grad,), wide=False)
    assert_close(whole.out, exact[0], plain[0], "out")
    found = eager.nsa_attention_backward(x.grad, *tensors, whole, *tail)
    for what, *values in zip(x.names, found, exact_grads, plain_grads, strict=True):
        assert values[0].dtype == case.dtype
        assert_close(values[0], values[1], values[2], f"d{what}", source=x.grad, lse=whole.lse)


@in_every_form
def test_the_whole_keeps_branch_outputs_only_for_gradients(form: Form) -> None:
    case = by_name["plain"]
    x = make_inputs(case)
    tail = (case.config, case.layout, case.scale)
    kept, dropped = (eager.nsa_attention(*x.tensors(), *tail, needs) for needs in (True, False))
    assert torch.equal(kept.out, dropped.out)
    for branch in ("o_cmp", "o_slc", "o_win"):
        assert getattr(kept, branch).shape == x.grad.shape
        assert getattr(dropped, branch).numel() == 0


@pytest.mark.parametrize("name", ["batch", "packed", "holes_per_batch_entry"])
def test_threads_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = by_name[name]
    alone = run_everything(case, as_dict(case))
    before = torch.get_num_threads()
    monkeypatch.setattr(workers, "_LEAST_WORK", 0)
    torch.set_num_threads(2)
    try:
        shared = run_everything(case, as_dict(case))
        with torch.inference_mode():
            inferred = run_everything(case, as_dict(case))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(alone[key], shared[key]) for key in alone)
    assert all(torch.equal(alone[key], inferred[key]) for key in alone)


def test_an_error_in_a_worker_reaches_the_caller() -> None:
    def fail() -> None:
        raise ValueError("from a worker")

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="from a worker"):
            workers.run([fail, fail], 1 << 40)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_only_a_cpu_takes_a_form_that_reads_data_on_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    for device in ("cuda", "hip", "mps", "xpu", "npu", "xla", "a device nobody knows"):
        assert {forms.choose(device, T) for T in (0, 1, 10_000)} == {Form.STATIC}
    assert forms.choose("cpu", 1) is Form.FEW
    assert forms.choose("cpu", 10_000) is Form.BLOCK_MAJOR


@in_every_form
@pytest.mark.parametrize("name", ["packed", "packed_cache"])
def test_the_whole_keeps_sequences_apart(name: str, form: Form) -> None:
    case = by_name[name]
    clean, dirty = make_inputs(case), make_inputs(case)
    tail = (case.config, case.layout, case.scale)
    cu_q, cu_k = (bounds.tolist() for bounds in case.cu_seqlens)
    cu_c = case.layout.compressed_cu_seqlens(case.config).tolist()
    sick = 3
    for x, bounds in zip(dirty.tensors(), [cu_q, *[cu_c] * 2, *[cu_k] * 4, cu_q], strict=True):
        x[:, bounds[sick] : bounds[sick + 1]] = torch.nan
    expected, found = (eager.nsa_attention(*x.tensors(), *tail, True) for x in (clean, dirty))
    healthy = torch.ones(cu_q[-1], dtype=torch.bool)
    healthy[cu_q[sick] : cu_q[sick + 1]] = False
    for name in ("out", "indices"):
        a, b = (getattr(result, name)[:, healthy] for result in (expected, found))
        assert torch.equal(a, b)
    assert found.out[:, ~healthy].isnan().all()
