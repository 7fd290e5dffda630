"""The conformance suite itself: it catches what is wrong, and its reports say what happened."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from nsa_port.backends.interface import Environment, Problem, Reason
from nsa_port.backends.torch import TorchBackend
from nsa_port.conformance import LEVELS, command, comparison, page, report, runner, tolerance
from nsa_port.conformance.broken import FLAWS, plugged_in
from nsa_port.conformance.case import (
    FAIL,
    PASS,
    UNSUPPORTED,
    Case,
    Context,
    Result,
    Unsupported,
    backend_named,
)
from nsa_port.conformance.cases import CASES, case
from nsa_port.conformance.tolerance import Measurement
from nsa_port.registry import plug_in

CPU = torch.device("cpu")

PEERS = (
    "a later key inside the query's own block must not change the output",
    "the group's heads prefer different blocks: Eq. 10's sum decides",
    "Eq. 9 weights 1,2,2,2,1 with a one-hot p_cmp",
    "logits spread by +-200 over selected blocks",
    "decode with several selected blocks and a rising maximum",
    "a custom `scale` in all branches",
    "prefill's last row = decode, w=512, T=600",
    "two layers with different n or w in one process",
    "small distinct scores 1e-4..1e-3 rank exactly",
    "a visible block whose p underflows to 0, candidates <= n",
    "T < l, empty sequences, T not a multiple of m or d; varlen edges",
    "G in {1, 2, 5, 12, 16, 64}",
    "Dk=192, Dv=128 forward and backward, unpadded",
    "backward twice is bit-equal",
    "n=12; m=16 with n=16",
    "T < S with backward (chunked prefill in training)",
    "imports and runs without a GPU",
    "offsets past 2^31 elements",
)
"""What other implementations lack or get wrong."""


# --------------------------------------------------------------------------- it catches


@pytest.mark.parametrize(
    ("flaw", "name"), [(flaw, name) for flaw in FLAWS for name in FLAWS[flaw].caught_by]
)
def test_a_broken_backend_is_caught_by_name(flaw: str, name: str) -> None:
    with plugged_in(flaw) as backend:
        result = runner.run_case(case(name), backend, CPU, torch.float32)
    assert result.outcome == FAIL
    crashes = [text for text in result.messages if re.match(r"\w*Error:", text)]
    assert result.messages
    assert not crashes


@pytest.mark.parametrize("name", sorted({n for flaw in FLAWS.values() for n in flaw.caught_by}))
def test_what_catches_the_broken_passes_the_sound(name: str) -> None:
    result = runner.run_case(case(name), backend_named("torch"), CPU, torch.float32)
    assert result.outcome == PASS, result.messages


def test_every_fault_of_other_implementations_has_a_case() -> None:
    guarded = {case.peers for case in CASES if case.peers}
    assert guarded == set(PEERS)


def test_names_of_cases_are_unique() -> None:
    names = [case.id for case in CASES]
    assert len(set(names)) == len(names)


# --------------------------------------------------------------------------- the rule


def test_error_up_to_twice_the_plain_error_and_the_band_holds() -> None:
    exact = torch.ones(4, dtype=torch.float64)
    plain = torch.tensor([1.0, 1.0, 1.0, 1.25])
    band = tolerance.band(torch.float32)
    largest, _ = tolerance.measure("x", torch.tensor([1.0, 1.5, 1.0, 1.0]), exact, plain)
    assert largest.error == 0.5
    assert largest.budget == pytest.approx(2 * (0.25 + band))
    assert largest.holds
    largest, _ = tolerance.measure("x", torch.tensor([1.0, 1.51, 1.0, 1.0]), exact, plain)
    assert not largest.holds


def test_many_small_errors_break_the_norm_where_the_largest_holds() -> None:
    exact = torch.ones(1000, dtype=torch.float64)
    plain = exact.float()
    plain[0] += 0.01
    actual = exact.float() + 0.01
    largest, norm = tolerance.measure("x", actual, exact, plain)
    assert largest.holds
    assert not norm.holds


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -1e30])
def test_minus_infinity_must_be_minus_infinity(value: float) -> None:
    exact = torch.tensor([1.0, -math.inf], dtype=torch.float64)
    (wrong,) = tolerance.measure("lse", torch.tensor([1.0, value]), exact, exact.float())
    assert not wrong.holds
    assert all(m.holds for m in tolerance.measure("lse", exact.float(), exact, exact.float()))


def test_nan_never_holds() -> None:
    exact = torch.ones(2, dtype=torch.float64)
    plain = torch.full((2,), math.nan)
    (found,) = tolerance.measure("x", plain, exact, plain)
    assert not found.holds


# --------------------------------------------------------------------------- outcomes


class Refusing(TorchBackend):
    """Refuses every call for one reason, and declares a level all the same."""

    name = "refusing"
    reason = Reason("too_small", "the device is too small", "1", "2", "buy another")

    def __init__(self, level: int, *dtypes: torch.dtype) -> None:
        self.level = level
        self.dtypes = dtypes

    def call_reasons(self, environment: Environment, problem: Problem) -> tuple[Reason, ...]:
        refused = not self.dtypes or problem.dtype in self.dtypes
        return (self.reason,) if refused else super().call_reasons(environment, problem)


@pytest.mark.parametrize(("level", "breach"), [(0, False), (1, True)])
def test_unsupported_within_the_declared_level_is_a_breach(level: int, breach: bool) -> None:
    with plug_in(backend := Refusing(level)):
        result = runner.run_case(case("window-attention"), backend, CPU, torch.float32)
    assert result.outcome == UNSUPPORTED
    assert result.reasons == (Refusing.reason,)
    assert result.breach is breach
    assert report.conforms([result]) is not breach
    assert report.reached(1, [result]) == 0


def test_an_optional_dtype_may_be_refused() -> None:
    backend = Refusing(5, torch.float64)
    backend.reason = replace(Refusing.reason, code="dtype_unsupported")
    with plug_in(backend):
        result = runner.run_case(case("window-attention"), backend, CPU, torch.float64)
        required = runner.run_case(case("window-attention"), backend, CPU, torch.float32)
    assert (result.outcome, result.breach, result.excused) == (UNSUPPORTED, False, True)
    assert required.outcome == PASS


def test_a_machine_too_small_is_not_the_backends_fault() -> None:
    def too_big(context: Context) -> None:
        raise Unsupported(Refusing.reason)

    big = replace(case("combine"), check=too_big)
    result = runner.run_case(big, backend_named("torch"), CPU, torch.float32)
    assert (result.outcome, result.breach, result.excused) == (UNSUPPORTED, False, True)


def test_a_crash_is_a_failure_that_names_the_place() -> None:
    def crash(context: Context) -> None:
        raise ZeroDivisionError("by nought")

    result = runner.run_case(replace(case("combine"), check=crash), backend_named("torch"), CPU)
    assert result.outcome == FAIL
    assert "ZeroDivisionError: by nought" in result.messages[0]
    assert "test_conformance.py" in result.messages[0]


def test_processes_that_share_the_work_find_the_same_in_the_same_order() -> None:
    chosen = [case("backend-contract"), case("combine")]
    plan = runner.Plan(TorchBackend(), CPU, chosen, (torch.float32, torch.float16))
    told: list[int] = []
    alone = runner.run(plan, lambda done, total, result: None)
    shared = runner.run(plan, lambda done, total, result: told.append(done), jobs=2)
    assert told == [0, 1, 2, 3]
    assert [replace(result, seconds=0) for result in shared] == [
        replace(result, seconds=0) for result in alone
    ]


# --------------------------------------------------------------------------- reports


def made_up(*, backend: TorchBackend | None = None, level: int = 1) -> report.Document:
    """A document with one run of every outcome."""
    case = Case("made-up", 1, "A <made-up> case", "nothing & nobody", lambda context: None)
    held, broken = Measurement("out", 1e-7, 4e-7), Measurement("out", math.inf, 1e-7)
    results = [
        Result(case, torch.float32, PASS, 0.5, (held,), notes=("lengths 1 to 3",)),
        Result(case, torch.float16, FAIL, 0.5, (held, broken), failures=("<b>wrong</b>",)),
        Result(case, torch.bfloat16, UNSUPPORTED, 0.0, reasons=(Refusing.reason,), breach=True),
        Result(replace(case, id="other", dtypes=()), None, PASS, 0.1),
    ]
    plan = runner.Plan(backend or TorchBackend(), CPU, [case])
    return report.document(plan, level, results, 1.1)


def test_json_keeps_every_case_with_error_and_budget(tmp_path: Path) -> None:
    found = made_up()
    command.write(found, tmp_path)
    read = report.read(tmp_path / "conformance.json")
    assert read == json.loads(json.dumps(found))
    assert read["schema"] == report.SCHEMA
    first, second, third, fourth = read["cases"]
    assert (first["error"], first["budget"], first["ratio"]) == (1e-7, 4e-7, pytest.approx(0.25))
    assert second["ratio"] is None
    assert second["failures"][0] == "<b>wrong</b>"
    assert third["reasons"][0]["code"] == "too_small"
    assert (fourth["id"], fourth["dtype"]) == ("other", "")
    assert read["summary"] == {PASS: 2, FAIL: 1, UNSUPPORTED: 1, "breaches": 1}
    assert read["conforms"] is False
    assert {"torch", "device", "python", "os", "arch"} <= set(read["environment"])


def test_a_file_that_is_no_result_is_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"schema": 99}')
    with pytest.raises(ValueError, match="schema 1: found 99"):
        report.read(wrong)


def test_junit_counts_a_breach_as_failure() -> None:
    root = ElementTree.fromstring(report.junit(made_up()))
    (suite,) = root.findall("testsuite")
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("4", "2", "0")
    messages = [failure.get("message") or "" for failure in root.iter("failure")]
    assert any("too_small" in text for text in messages)


def test_the_page_is_self_contained_and_escapes() -> None:
    text = page.render(made_up())
    assert not re.search(r"https?://|<script|<link|<img|@import|url\(", text)
    assert "A &lt;made-up&gt; case" in text
    assert "<b>wrong</b>" not in text
    assert "prefers-color-scheme: dark" in text
    assert "too_small" in text
    assert "lengths 1 to 3" in text
    ElementTree.fromstring(re.sub(r"<!doctype html>|<meta[^>]*>", "", text))  # tags balance


def test_the_verdict_says_how_far() -> None:
    passed = Result(case("combine"), torch.float32, PASS, 0.1)
    plan = runner.Plan(TorchBackend(), CPU, [])
    assert report.verdict(made_up()) == (FAIL, "Does not conform to level 1")
    assert report.verdict(report.document(plan, 3, [passed], 1)) == (PASS, "Conforms to level 3")
    part = report.document(plan, 3, [passed], 1, partial=True)
    assert report.verdict(part) == (PASS, "The chosen runs hold")
    refused = replace(passed, outcome=UNSUPPORTED, reasons=(Refusing.reason,))
    found = report.document(plan, 3, [passed, refused], 1)
    assert report.verdict(found) == (PASS, "Conforms to level 0")
    found = report.document(plan, 3, [passed, replace(refused, excused=True)], 1)
    assert report.verdict(found) == (PASS, "Conforms to level 3, 1 runs not possible here")


def test_comparing_tells_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = made_up()
    second = json.loads(json.dumps(first))
    second["cases"][1] |= {"outcome": PASS, "ratio": 0.5}
    del second["cases"][3]
    second["environment"]["device_name"] = "Another Machine"
    for name, found in (("a", first), ("b", second)):
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    parser = argparse.ArgumentParser()
    comparison.add_arguments(parser)
    html = tmp_path / "compare.html"
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--html", str(html)]
    assert comparison.main(parser.parse_args(files)) == 1
    told = capsys.readouterr().out
    assert re.search(r"made-up\[float16\]\s+fail infinite\s+pass 0.50", told)
    assert re.search(r"other\s+pass\s+not run", told)
    assert "Another Machine" in told
    assert "Another Machine" in html.read_text()
    assert comparison.main(parser.parse_args(files[:1] * 2)) == 0


# --------------------------------------------------------------------------- the command


def conformance(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.main(parser.parse_args(arguments))


def test_the_command_writes_its_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ("--backend", "torch", "--level", "1", "--only", "combine", "--dtype", "float32")
    assert conformance(*chosen, "--out", str(tmp_path)) == 0
    assert "1 passed, 0 failed" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {
        "conformance.json",
        "conformance.xml",
        "conformance.html",
    }


def test_the_command_fails_on_a_broken_backend(capsys: pytest.CaptureFixture[str]) -> None:
    with plugged_in("window_off_by_one"):
        chosen = ("--level", "1", "--only", "window-attention", "--dtype", "float32")
        assert conformance("--backend", "window_off_by_one", "--device", "cpu", *chosen) == 1
    assert "FAIL window-attention[float32]" in capsys.readouterr().out


def test_the_command_fails_on_a_breach(capsys: pytest.CaptureFixture[str]) -> None:
    with plug_in(Refusing(1)):
        assert conformance("--backend", "refusing", "--device", "cpu", "--only", "combine") == 1
    assert "too_small x 4" in capsys.readouterr().out


def test_the_command_refuses_unknown_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert conformance("--backend", "nobody") == 2
    assert "torch" in capsys.readouterr().err


def test_the_command_lists_cases_up_to_a_level(capsys: pytest.CaptureFixture[str]) -> None:
    assert conformance("--backend", "torch", "--level", "0", "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[0] for line in lines] == ["0"] * sum(case.level == 0 for case in CASES)
    assert max(case.level for case in CASES) == max(LEVELS)


def test_the_suite_runs_under_pytest(tmp_path: Path) -> None:
    """From another folder, by package name, with options."""
    root = str(Path(command.__file__).parents[2])
    asked = ["-p", "nsa_port.conformance.options", "--pyargs", "nsa_port.conformance"]
    options = ["--nsa-backend", "torch", "--nsa-level", "1", "--nsa-device", "cpu", "-k", "combine"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *asked, *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout
