"""Running programs: divergence, barriers, workgroups, limits, races, counts and refusals."""

from __future__ import annotations

import struct
import subprocess
import sys

import numpy as np
import pytest

from nsa_port.emulator.counters import Traffic
from nsa_port.emulator.errors import (
    DataRace,
    EmulatorError,
    NoProgress,
    UnknownInstruction,
)
from nsa_port.emulator.machine import LaunchShape, Machine
from nsa_port.emulator.memory import GlobalMemory

from .emulator_programs import execute, lanes_of, program, refuses, same

DESCRIPTOR = """
.amdhsa_user_sgpr_kernarg_segment_ptr 1
.amdhsa_user_sgpr_count 2
.amdhsa_system_sgpr_workgroup_id_x 1
.amdhsa_system_sgpr_workgroup_id_y 1
.amdhsa_system_sgpr_workgroup_id_z 1
"""


def launch(
    architecture: str,
    body: str,
    grid: tuple[int, int, int],
    waves: int,
    out: np.ndarray,
    *,
    races: bool = True,
    traffic: Traffic | None = None,
    lds_bytes: int = 0,
    most_steps: int = 100_000,
) -> tuple[np.ndarray, Machine]:
    """Launch a kernel whose one argument is the address of `out`; returns what `out` holds then."""
    memory = GlobalMemory()
    address = memory.add(out.view(np.uint8).reshape(-1).copy(), "out")
    parsed = program(architecture, body, DESCRIPTOR)
    machine = Machine(parsed, memory, races=races, traffic=traffic, most_steps=most_steps)
    machine.launch(LaunchShape(grid, waves, lds_bytes), struct.pack("<Q", address))
    return memory.contents(address).view(out.dtype).reshape(out.shape), machine


LOAD_POINTER = {
    "gfx942": "s_load_dwordx2 s[8:9], s[0:1], 0x0\ns_waitcnt lgkmcnt(0)\n",
    "gfx1100": "s_load_b64 s[8:9], s[0:1], 0x0\ns_waitcnt lgkmcnt(0)\n",
    "gfx1201": "s_load_b64 s[8:9], s[0:1], 0x0\ns_wait_kmcnt 0x0\n",
}
STORE = {
    "gfx942": "global_store_dword",
    "gfx1100": "global_store_b32",
    "gfx1201": "global_store_b32",
}


@pytest.mark.parametrize("architecture", LOAD_POINTER)
def test_workgroups_know_their_place(architecture: str) -> None:
    """Each thread stores its workgroup's x, y, z and its number, packed, at its own place."""
    lanes, grid, waves = lanes_of(architecture), (3, 2, 2), 2
    if architecture == "gfx1201":
        ids = "s_mov_b32 s2, ttmp9\ns_and_b32 s3, ttmp7, 0xffff\ns_lshr_b32 s4, ttmp7, 16\n"
    else:
        ids = ""
    body = (
        LOAD_POINTER[architecture]
        + ids
        + f"""
    s_mul_i32 s5, s4, 2
    s_add_i32 s5, s5, s3
    s_mul_i32 s5, s5, 3
    s_add_i32 s5, s5, s2
    s_mul_i32 s5, s5, {lanes * waves * 4}
    s_lshl_b32 s6, s3, 8
    s_lshl_b32 s7, s4, 16
    s_or_b32 s6, s6, s7
    s_or_b32 s6, s6, s2
    v_lshlrev_b32 v1, 2, v0
    v_add_nc_u32 v1, s5, v1
    v_lshlrev_b32 v2, 24, v0
    v_or_b32 v2, s6, v2
    {STORE[architecture]} v1, v2, s[8:9]
    """
    )
    out = np.zeros((2, 2, 3, lanes * waves), np.uint32)
    found, _ = launch(architecture, body, grid, waves, out)
    z, y, x, thread = np.indices(out.shape)
    same(found, x | y << 8 | z << 16 | (thread % 256) << 24)


