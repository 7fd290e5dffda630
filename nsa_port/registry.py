"""Which backend runs a call, and why the others do not.

`select` is a pure function of the backends, the environment, the problem and the request; all
else here gathers its arguments or tells people its answer.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from nsa_port import environment as machine
from nsa_port import settings
from nsa_port.backends.interface import (
    OPERATORS,
    PARTS,
    Backend,
    Environment,
    Problem,
    Reason,
)

BUILT_IN = {
    "cuda": "nsa_port.backends.cuda:BACKEND",
    "rocm": "nsa_port.backends.rocm:BACKEND",
    "torch": "nsa_port.backends.torch:BACKEND",
}
"""Every built-in backend, in the order of automatic choice; plug-ins come before `torch`."""

ENTRY_POINTS = "nsa_port.backends"


class BackendUnavailable(RuntimeError):
    """No backend may run the call: the text gives its shapes and every reason with a remedy.

    Args:
        reasons: the same reasons as values, for programs.
    """

    def __init__(self, message: str, reasons: tuple[Reason, ...] = ()) -> None:
        super().__init__(message)
        self.reasons = reasons


class UnknownBackend(BackendUnavailable, ValueError):
    """A backend or operator name that nobody knows; the text lists the known ones."""


# --------------------------------------------------------------------------- requests


@dataclass(frozen=True, slots=True)
class Request:
    """What a user asked for: `cuda`, `select_blocks=torch`, or `cuda,select_blocks=torch`."""

    default: str | None = None
    per_operator: Mapping[str, str] = field(default_factory=dict)

    def backend_for(self, operator: str, *, part: bool = False) -> str | None:
        """The name asked for, None if this request leaves the operator open.

        A `part` of `nsa_attention` obeys what is said of the whole, unless it is named itself.
        """
        whole = self.per_operator.get("nsa_attention") if part else None
        return self.per_operator.get(operator) or whole or self.default


@functools.lru_cache(maxsize=64)
def parse_request(text: str) -> Request:
    """Read the grammar of `NSA_PORT_BACKEND`, `use_backend` and `backend=`."""
    default: str | None = None
    per_operator: dict[str, str] = {}
    known = (*names(), "auto")
    for item in filter(None, (item.strip() for item in text.split(","))):
        operator, equals, name = (piece.strip() for piece in item.rpartition("="))
        if equals and operator not in OPERATORS:
            raise UnknownBackend(
                f"unknown operator {operator!r} in backend request {text!r}; "
                f"operators: {', '.join(OPERATORS)}"
            )
        if name not in known:
            raise UnknownBackend(
                f"unknown backend {name!r} in backend request {text!r}; "
                f"backends: {', '.join(known)}"
            )
        if (operator in per_operator) if equals else (default is not None):
            raise ValueError(f"backend request {text!r} names {operator or 'the default'} twice")
        if equals:
            per_operator[operator] = name
        else:
            default = name
    return Request(default, per_operator)


_override: str = ""


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Force a backend for every call inside the block, in the grammar of `NSA_PORT_BACKEND`.

    Like `torch.nn.attention.sdpa_kernel` it holds for the whole process, so that compiled code,
    which guards on it, and autograd's threads obey it too; use `backend=` to tell threads apart.

    Raises:
        UnknownBackend: a name nobody knows.
    """
    global _override
    parse_request(backend)
    previous, _override = _override, backend
    try:
        yield
    finally:
        _override = previous


def request_text(backend: str | None) -> str:
    """What the call itself asks for: its argument, else `use_backend`, else nothing."""
    return _override if backend is None else backend


# --------------------------------------------------------------------------- the table


class BrokenBackend:
    """Stands in for a plug-in that could not be imported, so that the failure is a reason."""

    level = 0
    kernels: Mapping[str, str] = {}

    def __init__(self, name: str, origin: str, error: Exception) -> None:
        self.name = name
        self._reason = Reason(
            "plugin_broken",
            f"the plug-in {name!r} ({origin}) cannot be imported: {type(error).__name__}: {error}",
            value=f"{type(error).__name__}: {error}",
            bound="an importable object with the attributes of nsa_port.backends.interface.Backend",
            remedy="repair or uninstall the distribution that registers it",
        )

    def is_native(self, environment: Environment) -> bool:
        return False

    def machine_reasons(self, environment: Environment) -> tuple[Reason, ...]:
        return (self._reason,)

    def call_reasons(self, environment: Environment, problem: Problem) -> tuple[Reason, ...]:
        return ()


@functools.lru_cache(maxsize=1)
def table() -> tuple[Backend, ...]:
    """Every known backend, in the order of automatic choice."""
    built_in: dict[str, Backend] = {name: _load(target) for name, target in BUILT_IN.items()}
    plugins: dict[str, Backend] = {}
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            backend: Backend = point.load()
            if point.name in built_in or point.name in plugins:
                raise ValueError(f"the name {point.name!r} is taken")
            _ = backend.name, backend.level, backend.kernels
            plugins[point.name] = backend
        except Exception as error:  # a plug-in's fault is a reason, not ours to raise
            name = point.name if point.name not in built_in else f"{point.name} ({point.value})"
            plugins[name] = BrokenBackend(name, point.value, error)
    fallback = built_in.pop("torch")
    return (*built_in.values(), *plugins.values(), *_plugged, fallback)


