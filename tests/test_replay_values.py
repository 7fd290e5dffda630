"""A repeated call computes what the call did that was recorded.

On an emulated GPU, with the kernels that all GPUs share: no other executes them without hardware.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None or importlib.util.find_spec("numpy") is None:
    pytest.skip("triton or numpy is not installed", allow_module_level=True)

import triton
from torch.utils._python_dispatch import _disable_current_modes

from nsa_port import emulator
from nsa_port.emulator import driver
from nsa_port.kernels.triton import replay
from tests.eager_cases import SMALL, Case, make_inputs
from tests.triton_operators import both_ways, one_by_one, tail

if not triton.__version__.startswith("3.6."):
    pytest.skip("calls are repeated with triton 3.6 alone", allow_module_level=True)


@pytest.fixture(autouse=True)
def repeating(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls are repeated, with addresses for tensors, which the emulator then has to find."""
    pack, run_program = driver._pack, driver.run_program

    def pack_address(type_: str, value: Any, *others: Any) -> bytes:
        if type_.startswith("*") and isinstance(value, int):
            value = tensor_at(value) if value else None
        return pack(type_, value, *others)

    def run_unnoticed(*args: Any) -> Any:
        with _disable_current_modes():
            return run_program(*args)

    monkeypatch.setattr(replay, "_may_repeat", lambda tensor: True)
    monkeypatch.setattr(driver, "_pack", pack_address)
    monkeypatch.setattr(driver, "run_program", run_unnoticed)
    replay._plans.clear()
    with emulator.emulated("gfx942", races=False):
        yield
    replay._plans.clear()


def tensor_at(address: int) -> Tensor:
    """The bytes from an address to the end of the living tensor that it lies in."""
    for found in gc.get_objects():
        if type(found) is Tensor:
            storage = found.untyped_storage()
            offset = address - storage.data_ptr()
            if 0 <= offset < storage.nbytes():
                whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                return whole[offset:]
    raise AssertionError("the address of nothing that lives")


@pytest.mark.parametrize("run", [one_by_one, both_ways])
def test_a_repeated_call_gives_the_same(run: Any) -> None:
    case = Case("again", SMALL, T=16, S=45, H=4, HK=2, Dk=16, Dv=16)
    x = make_inputs(case)
    tensors = [x.grad, *x.tensors()]
    first, *later = (run([y.clone() for y in tensors], tail(case)) for _ in range(3))
    assert replay._plans
    assert all(isinstance(plan, replay._Plan) for plan in replay._plans.values())
    for found in later:
        assert all(torch.equal(one, other) for one, other in zip(first, found, strict=True))
