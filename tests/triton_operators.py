"""What holds for every Triton operator, wherever it runs.

Not collected by name: `test_triton_interpreter.py` runs it in a process of its own, where Triton
interprets the kernels on CPU tensors. On a machine with a GPU run it directly, compiled:
`pytest tests/triton_operators.py`; with `NSA_PORT_EMULATE=gfx942` it runs on that GPU emulated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import nsa_port
from nsa_port import emulator, reference, settings
from nsa_port.kernels import amd
from nsa_port.kernels import triton as of_cuda
from nsa_port.kernels.geometry import Layout, NSAConfig
from nsa_port.kernels.tables import tuned_to
from nsa_port.kernels.triton import selected, selection
from nsa_port.kernels.triton.bounds import Kind, cut_tiles, query_bounds
from nsa_port.kernels.triton.preparation import backward_rows
from nsa_port.kernels.triton.selected_backward import selected_gradients
from nsa_port.kernels.triton.sharing import share_blocks
from tests.bounds_checked import check_bounds
from tests.eager_cases import (
    CASES,
    SMALL,
    Case,
    assert_close,
    cumulative,
    make_inputs,
    no_waiting,
    reference_run,
)

EMULATED = settings.value("NSA_PORT_EMULATE")
DEVICE = "cuda" if torch.cuda.is_available() and not EMULATED else "cpu"
kernels = amd if EMULATED or torch.version.hip else of_cuda
BRANCHES = ["compressed_attention", "selected_attention", "window_attention"]

MORE_BLOCKS = replace(SMALL, num_selected=4, local_blocks=1)
CASES_OF_OUR_OWN = [
    Case("short", T=26, S=26),
    Case("group_of_5", T=20, S=52, H=5, HK=1),
    Case("group_of_12", T=12, S=40, H=24, HK=2, Dk=24, Dv=40),
    Case("group_of_64", T=5, S=40, H=64, HK=1, Dk=16, Dv=16),
    Case("heads_192_128", T=10, S=40, H=2, HK=1, Dk=192, Dv=128),
    Case("heads_80_256", T=10, S=40, H=2, HK=1, Dk=80, Dv=256),
    Case("heads_100_36", T=10, S=40, H=2, HK=1, Dk=100, Dv=36),
    Case("blocks_of_12", config=NSAConfig(8, 4, 12, 4, 1, 1, 24), T=40, S=120),
    Case("blocks_of_200", config=NSAConfig(8, 4, 200, 2, 0, 1, 24), T=20, S=450),
    Case("few_queries", T=3, S=300, HK=1),
    Case("few_queries_packed", lengths=((2, 260), (0, 0), (1, 5), (1, 150))),
    Case("many_blocks", config=MORE_BLOCKS, T=40, S=300),
    Case("many_blocks_literal", config=replace(MORE_BLOCKS, score_map="literal"), T=40, S=300),
    Case("many_blocks_packed", config=MORE_BLOCKS, lengths=((10, 150), (0, 0), (30, 200))),
]
PAPER = NSAConfig()
CASES_FOR_A_GPU = [
    Case("paper", PAPER, T=700, S=700, H=16, HK=1, Dk=128, Dv=128, dtype=torch.bfloat16),
    Case("paper_192", PAPER, T=400, S=900, H=32, HK=2, Dk=192, Dv=128, dtype=torch.bfloat16),
    Case("paper_group_4", PAPER, T=1500, S=1500, H=8, HK=2, Dk=128, Dv=128, dtype=torch.float16),
    Case("paper_decode", PAPER, B=3, T=1, S=1900, H=16, HK=1, Dk=128, Dv=128, dtype=torch.bfloat16),
    Case("paper_64", PAPER, T=300, S=300, H=12, HK=1, Dk=64, Dv=64, dtype=torch.float16),
    Case("paper_256", PAPER, T=200, S=300, H=4, HK=1, Dk=256, Dv=256, dtype=torch.bfloat16),
    Case("paper_float32", PAPER, T=300, S=400, H=4, HK=1, Dk=128, Dv=128),
    Case(
        "paper_packed", PAPER, H=16, HK=1, Dk=128, Dv=128, dtype=torch.bfloat16,
        lengths=((300, 300), (0, 0), (31, 31), (40, 500), (1, 1700), (130, 130)),
    ),
]  # fmt: skip


def _every_case() -> list[Case]:
    """All cases on a GPU; what stands in for one is slow, and the interpreter wrong in bfloat16."""
    cases = [case for case in (*CASES, *CASES_OF_OUR_OWN) if case.dtype != torch.float64]
    if DEVICE == "cuda":
        return [*cases, *CASES_FOR_A_GPU]
    if not EMULATED:
        cases = [case for case in cases if case.dtype != torch.bfloat16]
    dense = [case.positions is None and not case.packed for case in cases]
    return [
        replace(case, T=min(case.T, 16)) if cut else case
        for case, cut in zip(cases, dense, strict=True)
    ]


EVERY = _every_case()
every_case = pytest.mark.parametrize("case", EVERY, ids=str)
by_name = {case.name: case for case in EVERY}


def on_device(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


def device_layout(case: Case) -> Layout:
    layout = case.layout
    moved = (
        None if tensor is None else tensor.to(DEVICE)
        for tensor in (layout.cu_seqlens, layout.cu_seqlens_k, layout.positions)
    )
    return Layout(layout.num_keys, *moved)


def tail(case: Case) -> tuple[NSAConfig, Layout, float]:
    return case.config, device_layout(case), case.scale


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


def check_branch(operator: str, case: Case) -> None:
    tensors, grads = branch_arguments(operator, case)
    exact, exact_grads = reference_run(operator, case, tensors, grads, wide=True)
    plain, plain_grads = reference_run(operator, case, tensors, grads, wide=False)
    moved = on_device(*tensors)
    out, lse = getattr(kernels, operator)(*moved, *tail(case))
    assert out.dtype == case.dtype
    assert lse.dtype == torch.float32
    assert out.is_contiguous()
    assert lse.is_contiguous()
    assert_close(out.cpu(), exact[0], plain[0], "out")
    assert_close(lse.cpu(), exact[1], plain[1], "lse")
    backward = getattr(kernels, f"{operator}_backward")
    found = backward(*on_device(*grads), *moved, out, lse, *tail(case))
    for name, *gradient in zip("qkv", found, exact_grads, plain_grads, strict=True):
        assert gradient[0].dtype == case.dtype
        assert gradient[0].is_contiguous()
        gradient[0] = gradient[0].cpu()
        assert_close(*gradient, f"d{name}", source=grads[0], lse=lse.cpu())


@pytest.fixture(autouse=True)
def _in_bounds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever stands in for a GPU checks every access, an emulated one data races as well."""
    if EMULATED:
        races = request.node.get_closest_marker("writes_overlap") is None
        with emulator.emulated(EMULATED, races=races, keep=False):
            yield
        return
    if DEVICE == "cpu":
        check_bounds(monkeypatch)
    yield


