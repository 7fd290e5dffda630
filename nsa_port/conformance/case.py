"""What a case is, what it may do while it runs, and what comes out of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nsa_port import environment as machine
from nsa_port import registry
from nsa_port.backends.interface import Backend, Reason
from nsa_port.conformance import tolerance
from nsa_port.conformance.tolerance import Measurement

REQUIRED = (torch.float32, torch.float16, torch.bfloat16)
"""What every backend computes in; only an emulated or interpreted one may refuse some of it."""

OPTIONAL = (torch.float64,)
"""What a backend may leave to others."""

PASS, FAIL, UNSUPPORTED = "pass", "fail", "unsupported"


class Unsupported(Exception):
    """Raised by a case that this machine cannot hold or run, whatever the backend."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(str(reason))
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Case:
    """One property that every backend must have.

    Args:
        id: stable, for `--only`, reports and comparisons.
        level: where in the suite it stands, 0 to 5.
        title: the property, in a few words.
        shows: one sentence on what a failure would mean to users.
        check: raises or records; see `Context`.
        dtypes: in which dtypes it runs; empty if it does not depend on any.
        peers: the row of the table of other implementations' faults that it guards against.
    """

    id: str
    level: int
    title: str
    shows: str
    check: Callable[[Context], None]
    dtypes: tuple[torch.dtype, ...] = REQUIRED
    peers: str = ""


@dataclass(slots=True)
class Context:
    """What a running case knows, and where it puts what it finds.

    A case goes on after a finding, so that a report shows all of them.
    """

    backend: Backend
    device: torch.device
    dtype: torch.dtype = torch.float32
    measurements: list[Measurement] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.backend.name

    @property
    def slow(self) -> bool:
        """Whether kernels are interpreted or emulated here, so that cases try fewer sizes."""
        return bool(stand_in(self.backend, self.device))

    @property
    def reference_device(self) -> torch.device:
        """Where float64 is computed: not every accelerator has it."""
        return self.device if self.device.type in ("cpu", "cuda") else torch.device("cpu")

    def compare(
        self,
        name: str,
        actual: Tensor,
        exact: Tensor,
        plain: Tensor,
        *,
        exponent: float = 0.0,
        terms: float = 0.0,
    ) -> None:
        """Hold a tensor to the float64 reference; see `tolerance.measure`."""
        self.measurements += tolerance.measure(
            name, actual, exact, plain, exponent=exponent, terms=terms
        )

    def same(self, name: str, actual: Tensor, expected: Tensor) -> None:
        """Demand equality to the bit, NaN counting as equal to nothing."""
        if actual.shape != expected.shape or actual.dtype != expected.dtype:
            self.failures.append(f"{name}: {_form(actual)} instead of {_form(expected)}")
        elif not torch.equal(actual, expected):
            different = int((actual != expected).sum())
            self.failures.append(f"{name}: {different} of {actual.numel()} elements differ")

    def require(self, condition: bool, message: str) -> None:
        if not condition:
            self.failures.append(message)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def under(self, label: str) -> Under:
        """Give what is found inside a `with` block a label, e.g. the length at hand."""
        return Under(self, label)


class Under:
    """See `Context.under`."""

    def __init__(self, context: Context, label: str) -> None:
        self._context, self._label = context, label

    def __enter__(self) -> None:
        self._start = len(self._context.measurements), len(self._context.failures)

    def __exit__(self, *_: object) -> None:
        measured, failed = self._start
        found, failures = self._context.measurements, self._context.failures
        found[measured:] = [
            Measurement(f"{self._label}: {m.name}", m.error, m.budget) for m in found[measured:]
        ]
        failures[failed:] = [f"{self._label}: {text}" for text in failures[failed:]]


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one case in one dtype.

    Args:
        error, budget: of the measurement that used most of its budget; None where nothing was
            measured, `error` also where it is not finite.
        breach: the case is unsupported although the backend declares its level.
        excused: it is unsupported where no backend is asked for more: an optional dtype, a dtype
            that what stands in for the hardware cannot compute, a machine too small.
    """

    case: Case
    dtype: torch.dtype | None
    outcome: str
    seconds: float
    measurements: tuple[Measurement, ...] = ()
    failures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    reasons: tuple[Reason, ...] = ()
    breach: bool = False
    excused: bool = False

    @property
    def worst(self) -> Measurement | None:
        return max(self.measurements, key=lambda m: m.ratio, default=None)

    @property
    def dtype_name(self) -> str:
        return "" if self.dtype is None else str(self.dtype).removeprefix("torch.")

    @property
    def id(self) -> str:
        return f"{self.case.id}[{self.dtype_name}]" if self.dtype else self.case.id

    @property
    def messages(self) -> tuple[str, ...]:
        """Everything that failed, in words."""
        broken = [m for m in self.measurements if not m.holds]
        broken.sort(key=lambda m: -m.ratio)
        return (*self.failures, *(_over_budget(m) for m in broken))


def outcome_of(context: Context) -> str:
    """Pass, unless something was found; see `Context`."""
    failed = context.failures or not all(m.holds for m in context.measurements)
    return FAIL if failed else PASS


def stand_in(backend: Backend, device: torch.device) -> str:
    """What runs the backend's kernels instead of its hardware: `""` if nothing does."""
    environment = machine.probe(device)
    architecture = machine.emulated_architecture(backend.name, environment)
    if architecture:
        return f"emulated {architecture}"
    if backend.is_native(environment) or device.type != "cpu":
        return ""
    return "Triton's interpreter" if environment.interpreter else ""


def default_device(backend: Backend) -> torch.device:
    """The accelerator if the backend is made for it, else the CPU."""
    device = machine.default_device()
    return device if backend.is_native(machine.probe(device)) else torch.device("cpu")


def backend_named(name: str) -> Backend:
    """The backend called `name`.

    Raises:
        UnknownBackend: nobody knows it; the text lists the names.
    """
    registry.parse_request(name)
    return next(backend for backend in registry.table() if backend.name == name)


def matching(cases: Iterable[Case], patterns: Iterable[str]) -> list[Case]:
    """The cases whose id contains one of the patterns; all of them if there is none."""
    wanted = list(patterns)
    return [case for case in cases if not wanted or any(text in case.id for text in wanted)]


def _over_budget(measurement: Measurement) -> str:
    if math.isinf(measurement.error):
        return f"{measurement.name}: NaN or infinity in the wrong place"
    return (
        f"{measurement.name}: error {measurement.error:.3g} exceeds the budget "
        f"{measurement.budget:.3g}"
    )


def _form(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"