_plugged: tuple[Backend, ...] = ()


@contextmanager
def plug_in(*backends: Backend) -> Iterator[None]:
    """Know more backends inside the block, as if plug-ins had registered them.

    Raises:
        ValueError: a name is taken.
    """
    global _plugged
    taken = {*names(), "auto"} & {backend.name for backend in backends}
    if taken:
        raise ValueError(f"backend names already taken: {', '.join(sorted(taken))}")
    previous, _plugged = _plugged, (*_plugged, *backends)
    _forget_table()
    try:
        yield
    finally:
        _plugged = previous
        _forget_table()


def _forget_table() -> None:
    for cached in (table, parse_request, _first_choice, _first_choices):
        cached.cache_clear()


def _load(target: str) -> Backend:
    module, _, attribute = target.partition(":")
    backend: Backend = getattr(importlib.import_module(module), attribute)
    return backend


def names() -> tuple[str, ...]:
    """The names of every known backend."""
    return tuple(backend.name for backend in table())


# --------------------------------------------------------------------------- the decision


@dataclass(frozen=True, slots=True)
class Choice:
    """The answer for one operator: the backend that runs it, or None, and all reasons against
    the others."""

    problem: Problem
    backend: Backend | None
    forced: str | None
    rejected: tuple[tuple[str, tuple[Reason, ...]], ...]
    passed_over: tuple[str, ...] = ()

    @property
    def operator(self) -> str:
        return self.problem.operator

    def reasons_against(self, name: str) -> tuple[Reason, ...]:
        return dict(self.rejected).get(name, ())


def reasons(
    backend: Backend, environment: Environment, problem: Problem, *, forced: bool = False
) -> tuple[Reason, ...]:
    """Every reason why `backend` does not run `problem` here; soft ones do not count if forced."""
    found = backend.machine_reasons(environment)
    operators: tuple[str, ...] = (problem.operator,)
    if problem.operator == "nsa_attention" and "nsa_attention" not in backend.kernels:
        operators = PARTS
    missing = [operator for operator in operators if operator not in backend.kernels]
    if missing and not found:
        found = (
            Reason(
                "operator_not_implemented",
                f"{backend.name} has no kernel for {', '.join(missing)}",
                value=", ".join(missing),
                bound=", ".join(backend.kernels) or "no operator",
                remedy=f"NSA_PORT_BACKEND={backend.name},{missing[0]}=torch",
            ),
        )
    found = (*found, *backend.call_reasons(environment, problem))
    return tuple(reason for reason in found if not (forced and reason.soft))


def select(
    backends: Sequence[Backend], environment: Environment, problem: Problem, name: str | None
) -> Choice:
    """Choose for one operator: the backend called `name`, or automatically if that is None.

    Automatic choice takes the first native backend without a reason against it.
    """
    forced = None if name == "auto" else name
    chosen: Backend | None = None
    rejected: list[tuple[str, tuple[Reason, ...]]] = []
    passed_over: list[str] = []
    for backend in backends:
        against = reasons(backend, environment, problem, forced=backend.name == forced)
        wanted = backend.name == forced if forced else backend.is_native(environment)
        if chosen is None and wanted and not against:
            chosen = backend
            continue
        if forced is None and wanted and chosen is None:
            passed_over.append(backend.name)
        if not against:
            against = (_not_chosen(backend.name, forced, chosen),)
        rejected.append((backend.name, against))
    return Choice(problem, chosen, forced, tuple(rejected), tuple(passed_over))


def _not_chosen(name: str, forced: str | None, chosen: Backend | None) -> Reason:
    if forced is not None:
        message = f"{forced} is forced"
    elif chosen is not None:
        message = f"{chosen.name} comes first in automatic choice"
    else:
        message = "it is not made for this hardware and is only taken when forced"
    return Reason("not_chosen", message, remedy=f"backend={name!r} forces it")


# --------------------------------------------------------------------------- calls


def choose(problem: Problem, device: torch.device, request: str, *, part: bool = False) -> Backend:
    """Choose for a call on `device`; `request` is the call's own text, see `request_text`.

    Raises:
        BackendUnavailable: the forced backend cannot run it, nothing can, or automatic choice
            would fall back under `NSA_PORT_FALLBACK=error`.
    """
    name = _requested(problem, _texts(request), part=part)
    backend = _first_choice(problem, machine.probe(device), name)
    return backend or _choose_slowly(problem, device, request, part=part)


