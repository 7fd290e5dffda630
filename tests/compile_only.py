"""A Triton driver without a GPU: kernels are compiled for an architecture and never launched.

Operators run on CPU tensors as they would on the device, so that what is compiled is exactly what
they would launch: the same tuned values, the same specialisation.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver

from tests.machine_code import resources

SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
"""Bytes that one program may use."""


@dataclass(frozen=True)
class Build:
    """One compiled kernel."""

    name: str
    num_warps: int
    shared: int
    registers: int
    stack: int
    ptx: str
    cubin: bytes

    @property
    def uses_wgmma(self) -> bool:
        return "wgmma.mma_async" in self.ptx


_devices = itertools.count()
"""Triton keeps what it compiled per device number: each driver is a device of its own."""


class _Launcher:
    """Stands where the driver's launcher would; keeps what would have been launched."""

    def __init__(self, source: Any, metadata: Any) -> None:
        del source, metadata

    def __call__(self, *arguments: Any) -> None:
        del arguments


class _Utils:
    """What Triton asks of the device itself."""

    def __init__(self, arch: str, builds: list[Build]) -> None:
        self.arch, self.builds = arch, builds

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[self.arch], "multiprocessor_count": 132}

    def load_binary(
        self, name: str, cubin: bytes, shared: int, device: int
    ) -> tuple[object, object, int, int, int]:
        registers, stack = resources(cubin)
        self.builds.append(Build(name, 0, shared, registers, stack, "", cubin))
        return object(), object(), registers, stack, 1024


class CompileOnlyDriver(DriverBase):
    """Says that the device is an `arch`, and launches nothing."""

    launcher_cls = _Launcher

    def __init__(self, arch: str) -> None:
        self.builds: list[Build] = []
        self.device = next(_devices)
        self.utils = _Utils(arch, self.builds)
        self.target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        return "void*"

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs on a driver that only compiles")

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling_for(arch: str) -> Iterator[list[Build]]:
    """Compile for `arch` whatever is launched inside; yields the list that builds are added to."""
    before = driver._active
    active = CompileOnlyDriver(arch)
    driver.set_active(active)
    kept: list[Build] = []
    hook = triton.knobs.runtime.kernel_load_end_hook

    def keep(module: Any, function: Any, name: str, metadata_group: Any, hash: str) -> None:
        ptx = next(Path(p).read_text() for f, p in metadata_group.items() if f.endswith(".ptx"))
        threads = re.search(r"\.reqntid (\d+)", ptx)
        num_warps = int(threads.group(1)) // 32 if threads else 0
        kept.append(replace(active.builds[-1], num_warps=num_warps, ptx=ptx))

    triton.knobs.runtime.kernel_load_end_hook = keep
    try:
        yield kept
    finally:
        triton.knobs.runtime.kernel_load_end_hook = hook
        driver._active = before
