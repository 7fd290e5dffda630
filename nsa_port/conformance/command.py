"""`nsa-port conformance`: run the suite on a backend and write its reports."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from nsa_port import environment as machine
from nsa_port import registry, settings
from nsa_port.backends.interface import Backend
from nsa_port.conformance import LEVELS, page, report, runner
from nsa_port.conformance.case import (
    FAIL,
    OPTIONAL,
    PASS,
    REQUIRED,
    UNSUPPORTED,
    Case,
    Result,
    backend_named,
    default_device,
    matching,
    stand_in,
)
from nsa_port.conformance.cases import CASES

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*REQUIRED, *OPTIONAL)}
_PLAIN_LINES_EVERY = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", help="whom to test; by default whom automatic choice takes")
    parser.add_argument(
        "--level",
        type=int,
        choices=tuple(LEVELS),
        help="run levels 0 to LEVEL; by default the level that the backend declares",
    )
    parser.add_argument("--device", help="by default the one that the backend is made for")
    parser.add_argument(
        "--dtype", action="append", choices=tuple(_DTYPES), help="only this one; may be repeated"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="only cases whose id has TEXT"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="run in N processes")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write JSON, JUnit and HTML there")
    parser.add_argument("--list", action="store_true", help="list the cases and run nothing")


def main(args: argparse.Namespace) -> int:
    """Run the suite; 0 if the backend conforms, 1 if it does not, 2 if it cannot be asked."""
    try:
        backend = backend_named(args.backend) if args.backend else automatic_backend()
    except registry.UnknownBackend as error:
        print(error, file=sys.stderr)
        return 2
    level = backend.level if args.level is None else args.level
    cases = [case for case in matching(CASES, args.only) if case.level <= level]
    if args.list:
        _list(cases)
        return 0
    device = torch.device(args.device) if args.device else default_device(backend)
    dtypes = tuple(_DTYPES[name] for name in args.dtype) if args.dtype else None
    plan = runner.Plan(backend, device, cases, dtypes)
    print(_heading(plan, level))
    start = time.perf_counter()
    results = runner.run(plan, progress(), jobs=args.jobs)
    seconds = time.perf_counter() - start
    partial = bool(args.only or args.dtype)
    found = report.document(plan, level, results, seconds, partial=partial)
    _print_summary(found)
    if args.out:
        for path in write(found, args.out):
            print(f"wrote {path}")
    return 0 if found["conforms"] else 1


def write(found: report.Document, folder: Path) -> list[Path]:
    """Write `conformance.json`, `.xml` (JUnit) and `.html` into the folder; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "conformance.json": json.dumps(found, indent=1) + "\n",
        "conformance.xml": report.junit(found),
        "conformance.html": page.render(found),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def automatic_backend() -> Backend:
    """The backend `NSA_PORT_BACKEND` names, else the first one that is at home on this machine."""
    request = registry.parse_request(settings.requested_backend())
    if request.default not in (None, "auto"):
        return backend_named(str(request.default))
    environment = machine.probe(machine.default_device())
    return next(
        backend
        for backend in registry.table()
        if backend.is_native(environment) and not backend.machine_reasons(environment)
    )


def progress() -> Callable[[int, int, Result | None], None]:
    """A bar on a terminal, else a line now and then; failures are told at once."""
    terminal = sys.stdout.isatty()
    start = last = time.perf_counter()

    def tell(done: int, total: int, result: Result | None) -> None:
        nonlocal last
        now = time.perf_counter()
        clear = "\r\033[K" if terminal else ""
        if result is not None and (result.outcome == FAIL or result.breach):
            print(f"{clear}{_describe(result)}", flush=True)
        text = f"{done}/{total}  {now - start:.0f} s"
        if terminal:
            filled = 30 * done // max(total, 1)
            name = result.id if result else ""
            bar = "█" * filled + "░" * (30 - filled)
            end = "\n" if done == total else ""
            print(f"{clear}{bar} {text}  {name[:40]}", end=end, flush=True)
        elif now - last > _PLAIN_LINES_EVERY or done == total:
            last = now
            print(text, flush=True)

    return tell


def _describe(result: Result) -> str:
    if result.outcome == FAIL:
        more = f" (and {len(result.messages) - 1} more)" if len(result.messages) > 1 else ""
        return f"FAIL {result.id}: {result.messages[0]}{more}"
    codes = ", ".join(reason.code for reason in result.reasons)
    return f"UNSUPPORTED within the declared level: {result.id}: {codes}"


def _heading(plan: runner.Plan, level: int) -> str:
    instead = stand_in(plan.backend, plan.device)
    where = f"{plan.device}" + (f" ({instead})" if instead else "")
    return (
        f"conformance of {plan.backend.name} on {where}, levels 0 to {level} "
        f"(declares {plan.backend.level}): {len(plan.runs())} runs of {len(plan.cases)} cases"
    )


def _print_summary(found: report.Document) -> None:
    summary = found["summary"]
    codes: dict[str, int] = {}
    for case in found["cases"]:
        for reason in case["reasons"]:
            codes[reason["code"]] = codes.get(reason["code"], 0) + 1
    told = ", ".join(f"{code} x {count}" for code, count in codes.items())
    _, words = report.verdict(found)
    print(
        f"{found['backend']['name']}: {words}. "
        f"{summary[PASS]} passed, {summary[FAIL]} failed, {summary[UNSUPPORTED]} unsupported"
        + (f" ({told})" if told else "")
        + (f", {summary['breaches']} of them within its level" if summary["breaches"] else "")
        + f", in {found['seconds']:.0f} s"
    )


def _list(cases: list[Case]) -> None:
    for case in cases:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in case.dtypes)
        print(f"{case.level}  {case.id:40}  {case.title}" + (f"  ({dtypes})" if dtypes else ""))
