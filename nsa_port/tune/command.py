"""`nsa-port tune`: find the fastest values on this machine and write them as a table.

Nothing is ever tuned unless asked: a run of this command ends in a file, and the environment
variable `NSA_PORT_TABLES` makes the library use it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from nsa_port import environment as machine
from nsa_port.bench.command import heads_argument, machine_facts
from nsa_port.bench.shapes import STANDARD, Heads, parse_heads
from nsa_port.bench.timing import progress
from nsa_port.conformance.case import backend_named
from nsa_port.kernels import tables
from nsa_port.kernels.tables import Entry, Table, TableError, Values, tuned
from nsa_port.tune.candidates import KERNELS, candidates
from nsa_port.tune.trial import Job, Verdict, compile_candidate, compile_only, try_candidate

BACKENDS = ("cuda", "rocm")
_LENGTH, _CHECKED_LENGTH, _EMULATED_LENGTH = 8192, 512, 128
_EMULATED_SHAPE = "4,1,64,64"


class CannotTune(Exception):
    """Why this machine or these options leave nothing to tune, in one sentence."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `nsa-port tune`."""
    add = parser.add_argument
    add("--backend", choices=BACKENDS, help="by default the one made for the GPU at hand")
    add(
        "--shapes",
        nargs="+",
        type=heads_argument,
        metavar="SHAPE",
        help="A1, A2, B, or H,HK,Dk,Dv; by default A2",
    )
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--length", type=int, help=f"in tokens, by default {_LENGTH}; emulated {_EMULATED_LENGTH}")
    add("--kernels", nargs="+", choices=list(KERNELS), help="by default all")
    add(
        "--may-spill",
        type=int,
        default=0,
        metavar="BYTES",
        help="of a thread's registers, by default 0",
    )
    add("--out", type=Path, metavar="FILE", help="by default ./<architecture>.json")


def main(args: argparse.Namespace) -> int:
    """Try candidates, print what was found, write the table. 2 if nothing can be tuned here."""
    try:
        job = find_job(args.backend, args.dtype, args.length)
        shapes = args.shapes or [parse_heads(_EMULATED_SHAPE) if job.emulated else STANDARD["A2"]]
        out = args.out or Path(f"{job.arch}.json")
        out.parent.mkdir(parents=True, exist_ok=True)
        before = json.loads(out.read_text(encoding="utf-8")) if _is_table(out, job.arch) else {}
        found = tune(job, shapes, args.kernels, args.may_spill)
    except (CannotTune, TableError) as error:
        print(f"nsa-port tune: {error}", file=sys.stderr)
        return 2
    print(describe(found))
    out.write_text(to_text(document(found, before)), encoding="utf-8")
    print(f"\nwritten to {out}; NSA_PORT_TABLES={out.resolve().parent} makes nsa_port use it")
    if out.name != f"{job.arch}.json":
        print(f"once it is called {job.arch}.json, the name under which {job.arch} looks for it")
    return 0


def find_job(backend: str | None, dtype: str, length: int | None) -> Job:
    """What is tuned here: the GPU at hand, or the one that `NSA_PORT_EMULATE` names.

    The job's shape is still to be set.

    Raises:
        CannotTune: there is no GPU, or the backend does not run on it.
    """
    environment = machine.probe(machine.default_device())
    if environment.emulate and backend == "rocm":
        environment = machine.probe(torch.device("cpu"))
    emulated = environment.device_type == "cpu" and bool(environment.emulate)
    if environment.device_type != "cuda" and not emulated:
        raise CannotTune(
            "there is no GPU on this machine whose kernels could be timed; with "
            "NSA_PORT_EMULATE=gfx942 candidates are ranked by the cycles they take to issue"
        )
    native = "rocm" if emulated or environment.hip_version else "cuda"
    chosen = backend_named(backend or native)
    reasons = [reason for reason in chosen.machine_reasons(environment) if not reason.soft]
    if environment.interpreter:
        raise CannotTune("TRITON_INTERPRET=1 keeps kernels from being compiled: unset it")
    if reasons:
        raise CannotTune(f"{chosen.name} does not run here: {'; '.join(map(str, reasons))}")
    length = length or (_EMULATED_LENGTH if emulated else _LENGTH)
    return Job(
        backend=chosen.name,
        module=chosen.kernels["selected_attention"],
        arch=environment.emulate if emulated else environment.arch,
        shared_memory=environment.shared_memory or None,
        device="cpu" if emulated else "cuda",
        heads=STANDARD["A2"],
        dtype=dtype,
        length=length,
        check_length=length if emulated else min(length, _CHECKED_LENGTH),
        emulated=emulated,
    )


# --------------------------------------------------------------------------- the search


@dataclass
class Trial:
    """One candidate of one kernel for one shape, and what came of it."""

    job: Job
    kernel: str
    values: Values
    shipped: bool
    verdict: Verdict = field(default_factory=Verdict)


