"""The conformance suite itself: it catches what is wrong, and its reports say what happened."""

from __future__ import annotations

import pytest
import torch

from nsa_port.conformance import runner
from nsa_port.conformance.broken import FLAWS, plugged_in
from nsa_port.conformance.case import FAIL, PASS, backend_named
from nsa_port.conformance.cases import CASES, case

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("flaw", "name"), [(flaw, name) for flaw in FLAWS for name in FLAWS[flaw].caught_by]
)
def test_a_broken_backend_is_caught_by_name(flaw: str, name: str) -> None:
    with plugged_in(flaw) as backend:
        result = runner.run_case(case(name), backend, CPU, torch.float32)
    assert result.outcome == FAIL
    assert result.messages
    assert runner.run_case(case(name), backend_named("torch"), CPU, torch.float32).outcome == PASS


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_flaw_is_no_crash(flaw: str) -> None:
    """What fails is a comparison or a demand, not an exception on the way."""
    with plugged_in(flaw) as backend:
        for name in FLAWS[flaw].caught_by:
            result = runner.run_case(case(name), backend, CPU, torch.float32)
            assert not any("Error" in text for text in result.messages), result.messages


def test_names_of_cases_are_unique() -> None:
    names = [case.id for case in CASES]
    assert len(set(names)) == len(names)
