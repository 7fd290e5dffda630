"""Branches, barriers, the end of a program, and the instructions that only concern timing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from nsa_port.emulator.architectures import Architecture
from nsa_port.emulator.assembly import EXEC, VCC, Instruction, Program
from nsa_port.emulator.errors import EmulatorError, Trap
from nsa_port.emulator.number_formats import Array
from nsa_port.emulator.operations import Compile
from nsa_port.emulator.registers import Step, Waves

Condition = Callable[[Waves], Array]
"""bool [count]: which of the chosen waves take a branch."""


@dataclass(frozen=True, slots=True)
class Branch:
    """Go to `target` where the condition holds."""

    target: int
    taken: Condition


class Barrier:
    """Wait until every wave of the workgroup that still runs is here."""


class End:
    """The wave ends."""


Control = Branch | Barrier | End


def _always(waves: Waves) -> Array:
    return np.ones(waves.count, bool)


def _carry_is_clear(waves: Waves) -> Array:
    return ~waves.carry[waves.chosen]


def _carry_is_set(waves: Waves) -> Array:
    return waves.carry[waves.chosen]


def _mask_is_zero(register: int) -> Condition:
    def holds(waves: Waves) -> Array:
        zero = waves.scalar[register, waves.chosen] == 0
        if waves.lanes == 64:
            zero = zero & (waves.scalar[register + 1, waves.chosen] == 0)
        return zero

    return holds


def _mask_is_not_zero(register: int) -> Condition:
    zero = _mask_is_zero(register)
    return lambda waves: ~zero(waves)


BRANCHES: Mapping[str, Condition] = {
    "s_branch": _always,
    "s_cbranch_scc0": _carry_is_clear,
    "s_cbranch_scc1": _carry_is_set,
    "s_cbranch_vccz": _mask_is_zero(VCC),
    "s_cbranch_vccnz": _mask_is_not_zero(VCC),
    "s_cbranch_execz": _mask_is_zero(EXEC),
    "s_cbranch_execnz": _mask_is_not_zero(EXEC),
}
BARRIERS = ("s_barrier", "s_barrier_wait")
_TIMING_ONLY = re.compile(
    r"v_nop$"
    r"|s_(waitcnt\w*|wait_\w+|nop|delay_alu|clause|sendmsg|sleep|setprio\w*|set_inst_prefetch_distance"
    r"|inst_prefetch|icache_inv|dcache_\w+|sched_\w+|code_end|version|setreg\w*|round_mode"
    r"|denorm_mode|ttracedata\w*|prefetch\w*|barrier_signal|barrier_leave)$"
    r"|(buffer|global)_(gl0_inv|gl1_inv|inv|wb|wbinv|wbl2|wbinvl1\w*|invl2|prefetch\w*)$"
)


def control_of(instruction: Instruction, program: Program) -> Control | None:
    """What an instruction does to the program counter, or None if it only goes on."""
    if instruction.name in BRANCHES:
        label = str(instruction.operands[0].value)
        if label not in program.labels:
            raise EmulatorError(f"there is no label {label}")
        return Branch(program.labels[label], BRANCHES[instruction.name])
    if instruction.name in BARRIERS:
        return Barrier()
    return End() if instruction.name == "s_endpgm" else None


def is_timing_only(name: str) -> bool:
    """Whether an instruction changes nothing but when things happen."""
    return _TIMING_ONLY.match(name) is not None


def compile_trap(instruction: Instruction, architecture: Architecture) -> Step:
    """s_trap: the kernel stops itself."""

    def step(waves: Waves) -> None:
        raise Trap("the kernel trapped: a device assertion failed, or it reached unreachable code")

    return step


TABLE: Mapping[str, Compile] = {"s_trap": compile_trap}
