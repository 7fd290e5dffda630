"""Parsing the AMDGPU assembly text that Triton's compiler emits (`kernel.asm["amdgcn"]`).

A `Program` is what one kernel's text says: its instructions with their operands and modifiers, the
labels, the kernel descriptor (`.amdhsa_*`) and the layout of the arguments.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from nsa_port.emulator.architectures import Architecture, architecture_named

EXEC = 126
"""Scalar register that holds, with the next one, the mask of active lanes."""
VCC = 106
"""Scalar register that holds, with the next one, what compares write and selects read."""
TRAP_TEMPORARY = 108
"""Scalar register that the assembler calls ttmp0."""
ACCUMULATORS = 256
"""Where the accumulation registers start in the numbering of the vector registers."""

_NAMED_SCALARS = {
    "vcc_lo": (VCC, 1),
    "vcc_hi": (VCC + 1, 1),
    "vcc": (VCC, 2),
    "exec_lo": (EXEC, 1),
    "exec_hi": (EXEC + 1, 1),
    "exec": (EXEC, 2),
    "flat_scratch": (102, 2),
    "flat_scratch_lo": (102, 1),
    "flat_scratch_hi": (103, 1),
    "xnack_mask": (104, 2),
}
_NO_OPERANDS = {"null", "off"}
_REGISTER = re.compile(r"(v|s|a|ttmp)(?:(\d+)|\[(\d+)(?::(\d+))?\])$")
_INTEGER = re.compile(r"-?(?:0x[0-9a-fA-F]+|\d+)$")
_FLOAT = re.compile(r"-?\d+\.\d*(?:e[-+]?\d+)?$")
_LOCATION = re.compile(r"\.loc\s+\d+\s+(\d+)")
_LABEL = re.compile(r"([.\w$]+):$")
_ENCODING = re.compile(r"(_e32|_e64)?(_dpp8|_dpp|_sdwa)?$")
_WORDS = re.compile(
    r"offset:swizzle\([^)]*\)"  # ds_swizzle's pattern has commas and brackets of its own
    r"|[\w$]+:\[[^\]]*\]"
    r"|(?:neg|abs|sext|lit)\([^)]*\)"
    r"|\S+"
)
_REGISTER_RANGE = re.compile(r"-?\|?\(?(?:[vsa]|ttmp)\[")

_REMEMBERED = 2**16
"""Lines and operands that are parsed once; those of a few hundred kernels."""

Modifier = int | str | list[int]


@dataclass(frozen=True, slots=True)
class Operand:
    """One operand: what kind it is, where, and what is done to it when it is read.

    kind: "vector", "scalar" (value: the first register), "constant" (value: the number), "carry"
        (the SCC bit), "none" (`null` or `off`), or "text" (a label or a name).
    count: registers that it spans.
    high: the half of the register that it names (`v1.h`), or None for the whole.
    """

    kind: str
    value: int | float | str = 0
    count: int = 1
    negate: bool = False
    absolute: bool = False
    sign_extend: bool = False
    high: bool | None = None

    @property
    def register(self) -> int:
        if self.kind not in ("vector", "scalar"):
            raise ValueError(f"a register is needed, not {self.kind} {self.value!r}")
        return int(self.value)

    def at(self, offset: int) -> Operand:
        """The `offset`-th register of this operand, alone and without modifiers."""
        if self.kind in ("vector", "scalar"):
            return Operand(self.kind, self.register + offset)
        return Operand(self.kind, self.value)


NONE = Operand("none")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line: its name without the encoding's suffix, operands and modifiers.

    Kernels share those of the same text, and what `decoder` makes of them.

    halves: the two instructions that RDNA issues together when the line is a `v_dual_*` pair.
    """

    name: str
    operands: tuple[Operand, ...]
    modifiers: Mapping[str, Modifier]
    text: str
    is_dpp: bool = False
    is_sdwa: bool = False
    halves: tuple[Instruction, Instruction] | None = None

    def __hash__(self) -> int:
        return hash(self.text)

    def number(self, modifier: str, default: int = 0) -> int:
        """An integer modifier's value."""
        value = self.modifiers.get(modifier, default)
        if not isinstance(value, int):
            raise ValueError(f"{modifier} is {value!r}, not a number")
        return value

    def numbers(self, modifier: str, default: list[int]) -> list[int]:
        """A list modifier's value."""
        value = self.modifiers.get(modifier, default)
        if not isinstance(value, list):
            raise ValueError(f"{modifier} is {value!r}, not a list")
        return value

    def word(self, modifier: str) -> str | None:
        """A modifier's value as text, or None."""
        value = self.modifiers.get(modifier)
        return None if value is None else str(value)


@dataclass(frozen=True, slots=True)
class Argument:
    """Where one kernel argument lies in the argument buffer.

    kind: the metadata's `.value_kind`; what the runtime adds is called `hidden_*`.
    """

    offset: int
    size: int
    kind: str


