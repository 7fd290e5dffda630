"""Values that move between the lanes of a wave."""

from __future__ import annotations

import numpy as np
import pytest

from .emulator_programs import execute, lanes_of, same

LANE = np.arange(64)


def ids(architecture: str = "gfx942") -> np.ndarray:
    """Each lane holds 100 + its number."""
    return (LANE[: lanes_of(architecture)] + 100).astype(np.uint32)


@pytest.mark.parametrize(
    ("control", "source"),
    [
        ("quad_perm:[3,2,1,0]", LANE ^ 3),
        ("row_ror:3", LANE // 16 * 16 + (LANE - 3) % 16),
        ("row_mirror", LANE // 16 * 16 + 15 - LANE % 16),
        ("row_half_mirror", LANE // 8 * 8 + 7 - LANE % 8),
        ("row_newbcast:5", LANE // 16 * 16 + 5),
        ("wave_ror:1", (LANE - 1) % 64),
        ("wave_rol:1", (LANE + 1) % 64),
    ],
)
def test_dpp_controls_in_which_every_lane_has_a_source(control: str, source: np.ndarray) -> None:
    result = execute("gfx942", f"v_mov_b32_dpp v1, v0 {control} bound_ctrl:0", vectors={0: ids()})
    same(result.vector(1), source + 100)


@pytest.mark.parametrize(
    ("control", "source"),
    [
        ("row_shl:2", np.where(LANE % 16 < 14, LANE + 2, -1)),
        ("row_shr:1", np.where(LANE % 16 > 0, LANE - 1, -1)),
        ("row_bcast:15", np.where(LANE >= 16, LANE // 16 * 16 - 1, -1)),
        ("row_bcast:31", np.where(LANE >= 32, 31, -1)),
        ("wave_shr:1", LANE - 1),
        ("wave_shl:1", np.where(LANE < 63, LANE + 1, -1)),
    ],
)
def test_dpp_without_a_source_gives_0_or_leaves_the_lane(control: str, source: np.ndarray) -> None:
    result = execute(
        "gfx942",
        f"v_mov_b32_dpp v1, v0 {control} row_mask:0xf bank_mask:0xf bound_ctrl:0\n"
        f"v_mov_b32_dpp v2, v0 {control} row_mask:0xf bank_mask:0xf",
        vectors={0: ids(), 1: np.uint32(7), 2: np.uint32(7)},
    )
    same(result.vector(1), np.where(source >= 0, source + 100, 0))
    same(result.vector(2), np.where(source >= 0, source + 100, 7))


def test_dpp_of_rdna() -> None:
    result = execute(
        "gfx1100",
        """
        v_mov_b32_dpp v1, v0 row_share:4 row_mask:0xf bank_mask:0xf bound_ctrl:1
        v_mov_b32_dpp v2, v0 row_xmask:5 row_mask:0xf bank_mask:0xf bound_ctrl:1
        v_mov_b32_dpp v3, v0 dpp8:[7,6,5,4,3,2,1,0] bound_ctrl:1
        """,
        vectors={0: ids("gfx1100")},
    )
    lane = LANE[:32]
    same(result.vector(1), lane // 16 * 16 + 104)
    same(result.vector(2), (lane ^ 5) + 100)
    same(result.vector(3), (lane ^ 7) + 100)


def test_dpp_masks_exclude_rows_and_banks() -> None:
    result = execute(
        "gfx942",
        "v_add_u32_dpp v1, v0, v1 row_ror:1 row_mask:0x2 bank_mask:0x9 bound_ctrl:0",
        vectors={0: ids(), 1: np.uint32(1000)},
    )
    written = (LANE // 16 == 1) & np.isin(LANE % 16 // 4, (0, 3))
    same(result.vector(1), np.where(written, 1100 + LANE // 16 * 16 + (LANE - 1) % 16, 1000))


def test_dpp_does_not_read_inactive_lanes() -> None:
    result = execute(
        "gfx942",
        "v_mov_b32_dpp v1, v0 quad_perm:[1,0,3,2] bound_ctrl:0\n"
        "v_mov_b32_dpp v2, v0 quad_perm:[1,0,3,2] bound_ctrl:0 fi:1",
        vectors={0: ids(), 1: np.uint32(7), 2: np.uint32(7)},
        active=[0, 2, 3],
    )
    assert result.vector(1)[:4].tolist() == [0, 7, 103, 102]
    assert result.vector(2)[:4].tolist() == [101, 7, 103, 102]


def test_dpp_in_a_comparison_and_a_select() -> None:
    result = execute(
        "gfx1100",
        "v_cmp_eq_u32_e64_dpp s8, v0, v1 row_mirror row_mask:0xf bank_mask:0xf bound_ctrl:1\n"
        "v_cndmask_b32_e64_dpp v2, v0, v1, s9 row_mirror row_mask:0xf bank_mask:0xf bound_ctrl:1",
        vectors={0: ids("gfx1100"), 1: np.uint32(115)},
        scalars={9: 1},
    )
    assert np.flatnonzero(result.lanes(8)).tolist() == [0]
    assert result.vector(2)[:3].tolist() == [115, 114, 113]


def test_lanes_and_scalars() -> None:
    result = execute(
        "gfx942",
        """
        v_readfirstlane_b32 s8, v0
        v_readlane_b32 s9, v0, 63
        v_readlane_b32 s10, v0, s4
        v_writelane_b32 v1, s4, 9
        """,
        vectors={0: ids(), 1: np.uint32(0)},
        scalars={4: 33},
        active=[5, 6],
    )
    assert [result.scalar(n) for n in (8, 9, 10)] == [105, 163, 133]
    assert np.flatnonzero(result.vector(1)).tolist() == [9]
    assert result.vector(1)[9] == 33


def test_counting_the_bits_below_a_lane() -> None:
    result = execute("gfx942", "v_mbcnt_lo_u32_b32 v1, -1, 0\nv_mbcnt_hi_u32_b32 v1, -1, v1")
    same(result.vector(1), LANE)
    odd = execute("gfx1100", "v_mbcnt_lo_u32_b32 v1, 0xaaaaaaaa, 3")
    same(odd.vector(1), LANE[:32] // 2 + 3)


def test_permutes_within_and_across_rows() -> None:
    reverse = {4: 0x89ABCDEF, 5: 0x01234567}  # lane n reads place 15 - n
    result = execute(
        "gfx1100",
        "v_permlane16_b32 v1, v0, s4, s5\nv_permlanex16_b32 v2, v0, s4, s5\n"
        "v_permlanex16_b32 v3, v0, -1, -1",
        vectors={0: ids("gfx1100")},
        scalars=reverse,
    )
    lane = LANE[:32]
    same(result.vector(1), (lane ^ 15) + 100)
    same(result.vector(2), (lane ^ 31) + 100)
    same(result.vector(3), (lane // 16 ^ 1) * 16 + 115)


def test_swaps_between_registers() -> None:
    a, b = ids(), ids() + np.uint32(100)
    result = execute(
        "gfx950",
        """
        v_permlane32_swap_b32 v0, v1
        v_permlane16_swap_b32 v2, v3
        v_swap_b32 v4, v5
        """,
        vectors={0: a, 1: b, 2: a, 3: b, 4: a, 5: b},
    )
    same(result.vector(0), np.where(LANE < 32, LANE + 100, LANE - 32 + 200))
    same(result.vector(1), np.where(LANE < 32, LANE + 32 + 100, LANE + 200))
    same(result.vector(2), np.where(LANE // 16 % 2 == 0, LANE + 100, LANE - 16 + 200))
    same(result.vector(3), np.where(LANE // 16 % 2 == 0, LANE + 16 + 100, LANE + 200))
    same(result.vector(4), b)
    same(result.vector(5), a)


@pytest.mark.parametrize(
    ("pattern", "source"),
    [
        ("swizzle(SWAP,16)", LANE ^ 16),
        ("swizzle(REVERSE,8)", LANE // 8 * 8 + 7 - LANE % 8),
        ("swizzle(BROADCAST,4,1)", LANE // 4 * 4 + 1),
        ("swizzle(QUAD_PERM,1,0,3,2)", LANE ^ 1),
        # Bits 4 to 0: zero, preserved, one, inverted, preserved.
        ('swizzle(BITMASK_PERM,"0p1ip")', LANE // 32 * 32 + (LANE & 9 | ~LANE & 2 | 4)),
        ("0x8000", LANE // 4 * 4),
        (str(0x1F | 16 << 10), LANE ^ 16),
    ],
)
def test_swizzles(pattern: str, source: np.ndarray) -> None:
    result = execute("gfx942", f"ds_swizzle_b32 v1, v0 offset:{pattern}", vectors={0: ids()})
    same(result.vector(1), source + 100)


def test_pulling_and_pushing_by_address() -> None:
    result = execute(
        "gfx942",
        "ds_bpermute_b32 v2, v1, v0\nds_permute_b32 v3, v1, v0\n"
        "ds_bpermute_b32 v4, v1, v0 offset:4",
        vectors={0: ids(), 1: ((LANE * 7 + 3) % 64 * 4).astype(np.uint32)},
    )
    same(result.vector(2), (LANE * 7 + 3) % 64 + 100)
    pushed = np.zeros(64, np.uint32)
    pushed[(LANE * 7 + 3) % 64] = LANE + 100
    same(result.vector(3), pushed)
    same(result.vector(4), (LANE * 7 + 4) % 64 + 100)


def test_pulling_from_inactive_lanes_gives_0() -> None:
    result = execute(
        "gfx942",
        "ds_bpermute_b32 v2, v1, v0",
        vectors={0: ids(), 1: ((LANE ^ 1) * 4).astype(np.uint32), 2: np.uint32(7)},
        active=[0, 2, 3],
    )
    assert result.vector(2)[:4].tolist() == [0, 7, 103, 102]
