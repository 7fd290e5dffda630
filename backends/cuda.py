"""The backend `cuda`: Triton kernels tuned for NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from nsa_port.backends.interface import OPERATORS, Environment, Problem, Reason
from nsa_port.backends.triton_checks import dtype_reasons, head_dim_reasons, triton_reasons

_NVIDIA_NAMES = ("NVIDIA", "Tesla", "Quadro", "GeForce", "TITAN", "GRID")
_LEAST_TRITON = "3.6"
_LEAST_ARCH = 80


class CudaBackend:
    name = "cuda"
    level = 5
    conforming: Collection[str] = ("sm_90",)
    """The architectures on whose hardware the suite passed; automatic choice takes no other."""
    kernels: Mapping[str, str] = dict.fromkeys(OPERATORS, "nsa_port.kernels.triton")

    def is_native(self, environment: Environment) -> bool:
        return _is_nvidia(environment)

    def machine_reasons(self, environment: Environment) -> tuple[Reason, ...]:
        found: list[Reason] = []
        interpreted = environment.interpreter and environment.device_type == "cpu"
        if not interpreted and not _is_nvidia(environment):
            found.append(_no_device(environment))
        elif not interpreted:
            found += self._gpu_reasons(environment)
        return (
            *found,
            *triton_reasons(
                environment, least=_LEAST_TRITON, compiler="nvidia", distribution="triton"
            ),
        )

    def _gpu_reasons(self, environment: Environment) -> tuple[Reason, ...]:
        found: list[Reason] = []
        if environment.arch not in self.conforming:
            found.append(
                Reason(
                    "not_conforming",
                    f"the suite has not been run on {environment.arch or 'this GPU'}",
                    value="no recorded run",
                    bound=", ".join(self.conforming),
                    remedy="check it with `nsa-port conformance --backend cuda`, then force it: "
                    "backend='cuda'",
                    soft=True,
                )
            )
        if _arch_number(environment.arch) < _LEAST_ARCH:
            found.append(
                Reason(
                    "arch_too_old",
                    f"the GPU is {environment.arch}",
                    value=environment.arch,
                    bound=f"sm_{_LEAST_ARCH} or newer",
                    remedy="use the backend torch",
                )
            )
        return tuple(found)

    def call_reasons(self, environment: Environment, problem: Problem) -> tuple[Reason, ...]:
        return (
            *dtype_reasons(self.name, problem, bfloat16=not environment.interpreter),
            *head_dim_reasons(problem),
        )


def _is_nvidia(environment: Environment) -> bool:
    """Several vendors present themselves as torch's `cuda`; the device's name tells them apart."""
    return (
        environment.device_type == "cuda"
        and environment.hip_version is None
        and environment.device_name.startswith(_NVIDIA_NAMES)
    )


def _arch_number(arch: str) -> int:
    digits = arch.removeprefix("sm_")
    return int(digits) if digits.isdigit() else 0


def _no_device(environment: Environment) -> Reason:
    if environment.device_type == "cuda" and environment.hip_version is None:
        return Reason(
            "device_not_nvidia",
            f"the device {environment.device_name!r} calls itself cuda and is not NVIDIA's",
            value=environment.device_name,
            bound=f"a name that starts with {', '.join(_NVIDIA_NAMES)}",
            remedy="use the backend torch, or the vendor's plug-in",
        )
    where = "a ROCm device" if environment.hip_version else f"on {environment.device_type}"
    return Reason(
        "no_device",
        f"the tensors are {where}, not on an NVIDIA GPU",
        value=environment.device_name or environment.device_type,
        bound="an NVIDIA GPU, or CPU tensors with TRITON_INTERPRET=1",
        remedy="move the tensors to an NVIDIA GPU, or use the backend torch",
    )


BACKEND = CudaBackend()
