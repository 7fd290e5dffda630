"""What a launch cost, and what the compiler made of a kernel: numbers to compare kernels by.

    with emulated("gfx942", measure=True) as session:
        kernel = some_kernel[grid](...)
    print(report(session.launches[-1]))
    print(inspect(kernel.asm["amdgcn"], kernel.metadata.shared))

Cycles are issue cycles of one SIMD, as if nothing ever waited: a measure of how much of the time
the matrix units could be busy at most, and no prediction of speed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from nsa_port.emulator.architectures import Architecture
from nsa_port.emulator.assembly import Instruction, Program
from nsa_port.emulator.control_flow import is_timing_only
from nsa_port.emulator.errors import EmulatorError
from nsa_port.emulator.matrix import shape_of

_TRANSCENDENTAL = re.compile(r"v_(s_)?(exp|log|rcp|rsq|sqrt|sin|cos)_")
_MEMORY = ("global_", "flat_", "buffer_", "scratch_")
_INTEGERS = {"u8": "i8"}

ISSUE_CYCLES: Mapping[int, Mapping[str, int]] = {
    # CDNA: 64 lanes on a SIMD of 16; transcendental functions at a quarter of that rate. ("CDNA
    # architecture" white paper.)
    9: {"vector": 4, "transcendental": 16, "lds": 4, "memory": 4, "scalar": 4},
    # RDNA: 32 lanes on a SIMD of 32; transcendental functions at a quarter. ("RDNA architecture"
    # white paper.)
    11: {"vector": 1, "transcendental": 4, "lds": 1, "memory": 1, "scalar": 1},
    12: {"vector": 1, "transcendental": 4, "lds": 1, "memory": 1, "scalar": 1},
}
"""Cycles for which one instruction of a wave occupies its SIMD's issue, by generation and class."""


def class_of(instruction: Instruction) -> str:
    """matrix, transcendental, vector, lds, memory, scalar, or timing (which costs nothing here)."""
    name = instruction.name
    if is_timing_only(name):
        return "timing"
    if name.startswith(("v_mfma", "v_wmma")):
        return "matrix"
    if _TRANSCENDENTAL.match(name):
        return "transcendental"
    if name.startswith("v_"):
        return "vector"
    if name.startswith("ds_"):
        return "lds"
    return "memory" if name.startswith(_MEMORY) else "scalar"


def matrix_cycles(instruction: Instruction, architecture: Architecture) -> float:
    """Cycles of one matrix instruction on one SIMD, from the rates of `architectures`."""
    shape = shape_of(instruction)
    form = _INTEGERS.get(shape.left, shape.left)
    if form not in architecture.matrix_flops:
        raise EmulatorError(f"{architecture.name} has no rate for matrices of {form}")
    return shape.operations / (architecture.matrix_flops[form] / architecture.simds)


def issue_cycles(instruction: Instruction, architecture: Architecture) -> float:
    """Cycles for which one instruction of one wave occupies its SIMD."""
    kind = class_of(instruction)
    if kind == "timing":
        return 0
    if kind == "matrix":
        return matrix_cycles(instruction, architecture)
    return ISSUE_CYCLES[architecture.generation][kind]


@dataclass(frozen=True, slots=True)
class Report:
    """What a launch executed.

    instructions: of single waves, and by_class the same by `class_of`. matrix: MFMA or WMMA among
    them. cycles: of issue, over all waves. matrix_share: how much of them MFMA or WMMA take. The
    rest is None unless the session measured: bytes asked for, bytes touched at all, cache lines,
    LDS passes, and as many passes without bank conflicts.
    """

    name: str
    architecture: str
    instructions: int
    by_class: Mapping[str, int]
    matrix: int
    cycles: float
    matrix_share: float
    bytes_moved: int | None = None
    bytes_unique: int | None = None
    lines: int | None = None
    lds_passes: int | None = None
    least_lds_passes: int | None = None

    @property
    def reuse(self) -> float | None:
        """Bytes asked for over bytes touched: what the caches would have to serve."""
        if self.bytes_moved is None or not self.bytes_unique:
            return None
        return self.bytes_moved / self.bytes_unique


