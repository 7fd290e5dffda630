"""One candidate: whether it compiles well, whether it is right, and what it costs."""

from __future__ import annotations

import functools
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from nsa_port.bench.shapes import Heads
from nsa_port.bench.timing import once
from nsa_port.kernels.tables import Values, tuned_to
from nsa_port.tune.calls import Calls, Outputs
from nsa_port.tune.candidates import KERNELS

REPEATS = 7
_COMPILED_LENGTH = 2048
"""Tokens of the calls that are only compiled, at most: lengths are no part of a kernel, but where
every block is chosen, none is scored."""


@dataclass(frozen=True, slots=True)
class Job:
    """What all candidates of one shape have in common.

    Args:
        module: the kernels' module.
        shared_memory: bytes that a program may have, None for what `arch` is known to have.
        check_length: tokens at which results are held to the float64 reference.
        emulated: `arch` is emulated, so that cost is counted cycles and not measured time.
    """

    backend: str
    module: str
    arch: str
    shared_memory: int | None
    device: str
    heads: Heads
    dtype: str
    length: int
    check_length: int
    emulated: bool = False

    def calls(self, length: int, device: str, empty: bool = False) -> Calls:
        return Calls(self.module, self.backend, self.heads, length, self.dtype, device, empty)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a candidate: the cost of each call, or why it is out.

    `fatal`: the process can run nothing any more.
    """

    costs: Mapping[str, float] = field(default_factory=dict)
    out: str = ""
    fatal: bool = False


def changes(kernel: str, values: Values) -> dict[str, Values]:
    """What to lay over the tables so that the kernel runs, with these values."""
    found = {name: dict(change) for name, change in KERNELS[kernel].along_with.items()}
    found[kernel] = {**values, **found.get(kernel, {})}
    return found


# --------------------------------------------------------------------------- compiling


def compile_only() -> None:
    """Set a process up that is only to compile: no device, one thread."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)


def compile_candidate(job: Job, kernel: str, values: Values, may_spill: int = 0) -> str:
    """Compile a candidate without the device. An empty string, or why it is out.

    `may_spill` bytes of a thread's registers may go to memory.
    """
    from nsa_port.tune.compile_only import compiling_for
    from nsa_port.tune.machine_code import reads_before_writes

    calls = job.calls(min(job.length, _COMPILED_LENGTH), "cpu", empty=True)
    try:
        with (
            compiling_for(job.arch, job.shared_memory, KERNELS[kernel].function) as own,
            tuned_to(changes(kernel, values)),
        ):
            for name in KERNELS[kernel].calls:
                calls.run(name)
    except Exception as error:  # whatever keeps it from compiling takes the candidate out
        return _first_line(error)
    if not own:
        return "these calls do not launch it"
    spilled = max(build.stack for build in own)
    if spilled > may_spill:
        return f"spills {spilled} bytes of registers"
    if any(build.uses_wgmma and reads_before_writes(build.binary) for build in own):
        return "miscompiled: the machine code reads a register that no path has written"
    return ""


# --------------------------------------------------------------------------- running


def try_candidate(job: Job, kernel: str, values: Values, against_table: bool) -> Verdict:
    """Run a candidate on the device: check every call, then measure it.

    Results are held to the float64 reference, and at the full length, where that would take too
    long, to those of the table's values (with `against_table`).
    """
    costs = {}
    try:
        for name in KERNELS[kernel].calls:
            with _device_of(job):
                cost = _try_call(job, name, changes(kernel, values), against_table)
            if isinstance(cost, str):
                return Verdict(out=cost)
            costs[name] = cost
    except Exception as error:  # whatever goes wrong on the device takes the candidate out
        return Verdict(out=_first_line(error), fatal=is_dead(job.device))
    return Verdict(costs)


def _try_call(job: Job, name: str, changed: dict[str, Values], against_table: bool) -> float | str:
    small = _calls(job, job.check_length)
    small.prepare(name)
    with tuned_to(changed):
        outputs, cost = measure(job, partial(small.run, name), job.check_length == job.length)
    if faults := small.faults(name, outputs):
        return "; ".join(faults)
    if job.check_length == job.length:
        return cost
    calls = _calls(job, job.length)
    calls.prepare(name)
    before = _by_table(job, name) if against_table else None
    with tuned_to(changed):
        outputs, cost = measure(job, partial(calls.run, name), True)
    differences = calls.differences(name, outputs, before) if before else []
    return "; ".join(differences) or cost


def measure(job: Job, call: Callable[[], Outputs], repeat: bool) -> tuple[Outputs, float]:
    """The outputs of a call and what it costs: milliseconds, or issue cycles if emulated."""
    if job.emulated:
        from nsa_port import emulator
        from nsa_port.emulator.report import report

        with emulator.emulated(job.arch, races=False) as session:
            outputs = call()
            return outputs, sum(report(launch).cycles for launch in session.launches)
    outputs = call()
    if not repeat:
        return outputs, 0.0
    call()
    samples = [once(call, job.device).seconds for _ in range(REPEATS)]
    return outputs, statistics.median(samples) * 1e3


@functools.lru_cache(maxsize=2)
def _calls(job: Job, length: int) -> Calls:
    return job.calls(length, job.device)


@functools.lru_cache(maxsize=2)
def _by_table(job: Job, name: str) -> Outputs:
    return _calls(job, job.length).run(name)


@contextmanager
def _device_of(job: Job) -> Iterator[None]:
    """Triton's driver is the emulated GPU's, if that is what runs."""
    if not job.emulated:
        yield
        return
    from nsa_port import emulator

    with emulator.emulated(job.arch, races=False, keep=False):
        yield


def is_dead(device: str | torch.device) -> bool:
    """Whether an error has taken the device's context with it, as an illegal access does."""
    if torch.device(device).type == "cpu":
        return False
    try:
        torch.accelerator.synchronize()
    except Exception:  # torch's class for it differs between versions
        return True
    return False


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]
