"""`nsa-port tune`: what is tried, what is dropped and why, what is chosen, what is written."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nsa_port import cli
from nsa_port import environment as machine
from nsa_port.bench.shapes import parse_heads
from nsa_port.bench.timing import Sample
from nsa_port.conformance.case import backend_named
from nsa_port.kernels import tables
from nsa_port.kernels.tables import Values, tuned
from nsa_port.tune import command, result, search, trial
from nsa_port.tune.calls import CALLS, Calls
from nsa_port.tune.candidates import KERNELS, candidates
from nsa_port.tune.search import Trial, fastest, tune
from nsa_port.tune.trial import Job, Verdict, try_candidate

HEADS = parse_heads("4,2,32,16")
JOB = Job(
    backend="torch",
    module="nsa_port.kernels.eager",
    arch="sm_90",
    shared_memory=None,
    device="cpu",
    heads=HEADS,
    dtype="float32",
    length=320,
    check_length=192,
)
"""Eager kernels in the place of tuned ones: they take no values, and are right."""

KERNEL = "selected_by_query"
SHIPPED = tuned("sm_90", KERNEL, 4, 32, 16)
OTHER = {**SHIPPED, "BLOCK_N": 32, "num_warps": 2}


# --------------------------------------------------------------------------- candidates


def every_kernel_of_every_table() -> list[tuple[str, str]]:
    archs = sorted(path.stem for path in tables.SHIPPED.glob("*.json"))
    return [(arch, kernel) for arch in archs for kernel in tables.shipped_table(arch)]


def maker_of(arch: str) -> str:
    """The backend that an architecture's table is for."""
    return "rocm" if "gfx" in arch else "cuda"


@pytest.mark.parametrize(("arch", "kernel"), every_kernel_of_every_table())
def test_every_tuned_kernel_has_candidates_that_its_table_could_hold(
    arch: str, kernel: str
) -> None:
    maker = maker_of(arch)
    for entry in tables.shipped_table(arch)[kernel]:
        shipped = tables.values_of(entry)
        found = list(candidates(kernel, maker, shipped))
        assert found[0] == shipped
        assert len(found) > 1
        assert all(set(values) == set(shipped) for values in found)
        assert all(values not in found[:number] for number, values in enumerate(found))


@pytest.mark.parametrize(("arch", "kernel"), every_kernel_of_every_table())
def test_whatever_wins_is_an_entry_that_the_library_takes(
    arch: str, kernel: str, tmp_path: Path
) -> None:
    maker = maker_of(arch)
    entries = [
        {"element_size": 2, "head_dim": 128, "exact_dims": [[128, 128]], **values}
        for entry in tables.shipped_table(arch)[kernel]
        for values in candidates(kernel, maker, tables.values_of(entry))
    ]
    path = tmp_path / f"{arch}.json"
    path.write_text(json.dumps({"architecture": arch, "kernels": {kernel: entries}}))
    assert tables.read_table(path, arch) == {kernel: entries}


def test_every_candidate_shows_in_a_call() -> None:
    assert {call for kernel in KERNELS.values() for call in kernel.calls} == set(CALLS)


# --------------------------------------------------------------------------- right and wrong


def eager_calls(length: int = 192) -> Calls:
    torch.manual_seed(0)
    return JOB.calls(length, "cpu")


def spoiled(tensor: Tensor) -> Tensor:
    """One element wrong by a hundredth of the largest."""
    wrong = tensor.clone()
    wrong.view(-1)[tensor.numel() // 2] += 0.01 * float(tensor.abs().max())
    return wrong


@pytest.mark.parametrize("name", [name for name in CALLS if name != "select"])
def test_right_results_pass_and_a_wrong_element_does_not(name: str) -> None:
    calls = eager_calls()
    outputs = calls.run(name)
    assert calls.faults(name, outputs) == []
    assert calls.differences(name, outputs, outputs) == []
    for part in range(len(outputs)):
        wrong = tuple(spoiled(x) if i == part else x for i, x in enumerate(outputs))
        assert calls.faults(name, wrong)
        assert calls.differences(name, wrong, outputs)


def test_a_wrong_choice_of_blocks_does_not_pass() -> None:
    calls = eager_calls()
    calls.config = dataclasses.replace(calls.config, num_selected=4, select_block_size=32)
    (indices,) = calls.run("select")
    assert calls.faults("select", (indices,)) == []
    wrong = indices.clone()
    wrong[:, -1] = torch.tensor([0, 4, 5, 1])  # not ascending
    assert calls.faults("select", (wrong,))


def test_a_candidate_that_is_wrong_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "REPEATS", 1)
    trial._calls.cache_clear()
    run = Calls.run

    def run_wrongly(self: Calls, name: str) -> tuple[Tensor, ...]:
        out, *rest = run(self, name)
        return (spoiled(out) if tuned("sm_90", KERNEL, 4, 32) == OTHER else out, *rest)

    monkeypatch.setattr(Calls, "run", run_wrongly)
    assert set(try_candidate(JOB, KERNEL, SHIPPED, True).costs) == {"selected"}
    verdict = try_candidate(JOB, KERNEL, OTHER, True)
    assert "the suite allows" in verdict.out
    assert not verdict.costs


