"""The backend `rocm`: the Triton kernels on AMD GPUs, real, emulated or interpreted."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from nsa_port.backends.interface import OPERATORS, Environment, Problem, Reason
from nsa_port.backends.triton_checks import dtype_reasons, head_dim_reasons, triton_reasons

ARCHITECTURES = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")
"""Those that the suite has run on, emulated."""

_LEAST_TRITON = "3.6"


class RocmBackend:
    name = "rocm"
    level = 3
    conforming: Collection[str] = ()
    """The architectures on whose hardware the suite passed; automatic choice takes no other."""
    kernels: Mapping[str, str] = dict.fromkeys(OPERATORS, "nsa_port.kernels.amd")

    def is_native(self, environment: Environment) -> bool:
        return environment.device_type == "cuda" and environment.hip_version is not None

    def machine_reasons(self, environment: Environment) -> tuple[Reason, ...]:
        if self.is_native(environment):
            found = self._gpu_reasons(environment.arch)
        elif environment.device_type == "cpu" and environment.emulate:
            found = _emulator_reasons(environment)
        elif environment.device_type == "cpu" and environment.interpreter:
            found = ()
        else:
            found = (_no_device(environment),)
        return (
            *found,
            *triton_reasons(
                environment,
                least=_LEAST_TRITON,
                compiler="amd",
                distribution=_distribution(environment.hip_version),
            ),
        )

    def _gpu_reasons(self, arch: str) -> tuple[Reason, ...]:
        """Only soft ones: any GPU that Triton compiles for may be tried.

        Partitions of a GPU (CPX, NPS4) have fewer compute units and less memory, and its
        architecture, which is all that counts here.
        """
        if arch in self.conforming:
            return ()
        untuned = Reason(
            "arch_untuned",
            f"{arch or 'the GPU'} has no tuned table, so that the generic one would answer",
            value=arch or "unknown",
            bound=", ".join(ARCHITECTURES),
            remedy="force it to try: backend='rocm'",
            soft=True,
        )
        unproven = Reason(
            "not_conforming",
            f"the suite has not passed on the hardware of {arch or 'this GPU'}, only emulated",
            value="no recorded run",
            bound=", ".join(self.conforming) or "a recorded run; there is none for any AMD GPU",
            remedy="check it with `nsa-port conformance --backend rocm`, then force it: "
            "backend='rocm'",
            soft=True,
        )
        return (unproven,) if arch in ARCHITECTURES else (untuned, unproven)

    def call_reasons(self, environment: Environment, problem: Problem) -> tuple[Reason, ...]:
        interpreted = environment.interpreter and environment.device_type == "cpu"
        return (
            *dtype_reasons(self.name, problem, bfloat16=not interpreted),
            *head_dim_reasons(problem),
        )


def _distribution(hip_version: str | None) -> str:
    """What pip is to install: the Triton that torch's index has for the ROCm at hand."""
    if hip_version is None:
        return "nsa-port[emulate]"
    rocm = ".".join(hip_version.split(".")[:2])
    return f"nsa-port[rocm] --extra-index-url https://download.pytorch.org/whl/rocm{rocm}"


def _emulator_reasons(environment: Environment) -> tuple[Reason, ...]:
    found = []
    if environment.emulate not in ARCHITECTURES:
        found.append(
            Reason(
                "arch_not_emulated",
                f"NSA_PORT_EMULATE={environment.emulate} names no emulated GPU",
                value=environment.emulate,
                bound=", ".join(ARCHITECTURES),
                remedy="set NSA_PORT_EMULATE to one of them",
            )
        )
    if environment.interpreter:
        found.append(
            Reason(
                "emulated_and_interpreted",
                "TRITON_INTERPRET=1 keeps Triton from compiling what the emulator runs",
                value=f"TRITON_INTERPRET=1 and NSA_PORT_EMULATE={environment.emulate}",
                bound="one of the two",
                remedy="unset either",
            )
        )
    if not environment.numpy:
        found.append(
            Reason(
                "numpy_missing",
                "the emulator computes with NumPy",
                value="not installed",
                bound="numpy",
                remedy="pip install nsa-port[emulate]",
            )
        )
    return tuple(found)


def _no_device(environment: Environment) -> Reason:
    where = environment.device_name or environment.device_type
    return Reason(
        "no_device",
        f"the tensors are on {where}, not on an AMD GPU",
        value=where,
        bound="an AMD GPU under ROCm, or CPU tensors with TRITON_INTERPRET=1 or "
        "NSA_PORT_EMULATE=<arch>",
        remedy="move the tensors to an AMD GPU, or use the backend torch",
    )


BACKEND = RocmBackend()
