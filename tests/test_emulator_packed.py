"""Packed and mixed-precision arithmetic, and three-input logic."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from nsa_port.emulator import packed

from .emulator_programs import execute, same

HALVES: dict[str, Callable[..., np.ndarray]] = {
    "pk_add": np.add,
    "pk_sub": np.subtract,
    "pk_mul": np.multiply,
    "pk_mul_lo": np.multiply,
    "pk_max": np.maximum,
    "pk_min": np.minimum,
    "pk_max_num": np.maximum,
    "pk_min_num": np.minimum,
    "pk_maximum": np.maximum,
    "pk_minimum": np.minimum,
    "pk_lshlrev": lambda a, b: b << (a % 16),
    "pk_lshrrev": lambda a, b: b >> (a % 16),
    "pk_ashrrev": lambda a, b: b >> (a % 16),
    "pk_fma": lambda a, b, c: a * b + c,
    "pk_mad": lambda a, b, c: a * b + c,
}
DTYPES = {"f16": np.float16, "u16": np.uint16, "b16": np.uint16, "i16": np.int16}


def operands(kind: str, count: int) -> list[np.ndarray]:
    """[64, 2] values: small integers over two, so that sums and products are exact."""
    random = np.random.default_rng(0)
    if kind in ("f16", "bf16"):
        return [random.integers(-8, 8, (64, 2)).astype(np.float32) / 2 for _ in range(count)]
    return [random.integers(0, 2**16, (64, 2)).astype(np.uint16).view(DTYPES[kind])] * count


def registers(values: np.ndarray, kind: str) -> np.ndarray:
    """[64, 2] numbers -> uint32 [64]."""
    if kind == "bf16":
        bits = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    else:
        bits = values.astype(DTYPES[kind]).view(np.uint16)
    return np.ascontiguousarray(bits).view(np.uint32)[:, 0]


@pytest.mark.parametrize("name", [name for name in packed.OPERATIONS if "f32" not in name])
def test_both_halves_of_a_register(name: str) -> None:
    short, _, kind = name.rpartition("_")
    count = len(packed.OPERATIONS[name].sources)
    values = operands(kind, count)
    sources = ", ".join(f"v{n}" for n in range(count))
    swapped = f"op_sel:[1{',0' * (count - 1)}] op_sel_hi:[0{',1' * (count - 1)}]"
    result = execute(
        "gfx942",
        f"v_{name} v4, {sources}\nv_{name} v5, {sources} {swapped}",
        vectors={n: registers(value, kind) for n, value in enumerate(values)},
    )
    same(result.vector(4), registers(HALVES[short](*values), kind))
    values[0] = values[0][:, ::-1]
    same(result.vector(5), registers(HALVES[short](*values), kind))


def test_signs_and_constants_of_packed_halves() -> None:
    result = execute(
        "gfx942",
        """
        v_pk_add_f16 v1, v0, 1.0 op_sel_hi:[1,0] neg_lo:[1,0] neg_hi:[0,1]
        v_pk_add_f16 v2, v0, 0x40003c00
        v_pk_add_u16 v3, v0, 2 op_sel_hi:[1,0]
        """,
        vectors={0: np.uint32(0x42004000)},  # 3.0 above 2.0
    )
    assert [int(result.vector(n)[0]) for n in (1, 2, 3)] == [0x4000BC00, 0x45004200, 0x42024002]


def test_pairs_of_registers() -> None:
    values = np.arange(6, dtype=np.float32) + 0.5
    vectors = {n: value for n, value in enumerate(values)}
    result = execute(
        "gfx942",
        """
        v_pk_add_f32 v[6:7], v[0:1], v[2:3]
        v_pk_mul_f32 v[8:9], v[0:1], v[2:3] op_sel:[1,0] op_sel_hi:[0,1]
        v_pk_fma_f32 v[10:11], v[0:1], v[2:3], v[4:5] neg_lo:[0,0,1] neg_hi:[1,0,0]
        v_pk_mov_b32 v[12:13], v[0:1], v[4:5] op_sel:[1,0]
        v_pk_mul_f32 v[14:15], v[0:1], s[8:9] op_sel_hi:[1,0]
        """,
        vectors=vectors,
        scalars={8: 0x40000000, 9: 0},
    )
    a, b, c, d, e, f = values
    expected = [a + c, b + d, b * c, a * d, a * c - e, -b * d + f, b, e, 2 * a, 2 * b]
    assert [result.vector(6 + n, np.float32)[0] for n in range(10)] == expected


def test_mixed_precision() -> None:
    half = np.uint32(0x42004000)  # 3.0 above 2.0
    result = execute(
        "gfx942",
        """
        v_fma_mix_f32 v3, v0, v1, -v1 op_sel:[1,0,0] op_sel_hi:[1,0,0]
        v_fma_mixlo_f16 v4, v0, v0, v1 op_sel:[1,0,0] op_sel_hi:[1,1,0]
        v_fma_mixhi_f16 v4, v1, v1, v1
        """,
        vectors={0: half, 1: np.float32(0.5), 4: np.uint32(0)},
    )
    assert result.vector(3, np.float32)[0] == 1.0
    assert result.vector(4)[0] == 0x3A004680  # 0.75 above 6.5


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_dots_of_two(kind: str) -> None:
    a, b = operands(kind, 2)
    vectors = {0: registers(a, kind), 1: registers(b, kind), 2: np.float32(10), 3: np.float32(3)}
    result = execute(
        "gfx950",
        f"v_dot2_f32_{kind} v4, v0, v1, v2\nv_dot2c_f32_{kind} v3, v0, v1",
        vectors=vectors,
    )
    same(result.vector(4, np.float32), (a * b).sum(1) + 10)
    same(result.vector(3, np.float32), (a * b).sum(1) + 3)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_dots_of_two_are_issued_together_with_others(kind: str) -> None:
    a, b = operands(kind, 2)
    result = execute(
        "gfx1100",
        f"v_dual_mov_b32 v0, 0 :: v_dual_dot2acc_f32_{kind} v3, v0, v1",
        vectors={0: registers(a, kind)[:32], 1: registers(b, kind)[:32], 3: np.float32(3)},
    )
    same(result.vector(3, np.float32), (a * b).sum(1)[:32] + 3)


@pytest.mark.parametrize("table", [0x00, 0x80, 0xE8, 0x96, 0xCA, 0xFF])
def test_any_function_of_three_bits(table: int) -> None:
    a, b, c = np.random.default_rng(1).integers(0, 2**32, (3, 64), np.uint32)
    result = execute(
        "gfx950",
        f"v_bitop3_b32 v3, v0, v1, v2 bitop3:{table:#x}\n"
        f"v_bitop3_b16 v4, v0, v1, v2 bitop3:{table}",
        vectors={0: a, 1: b, 2: c, 4: np.uint32(0)},
    )
    expected = np.zeros(64, np.uint32)
    for bit in range(32):
        index = (a >> bit & 1) * 4 + (b >> bit & 1) * 2 + (c >> bit & 1)
        expected |= ((table >> index) & 1).astype(np.uint32) << np.uint32(bit)
    same(result.vector(3), expected)
    same(result.vector(4) & 0xFFFF, expected & 0xFFFF)
