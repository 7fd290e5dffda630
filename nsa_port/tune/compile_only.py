"""A Triton driver without a GPU: kernels are compiled for an architecture and never launched.

Operators run on CPU tensors as they would on the device, so that what is compiled is exactly what
they would launch: the same tuned values, the same specialisation. What was compiled stays in
Triton's cache, where a launch on the device finds it.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver

from nsa_port.emulator.architectures import ARCHITECTURES
from nsa_port.tune.machine_code import resources

SHARED_MEMORY: Mapping[str, int] = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    **{name: architecture.lds_bytes for name, architecture in ARCHITECTURES.items()},
}
"""Bytes that one program may use."""


@dataclass(frozen=True)
class Build:
    """One compiled kernel.

    `stack` is the memory of a thread that registers are spilled to, `assembly` PTX or AMD's
    assembly, `binary` what the device would load.
    """

    name: str
    num_warps: int
    shared: int
    registers: int
    stack: int
    assembly: str
    binary: bytes

    @property
    def uses_wgmma(self) -> bool:
        return "wgmma.mma_async" in self.assembly


_devices = itertools.count()
"""Triton keeps what it compiled per device number: each driver is a device of its own."""


class _Launcher:
    """Stands where the driver's launcher would."""

    def __init__(self, source: Any, metadata: Any) -> None:
        del source, metadata

    def __call__(self, *arguments: Any) -> None:
        del arguments


class _Utils:
    """What Triton asks of the device itself."""

    def __init__(self, shared_memory: int) -> None:
        self.shared_memory = shared_memory
        self.loaded = b""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared_memory, "multiprocessor_count": 132}

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[object, object, int, int, int]:
        self.loaded = binary
        return object(), object(), 0, 0, 1024


class CompileOnlyDriver(DriverBase):
    """Says that the device is a `target`, and launches nothing."""

    launcher_cls = _Launcher

    def __init__(self, target: GPUTarget, shared_memory: int) -> None:
        self.device = next(_devices)
        self.utils = _Utils(shared_memory)
        self.target = target

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


def target_named(arch: str) -> GPUTarget:
    """What Triton compiles for by the name that tables give it: `sm_90`, `gfx942`."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)


@contextmanager
def compiling_for(
    arch: str, shared_memory: int | None = None, only: str = ""
) -> Iterator[list[Build]]:
    """Compile for `arch` whatever is launched inside; yields the list that builds are added to.

    A kernel that needs more than `shared_memory` (by default what the architecture has) raises.
    With `only`, kernels of another name are passed over.
    """
    before = driver._active
    active = CompileOnlyDriver(target_named(arch), shared_memory or SHARED_MEMORY[arch])
    driver.set_active(active)
    kept: list[Build] = []
    knobs = triton.knobs.runtime
    hooks = knobs.kernel_load_end_hook, knobs.jit_cache_hook

    def keep(module: Any, function: Any, name: str, metadata_group: Any, hash: str) -> None:
        files = {Path(file).suffix: Path(path) for file, path in metadata_group.items()}
        metadata = json.loads(files[".json"].read_text())
        assembly = files[".ptx" if ".ptx" in files else ".amdgcn"].read_text()
        binary = active.utils.loaded
        registers, stack = resources(binary) if ".ptx" in files else _resources_of_amd(assembly)
        kept.append(
            Build(
                name,
                metadata["num_warps"],
                metadata["shared"],
                registers,
                stack,
                assembly,
                binary,
            )
        )

    def pass_over(fn: Any, **rest: Any) -> bool:
        return fn.name != only

    knobs.kernel_load_end_hook = keep
    if only:
        knobs.jit_cache_hook = pass_over
    try:
        yield kept
    finally:
        knobs.kernel_load_end_hook, knobs.jit_cache_hook = hooks
        driver._active = before


def _resources_of_amd(assembly: str) -> tuple[int, int]:
    """Vector registers, and bytes of scratch memory of each lane, as the assembly declares them."""
    registers, stack = (
        int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])  # type: ignore[index]
        for name in ("vgpr_count", "private_segment_fixed_size")
    )
    return registers, stack
