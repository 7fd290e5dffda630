"""Matrix instructions against numpy, with every element placed by the documented layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nsa_port.emulator.errors import UnknownInstruction

from .emulator_programs import execute, lanes_of, refuses, same

DTYPES = {
    "f32": torch.float32,
    "xf32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i8": torch.int8,
    "u8": torch.uint8,
}
# (architecture, name, rows, columns, depth, input, result)
CDNA = [
    ("gfx90a", "v_mfma_f32_32x32x8f16", 32, 8, "f16"),
    ("gfx90a", "v_mfma_f32_16x16x16f16", 16, 16, "f16"),
    ("gfx90a", "v_mfma_f32_32x32x8bf16_1k", 32, 8, "bf16"),
    ("gfx90a", "v_mfma_f32_16x16x16bf16_1k", 16, 16, "bf16"),
    ("gfx90a", "v_mfma_f32_32x32x2f32", 32, 2, "f32"),
    ("gfx90a", "v_mfma_f32_16x16x4f32", 16, 4, "f32"),
    ("gfx942", "v_mfma_f32_32x32x8_f16", 32, 8, "f16"),
    ("gfx942", "v_mfma_f32_16x16x16_bf16", 16, 16, "bf16"),
    ("gfx942", "v_mfma_f32_16x16x4_f32", 16, 4, "f32"),
    ("gfx942", "v_mfma_f32_16x16x32_fp8_fp8", 16, 32, "fp8"),
    ("gfx942", "v_mfma_f32_32x32x16_bf8_fp8", 32, 16, "bf8"),
    ("gfx942", "v_mfma_i32_16x16x32_i8", 16, 32, "i8"),
    ("gfx950", "v_mfma_f32_16x16x32_f16", 16, 32, "f16"),
    ("gfx950", "v_mfma_f32_32x32x16_bf16", 32, 16, "bf16"),
    ("gfx950", "v_mfma_f32_16x16x128_f8f6f4", 16, 128, "fp8"),
]
RDNA = [
    ("gfx1100", "v_wmma_f32_16x16x16_f16", "f16", "f32"),
    ("gfx1100", "v_wmma_f32_16x16x16_bf16", "bf16", "f32"),
    ("gfx1100", "v_wmma_i32_16x16x16_iu8", "i8", "i32"),
    ("gfx1100", "v_wmma_i32_16x16x16_iu8", "u8", "i32"),
    ("gfx1201", "v_wmma_f32_16x16x16_f16", "f16", "f32"),
    ("gfx1201", "v_wmma_f32_16x16x16_bf16", "bf16", "f32"),
    ("gfx1201", "v_wmma_f32_16x16x16_fp8_fp8", "fp8", "f32"),
    ("gfx1201", "v_wmma_i32_16x16x16_iu8", "i8", "i32"),
]


def torch_dtype(form: str, architecture: str) -> torch.dtype:
    if form == "fp8":
        return torch.float8_e4m3fnuz if architecture == "gfx942" else torch.float8_e4m3fn
    if form == "bf8":
        return torch.float8_e5m2fnuz if architecture == "gfx942" else torch.float8_e5m2
    return DTYPES[form]


def small_numbers(rows: int, depth: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Small integers, which every format holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    least = 0 if dtype == torch.uint8 else -4
    return torch.randint(least, 5, (rows, depth), generator=generator).to(dtype)


def place(matrix: torch.Tensor, lanes: int, repeated: bool) -> dict[int, np.ndarray]:
    """A or B in registers: lane l holds row l % rows, its group l // rows consecutive depths."""
    rows, depth = matrix.shape
    groups = 1 if repeated else lanes // rows
    share = depth // groups
    raw = matrix.contiguous().view(torch.uint8).numpy().reshape(rows, -1)
    size = raw.shape[1] // depth
    per_lane = np.stack(
        [
            raw[lane % rows, (lane // rows % groups) * share * size :][: share * size]
            for lane in range(lanes)
        ]
    )
    words = np.ascontiguousarray(per_lane).view(np.uint32)
    return {register: words[:, register] for register in range(words.shape[1])}


def operand(first: int, count: int) -> str:
    return f"v{first}" if count == 1 else f"v[{first}:{first + count - 1}]"


def row_of(slot: int, lane: int, rows: int, architecture: str) -> int:
    """Which row of the result a slot of a lane holds."""
    if rows == 32:
        return 8 * (slot // 4) + 4 * (lane // 32) + slot % 4
    group = lane // 16
    return {"gfx1100": 2 * slot + group, "gfx1201": 8 * group + slot}.get(
        architecture, 4 * group + slot
    )


def multiply(
    architecture: str,
    name: str,
    rows: int,
    a: torch.Tensor,
    b: torch.Tensor,
    result: str,
    extra: str,
) -> tuple[np.ndarray, np.ndarray]:
    """(what the instruction gives, A B^T + C), both [slot, lane]."""
    lanes = lanes_of(architecture)
    repeated = architecture == "gfx1100"
    left, right = place(a, lanes, repeated), place(b, lanes, repeated)
    slots = rows * rows // lanes
    dtype = np.int32 if result == "i32" else np.float32
    addend = np.random.default_rng(9).integers(-9, 9, (rows, rows)).astype(dtype)
    where = [
        [row_of(slot, lane, rows, architecture) for lane in range(lanes)] for slot in range(slots)
    ]
    column = np.arange(lanes) % rows
    vectors = {20 + n: value for n, value in left.items()}
    vectors |= {60 + n: value for n, value in right.items()}
    vectors |= {100 + slot: addend[where[slot], column] for slot in range(slots)}
    operands = [operand(100, slots), operand(20, len(left)), operand(60, len(right))]
    ran = execute(
        architecture,
        f"{name} {', '.join([*operands, operand(100, slots)])} {extra}",
        vectors=vectors,
    )
    product = a.double().numpy() @ b.double().numpy().T + addend
    found = np.stack([ran.vector(100 + slot, dtype) for slot in range(slots)])
    return found, np.stack([product[where[slot], column] for slot in range(slots)])


@pytest.mark.parametrize(("architecture", "name", "rows", "depth", "form"), CDNA)
def test_mfma(architecture: str, name: str, rows: int, depth: int, form: str) -> None:
    left, right = form, "fp8" if "bf8_fp8" in name else form
    a = small_numbers(rows, depth, torch_dtype(left, architecture), 1)
    b = small_numbers(rows, depth, torch_dtype(right, architecture), 2)
    found, expected = multiply(architecture, name, rows, a, b, name.split("_")[2], "")
    same(found, expected)


@pytest.mark.parametrize(("architecture", "name", "form", "result"), RDNA)
def test_wmma(architecture: str, name: str, form: str, result: str) -> None:
    dtype = torch_dtype(form, architecture)
    a, b = small_numbers(16, 16, dtype, 3), small_numbers(16, 16, dtype, 4)
    if form == "u8":
        a = a + 250
    signs = "neg_lo:[1,1,0]" if form == "i8" else ""
    found, expected = multiply(architecture, name, 16, a, b, result, signs)
    same(found, expected)


def test_sixteen_small_matrices() -> None:
    a, b = (torch.randint(-4, 5, (16, 4, 4)).half() for _ in range(2))
    words = [m.view(torch.int16).numpy().reshape(64, 4).view(np.uint32) for m in (a, b)]
    vectors = {n: words[0][:, n] for n in (0, 1)} | {2 + n: words[1][:, n] for n in (0, 1)}
    result = execute(
        "gfx942", "v_mfma_f32_4x4x4_16b_f16 v[4:7], v[0:1], v[2:3], 1.0", vectors=vectors
    )
    found = np.stack([result.vector(4 + row, np.float32) for row in range(4)])
    product = np.einsum("brk,bck->brc", a.float().numpy(), b.float().numpy()) + 1
    same(found, product.transpose(1, 0, 2).reshape(4, 64))


def test_xf32_keeps_10_bits_of_mantissa() -> None:
    a = torch.full((16, 8), 1 + 2.0**-11 + 2.0**-13)
    b = torch.ones(16, 8)
    found, _ = multiply("gfx942", "v_mfma_f32_16x16x8_xf32", 16, a, b, "f32", "")
    _, addend = multiply("gfx942", "v_mfma_f32_16x16x8_xf32", 16, a * 0, b, "f32", "")
    same(found, addend + 8 * (1 + 2.0**-10))


@pytest.mark.parametrize(("architecture", "kept"), [("gfx90a", 0.0), ("gfx942", 2.0**-20)])
def test_mi200_takes_subnormal_halves_for_zero(architecture: str, kept: float) -> None:
    name = "v_mfma_f32_16x16x16" + ("f16" if architecture == "gfx90a" else "_f16")
    a, b = torch.zeros(16, 16).half(), torch.ones(16, 16).half()
    a[:, 0] = 2.0**-20
    vectors = {n: value for n, value in place(a, 64, False).items()}
    vectors |= {2 + n: value for n, value in place(b, 64, False).items()}
    result = execute(architecture, f"{name} v[4:7], v[0:1], v[2:3], 0", vectors=vectors)
    assert (result.vector(4, np.float32) == kept).all()


@pytest.mark.parametrize(("architecture", "kept"), [("gfx90a", 0.0), ("gfx942", 2.0**-130)])
def test_mi200_makes_subnormal_results_zero(architecture: str, kept: float) -> None:
    name = "v_mfma_f32_16x16x16" + ("bf16_1k" if architecture == "gfx90a" else "_bf16")
    a = torch.zeros(16, 16).bfloat16()
    a[:, 0] = 2.0**-65
    vectors = {
        n: value for half in (0, 2) for n, value in enumerate(place(a, 64, False).values(), half)
    }
    result = execute(architecture, f"{name} v[4:7], v[0:1], v[2:3], 0", vectors=vectors)
    assert (result.vector(4, np.float32) == np.float32(kept)).all()


def test_the_lanes_of_a_matrix_instruction_are_always_active() -> None:
    ones = {n: np.uint32(0x3C003C00) for n in range(4)}
    result = execute(
        "gfx942", "v_mfma_f32_16x16x16_f16 v[4:7], v[0:1], v[2:3], 0", vectors=ones, active=[3]
    )
    assert (result.vector(4, np.float32) == 16).all()


def test_accumulation_registers_are_apart() -> None:
    ones = {n: np.uint32(0x3C003C00) for n in range(4)}
    result = execute(
        "gfx90a",
        "v_mfma_f32_16x16x16f16 a[0:3], v[0:1], v[2:3], 0\nv_accvgpr_read_b32 v9, a2",
        vectors=ones,
    )
    assert (result.vector(9, np.float32) == 16).all()
    assert result.vector(0)[0] == 0x3C003C00


@pytest.mark.parametrize(
    "line",
    [
        "v_mfma_f32_16x16x16_f16 v[4:7], v[0:1], v[2:3], 0 cbsz:1",
        "v_mfma_f32_16x16x4_4b_f32 v[4:7], v0, v1, 0",
        "v_mfma_f64_16x16x4_f64 v[4:11], v[0:1], v[2:3], 0",
    ],
)
def test_what_is_not_modelled_is_refused(line: str) -> None:
    with refuses(UnknownInstruction, "INPUT_BYTES in nsa_port/emulator/matrix.py"):
        execute("gfx942", line, vectors={n: np.uint32(0) for n in range(12)})
