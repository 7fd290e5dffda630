"""A Triton driver whose device is an emulated AMD GPU: `kernel[grid](cpu_tensors)` just works.

While it is active, Triton compiles kernels for that GPU, and a launch runs the assembly on copies
of the tensors' storage; what was stored is copied back. Each architecture has a device number of
its own, so that Triton keeps their compiled kernels apart.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from numpy.typing import NDArray
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver as triton_driver

from nsa_port.emulator.architectures import ARCHITECTURES, Architecture, architecture_named
from nsa_port.emulator.assembly import Program
from nsa_port.emulator.counters import Counters, Traffic
from nsa_port.emulator.errors import EmulatorError
from nsa_port.emulator.machine import LaunchShape, Machine
from nsa_port.emulator.memory import GlobalMemory

_FIRST_DEVICE = 1000
_MOST_THREADS = 1024
_PACKING = {
    "i1": "?",
    "u1": "?",
    "i8": "b",
    "u8": "B",
    "i16": "h",
    "u16": "H",
    "i32": "i",
    "u32": "I",
    "i64": "q",
    "u64": "Q",
    "fp16": "e",
    "fp32": "f",
    "fp64": "d",
}


@dataclass(slots=True)
class Launch:
    """One launch: what ran, how long the emulator took, and what it counted."""

    name: str
    shape: LaunchShape
    seconds: float
    program: Program
    counters: Counters
    traffic: Traffic | None


@dataclass(slots=True)
class Session:
    """An emulated GPU while it is in use.

    races: report data races between workgroups. measure: count memory traffic, which is slower.
    keep: remember every launch in `launches`.
    """

    architecture: Architecture
    races: bool = True
    measure: bool = False
    keep: bool = False
    launches: list[Launch] = field(default_factory=list)
    instructions: int = 0
    """Executed by all launches so far."""


class _Loader:
    """Gives Triton a parsed program as the handle of a loaded kernel."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._text = ""

    def note_files(
        self, module: object, function: object, name: str, files: dict[str, str], hash_: str
    ) -> None:
        """Triton's hook before a kernel is loaded: where the stages of its compilation lie."""
        assembly = next((path for file, path in files.items() if file.endswith(".amdgcn")), None)
        self._text = Path(assembly).read_text() if assembly else ""

    def get_device_properties(self, device: int) -> dict[str, int | str]:
        gpu = self._session.architecture
        return {
            "arch": gpu.name,
            "warpSize": gpu.lanes,
            "max_shared_mem": gpu.lds_bytes,
            "multiprocessor_count": gpu.compute_units,
            "max_num_regs": 65536,
            # Of no consequence here; Triton asks.
            "sm_clock_rate": 2_000_000,
            "mem_clock_rate": 1_000_000,
            "mem_bus_width": 8192,
        }

    def load_binary(
        self, name: str, kernel: bytes, shared: int, device: int
    ) -> tuple[int, Program, int, int, int]:
        if not self._text:
            raise EmulatorError(f"Triton kept no assembly of the kernel {name}")
        program, self._text = Program.parse(self._text), ""
        return 1, program, 0, 0, _MOST_THREADS


class _Launcher:
    """What Triton calls to launch a kernel; it outlives the session that it was loaded in."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self._signature = tuple(source.signature.values())
        self._metadata = metadata

    def __call__(
        self,
        columns: int,
        rows: int,
        layers: int,
        stream: int,
        program: Program,
        packed_metadata: object,
        launch_metadata: object,
        enter_hook: Callable[[object], None] | None,
        exit_hook: Callable[[object], None] | None,
        *arguments: object,
    ) -> None:
        grid = (columns, rows, layers)
        if min(grid) <= 0:
            return
        if enter_hook is not None:
            enter_hook(launch_metadata)
        shape = LaunchShape(grid, self._metadata.num_warps, self._metadata.shared)
        values = list(_flatten(self._signature, arguments))
        session = _active[-1][0].session
        run_program(session, self._metadata.name, program, shape, values)
        if exit_hook is not None:
            exit_hook(launch_metadata)


def _flatten(signature: Any, values: Any) -> Iterator[tuple[str, Any]]:
    """(type, value) of every argument that reaches the kernel, tuples taken apart."""
    for type_, value in zip(signature, values, strict=True):
        if isinstance(type_, (tuple, list)):
            yield from _flatten(type_, value)
        elif type_.startswith("tensordesc"):
            raise EmulatorError("the emulator takes no tensor descriptors made on the host")
        elif type_ != "constexpr":
            yield type_, value


def run_program(
    session: Session,
    name: str,
    program: Program,
    shape: LaunchShape,
    arguments: Sequence[tuple[str, Any]],
) -> Launch:
    """Run a program on CPU tensors; `arguments` are (Triton type, value), a pointer's a tensor."""
    started = time.perf_counter()
    memory = GlobalMemory()
    storages: dict[int, tuple[int, NDArray]] = {}
    buffer = bytearray(program.descriptor.get("kernarg_size", 0))
    # Pointers that Triton adds (its own scratch memory) come after the kernel's and stay null.
    places = [place for place in program.arguments if not place.kind.startswith("hidden_")]
    for place, (type_, value) in zip(places, arguments, strict=False):
        packed = _pack(type_, value, memory, storages)
        buffer[place.offset : place.offset + len(packed)] = packed
    hidden = hidden_arguments(shape, program.architecture.lanes)
    for place in program.arguments:
        packed = hidden.get(place.kind, 0).to_bytes(place.size, "little")
        if place.kind.startswith("hidden_"):
            buffer[place.offset : place.offset + place.size] = packed
    traffic = Traffic(program.architecture) if session.measure else None
    machine = Machine(program, memory, races=session.races, traffic=traffic)
    counters = machine.launch(shape, bytes(buffer))
    for address, storage in storages.values():
        if memory.was_written(address):
            storage[:] = memory.contents(address)
    launch = Launch(name, shape, time.perf_counter() - started, program, counters, traffic)
    session.instructions += counters.instructions
    if session.keep:
        session.launches.append(launch)
    return launch


