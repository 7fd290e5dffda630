"""A Triton driver without a GPU: kernels are compiled for an architecture and never launched.

Operators run on CPU tensors as they would on the device, so that what is compiled is exactly what
they would launch: the same tuned values, the same specialisation.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver

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

    @property
    def uses_wgmma(self) -> bool:
        return "wgmma.mma_async" in self.ptx


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
        self.builds.append(Build(name, 0, shared, registers, stack, ""))
        return object(), object(), registers, stack, 1024


class CompileOnlyDriver(DriverBase):
    """Says that the device is an `arch`, and launches nothing."""

    launcher_cls = _Launcher

    def __init__(self, arch: str) -> None:
        self.builds: list[Build] = []
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
        return 0

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
        warps = re.search(r"\.reqntid (\d+)", ptx)
        build = active.builds[-1]
        num_warps = int(warps.group(1)) // 32 if warps else 0
        kept.append(Build(name, num_warps, build.shared, build.registers, build.stack, ptx))

    triton.knobs.runtime.kernel_load_end_hook = keep
    try:
        yield kept
    finally:
        triton.knobs.runtime.kernel_load_end_hook = hook
        driver._active = before


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack, which is where registers are spilled to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run(
            [str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()  # type: ignore[union-attr]
    return int(registers), int(stack)