def _choose_slowly(problem: Problem, device: torch.device, request: str, *, part: bool) -> Backend:
    """Choose where the first backend in question does not take the call: gather all reasons."""
    choice = answer(problem, device, request, part=part)
    if choice.backend is None:
        asked = [found for name, found in choice.rejected if choice.forced in (None, name)]
        raise BackendUnavailable(_failure(choice), sum(asked, ()))
    _tell_fallback(choice)
    return choice.backend


@functools.lru_cache(maxsize=1024)
def _first_choice(problem: Problem, environment: Environment, name: str | None) -> Backend | None:
    """The backend that `select` would look at first, if it takes the call.

    Every call comes by here, most of them again and again; `answer` gathers the reasons only when
    somebody needs them.
    """
    for backend in table():
        if backend.name == name or (name in (None, "auto") and backend.is_native(environment)):
            forced = backend.name == name
            return None if reasons(backend, environment, problem, forced=forced) else backend
    return None


def answer(problem: Problem, device: torch.device, request: str, *, part: bool) -> Choice:
    """The whole answer for a call: the choice, and every reason against every other backend."""
    name = _requested(problem, _texts(request), part=part)
    return select(table(), machine.probe(device), problem, name)


def _texts(request: str) -> tuple[str, str]:
    """What is asked for, what counts more first: by the call, by the environment variable."""
    return request, settings.requested_backend()


def _requested(problem: Problem, texts: tuple[str, str], *, part: bool) -> str | None:
    for text in texts:
        name = parse_request(text).backend_for(problem.operator, part=part)
        if name:
            return name
    return None


def choose_parts(problem: Problem, device: torch.device, request: str) -> dict[str, Backend]:
    """Choose for every part of `nsa_attention`; operator -> backend, in `PARTS`' order."""
    first = _first_choices(problem, machine.probe(device), _texts(request))
    return {
        operator: backend
        or _choose_slowly(replace(problem, operator=operator), device, request, part=True)
        for operator, backend in zip(PARTS, first, strict=True)
    }


@functools.lru_cache(maxsize=1024)
def _first_choices(
    problem: Problem, environment: Environment, texts: tuple[str, str]
) -> tuple[Backend | None, ...]:
    """`_first_choice` of every part."""
    parts = (replace(problem, operator=operator) for operator in PARTS)
    return tuple(
        _first_choice(part, environment, _requested(part, texts, part=True)) for part in parts
    )


def kernel(backend: Backend, operator: str, device: torch.device, suffix: str = "") -> Callable:
    """The function that runs `operator` (its backward with suffix `_backward`) on `device`."""
    module = importlib.import_module(backend.kernels[operator])
    function: Callable | None = getattr(module, operator + suffix, None)
    if function is None:
        reason = Reason(
            "operator_not_implemented",
            f"{backend.name} runs {operator} but has no {operator}{suffix}: "
            f"{module.__name__} does not define it",
            value="missing",
            bound=f"{module.__name__}.{operator}{suffix}",
            remedy=f"NSA_PORT_BACKEND={backend.name},{operator}=torch",
        )
        raise BackendUnavailable(str(reason), (reason,))
    if device.type != "cpu":
        return function
    architecture = machine.emulated_architecture(backend.name, machine.probe(device))
    return _on_emulated(architecture, function) if architecture else function


def _on_emulated(architecture: str, function: Callable) -> Callable:
    """The function with its kernels launched on an emulated GPU, and Triton's driver kept."""
    from nsa_port.emulator import using  # needs numpy and triton: nobody else may import it

    def run(*args: Any) -> Any:
        with using(architecture):
            return function(*args)

    return run


def _failure(choice: Choice) -> str:
    asked = [item for item in choice.rejected if choice.forced in (None, item[0])]
    head = f"the forced backend {choice.forced}" if choice.forced else "no backend"
    verb = "cannot" if choice.forced else "can"
    lines = [f"{head} {verb} run {choice.problem}:"]
    lines += [f"  {name}: {reason}" for name, found in asked for reason in found]
    return "\n".join(lines)


def _tell_fallback(choice: Choice) -> None:
    """Warn, once per cause, that automatic choice passed a native backend over."""
    causes = tuple(
        (name, tuple(reason.code for reason in choice.reasons_against(name)))
        for name in choice.passed_over
    )
    if settings.fallback_is_error():
        raise BackendUnavailable(
            f"NSA_PORT_FALLBACK=error forbids to fall back:\n{_fallback_text(choice)}"
        )
    if causes not in _told:
        _told.add(causes)
        warnings.warn(_fallback_text(choice), settings.NSAPortWarning, stacklevel=2)


_told: set[tuple[tuple[str, tuple[str, ...]], ...]] = set()


def _fallback_text(choice: Choice) -> str:
    assert choice.backend is not None
    lines = [f"{choice.problem} runs on {choice.backend.name} because"]
    for name in choice.passed_over:
        lines += [f"  {name}: {reason}" for reason in choice.reasons_against(name)]
    return "\n".join(lines)