@dataclass(frozen=True, slots=True)
class Found:
    """What a run found: the best values of each kernel for each pair of head dimensions."""

    job: Job
    shapes: tuple[Heads, ...]
    best: Mapping[tuple[str, tuple[int, int]], Values]
    trials: tuple[Trial, ...]


def tune(
    job: Job, shapes: Iterable[Heads], kernels: Iterable[str] | None = None, may_spill: int = 0
) -> Found:
    """Try every candidate of the kernels (all of them by default) for every shape."""
    shapes = tuple(shapes)
    known = [kernel for kernel in tables.load_table(job.arch) if kernel in KERNELS]
    wanted = list(kernels or known)
    if absent := [kernel for kernel in wanted if kernel not in known]:
        raise CannotTune(f"{job.arch} has no kernel {', '.join(absent)}; it has {', '.join(known)}")
    trials = [
        Trial(replace(job, heads=heads), kernel, values, shipped=number == 0)
        for heads in shapes
        for kernel in wanted
        for number, values in enumerate(_candidates(job, heads, kernel))
    ]
    _compile(trials, may_spill)
    _run(trials)
    uses = dict.fromkeys((trial.kernel, dims_of(trial)) for trial in trials)
    best = {use: values for use in uses if (values := fastest(_of(trials, *use))) is not None}
    return Found(job, shapes, best, tuple(trials))


def dims_of(trial: Trial) -> tuple[int, int]:
    """The pair of head dimensions that an entry with the trial's values is for."""
    heads, keys_alone = trial.job.heads, KERNELS[trial.kernel].keys_alone
    return heads.key_dim, heads.key_dim if keys_alone else heads.value_dim


def fastest(trials: Iterable[Trial]) -> Values | None:
    """The values that took least, relative to the table's, over all calls and shapes.

    None if none ran for every shape.
    """
    by_shape: dict[Heads, list[Trial]] = {}
    for trial in trials:
        by_shape.setdefault(trial.job.heads, []).append(trial)
    known: list[Values] = []
    scores: list[list[float]] = []
    for found in by_shape.values():
        running = [trial for trial in found if trial.verdict.costs]
        if not running:
            continue
        yardstick = next((trial for trial in running if trial.shipped), running[0]).verdict.costs
        for trial in running:
            if trial.values not in known:
                known.append(trial.values)
                scores.append([])
            ratios = [cost / yardstick[call] for call, cost in trial.verdict.costs.items()]
            scores[known.index(trial.values)].append(math.log(sum(ratios) / len(ratios)))
    everywhere = [
        (sum(score), number) for number, score in enumerate(scores) if len(score) == len(by_shape)
    ]
    return known[min(everywhere)[1]] if everywhere else None


def _candidates(job: Job, heads: Heads, kernel: str) -> Iterable[Values]:
    element_size = getattr(torch, job.dtype).itemsize
    dims = (heads.key_dim,) if KERNELS[kernel].keys_alone else (heads.key_dim, heads.value_dim)
    return candidates(kernel, job.backend, tuned(job.arch, kernel, element_size, *dims))


def _of(trials: Iterable[Trial], kernel: str, dims: tuple[int, int]) -> list[Trial]:
    return [trial for trial in trials if (trial.kernel, dims_of(trial)) == (kernel, dims)]


def _compile(trials: list[Trial], may_spill: int) -> None:
    """Compile all candidates, in as many processes as there are processors."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    workers = min(processors or os.cpu_count() or 1, len(trials))
    with ProcessPoolExecutor(workers, get_context("spawn"), compile_only) as pool:
        # What the table has is what runs today, and the yardstick, whatever it spills.
        futures = [
            pool.submit(
                compile_candidate,
                trial.job,
                trial.kernel,
                trial.values,
                sys.maxsize if trial.shipped else may_spill,
            )
            for trial in trials
        ]
        for number, (trial, future) in enumerate(zip(trials, futures, strict=True)):
            trial.verdict = Verdict(out=future.result())
            progress(f"compiled {number + 1} of {len(trials)}")


def _run(trials: list[Trial]) -> None:
    """Run what compiled well, one after the other; the table's values are first of each kernel."""
    wrong: set[tuple[Heads, str]] = set()
    with _Runner(in_process=trials[0].job.emulated) as runner:
        for number, trial in enumerate(trials):
            if not trial.verdict.out:
                use = (trial.job.heads, trial.kernel)
                trial.verdict = runner(trial, use not in wrong)
                if trial.shipped and trial.verdict.out:
                    wrong.add(use)
            elif trial.shipped:
                wrong.add((trial.job.heads, trial.kernel))
            progress(f"{trial.job.heads.name} {trial.kernel}: tried {number + 1} of {len(trials)}")


