"""What a call costs on an emulated AMD GPU: executed instructions, cycles, traffic, registers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import triton
from triton.compiler.compiler import max_shared_mem

from nsa_port.emulator import emulated
from nsa_port.emulator.architectures import ARCHITECTURES, Architecture
from nsa_port.emulator.driver import Launch
from nsa_port.emulator.report import Compiled, inspect, issue_cycles, report

_facts: dict[tuple[str, int], Compiled] = {}
"""What the compiler made of each program that ran: Triton loads a kernel once in a process."""


@dataclass(frozen=True)
class Run:
    """One launch.

    cycles: issue cycles of all waves, as if nothing ever waited; matrix_cycles those of matrix
    instructions among them. waves_per_simd: how many the registers and the LDS let in.
    """

    name: str
    workgroups: int
    num_warps: int
    instructions: int
    matrix: int
    cycles: float
    matrix_cycles: float
    bytes_moved: int
    bytes_unique: int
    lds_passes: int
    facts: Compiled

    @property
    def waves_per_simd(self) -> float:
        chip = ARCHITECTURES[self.facts.architecture]
        by_lds = self.facts.workgroups_by_lds
        waves = float(self.facts.occupancy)
        if by_lds is not None:
            waves = min(waves, by_lds * self.num_warps / chip.simds)
        return waves


def measure(arch: str, call: Callable[[], Any], *, traffic: bool = True) -> list[Run]:
    """Run a call on an emulated `arch` and count; data races and stray accesses raise."""
    with _loaded() as fresh, emulated(arch, measure=traffic) as session:
        call()
    runs = []
    for launch in session.launches:
        key = (launch.name, id(launch.program))
        if key not in _facts:
            _facts[key] = fresh[launch.name]
            _kept.append(launch)
        runs.append(_run_of(launch, _facts[key]))
    return runs


@contextmanager
def _loaded() -> Iterator[dict[str, Compiled]]:
    """By name, what the compiler made of the kernels that Triton loads inside."""
    found: dict[str, Compiled] = {}
    hook = triton.knobs.runtime.kernel_load_end_hook

    def keep(module: Any, function: Any, name: str, files: dict[str, str], hash: str) -> None:
        text = {Path(file).suffix: Path(path) for file, path in files.items()}
        metadata = json.loads(text[".json"].read_text())
        found[metadata["name"]] = inspect(text[".amdgcn"].read_text(), metadata["shared"])

    triton.knobs.runtime.kernel_load_end_hook = keep
    try:
        yield found
    finally:
        triton.knobs.runtime.kernel_load_end_hook = hook


_kept: list[Launch] = []
"""Keeps programs alive, so that no two have the same `id`."""


def _run_of(launch: Launch, facts: Compiled) -> Run:
    found = report(launch)
    chip = launch.program.architecture
    cycles = sum(
        executed * issue_cycles(instruction, chip)
        for instruction, executed in zip(
            launch.program.instructions, launch.counters.executed, strict=True
        )
        if executed
    )
    return Run(
        launch.name,
        launch.shape.workgroups,
        launch.shape.waves,
        found.instructions,
        found.matrix,
        cycles,
        cycles * found.matrix_share,
        found.bytes_moved or 0,
        found.bytes_unique or 0,
        found.lds_passes or 0,
        facts,
    )


@contextmanager
def without_lds_limit(arch: str) -> Iterator[None]:
    """Let kernels have more LDS than the GPU does, to count what could not run there."""
    chips = cast("dict[str, Architecture]", ARCHITECTURES)
    before = chips[arch]
    chips[arch] = replace(before, lds_bytes=2**20)
    max_shared_mem.cache_clear()
    try:
        yield
    finally:
        chips[arch] = before
        max_shared_mem.cache_clear()
