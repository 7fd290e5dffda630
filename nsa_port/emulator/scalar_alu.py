"""Scalar arithmetic: one value per wave, and the carry bit (SCC) that most of it sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import int8, int16, int32, int64, uint8, uint16, uint32, uint64

from nsa_port.emulator import bits
from nsa_port.emulator.architectures import Architecture
from nsa_port.emulator.assembly import EXEC, Instruction, Operand
from nsa_port.emulator.comparisons import FLOAT_PREDICATES, PREDICATES
from nsa_port.emulator.errors import EmulatorError
from nsa_port.emulator.number_formats import KINDS, Array
from nsa_port.emulator.operands import (
    read_scalar,
    read_wide_scalar,
    write_scalar,
    write_wide_scalar,
)
from nsa_port.emulator.operations import Compile
from nsa_port.emulator.registers import Reader, Step, Waves, Writer
from nsa_port.emulator.vector_alu import OPERATIONS as VECTOR_OPERATIONS


@dataclass(frozen=True, slots=True)
class ScalarOperation:
    """A line of the table.

    sources: kinds of `number_formats`, or "s16"/"u16": a 16-bit immediate, sign- or zero-extended.
    sets: "nothing"; "nonzero", the carry becomes "the result is not 0"; or "own", the function
        returns (result, carry).
    reads_carry: the function takes the carry (bool) as its last argument.
    accumulates: the destination is the first source too.
    """

    result: str | None
    sources: tuple[str, ...]
    function: Callable[..., Any]
    sets: str = "nothing"
    reads_carry: bool = False
    accumulates: bool = False


def define(
    signature: str,
    sets: str = "nothing",
    *,
    reads_carry: bool = False,
    accumulates: bool = False,
    **functions: Callable[..., Any],
) -> Mapping[str, ScalarOperation]:
    """Table lines for operations that share a signature; "carry <- ..." writes the carry alone."""
    result, _, sources = signature.partition(" <- ")
    return {
        name: ScalarOperation(
            None if result == "carry" else result,
            tuple(sources.split()),
            function,
            "own" if result == "carry" else sets,
            reads_carry,
            accumulates,
        )
        for name, function in functions.items()
    }


def _add(a: Array, b: Array) -> tuple[Array, Array]:
    exact = a.astype(uint64) + b.astype(uint64)
    return exact.astype(uint32), exact > uint64(0xFFFFFFFF)


def _add_with_carry(a: Array, b: Array, carry: Array) -> tuple[Array, Array]:
    exact = a.astype(uint64) + b.astype(uint64) + carry.astype(uint64)
    return exact.astype(uint32), exact > uint64(0xFFFFFFFF)


def _subtract(a: Array, b: Array) -> tuple[Array, Array]:
    return a - b, b > a


def _subtract_with_borrow(a: Array, b: Array, carry: Array) -> tuple[Array, Array]:
    exact = a.astype(int64) - b.astype(int64) - carry.astype(int64)
    return exact.astype(uint64).astype(uint32), exact < 0


def _add_signed(a: Array, b: Array) -> tuple[Array, Array]:
    exact = a.astype(int64) + b.astype(int64)
    return a + b, exact != (a + b)


def _subtract_signed(a: Array, b: Array) -> tuple[Array, Array]:
    exact = a.astype(int64) - b.astype(int64)
    return a - b, exact != (a - b)


def _shift_and_add(shift: int) -> Callable[[Array, Array], tuple[Array, Array]]:
    def function(a: Array, b: Array) -> tuple[Array, Array]:
        exact = (a.astype(uint64) << uint64(shift)) + b.astype(uint64)
        return exact.astype(uint32), exact > uint64(0xFFFFFFFF)

    return function


def _field(control: Array) -> tuple[Array, Array]:
    """s_bfe's second operand: the offset, and the width from bit 16 on."""
    return control, (control >> uint32(16)) & uint32(0x7F)


