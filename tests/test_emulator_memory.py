"""Loads and stores: global, flat, buffer, scratch and LDS, their widths and their bounds."""

from __future__ import annotations

import numpy as np
import pytest

from nsa_port.emulator.errors import EmulatorError, OutOfBounds
from nsa_port.emulator.memory import GlobalMemory
from nsa_port.emulator.registers import GARBAGE

from .emulator_programs import execute, lanes_of, refuses, same

LANE = np.arange(64)
WORDS = np.arange(64 * 4 + 8, dtype=np.uint32) + 1000
OLD_WIDTHS = {"dword": 1, "dwordx2": 2, "dwordx3": 3, "dwordx4": 4}
NEW_WIDTHS = {"b32": 1, "b64": 2, "b96": 3, "b128": 4}


def registers(first: int, count: int) -> str:
    return f"v{first}" if count == 1 else f"v[{first}:{first + count - 1}]"


def descriptor(records: int) -> str:
    """s[8:11] describes the first buffer, with so many bytes."""
    return f"s_mov_b32 s8, s40\ns_mov_b32 s9, s41\ns_mov_b32 s10, {records}\ns_mov_b32 s11, 0\n"


def offsets(scale: int) -> np.ndarray:
    return (LANE * scale).astype(np.uint32)


@pytest.mark.parametrize(
    ("architecture", "widths"), [("gfx942", OLD_WIDTHS), ("gfx1100", NEW_WIDTHS)]
)
@pytest.mark.parametrize("segment", ["global", "flat", "buffer"])
def test_words_go_both_ways(architecture: str, widths: dict[str, int], segment: str) -> None:
    lanes = lanes_of(architecture)
    for width, count in widths.items():
        vectors = {0: offsets(4 * count)[:lanes]}
        load, store = registers(10, count), registers(10, count)
        if segment == "buffer":
            body = descriptor(10000) + (
                f"buffer_load_{width} {load}, v0, s[8:11], 0 offen offset:8\n"
                "s_mov_b32 s8, s42\ns_mov_b32 s9, s43\n"
                f"buffer_store_{width} {store}, v0, s[8:11], 0 offen"
            )
        elif segment == "global":
            body = (
                f"global_load_{width} {load}, v0, s[40:41] offset:8\n"
                f"global_store_{width} v0, {store}, s[42:43]"
            )
        else:
            body = (
                "v_mov_b32 v2, s40\nv_mov_b32 v3, s41\nv_mov_b32 v4, s42\nv_mov_b32 v5, s43\n"
                "v_lshl_add_u64 v[2:3], v[0:1], 0, v[2:3]\n"
                "v_lshl_add_u64 v[4:5], v[0:1], 0, v[4:5]\n"
                f"flat_load_{width} {load}, v[2:3] offset:8\n"
                f"flat_store_{width} v[4:5], {store}"
            )
            vectors[1] = np.zeros(lanes, np.uint32)
        out = np.zeros(lanes * count, np.uint32)
        result = execute(architecture, body, vectors=vectors, buffers=[WORDS, out])
        same(result.buffer(1, np.uint32), WORDS[2 : 2 + lanes * count])


def test_narrow_loads() -> None:
    data = np.random.default_rng(0).integers(0, 256, 300, np.uint8)
    wide = data.astype(np.uint32)
    pair = wide[:-1] | wide[1:] << 8
    old = np.uint32(0x11112222)
    byte, short = wide[LANE], pair[LANE * 2]
    signed_byte = data.view(np.int8)[LANE].astype(np.int32).view(np.uint32)
    signed_short = short.astype(np.uint16).view(np.int16).astype(np.int32).view(np.uint32)
    low = 0x11110000
    cases = [
        ("gfx942", "ubyte", byte),
        ("gfx942", "sbyte", signed_byte),
        ("gfx942", "ubyte_d16", byte | low),
        ("gfx942", "sbyte_d16_hi", signed_byte << 16 | 0x2222),
        ("gfx1100", "u8", byte),
        ("gfx1100", "i8", signed_byte),
        ("gfx1100", "d16_u8", byte | low),
        ("gfx1100", "d16_hi_i8", signed_byte << 16 | 0x2222),
        ("gfx942", "ushort", short),
        ("gfx942", "sshort", signed_short),
        ("gfx942", "short_d16", short | low),
        ("gfx942", "short_d16_hi", short << 16 | 0x2222),
        ("gfx1100", "u16", short),
        ("gfx1100", "i16", signed_short),
        ("gfx1100", "d16_b16", short | low),
        ("gfx1100", "d16_hi_b16", short << 16 | 0x2222),
    ]
    for architecture, width, expected in cases:
        scale = 2 if "16" in width.replace("d16", "") or "short" in width else 1
        lanes = lanes_of(architecture)
        result = execute(
            architecture,
            f"global_load_{width} v1, v0, s[40:41]",
            vectors={0: offsets(scale)[:lanes], 1: old},
            buffers=[data],
        )
        same(result.vector(1), expected[:lanes].astype(np.uint32))


