"""Conversions between number formats: v_cvt_*."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np
from numpy import float16, float32, float64, int32, int64, uint32, uint64

from nsa_port.emulator.architectures import Architecture
from nsa_port.emulator.assembly import Instruction, Operand
from nsa_port.emulator.memory import HIGH_HALF, LOW_HALF
from nsa_port.emulator.number_formats import (
    FLOAT8,
    Array,
    Float8,
    bfloat16_of_float32,
    float8_of_float32,
    float8_values,
    float16_toward_zero,
    float32_of_bfloat16,
    pack_halves,
    saturate,
)
from nsa_port.emulator.operands import read_vector, write_vector
from nsa_port.emulator.operations import Compile, Operation, define
from nsa_port.emulator.registers import Reader, Step, Waves


def int32_of_float(values: Array) -> Array:
    """Toward zero, cut to the range."""
    return saturate(np.trunc(values), -(2**31), 2**31 - 1).astype(int64).astype(int32)


def uint32_of_float(values: Array) -> Array:
    """Toward zero, cut to the range."""
    return saturate(np.trunc(values), 0, 2**32 - 1).astype(uint64).astype(uint32)


def _floor_to_int32(values: Array) -> Array:
    return int32_of_float(np.floor(values))


def _byte_of(position: int) -> Callable[[Array], Array]:
    shift = uint32(8 * position)

    def byte(words: Array) -> Array:
        return ((words >> shift) & uint32(0xFF)).astype(float32)

    return byte


OPERATIONS: Mapping[str, Operation] = {
    **define(
        "i32 <- f32",
        cvt_i32_f32=int32_of_float,
        cvt_rpi_i32_f32=lambda a: _floor_to_int32(a + float32(0.5)),
        cvt_nearest_i32_f32=lambda a: _floor_to_int32(a + float32(0.5)),
        cvt_flr_i32_f32=_floor_to_int32,
        cvt_floor_i32_f32=_floor_to_int32,
    ),
    **define("u32 <- f32", cvt_u32_f32=uint32_of_float),
    **define("f32 <- i32", cvt_f32_i32=lambda a: a.astype(float32)),
    **define(
        "f32 <- u32",
        cvt_f32_u32=lambda a: a.astype(float32),
        cvt_f32_ubyte0=_byte_of(0),
        cvt_f32_ubyte1=_byte_of(1),
        cvt_f32_ubyte2=_byte_of(2),
        cvt_f32_ubyte3=_byte_of(3),
    ),
    **define("f32 <- f16", cvt_f32_f16=lambda a: a.astype(float32)),
    **define("f16 <- f32", cvt_f16_f32=lambda a: a.astype(float16)),
    **define("f32 <- b16", cvt_f32_bf16=float32_of_bfloat16),
    **define("b16 <- f32", cvt_bf16_f32=bfloat16_of_float32),
    **define("f16 <- b16", cvt_f16_u16=lambda a: a.astype(float16)),
    **define("f16 <- i16", cvt_f16_i16=lambda a: a.astype(float16)),
    **define("u32 <- b16", cvt_u32_u16=lambda a: a.astype(uint32)),
    **define("i32 <- i16", cvt_i32_i16=lambda a: a.astype(int32)),
    **define("f64 <- f32", cvt_f64_f32=lambda a: a.astype(float64)),
    **define("f32 <- f64", cvt_f32_f64=lambda a: a.astype(float32)),
    **define("f64 <- i32", cvt_f64_i32=lambda a: a.astype(float64)),
    **define("f64 <- u32", cvt_f64_u32=lambda a: a.astype(float64)),
    **define("i32 <- f64", cvt_i32_f64=int32_of_float),
    **define("u32 <- f64", cvt_u32_f64=uint32_of_float),
    **define(
        "u32 <- f32 f32",
        cvt_pk_bf16_f32=lambda a, b: pack_halves(bfloat16_of_float32(a), bfloat16_of_float32(b)),
        cvt_pk_f16_f32=lambda a, b: pack_halves(a.astype(float16), b.astype(float16)),
        cvt_pkrtz_f16_f32=lambda a, b: pack_halves(float16_toward_zero(a), float16_toward_zero(b)),
        cvt_pk_rtz_f16_f32=lambda a, b: pack_halves(float16_toward_zero(a), float16_toward_zero(b)),
    ),
}
"""Conversions that `vector_alu` compiles like any other operation."""


# ---------------------------------------------------------------------------------- 8-bit floats
def float8_format(name: str, architecture: Architecture) -> Float8:
    """The format that an instruction calls `fp8` or `bf8` on this GPU."""
    return FLOAT8[name, architecture.fnuz_float8]


def _scale_of(read: Reader, waves: Waves) -> Array:
    """The power of two that the exponent of a float32 operand stands for."""
    exponent = (read(waves).view(uint32) >> uint32(23)) & uint32(0xFF)
    return np.exp2(exponent.astype(float32) - float32(127))


def _write_pair_of_bytes(instruction: Instruction, first: list[Reader], form: Float8) -> Step:
    """Pack two float32 values into the half of the destination that op_sel names."""
    destination = instruction.operands[0]
    selection = instruction.numbers("op_sel", [0])
    upper = bool(selection[-1])
    register, write = destination.register, write_vector(destination)

    def step(waves: Waves) -> None:
        low, high = (float8_of_float32(waves.whole(read(waves)), form) for read in first)
        pair = low | (high << uint32(8))
        old = waves.vector[register, waves.chosen]
        if upper:
            write(waves, (old & LOW_HALF) | (pair << uint32(16)))
        else:
            write(waves, (old & HIGH_HALF) | pair)

    return step


def compile_to_float8(instruction: Instruction, architecture: Architecture) -> Step:
    """v_cvt_pk_fp8_f32: two float32 -> two 8-bit floats in one half of a register."""
    form = float8_format(instruction.name.split("_")[3], architecture)
    readers = [read_vector(source, "f32") for source in instruction.operands[1:3]]
    return _write_pair_of_bytes(instruction, readers, form)


def compile_scaled_to_float8(instruction: Instruction, architecture: Architecture) -> Step:
    """v_cvt_scalef32_pk_fp8_f16: the same, of values divided by a power of two."""
    match = re.match(r"v_cvt_scalef32_pk_(fp8|bf8)_(f32|f16|bf16)$", instruction.name)
    assert match is not None
    form, source_kind = float8_format(match.group(1), architecture), match.group(2)
    sources = instruction.operands[1:]
    if source_kind == "f32":
        values = [read_vector(source, "f32") for source in sources[:2]]
    else:
        values = [_read_half_as_float32(sources[0], source_kind, high) for high in (False, True)]
    scale = read_vector(sources[-1], "f32")

    def scaled(read: Reader) -> Reader:
        return lambda waves: read(waves) / _scale_of(scale, waves)

    return _write_pair_of_bytes(instruction, [scaled(read) for read in values], form)


def _read_half_as_float32(operand: Operand, kind: str, high: bool) -> Reader:
    if kind == "f16":
        half = read_vector(operand, "f16", high)
        return lambda waves: half(waves).astype(float32)
    bits = read_vector(operand, "b16", high)
    return lambda waves: float32_of_bfloat16(bits(waves))


def compile_from_float8(instruction: Instruction, architecture: Architecture) -> Step:
    """v_cvt_f32_fp8: the byte that op_sel or SDWA names -> float32."""
    values = float8_values(float8_format(instruction.name.split("_")[-1], architecture))
    source = read_vector(instruction.operands[1], "u32", part=instruction.word("src0_sel"))
    selection = instruction.numbers("op_sel", [0, 0])
    shift = uint32(8 * (selection[0] + 2 * selection[1]))
    write = write_vector(instruction.operands[0], "f32")
    return lambda waves: write(waves, values[(source(waves) >> shift) & uint32(0xFF)])


def compile_pair_from_float8(instruction: Instruction, architecture: Architecture) -> Step:
    """v_cvt_pk_f32_fp8 and v_cvt_scalef32_pk_*_fp8: two bytes of a half -> two values."""
    match = re.match(r"v_cvt_(scalef32_)?pk_(f32|f16|bf16)_(fp8|bf8)$", instruction.name)
    assert match is not None
    scaled, result = match.group(1) is not None, match.group(2)
    values = float8_values(float8_format(match.group(3), architecture))
    destination, sources = instruction.operands[0], instruction.operands[1:]
    source = read_vector(sources[0], "u32", part=instruction.word("src0_sel"))
    scale = read_vector(sources[1], "f32") if scaled else None
    shift = uint32(16 * instruction.numbers("op_sel", [0])[0])
    write_first = write_vector(destination.at(0))
    write_second = write_vector(destination.at(1)) if result == "f32" else None

    def step(waves: Waves) -> None:
        half = waves.whole(source(waves)) >> shift
        factor = _scale_of(scale, waves) if scale is not None else float32(1)
        low = values[half & uint32(0xFF)] * factor
        high = values[(half >> uint32(8)) & uint32(0xFF)] * factor
        if write_second is not None:
            write_first(waves, low)
            write_second(waves, high)
        elif result == "f16":
            write_first(waves, pack_halves(low.astype(float16), high.astype(float16)))
        else:
            write_first(waves, pack_halves(bfloat16_of_float32(low), bfloat16_of_float32(high)))

    return step


FORMS: Mapping[str, Compile] = {
    **{f"v_cvt_pk_{form}_f32": compile_to_float8 for form in ("fp8", "bf8")},
    **{f"v_cvt_f32_{form}": compile_from_float8 for form in ("fp8", "bf8")},
    **{f"v_cvt_pk_f32_{form}": compile_pair_from_float8 for form in ("fp8", "bf8")},
    **{
        f"v_cvt_scalef32_pk_{form}_{kind}": compile_scaled_to_float8
        for form in ("fp8", "bf8")
        for kind in ("f32", "f16", "bf16")
    },
    **{
        f"v_cvt_scalef32_pk_{kind}_{form}": compile_pair_from_float8
        for form in ("fp8", "bf8")
        for kind in ("f32", "f16", "bf16")
    },
}
"""Conversions from and to 8-bit floats, whose format depends on the GPU."""
