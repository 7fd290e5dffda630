"""What a run of the suite leaves behind: one document, as JSON and as JUnit."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import nsa_port
from nsa_port import environment as machine
from nsa_port import settings
from nsa_port.conformance import LEVELS, SUITE_VERSION
from nsa_port.conformance.case import FAIL, PASS, UNSUPPORTED, Result, stand_in
from nsa_port.conformance.runner import Plan

SCHEMA = 1
"""Of the JSON document; rises when a reader of the old one would misread the new one."""

Document = dict[str, Any]


def document(
    plan: Plan, level: int, results: Sequence[Result], seconds: float, *, partial: bool = False
) -> Document:
    """Everything there is to say of a run, in plain values.

    Args:
        partial: only some cases or dtypes of the levels were run.
    """
    counts = Counter(result.outcome for result in results)
    breaches = sum(result.breach for result in results)
    return {
        "schema": SCHEMA,
        "suite": {"version": SUITE_VERSION, "level": level, "partial": partial},
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 2),
        "backend": {
            "name": plan.backend.name,
            "declared_level": plan.backend.level,
            "stand_in": stand_in(plan.backend, plan.device),
        },
        "environment": _environment(plan),
        "git": _git_state(),
        "summary": {
            PASS: counts[PASS],
            FAIL: counts[FAIL],
            UNSUPPORTED: counts[UNSUPPORTED],
            "breaches": breaches,
        },
        "conforms": conforms(results),
        "reached": reached(level, results),
        "cases": [_case(result) for result in results],
    }


def conforms(results: Sequence[Result]) -> bool:
    """Nothing failed, and nothing is unsupported within the declared level."""
    return bool(results) and not any(r.outcome == FAIL or r.breach for r in results)


def reached(level: int, results: Sequence[Result]) -> int:
    """The highest level up to which nothing failed and nothing is unsupported without excuse;
    -1 if there is none."""
    short = [
        result.case.level
        for result in results
        if result.outcome == FAIL or (result.outcome == UNSUPPORTED and not result.excused)
    ]
    return min([level, *(low - 1 for low in short)])


def verdict(found: Mapping[str, Any]) -> tuple[str, str]:
    """In an outcome's word and in a few: whether the backend conforms, and how far."""
    summary, level = found["summary"], found["suite"]["level"]
    if found["suite"]["partial"]:
        short = summary[FAIL] + summary["breaches"]
        if short:
            return FAIL, f"{short} of the chosen runs fall short"
        return (PASS, "The chosen runs hold") if summary[PASS] else (UNSUPPORTED, "Nothing ran")
    if not found["conforms"]:
        return FAIL, f"Does not conform to level {min(level, found['backend']['declared_level'])}"
    if found["reached"] < 0:
        return UNSUPPORTED, "Conforms to no level"
    missing = sum(case["excused"] for case in found["cases"])
    told = f", {missing} runs not possible here" if missing else ""
    return PASS, f"Conforms to level {found['reached']}{told}"


def _case(result: Result) -> Document:
    worst = result.worst
    return {
        "id": result.id,
        "case": result.case.id,
        "level": result.case.level,
        "title": result.case.title,
        "shows": result.case.shows,
        "peers": result.case.peers,
        "dtype": result.dtype_name,
        "outcome": result.outcome,
        "breach": result.breach,
        "excused": result.excused,
        "measured": len(result.measurements),
        "worst": worst.name if worst else "",
        "error": _finite(worst.error) if worst else None,
        "budget": _finite(worst.budget) if worst else None,
        "ratio": _finite(worst.ratio) if worst else None,
        "seconds": round(result.seconds, 3),
        "failures": list(result.messages),
        "notes": list(result.notes),
        "reasons": [asdict(reason) for reason in result.reasons],
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity: None stands for it."""
    return value if math.isfinite(value) else None


def _environment(plan: Plan) -> Document:
    found = machine.probe(plan.device)
    triton = found.triton
    return {
        "nsa_port": nsa_port.__version__,
        "device": str(plan.device),
        "device_name": found.device_name or _processor(),
        "arch": found.arch or platform.machine(),
        "torch": found.torch_version,
        "triton": triton.version if triton else "",
        "cuda": found.cuda_version or "",
        "hip": found.hip_version or "",
        "python": platform.python_version(),
        "os": platform.platform(),
        "settings": {name: settings.value(name) for name in settings.VARIABLES},
        "interpreter": found.interpreter,
        "emulate": found.emulate,
    }


def _processor() -> str:
    """The CPU's name; Linux tells it only in a file."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(errors="replace").splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git_state() -> Document | None:
    """Commit and cleanliness if the package runs from a checkout, None if it is installed."""
    folder = Path(nsa_port.__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = git("rev-parse", "HEAD")
    return None if commit is None else {"commit": commit, "dirty": bool(git("status", "-s"))}


def read(path: Path) -> Document:
    """A document that the command wrote.

    Raises:
        ValueError: it is no such document, or of a schema this version does not know.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        schema = found.get("schema") if isinstance(found, dict) else None
        raise ValueError(f"{path} is no conformance result of schema {SCHEMA}: found {schema!r}")
    return found


def junit(found: Mapping[str, Any]) -> str:
    """The same as JUnit XML: a suite per level, unsupported as skipped unless it is a breach."""
    root = ElementTree.Element("testsuites", name=f"nsa_port conformance: {_who(found)}")
    for level, title in LEVELS.items():
        cases = [case for case in found["cases"] if case["level"] == level]
        if not cases:
            continue
        failed = [case for case in cases if case["outcome"] == FAIL or case["breach"]]
        skipped = [case for case in cases if case["outcome"] == UNSUPPORTED and not case["breach"]]
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=f"level {level}: {title}",
            tests=str(len(cases)),
            failures=str(len(failed)),
            skipped=str(len(skipped)),
            time=f"{sum(case['seconds'] for case in cases):.3f}",
        )
        for case in cases:
            _junit_case(suite, case)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _junit_case(suite: ElementTree.Element, case: Mapping[str, Any]) -> None:
    entry = ElementTree.SubElement(
        suite,
        "testcase",
        classname=f"nsa_port.conformance.level{case['level']}",
        name=case["id"],
        time=f"{case['seconds']:.3f}",
    )
    reasons = "; ".join(f"[{reason['code']}] {reason['message']}" for reason in case["reasons"])
    if case["outcome"] == FAIL:
        text = "\n".join(case["failures"])
        ElementTree.SubElement(entry, "failure", message=text.split("\n")[0]).text = text
    elif case["breach"]:
        message = f"unsupported within the declared level: {reasons}"
        ElementTree.SubElement(entry, "failure", message=message)
    elif case["outcome"] == UNSUPPORTED:
        ElementTree.SubElement(entry, "skipped", message=reasons)


def _who(found: Mapping[str, Any]) -> str:
    return f"{found['backend']['name']} on {found['environment']['device_name']}"