def _extract_unsigned(a: Array, control: Array) -> Array:
    offset, width = _field(control)
    shifted = a >> (offset & uint32(31))
    return np.where(width >= 32, shifted, bits.extract_unsigned(a, offset, width))


def _extract_signed(a: Array, control: Array) -> Array:
    offset, width = _field(control)
    narrow = bits.extract_signed(a, offset.view(int32), np.minimum(width, 31).view(int32))
    return np.where(width >= 32, a >> (offset & uint32(31)).view(int32), narrow)


def _extract_wide(a: Array, control: Array) -> Array:
    offset, width = (field.astype(uint64) for field in _field(control))
    mask = (uint64(1) << np.minimum(width, uint64(63))) - uint64(1)
    return (a >> (offset & uint64(63))) & np.where(width >= 64, ~uint64(0), mask)


def _bit(position: Array) -> Array:
    return uint32(1) << (position & uint32(31))


def _test_bit(expected: int, mask: int) -> Callable[[Array, Array], tuple[None, Array]]:
    def function(a: Array, position: Array) -> tuple[None, Array]:
        place = (position & uint32(mask)).astype(a.dtype)
        return None, ((a >> place) & a.dtype.type(1)) == expected

    return function


def _comparison(predicate: Callable[[Array, Array], Array]) -> Callable[..., tuple[None, Array]]:
    return lambda a, b: (None, predicate(a, b))


def _half(words: Array, letter: str) -> Array:
    return words >> uint32(16) if letter == "h" else words & uint32(0xFFFF)


def _pack(low: str, high: str) -> Callable[[Array, Array], Array]:
    return lambda a, b: _half(a, low) | (_half(b, high) << uint32(16))


LOGIC: Mapping[str, Callable[[Array, Array], Array]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "andn1": lambda a, b: ~a & b,
    "and_not0": lambda a, b: ~a & b,
    "andn2": lambda a, b: a & ~b,
    "and_not1": lambda a, b: a & ~b,
    "orn1": lambda a, b: ~a | b,
    "or_not0": lambda a, b: ~a | b,
    "orn2": lambda a, b: a | ~b,
    "or_not1": lambda a, b: a | ~b,
    "nand": lambda a, b: ~(a & b),
    "nor": lambda a, b: ~(a | b),
    "xnor": lambda a, b: ~(a ^ b),
}
_INTEGER_ORDER = {"eq": "eq", "lg": "ne", "gt": "gt", "ge": "ge", "lt": "lt", "le": "le"}
_COMPARISONS: Mapping[str, ScalarOperation] = {
    **{
        f"cmp_{name}_{kind}": ScalarOperation(
            None, (kind, kind), _comparison(PREDICATES[predicate]), "own"
        )
        for kind in ("i32", "u32", "u64")
        for name, predicate in _INTEGER_ORDER.items()
        if kind != "u64" or name in ("eq", "lg")
    },
    **{
        f"cmp_{name}_f32": ScalarOperation(None, ("f32", "f32"), _comparison(predicate), "own")
        for name, predicate in FLOAT_PREDICATES.items()
        if name not in ("t", "tru", "f", "ne")
    },
}
_IMMEDIATE_COMPARISONS: Mapping[str, ScalarOperation] = {
    name.replace("cmp_", "cmpk_"): ScalarOperation(
        None, (kind, "s16" if kind == "i32" else "u16"), operation.function, "own"
    )
    for name, operation in _COMPARISONS.items()
    for kind in operation.sources[:1]
    if kind in ("i32", "u32")
}
_FLOATS = (
    *("add_f32", "sub_f32", "mul_f32", "fmaak_f32", "fmamk_f32"),
    *("min_f32", "max_f32", "min_num_f32", "max_num_f32", "minimum_f32", "maximum_f32"),
    *("ceil_f32", "floor_f32", "trunc_f32", "rndne_f32"),
    *("cvt_f32_i32", "cvt_f32_u32", "cvt_i32_f32", "cvt_u32_f32", "cvt_pk_rtz_f16_f32"),
)
_TRANSCENDENTAL = ("exp", "log", "rcp", "rsq", "sqrt")