@dataclass(slots=True)
class Program:
    """A kernel's assembly, parsed; `Program.parse(text)` makes it.

    source_lines: for each instruction, the line of the Python source from the debug information; 0
        if there is none.
    """

    architecture: Architecture
    name: str = ""
    instructions: list[Instruction] = field(default_factory=list)
    source_lines: list[int] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    descriptor: dict[str, int] = field(default_factory=dict)
    arguments: list[Argument] = field(default_factory=list)
    steps: object = None
    """What `decoder` made of the instructions, kept so that a program is decoded once."""

    @staticmethod
    def parse(text: str) -> Program:
        """Parse the text of one kernel; the architecture is the one that it names."""
        target = re.search(r"\.amdgcn_target\s+\"[^\"]*?(gfx[0-9a-f]+)", text)
        if target is None:
            raise ValueError("the assembly names no .amdgcn_target")
        kernel = re.search(r"\.amdhsa_kernel\s+(\S+)", text)
        program = Program(architecture_named(target.group(1)), kernel.group(1) if kernel else "")
        for key, value in re.findall(r"\.amdhsa_(\w+)\s+([^\s;]+)", text):
            if _INTEGER.match(value):
                program.descriptor[key] = int(value, 0)
        program.arguments = _arguments(text)
        program._parse_body(text[text.index(".text") :])
        return program

    def _parse_body(self, body: str) -> None:
        source_line = 0
        for raw in body.splitlines():
            line = raw.split(";")[0].strip()
            if line.startswith(".section") and ".rodata" in line:
                return
            location = _LOCATION.match(line)
            label = _LABEL.match(line)
            if location:
                source_line = int(location.group(1))
            elif label:
                self.labels[label.group(1)] = len(self.instructions)
            elif "a" <= line[:1] <= "z":
                self.instructions.append(parse_instruction(line, self.architecture))
                self.source_lines.append(source_line)


def _arguments(text: str) -> list[Argument]:
    """The arguments that the code object's metadata lists, in order."""
    start, end = text.find(".args:"), text.find(".group_segment_fixed_size:")
    listed = text[start:end] if 0 <= start < end else ""
    return [
        Argument(int(offset), int(size), kind)
        for offset, size, kind in re.findall(
            r"\.offset:\s*(\d+)\s+\.size:\s*(\d+)\s+\.value_kind:\s*(\w+)", listed
        )
    ]


@lru_cache(maxsize=_REMEMBERED)
def parse_instruction(text: str, architecture: Architecture) -> Instruction:
    """Parse one line of assembly."""
    if "::" in text:
        first, second = (parse_instruction(half.strip(), architecture) for half in text.split("::"))
        return Instruction("v_dual", (), {}, text, halves=(first, second))
    mnemonic, *after = text.split(None, 1)
    rest = after[0] if after else ""
    name = _ENCODING.sub("", _ENCODING.sub("", mnemonic)).replace("v_dual_", "v_", 1)
    operands: list[Operand] = []
    modifiers: dict[str, Modifier] = {}
    for position, part in enumerate(_split_at_commas(rest)):
        words = _WORDS.findall(part)
        if position == 0 and words and ":" in words[0] and not _REGISTER_RANGE.match(words[0]):
            modifier_words = words
        else:
            operands.append(parse_operand(words[0], architecture))
            modifier_words = words[1:]
        modifiers.update(_parse_modifier(word) for word in modifier_words)
    return Instruction(
        name,
        tuple(operands),
        modifiers,
        text,
        is_dpp="_dpp" in mnemonic,
        is_sdwa="_sdwa" in mnemonic,
    )


def _split_at_commas(text: str) -> list[str]:
    """Split at the commas that are outside brackets."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "[(") - (character in "])")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    if current.strip():
        parts.append(current.strip())
    return parts


def _parse_modifier(word: str) -> tuple[str, Modifier]:
    """`offset:16` -> ("offset", 16); `op_sel:[0,1]` -> a list; `glc` -> ("glc", 1)."""
    key, colon, value = word.partition(":")
    if not colon:
        return word, 1
    if value.startswith("["):
        return key, [int(element, 0) for element in value[1:-1].split(",")]
    if _INTEGER.match(value):
        return key, int(value, 0)
    return key, value


@lru_cache(maxsize=_REMEMBERED)
def parse_operand(text: str, architecture: Architecture) -> Operand:
    """Parse one operand, with the signs and bars around it."""
    text = _inside(text, r"lit(?:64)?\((.*)\)$") or text
    stripped = _inside(text, r"sext\((.*)\)$")
    sign_extend, text = stripped is not None, stripped or text
    stripped = _inside(text, r"-(?=[vsa\[|(tn]|ttmp|vcc|abs)(.*)$") or _inside(
        text, r"neg\((.*)\)$"
    )
    negate, text = stripped is not None, stripped or text
    stripped = _inside(text, r"\|(.*)\|$") or _inside(text, r"abs\((.*)\)$")
    absolute, text = stripped is not None, stripped or text
    high: bool | None = None
    if text[0] in "vs" and text[-2:] in (".l", ".h"):
        text, high = text[:-2], text.endswith(".h")
    kind, value, count = _parse_place(text, architecture)
    return Operand(kind, value, count, negate, absolute, sign_extend, high)


def _inside(text: str, pattern: str) -> str | None:
    match = re.match(pattern, text)
    return match.group(1) if match else None


def _parse_place(text: str, architecture: Architecture) -> tuple[str, int | float | str, int]:
    """What an operand without its modifiers names: (kind, value, registers)."""
    match = _REGISTER.match(text)
    if match:
        family, single, first, last = match.groups()
        start = int(single if single is not None else first)
        count = 1 if single is not None or last is None else int(last) - start + 1
        if family in "va":
            return "vector", start + (ACCUMULATORS if family == "a" else 0), count
        return "scalar", start + (TRAP_TEMPORARY if family == "ttmp" else 0), count
    if text in _NAMED_SCALARS:
        return ("scalar", *_NAMED_SCALARS[text])
    if text == "m0":
        return "scalar", architecture.memory_scalar, 1
    if text in _NO_OPERANDS:
        return "none", 0, 1
    if text in ("scc", "src_scc"):
        return "carry", 0, 1
    if _INTEGER.match(text):
        return "constant", int(text, 0), 1
    if _FLOAT.match(text):
        return "constant", float(text), 1
    return "text", text, 1
