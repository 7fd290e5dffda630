"""The emulated GPUs: what differs between them and matters to a kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

_KIB = 1024


@dataclass(frozen=True, slots=True)
class Architecture:
    """One target of the AMD compiler.

    generation: 9 (CDNA: 64 lanes, MFMA), 11 or 12 (RDNA: 32 lanes, WMMA, dual issue).
    lds_bytes: the most that one workgroup may have of the local data share, and lds_banks its banks
        of four bytes; the compiler checks neither.
    compute_units, simds: of one device as ROCm shows it, and of one compute unit.
    fnuz_float8: 8-bit floats are the FNUZ formats (no infinity, one zero) and not OCP's.
    flushes_half_subnormals: matrix instructions take subnormal 16-bit inputs for zero.
    matrix_flops: floating-point operations of matrix instructions per cycle and compute unit, by
        the format of their inputs.
    """

    name: str
    generation: int
    lds_bytes: int
    lds_banks: int
    compute_units: int
    simds: int
    fnuz_float8: bool = False
    flushes_half_subnormals: bool = False
    matrix_flops: Mapping[str, int] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def lanes(self) -> int:
        """Lanes of a wave, as Triton compiles for this GPU."""
        return 64 if self.generation == 9 else 32

    @property
    def memory_scalar(self) -> int:
        """The scalar register that the assembler calls m0."""
        return 125 if self.generation >= 11 else 124


# Matrix rates: AMD's "CDNA 2", "CDNA 3" and "CDNA 4 architecture" white papers, the "RDNA 3"
# presentation and GPUOpen's "Using the Matrix Cores of AMD RDNA 4". Times compute units and clock
# they give the published dense peaks, e.g. 304 x 2.1 GHz x 2048 = 1307 TFLOP/s on MI300X.
ARCHITECTURES: Mapping[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        Architecture(
            "gfx90a",
            generation=9,
            lds_bytes=64 * _KIB,
            lds_banks=32,
            compute_units=104,
            simds=4,
            flushes_half_subnormals=True,
            matrix_flops={"f16": 1024, "bf16": 1024, "f32": 256, "i8": 1024},
        ),
        Architecture(
            "gfx942",
            generation=9,
            lds_bytes=64 * _KIB,
            lds_banks=32,
            compute_units=304,
            simds=4,
            fnuz_float8=True,
            matrix_flops={
                "f16": 2048,
                "bf16": 2048,
                "f32": 256,
                "xf32": 1024,
                "i8": 4096,
                "fp8": 4096,
                "bf8": 4096,
            },
        ),
        Architecture(
            "gfx950",
            generation=9,
            lds_bytes=160 * _KIB,
            lds_banks=64,
            compute_units=256,
            simds=4,
            matrix_flops={
                "f16": 4096,
                "bf16": 4096,
                "f32": 256,
                "i8": 8192,
                "fp8": 8192,
                "bf8": 8192,
            },
        ),
        Architecture(
            "gfx1100",
            generation=11,
            lds_bytes=64 * _KIB,
            lds_banks=32,
            compute_units=96,
            simds=2,
            matrix_flops={"f16": 512, "bf16": 512, "i8": 512},
        ),
        Architecture(
            "gfx1201",
            generation=12,
            lds_bytes=64 * _KIB,
            lds_banks=32,
            compute_units=64,
            simds=2,
            matrix_flops={
                "f16": 1024,
                "bf16": 1024,
                "i8": 2048,
                "fp8": 2048,
                "bf8": 2048,
            },
        ),
    )
}


def architecture_named(name: str) -> Architecture:
    """The architecture of that name; `ValueError` with the list of names otherwise."""
    try:
        return ARCHITECTURES[name]
    except KeyError:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"no emulated GPU is called {name!r}; there are {known}") from None
