"""Scalar instructions against values worked out with Python's integers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from nsa_port.emulator import scalar_alu
from nsa_port.emulator.errors import OutOfBounds, Trap

from .emulator_programs import execute, mask, refuses

M32, M64 = 2**32 - 1, 2**64 - 1
PAIRS_32 = [
    (0, 0),
    (1, 31),
    (5, 3),
    (3, 5),
    (0x7FFFFFFF, 1),
    (0x80000000, 0x80000000),
    (M32, 1),
    (0x12345678, 0x00050008),
    (0xFFFF8000, 0x00100004),
]
PAIRS_64 = [(0, 0), (M64, 1), (0x8000000000000000, 63), (0x123456789ABCDEF0, 0x00200008), (7, 2)]


def signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


def fits(value: int) -> bool:
    return -(2**31) <= value < 2**31


def field(a: int, control: int, bits: int = 32) -> int:
    offset, width = control & (bits - 1), control >> 16 & 0x7F
    return a >> offset & ((1 << min(width, bits)) - 1)


def signed_field(a: int, control: int) -> int:
    width = min(control >> 16 & 0x7F, 32)
    value = signed(a) >> (control & 31) & ((1 << width) - 1)
    return signed(value, width) & M32 if width else 0


def leading_sign_bits(a: int) -> int:
    text = format(a, "032b")
    return M32 if text in ("0" * 32, "1" * 32) else len(text) - len(text.lstrip(text[0]))


def order(test: Callable[[int, int], bool]) -> Callable[..., tuple[None, bool]]:
    return lambda a, b: (None, test(a, b))


def signed_order(test: Callable[[int, int], bool]) -> Callable[..., tuple[None, bool]]:
    return lambda a, b: (None, test(signed(a), signed(b)))


def nonzero(value: int, bits: int = 32) -> tuple[int, bool]:
    return value & ((1 << bits) - 1), value & ((1 << bits) - 1) != 0


def logic(name: str, bits: int) -> Callable[[int, int], tuple[int, bool]]:
    functions: dict[str, Callable[[int, int], int]] = {
        "and": lambda a, b: a & b,
        "or": lambda a, b: a | b,
        "xor": lambda a, b: a ^ b,
        "andn1": lambda a, b: ~a & b,
        "andn2": lambda a, b: a & ~b,
        "orn1": lambda a, b: ~a | b,
        "orn2": lambda a, b: a | ~b,
        "nand": lambda a, b: ~(a & b),
        "nor": lambda a, b: ~(a | b),
        "xnor": lambda a, b: ~(a ^ b),
    }
    other = {"and_not0": "andn1", "and_not1": "andn2", "or_not0": "orn1", "or_not1": "orn2"}
    return lambda a, b: nonzero(functions[other.get(name, name)](a, b), bits)


def shift_and_add(shift: int) -> Callable[[int, int], tuple[int, bool]]:
    return lambda a, b: ((a << shift) + b & M32, (a << shift) + b > M32)


ORDERS: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b,
    "lg": lambda a, b: a != b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
}
# What each gives: the result, or (result, carry) where it sets the carry.
TWO_SOURCES: dict[str, Callable[[int, int], object]] = {
    **{f"{name}_b32": logic(name, 32) for name in scalar_alu.LOGIC},
    **{f"cmp_{name}_u32": order(test) for name, test in ORDERS.items()},
    **{f"cmp_{name}_i32": signed_order(test) for name, test in ORDERS.items()},
    "lshl_b32": lambda a, b: nonzero(a << (b & 31)),
    "lshr_b32": lambda a, b: nonzero(a >> (b & 31)),
    "ashr_i32": lambda a, b: nonzero(signed(a) >> (b & 31)),
    "bfe_u32": lambda a, b: nonzero(field(a, b)),
    "bfe_i32": lambda a, b: nonzero(signed_field(a, b)),
    "add_u32": lambda a, b: (a + b & M32, a + b > M32),
    "add_co_u32": lambda a, b: (a + b & M32, a + b > M32),
    "sub_u32": lambda a, b: (a - b & M32, b > a),
    "sub_co_u32": lambda a, b: (a - b & M32, b > a),
    "add_i32": lambda a, b: (a + b & M32, not fits(signed(a) + signed(b))),
    "add_co_i32": lambda a, b: (a + b & M32, not fits(signed(a) + signed(b))),
    "sub_i32": lambda a, b: (a - b & M32, not fits(signed(a) - signed(b))),
    "sub_co_i32": lambda a, b: (a - b & M32, not fits(signed(a) - signed(b))),
    **{f"lshl{n}_add_u32": shift_and_add(n) for n in (1, 2, 3, 4)},
    "min_u32": lambda a, b: (min(a, b), a < b),
    "max_u32": lambda a, b: (max(a, b), a > b),
    "min_i32": lambda a, b: (min(signed(a), signed(b)) & M32, signed(a) < signed(b)),
    "max_i32": lambda a, b: (max(signed(a), signed(b)) & M32, signed(a) > signed(b)),
    "mul_i32": lambda a, b: a * b & M32,
    "mul_hi_u32": lambda a, b: a * b >> 32,
    "mul_hi_i32": lambda a, b: signed(a) * signed(b) >> 32 & M32,
    "bfm_b32": lambda a, b: ((1 << (a & 31)) - 1 << (b & 31)) & M32,
    "pack_ll_b32_b16": lambda a, b: a & 0xFFFF | (b & 0xFFFF) << 16,
    "pack_lh_b32_b16": lambda a, b: a & 0xFFFF | (b >> 16) << 16,
    "pack_hl_b32_b16": lambda a, b: a >> 16 | (b & 0xFFFF) << 16,
    "pack_hh_b32_b16": lambda a, b: a >> 16 | (b >> 16) << 16,
    "bitcmp0_b32": lambda a, b: (None, not a >> (b & 31) & 1),
    "bitcmp1_b32": lambda a, b: (None, bool(a >> (b & 31) & 1)),
}
TWO_WIDE_SOURCES: dict[str, Callable[[int, int], object]] = {
    **{f"{name}_b64": logic(name, 64) for name in scalar_alu.LOGIC},
    "cmp_eq_u64": lambda a, b: (None, a == b),
    "cmp_lg_u64": lambda a, b: (None, a != b),
    "add_u64": lambda a, b: a + b & M64,
    "add_nc_u64": lambda a, b: a + b & M64,
    "sub_u64": lambda a, b: a - b & M64,
    "sub_nc_u64": lambda a, b: a - b & M64,
    "mul_u64": lambda a, b: a * b & M64,
}
WIDE_AND_NARROW: dict[str, Callable[[int, int], object]] = {
    "lshl_b64": lambda a, b: nonzero(a << (b & 63), 64),
    "lshr_b64": lambda a, b: nonzero(a >> (b & 63), 64),
    "ashr_i64": lambda a, b: nonzero(signed(a, 64) >> (b & 63), 64),
    "bfe_u64": lambda a, b: nonzero(field(a, b, 64), 64),
    "bitcmp0_b64": lambda a, b: (None, not a >> (b & 63) & 1),
    "bitcmp1_b64": lambda a, b: (None, bool(a >> (b & 63) & 1)),
}
ONE_SOURCE: dict[str, Callable[[int], object]] = {
    "mov_b32": lambda a: a,
    "brev_b32": lambda a: int(format(a, "032b")[::-1], 2),
    "not_b32": lambda a: nonzero(~a),
    "abs_i32": lambda a: nonzero(abs(signed(a))),
    "bcnt1_i32_b32": lambda a: nonzero(a.bit_count()),
    "ff1_i32_b32": lambda a: (a & -a).bit_length() - 1 & M32,
    "ctz_i32_b32": lambda a: (a & -a).bit_length() - 1 & M32,
    "flbit_i32_b32": lambda a: 32 - a.bit_length() if a else M32,
    "clz_i32_u32": lambda a: 32 - a.bit_length() if a else M32,
    "flbit_i32": leading_sign_bits,
    "cls_i32": leading_sign_bits,
    "sext_i32_i8": lambda a: signed(a & 0xFF, 8) & M32,
    "sext_i32_i16": lambda a: signed(a & 0xFFFF, 16) & M32,
}
ONE_WIDE_SOURCE: dict[str, Callable[[int], object]] = {
    "mov_b64": lambda a: a,
    "not_b64": lambda a: nonzero(~a, 64),
}
WIDE_TO_NARROW: dict[str, Callable[[int], object]] = {
    "bcnt1_i32_b64": lambda a: nonzero(a.bit_count()),
    "ff1_i32_b64": lambda a: (a & -a).bit_length() - 1 & M32,
    "ctz_i32_b64": lambda a: (a & -a).bit_length() - 1 & M32,
    "flbit_i32_b64": lambda a: 64 - a.bit_length() if a else M32,
    "clz_i32_u64": lambda a: 64 - a.bit_length() if a else M32,
}


def check(name: str, operands: str, sources: dict[int, int], expected: object, wide: bool) -> None:
    """Run one instruction into s[8:9] from s[10:11] and s[12:13]."""
    carry_before = True
    result = execute("gfx942", f"s_{name} {operands}", scalars=sources, carry=carry_before)
    value, carry = expected if isinstance(expected, tuple) else (expected, carry_before)
    if value is not None:
        assert (result.wide_scalar(8) if wide else result.scalar(8)) == value
    assert result.carry == carry


@pytest.mark.parametrize("name", TWO_SOURCES)
def test_two_sources(name: str) -> None:
    compares = name.startswith(("cmp", "bitcmp"))
    for a, b in PAIRS_32:
        operands = "s10, s12" if compares else "s8, s10, s12"
        check(name, operands, {10: a, 12: b}, TWO_SOURCES[name](a, b), False)


@pytest.mark.parametrize("name", [*TWO_WIDE_SOURCES, *WIDE_AND_NARROW])
def test_wide_sources(name: str) -> None:
    compares, narrow = name.startswith(("cmp", "bitcmp")), name in WIDE_AND_NARROW
    second = "s12" if narrow else "s[12:13]"
    for a, b in PAIRS_64:
        operands = f"s[10:11], {second}" if compares else f"s[8:9], s[10:11], {second}"
        expected = (WIDE_AND_NARROW if narrow else TWO_WIDE_SOURCES)[name](a, b)
        sources = {10: a & M32, 11: a >> 32, 12: b & M32, 13: b >> 32}
        check(name, operands, sources, expected, True)


@pytest.mark.parametrize("name", [*ONE_SOURCE, *ONE_WIDE_SOURCE, *WIDE_TO_NARROW])
def test_one_source(name: str) -> None:
    wide_in = name not in ONE_SOURCE
    wide_out = name in ONE_WIDE_SOURCE
    expected = {**ONE_SOURCE, **ONE_WIDE_SOURCE, **WIDE_TO_NARROW}[name]
    for a, _ in PAIRS_64 if wide_in else PAIRS_32:
        operands = f"{'s[8:9]' if wide_out else 's8'}, {'s[10:11]' if wide_in else 's10'}"
        check(name, operands, {10: a & M32, 11: a >> 32}, expected(a), wide_out)


def test_every_operation_is_tested() -> None:
    tested = {*TWO_SOURCES, *TWO_WIDE_SOURCES, *WIDE_AND_NARROW, *ONE_SOURCE}
    tested |= {*ONE_WIDE_SOURCE, *WIDE_TO_NARROW}
    below = {"addc_u32", "add_co_ci_u32", "subb_u32", "sub_co_ci_u32", "cselect_b32"}
    below |= {"cselect_b64", "cmov_b32", "movk_i32", "addk_i32", "addk_co_i32", "mulk_i32"}
    below |= {"bitset0_b32", "bitset1_b32"}
    left = set(scalar_alu.OPERATIONS) - tested - below
    assert {name for name in left if "f32" not in name and "cmpk" not in name} == set()


@pytest.mark.parametrize("carry", [False, True])
def test_the_carry_is_read(carry: bool) -> None:
    def run(line: str, a: int, b: int, c: int = 0) -> tuple[int, bool]:
        result = execute("gfx942", line, scalars={8: c, 10: a, 12: b}, carry=carry)
        return result.scalar(8), result.carry

    for name in ("addc_u32", "add_co_ci_u32"):
        assert run(f"s_{name} s8, s10, s12", M32, 0) == ((M32 + carry) & M32, carry)
    for name in ("subb_u32", "sub_co_ci_u32"):
        assert run(f"s_{name} s8, s10, s12", 0, 0) == (-carry & M32, carry)
    assert run("s_cselect_b32 s8, s10, s12", 3, 4) == (3 if carry else 4, carry)
    assert run("s_cmov_b32 s8, s10", 3, 4, c=5) == (3 if carry else 5, carry)
    wide = execute(
        "gfx942", "s_cselect_b64 s[8:9], s[10:11], 7", scalars={10: 1, 11: 2}, carry=carry
    )
    assert wide.wide_scalar(8) == (2**33 + 1 if carry else 7)


def test_immediates_of_16_bits_are_extended() -> None:
    result = execute(
        "gfx942",
        """
        s_movk_i32 s0, 0xfffe
        s_movk_i32 s1, 0x7fff
        s_movk_i32 s2, 10
        s_addk_i32 s2, 0xffff
        s_movk_i32 s3, 10
        s_mulk_i32 s3, 0xfffd
        s_cmpk_lt_i32 s0, 0xffff
        s_cselect_b32 s4, 1, 0
        s_cmpk_lt_u32 s2, 0xffff
        s_cselect_b32 s5, 1, 0
        """,
    )
    assert [result.scalar(n) for n in range(6)] == [M32 - 1, 0x7FFF, 9, -30 & M32, 1, 1]


def test_bits_are_set_and_cleared() -> None:
    result = execute("gfx942", "s_bitset1_b32 s8, 4\ns_bitset0_b32 s8, 0", scalars={8: 0x81})
    assert result.scalar(8) == 0x90


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("s_add_f32 s8, s10, s12", -0.5),
        ("s_mul_f32 s8, s10, -s12", 3.0),
        ("s_fmac_f32 s8, s10, s12", 97.0),
        ("s_fmaak_f32 s8, s10, s12, 0x40000000", -1.0),
        ("s_max_num_f32 s8, s10, |s12|", 2.0),
        ("s_cvt_f32_i32 s8, 7", 7.0),
        ("s_floor_f32 s8, s10", 1.0),
        ("v_s_rcp_f32 s8, s12", -0.5),
        ("v_s_exp_f32 s8, -s12", 4.0),
        ("v_s_log_f32 s8, |s12|", 1.0),
        ("v_s_sqrt_f32 s8, 4.0", 2.0),
        ("v_s_rsq_f32 s8, 4.0", 0.5),
    ],
)
def test_scalar_floats_of_rdna4(line: str, expected: float) -> None:
    bits = {n: int(np.float32(v).view(np.uint32)) for n, v in ((8, 100.0), (10, 1.5), (12, -2.0))}
    result = execute("gfx1201", line, scalars=bits)
    assert np.uint32(result.scalar(8)).view(np.float32) == expected


def test_scalar_float_comparisons_know_nan() -> None:
    nan = int(np.float32(math.nan).view(np.uint32))
    for name, expected in (("lt", False), ("nlt", True), ("o", False), ("u", True), ("neq", True)):
        assert execute("gfx1201", f"s_cmp_{name}_f32 s8, 1.0", scalars={8: nan}).carry == expected


@pytest.mark.parametrize("name", scalar_alu.LOGIC)
def test_exec_is_saved_and_combined(name: str) -> None:
    before, source = 0xFF00FF00FF00FF00, 0x0F0F0F0F0F0F0F0F
    active = [lane for lane in range(64) if before >> lane & 1]
    result = execute(
        "gfx942",
        f"s_{name}_saveexec_b64 s[8:9], s[10:11]",
        scalars={10: source & M32, 11: source >> 32},
        active=active,
    )
    after, carry = logic(name, 64)(source, before)
    assert (result.wide_scalar(8), result.wide_scalar(126), result.carry) == (before, after, carry)
    assert mask(np.flatnonzero(result.waves.active[0]).tolist()) == after


@pytest.mark.parametrize("architecture", ["gfx942", "gfx1201"])
def test_loads_from_memory(architecture: str) -> None:
    words = np.arange(1, 33, dtype=np.uint32) * 0x01010101
    sizes = {"b32": 1, "b64": 2, "b96": 3, "b128": 4, "b256": 8, "b512": 16}
    if architecture == "gfx942":
        sizes = {"dword": 1, "dwordx2": 2, "dwordx4": 4, "dwordx8": 8, "dwordx16": 16}
    for size, count in sizes.items():
        last = 8 + count - 1
        result = execute(
            architecture,
            f"s_load_{size} s[8:{last}], s[40:41], s6 offset:0x4",
            scalars={6: 8},
            buffers=[words],
        )
        assert [result.scalar(8 + n) for n in range(count)] == words[3 : 3 + count].tolist()


def test_narrow_loads_are_extended() -> None:
    data = np.array([0x80, 0x7F, 0xFE, 0xFF], np.uint8)
    for size, offset, expected in (
        ("u8", 0, 0x80),
        ("i8", 0, 0xFFFFFF80),
        ("u16", 2, 0xFFFE),
        ("i16", 2, 0xFFFFFFFE),
    ):
        result = execute("gfx1201", f"s_load_{size} s8, s[40:41], {offset}", buffers=[data])
        assert result.scalar(8) == expected


def test_a_load_past_the_end_is_caught() -> None:
    with refuses(OutOfBounds, "s_load_dwordx2 of 8 bytes", "buffer 0", "offset is 12"):
        execute("gfx942", "s_load_dwordx2 s[8:9], s[40:41], 0xc", buffers=[np.zeros(16, np.uint8)])


def test_a_trap_stops_the_launch() -> None:
    with refuses(Trap, "assertion", "s_trap 2"):
        execute("gfx942", "s_trap 2")
