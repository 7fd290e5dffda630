"""The backend `rocm`: Triton kernels tuned for AMD GPUs on their own terms."""

from __future__ import annotations

from collections.abc import Mapping

from nsa_port.backends.interface import Environment, Problem, Reason
from nsa_port.backends.triton_checks import dtype_reasons, triton_reasons

ARCHITECTURES = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")
_LEAST_TRITON = "3.6"


class RocmBackend:
    name = "rocm"
    level = 0
    kernels: Mapping[str, str] = {}

    def is_native(self, environment: Environment) -> bool:
        return environment.device_type == "cuda" and environment.hip_version is not None

    def machine_reasons(self, environment: Environment) -> tuple[Reason, ...]:
        found: list[Reason] = []
        if not self.kernels:
            found.append(
                Reason(
                    "no_kernels",
                    "this version of nsa_port has no kernels for rocm",
                    value="none",
                    bound="at least one operator",
                    remedy="use the backend torch, or a newer nsa_port",
                )
            )
        on_cpu = environment.device_type == "cpu"
        instead = environment.interpreter or environment.emulate
        if not (on_cpu and instead) and not self.is_native(environment):
            found.append(
                Reason(
                    "no_device",
                    f"the tensors are on {environment.device_name or environment.device_type}, "
                    "not on an AMD GPU",
                    value=environment.device_name or environment.device_type,
                    bound="an AMD GPU under ROCm, or CPU tensors with TRITON_INTERPRET=1 or "
                    "NSA_PORT_EMULATE=<arch>",
                    remedy="move the tensors to an AMD GPU, or use the backend torch",
                )
            )
        arch = environment.arch if self.is_native(environment) else environment.emulate
        if arch and arch not in ARCHITECTURES:
            found.append(
                Reason(
                    "arch_untuned",
                    f"{arch} has no table of its own",
                    value=arch,
                    bound=", ".join(ARCHITECTURES),
                    remedy="use the backend torch",
                )
            )
        return (
            *found,
            *triton_reasons(
                environment, least=_LEAST_TRITON, compiler="amd", distribution="nsa-port[rocm]"
            ),
        )

    def call_reasons(self, environment: Environment, problem: Problem) -> tuple[Reason, ...]:
        interpreted = environment.interpreter and not environment.emulate
        return dtype_reasons(self.name, problem, bfloat16=not interpreted)


BACKEND = RocmBackend()
