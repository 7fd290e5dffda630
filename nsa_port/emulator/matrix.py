"""Matrix instructions: MFMA (CDNA) and WMMA (RDNA), D = A B^T + C over the lanes of a wave.

A has `rows` x `depth` elements, B `columns` x `depth`, D and C `rows` x `columns`. Products are
accumulated in float64 and rounded once; the hardware's order of additions is not modelled.

How the elements lie in the registers ("slot j of lane l"), with g the group of lanes:

    A, B, CDNA, gfx12   lane l holds row l % rows; its group l // rows holds consecutive depths
    A, B, gfx11         lane l holds all of row l % 16; lanes 16 to 31 repeat lanes 0 to 15
    D, 16 x 16, CDNA    row 4 g + j, column l % 16
    D, 32 x 32, CDNA    row 8 (j // 4) + 4 g + j % 4, column l % 32
    D, 4 x 4, CDNA      row j, column l % 4, of the matrix l // 4 (16 of them)
    D, gfx11            row 2 j + g, column l % 16
    D, gfx12            row 8 g + j, column l % 16
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy import float16, float32, float64, int8, int32, uint8, uint16, uint32

from nsa_port.emulator.architectures import Architecture
from nsa_port.emulator.assembly import Instruction, Operand
from nsa_port.emulator.conversions import float8_format
from nsa_port.emulator.errors import EmulatorError
from nsa_port.emulator.number_formats import (
    LEAST_NORMAL_HALF,
    LEAST_NORMAL_SINGLE,
    Array,
    bfloat16_of_float32,
    bits_of,
    float8_values,
    float32_of_bfloat16,
    xfloat32_of_float32,
)
from nsa_port.emulator.registers import Step, Waves

_NAME = re.compile(
    r"v_(?P<unit>mfma|wmma)_(?P<result>f32|i32|f16|bf16)"
    r"_(?P<rows>\d+)x(?P<columns>\d+)x(?P<depth>\d+)_?(?P<inputs>\w*)$"
)
INPUT_BYTES: Mapping[str, int] = {
    "f32": 4,
    "xf32": 4,
    "f16": 2,
    "bf16": 2,
    "fp8": 1,
    "bf8": 1,
    "i8": 1,
    "u8": 1,
}
"""Formats of A and B, and the bytes of an element."""
_FLOAT8_CODES = {0: "fp8", 1: "bf8"}

Decode = Callable[[Array], Array]


@dataclass(frozen=True, slots=True)
class Shape:
    """What the name of a matrix instruction says.

    blocks: independent matrices that one instruction multiplies; left, right: the formats of A, B.
    """

    unit: str
    result: str
    rows: int
    columns: int
    depth: int
    blocks: int
    left: str
    right: str

    @property
    def operations(self) -> int:
        """Multiplications and additions of one instruction."""
        return 2 * self.rows * self.columns * self.depth * self.blocks


def shape_of(instruction: Instruction) -> Shape:
    """Read the name (and, for f8f6f4, the modifiers) of a matrix instruction."""
    match = _NAME.match(instruction.name)
    if match is None:
        raise EmulatorError("no name of a matrix instruction")
    rows, columns, depth = (int(match.group(part)) for part in ("rows", "columns", "depth"))
    inputs = match.group("inputs").removesuffix("_1k")
    blocks = 1
    several = re.match(r"(\d+)b_(\w+)$", inputs)
    if several:
        blocks, inputs = int(several.group(1)), several.group(2)
    if rows == 4:
        blocks = 16
    elif blocks > 1:
        raise EmulatorError("a matrix instruction of several blocks, other than 4 x 4")
    if inputs == "f8f6f4":
        left, right = (_FLOAT8_CODES[instruction.number(side)] for side in ("cbsz", "blgp"))
    elif inputs in ("fp8_fp8", "fp8_bf8", "bf8_fp8", "bf8_bf8"):
        left, _, right = inputs.partition("_")
    elif inputs == "iu8":
        left, right = ("i8" if sign else "u8" for sign in instruction.numbers("neg_lo", [0, 0])[:2])
    else:
        left = right = inputs
    if left not in INPUT_BYTES:
        raise EmulatorError(f"the input format {left}: add it to INPUT_BYTES in matrix.py")
    return Shape(
        match.group("unit"), match.group("result"), rows, columns, depth, blocks, left, right
    )


def _decoder(form: str, architecture: Architecture) -> Decode:
    """uint32 words of registers [..., words] -> the numbers in them [..., numbers]."""
    flushes = architecture.flushes_half_subnormals

    def flushed(values: Array, least_normal: Array) -> Array:
        if not flushes:
            return values
        return np.where(np.abs(values) < least_normal, values.dtype.type(0), values)

    if form in ("fp8", "bf8"):
        table = float8_values(float8_format(form, architecture))
        return lambda words: table[words.view(uint8)]
    decoders: Mapping[str, Decode] = {
        "f32": lambda words: words.view(float32),
        "xf32": lambda words: xfloat32_of_float32(words.view(float32)),
        "f16": lambda words: flushed(words.view(float16).astype(float32), LEAST_NORMAL_HALF),
        "bf16": lambda words: flushed(float32_of_bfloat16(words.view(uint16)), LEAST_NORMAL_SINGLE),
        "i8": lambda words: words.view(int8),
        "u8": lambda words: words.view(uint8),
    }
    return decoders[form]


def _load_matrix(
    operand: Operand, size: int, shape: Shape, decode: Decode, architecture: Architecture, form: str
) -> Callable[[Waves], Array]:
    """Read A or B: float64 [count, blocks, size, depth], `size` its rows."""
    register = operand.register
    lanes = architecture.lanes
    groups = lanes // (size * shape.blocks)
    repeated = architecture.generation == 11
    per_lane = shape.depth if repeated else shape.depth // groups
    words = per_lane * INPUT_BYTES[form] // 4
    if operand.count != words:
        raise EmulatorError(f"{operand.count} registers for a matrix of {words}")

    def load(waves: Waves) -> Array:
        raw = waves.vector[register : register + words, waves.chosen]
        numbers = decode(np.ascontiguousarray(raw.transpose(1, 2, 0)))
        if repeated:
            return numbers[:, None, :size].astype(float64)
        split = numbers.reshape(waves.count, groups, shape.blocks, size, per_lane)
        ordered = split.transpose(0, 2, 3, 1, 4).astype(float64)
        return ordered.reshape(waves.count, shape.blocks, size, shape.depth)

    return load


def _to_slots(product: Array, shape: Shape, architecture: Architecture) -> Array:
    """[count, blocks, rows, columns] -> [slot, count, lane], as the table above says."""
    count, lanes = len(product), architecture.lanes
    if shape.rows == 4:
        slots = product.transpose(2, 0, 1, 3)
    elif shape.rows == 32:
        slots = product.reshape(count, 4, 2, 4, 32).transpose(1, 3, 0, 2, 4)
    elif architecture.generation == 11:
        slots = product.reshape(count, 8, 2, 16).transpose(1, 0, 2, 3)
    else:
        groups = lanes // 16
        slots = product.reshape(count, groups, 16 // groups, 16).transpose(2, 0, 1, 3)
    return slots.reshape(-1, count, lanes)


def _decode_result(words: Array, result: str) -> Array:
    """uint32 of C -> numbers."""
    if result == "f16":
        return words.astype(uint16).view(float16).astype(float32)
    if result == "bf16":
        return float32_of_bfloat16(words.astype(uint16))
    return words.view(int32 if result == "i32" else float32)


def _encode_result(numbers: Array, result: str) -> Array:
    """Numbers -> uint32 of D."""
    if result == "f16":
        return numbers.astype(float16).view(uint16).astype(uint32)
    if result == "bf16":
        return bfloat16_of_float32(numbers.astype(float32)).astype(uint32)
    return numbers.astype(int32 if result == "i32" else float32).view(uint32)


def compile_matrix(instruction: Instruction, architecture: Architecture) -> Step:
    """Compile any MFMA or WMMA instruction; the EXEC mask does not matter to them."""
    shape = shape_of(instruction)
    _refuse_modifiers(instruction)
    destination, left, right, addend = instruction.operands[:4]
    load_left = _load_matrix(
        left, shape.rows, shape, _decoder(shape.left, architecture), architecture, shape.left
    )
    load_right = _load_matrix(
        right, shape.columns, shape, _decoder(shape.right, architecture), architecture, shape.right
    )
    slots = shape.rows * shape.columns * shape.blocks // architecture.lanes
    register = destination.register
    flushes = architecture.flushes_half_subnormals and INPUT_BYTES[shape.left] == 2
    constant = _constant_addend(addend, shape.result)

    def step(waves: Waves) -> None:
        product = np.matmul(load_left(waves), load_right(waves).swapaxes(-1, -2))
        total = _to_slots(product, shape, architecture)
        if addend.kind == "vector":
            start = addend.register
            words = waves.vector[start : start + slots, waves.chosen]
            total = total + _decode_result(words, shape.result)
        elif constant:
            total = total + constant
        if flushes:
            total = np.where(np.abs(total) < LEAST_NORMAL_SINGLE, 0.0, total)
        waves.vector[register : register + slots, waves.chosen] = _encode_result(
            total, shape.result
        )

    return step


def _refuse_modifiers(instruction: Instruction) -> None:
    """Raise for the modifiers that change what is multiplied, other than those of `shape_of`."""
    known = {"f8f6f4": ("cbsz", "blgp"), "iu8": ("neg_lo",)}
    allowed = next((names for part, names in known.items() if part in instruction.name), ())
    for modifier in ("cbsz", "abid", "blgp", "neg_lo", "neg_hi", "op_sel"):
        value = instruction.modifiers.get(modifier, 0)
        if modifier not in allowed and (any(value) if isinstance(value, list) else value):
            raise EmulatorError(f"the modifier {modifier} on a matrix instruction")


def _constant_addend(addend: Operand, result: str) -> float:
    if addend.kind != "constant":
        return 0.0
    assert not isinstance(addend.value, str)
    if isinstance(addend.value, float) or result == "i32":
        return float(addend.value)
    return float(np.array(bits_of(addend.value), uint32).view(float32))
