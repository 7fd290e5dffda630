"""The search: every candidate of every kernel for every shape, and which is the fastest."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from types import TracebackType

import torch

from nsa_port.bench.shapes import Heads
from nsa_port.bench.timing import progress
from nsa_port.kernels import tables
from nsa_port.kernels.tables import Values, tuned
from nsa_port.tune.candidates import KERNELS, candidates
from nsa_port.tune.trial import Job, Verdict, compile_candidate, compile_only, try_candidate


class CannotTune(Exception):
    """Why this machine or these options leave nothing to tune, in one sentence."""


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