def test_waves_go_round_a_loop_as_often_as_each_wants() -> None:
    body = (
        LOAD_POINTER["gfx942"]
        + """
    v_readfirstlane_b32 s5, v0
    s_mov_b32 s6, 0
    loop:
    s_add_i32 s6, s6, 1
    s_sub_i32 s5, s5, 64
    s_cmp_ge_i32 s5, 0
    s_cbranch_scc1 loop
    s_mul_i32 s7, s6, 10
    v_lshlrev_b32 v1, 2, v0
    v_mov_b32 v2, s7
    global_store_dword v1, v2, s[8:9]
    """
    )
    found, machine = launch("gfx942", body, (1, 1, 1), 4, np.zeros((4, 64), np.uint32))
    same(found, np.repeat([[10], [20], [30], [40]], 64, axis=1))
    adds = [n for n, line in enumerate(machine.program.instructions) if line.name == "s_add_i32"]
    assert machine.counters.executed[adds[0]] == 1 + 2 + 3 + 4
    assert machine.counters.instructions == sum(machine.counters.executed)


def test_lanes_that_go_different_ways_each_get_their_own() -> None:
    body = (
        LOAD_POINTER["gfx942"]
        + """
    v_mov_b32 v2, 0
    v_cmp_gt_u32 vcc, 10, v0
    s_and_saveexec_b64 s[4:5], vcc
    s_cbranch_execz otherwise
    v_add_u32 v2, 100, v0
    otherwise:
    s_andn2_b64 exec, s[4:5], exec
    v_add_u32 v2, 200, v0
    s_or_b64 exec, exec, s[4:5]
    v_lshlrev_b32 v1, 2, v0
    global_store_dword v1, v2, s[8:9]
    """
    )
    found, _ = launch("gfx942", body, (1, 1, 1), 1, np.zeros(64, np.uint32))
    same(found, np.where(np.arange(64) < 10, 100, 200) + np.arange(64))


@pytest.mark.parametrize("architecture", LOAD_POINTER)
def test_a_barrier_makes_waves_wait_for_each_other(architecture: str) -> None:
    """Wave 0 takes a detour, past the end, before it writes what the other wave then reads."""
    lanes = lanes_of(architecture)
    barrier = "s_barrier_signal -1\ns_barrier_wait -1" if architecture == "gfx1201" else "s_barrier"
    write, read = ("ds_write_b32", "ds_read_b32")
    if architecture != "gfx942":
        write, read = "ds_store_b32", "ds_load_b32"
    body = (
        LOAD_POINTER[architecture]
        + f"""
    v_readfirstlane_b32 s5, v0
    s_mov_b32 s6, 20
    s_cmp_eq_u32 s5, 0
    s_cbranch_scc1 detour
    ready:
    v_lshlrev_b32 v1, 2, v0
    {write} v1, v0
    {barrier}
    v_xor_b32 v3, {lanes * 4}, v1
    {read} v2, v3
    {STORE[architecture]} v1, v2, s[8:9]
    s_endpgm
    detour:
    s_sub_i32 s6, s6, 1
    s_cmp_lg_u32 s6, 0
    s_cbranch_scc1 detour
    s_branch ready
    """
    )
    out = np.zeros(2 * lanes, np.uint32)
    found, _ = launch(architecture, body, (1, 1, 1), 2, out, lds_bytes=2 * lanes * 4)
    same(found, np.arange(2 * lanes) ^ lanes)


def test_waves_that_parted_go_on_together() -> None:
    """What follows a branch runs once for all waves, and not once for each."""
    body = "v_readfirstlane_b32 s5, v0\ns_cmp_eq_u32 s5, 0\ns_cbranch_scc1 meet\ns_nop 0\nmeet:\n"
    tail = "v_mov_b32 v1, 0\n" * 100
    _, machine = launch("gfx942", body + tail, (1, 1, 1), 4, np.zeros(1, np.uint32))
    assert machine.counters.steps < 120
    assert machine.counters.instructions > 400


