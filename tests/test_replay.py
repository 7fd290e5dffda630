"""A repeated call launches what the call did that was recorded, on its own tensors."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton

from nsa_port.kernels import triton as kernels
from nsa_port.kernels.geometry import Layout, NSAConfig
from nsa_port.kernels.tables import tuned_to
from nsa_port.kernels.triton import replay
from nsa_port.tune import compile_only

if not triton.__version__.startswith("3.6."):
    pytest.skip("calls are repeated with triton 3.6 alone", allow_module_level=True)

CONFIG = NSAConfig()
HEADS = {"A2": (64, 4), "B": (32, 8), "one head": (4, 4)}


class Launcher:
    """Notes what would be launched: `launched` holds grids and arguments."""

    launched: list[tuple[Any, ...]] = []  # noqa: RUF012 (one for all kernels)

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = metadata.name

    def __call__(self, x: int, y: int, z: int, *arguments: Any) -> None:
        Launcher.launched.append((self.name, (x, y, z), *arguments[6:]))


@pytest.fixture(autouse=True)
def repeating(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(replay, "_may_repeat", lambda tensor: True)
    monkeypatch.setattr(compile_only.CompileOnlyDriver, "launcher_cls", Launcher)
    replay._plans.clear()
    with compile_only.compiling_for("sm_90"):
        yield
    replay._plans.clear()


def whole(shape: str, T: int, grad: bool = True, shared: bool = False) -> tuple[Tensor, ...]:
    """The tensors of a call of `nsa_attention`, new ones each time."""
    H, HK = HEADS[shape]
    C = CONFIG.num_compressed(T)

    def made(length: int, heads: int, dim: int = 64) -> Tensor:
        return torch.empty(1, length, heads, dim, dtype=torch.float16)

    k = made(T, HK)
    others = (k, k) if shared else (made(T, HK), made(T, HK))
    return (made(T, H), made(C, HK), made(C, HK), k, *others, made(T, HK), made(T, H, 3))


def forward(tensors: tuple[Tensor, ...]) -> Any:
    run: Any = kernels.nsa_attention
    return run(*tensors, CONFIG, Layout(tensors[0].shape[1]), 0.1, True)


def backward(tensors: tuple[Tensor, ...], saved: Any) -> tuple[Tensor, ...]:
    grad = torch.empty_like(saved.out)
    layout = Layout(tensors[0].shape[1])
    run: Any = kernels.nsa_attention_backward
    return run(grad, *tensors, saved, CONFIG, layout, 0.1)


def pattern() -> list[Any]:
    """What was launched since the last time, each address by when it first came."""
    numbers: dict[int, int] = {}

    def numbered(address: int) -> tuple[str, int]:
        return "address", numbers.setdefault(address, len(numbers))

    def plain(argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return numbered(argument.data_ptr())
        if hasattr(argument, "base"):
            return (*argument.shape, *argument.strides, numbered(argument.base.data_ptr()))
        # Addresses are far above any size.
        big = isinstance(argument, int) and argument > 2**40
        return numbered(argument) if big else argument

    found = [tuple(plain(argument) for argument in launch) for launch in Launcher.launched]
    Launcher.launched.clear()
    return found


@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize("T", [256, 1500])
def test_a_repeated_call_launches_the_same_kernels_on_its_own_tensors(shape: str, T: int) -> None:
    saved, forwards, backwards = [], [], []
    for _ in range(4):
        pattern()
        saved.append(forward(whole(shape, T)))
        forwards.append(pattern())
    assert forwards[1] == forwards[2] == forwards[3]
    for result in saved:
        assert [x.shape for x in result] == [x.shape for x in saved[0]]
        assert [x.dtype for x in result] == [x.dtype for x in saved[0]]
    for result in saved:
        pattern()
        backward(whole(shape, T), result)
        backwards.append(pattern())
    assert backwards[1] == backwards[2] == backwards[3]
    assert len(replay._plans) == 2
    assert all(isinstance(plan, replay._Plan) for plan in replay._plans.values())


def operators(T: int) -> dict[str, Callable[[], Any]]:
    """Every operator that is repeated on its own, on new tensors each time."""
    q, k_cmp, v_cmp, k, v, *_ = whole("A2", T)
    lse = torch.empty(q.shape[:3])
    idx = torch.zeros(1, T, 4, CONFIG.num_selected, dtype=torch.int32)
    where: Any = (CONFIG, Layout(T), 0.1)

    def made(tensors: tuple[Tensor | None, ...]) -> list[Any]:
        return [None if x is None else x.clone() for x in tensors]

    def operator(name: str, *tensors: Tensor | None) -> Callable[[], Any]:
        run: Any = getattr(kernels, name)
        return lambda: run(*made(tensors), *where)

    return {
        "compressed_attention": operator("compressed_attention", q, k_cmp, v_cmp),
        "window_attention": operator("window_attention", q, k, v),
        "select_blocks": operator("select_blocks", q, k_cmp, lse),
        "selected_attention": operator("selected_attention", q, k, v, idx),
        **{
            f"{name}_backward, {'with' if grad_lse is not None else 'no'} grad_lse": operator(
                f"{name}_backward", q, grad_lse, q, *rest, q, lse
            )
            for name, *rest in (
                ("compressed_attention", k_cmp, v_cmp),
                ("window_attention", k, v),
                ("selected_attention", k, v, idx),
            )
            for grad_lse in (None, lse)
        },
    }


@pytest.mark.parametrize("name", operators(64))
def test_an_operator_alone_is_repeated_too(name: str) -> None:
    call = operators(9000 if name == "selected_attention" else 1500)[name]
    results, launches = [], []
    for _ in range(4):
        pattern()
        results.append(call())
        launches.append(pattern())
    assert launches[1] == launches[2] == launches[3]
    assert [isinstance(plan, replay._Plan) for plan in replay._plans.values()] == [True]
    assert len({type(result) for result in results}) == 1
    tensors = [result if isinstance(result, tuple) else (result,) for result in results]
    shapes = [[(x.shape, x.dtype) for x in result] for result in tensors]
    assert shapes[0] == shapes[1] == shapes[2] == shapes[3]


def test_packed_sequences_and_few_queries_are_not_repeated() -> None:
    q, _, _, k, v, *_ = whole("A2", 64)
    few, _, _, k_few, v_few, *_ = whole("A2", 8)
    cu = torch.tensor([0, 20, 64], dtype=torch.int32)
    run: Any = kernels.window_attention
    for _ in range(3):
        run(q, k, v, CONFIG, Layout(64, cu, cu), 0.1)
        run(q, k, v, CONFIG, Layout(64, positions=torch.arange(64, dtype=torch.int32)), 0.1)
        run(few, k_few, v_few, CONFIG, Layout(8), 0.1)
    assert not replay._plans


def test_results_and_inputs_are_where_the_kernels_write_and_read() -> None:
    for _ in range(3):
        tensors = whole("A2", 1500)
        Launcher.launched.clear()
        result = forward(tensors)
        touched = {a for launch in Launcher.launched for a in launch if isinstance(a, int)}
        for launch in Launcher.launched:
            touched |= {a.base.data_ptr() for a in launch if hasattr(a, "base")}
            touched |= {a.data_ptr() for a in launch if isinstance(a, Tensor)}
        assert {x.data_ptr() for x in (*tensors, *result)} <= touched


def test_tensors_that_are_one_are_another_call() -> None:
    for shared in (False, True):
        for _ in range(3):
            forward(whole("A2", 1500, shared=shared))
    assert len(replay._plans) == 2


def test_other_tuned_values_are_another_call() -> None:
    for _ in range(3):
        forward(whole("B", 1500))
    before = pattern()
    with tuned_to({"block_scores": {"num_stages": 1}, "selected_by_block": {"segment": 128}}):
        for _ in range(3):
            forward(whole("B", 1500))
    assert pattern() != before
    assert len(replay._plans) == 2


def test_a_length_that_comes_once_is_not_recorded() -> None:
    for T in range(1500, 1504):
        forward(whole("one head", T))
    assert not any(isinstance(plan, replay._Plan) for plan in replay._plans.values())


def test_what_does_more_than_launch_is_never_repeated() -> None:
    @replay.repeats
    def function(x: Tensor) -> Tensor:
        return x + 1

    for _ in range(3):
        x = torch.ones(1, 99)
        assert torch.equal(function(x), x + 1)
    assert list(replay._plans.values()) == [None]


def test_so_many_calls_are_remembered_and_first_those_that_come_often() -> None:
    @replay.repeats
    def function(x: Tensor) -> tuple[Tensor, ...]:
        return (torch.empty(3),)

    often = torch.ones(1, 9999)
    for _ in range(2):
        function(often)
    for size in range(100, 100 + 2 * replay._MOST_CALLS):
        function(torch.ones(1, size))
        function(often)
    assert len(replay._plans) == replay._MOST_CALLS
    assert sum(isinstance(plan, replay._Plan) for plan in replay._plans.values()) == 1