def test_narrow_stores() -> None:
    for architecture, width, size, shift in (
        *(("gfx942", "byte", 1, 0), ("gfx942", "byte_d16_hi", 1, 16)),
        *(("gfx942", "short", 2, 0), ("gfx942", "short_d16_hi", 2, 16)),
        *(("gfx1100", "b8", 1, 0), ("gfx1100", "d16_hi_b8", 1, 16)),
        *(("gfx1100", "b16", 2, 0), ("gfx1100", "d16_hi_b16", 2, 16)),
    ):
        lanes = lanes_of(architecture)
        values = np.random.default_rng(1).integers(0, 2**32, lanes, np.uint32)
        result = execute(
            architecture,
            f"global_store_{width} v0, v1, s[40:41] offset:2",
            vectors={0: offsets(size)[:lanes], 1: values},
            buffers=[np.zeros(lanes * size + 2, np.uint8)],
        )
        dtype = np.uint8 if size == 1 else np.uint16
        same(result.buffer(0, np.uint8)[2:].view(dtype), (values >> shift).astype(dtype))


def test_unaligned_words_are_allowed() -> None:
    data = np.arange(80, dtype=np.uint8)
    result = execute(
        "gfx942",
        "global_load_dwordx2 v[2:3], v0, s[40:41] offset:1\nglobal_store_dword v0, v2, s[42:43]",
        vectors={0: np.uint32(2)},
        buffers=[data, np.zeros(16, np.uint8)],
        active=[0],
    )
    assert result.wide_vector(2)[0] == data[3:11].copy().view(np.uint64)[0]
    assert result.buffer(1, np.uint8)[2:6].tolist() == [3, 4, 5, 6]


def test_inactive_lanes_neither_load_nor_store() -> None:
    result = execute(
        "gfx942",
        "global_load_dword v1, v0, s[40:41]\nglobal_store_dword v0, v1, s[42:43]",
        vectors={0: np.where(LANE < 4, LANE * 4, 2**31).astype(np.uint32), 1: np.uint32(7)},
        buffers=[WORDS, np.zeros(4, np.uint32)],
        active=[0, 2],
    )
    assert result.vector(1)[:4].tolist() == [1000, 7, 1002, 7]
    assert result.buffer(1, np.uint32).tolist() == [1000, 0, 1002, 0]


def test_inactive_lanes_do_nothing_through_a_descriptor() -> None:
    result = execute(
        "gfx942",
        descriptor(64)
        + "buffer_load_dword v2, v0, s[8:11], 0 offen\n"
        + "buffer_store_dword v4, v0, s[8:11], 0 offen",
        vectors={0: offsets(4), 2: np.uint32(7), 4: np.uint32(9)},
        buffers=[np.arange(1, 17, dtype=np.uint32)],
        active=[0, 2],
    )
    assert result.vector(2)[:4].tolist() == [1, 7, 3, 7]
    assert result.buffer(0, np.uint32)[:4].tolist() == [9, 2, 9, 4]


def test_a_descriptor_ends_where_it_says() -> None:
    """Beyond its last byte loads give 0 and stores do nothing, as compilers rely on for masks."""
    result = execute(
        "gfx942",
        descriptor(32)
        + "buffer_load_dwordx2 v[2:3], v0, s[8:11], 0 offen\n"
        + "buffer_store_dword v4, v0, s[8:11], 0 offen offset:4",
        vectors={
            0: np.where(LANE < 5, LANE * 8, -(2**31)).astype(np.uint32),
            4: np.uint32(9),
        },
        buffers=[np.arange(1, 13, dtype=np.uint32)],
    )
    assert result.vector(2)[:6].tolist() == [1, 3, 5, 7, 0, 0]
    assert result.buffer(0, np.uint32).tolist() == [1, 9, 3, 9, 5, 9, 7, 9, 9, 10, 11, 12]


def test_out_of_bounds_names_instruction_lane_address_and_buffer() -> None:
    with refuses(
        OutOfBounds,
        "global_load_dwordx4 of 16 bytes",
        "by lane 63",
        "1 lanes in all",
        "'buffer 0', 1020 bytes",
        "offset is 1008",
        r"in `global_load_dwordx4 v\[4:7\], v0, s\[40:41\]`",
        "workgroup 0",
    ):
        execute(
            "gfx942",
            "global_load_dwordx4 v[4:7], v0, s[40:41]",
            vectors={0: offsets(16)},
            buffers=[np.zeros(255, np.uint32)],
        )