def report(launch: object) -> Report:
    """The report of one launch, as `Session.launches` holds it."""
    from nsa_port.emulator.driver import Launch

    if not isinstance(launch, Launch):
        raise TypeError(f"a Launch is needed, not {type(launch).__name__}")
    architecture = launch.program.architecture
    by_class: Counter[str] = Counter()
    total = of_matrices = 0.0
    for instruction, executed in zip(
        launch.program.instructions, launch.counters.executed, strict=True
    ):
        if executed:
            kind = class_of(instruction)
            cycles = executed * issue_cycles(instruction, architecture)
            by_class[kind] += executed
            total += cycles
            of_matrices += cycles if kind == "matrix" else 0
    traffic = launch.traffic
    measured = (
        (None,) * 5
        if traffic is None
        else (
            traffic.moved,
            traffic.unique,
            traffic.lines,
            traffic.passes,
            traffic.least_passes,
        )
    )
    return Report(
        launch.name,
        architecture.name,
        launch.counters.instructions,
        dict(by_class),
        by_class["matrix"],
        total,
        of_matrices / total if total else 0.0,
        *measured,
    )


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the compiler made of a kernel.

    occupancy: waves per SIMD that the registers allow, as the compiler says; it knows nothing of
        the LDS that Triton asks for. workgroups_by_lds: workgroups whose LDS fits one compute unit
        together, or None if the kernel uses none.
    """

    architecture: str
    instructions: int
    vector_registers: int
    accumulation_registers: int
    scalar_registers: int
    vector_spills: int
    scalar_spills: int
    scratch_bytes: int
    lds_bytes: int
    lds_limit: int
    occupancy: int
    matrix_instructions: Mapping[str, int]
    buffer_loads: int
    global_loads: int

    @property
    def workgroups_by_lds(self) -> int | None:
        return self.lds_limit // self.lds_bytes if self.lds_bytes else None

    def problems(self) -> tuple[str, ...]:
        """What would keep this kernel from running, or make it slow beyond doubt."""
        found = []
        if self.lds_bytes > self.lds_limit:
            found.append(f"{self.lds_bytes} bytes of LDS; {self.architecture} has {self.lds_limit}")
        if self.vector_spills or self.scratch_bytes:
            found.append(
                f"{self.vector_spills} vector registers spilled, "
                f"{self.scratch_bytes} bytes of scratch"
            )
        return tuple(found)


def inspect(assembly: str, lds_bytes: int) -> Compiled:
    """Read a kernel's assembly; `lds_bytes` is what Triton asks for (`metadata.shared`)."""
    program = Program.parse(assembly)
    names = [half.name for i in program.instructions for half in i.halves or (i,)]

    def number(key: str) -> int:
        match = re.search(rf"{key}:\s+(\d+)", assembly)
        return int(match.group(1)) if match else 0

    return Compiled(
        architecture=program.architecture.name,
        instructions=len(program.instructions),
        vector_registers=number(r"\.vgpr_count"),
        accumulation_registers=number(r"\.agpr_count"),
        scalar_registers=number(r"\.sgpr_count"),
        vector_spills=number(r"\.vgpr_spill_count"),
        scalar_spills=number(r"\.sgpr_spill_count"),
        scratch_bytes=number(r"\.private_segment_fixed_size"),
        lds_bytes=max(lds_bytes, number(r"\.group_segment_fixed_size")),
        lds_limit=program.architecture.lds_bytes,
        occupancy=number(r";\s*Occupancy"),
        matrix_instructions=Counter(n for n in names if n.startswith(("v_mfma", "v_wmma"))),
        buffer_loads=sum(name.startswith("buffer_load") for name in names),
        global_loads=sum(name.startswith(("global_load", "flat_load")) for name in names),
    )
