"""From a parsed program to functions that run: every instruction class's table, joined."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from nsa_port.emulator import (
    atomics,
    carries_and_division,
    comparisons,
    control_flow,
    conversions,
    cross_lane,
    local_data_share,
    matrix,
    packed,
    scalar_alu,
    scalar_memory,
    vector_alu,
    vector_memory,
)
from nsa_port.emulator.architectures import Architecture
from nsa_port.emulator.assembly import Instruction, Program
from nsa_port.emulator.control_flow import Control, control_of, is_timing_only
from nsa_port.emulator.errors import EmulatorError, UnknownInstruction
from nsa_port.emulator.operations import Compile
from nsa_port.emulator.registers import Step, Waves

TABLE: Mapping[str, Compile] = {
    **scalar_alu.TABLE,
    **scalar_memory.TABLE,
    **vector_alu.TABLE,
    **carries_and_division.TABLE,
    **comparisons.TABLE,
    **packed.TABLE,
    **cross_lane.TABLE,
    **local_data_share.TABLE,
    **vector_memory.TABLE,
    **atomics.TABLE,
    **control_flow.TABLE,
}
"""Every instruction but the matrix ones, whose names are taken apart by `matrix`, and branches."""

_UNDERSTAND_DPP = (
    vector_alu.compile_operation,
    comparisons.compile_comparison,
    comparisons.compile_select,
)
_UNDERSTAND_SDWA = (
    *_UNDERSTAND_DPP,
    conversions.compile_from_float8,
    conversions.compile_pair_from_float8,
)
_WHERE_TO_ADD = (
    (r"s_(buffer_)?load_", "WORDS or NARROW", "scalar_memory.py"),
    (r"s_c?branch|s_barrier", "BRANCHES or BARRIERS", "control_flow.py"),
    (r"s_|v_s_", "OPERATIONS", "scalar_alu.py"),
    (r"v_(mfma|wmma)", "INPUT_BYTES", "matrix.py"),
    (r"v_cmp", "PREDICATES", "comparisons.py"),
    (r"v_cvt", "OPERATIONS", "conversions.py"),
    (r"v_pk_", "OPERATIONS", "packed.py"),
    (r"v_.*(permlane|read\w*lane|writelane)|ds_.*(swizzle|permute)", "TABLE", "cross_lane.py"),
    (r"v_", "OPERATIONS", "vector_alu.py"),
    (r".*_atomic_|ds_(add|sub|min|max|and|or|xor|inc|dec|cmp|pk)", "ATOMICS", "atomics.py"),
    (r"ds_.*(write|store)", "WRITES", "local_data_share.py"),
    (r"ds_", "READS", "local_data_share.py"),
    (r".*_store_", "STORES", "vector_memory.py"),
    (r".*_load_", "LOADS", "vector_memory.py"),
)
_KIND_OF_SUFFIX = {
    **{kind: kind for kind in ("u32", "i32", "f32", "f16", "i16", "u64", "i64", "f64")},
    "b32": "u32",
    "b64": "u64",
    "b16": "b16",
    "u16": "b16",
    "bf16": "b16",
}


@dataclass(frozen=True, slots=True)
class DecodedProgram:
    """steps: what each instruction does; controls: those that change the program counter.

    joins: where a label is, so that waves that went apart may meet again.
    """

    steps: list[Step]
    controls: Mapping[int, Control]
    joins: frozenset[int]
    vector_registers: int


def decode(program: Program) -> DecodedProgram:
    """Decode a program, once; an instruction that is unknown raises when it is reached."""
    if not isinstance(program.steps, DecodedProgram):
        controls = {
            position: control
            for position, instruction in enumerate(program.instructions)
            if (control := control_of(instruction, program)) is not None
        }
        steps = [
            _do_nothing if position in controls else step_of(instruction, program.architecture)
            for position, instruction in enumerate(program.instructions)
        ]
        program.steps = DecodedProgram(
            steps, controls, frozenset(program.labels.values()), _vector_registers(program)
        )
    return program.steps


def _vector_registers(program: Program) -> int:
    """How many vector registers the program names."""
    return max(
        (
            operand.register + operand.count
            for instruction in program.instructions
            for half in instruction.halves or (instruction,)
            for operand in half.operands
            if operand.kind == "vector"
        ),
        default=1,
    )


def _do_nothing(waves: Waves) -> None:
    """What an instruction does that only concerns timing."""


@lru_cache(maxsize=2**16)
def step_of(instruction: Instruction, architecture: Architecture) -> Step:
    """One instruction, ready to run; if it is unknown, a step that says so."""
    try:
        if instruction.halves is not None:
            return _compile_pair(*instruction.halves, architecture)
        if is_timing_only(instruction.name):
            return _do_nothing
        return _compile(instruction, architecture)
    except UnknownInstruction as problem:
        return _refusing(problem)
    except (EmulatorError, ValueError, KeyError, IndexError, TypeError, AssertionError) as problem:
        return _refusing(
            UnknownInstruction(
                f"the emulator knows {instruction.name} but not this form of it "
                f"({type(problem).__name__}: {problem}); add it {place_to_add(instruction.name)}"
            )
        )


def _compile(instruction: Instruction, architecture: Architecture) -> Step:
    name = instruction.name
    if name.startswith(("v_mfma_", "v_wmma_")):
        return matrix.compile_matrix(instruction, architecture)
    compile_form = TABLE.get(name)
    if compile_form is None:
        raise UnknownInstruction(
            f"the emulator does not know {name}; add {line_to_add(instruction)} "
            f"{place_to_add(name)}"
        )
    if instruction.is_dpp and compile_form not in _UNDERSTAND_DPP:
        raise EmulatorError("its DPP form")
    if instruction.is_sdwa and compile_form not in _UNDERSTAND_SDWA:
        raise EmulatorError("its SDWA form")
    return compile_form(instruction, architecture)


def _compile_pair(first: Instruction, second: Instruction, architecture: Architecture) -> Step:
    """v_dual_*: both halves read before either writes."""
    run_first, run_second = _compile(first, architecture), _compile(second, architecture)
    target = first.operands[0].register
    read_by_second = [
        operand.register
        for operand in (*second.operands[1:], *second.operands[: second.name == "v_fmac_f32"])
        if operand.kind == "vector"
    ]
    if target not in read_by_second:

        def run_in_turn(waves: Waves) -> None:
            run_first(waves)
            run_second(waves)

        return run_in_turn

    def run_together(waves: Waves) -> None:
        before = waves.vector[target, waves.chosen].copy()
        run_first(waves)
        after = waves.vector[target, waves.chosen].copy()
        waves.vector[target, waves.chosen] = before
        run_second(waves)
        waves.vector[target, waves.chosen] = after

    return run_together


def _refusing(problem: UnknownInstruction) -> Step:
    def step(waves: Waves) -> None:
        raise UnknownInstruction(*problem.args)

    return step


def place_to_add(name: str) -> str:
    """`to OPERATIONS in nsa_port/emulator/vector_alu.py`."""
    table, file = next(
        ((table, file) for pattern, table, file in _WHERE_TO_ADD if re.match(pattern, name)),
        ("TABLE", "decoder.py"),
    )
    return f"to {table} in nsa_port/emulator/{file}"


def line_to_add(instruction: Instruction) -> str:
    """The line of a table that would make an instruction known, but for what it computes."""
    short = instruction.name.split("_", 1)[-1]
    kind = _KIND_OF_SUFFIX.get(short.rpartition("_")[2])
    if not instruction.name.startswith(("s_", "v_")) or kind is None:
        return f'"{short}": ...'
    sources = " ".join([kind] * max(1, len(instruction.operands) - 1))
    return f'`**define("{kind} <- {sources}", {short}=...),`'
