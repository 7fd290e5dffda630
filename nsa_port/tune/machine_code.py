"""A look at a kernel's machine code for NVIDIA GPUs: what only running it could show otherwise."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_LABEL = re.compile(r"(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;")
_TARGET = re.compile(r"BRA\S*.*`\((\.L_x_\d+)\)")
_UNIFORM = re.compile(r"(?<!\w)UR(\d+)")
_BARRIER = re.compile(r"\bbar\.(?:sync|warp\.sync)|\bbarrier\.sync")
_ACCESS = re.compile(r"\b(?:ld|st)\.shared|\b(?:ld|st)matrix")
_ARRIVAL = re.compile(r"(?<!async\.)\bmbarrier\.arrive")
_WRITING = frozenset(
    (
        *(
            "UMOV",
            "UIADD3",
            "ULOP3",
            "USHF",
            "USGXT",
            "ULEA",
            "USEL",
            "ULDC",
            "LDCU",
            "R2UR",
            "S2UR",
        ),
        *("UFLO", "UPRMT", "VOTEU", "REDUX", "UBMSK", "UPOPC", "UP2UR", "UIABS", "UBREV", "UIMAD"),
    )
)
"""Instructions whose first operand, if uniform, is what they write."""


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack, which is where registers are spilled to."""
    text = _run("cuobjdump", "-res-usage", cubin)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()  # type: ignore[union-attr]
    return int(registers), int(stack)


def reads_before_writes(cubin: bytes) -> list[str]:
    """Instructions that read a uniform register which some path has not written before.

    Wgmma descriptors live in uniform registers, and ptxas 12.8 is known to lose the instruction
    that sets one: the kernel then reads shared memory at a random address.
    """
    instructions, labels = _parse(_run("nvdisasm", "-c", cubin))
    effects = [_effect(text) for text in instructions]
    written: list[frozenset[int] | None] = [None] * len(instructions)
    written[0] = frozenset()
    pending = [0]
    while pending:
        at = pending.pop()
        known = written[at]
        assert known is not None
        after = known | effects[at][0]
        for following in _successors(at, instructions[at], labels, len(instructions)):
            before = written[following]
            merged = after if before is None else before & after
            if merged != before:
                written[following] = merged
                pending.append(following)
    return [
        text
        for text, known, (_, read) in zip(instructions, written, effects, strict=True)
        if known is not None and read - known
    ]


def early_signals(ptx: str) -> list[str]:
    """Arrivals at an mbarrier with no barrier since the last access to shared memory.

    One thread arrives for all of its warps, and says that all of them are done. Looks at the
    instructions in the order of the text. Arrivals of single threads' copies are none of these.
    """
    found, accessed = [], False
    for line in ptx.splitlines():
        if _BARRIER.search(line):
            accessed = False
        elif _ACCESS.search(line):
            accessed = True
        elif accessed and _ARRIVAL.search(line):
            found.append(line.strip())
    return found


def _run(tool: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOLS / tool), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _parse(assembly: str) -> tuple[list[str], dict[str, int]]:
    """The instructions of the kernel itself, and where its labels stand among them."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        if "__internal_" in line and line.rstrip().endswith(":"):
            break  # subroutines, such as 64-bit division, follow the kernel
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := _INSTRUCTION.match(line):
            instructions.append(instruction[1])
    return instructions, labels


def _successors(at: int, text: str, labels: dict[str, int], count: int) -> list[int]:
    conditional = text.startswith("@")
    body = text.split(" ", 1)[1] if conditional else text
    ends = body.startswith(("EXIT", "RET"))
    found = []
    if target := _TARGET.match(body):
        conditional = conditional or re.match(r"BRA\S* !?U?P\d", body) is not None
        ends = True
        found.append(labels.get(target[1], count))
    if not ends or conditional:
        found.append(at + 1)
    return [index for index in found if index < count]


def _effect(text: str) -> tuple[frozenset[int], frozenset[int]]:
    """The uniform registers that an instruction writes and those that it reads."""
    operation, _, rest = re.sub(r"^@!?U?P\w+\s+", "", text).partition(" ")
    operands = [operand.strip() for operand in rest.replace(".reuse", "").split(",")]
    name = operation.split(".")[0]
    read: set[int] = set()
    if name in ("HGMMA", "IGMMA", "QGMMA"):
        for operand in operands:
            if descriptor := re.search(r"gdesc\[UR(\d+)\]", operand):
                first = int(descriptor[1])
                # Two descriptors, A's and B's; A's is unused where A lies in registers.
                read.update(range(first + 2 * operands[1].startswith("R"), first + 4))
        return frozenset(), frozenset(read)
    width = 4 if ".128" in operation else 2 if ".64" in operation or ".WIDE" in operation else 1
    written: set[int] = set()
    if name in _WRITING and operands[0].startswith("UR") and operands[0] != "URZ":
        first = int(operands.pop(0)[2:])
        written.update(range(first, first + width))
    for position, operand in enumerate(operands):
        # A wide multiply-add multiplies single registers and adds a pair.
        wide = ".64" in operation or (".WIDE" in operation and position == len(operands) - 1)
        for match in _UNIFORM.finditer(operand):
            first = int(match[1])
            pair = (wide and written) or "desc[UR" in operand or f"UR{first}.64" in operand
            read.update(range(first, first + (2 if pair else 1)))
    return frozenset(written), frozenset(read)
