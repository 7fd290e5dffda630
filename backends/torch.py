"""The backend `torch`: PyTorch's own operations, on every device PyTorch has."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nsa_port.backends.interface import OPERATORS, Environment, Problem, Reason

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class TorchBackend:
    name = "torch"
    level = 5
    kernels: Mapping[str, str] = dict.fromkeys(OPERATORS, "nsa_port.kernels.eager")

    def is_native(self, environment: Environment) -> bool:
        return True

    def machine_reasons(self, environment: Environment) -> tuple[Reason, ...]:
        return ()

    def call_reasons(self, environment: Environment, problem: Problem) -> tuple[Reason, ...]:
        if problem.dtype in _DTYPES:
            return ()
        return (
            Reason(
                "dtype_unsupported",
                f"torch does not compute in {problem.dtype}",
                value=str(problem.dtype),
                bound=", ".join(map(str, _DTYPES)),
                remedy="convert the tensors",
            ),
        )


BACKEND = TorchBackend()
