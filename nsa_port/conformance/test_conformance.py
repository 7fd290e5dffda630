"""The suite under pytest.

    NSA_PORT_BACKEND=NAME pytest --pyargs nsa_port.conformance
    pytest -p nsa_port.conformance.options --pyargs nsa_port.conformance --nsa-backend NAME

Unsupported is a skip with the backend's own codes; within the level it declares, a failure.
"""

from __future__ import annotations

import pytest
import torch

from nsa_port.conformance import runner
from nsa_port.conformance.case import FAIL, UNSUPPORTED, Case, backend_named, default_device
from nsa_port.conformance.cases import CASES
from nsa_port.conformance.command import automatic_backend


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    name = option("--nsa-backend", default=None)
    backend = backend_named(name) if name else automatic_backend()
    level = option("--nsa-level", default=None)
    level = backend.level if level is None else level
    device = option("--nsa-device", default=None)
    plan = runner.Plan(
        backend,
        torch.device(device) if device else default_device(backend),
        [case for case in CASES if case.level <= level],
    )
    runs = plan.runs()
    names = [
        f"{case.id}-{dtype}".replace("-torch.", "-").replace("-None", "") for case, dtype in runs
    ]
    metafunc.parametrize(
        ("plan", "case", "dtype"), [(plan, *run) for run in runs], ids=names, scope="session"
    )


def test_conformance(plan: runner.Plan, case: Case, dtype: torch.dtype | None) -> None:
    result = runner.run_case(case, plan.backend, plan.device, dtype)
    reasons = "; ".join(map(str, result.reasons))
    if result.outcome == FAIL:
        pytest.fail("\n".join([f"{case.title}: {case.shows}", *result.messages[:20]]))
    if result.breach:
        pytest.fail(f"unsupported within the declared level {plan.backend.level}: {reasons}")
    if result.outcome == UNSUPPORTED:
        pytest.skip(reasons)
