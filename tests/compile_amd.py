"""`compile_only` for AMD GPUs: what the compiler makes of what is launched, and nothing runs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from nsa_port.emulator.architectures import architecture_named
from nsa_port.emulator.report import Compiled, inspect
from tests.compile_only import CompileOnlyDriver


@dataclass(frozen=True)
class AmdBuild:
    """One compiled kernel."""

    name: str
    num_warps: int
    facts: Compiled
    assembly: str


class _Utils:
    """What Triton asks of the device itself. Kernels that do not fit it compile all the same."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 2**30, "multiprocessor_count": 304, "warpSize": 64}

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[object, object, int, int, int]:
        return object(), object(), 0, 0, 1024


class _AmdDriver(CompileOnlyDriver):
    utils: Any

    def __init__(self, arch: str) -> None:
        self.utils = _Utils()
        self.device = next(_devices)
        self.target = GPUTarget("hip", arch, architecture_named(arch).lanes)


_devices = itertools.count(10_000)
"""Each driver is a device of its own, so that Triton loads again what it has compiled before."""


def _build_of(metadata_group: dict[str, str]) -> AmdBuild:
    """The build whose files Triton names when it loads a kernel."""
    files = {Path(file).suffix: Path(path).read_text() for file, path in metadata_group.items()
             if file.endswith((".amdgcn", ".json"))}  # fmt: skip
    metadata = json.loads(files[".json"])
    facts = inspect(files[".amdgcn"], metadata["shared"])
    return AmdBuild(metadata["name"], metadata["num_warps"], facts, files[".amdgcn"])


@contextmanager
def loaded_builds() -> Iterator[list[AmdBuild]]:
    """Collect the builds of the kernels that Triton loads inside."""
    kept: list[AmdBuild] = []
    hook = triton.knobs.runtime.kernel_load_end_hook

    def keep(module: Any, function: Any, name: str, metadata_group: Any, hash: str) -> None:
        kept.append(_build_of(metadata_group))

    triton.knobs.runtime.kernel_load_end_hook = keep
    try:
        yield kept
    finally:
        triton.knobs.runtime.kernel_load_end_hook = hook


@contextmanager
def compiling_for_amd(arch: str) -> Iterator[list[AmdBuild]]:
    """Compile for `arch` whatever is launched inside; yields the list that builds are added to."""
    before = driver._active
    driver.set_active(_AmdDriver(arch))
    try:
        with loaded_builds() as kept:
            yield kept
    finally:
        driver._active = before