OPERATIONS: Mapping[str, ScalarOperation] = {
    **{
        f"{logic}_b{width}": ScalarOperation(
            f"u{width}", (f"u{width}", f"u{width}"), function, "nonzero"
        )
        for width in ("32", "64")
        for logic, function in LOGIC.items()
    },
    **define("u32 <- u32", mov_b32=lambda a: a, brev_b32=bits.reverse_bits),
    **define("u64 <- u64", mov_b64=lambda a: a),
    **define("i32 <- s16", movk_i32=lambda a: a),
    **define("u32 <- u32", "nonzero", not_b32=np.bitwise_not),
    **define("u64 <- u64", "nonzero", not_b64=np.bitwise_not),
    **define(
        "u32 <- u32 u32",
        reads_carry=True,
        cselect_b32=lambda a, b, carry: np.where(carry, a, b),
    ),
    **define(
        "u64 <- u64 u64",
        reads_carry=True,
        cselect_b64=lambda a, b, carry: np.where(carry, a, b),
    ),
    **define(
        "u32 <- u32 u32",
        accumulates=True,
        reads_carry=True,
        cmov_b32=lambda old, new, carry: np.where(carry, new, old),
    ),
    **define(
        "u32 <- u32 u32",
        "nonzero",
        lshl_b32=lambda a, b: a << (b & uint32(31)),
        lshr_b32=lambda a, b: a >> (b & uint32(31)),
        bfe_u32=_extract_unsigned,
    ),
    **define(
        "i32 <- i32 u32",
        "nonzero",
        ashr_i32=lambda a, b: a >> (b & uint32(31)).view(int32),
        bfe_i32=_extract_signed,
    ),
    **define(
        "u64 <- u64 u32",
        "nonzero",
        lshl_b64=lambda a, b: a << (b & uint32(63)).astype(uint64),
        lshr_b64=lambda a, b: a >> (b & uint32(63)).astype(uint64),
        bfe_u64=_extract_wide,
    ),
    **define(
        "i64 <- i64 u32", "nonzero", ashr_i64=lambda a, b: a >> (b & uint32(63)).astype(int64)
    ),
    **define(
        "u32 <- u32 u32",
        "own",
        add_u32=_add,
        add_co_u32=_add,
        sub_u32=_subtract,
        sub_co_u32=_subtract,
        lshl1_add_u32=_shift_and_add(1),
        lshl2_add_u32=_shift_and_add(2),
        lshl3_add_u32=_shift_and_add(3),
        lshl4_add_u32=_shift_and_add(4),
        min_u32=lambda a, b: (np.minimum(a, b), a < b),
        max_u32=lambda a, b: (np.maximum(a, b), a > b),
    ),
    **define(
        "u32 <- u32 u32",
        "own",
        reads_carry=True,
        addc_u32=_add_with_carry,
        add_co_ci_u32=_add_with_carry,
        subb_u32=_subtract_with_borrow,
        sub_co_ci_u32=_subtract_with_borrow,
    ),
    **define(
        "i32 <- i32 i32",
        "own",
        add_i32=_add_signed,
        add_co_i32=_add_signed,
        sub_i32=_subtract_signed,
        sub_co_i32=_subtract_signed,
        min_i32=lambda a, b: (np.minimum(a, b), a < b),
        max_i32=lambda a, b: (np.maximum(a, b), a > b),
    ),
    **define(
        "i32 <- i32 s16",
        "own",
        accumulates=True,
        addk_i32=_add_signed,
        addk_co_i32=_add_signed,
    ),
    **define("i32 <- i32 s16", accumulates=True, mulk_i32=np.multiply),
    **define("u32 <- u32 u32", mul_i32=np.multiply, mul_hi_u32=bits.multiply_high),
    **define("i32 <- i32 i32", mul_hi_i32=bits.multiply_high_signed),
    **define(
        "u64 <- u64 u64",
        add_u64=np.add,
        add_nc_u64=np.add,
        sub_u64=np.subtract,
        sub_nc_u64=np.subtract,
        mul_u64=np.multiply,
    ),
    **define("i32 <- i32", "nonzero", abs_i32=np.abs),
    **define(
        "u32 <- u32 u32",
        bfm_b32=lambda a, b: (_bit(a) - uint32(1)) << (b & uint32(31)),
        pack_ll_b32_b16=_pack("l", "l"),
        pack_lh_b32_b16=_pack("l", "h"),
        pack_hl_b32_b16=_pack("h", "l"),
        pack_hh_b32_b16=_pack("h", "h"),
    ),
    **define(
        "u32 <- u32 u32",
        accumulates=True,
        bitset1_b32=lambda old, position: old | _bit(position),
        bitset0_b32=lambda old, position: old & ~_bit(position),
    ),
    **define("carry <- u32 u32", bitcmp0_b32=_test_bit(0, 31), bitcmp1_b32=_test_bit(1, 31)),
    **define("carry <- u64 u32", bitcmp0_b64=_test_bit(0, 63), bitcmp1_b64=_test_bit(1, 63)),
    **define("u32 <- u32", "nonzero", bcnt1_i32_b32=bits.count_ones),
    **define("u32 <- u64", "nonzero", bcnt1_i32_b64=bits.count_ones),
    **define(
        "u32 <- u32",
        ff1_i32_b32=bits.count_trailing_zeros,
        ctz_i32_b32=bits.count_trailing_zeros,
        flbit_i32_b32=bits.count_leading_zeros,
        clz_i32_u32=bits.count_leading_zeros,
        flbit_i32=bits.count_sign_bits,
        cls_i32=bits.count_sign_bits,
        sext_i32_i8=lambda a: a.astype(uint8).view(int8).astype(int32).view(uint32),
        sext_i32_i16=lambda a: a.astype(uint16).view(int16).astype(int32).view(uint32),
    ),
    **define(
        "u32 <- u64",
        ff1_i32_b64=bits.count_trailing_zeros,
        ctz_i32_b64=bits.count_trailing_zeros,
        flbit_i32_b64=bits.count_leading_zeros_wide,
        clz_i32_u64=bits.count_leading_zeros_wide,
    ),
    **_COMPARISONS,
    **_IMMEDIATE_COMPARISONS,
    **{
        name: ScalarOperation(operation.result, operation.sources, operation.function)
        for name, operation in VECTOR_OPERATIONS.items()
        if name in _FLOATS and not operation.accumulates
    },
}
"""Every scalar operation that is a function of its operands and the carry, without its `s_`."""


