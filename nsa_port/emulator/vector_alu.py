"""Vector arithmetic: one table of operations, and the modifiers that any of them may carry.

A modifier changes how operands are read (op_sel, SDWA parts, DPP lanes) or what becomes of the
result (clamp, mul/div, an SDWA part of the destination, lanes that DPP leaves alone).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np
from numpy import float32, int16, int32, int64, uint16, uint32, uint64

from nsa_port.emulator import bits, conversions, floating
from nsa_port.emulator.architectures import Architecture
from nsa_port.emulator.assembly import Instruction
from nsa_port.emulator.cross_lane import lanes_that_dpp_writes, read_through_dpp
from nsa_port.emulator.errors import EmulatorError
from nsa_port.emulator.number_formats import KINDS, Array, pack_halves
from nsa_port.emulator.operands import part_position, read_vector, write_vector
from nsa_port.emulator.operations import Compile, Operation, define
from nsa_port.emulator.registers import Reader, Step, Waves, Writer

_LOW_24 = uint32(0xFFFFFF)


_INTEGER_32: Mapping[str, Operation] = {
    **define(
        "u32 <- u32 u32",
        add_u32=np.add,
        add_nc_u32=np.add,
        sub_u32=np.subtract,
        sub_nc_u32=np.subtract,
        subrev_u32=lambda a, b: b - a,
        subrev_nc_u32=lambda a, b: b - a,
        and_b32=np.bitwise_and,
        or_b32=np.bitwise_or,
        xor_b32=np.bitwise_xor,
        xnor_b32=lambda a, b: ~(a ^ b),
        lshlrev_b32=lambda a, b: b << (a & uint32(31)),
        lshrrev_b32=lambda a, b: b >> (a & uint32(31)),
        lshl_b32=lambda a, b: a << (b & uint32(31)),
        mul_lo_u32=np.multiply,
        mul_hi_u32=bits.multiply_high,
        mul_u32_u24=lambda a, b: (a & _LOW_24) * (b & _LOW_24),
        mul_hi_u32_u24=lambda a, b: bits.multiply_high(a & _LOW_24, b & _LOW_24),
        max_u32=np.maximum,
        min_u32=np.minimum,
        bcnt_u32_b32=lambda a, b: bits.count_ones(a) + b,
        bfm_b32=lambda a, b: ((uint32(1) << (a & uint32(31))) - uint32(1)) << (b & uint32(31)),
    ),
    **define(
        "i32 <- i32 i32",
        max_i32=np.maximum,
        min_i32=np.minimum,
        mul_lo_i32=np.multiply,
        mul_hi_i32=bits.multiply_high_signed,
        add_i32=np.add,
        add_nc_i32=np.add,
        sub_i32=np.subtract,
        sub_nc_i32=np.subtract,
        mul_i32_i24=lambda a, b: bits.sign_extend_24(a) * bits.sign_extend_24(b),
        ashrrev_i32=lambda a, b: b >> (a & int32(31)),
    ),
    **define(
        "u32 <- u32 u32 u32",
        add3_u32=lambda a, b, c: a + b + c,
        lshl_add_u32=lambda a, b, c: (a << (b & uint32(31))) + c,
        add_lshl_u32=lambda a, b, c: (a + b) << (c & uint32(31)),
        lshl_or_b32=lambda a, b, c: (a << (b & uint32(31))) | c,
        and_or_b32=lambda a, b, c: (a & b) | c,
        or3_b32=lambda a, b, c: a | b | c,
        xor3_b32=lambda a, b, c: a ^ b ^ c,
        xad_u32=lambda a, b, c: (a ^ b) + c,
        bfi_b32=lambda a, b, c: (a & b) | (~a & c),
        bfe_u32=bits.extract_unsigned,
        perm_b32=bits.permute_bytes,
        alignbit_b32=bits.align_bits,
        alignbyte_b32=lambda a, b, c: bits.align_bits(a, b, (c & uint32(3)) * uint32(8)),
        mad_u32_u24=lambda a, b, c: (a & _LOW_24) * (b & _LOW_24) + c,
        max3_u32=lambda a, b, c: np.maximum(np.maximum(a, b), c),
        min3_u32=lambda a, b, c: np.minimum(np.minimum(a, b), c),
        med3_u32=lambda a, b, c: floating.median(a, b, c),
        sad_u32=lambda a, b, c: np.where(a > b, a - b, b - a) + c,
        maxmin_u32=lambda a, b, c: np.minimum(np.maximum(a, b), c),
        minmax_u32=lambda a, b, c: np.maximum(np.minimum(a, b), c),
    ),
    **define(
        "i32 <- i32 i32 i32",
        bfe_i32=bits.extract_signed,
        mad_i32_i24=lambda a, b, c: bits.sign_extend_24(a) * bits.sign_extend_24(b) + c,
        max3_i32=lambda a, b, c: np.maximum(np.maximum(a, b), c),
        min3_i32=lambda a, b, c: np.minimum(np.minimum(a, b), c),
        med3_i32=floating.median,
        maxmin_i32=lambda a, b, c: np.minimum(np.maximum(a, b), c),
        minmax_i32=lambda a, b, c: np.maximum(np.minimum(a, b), c),
    ),
    **define(
        "u32 <- u32",
        mov_b32=lambda a: a,
        not_b32=np.bitwise_not,
        accvgpr_read_b32=lambda a: a,
        accvgpr_write_b32=lambda a: a,
        accvgpr_mov_b32=lambda a: a,
        bfrev_b32=bits.reverse_bits,
        ffbh_u32=bits.count_leading_zeros,
        clz_i32_u32=bits.count_leading_zeros,
        ffbl_b32=bits.count_trailing_zeros,
        ctz_i32_b32=bits.count_trailing_zeros,
        ffbh_i32=bits.count_sign_bits,
        cls_i32=bits.count_sign_bits,
    ),
}

_FLOAT_32: Mapping[str, Operation] = {
    **define(
        "f32 <- f32 f32",
        add_f32=np.add,
        sub_f32=np.subtract,
        subrev_f32=lambda a, b: b - a,
        mul_f32=np.multiply,
        mul_legacy_f32=lambda a, b: np.where((a == 0) | (b == 0), float32(0), a * b),
        max_f32=np.fmax,
        min_f32=np.fmin,
        max_num_f32=np.fmax,
        min_num_f32=np.fmin,
        maximum_f32=np.maximum,
        minimum_f32=np.minimum,
    ),
    **define(
        "f32 <- f32 f32 f32",
        fma_f32=floating.fused_multiply_add,
        fmaak_f32=floating.fused_multiply_add,
        fmamk_f32=floating.fused_multiply_add,
        mad_f32=lambda a, b, c: a * b + c,
        max3_f32=lambda a, b, c: np.fmax(np.fmax(a, b), c),
        min3_f32=lambda a, b, c: np.fmin(np.fmin(a, b), c),
        med3_f32=floating.median,
        max3_num_f32=lambda a, b, c: np.fmax(np.fmax(a, b), c),
        min3_num_f32=lambda a, b, c: np.fmin(np.fmin(a, b), c),
        med3_num_f32=floating.median,
        maximum3_f32=lambda a, b, c: np.maximum(np.maximum(a, b), c),
        minimum3_f32=lambda a, b, c: np.minimum(np.minimum(a, b), c),
        maxmin_f32=lambda a, b, c: np.fmin(np.fmax(a, b), c),
        minmax_f32=lambda a, b, c: np.fmax(np.fmin(a, b), c),
        maxmin_num_f32=lambda a, b, c: np.fmin(np.fmax(a, b), c),
        div_fixup_f32=floating.fix_quotient,
        minmax_num_f32=lambda a, b, c: np.fmax(np.fmin(a, b), c),
    ),
    **define("f32 <- f32 f32 f32", accumulates=True, fmac_f32=floating.fused_multiply_add),
    **define("f32 <- f32 f32 f32", accumulates=True, mac_f32=lambda a, b, c: a * b + c),
    **define(
        "f32 <- f32",
        exp_f32=np.exp2,
        log_f32=np.log2,
        rcp_f32=floating.reciprocal,
        rcp_iflag_f32=floating.reciprocal,
        rsq_f32=lambda a: floating.reciprocal(np.sqrt(a)),
        sqrt_f32=np.sqrt,
        floor_f32=np.floor,
        ceil_f32=np.ceil,
        trunc_f32=np.trunc,
        rndne_f32=np.rint,
        fract_f32=floating.fraction,
        sin_f32=floating.sine,
        cos_f32=floating.cosine,
        frexp_mant_f32=lambda a: np.frexp(a)[0],
    ),
    **define("i32 <- f32", frexp_exp_i32_f32=lambda a: np.frexp(a)[1].astype(int32)),
    **define("f32 <- f32 i32", ldexp_f32=floating.load_exponent),
}

_HALVES: Mapping[str, Operation] = {
    **define(
        "f16 <- f16 f16",
        add_f16=np.add,
        sub_f16=np.subtract,
        subrev_f16=lambda a, b: b - a,
        mul_f16=np.multiply,
        max_f16=np.fmax,
        min_f16=np.fmin,
        max_num_f16=np.fmax,
        min_num_f16=np.fmin,
    ),
    **define("f16 <- f16 f16 f16", fma_f16=floating.fused_multiply_add_half),
    **define("f16 <- f16 f16 f16", accumulates=True, fmac_f16=floating.fused_multiply_add_half),
    **define(
        "f16 <- f16",
        exp_f16=np.exp2,
        log_f16=np.log2,
        rcp_f16=floating.reciprocal,
        rsq_f16=lambda a: floating.reciprocal(np.sqrt(a)),
        sqrt_f16=np.sqrt,
        floor_f16=np.floor,
        ceil_f16=np.ceil,
        trunc_f16=np.trunc,
        rndne_f16=np.rint,
    ),
    **define(
        "b16 <- b16 b16",
        add_u16=np.add,
        add_nc_u16=np.add,
        sub_u16=np.subtract,
        sub_nc_u16=np.subtract,
        mul_lo_u16=np.multiply,
        lshlrev_b16=lambda a, b: b << (a & uint16(15)),
        lshrrev_b16=lambda a, b: b >> (a & uint16(15)),
        max_u16=np.maximum,
        min_u16=np.minimum,
        and_b16=np.bitwise_and,
        or_b16=np.bitwise_or,
        xor_b16=np.bitwise_xor,
    ),
    **define(
        "i16 <- i16 i16",
        add_nc_i16=np.add,
        sub_nc_i16=np.subtract,
        max_i16=np.maximum,
        min_i16=np.minimum,
        ashrrev_i16=lambda a, b: b >> (a & int16(15)),
    ),
    **define("b16 <- b16", mov_b16=lambda a: a, not_b16=np.bitwise_not),
    **define("b16 <- b16 b16 b16", mad_u16=lambda a, b, c: a * b + c),
    **define(
        "u32 <- b16 b16 u32", mad_u32_u16=lambda a, b, c: a.astype(uint32) * b.astype(uint32) + c
    ),
    **define(
        "i32 <- i16 i16 i32", mad_i32_i16=lambda a, b, c: a.astype(int32) * b.astype(int32) + c
    ),
    **define("u32 <- f16 f16", pack_b32_f16=pack_halves),
}

_WIDE: Mapping[str, Operation] = {
    **define(
        "u64 <- u64 u32 u64",
        lshl_add_u64=lambda a, b, c: (a << (b & uint32(63)).astype(uint64)) + c,
    ),
    **define(
        "u64 <- u32 u64",
        lshlrev_b64=lambda a, b: b << (a & uint32(63)).astype(uint64),
        lshrrev_b64=lambda a, b: b >> (a & uint32(63)).astype(uint64),
    ),
    **define("i64 <- u32 i64", ashrrev_i64=lambda a, b: b >> (a & uint32(63)).astype(int64)),
    **define("u64 <- u64", mov_b64=lambda a: a),
    **define("u64 <- u64 u64", add_u64=np.add, add_nc_u64=np.add),
    **define(
        "f64 <- f64 f64", add_f64=np.add, mul_f64=np.multiply, max_f64=np.fmax, min_f64=np.fmin
    ),
    **define("f64 <- f64 f64 f64", fma_f64=lambda a, b, c: a * b + c),
    **define("f64 <- f64 f64 f64", accumulates=True, fmac_f64=lambda a, b, c: a * b + c),
}

OPERATIONS: Mapping[str, Operation] = {
    **_INTEGER_32,
    **_FLOAT_32,
    **_HALVES,
    **_WIDE,
    **conversions.OPERATIONS,
}
"""Every vector operation that is a function of its operands alone, by its name without `v_`."""


# ------------------------------------------------------------------------------------- compiling
def compile_operation(instruction: Instruction, architecture: Architecture) -> Step:
    """Compile any instruction of `OPERATIONS` with its modifiers."""
    operation = OPERATIONS[instruction.name.removeprefix("v_")]
    destination, *sources = instruction.operands
    if operation.accumulates:
        sources.append(destination)
    if len(sources) != len(operation.sources):
        raise EmulatorError(f"{len(sources)} sources where {len(operation.sources)} belong")
    readers = [
        _read_source(instruction, position, kind) for position, kind in enumerate(operation.sources)
    ]
    if instruction.is_dpp:
        readers[0] = read_through_dpp(instruction, readers[0], architecture)
    function = operation.function
    if "clamp" in instruction.modifiers and not KINDS[operation.result].floating:
        function = _clamping_integer(instruction.name)
    write = _result_writer(instruction, operation, architecture)
    return _apply(function, readers, write, KINDS[operation.result].dtype)


def _read_source(instruction: Instruction, position: int, kind: str) -> Reader:
    """The reader of one source, of the half or part that the modifiers name."""
    accumulated = position + 1 >= len(instruction.operands)
    operand = instruction.operands[0 if accumulated else position + 1]
    halves = instruction.numbers("op_sel", [])
    high = KINDS[kind].half and position < len(halves) and bool(halves[position])
    part = instruction.word(f"src{position}_sel") if instruction.is_sdwa else None
    return read_vector(operand, kind, high, part)


def _apply(
    function: Callable[..., Array], readers: list[Reader], write: Writer, dtype: type
) -> Step:
    def typed(values: Array) -> Array:
        return values if values.dtype == dtype else values.astype(dtype)

    if len(readers) == 1:
        (first,) = readers
        return lambda waves: write(waves, typed(function(first(waves))))
    if len(readers) == 2:
        first, second = readers
        return lambda waves: write(waves, typed(function(first(waves), second(waves))))
    first, second, third = readers
    return lambda waves: write(waves, typed(function(first(waves), second(waves), third(waves))))


def _clamping_integer(name: str) -> Callable[[Array, Array], Array]:
    """Integer addition or subtraction that saturates instead of wrapping."""
    match = re.match(r"v_(add|sub|subrev)_(?:nc_)?([ui])(16|32)$", name)
    if match is None:
        raise EmulatorError("clamp on this integer instruction")
    width = int(match.group(3))
    signed = match.group(2) == "i"
    least, most = (-(1 << width - 1), (1 << width - 1) - 1) if signed else (0, (1 << width) - 1)
    kind = match.group(1)

    def clamped(a: Array, b: Array) -> Array:
        left, right = a.astype(int64), b.astype(int64)
        exact = left + right if kind == "add" else left - right if kind == "sub" else right - left
        return np.clip(exact, least, most).astype(a.dtype)

    return clamped


def _result_writer(
    instruction: Instruction, operation: Operation, architecture: Architecture
) -> Writer:
    """The destination's writer, behind whatever the modifiers do to the result."""
    kind, destination = operation.result, instruction.operands[0]
    halves = instruction.numbers("op_sel", [])
    position = len(operation.sources)
    high = KINDS[kind].half and position < len(halves) and bool(halves[position])
    write = write_vector(destination, kind, architecture, high=high)
    if instruction.is_sdwa and instruction.word("dst_sel") not in (None, "DWORD"):
        write = _write_part(instruction)
    if instruction.is_dpp:
        write = _write_where_dpp_may(instruction, kind, write, architecture)
    factor = _output_factor(instruction)
    clamps = "clamp" in instruction.modifiers and KINDS[kind].floating
    if factor is None and not clamps:
        return write

    def write_modified(waves: Waves, value: Array) -> None:
        if factor is not None:
            value = value * value.dtype.type(factor)
        if clamps:
            value = np.nan_to_num(np.clip(value, 0, 1)).astype(value.dtype)
        write(waves, value)

    return write_modified