def test_a_candidate_wrong_only_at_full_length_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "REPEATS", 1)
    trial._calls.cache_clear()
    trial._by_table.cache_clear()
    run = Calls.run

    def run_wrongly(self: Calls, name: str) -> tuple[Tensor, ...]:
        out, *rest = run(self, name)
        long = self.length == JOB.length and tuned("sm_90", KERNEL, 4, 32) == OTHER
        return (spoiled(out) if long else out, *rest)

    monkeypatch.setattr(Calls, "run", run_wrongly)
    assert "against the table's values" in try_candidate(JOB, KERNEL, OTHER, True).out
    assert try_candidate(JOB, KERNEL, OTHER, False).costs  # where the table's are wrong themselves


def test_a_candidate_that_fails_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Calls, name: str) -> tuple[Tensor, ...]:
        raise RuntimeError("an illegal memory access\nwas encountered")

    monkeypatch.setattr(Calls, "run", fail)
    verdict = try_candidate(JOB, KERNEL, SHIPPED, True)
    assert verdict == Verdict(out="RuntimeError: an illegal memory access")


# --------------------------------------------------------------------------- compiling


def compiled(
    values: Values, arch: str = "sm_90", may_spill: int = 0, shared_memory: int | None = None
) -> str:
    pytest.importorskip("triton")
    job = dataclasses.replace(
        JOB,
        module="nsa_port.kernels.triton",
        arch=arch,
        heads=parse_heads("16,1,128,128"),
        shared_memory=shared_memory,
    )
    return trial.compile_candidate(job, KERNEL, {**SHIPPED, **values}, may_spill)


