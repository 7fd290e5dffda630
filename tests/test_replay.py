"""A repeated call launches what the call did that was recorded, on its own tensors."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
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
    def function(x: Tensor) -> tuple[Tensor, ...]:
        return (x + 1,)

    for _ in range(3):
        x = torch.ones(3)
        assert torch.equal(replay.repeated(function, (x,))[0], x + 1)
    assert list(replay._plans.values()) == [None]


def test_so_many_calls_are_remembered_and_first_those_that_come_often() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        return (torch.empty(3),)

    often = torch.ones(9999)
    for _ in range(2):
        replay.repeated(function, (often,))
    for size in range(2 * replay._MOST_CALLS):
        replay.repeated(function, (torch.ones(size),))
        replay.repeated(function, (often,))
    assert len(replay._plans) == replay._MOST_CALLS
    assert sum(isinstance(plan, replay._Plan) for plan in replay._plans.values()) == 1