@pytest.mark.parametrize("offset", [-4, 64, 4096, 2**20, 2**31, 2**34, 2**34 + 8, 2**40])
def test_no_offset_reaches_another_buffer(offset: int) -> None:
    base = np.array(offset, np.int64).view(np.uint64)
    with refuses(OutOfBounds, "global_store_dword"):
        execute(
            "gfx942",
            "v_mov_b32 v2, s40\nv_mov_b32 v3, s41\nv_lshl_add_u64 v[2:3], v[0:1], 0, v[2:3]\n"
            "global_store_dword v[2:3], v4, off",
            vectors={0: base},
            buffers=[np.zeros(16, np.uint32)] + ([] if offset >= 2**34 else [WORDS]),
            active=[0],
        )


def test_null_is_out_of_bounds() -> None:
    with refuses(OutOfBounds, "at 0x0"):
        execute("gfx942", "global_load_dword v1, v[2:3], off", vectors={2: np.uint64(0)})


@pytest.mark.parametrize("architecture", ["gfx942", "gfx1100"])
def test_scratch_belongs_to_each_lane(architecture: str) -> None:
    names = ("dwordx2", "dword") if architecture == "gfx942" else ("b64", "b32")
    lanes = lanes_of(architecture)
    result = execute(
        architecture,
        f"""
        scratch_store_{names[0]} off, v[0:1], off offset:8
        scratch_store_{names[1]} v2, v0, s4
        scratch_load_{names[1]} v3, off, off offset:12
        scratch_load_{names[0]} v[4:5], v2, s4
        """,
        vectors={0: (LANE[:lanes] + 2**33).astype(np.uint64), 2: np.uint32(16)},
        scalars={4: 4},
        scratch_bytes=32,
    )
    same(result.vector(3), np.full(lanes, 2))
    same(result.vector(4), LANE[:lanes])
    same(result.vector(5), np.full(lanes, GARBAGE))
    with refuses(OutOfBounds, "scratch offset 32 of 32"):
        execute(architecture, f"scratch_load_{names[1]} v0, off, off offset:32", scratch_bytes=32)


def test_scratch_through_a_descriptor() -> None:
    result = execute(
        "gfx90a",
        "buffer_store_dword v0, off, s[0:3], 0 offset:4\n"
        "buffer_store_dword v1, off, s[0:3], s4\n"
        "buffer_load_dword v2, off, s[0:3], 0 offset:4\nbuffer_load_dword v3, v5, s[0:3], 0 offen",
        vectors={0: offsets(1), 1: offsets(2), 5: np.uint32(8)},
        scalars={0: 0, 1: 0x5C5C, 2: 0xFFFFFFFF, 3: 0, 4: 8 * 64},
        scratch_bytes=16,
    )
    same(result.vector(2), LANE)
    same(result.vector(3), LANE * 2)


# ------------------------------------------------------------------------------------------- LDS
@pytest.mark.parametrize(
    ("architecture", "read", "write"), [("gfx942", "read", "write"), ("gfx1100", "load", "store")]
)
def test_lds_words(architecture: str, read: str, write: str) -> None:
    lanes = lanes_of(architecture)
    for width, count in NEW_WIDTHS.items():
        result = execute(
            architecture,
            f"ds_{read}_{width} {registers(2, count)}, v0 offset:8\n"
            f"ds_{write}_{width} v0, {registers(2, count)}",
            vectors={0: offsets(4 * count)[:lanes]},
            lds=WORDS,
        )
        same(result.vector(1 + count), WORDS[LANE[:lanes] * count + 1 + count])
        same(result.lds()[: lanes * count], WORDS[2 : 2 + lanes * count])


def test_lds_narrow() -> None:
    data = np.random.default_rng(2).integers(0, 256, 256, np.uint8)
    result = execute(
        "gfx942",
        """
        ds_read_u8 v1, v0
        ds_read_i8 v2, v0
        ds_read_u16 v3, v0 offset:1
        ds_read_i16 v4, v0
        ds_read_u16_d16 v5, v0
        ds_read_u16_d16_hi v5, v0 offset:2
        ds_write_b8 v0, v6 offset:128
        ds_write_b16_d16_hi v7, v6 offset:200
        ds_write_b8_d16_hi v7, v6 offset:210
        """,
        vectors={0: offsets(1), 5: np.uint32(0), 6: np.uint32(0xAABBCCDD), 7: np.uint32(0)},
        lds=data,
    )
    wide = data.astype(np.uint32)
    short = wide[LANE] | wide[LANE + 1] << 8
    same(result.vector(1), wide[LANE])
    same(result.vector(2, np.int32), data.view(np.int8)[LANE].astype(np.int32))
    same(result.vector(3), wide[LANE + 1] | wide[LANE + 2] << 8)
    same(result.vector(4, np.int32), short.astype(np.uint16).view(np.int16).astype(np.int32))
    same(result.vector(5), short | (wide[LANE + 2] | wide[LANE + 3] << 8) << 16)
    lds = result.lds(np.uint8)
    assert (lds[128:192] == 0xDD).all()
    assert lds[[200, 201, 210]].tolist() == [0xBB, 0xAA, 0xBB]


