"""What the parser makes of AMDGPU assembly."""

from __future__ import annotations

import pytest

from nsa_port.emulator.architectures import ARCHITECTURES
from nsa_port.emulator.assembly import Argument, Operand, Program, parse_instruction, parse_operand

from .emulator_programs import program

CDNA3, RDNA3 = ARCHITECTURES["gfx942"], ARCHITECTURES["gfx1100"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("v3", Operand("vector", 3)),
        ("a3", Operand("vector", 259)),
        ("s[4:7]", Operand("scalar", 4, 4)),
        ("v[8:9]", Operand("vector", 8, 2)),
        ("ttmp9", Operand("scalar", 117)),
        ("vcc", Operand("scalar", 106, 2)),
        ("exec_lo", Operand("scalar", 126)),
        ("m0", Operand("scalar", 124)),
        ("off", Operand("none")),
        ("scc", Operand("carry")),
        ("-16", Operand("constant", -16)),
        ("0x3f800000", Operand("constant", 0x3F800000)),
        ("-0.5", Operand("constant", -0.5)),
        ("lit(0x10)", Operand("constant", 16)),
        ("-v1", Operand("vector", 1, negate=True)),
        ("|v1|", Operand("vector", 1, absolute=True)),
        ("-|s2|", Operand("scalar", 2, negate=True, absolute=True)),
        ("sext(v5)", Operand("vector", 5, sign_extend=True)),
        ("v1.h", Operand("vector", 1, high=True)),
        ("v1.l", Operand("vector", 1, high=False)),
        (".LBB0_2", Operand("text", ".LBB0_2")),
    ],
)
def test_operands_are_read(text: str, expected: Operand) -> None:
    assert parse_operand(text, CDNA3) == expected


def test_m0_has_another_number_on_rdna() -> None:
    assert parse_operand("m0", RDNA3).register == 125


def test_the_encoding_is_no_part_of_the_name() -> None:
    for text in ("v_add_f32_e32 v0, v1, v2", "v_add_f32_e64 v0, v1, v2", "v_add_f32 v0, v1, v2"):
        assert parse_instruction(text, CDNA3).name == "v_add_f32"
    dpp = parse_instruction("v_add_f32_e64_dpp v0, v1, v2 row_shr:1 bound_ctrl:0", RDNA3)
    assert (dpp.name, dpp.is_dpp, dpp.number("row_shr")) == ("v_add_f32", True, 1)
    assert parse_instruction("v_mov_b32_sdwa v0, v1 src0_sel:BYTE_1", CDNA3).is_sdwa


def test_modifiers_are_numbers_lists_or_words() -> None:
    instruction = parse_instruction(
        "v_pk_fma_f32 v[0:1], v[2:3], s[4:5], v[6:7] op_sel_hi:[1,0,1] clamp", CDNA3
    )
    assert instruction.numbers("op_sel_hi", []) == [1, 0, 1]
    assert instruction.number("clamp") == 1
    assert instruction.number("absent", 7) == 7
    load = parse_instruction("buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen offset:16", CDNA3)
    assert (load.number("offset"), "offen" in load.modifiers) == (16, True)
    assert [operand.kind for operand in load.operands] == [
        "vector",
        "vector",
        "scalar",
        "constant",
    ]
    swizzle = parse_instruction('ds_swizzle_b32 v0, v1 offset:swizzle(BITMASK_PERM,"00p10")', CDNA3)
    assert swizzle.word("offset") == 'swizzle(BITMASK_PERM,"00p10")'


def test_a_dual_instruction_has_two_halves() -> None:
    both = parse_instruction("v_dual_mov_b32 v0, v1 :: v_dual_add_f32 v2, v3, v4", RDNA3)
    assert both.halves is not None
    assert [half.name for half in both.halves] == ["v_mov_b32", "v_add_f32"]


def test_a_program_has_labels_lines_descriptor_and_arguments() -> None:
    parsed = Program.parse(
        """
        .amdgcn_target "amdgcn-amd-amdhsa--gfx942"
        .amdhsa_code_object_version 5
        .text
        .globl kernel
        kernel:                                 ; @kernel
        .loc 1 12 5                             ; file.py:12:5
            s_mov_b32 s0, 1                     ; a comment
        .LBB0_1:
            s_branch .LBB0_1
            .section .rodata,"a",@progbits
            .amdhsa_kernel kernel
            .amdhsa_user_sgpr_count 6
            .amdhsa_kernarg_size 24
        .amdgpu_metadata
            .args:
              - .address_space: global
                .offset: 0
                .size: 8
                .value_kind: global_buffer
              - .offset: 8
                .size: 4
                .value_kind: by_value
              - .offset: 16
                .size: 4
                .value_kind: hidden_block_count_x
            .group_segment_fixed_size: 0
        """
    )
    assert parsed.architecture.name == "gfx942"
    assert [instruction.name for instruction in parsed.instructions] == ["s_mov_b32", "s_branch"]
    assert parsed.labels == {"kernel": 0, ".LBB0_1": 1}
    assert parsed.source_lines[0] == 12
    assert parsed.descriptor["user_sgpr_count"] == 6
    assert parsed.arguments == [
        Argument(0, 8, "global_buffer"),
        Argument(8, 4, "by_value"),
        Argument(16, 4, "hidden_block_count_x"),
    ]
    assert parsed.name == "kernel"


def test_an_unknown_architecture_is_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match=r"gfx803.*gfx90a, gfx942"):
        program("gfx803", "s_nop 0")