def _output_factor(instruction: Instruction) -> float | None:
    if "mul" in instruction.modifiers:
        return float(instruction.number("mul"))
    if "div" in instruction.modifiers:
        return 1.0 / instruction.number("div")
    return None


def _write_part(instruction: Instruction) -> Writer:
    """SDWA: into one byte or word of the destination."""
    destination = instruction.operands[0]
    register, write = destination.register, write_vector(destination)
    width, shift = part_position(str(instruction.modifiers["dst_sel"]))
    mask = uint32(((1 << width) - 1) << shift)
    unused = instruction.word("dst_unused") or "UNUSED_PAD"

    def write_part(waves: Waves, value: Array) -> None:
        value = value.view(uint16).astype(uint32) if value.itemsize == 2 else value.view(uint32)
        value = (value << uint32(shift)) & mask
        if unused == "UNUSED_PRESERVE":
            value = value | (waves.vector[register, waves.chosen] & ~mask)
        elif unused == "UNUSED_SEXT":
            rest = int32(32 - width - shift)
            value = ((value.view(int32) << rest) >> rest).view(uint32)
        write(waves, value)

    return write_part


def _write_where_dpp_may(
    instruction: Instruction, kind: str, write: Writer, architecture: Architecture
) -> Writer:
    """DPP leaves lanes alone that its masks or a missing source exclude."""
    may_write = lanes_that_dpp_writes(instruction, architecture)
    if may_write is None:
        return write
    if KINDS[kind].half or KINDS[kind].registers != 1:
        raise EmulatorError("a masked DPP form of a result that is not 32 bits wide")
    register = instruction.operands[0].register

    def write_masked(waves: Waves, value: Array) -> None:
        old = waves.vector[register, waves.chosen]
        write(waves, np.where(may_write(waves), value.view(uint32), old))

    return write_masked


TABLE: Mapping[str, Compile] = {
    **{f"v_{name}": compile_operation for name in OPERATIONS},
    **conversions.FORMS,
}