def test_a_wave_that_ends_does_not_hold_a_barrier() -> None:
    body = """
    v_readfirstlane_b32 s5, v0
    s_cmp_eq_u32 s5, 0
    s_cbranch_scc1 leave
    s_barrier
    leave:
    """
    launch("gfx942", body, (1, 1, 1), 2, np.zeros(1, np.uint32))


def test_spinning_waves_do_not_starve_those_they_wait_for() -> None:
    """Workgroup 1 spins, at the lower address, until workgroup 0 has stored."""
    body = (
        LOAD_POINTER["gfx942"]
        + """
    v_mov_b32 v1, 0
    s_cmp_eq_u32 s2, 0
    s_cbranch_scc1 writer
    spin:
    global_load_dword v2, v1, s[8:9]
    v_readfirstlane_b32 s5, v2
    s_cmp_eq_u32 s5, 0
    s_cbranch_scc1 spin
    s_endpgm
    writer:
    v_mov_b32 v2, 1
    global_store_dword v1, v2, s[8:9]
    """
    )
    found, _ = launch("gfx942", body, (2, 1, 1), 1, np.zeros(1, np.uint32), races=False)
    assert found[0] == 1


def test_a_loop_without_an_end_is_reported() -> None:
    with refuses(NoProgress, "no end after", "a loop that does not end", "s_branch loop"):
        launch("gfx942", "loop:\ns_branch loop", (1, 1, 1), 1, np.zeros(1, np.uint32))


def test_too_much_lds_is_refused() -> None:
    out = np.zeros(1, np.uint32)
    with refuses(EmulatorError, "65540 bytes of LDS; gfx942 has 65536"):
        launch("gfx942", "s_nop 0", (1, 1, 1), 1, out, lds_bytes=65540)
    launch("gfx950", "s_nop 0", (1, 1, 1), 1, out, lds_bytes=65540)


# ----------------------------------------------------------------------------------------- races
def racy(body: str, workgroups: int = 2) -> None:
    start = (
        LOAD_POINTER["gfx942"] + "v_lshlrev_b32 v1, 2, v0\nv_mov_b32 v2, 1\ns_lshl_b32 s3, s2, 8\n"
    )
    launch("gfx942", start + body, (workgroups, 1, 1), 1, np.zeros(64 * 4, np.uint32))


def test_two_stores_to_one_place_race_even_in_the_same_step() -> None:
    with refuses(DataRace, "two workgroups store", "'out', byte 0, workgroups", "global_store"):
        racy("global_store_dword v1, v2, s[8:9]")


def test_a_load_of_what_another_workgroup_stores_races() -> None:
    own, others = "v_add_u32 v3, s3, v1\n", "s_xor_b32 s4, s3, 256\nv_add_u32 v4, s4, v1\n"
    with refuses(DataRace, "a workgroup loads what another one stores"):
        racy(own + others + "global_store_dword v3, v2, s[8:9]\nglobal_load_dword v5, v4, s[8:9]")


def test_a_store_to_what_several_others_have_loaded_races() -> None:
    with refuses(DataRace, "a workgroup stores what another one loads", "workgroups several and"):
        racy(
            "global_load_dword v5, v1, s[8:9]\nv_add_u32 v3, s3, v1\n"
            "global_store_dword v3, v2, s[8:9]"
        )


def test_own_places_and_atomics_do_not_race() -> None:
    racy(
        "v_add_u32 v3, s3, v1\nglobal_load_dword v5, v3, s[8:9]\n"
        "global_store_dword v3, v2, s[8:9]\nglobal_load_dword v5, v3, s[8:9]"
    )
    racy("global_atomic_add v1, v2, s[8:9]")