class _Runner:
    """Runs candidates in a process of their own, a new one after each that broke the device."""

    def __init__(self, in_process: bool, start: str = "spawn") -> None:
        self._in_process, self._start = in_process, start
        self._pool: ProcessPoolExecutor | None = None

    def __call__(self, trial: Trial, against_table: bool) -> Verdict:
        task = (trial.job, trial.kernel, trial.values, against_table)
        if self._in_process:
            return try_candidate(*task)
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, get_context(self._start))
        try:
            verdict = self._pool.submit(try_candidate, *task).result()
        except BrokenProcessPool:
            verdict = Verdict(out="its process died", fatal=True)
        if verdict.fatal:
            self._stop()
        return verdict

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def __enter__(self) -> _Runner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()


# --------------------------------------------------------------------------- what is told


def describe(found: Found) -> str:
    """The result for people: per kernel and shape the table's values next to the best."""
    unit = "cycles" if found.job.emulated else "ms"
    lines = [f"{found.job.arch}, {found.job.dtype}, {found.job.length} tokens, costs in {unit}"]
    for row in figures(found):
        lines.append(f"\n{row['shape']} {row['kernel']}: {row['tried']} candidates")
        for name in ("table", "best"):
            costs = row[f"{name}_costs"]
            told = ", ".join(f"{call} {cost:.4g}" for call, cost in costs.items())
            told = told or row["table_out"]
            lines.append(f"  {name:6}{told:40}  {_values_text(row[f'{name}_values'])}")
        lines += [f"  {count} out: {reason}" for reason, count in row["out"].items()]
    return "\n".join(lines)


def figures(found: Found) -> list[dict[str, Any]]:
    """What was measured, one row per shape and kernel."""
    rows = []
    for heads in found.shapes:
        for kernel in dict.fromkeys(trial.kernel for trial in found.trials):
            own = [t for t in found.trials if (t.job.heads, t.kernel) == (heads, kernel)]
            table = next(trial for trial in own if trial.shipped)
            values = found.best.get((kernel, dims_of(table)))
            best = next((trial for trial in own if trial.values == values), None)
            reasons = Counter(_kind(trial.verdict.out) for trial in own if trial.verdict.out)
            rows.append(
                {
                    "shape": heads.name,
                    "kernel": kernel,
                    "table_values": table.values,
                    "table_costs": dict(table.verdict.costs),
                    "table_out": table.verdict.out,
                    "best_values": values,
                    "best_costs": dict(best.verdict.costs) if best else {},
                    "tried": len(own),
                    "out": dict(reasons),
                }
            )
    return rows


def document(found: Found, before: dict[str, Any]) -> dict[str, Any]:
    """The table of a run over what the file held before, with what was measured beside it."""
    job = found.job
    facts = {key: value for key, value in machine_facts(job.device).items() if value is not None}
    run = {
        "date": date.today().isoformat(),
        "machine": facts,
        "emulated": job.emulated,
        "dtype": job.dtype,
        "length": job.length,
        "cost": "issue cycles" if job.emulated else "milliseconds",
        "figures": figures(found),
    }
    kernels: Table = {name: list(entries) for name, entries in before.get("kernels", {}).items()}
    element_size = getattr(torch, job.dtype).itemsize
    for (kernel, dims), values in found.best.items():
        use = {"element_size": element_size, "head_dim": max(dims), "exact_dims": [list(dims)]}
        others = [entry for entry in kernels.get(kernel, []) if not _same_use(entry, use)]
        kernels[kernel] = [{**use, **values}, *others]
    how = "ranked by emulated cycles" if job.emulated else f"measured on {facts['device_name']}"
    return {
        "architecture": job.arch,
        "status": f"Written by nsa-port tune, {how}.",
        "kernels": kernels,
        "measured": [*before.get("measured", []), run],
    }


def to_text(content: dict[str, Any]) -> str:
    """JSON with one line per entry, as the shipped tables have it."""
    text = json.dumps({**content, "kernels": {}}, indent=2)
    lists = ",\n".join(
        f'    "{kernel}": [\n'
        + ",\n".join(f"      {json.dumps(entry)}" for entry in entries)
        + "\n    ]"
        for kernel, entries in content["kernels"].items()
    )
    return text.replace('"kernels": {}', f'"kernels": {{\n{lists}\n  }}', 1) + "\n"


def _is_table(path: Path, arch: str) -> bool:
    """Whether there is a table to add to; raises TableError for a file that is none."""
    if not path.exists():
        return False
    tables.read_table(path, arch)
    return True


def _same_use(entry: Entry, use: Entry) -> bool:
    return all(entry.get(name) == use[name] for name in tables.CONDITIONS)


def _kind(reason: str) -> str:
    """A reason without its numbers, so that like reasons are counted together."""
    if reason.startswith("spills"):
        return "spills registers"
    return "too much shared memory" if reason.startswith("OutOfResources") else reason


def _values_text(values: Values | None) -> str:
    return "none" if values is None else ", ".join(f"{k}={v}" for k, v in values.items())