@pytest.mark.parametrize(
    ("architecture", "read", "write", "stride"),
    [("gfx942", "read2", "write2", "st64"), ("gfx1100", "load_2addr", "store_2addr", "_stride64")],
)
def test_lds_with_two_addresses(architecture: str, read: str, write: str, stride: str) -> None:
    words = np.arange(1024, dtype=np.uint32)
    result = execute(
        architecture,
        f"""
        ds_{read}_b32 v[2:3], v0 offset0:1 offset1:5
        ds_{read}{stride}_b32 v[4:5], v0 offset0:1 offset1:2
        ds_{read}_b64 v[6:9], v1 offset0:2 offset1:4
        ds_{write}_b64 v1, v[6:7], v[8:9] offset0:10 offset1:20
        ds_{write}{stride}_b32 v1, v2, v3 offset0:4 offset1:8
        """,
        vectors={0: np.uint32(8), 1: np.uint32(16)},
        lds=words,
    )
    found = [int(result.vector(n)[0]) for n in range(2, 10)]
    assert found == [3, 7, 66, 130, 8, 9, 12, 13]
    lds = result.lds()
    assert [int(lds[n]) for n in (24, 25, 44, 45)] == [8, 9, 12, 13]
    assert [int(lds[4 + n * 64]) for n in (4, 8)] == [3, 7]


@pytest.mark.parametrize(("form", "dtype"), [("b16", np.uint16), ("b8", np.uint8)])
def test_transposed_lds_reads(form: str, dtype: type) -> None:
    """16 lanes read a tile of 16 rows of 8 bytes; lane n gets 8 bytes of the tile by columns."""
    size = np.dtype(dtype).itemsize
    rows = np.random.default_rng(3).integers(0, 256, (64, 8), np.uint8)
    result = execute(
        "gfx950", f"ds_read_b64_tr_{form} v[2:3], v0", vectors={0: offsets(8)}, lds=rows.reshape(-1)
    )
    per_lane = 8 // size
    found: np.ndarray = result.wide_vector(2).view(dtype).reshape(64, per_lane)
    tiles: np.ndarray = rows.reshape(4, 16, 8).view(dtype)  # [group, row, column]
    for lane in range(64):
        tile, place = tiles[lane // 16], lane % 16
        expected = [
            tile[place // per_lane + 16 // per_lane * n, place % per_lane] for n in range(per_lane)
        ]
        assert found[lane].tolist() == expected


def test_lds_bounds_are_those_of_the_workgroup() -> None:
    with refuses(OutOfBounds, "ds_read_b64 of 8 bytes at LDS address 1052", "lane 63", "1056"):
        execute("gfx942", "ds_read_b64 v[2:3], v0 offset:44", vectors={0: offsets(16)}, lds=WORDS)


def test_lds_starts_as_garbage() -> None:
    result = execute("gfx942", "s_nop 0", lds=np.zeros(8, np.uint8))
    assert np.isnan(np.uint32(GARBAGE).view(np.float32))
    assert result.waves.lds.view(np.uint32)[2] == GARBAGE


@pytest.mark.parametrize("form", ["global_load_lds_dwordx4", "buffer_load_dword"])
def test_loads_straight_into_the_lds(form: str) -> None:
    count = 4 if "x4" in form else 1
    if count == 4:
        body = "global_load_lds_dwordx4 v0, s[40:41] offset:16"
    else:
        body = descriptor(4 * 60) + "buffer_load_dword v0, s[8:11], 0 offen offset:16 lds"
    result = execute(
        "gfx950",
        "s_mov_b32 m0, 32\n" + body,
        vectors={0: offsets(4 * count)},
        buffers=[WORDS],
        lds=np.zeros(2048, np.uint8),
    )
    moved = result.lds()[12 : 12 + 64 * count]
    expected = WORDS[4 : 4 + 64 * count].copy()
    if count == 1:
        expected[56:] = 0  # past the descriptor's end
    same(moved, expected)


def test_a_memory_tells_what_was_written() -> None:
    result = execute(
        "gfx942",
        "global_load_dword v1, v0, s[40:41]\nglobal_store_dword v0, v1, s[44:45]",
        vectors={0: np.uint32(0)},
        buffers=[WORDS, WORDS, WORDS],
    )
    assert [result.memory.was_written(address) for address in result.addresses] == [
        False,
        False,
        True,
    ]


def test_a_buffer_beyond_8_gib_is_refused() -> None:
    huge = np.broadcast_to(np.zeros(1, np.uint8), (2**33,))
    with pytest.raises(EmulatorError, match="at most 8 GiB"):
        GlobalMemory().add(huge, "huge")