# --------------------------------------------------------------------------------------- counting
def test_traffic_is_counted() -> None:
    traffic = Traffic(program("gfx942", "s_nop 0").architecture)
    body = (
        LOAD_POINTER["gfx942"]
        + """
    v_lshlrev_b32 v1, 2, v0
    v_lshlrev_b32 v5, 8, v0
    v_mov_b32 v6, 0
    global_load_dword v2, v1, s[8:9]
    global_load_dword v2, v1, s[8:9]
    global_load_dword v2, v5, s[8:9]
    global_store_dwordx2 v6, v[2:3], s[8:9] offset:512
    ds_write_b32 v1, v2
    ds_write_b32 v5, v2
    ds_read_b32 v2, v6
    """
    )
    launch(
        "gfx942",
        body,
        (1, 1, 1),
        1,
        np.zeros(64 * 64, np.uint32),
        traffic=traffic,
        lds_bytes=64 * 256,
    )
    assert traffic.loaded == 3 * 64 * 4
    assert traffic.stored == 64 * 8
    assert traffic.moved == traffic.loaded + traffic.stored
    # 256 consecutive bytes, one more word in each of 63 further lines, and 8 bytes stored, of which
    # 4 at byte 512 are among those words.
    assert traffic.unique == 256 + 63 * 4 + 4
    assert traffic.lines == 2 + 2 + 64 + 1
    # Consecutive words: 2 passes of 32 banks; all lanes in one bank: 64; one word for all: 1.
    assert (traffic.passes, traffic.least_passes) == (2 + 64 + 1, 2 + 2 + 1)


# ----------------------------------------------------------------------------- unknown instructions
@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("v_foo_f32 v0, v1, v2", (r'define\("f32 <- f32 f32", foo_f32=...\)', "vector_alu.py")),
        ("s_foo_b32 s0, s1", (r'define\("u32 <- u32", foo_b32=...\)', "scalar_alu.py")),
        ("v_cvt_foo_f32 v0, v1", ("OPERATIONS", "conversions.py")),
        ("v_pk_foo_f16 v0, v1, v2", ("OPERATIONS", "packed.py")),
        ("v_cmp_foo_f32 vcc, v1, v2", ("PREDICATES", "comparisons.py")),
        ("v_mfma_f32_16x16x16_foo v[0:3], v0, v1, 0", ("INPUT_BYTES", "matrix.py")),
        ("ds_read_foo v0, v1", ("READS", "local_data_share.py")),
        ("ds_write_foo v0, v1", ("WRITES", "local_data_share.py")),
        ("global_load_foo v0, v1, off", ("LOADS", "vector_memory.py")),
        ("buffer_store_foo v0, v1, s[0:3], 0", ("STORES", "vector_memory.py")),
        ("global_atomic_foo v0, v1, off", ("ATOMICS", "atomics.py")),
        ("s_load_foo s0, s[2:3], 0", ("WORDS", "scalar_memory.py")),
        ("v_readfirstlane_b64 s[0:1], v[0:1]", ("TABLE", "cross_lane.py")),
        ("v_mul_hi_u32_dpp v0, v1, v2 foo:1", ("DPP control", "vector_alu.py")),
        ("v_mbcnt_lo_u32_b32_dpp v0, v1, v2 row_mirror", ("its DPP form",)),
        ("v_add_f32 v0, v1", ("1 sources where 2 belong",)),
    ],
)
def test_what_is_unknown_is_named_with_the_line_to_add(line: str, parts: tuple[str, ...]) -> None:
    quoted = line.split(" ")[0]
    with refuses(UnknownInstruction, *parts, f"in `{quoted}"):
        execute("gfx942", line)


def test_what_is_unknown_but_not_reached_does_no_harm() -> None:
    execute("gfx942", "s_branch end\nv_foo_f32 v0, v1\nend:")


def test_a_branch_to_nowhere_is_refused() -> None:
    with pytest.raises(EmulatorError, match="no label nowhere"):
        execute("gfx942", "s_branch nowhere")


def test_the_library_does_not_import_the_emulator_nor_the_emulator_the_library() -> None:
    code = (
        "import sys\n"
        "import nsa_port\n"
        "assert not [m for m in sys.modules if m.startswith('nsa_port.emulator')]\n"
        "before = {m for m in sys.modules if m.startswith('nsa_port')}\n"
        "import nsa_port.emulator.machine\n"
        "after = {m for m in sys.modules if m.startswith('nsa_port')}\n"
        "assert all(m.startswith('nsa_port.emulator') for m in after - before)\n"
        "assert 'triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