# ------------------------------------------------------------------------------------- compiling
def compile_operation(instruction: Instruction, architecture: Architecture) -> Step:
    """Compile any instruction of `OPERATIONS`."""
    operation = OPERATIONS[instruction.name.removeprefix("s_")]
    sources = list(instruction.operands)
    write = None
    if operation.result is not None:
        write = _write_kind(sources[0], operation.result)
        if not operation.accumulates:
            sources = sources[1:]
    if len(sources) != len(operation.sources):
        raise EmulatorError(f"{len(sources)} sources where {len(operation.sources)} belong")
    readers = [
        _read_kind(source, kind) for source, kind in zip(sources, operation.sources, strict=True)
    ]
    function = operation.function

    def step(waves: Waves) -> None:
        arguments = [read(waves) for read in readers]
        if operation.reads_carry:
            arguments.append(waves.carry[waves.chosen])
        result = function(*arguments)
        carry = None
        if operation.sets == "own":
            result, carry = result
        elif operation.sets == "nonzero":
            carry = result != 0
        if write is not None:
            write(waves, result)
        if carry is not None:
            waves.carry[waves.chosen] = carry

    return step


def _read_kind(operand: Operand, kind: str) -> Reader:
    if kind in ("s16", "u16"):
        assert isinstance(operand.value, int)
        immediate = np.array([operand.value & 0xFFFF], uint16)
        signed, unsigned = immediate.view(int16).astype(int32), immediate.astype(uint32)
        return lambda waves: signed if kind == "s16" else unsigned
    pair = KINDS[kind].registers == 2
    read = read_wide_scalar(operand) if pair else read_scalar(operand)
    dtype = KINDS[kind].dtype

    def read_typed(waves: Waves) -> Array:
        value: Array = read(waves).view(dtype)
        if operand.absolute:
            value = np.abs(value)
        return -value if operand.negate else value

    return read_typed