def hidden_arguments(shape: LaunchShape, lanes: int) -> dict[str, int]:
    """What the runtime tells a kernel about its launch, by the metadata's names; the rest is 0."""
    sizes = (shape.waves * lanes, 1, 1)
    return {
        **{f"hidden_block_count_{x}": n for x, n in zip("xyz", shape.grid, strict=True)},
        **{f"hidden_group_size_{x}": n for x, n in zip("xyz", sizes, strict=True)},
        "hidden_grid_dims": 3,
    }


def _pack(
    type_: str, value: Any, memory: GlobalMemory, storages: dict[int, tuple[int, NDArray]]
) -> bytes:
    """One argument as the kernel reads it; a tensor's storage becomes a buffer, once."""
    if not type_.startswith("*"):
        if type_ == "bf16":
            return struct.pack("<f", value)[2:]
        return struct.pack("<" + _PACKING[type_], value)
    if value is None:
        return bytes(8)
    if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
        raise EmulatorError(f"the emulator takes CPU tensors, not {value!r}")
    if not value.data_ptr():  # without elements, also where its storage has some
        return bytes(8)
    storage = value.untyped_storage()
    start = storage.data_ptr()
    if start not in storages:
        whole = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        storages[start] = (memory.add(whole, f"argument {len(storages)}"), whole)
    return struct.pack("<Q", storages[start][0] + value.data_ptr() - start)


class EmulatedDriver(DriverBase):  # type: ignore[misc]
    """The driver that Triton asks for its device, its compilation target and its launcher."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.utils = _Loader(session)
        self.launcher_cls = _Launcher

    @classmethod
    def is_active(cls) -> bool:
        return False  # never chosen by itself

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("an emulated kernel has no launcher in C")

    def get_current_target(self) -> GPUTarget:
        gpu = self.session.architecture
        return GPUTarget("hip", gpu.name, gpu.lanes)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return _FIRST_DEVICE + list(ARCHITECTURES).index(self.session.architecture.name)

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> ModuleType:
        return torch.cpu

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return (self.session.architecture.generation, 0)

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(1)

    def clear_cache(self, cache: torch.Tensor) -> None:
        pass

    def get_benchmarker(self) -> Callable[..., list[float]]:
        """Autotuning goes by the number of executed instructions, the only cost known here."""

        def benchmark(
            call: Callable[[], object],
            *,
            quantiles: Sequence[float] = (0.5, 0.2, 0.8),
            **options: object,
        ) -> list[float]:
            before = self.session.instructions
            call()
            return [float(self.session.instructions - before)] * len(quantiles)

        return benchmark


_active: list[tuple[EmulatedDriver, DriverBase | None]] = []
"""The drivers that are active, innermost last, each with the one that it replaced."""


def activate(
    architecture: str, *, races: bool = True, measure: bool = False, keep: bool = False
) -> Session:
    """Make Triton compile for an emulated GPU and run there, until `deactivate`.

    `ValueError` for an architecture that is not emulated. The options are those of `Session`.
    """
    session = Session(architecture_named(architecture), races, measure, keep)
    try:
        previous: DriverBase | None = triton_driver.active
    except RuntimeError:  # no GPU here
        previous = None
    driver = EmulatedDriver(session)
    _active.append((driver, previous))
    knobs.runtime.kernel_load_start_hook.add(driver.utils.note_files)
    triton_driver.set_active(driver)
    return session


def deactivate() -> None:
    """Undo the last `activate`; without one, do nothing."""
    if _active:
        driver, previous = _active.pop()
        knobs.runtime.kernel_load_start_hook.remove(driver.utils.note_files)
        triton_driver.set_active(previous)


@contextmanager
def emulated(
    architecture: str, *, races: bool = True, measure: bool = False, keep: bool = True
) -> Iterator[Session]:
    """`activate` for the length of a `with` statement; launches are kept unless told otherwise."""
    session = activate(architecture, races=races, measure=measure, keep=keep)
    try:
        yield session
    finally:
        deactivate()


@contextmanager
def using(architecture: str) -> Iterator[Session]:
    """The session of that GPU: the current one if it is emulated already, else a new one.

    For a backend, whose caller may have set up a session of his own with other options.
    """
    if _active and _active[-1][0].session.architecture.name == architecture:
        yield _active[-1][0].session
        return
    with emulated(architecture, keep=False) as session:
        yield session
