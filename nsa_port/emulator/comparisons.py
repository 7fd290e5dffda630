"""Vector comparisons, which write a mask of lanes, and the selects that read one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy import uint32

from nsa_port.emulator.architectures import Architecture
from nsa_port.emulator.assembly import EXEC, VCC, Instruction, Operand
from nsa_port.emulator.cross_lane import lanes_that_dpp_writes, read_through_dpp
from nsa_port.emulator.errors import EmulatorError
from nsa_port.emulator.number_formats import LEAST_NORMAL_SINGLE, Array
from nsa_port.emulator.operands import read_lane_mask, read_vector, write_lane_mask, write_vector
from nsa_port.emulator.operations import Compile
from nsa_port.emulator.registers import Step, Waves

_VCC_PAIR = Operand("scalar", VCC, 2)
_EXEC_PAIR = Operand("scalar", EXEC, 2)


def _always(a: Array, b: Array) -> Array:
    return np.ones(np.broadcast_shapes(a.shape, b.shape), bool)


def _never(a: Array, b: Array) -> Array:
    return np.zeros(np.broadcast_shapes(a.shape, b.shape), bool)


def _unordered(a: Array, b: Array) -> Array:
    return np.isnan(a) | np.isnan(b)


PREDICATES: Mapping[str, Callable[[Array, Array], Array]] = {
    "lt": np.less,
    "eq": np.equal,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "ne": np.not_equal,
    "t": _always,
    "tru": _always,
    "f": _never,
}
FLOAT_PREDICATES: Mapping[str, Callable[[Array, Array], Array]] = {
    **PREDICATES,
    "lg": lambda a, b: (a < b) | (a > b),
    "o": lambda a, b: ~_unordered(a, b),
    "u": _unordered,
    "nge": lambda a, b: ~(a >= b),
    "nlg": lambda a, b: ~((a < b) | (a > b)),
    "ngt": lambda a, b: ~(a > b),
    "nle": lambda a, b: ~(a <= b),
    "neq": lambda a, b: ~(a == b),
    "nlt": lambda a, b: ~(a < b),
}
_KIND_OF_TYPE = {
    **{name: name for name in ("f16", "f32", "f64", "i16", "i32", "i64", "u32", "u64")},
    "u16": "b16",
}


def _mask_destinations(
    instruction: Instruction, architecture: Architecture
) -> tuple[Operand, bool]:
    """Where a comparison writes, and whether it also writes EXEC."""
    to_exec = instruction.name.startswith("v_cmpx")
    if to_exec and architecture.generation >= 11:
        return _EXEC_PAIR, False
    named = len(instruction.operands) == 3
    return (instruction.operands[0] if named else _VCC_PAIR), to_exec


def compile_comparison(instruction: Instruction, architecture: Architecture) -> Step:
    """v_cmp_lt_f32 and its like; v_cmpx_* makes the result the new EXEC."""
    _, predicate_name, type_name = instruction.name.removeprefix("v_").split("_")
    kind = _KIND_OF_TYPE[type_name]
    predicate = (FLOAT_PREDICATES if kind[0] == "f" else PREDICATES)[predicate_name]
    destination, to_exec = _mask_destinations(instruction, architecture)
    halves = instruction.numbers("op_sel", [0, 0])
    left, right = (
        read_vector(operand, kind, bool(halves[position]), instruction.word(f"src{position}_sel"))
        for position, operand in enumerate(instruction.operands[-2:])
    )
    if instruction.is_dpp:
        if lanes_that_dpp_writes(instruction, architecture) is not None:
            raise EmulatorError("a masked DPP form of a comparison")
        left = read_through_dpp(instruction, left, architecture)
    write = write_lane_mask(destination, architecture)
    write_exec = write_lane_mask(_EXEC_PAIR, architecture) if to_exec else None

    def step(waves: Waves) -> None:
        result = predicate(left(waves), right(waves))
        write(waves, result)
        if write_exec is not None:
            write_exec(waves, result)

    return step


def float_classes(values: Array) -> list[Array]:
    """bool arrays in the order of v_cmp_class's bits: which class each value belongs to."""
    negative, zero = np.signbit(values), values == 0
    nan, infinite = np.isnan(values), np.isinf(values)
    subnormal = ~zero & (np.abs(values) < LEAST_NORMAL_SINGLE) & ~nan
    normal = ~(zero | infinite | nan | subnormal)
    below = [group & negative for group in (infinite, normal, subnormal, zero)]
    above = [group & ~negative for group in (zero, subnormal, normal, infinite)]
    quiet = nan & ((values.view(uint32) & uint32(0x400000)) != 0)
    return [nan & ~quiet, quiet, *below, *above]


def compile_classification(instruction: Instruction, architecture: Architecture) -> Step:
    """v_cmp_class_f32: whether a value is in one of the classes that a mask names."""
    destination, to_exec = _mask_destinations(instruction, architecture)
    if to_exec:
        raise EmulatorError("v_cmpx_class")
    read, read_wanted = (
        read_vector(instruction.operands[-2], "f32"),
        read_vector(instruction.operands[-1]),
    )
    write = write_lane_mask(destination, architecture)

    def step(waves: Waves) -> None:
        wanted = read_wanted(waves)
        result = np.zeros(waves.shape, bool)
        for bit, members in enumerate(float_classes(read(waves))):
            result |= members & ((wanted >> uint32(bit)) & uint32(1)).astype(bool)
        write(waves, result)

    return step


def compile_select(instruction: Instruction, architecture: Architecture) -> Step:
    """v_cndmask_b32/b16: the second source where the mask has a 1, else the first."""
    destination, *sources = instruction.operands
    kind = "u32" if instruction.name.endswith("b32") else "b16"
    if kind == "u32" and any(source.negate or source.absolute for source in sources[:2]):
        kind = "f32"
    if instruction.is_sdwa and instruction.word("dst_sel") not in (None, "DWORD"):
        raise EmulatorError("v_cndmask into a part of a register")
    halves = instruction.numbers("op_sel", [0, 0])
    otherwise, chosen = (
        read_vector(source, kind, bool(halves[position]), instruction.word(f"src{position}_sel"))
        for position, source in enumerate(sources[:2])
    )
    if instruction.is_dpp:
        if lanes_that_dpp_writes(instruction, architecture) is not None:
            raise EmulatorError("a masked DPP form of v_cndmask")
        otherwise = read_through_dpp(instruction, otherwise, architecture)
    mask = read_lane_mask(sources[2] if len(sources) > 2 else _VCC_PAIR, architecture)
    write = write_vector(destination, kind, architecture)
    return lambda waves: write(waves, np.where(mask(waves), chosen(waves), otherwise(waves)))


TABLE: Mapping[str, Compile] = {
    **{
        f"v_{form}_{predicate}_{type_name}": compile_comparison
        for form in ("cmp", "cmpx")
        for type_name, kind in _KIND_OF_TYPE.items()
        for predicate in (FLOAT_PREDICATES if kind[0] == "f" else PREDICATES)
    },
    "v_cmp_class_f32": compile_classification,
    "v_cndmask_b32": compile_select,
    "v_cndmask_b16": compile_select,
}
