"""Runs cases on a backend and turns whatever happens into results."""

from __future__ import annotations

import gc
import multiprocessing
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch

from nsa_port.backends.interface import Backend, Reason
from nsa_port.conformance.case import (
    FAIL,
    OPTIONAL,
    UNSUPPORTED,
    Case,
    Context,
    Result,
    Unsupported,
    backend_named,
    outcome_of,
    stand_in,
)
from nsa_port.conformance.poison import uninitialised_memory_is_nan
from nsa_port.registry import BackendUnavailable, UnknownBackend

_POISONED_LEVELS = (1, 2, 3)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run: cases on a backend and device, each in its dtypes as far as they are wanted.

    Args:
        dtypes: None for all.
    """

    backend: Backend
    device: torch.device
    cases: Sequence[Case]
    dtypes: tuple[torch.dtype, ...] | None = None

    def runs(self) -> list[tuple[Case, torch.dtype | None]]:
        found: list[tuple[Case, torch.dtype | None]] = []
        for case in self.cases:
            if not case.dtypes:
                found.append((case, None))
            found += [(case, t) for t in case.dtypes if self.dtypes is None or t in self.dtypes]
        return found


def run(
    plan: Plan, tell: Callable[[int, int, Result | None], None], *, jobs: int = 1
) -> list[Result]:
    """Run everything in the plan; `tell(done, total, latest result)` hears of progress.

    Args:
        jobs: how many processes share the work. More than one know built-in cases, and the
            backends that are built in or registered by entry point.
    """
    runs = plan.runs()
    tell(0, len(runs), None)
    found: dict[int, Result] = {}
    for at, result in _in_turn(plan) if jobs == 1 else _side_by_side(plan, jobs):
        found[at] = result
        tell(len(found), len(runs), result)
    return [found[at] for at in range(len(runs))]


def _in_turn(plan: Plan) -> Iterator[tuple[int, Result]]:
    for at, (case, dtype) in enumerate(plan.runs()):
        yield at, run_case(case, plan.backend, plan.device, dtype)


def _side_by_side(plan: Plan, jobs: int) -> Iterator[tuple[int, Result]]:
    """In the order they end; the longest tend to come last in a plan and are started first."""
    runs = plan.runs()
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, fresh, _begin) as pool:
        where = plan.backend.name, str(plan.device)
        waiting = {
            pool.submit(_run_by_name, runs[at][0].id, *where, runs[at][1]): at
            for at in reversed(range(len(runs)))
        }
        for done in as_completed(waiting):
            at = waiting[done]
            yield at, Result(case=runs[at][0], **done.result())


def _begin() -> None:
    """Make this process one of several that only run cases.

    Compiled and emulated kernels are many objects that stay: looking for garbage among them as
    often as Python does by itself took a tenth of the time.
    """
    torch.set_num_threads(1)
    gc.set_threshold(50_000)


def _run_by_name(case: str, backend: str, device: str, dtype: torch.dtype | None) -> dict[str, Any]:
    """What `run_case` finds, without the case: its check cannot go from process to process."""
    from nsa_port.conformance import cases

    result = run_case(cases.case(case), backend_named(backend), torch.device(device), dtype)
    return {at.name: getattr(result, at.name) for at in fields(result) if at.name != "case"}


def run_case(
    case: Case, backend: Backend, device: torch.device, dtype: torch.dtype | None = None
) -> Result:
    """Run one case in one dtype. Never raises: an unexpected error is a failure."""
    context = Context(backend, device, dtype or torch.float32)
    start = time.perf_counter()
    reasons: tuple[Reason, ...] = ()
    excused = False
    try:
        with warnings.catch_warnings(), _prepared(case.level in _POISONED_LEVELS):
            warnings.simplefilter("ignore")
            case.check(context)
        outcome = outcome_of(context)
    except UnknownBackend:
        raise
    except BackendUnavailable as error:
        outcome, reasons = UNSUPPORTED, error.reasons
        excused = _excused(backend, device, dtype, reasons)
    except Unsupported as error:
        outcome, reasons, excused = UNSUPPORTED, (error.reason,), True
    except Exception as error:
        outcome = FAIL
        context.failures.append(_describe(error))
    return Result(
        case=case,
        dtype=dtype,
        outcome=outcome,
        seconds=time.perf_counter() - start,
        measurements=tuple(context.measurements),
        failures=tuple(context.failures),
        notes=tuple(dict.fromkeys(context.notes)),
        reasons=reasons,
        breach=outcome == UNSUPPORTED and not excused and case.level <= backend.level,
        excused=excused,
    )


def _excused(
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype | None,
    reasons: tuple[Reason, ...],
) -> bool:
    """Whether a declared level leaves room for this refusal: an optional dtype, or a dtype that
    what stands in for the hardware cannot compute in."""
    only_dtype = all(reason.code == "dtype_unsupported" for reason in reasons)
    return only_dtype and (dtype in OPTIONAL or bool(stand_in(backend, device)))


@contextmanager
def _prepared(poison: bool) -> Iterator[None]:
    """Seeded; with `poison`, memory that is allocated and not yet written reads as NaN."""
    torch.manual_seed(0)
    with uninitialised_memory_is_nan() if poison else _nothing():
        yield


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _describe(error: Exception) -> str:
    """The error, and the innermost lines that led to it."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    trail = " < ".join(f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in reversed(frames))
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {' '.join(text)[:500]} ({trail})"