def _write_kind(operand: Operand, kind: str) -> Writer:
    if KINDS[kind].registers == 2:
        write_wide = write_wide_scalar(operand)
        return lambda waves, value: write_wide(waves, value.view(uint64))
    write, dtype = write_scalar(operand), KINDS[kind].dtype
    return lambda waves, value: write(waves, value.astype(dtype, copy=False).view(uint32))


def compile_multiply_accumulate(instruction: Instruction, architecture: Architecture) -> Step:
    """s_fmac_f32: the destination plus a product, with one rounding."""
    destination, *sources = instruction.operands
    operation = VECTOR_OPERATIONS["fma_f32"]
    readers = [_read_kind(source, "f32") for source in (*sources, destination)]
    write = _write_kind(destination, "f32")
    return lambda waves: write(waves, operation.function(*(read(waves) for read in readers)))


def compile_transcendental(instruction: Instruction, architecture: Architecture) -> Step:
    """v_s_rcp_f32 and its like (gfx12): a vector unit's function of a scalar."""
    destination, source = instruction.operands
    function = VECTOR_OPERATIONS[instruction.name.removeprefix("v_s_")].function
    read, write = _read_kind(source, "f32"), _write_kind(destination, "f32")
    return lambda waves: write(waves, function(read(waves)))


def compile_save_exec(instruction: Instruction, architecture: Architecture) -> Step:
    """s_and_saveexec_b64 and its like: keep EXEC in the destination, then combine it."""
    logic, _, width = instruction.name.removeprefix("s_").rpartition("_saveexec_b")
    destination, source = instruction.operands
    execution = Operand("scalar", EXEC, 2)
    if width == "64":
        read, read_exec = read_wide_scalar(source), read_wide_scalar(execution)
        write, write_exec = write_wide_scalar(destination), write_wide_scalar(execution)
    else:
        read, read_exec = read_scalar(source), read_scalar(execution)
        write, write_exec = write_scalar(destination), write_scalar(execution)
    function = LOGIC[logic]

    def step(waves: Waves) -> None:
        before = read_exec(waves)
        after = np.broadcast_to(function(read(waves), before), before.shape)
        write(waves, before)
        write_exec(waves, after)
        waves.carry[waves.chosen] = after != 0

    return step


def compile_zero(instruction: Instruction, architecture: Architecture) -> Step:
    """s_getreg_b32 and the clocks: nothing here has a value, so that 0 must do."""
    destination = instruction.operands[0]
    if instruction.name == "s_getreg_b32":
        write, zero = write_scalar(destination), np.zeros(1, uint32)
    else:
        write, zero = write_wide_scalar(destination), np.zeros(1, uint64)
    return lambda waves: write(waves, zero)


TABLE: Mapping[str, Compile] = {
    **{f"s_{name}": compile_operation for name in OPERATIONS},
    "s_fmac_f32": compile_multiply_accumulate,
    **{f"v_s_{name}_f32": compile_transcendental for name in _TRANSCENDENTAL},
    **{
        f"s_{logic}_saveexec_b{width}": compile_save_exec
        for logic in LOGIC
        for width in ("32", "64")
    },
    **{f"s_{name}": compile_zero for name in ("getreg_b32", "memtime", "memrealtime")},
}