@pytest.mark.parametrize("operator", BRANCHES)
@every_case
def test_branch_and_its_gradients_match_the_reference(operator: str, case: Case) -> None:
    check_branch(operator, case)


@pytest.fixture
def by_block(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Selected attention by block whatever the size, with short segments and several chunks."""
    monkeypatch.setattr(selected, "query_chunk", lambda T, *_: max(1, -(-T // 2)))
    monkeypatch.setattr(
        "nsa_port.kernels.triton.selected_backward.query_chunk", lambda T, *_: max(1, -(-T // 2))
    )
    always = {"fewest_queries": 0, "largest_group": 64, "segment": 8}
    with tuned_to({"selected_by_block": always, "selected_backward": {"segment": 8}}):
        yield


BY_BLOCK = [
    "longer_cache", "block_of_one", "holes_per_batch_entry", "packed", "packed_cache", "float16",
    "group_of_5", "heads_192_128", "blocks_of_12", "blocks_of_200",
]  # fmt: skip


@pytest.mark.parametrize("name", BY_BLOCK)
@pytest.mark.usefixtures("by_block")
def test_selected_attention_by_block_matches_the_reference(name: str) -> None:
    check_branch("selected_attention", by_name[name])


@pytest.mark.parametrize("name", ["short", "packed", "group_of_5"])
@pytest.mark.usefixtures("by_block")
def test_a_gate_inside_the_gradients_is_a_gate_on_the_output(name: str) -> None:
    case = by_name[name]
    tensors, (grad, _) = branch_arguments("selected_attention", case)
    gate = torch.rand(grad.shape[:3])
    *tensors, grad, gate = on_device(*tensors, grad, gate)
    config, layout, scale = arguments = tail(case)
    out, lse = kernels.selected_attention(*tensors, *arguments)
    gated = grad * gate[..., None]
    wanted = kernels.selected_attention_backward(gated, None, *tensors, out, lse, *arguments)
    q, k = tensors[:2]
    dq = torch.randn(q.shape, device=DEVICE)
    wanted = (wanted[0] + dq, *wanted[1:])
    bounds = query_bounds(Kind.CAUSAL, q.shape[1], k.shape[1], config, layout, q.device)
    rows = (grad, *backward_rows(grad, None, out, lse, by_head=False))
    found = selected_gradients(rows, *tensors, bounds, config, layout, scale, gate=gate, dq=dq)
    assert found[0] is dq
    for gradient, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [-0.4, 0.0, 1.5])
@pytest.mark.parametrize("operator", BRANCHES)
def test_any_scale(operator: str, scale: float) -> None:
    case = Case("scaled", T=12, S=30)
    tensors, grads = branch_arguments(operator, case)
    leaves = [t.double() if t.is_floating_point() else t for t in tensors]
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in leaves]
    options = {"num_keys": case.S} if operator == "compressed_attention" else {}
    out, lse = getattr(reference, operator)(*leaves, case.config, scale=scale, **options)
    wanted = torch.autograd.grad(out, leaves[:3], grads[0].double())
    moved, arguments = on_device(*tensors), (case.config, device_layout(case), scale)
    found, found_lse = getattr(kernels, operator)(*moved, *arguments)
    torch.testing.assert_close(found.cpu().double(), out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_lse.cpu().double(), lse, rtol=1e-5, atol=1e-5)
    backward = getattr(kernels, f"{operator}_backward")
    gradients = backward(grads[0].to(DEVICE), None, *moved, found, found_lse, *arguments)
    for gradient, exact in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient.cpu().double(), exact, rtol=1e-4, atol=1e-4)


@every_case
def test_chosen_blocks_equal_the_reference(case: Case) -> None:
    x = make_inputs(case)
    wanted = chosen_blocks(case, x.q, x.k_cmp)
    moved = on_device(x.q, x.k_cmp, x.v_cmp)
    where = case.where if case.packed else {**case.where, "num_keys": case.S}
    _, lse = reference.compressed_attention(
        *(t.double() for t in (x.q, x.k_cmp, x.v_cmp)), case.config, scale=case.scale, **where
    )
    chosen = kernels.select_blocks(*moved[:2], lse.float().to(DEVICE), *tail(case))
    assert chosen.dtype == torch.int32
    assert torch.equal(chosen.cpu(), wanted)


@pytest.mark.parametrize("name", ["many_blocks", "many_blocks_literal"])
def test_scores_too_many_to_hold_choose_the_same_blocks(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "_TOP_BLOCKS", (4,))
    monkeypatch.setattr(selection, "_SCORE_BYTES", 1)
    test_chosen_blocks_equal_the_reference(by_name[name])


def test_ties_go_to_the_lower_block() -> None:
    """Equal keys make equal scores in the middle of the sequence."""
    config = NSAConfig(4, 4, 4, 4, 1, 1, 4)
    q, k = on_device(torch.randn(1, 64, 2, 8), torch.ones(1, 16, 1, 8))
    _, lse = kernels.compressed_attention(q, k, k, config, Layout(64), 1.0)
    chosen = kernels.select_blocks(q, k, lse, config, Layout(64), 1.0)
    assert chosen[0, 63, 0].tolist() == [0, 1, 2, 15]


def test_a_visible_block_whose_score_underflows_is_still_a_candidate() -> None:
    config = NSAConfig(4, 4, 4, 3, 0, 1, 4)
    q, k = torch.ones(1, 32, 1, 1, device=DEVICE), torch.full((1, 8, 1, 1), -300.0, device=DEVICE)
    k[0, 5] = 300.0
    _, lse = kernels.compressed_attention(q, k, k, config, Layout(32), 1.0)
    chosen = kernels.select_blocks(q, k, lse, config, Layout(32), 1.0)
    assert chosen[0, 31, 0].tolist() == [0, 5, 7]


SCORES = {
    "random": lambda shape: torch.rand(shape),
    "huge_spread": lambda shape: torch.exp2(torch.randint(-149, 120, shape).float()),
    "equal": lambda shape: torch.full(shape, 0.25),
    "zero": lambda shape: torch.zeros(shape),
    "few_values": lambda shape: torch.randint(0, 4, shape).float(),
    "best_of_few_groups": lambda shape: torch.rand(shape) + 9 * (torch.arange(shape[-1]) % 128 < 2),
}


@pytest.mark.parametrize(("blocks", "held"), [(1, 128), (40, 128), (700, 1024), (700, 256)])
@pytest.mark.parametrize("config", [(16, 1, 2), (1, 0, 0), (2, 1, 1), (64, 0, 1)], ids=str)
@pytest.mark.parametrize("scores", SCORES)
def test_choice_is_exact_whatever_the_scores(
    scores: str,
    config: tuple[int, int, int],
    blocks: int,
    held: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Forced blocks, then the best ones, of equals the lower one; also where too many to hold."""
    monkeypatch.setattr(selection, "_TOP_BLOCKS", (held,))
    n, initial, local = config
    torch.manual_seed(0)
    T, B, HK = 1, 2, 2
    block_config = NSAConfig(4, 4, 4, n, initial, local, 4)
    layout = Layout(4 * blocks)
    tiles = cut_tiles(T, 2, None)
    half = -(-blocks // 4) * 4
    own, carried = (SCORES[scores]((2 * tiles.count, B, HK, half)) for _ in range(2))
    ranked = own + carried
    ranked[..., 0] = own[..., 0]
    ranked[..., :initial] = ranked[..., max(0, blocks - local) :] = torch.inf
    wanted = ranked[..., :blocks].sort(stable=True, descending=True).indices[..., :n]
    wanted = torch.nn.functional.pad(wanted.sort(-1).values, (0, n - wanted.shape[-1]), value=-1)
    (both,) = on_device(torch.cat([own, carried], -1))
    visible, causal = (
        query_bounds(kind, T, rows, block_config, layout, torch.device(DEVICE))
        for kind, rows in ((Kind.COMPRESSED, blocks), (Kind.CAUSAL, layout.num_keys))
    )
    (indices,) = on_device(torch.full((B, T, HK, n), -7, dtype=torch.int32))
    found = selection.Scored(
        both, 2 * half, True, True, tiles, 0, tiles.count, 2, visible, causal, blocks
    )
    selection.choose_blocks(indices, found, block_config)
    assert torch.equal(indices.cpu()[:, 0].long(), wanted[0])


@every_case
def test_mean_compress_and_its_gradient_match_the_reference(case: Case) -> None:
    x = make_inputs(case).k_slc
    cu = case.layout.cu_seqlens_k
    num_blocks = make_inputs(case).k_cmp.shape[1] + 2
    leaf = x.double().requires_grad_()
    exact = reference.mean_compress(leaf, case.config, cu_seqlens=cu, num_blocks=num_blocks)
    plain = reference.mean_compress(x, case.config, cu_seqlens=cu, num_blocks=num_blocks)
    y = kernels.mean_compress(x.to(DEVICE), case.config, device_layout(case), num_blocks)
    assert_close(y.cpu(), exact.detach(), plain, "y")
    grad = torch.randn(y.shape).to(y.dtype)
    dx = kernels.mean_compress_backward(grad.to(DEVICE), case.config, device_layout(case))
    (wanted,) = torch.autograd.grad(
        exact, leaf, grad.double(), allow_unused=True, materialize_grads=True
    )
    assert_close(dx.cpu(), wanted, wanted.to(x.dtype), "dx")


@pytest.mark.parametrize("name", ["group_of_5", "heads_100_36", "batch", "no_query", "float16"])
def test_combine_and_its_gradients_match_the_reference(name: str) -> None:
    x = make_inputs(by_name[name])
    tensors = [*(torch.randn(x.grad.shape).to(x.grad.dtype) for _ in range(3)), x.gates]

    def run(tensors: list[Tensor]) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        out = reference.combine(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, x.grad.to(out.dtype))]

    moved = on_device(*tensors)
    found = [kernels.combine(*moved), *kernels.combine_backward(x.grad.to(DEVICE), *moved)]
    exact, plain = run([t.double() for t in tensors]), run(tensors)
    names = ("out", "cmp", "slc", "win", "gates")
    for what, value, *others in zip(names, found, exact, plain, strict=True):
        assert_close(value.cpu(), *others, what)


def test_combine_takes_expanded_gates() -> None:
    shape = (2, 7, 4, 12)
    outputs = [torch.randn(shape, device=DEVICE) for _ in range(3)]
    gates = torch.tensor([0.2, 0.5, 0.9], device=DEVICE).expand(*shape[:3], 3)
    assert torch.equal(kernels.combine(*outputs, gates), kernels.combine(*outputs, gates.clone()))
    one = torch.tensor(0.3, device=DEVICE).expand(*shape[:3], 3)
    grad = torch.randn(shape, device=DEVICE)
    found = kernels.combine_backward(grad, *outputs, one)
    for a, b in zip(found, kernels.combine_backward(grad, *outputs, one.clone()), strict=True):
        assert torch.equal(a, b)


def as_dict(case: Case) -> dict[str, Tensor]:
    x = make_inputs(case)
    return {name: getattr(x, name).to(DEVICE) for name in (*x.names, "grad")}


def run_everything(case: Case, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every attention operator on given inputs, forward and backward."""
    arguments = tail(case)
    results: dict[str, Tensor] = {}
    for branch, name in zip(("cmp", "slc", "win"), BRANCHES, strict=True):
        inputs = [x["q"], x[f"k_{branch}"], x[f"v_{branch}"]]
        if branch == "slc":
            lse = results["lse_cmp"]
            results["indices"] = kernels.select_blocks(x["q"], x["k_cmp"], lse, *arguments)
            inputs.append(results["indices"])
        out, lse = getattr(kernels, name)(*inputs, *arguments)
        results[f"out_{branch}"], results[f"lse_{branch}"] = out, lse
        backward = getattr(kernels, f"{name}_backward")
        found = backward(x["grad"], None, *inputs, out, lse, *arguments)
        results.update(zip((f"dq_{branch}", f"dk_{branch}", f"dv_{branch}"), found, strict=True))
    return results


TINY = Case("tiny", T=9, S=30, B=2)
TINY_PACKED = Case("tiny_packed", lengths=((5, 5), (0, 0), (3, 18), (7, 13)))


@pytest.mark.parametrize("case", [TINY, TINY_PACKED], ids=str)
@pytest.mark.usefixtures("by_block")
def test_results_are_bit_equal_from_run_to_run(case: Case) -> None:
    first, second = (run_everything(case, as_dict(case)) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("case", [TINY, TINY_PACKED], ids=str)
def test_inputs_may_have_any_strides(case: Case) -> None:
    dense = as_dict(case)
    strided = {}
    for key, x in dense.items():
        shape = (x.shape[1], x.shape[0], x.shape[2] + 1, x.shape[3] + 3)
        wide = torch.full(shape, torch.nan, device=DEVICE).transpose(0, 1)
        strided[key] = wide[:, :, 1:, 2 : 2 + x.shape[3]]
        strided[key].copy_(x)
    expected, found = run_everything(case, dense), run_everything(case, strided)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_one_sequence_holds_never_reaches_another(poison: float) -> None:
    case, sick = TINY_PACKED, 2
    clean, dirty = as_dict(case), as_dict(case)
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


def test_padded_rows_give_and_take_nothing() -> None:
    positions = torch.arange(18, dtype=torch.int32)
    positions[::4] = -1
    case = Case("padded", T=18, S=18, positions=positions)
    x = as_dict(case)
    padded = (positions == -1).to(DEVICE)
    for key in ("q", "grad"):
        x[key][:, padded] = torch.nan
    results = run_everything(case, x)
    for branch in ("cmp", "slc", "win"):
        assert (results[f"out_{branch}"][:, padded] == 0).all()
        assert (results[f"lse_{branch}"][:, padded] == -torch.inf).all()
        assert (results[f"dq_{branch}"][:, padded] == 0).all()
        assert not results[f"dk_{branch}"].isnan().any()
        assert not results[f"dv_{branch}"].isnan().any()
    assert (results["indices"][:, padded] == -1).all()


@pytest.mark.parametrize("design", ["by_query", "by_block"])
def test_indices_out_of_range_or_named_twice_are_ignored(
    design: str, request: pytest.FixtureRequest
) -> None:
    if design == "by_block":
        request.getfixturevalue("by_block")
    x = make_inputs(TINY)
    sane = chosen_blocks(TINY, x.q, x.k_cmp)
    junk = torch.tensor([-7, 5_000, 2**31 - 1, -(2**31), 0], dtype=torch.int32)
    wild = torch.cat([sane, junk.expand(*sane.shape[:3], 5)], dim=-1)
    grad, q, k, v, sane, wild = on_device(x.grad, x.q, x.k_slc, x.v_slc, sane, wild)
    results = []
    for indices in (sane, wild):
        config = replace(SMALL, num_selected=indices.shape[-1])
        out, lse = kernels.selected_attention(q, k, v, indices, config, Layout(TINY.S), 0.3)
        arguments = (q, k, v, indices, out, lse, config, Layout(TINY.S), 0.3)
        results.append((out, lse, *kernels.selected_attention_backward(grad, None, *arguments)))
    torch.testing.assert_close(*results)


@pytest.mark.skipif(DEVICE != "cuda", reason="warps take turns on a GPU only")
@pytest.mark.parametrize("kv_heads", [2, 8, 16, 32], ids=lambda heads: f"group_of_{32 // heads}")
def test_selected_attention_of_many_queries_is_the_same_every_time(kv_heads: int) -> None:
    torch.manual_seed(0)
    q, k, v, k_cmp = (
        torch.randn(1, length, heads, 128, dtype=torch.bfloat16, device=DEVICE)
        for length, heads in ((4096, 32), (4096, kv_heads), (4096, kv_heads), (255, kv_heads))
    )
    tail = (PAPER, Layout(4096), 0.09)
    _, lse = kernels.compressed_attention(q, k_cmp, k_cmp, *tail)
    indices = kernels.select_blocks(q, k_cmp, lse, *tail)
    first = kernels.selected_attention(q, k, v, indices, *tail)
    for _ in range(20):
        again = kernels.selected_attention(q, k, v, indices, *tail)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    for by_block in (0, 1 << 30):
        design = {"fewest_queries": by_block, "fewest_of_large": by_block}
        with tuned_to({"hopper_by_block": design}):
            again = kernels.selected_attention(q, k, v, indices, *tail)
        torch.testing.assert_close(again[0], first[0], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(again[1], first[1], rtol=0.0, atol=1e-4)


def test_in_place_of_no_block_stands_one_that_its_query_sees_to_the_end() -> None:
    x = make_inputs(TINY)
    indices, q = on_device(chosen_blocks(TINY, x.q, x.k_cmp), x.q)
    T, m = TINY.T, SMALL.select_block_size
    layout = Layout(TINY.S)
    bounds = query_bounds(Kind.CAUSAL, T, TINY.S, SMALL, layout, q.device)
    shares = share_blocks(indices, bounds, m, cut_tiles(T, 4, None), 4, 2, True)
    for t in range(T):
        upper = int(bounds.upper.flatten()[t])
        for own, chosen in zip(shares.own[0, t], indices[0, t], strict=True):
            rows = {int(block) * m for block in chosen if block >= 0}
            whole = {row for row in rows if row + m <= upper}
            none = {int(row) for row in own if row < 0}
            assert {int(row) for row in own if row >= 0} <= rows
            assert all(-2 - row in whole for row in none if row < -1)
            assert -1 not in none or not whole


# The largest tiles are those of a kernel for Hopper.
@pytest.mark.parametrize("queries", [4, 32] if EMULATED else [4, 32, 64])
def test_a_chosen_block_is_its_querys_own_or_shared_but_never_both(queries: int) -> None:
    torch.manual_seed(0)
    T, m, n, least = 90, SMALL.select_block_size, SMALL.num_selected, queries // 2
    # Such positions leave one block that is not seen to the end to each of many queries.
    layout = Layout(400, positions=torch.randperm(400, dtype=torch.int32)[:T].to(DEVICE))
    bounds = query_bounds(Kind.CAUSAL, T, 400, SMALL, layout, torch.device(DEVICE))
    indices = torch.randint(-2, 6, (1, T, 1, n), dtype=torch.int32)
    last = (bounds.upper[0].cpu() - 1) // m
    indices[0, :, 0, 0] = torch.where(torch.rand(T) < 0.5, last, indices[0, :, 0, 0])
    tiles = cut_tiles(T, queries, None)
    shares = share_blocks(indices.to(DEVICE), bounds, m, tiles, queries, least, True)
    upper = [int(stop) for stop in bounds.upper[0]]
    chosen = [
        {int(block) * m for block in row if 0 <= block * m < stop}
        for row, stop in zip(indices[0, :, 0], upper, strict=True)
    ]
    for i_tile in range(tiles.count):
        members = range(i_tile * queries, min(T, (i_tile + 1) * queries))
        whole, count, most = (int(number) for number in shares.counts[0, 0, i_tile])
        shared = {}
        for place, fields in enumerate(shares.shared[0, 0, i_tile, :count].tolist()):
            row, low, end, *high = fields
            bits = low % 2**32 + (high[0] << 32 if high else 0)
            who = {t for t in members if bits >> (t - members[0]) & 1}
            assert who and who == {t for t in members if row in chosen[t]}
            assert (place < whole) == all(row + m <= upper[t] for t in who)
            assert place >= whole or len(who) >= least
            assert end == min(row + m, max(upper[t] for t in who))
            shared[row] = who
        assert len(shared) == count
        own = [{int(row) for row in shares.own[0, t, 0] if row >= 0} for t in members]
        assert max(map(len, own)) == most
        for t, rows in zip(members, own, strict=True):
            assert rows == {row for row in chosen[t] if t not in shared.get(row, ())}
            assert all(row + m <= upper[t] for row in rows)


@pytest.mark.writes_overlap
def test_cu_seqlens_that_point_nowhere_stay_in_bounds() -> None:
    """Device tensors are not checked; what comes out is arbitrary, but nothing is read outside.

    Sequences overlap here, so that several workgroups store to the same rows.
    """
    case = Case("wild", lengths=((20, 20), (30, 30)))
    x = as_dict(case)
    for queries, keys in (([90, -60], [400, -20]), ([-5, 70], [-30, 90]), ([7, 1], [3, 4])):
        wild = Layout(50, cumulative(queries).to(DEVICE), cumulative(keys).to(DEVICE))
        arguments = (SMALL, wild, 1.0)
        for branch, name in zip(("cmp", "win"), BRANCHES[::2], strict=True):
            inputs = (x["q"], x[f"k_{branch}"], x[f"v_{branch}"])
            out, lse = getattr(kernels, name)(*inputs, *arguments)
            getattr(kernels, f"{name}_backward")(x["grad"], None, *inputs, out, lse, *arguments)
        inputs = (x["q"], x["k_slc"], x["v_slc"])
        indices = kernels.select_blocks(x["q"], x["k_cmp"], lse, *arguments)
        out, lse = kernels.selected_attention(*inputs, indices, *arguments)
        kernels.selected_attention_backward(x["grad"], None, *inputs, indices, out, lse, *arguments)
        y = kernels.mean_compress(x["k_slc"], *arguments[:2], 9)
        kernels.mean_compress_backward(y, *arguments[:2])


WHOLE = (
    "packed",
    "more_blocks_than_exist",
    "few_queries",
    "holes_per_batch_entry",
    "group_of_5",
    "paper",
    "paper_packed",
)


@pytest.mark.parametrize("name", [name for name in WHOLE if name in by_name])
def test_the_whole_and_its_gradients_are_those_of_the_reference(name: str) -> None:
    case = by_name[name]
    x = make_inputs(case)
    tensors = x.tensors()
    exact, exact_grads = reference_run("nsa_attention", case, tensors, (x.grad,), wide=True)
    plain, plain_grads = reference_run("nsa_attention", case, tensors, (x.grad,), wide=False)
    moved = on_device(*tensors)
    whole = kernels.nsa_attention(*moved, *tail(case), True)
    found = kernels.nsa_attention_backward(x.grad.to(DEVICE), *moved, whole, *tail(case))
    assert_close(whole.out.cpu(), exact[0], plain[0], "out")
    for place, *gradient in zip(x.names, found, exact_grads, plain_grads, strict=True):
        gradient[0] = gradient[0].cpu()
        assert_close(*gradient, f"d{place}", source=x.grad, lse=whole.lse.cpu())


@pytest.mark.parametrize("by_block", [False, True])
def test_few_queries_without_gradients_are_those_of_the_reference(by_block: bool) -> None:
    case = by_name["few_queries"]
    x = make_inputs(case)
    tensors = x.tensors()
    exact, _ = reference_run("nsa_attention", case, tensors, (x.grad,), wide=True)
    plain, _ = reference_run("nsa_attention", case, tensors, (x.grad,), wide=False)
    design = {"fewest_queries": 0, "largest_group": 99} if by_block else {}
    with tuned_to({"selected_by_block": design}):
        whole = kernels.nsa_attention(*on_device(*tensors), *tail(case), False)
    assert_close(whole.out.cpu(), exact[0], plain[0], "out")


@pytest.mark.parametrize(("needs_grad", "group"), [(False, 16), (True, 16), (True, 5)])
def test_a_sequence_packed_alone_is_what_it_is_unpacked(needs_grad: bool, group: int) -> None:
    """On a GPU of a length that gives each program several tiles."""
    case = Case("short", SMALL, T=150, S=150, H=6 if group % 2 else 4, HK=2, dtype=torch.float16)
    if DEVICE == "cuda":
        sizes = {"T": 5000, "S": 5000, "H": 4 * group, "HK": 4, "Dk": 128, "Dv": 128}
        case = replace(case, config=NSAConfig(), dtype=torch.bfloat16, **sizes)
    tensors = on_device(*make_inputs(case).tensors())
    ends = torch.tensor([0, case.T], dtype=torch.int32, device=DEVICE)
    alone = kernels.nsa_attention(*tensors, *tail(case), needs_grad)
    packed = Layout(case.T, ends, ends)
    among = kernels.nsa_attention(*tensors, case.config, packed, case.scale, needs_grad)
    torch.testing.assert_close(alone.lse, among.lse, rtol=1e-5, atol=1e-4)
    # Of blocks that score all but the same either may be chosen.
    same = (alone.indices == among.indices).flatten(2).all(2)
    assert same.float().mean() > 0.99
    atol = 8 * torch.finfo(case.dtype).eps
    for one, other in zip(alone[:4], among[:4], strict=True):
        if one.numel():
            torch.testing.assert_close(one[same], other[same], rtol=0.0, atol=atol)


def both_ways(tensors: list[Tensor], rest: tuple[NSAConfig, Layout, float]) -> list[Tensor]:
    """All results and gradients of the whole; the first tensor is the gradient of its output."""
    grad, *inputs = tensors
    whole = kernels.nsa_attention(*inputs, *rest, True)
    return [*whole, *kernels.nsa_attention_backward(grad, *inputs, whole, *rest)]


def long_case(T: int, group: int) -> Case:
    """Of a shape that Hopper's own kernels take; too large for anything but a GPU."""
    sizes = {"T": T, "S": T, "H": 2 * group, "HK": 2, "Dk": 128, "Dv": 128}
    return Case("long", NSAConfig(), dtype=torch.bfloat16, **sizes)


ON_HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0)
OF_MANY_TILES = (
    "interval_hopper", "interval_backward_hopper", "selection_hopper", "selected_hopper",
    "selected_by_block_hopper", "selected_merge_hopper",
)  # fmt: skip
"""Files of kernels of which a program works on one tile after another."""


@pytest.mark.skipif(not ON_HOPPER, reason="for kernels that only Hopper runs")
@pytest.mark.parametrize("by_block", [False, True])
def test_programs_of_many_tiles_give_what_programs_of_few_give(
    by_block: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(
        "tiles", NSAConfig(), T=1111, S=1111, H=16, HK=1, Dk=128, Dv=128, dtype=torch.bfloat16
    )
    x = make_inputs(case)
    tensors = on_device(x.grad, *x.tensors())
    design = {"fewest_queries": 0, "fewest_of_large": 0 if by_block else 9999}
    with tuned_to({"hopper_by_block": design}):
        few = both_ways(tensors, tail(case))
        for name in OF_MANY_TILES:
            place = f"nsa_port.kernels.triton.{name}.multiprocessors"
            monkeypatch.setattr(place, lambda device: 2)
        many = both_ways(tensors, tail(case))
    assert all(torch.equal(one, other) for one, other in zip(few, many, strict=True))


def one_by_one(tensors: list[Tensor], rest: tuple[NSAConfig, Layout, float]) -> list[Tensor]:
    """Every operator by itself, forward and backward, instead of the whole."""
    grad, q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, _ = tensors
    found: list[Tensor] = []

    def attend(name: str, *given: Tensor) -> Tensor:
        out, lse = getattr(kernels, name)(*given, *rest)
        for grad_lse in (None, lse):
            backward = getattr(kernels, f"{name}_backward")
            found.extend(backward(grad, grad_lse, *given, out, lse, *rest))
        found.extend((out, lse))
        return lse

    lse = attend("compressed_attention", q, k_cmp, v_cmp)
    indices = kernels.select_blocks(q, k_cmp, lse, *rest)
    attend("selected_attention", q, k_slc, v_slc, indices)
    attend("window_attention", q, k_win, v_win)
    return [*found, indices]


@pytest.mark.skipif(DEVICE == "cpu", reason="nothing is launched on a CPU")
@pytest.mark.parametrize("run", [both_ways, one_by_one])
@pytest.mark.parametrize("T", [300, 1500, 9000])
@pytest.mark.parametrize("group", [4, 16])
def test_calls_that_come_again_give_the_same(T: int, group: int, run: Any) -> None:
    """From the third on, launches are repeated with other addresses."""
    case = long_case(T, group)
    x = make_inputs(case)
    originals = on_device(x.grad, *x.tensors())
    copies = [tensor.clone() for tensor in originals]
    first, *later = (run(tensors, tail(case)) for tensors in 3 * [originals, copies])
    for found in later:
        assert all(torch.equal(one, other) for one, other in zip(first, found, strict=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="nothing waits for a CPU")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("T", [300, 1500, 9000])
def test_the_host_never_waits(T: int, packed: bool) -> None:
    case, config = long_case(T, 16), NSAConfig()
    x = make_inputs(case)
    grad, q, _, _, k, v, *others = on_device(x.grad, *x.tensors())
    inputs = [tensor.requires_grad_() for tensor in (q, k, v, *others)]
    cu = torch.tensor([0, T // 3, T], dtype=torch.int32, device=DEVICE) if packed else None
    options: Any = {"cu_seqlens": cu, "backend": "rocm" if torch.version.hip else "cuda"}
    # As many as are always enough: how many there are, the host would have to wait for.
    blocks = T // config.block_stride if packed else None
    with no_waiting():
        for _ in range(4):  # decided twice, the second time noted down; then repeated
            compressed = (
                nsa_port.mean_compress(y, config, num_blocks=blocks, **options) for y in (k, v)
            )
            out = nsa_port.nsa_attention(q, *compressed, k, v, *others, config, **options)
            torch.autograd.grad(out, inputs, grad)


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no graph to capture on a CPU")
@pytest.mark.parametrize(("T", "group"), [(1500, 16), (9000, 16), (9000, 4), (9000, 1)])
def test_a_graph_of_a_long_call_replays_on_new_values(T: int, group: int) -> None:
    case = long_case(T, group)
    x = make_inputs(case)
    tensors = on_device(x.grad, *x.tensors())
    both_ways(tensors, tail(case))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_ways(tensors, tail(case))
    for tensor in tensors:
        tensor.copy_(tensor.flip(1))
    expected = both_ways(tensors, tail(case))
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(one, other) for one, other in zip(captured, expected, strict=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter compiles nothing")
def test_a_new_length_compiles_nothing() -> None:
    from triton import knobs

    def run(T: int, B: int) -> None:
        case = Case("length", NSAConfig(), B=B, T=T, S=T, H=32, HK=2, Dk=64, Dv=64)
        for dtype in (torch.float16,):
            run_everything(replace(case, dtype=dtype), as_dict(replace(case, dtype=dtype)))

    # Short enough to choose every block, and longer.
    for T, B in ((300, 1), (512, 2), (1100, 1), (1536, 2)):
        run(T, B)
    compiled: list[str] = []
    hook = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = lambda **info: compiled.append(info["repr"])
    try:
        for T, B in ((301, 1), (1024, 1), (1777, 3), (2048, 1)):
            run(T, B)
    finally:
        knobs.runtime.jit_post_compile_hook = hook
    assert not compiled


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no graph to capture on a CPU")
@pytest.mark.parametrize("case", [TINY, TINY_PACKED], ids=str)
def test_everything_captures_in_a_graph(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = tail(case)  # on the device already: a copy from the host cannot be captured
    monkeypatch.setattr("tests.triton_operators.tail", lambda _: arguments)
    x = as_dict(case)
    expected = run_everything(case, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_everything(case, x)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(expected[key], captured[key]) for key in expected)
