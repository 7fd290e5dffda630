"""What the registry would do and why, for people."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nsa_port import environment as machine
from nsa_port import ops, registry
from nsa_port.backends.interface import PARTS, Backend, Reason
from nsa_port.kernels.geometry import Layout, NSAConfig


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """Whether a backend can run anything on this machine, and every reason if not.

    One with soft reasons alone is available to whoever forces it.
    """

    name: str
    available: bool
    level: int
    device: str
    reasons: tuple[Reason, ...]

    def __str__(self) -> str:
        head = f"{self.name}: not available"
        if self.available:
            forced = " when forced" if self.reasons else ""
            head = f"{self.name}: available on {self.device}{forced}, level {self.level}"
        return "\n".join([head, *(f"  {why}" for why in self.reasons)])


def backends() -> tuple[BackendStatus, ...]:
    """Every known backend: its name, whether it is available here, its level, and why not.

    Available means on this machine's accelerator, or on the CPU; a backend that only emulates or
    interprets there is available while the variable that asks for it is set.
    """
    return tuple(_status(backend) for backend in registry.table())


def _status(backend: Backend) -> BackendStatus:
    default = machine.default_device()
    devices = [default] if default.type == "cpu" else [default, torch.device("cpu")]
    found = [backend.machine_reasons(machine.probe(device)) for device in devices]
    for device, reasons in zip(devices, found, strict=True):
        if all(reason.soft for reason in reasons):
            return BackendStatus(backend.name, True, backend.level, device.type, reasons)
    return BackendStatus(backend.name, False, backend.level, "", found[0])


@dataclass(frozen=True, slots=True)
class Explanation:
    """Which backend each operator of a call takes; iterate over it for the single choices."""

    choices: tuple[registry.Choice, ...]

    def __iter__(self) -> Iterator[registry.Choice]:
        return iter(self.choices)

    def __getitem__(self, operator: str) -> registry.Choice:
        return {choice.operator: choice for choice in self.choices}[operator]

    @property
    def backends(self) -> dict[str, str | None]:
        """Operator -> the name of its backend, None where nothing can run it."""
        return {c.operator: c.backend.name if c.backend else None for c in self.choices}

    def __str__(self) -> str:
        lines = []
        for choice in self.choices:
            chosen = choice.backend.name if choice.backend else "nothing"
            lines.append(f"{choice.operator}: {chosen}{' (forced)' if choice.forced else ''}")
            for name, reasons in choice.rejected:
                lines += [f"  not {name}: {reason}" for reason in reasons]
        return "\n".join(lines)


def explain(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    cfg: NSAConfig,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    positions: Tensor | None = None,
    backend: str | None = None,
) -> Explanation:
    """Which backend each operator would take for this call of `nsa_attention`, and why no other.

    Runs nothing, and raises nothing for a backend that cannot run the call.

    Raises:
        UnknownBackend: a name nobody knows.
    """
    tensors = (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates)
    cu_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    layout = Layout(k_slc.shape[1], cu_seqlens, cu_k, positions)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    problem = ops.whole_problem(tensors, cfg, layout, needs_grad)
    request = registry.request_text(backend)
    return Explanation(
        tuple(
            registry.answer(replace(problem, operator=part), q.device, request, part=True)
            for part in PARTS
        )
    )