def test_candidates_that_cannot_run_well_are_out_before_they_run() -> None:
    fits = {"BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    assert compiled(fits) == ""
    assert "OutOfResources" in compiled(fits, shared_memory=1024)
    spilling = {"BLOCK_N": 32, "num_warps": 1, "num_stages": 1}
    assert "spills" in compiled(spilling)
    assert compiled(spilling, may_spill=10_000) == ""


@pytest.mark.parametrize(
    ("arch", "kernel"), [x for x in every_kernel_of_every_table() if x[0] in ("sm_90", "gfx942")]
)
def test_the_calls_of_a_kernel_launch_it(arch: str, kernel: str) -> None:
    pytest.importorskip("triton")
    maker = maker_of(arch)
    job = dataclasses.replace(
        JOB,
        backend=maker,
        module=backend_named(maker).kernels["selected_attention"],
        arch=arch,
        # AMD's tiles of several queries are for groups that do not fill one.
        heads=parse_heads("16,4,128,128" if kernel == "selected_by_tile" else "64,4,128,128"),
        dtype="bfloat16",
        length=8192,
    )
    dims = (128,) if KERNELS[kernel].keys_alone else (128, 128)
    shipped = tuned(arch, kernel, 2, *dims)
    assert trial.compile_candidate(job, kernel, shipped, may_spill=sys.maxsize) == ""


def test_candidates_for_amd_are_compiled_too() -> None:
    assert compiled({"BLOCK_N": 16, "num_warps": 4, "num_stages": 1}, "gfx942") == ""


# --------------------------------------------------------------------------- the search


def of(kernel: str, heads: str, values: Values, shipped: bool = False, **costs: float) -> Trial:
    job = dataclasses.replace(JOB, heads=parse_heads(heads))
    verdict = Verdict(costs) if costs else Verdict(out="spills 8 bytes of registers")
    return Trial(job, kernel, values, shipped, verdict)


def test_the_fastest_is_so_relative_to_the_table_over_shapes_and_calls() -> None:
    a, b, c = ({"BLOCK_N": size} for size in (16, 32, 64))
    found = [
        of(KERNEL, "4,1,64,64", a, shipped=True, selected=1.0),
        of(KERNEL, "4,1,64,64", b, selected=0.5),
        of(KERNEL, "4,1,64,64", c, selected=0.4),
        of(KERNEL, "8,1,64,64", a, shipped=True, selected=100.0),
        of(KERNEL, "8,1,64,64", b, selected=110.0),
        of(KERNEL, "8,1,64,64", c),  # out for this shape
    ]
    assert fastest(found) == b
    assert fastest(found[:3]) == c
    assert fastest(found[3:]) == a
    assert fastest(found[5:]) is None


@pytest.fixture
def timed_by_block_n(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which small tiles take long; nothing is compiled."""

    def clock(call: object, device: str) -> Sample:
        return Sample(1.0 / tuned("sm_90", KERNEL, 4, 32, 16)["BLOCK_N"], 0.0)

    monkeypatch.setattr(trial, "once", clock)
    monkeypatch.setattr(search, "_compile", lambda trials, may_spill: None)
    monkeypatch.setattr(search._Runner, "__call__", run_in_process)


def run_in_process(self: search._Runner, one: Trial, against_table: bool) -> Verdict:
    return try_candidate(one.job, one.kernel, one.values, against_table)


@pytest.mark.usefixtures("timed_by_block_n")
def test_a_run_ends_in_a_table_that_the_library_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = {"BLOCK_N": (16, 32, 64)}
    monkeypatch.setitem(KERNELS, KERNEL, dataclasses.replace(KERNELS[KERNEL], cuda=grid))
    job = dataclasses.replace(JOB, backend="cuda")
    found = tune(job, [HEADS], [KERNEL])
    assert found.best == {(KERNEL, (32, 16)): {**SHIPPED, "BLOCK_N": 64}}
    assert "3 candidates" in result.describe(found)
    written = result.document(found, {})
    path = tmp_path / "sm_90.json"
    path.write_text(result.to_text(written))
    assert len([line for line in path.read_text().splitlines() if "BLOCK_N" in line]) >= 1
    monkeypatch.setenv("NSA_PORT_TABLES", str(tmp_path))
    assert tuned("sm_90", KERNEL, 4, 32, 16) == {**SHIPPED, "BLOCK_N": 64}
    assert tuned("sm_90", KERNEL, 4, 32, 32) == SHIPPED  # not what was tuned
    (run,) = json.loads(path.read_text())["measured"]
    assert run["machine"]["torch"] == torch.__version__
    assert run["figures"][0]["best_costs"] == {"selected": pytest.approx(1000 / 64)}


@pytest.mark.usefixtures("timed_by_block_n")
def test_the_command_writes_a_table_where_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = dataclasses.replace(JOB, backend="cuda")
    monkeypatch.setattr(command, "find_job", lambda *options: job)
    target = tmp_path / "new" / "sm_90.json"
    options = f"tune --kernels {KERNEL} --shapes 4,2,32,16 --out {target}"
    assert cli.main(options.split()) == 0
    assert tables.read_table(target, "sm_90")[KERNEL][0]["exact_dims"] == [[32, 16]]
    assert f"NSA_PORT_TABLES={target.parent} makes" in capsys.readouterr().out


@pytest.mark.usefixtures("timed_by_block_n")
def test_a_second_run_adds_to_the_table_and_replaces_what_it_measured_again() -> None:
    job = dataclasses.replace(JOB, backend="cuda")
    first = result.document(tune(job, [HEADS], [KERNEL]), {})
    other = result.document(tune(job, [parse_heads("4,2,16,16")], [KERNEL]), first)
    dims = [entry["exact_dims"] for entry in other["kernels"][KERNEL]]
    assert dims == [[[16, 16]], [[32, 16]]]
    again = result.document(tune(job, [HEADS], [KERNEL]), other)
    assert len(again["kernels"][KERNEL]) == 2
    assert len(again["measured"]) == 3


def test_a_kernel_that_the_architecture_lacks_is_refused() -> None:
    with pytest.raises(search.CannotTune, match="sm_90 has no kernel selected_by_wave"):
        tune(JOB, [HEADS], ["selected_by_wave"])


def dies(job: Job, kernel: str, values: Values, against_table: bool) -> Verdict:
    if values["BLOCK_N"] == 16:
        os._exit(1)
    return Verdict({"selected": 1.0}, fatal=values["BLOCK_N"] == 32)


def test_a_candidate_that_kills_its_process_is_out_and_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(search, "try_candidate", dies)
    with search._Runner(in_process=False, start="fork") as runner:
        assert runner(of(KERNEL, "4,1,64,64", {"BLOCK_N": 16}), True).out == "its process died"
        assert runner(of(KERNEL, "4,1,64,64", {"BLOCK_N": 32}), True).fatal
        assert runner._pool is None
        assert runner(of(KERNEL, "4,1,64,64", {"BLOCK_N": 64}), True).costs == {"selected": 1.0}


def test_an_emulated_gpu_is_ranked_by_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("NSA_PORT_EMULATE", "gfx942")
    monkeypatch.setattr(machine, "default_device", lambda: torch.device("cpu"))
    job = dataclasses.replace(command.find_job(None, "float16", 32), heads=parse_heads("2,1,16,16"))
    assert (job.backend, job.arch, job.emulated) == ("rocm", "gfx942", True)
    shipped = tuned("gfx942", KERNEL, 2, 16)
    one, two = (
        try_candidate(job, KERNEL, {**shipped, "num_warps": warps, "num_stages": 1}, True)
        for warps in (1, 4)
    )
    assert not one.out and not two.out
    assert 0 < one.costs["selected"] < two.costs["selected"]  # every warp repeats the work


# --------------------------------------------------------------------------- the command


def test_without_a_gpu_it_says_so_in_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NSA_PORT_EMULATE", raising=False)
    monkeypatch.setattr(machine, "default_device", lambda: torch.device("cpu"))
    assert cli.main(["tune"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("nsa-port tune: there is no GPU on this machine")
    assert len(told.err.splitlines()) == 1


def test_a_file_that_is_no_table_is_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "notes.json"
    target.write_text("[]")
    monkeypatch.setattr(command, "find_job", lambda *options: JOB)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.main(parser.parse_args(["--out", str(target)])) == 2
    assert "is not a table" in capsys.readouterr().err
    assert target.read_text() == "[]"
