"""Conformance cases of the backend `rocm` on emulated GPUs: those that fit into every change.

`ci/emulated.sh` runs the rest: every case, dtype and architecture.
"""

from __future__ import annotations

import pytest
import torch

import nsa_port
from nsa_port.conformance import runner
from nsa_port.conformance.case import PASS, backend_named, stand_in
from nsa_port.conformance.cases import case
from nsa_port.conformance.inputs import Shape, make

pytest.importorskip("triton")

from nsa_port import emulator

CPU = torch.device("cpu")
CHOSEN = [
    ("gfx942", "packed-longer-keys", torch.bfloat16),
    ("gfx942", "fewer-queries-than-keys", torch.float16),
    ("gfx942", "mean-compress-backward", torch.float32),
    ("gfx942", "decode-rising-maximum", torch.bfloat16),
    ("gfx1100", "packed-longer-keys", torch.float16),
    ("gfx1100", "combine-backward", torch.bfloat16),
    ("gfx1100", "positions", torch.bfloat16),
]


@pytest.fixture(autouse=True)
def _compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize(("architecture", "name", "dtype"), CHOSEN, ids=str)
def test_a_case_of_the_suite_passes_on_an_emulated_gpu(
    architecture: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NSA_PORT_EMULATE", architecture)
    rocm = backend_named("rocm")
    assert stand_in(rocm, CPU) == f"emulated {architecture}"
    result = runner.run_case(case(name), rocm, CPU, dtype)
    assert result.outcome == PASS, result.messages or result.reasons
    assert result.measurements


def test_forward_and_backward_run_on_the_emulator_and_leave_triton_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The session around the call is used, so that it can be looked at; its driver stays."""
    monkeypatch.setenv("NSA_PORT_EMULATE", "gfx1100")
    x = make(Shape(T=40, H=2, HK=1, Dk=16, Dv=16), torch.float16, CPU).leaves()
    with emulator.emulated("gfx1100") as session:
        out = nsa_port.nsa_attention(*x.tensors, x.cfg, backend="rocm")
        forward = len(session.launches)
        torch.autograd.grad(out.sum(), x.tensors)
        backward = len(session.launches) - forward
        torch.testing.assert_close(
            nsa_port.nsa_attention(*x.tensors, x.cfg, backend="torch"), out, rtol=1e-2, atol=1e-2
        )
        assert len(session.launches) == forward + backward
    assert forward > 5
    assert backward > 5
    assert all(launch.program.architecture.name == "gfx1100" for launch in session.launches)
