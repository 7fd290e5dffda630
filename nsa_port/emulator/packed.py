"""Packed arithmetic (two values per register or pair), mixed precision, and three-input logic."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np
from numpy import float16, float32, uint16, uint32

from nsa_port.emulator.architectures import Architecture
from nsa_port.emulator.assembly import Instruction, Operand
from nsa_port.emulator.bits import three_input_logic
from nsa_port.emulator.floating import fused_multiply_add, fused_multiply_add_half
from nsa_port.emulator.number_formats import (
    Array,
    bfloat16_of_float32,
    float32_of_bfloat16,
    pack_halves,
)
from nsa_port.emulator.operands import read_vector, write_vector
from nsa_port.emulator.operations import Compile, Operation, define
from nsa_port.emulator.registers import Reader, Step, Waves


def _shifted(shift: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda a, b: shift(b, a & a.dtype.type(15))


OPERATIONS: Mapping[str, Operation] = {
    **define(
        "f16 <- f16 f16",
        pk_add_f16=np.add,
        pk_sub_f16=np.subtract,
        pk_mul_f16=np.multiply,
        pk_max_f16=np.fmax,
        pk_min_f16=np.fmin,
        pk_max_num_f16=np.fmax,
        pk_min_num_f16=np.fmin,
        pk_maximum_f16=np.maximum,
        pk_minimum_f16=np.minimum,
    ),
    **define("f16 <- f16 f16 f16", pk_fma_f16=fused_multiply_add_half),
    **define(
        "bf16 <- bf16 bf16",
        pk_add_bf16=np.add,
        pk_mul_bf16=np.multiply,
        pk_max_num_bf16=np.fmax,
        pk_min_num_bf16=np.fmin,
    ),
    **define("bf16 <- bf16 bf16 bf16", pk_fma_bf16=fused_multiply_add),
    **define(
        "b16 <- b16 b16",
        pk_add_u16=np.add,
        pk_sub_u16=np.subtract,
        pk_mul_lo_u16=np.multiply,
        pk_max_u16=np.maximum,
        pk_min_u16=np.minimum,
        pk_lshlrev_b16=_shifted(np.left_shift),
        pk_lshrrev_b16=_shifted(np.right_shift),
    ),
    **define(
        "i16 <- i16 i16",
        pk_add_i16=np.add,
        pk_sub_i16=np.subtract,
        pk_max_i16=np.maximum,
        pk_min_i16=np.minimum,
        pk_ashrrev_i16=_shifted(np.right_shift),
    ),
    **define("b16 <- b16 b16 b16", pk_mad_u16=lambda a, b, c: a * b + c),
    **define("i16 <- i16 i16 i16", pk_mad_i16=lambda a, b, c: a * b + c),
    **define("f32 <- f32 f32", pk_add_f32=np.add, pk_mul_f32=np.multiply),
    **define("f32 <- f32 f32 f32", pk_fma_f32=fused_multiply_add),
}
"""Operations on each half of a register, or (`_f32`) on each register of a pair."""


def _negated(read: Reader, negate: bool) -> Reader:
    return (lambda waves: -read(waves)) if negate else read


def read_half(operand: Operand, kind: str, high: bool) -> Reader:
    """One half of an operand; bfloat16 comes as float32."""
    if operand.kind == "constant" and isinstance(operand.value, int):
        if abs(operand.value) > 64 and high:
            operand = Operand("constant", operand.value >> 16)  # a literal has two halves
    elif operand.kind == "constant" and kind == "bf16":
        bits = bfloat16_of_float32(np.array([[operand.value]], float32))
        operand = Operand("constant", int(bits[0, 0]))
    if kind != "bf16":
        return read_vector(operand, kind, high)
    half = read_vector(operand, "b16", high)
    return lambda waves: float32_of_bfloat16(half(waves))


def compile_packed_halves(instruction: Instruction, architecture: Architecture) -> Step:
    """v_pk_add_f16 and its like: the same on both halves; op_sel says which half each reads."""
    operation = OPERATIONS[instruction.name.removeprefix("v_")]
    destination, *sources = instruction.operands
    count, kind = len(sources), operation.sources[0]

    def readers(halves: str, default: int, signs: str) -> list[Reader]:
        high = instruction.numbers(halves, [default] * count)
        negate = instruction.numbers(signs, [0] * count)
        return [
            _negated(read_half(source, kind, bool(high[n])), bool(negate[n]))
            for n, source in enumerate(sources)
        ]

    lower = readers("op_sel", 0, "neg_lo")
    upper = readers("op_sel_hi", 1, "neg_hi")
    write = write_vector(destination)

    def rounded(values: Array) -> Array:
        return bfloat16_of_float32(values) if operation.result == "bf16" else values

    def step(waves: Waves) -> None:
        low = rounded(operation.function(*(read(waves) for read in lower)))
        high = rounded(operation.function(*(read(waves) for read in upper)))
        write(waves, pack_halves(low, high))

    return step


def compile_packed_pairs(instruction: Instruction, architecture: Architecture) -> Step:
    """v_pk_add_f32 and its like: the same on both registers of a pair."""
    operation = OPERATIONS[instruction.name.removeprefix("v_")]
    destination, *sources = instruction.operands
    count = len(sources)

    def readers(registers: str, default: int, signs: str) -> list[Reader]:
        offsets = instruction.numbers(registers, [default] * count)
        negate = instruction.numbers(signs, [0] * count)
        return [
            _negated(read_vector(source.at(offsets[n]), "f32"), bool(negate[n]))
            for n, source in enumerate(sources)
        ]

    lower = readers("op_sel", 0, "neg_lo")
    upper = readers("op_sel_hi", 1, "neg_hi")
    write_lower = write_vector(destination.at(0), "f32")
    write_upper = write_vector(destination.at(1), "f32")

    def step(waves: Waves) -> None:
        low = operation.function(*(read(waves) for read in lower))
        high = operation.function(*(read(waves) for read in upper))
        write_lower(waves, low)
        write_upper(waves, high)

    return step


def compile_packed_move(instruction: Instruction, architecture: Architecture) -> Step:
    """v_pk_mov_b32: one register of each source pair."""
    destination, first, second = instruction.operands
    offsets = instruction.numbers("op_sel", [0, 0])
    lower, upper = read_vector(first.at(offsets[0])), read_vector(second.at(offsets[1]))
    write_lower, write_upper = write_vector(destination.at(0)), write_vector(destination.at(1))

    def step(waves: Waves) -> None:
        low, high = lower(waves).copy(), upper(waves).copy()
        write_lower(waves, low)
        write_upper(waves, high)

    return step


def compile_mixed(instruction: Instruction, architecture: Architecture) -> Step:
    """v_fma_mix_f32, v_fma_mixlo_f16, v_fma_mixhi_f16: each source is float32 or a float16 half."""
    destination, *sources = instruction.operands
    high = instruction.numbers("op_sel", [0, 0, 0])
    is_half = instruction.numbers("op_sel_hi", [0, 0, 0])

    def reader(position: int) -> Reader:
        source = sources[position]
        if not is_half[position]:
            return read_vector(source, "f32")
        half = read_vector(source, "f16", bool(high[position]))
        return lambda waves: half(waves).astype(float32)

    first, second, third = (reader(position) for position in range(3))
    if instruction.name.endswith("mix_f32"):
        write = write_vector(destination, "f32")
        return lambda waves: write(
            waves, fused_multiply_add(first(waves), second(waves), third(waves))
        )
    to_high = "mixhi" in instruction.name
    write = write_vector(destination, "f16", high=to_high, keep_other_half=True)
    return lambda waves: write(
        waves, fused_multiply_add(first(waves), second(waves), third(waves)).astype(float16)
    )


def compile_dot(instruction: Instruction, architecture: Architecture) -> Step:
    """v_dot2_f32_f16 and its like: two products of halves added to a float32."""
    match = re.match(r"v_dot2(?:c|acc)?_f32_(f16|bf16)$", instruction.name)
    assert match is not None
    kind = match.group(1)
    destination, left, right, *addend = instruction.operands
    halves = [(read_half(left, kind, high), read_half(right, kind, high)) for high in (False, True)]
    read_addend = read_vector(addend[0] if addend else destination, "f32")
    write = write_vector(destination, "f32")

    def step(waves: Waves) -> None:
        total = read_addend(waves)
        for first, second in halves:
            total = fused_multiply_add(
                first(waves).astype(float32), second(waves).astype(float32), total
            )
        write(waves, total)

    return step


def compile_logic(instruction: Instruction, architecture: Architecture) -> Step:
    """v_bitop3_b32/b16: any bitwise function of three operands, given by its truth table."""
    kind, dtype = ("u32", uint32) if instruction.name.endswith("b32") else ("b16", uint16)
    destination, *sources = instruction.operands
    halves = instruction.numbers("op_sel", [0, 0, 0, 0])
    first, second, third = (
        read_vector(source, kind, bool(halves[n])) for n, source in enumerate(sources)
    )
    table = instruction.number("bitop3")
    write = write_vector(destination, kind, architecture, high=bool(halves[3:] == [1]))

    def step(waves: Waves) -> None:
        result = three_input_logic(first(waves), second(waves), third(waves), table)
        write(waves, result.astype(dtype))

    return step


TABLE: Mapping[str, Compile] = {
    **{
        f"v_{name}": compile_packed_pairs if name.endswith("_f32") else compile_packed_halves
        for name in OPERATIONS
    },
    "v_pk_mov_b32": compile_packed_move,
    **{
        f"v_{operation}_{form}": compile_mixed
        for operation in ("fma", "mad")
        for form in ("mix_f32", "mixlo_f16", "mixhi_f16")
    },
    **{
        f"v_{operation}_f32_{kind}": compile_dot
        for operation in ("dot2", "dot2c", "dot2acc")
        for kind in ("f16", "bf16")
    },
    "v_bitop3_b32": compile_logic,
    "v_bitop3_b16": compile_logic,
}
