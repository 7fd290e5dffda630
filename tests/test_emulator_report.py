"""The numbers of a report, on programs whose cost is known."""

from __future__ import annotations

import pytest

from nsa_port.emulator.architectures import ARCHITECTURES
from nsa_port.emulator.assembly import parse_instruction
from nsa_port.emulator.errors import EmulatorError
from nsa_port.emulator.report import class_of, inspect, issue_cycles

ASSEMBLY = """
.amdgcn_target "amdgcn-amd-amdhsa--gfx942"
.text
kernel:
    buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
    global_load_dword v5, v[6:7], off
    v_mfma_f32_16x16x16_f16 v[8:11], v[0:1], v[2:3], 0
    v_mfma_f32_16x16x16_f16 v[8:11], v[0:1], v[2:3], v[8:11]
    s_endpgm
.section .rodata
; Occupancy: 4
.amdgpu_metadata
    .agpr_count:     8
    .private_segment_fixed_size: 16
    .sgpr_count:     20
    .sgpr_spill_count: 0
    .vgpr_count:     120
    .vgpr_spill_count: 3
"""


@pytest.mark.parametrize(
    ("architecture", "text", "expected"),
    [
        # What the published peak rates come to, e.g. 16 passes of 4 cycles for the first.
        ("gfx90a", "v_mfma_f32_32x32x8f16 a[0:15], v[0:1], v[2:3], a[0:15]", 64),
        ("gfx90a", "v_mfma_f32_16x16x4f32 a[0:3], v0, v1, a[0:3]", 32),
        ("gfx942", "v_mfma_f32_32x32x8_f16 v[0:15], v[16:17], v[18:19], v[0:15]", 32),
        ("gfx942", "v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], v[0:3]", 16),
        ("gfx942", "v_mfma_f32_16x16x32_fp8_fp8 v[0:3], v[4:5], v[6:7], v[0:3]", 16),
        ("gfx950", "v_mfma_f32_16x16x32_f16 v[0:3], v[4:7], v[8:11], v[0:3]", 16),
        ("gfx1100", "v_wmma_f32_16x16x16_f16 v[0:7], v[8:15], v[16:23], v[0:7]", 32),
        ("gfx1201", "v_wmma_f32_16x16x16_f16 v[0:7], v[8:11], v[12:15], v[0:7]", 16),
        ("gfx942", "v_add_f32 v0, v1, v2", 4),
        ("gfx942", "v_exp_f32 v0, v1", 16),
        ("gfx1100", "v_add_f32 v0, v1, v2", 1),
        ("gfx942", "s_waitcnt vmcnt(0)", 0),
    ],
)
def test_cycles(architecture: str, text: str, expected: float) -> None:
    gpu = ARCHITECTURES[architecture]
    assert issue_cycles(parse_instruction(text, gpu), gpu) == expected


def test_a_format_without_a_rate_is_refused() -> None:
    gpu = ARCHITECTURES["gfx950"]
    instruction = parse_instruction("v_mfma_f32_16x16x8_xf32 v[0:3], v0, v1, 0", gpu)
    with pytest.raises(EmulatorError, match="no rate for matrices of xf32"):
        issue_cycles(instruction, gpu)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("v_fma_f32 v0, v1, v2, v3", "vector"),
        ("v_rcp_f32 v0, v1", "transcendental"),
        ("ds_read_b32 v0, v1", "lds"),
        ("buffer_store_dword v0, v1, s[0:3], 0", "memory"),
        ("s_load_dword s0, s[2:3], 0", "scalar"),
        ("s_nop 0", "timing"),
    ],
)
def test_classes(text: str, expected: str) -> None:
    assert class_of(parse_instruction(text, ARCHITECTURES["gfx942"])) == expected


def test_what_the_compiler_made_of_a_kernel() -> None:
    facts = inspect(ASSEMBLY, 40_000)
    assert (facts.vector_registers, facts.accumulation_registers, facts.scalar_registers) == (
        120,
        8,
        20,
    )
    assert (facts.vector_spills, facts.scratch_bytes, facts.occupancy) == (3, 16, 4)
    assert (facts.buffer_loads, facts.global_loads) == (1, 1)
    assert facts.matrix_instructions == {"v_mfma_f32_16x16x16_f16": 2}
    assert (facts.lds_bytes, facts.lds_limit, facts.workgroups_by_lds) == (40_000, 65_536, 1)
    assert facts.problems() == ("3 vector registers spilled, 16 bytes of scratch",)
    assert "70000 bytes of LDS; gfx942 has 65536" in inspect(ASSEMBLY, 70_000).problems()
