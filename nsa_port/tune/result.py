"""What a search found, as text for people and as a table for the library."""

from __future__ import annotations

import json
from collections import Counter
from datetime import date
from typing import Any

import torch

from nsa_port.bench.command import machine_facts
from nsa_port.kernels import tables
from nsa_port.kernels.tables import Entry, Table, Values
from nsa_port.tune.search import Found, dims_of


def describe(found: Found) -> str:
    """The result for people: per kernel and shape the table's values next to the best."""
    unit = "cycles" if found.job.emulated else "ms"
    lines = [f"{found.job.arch}, {found.job.dtype}, {found.job.length} tokens, costs in {unit}"]
    for row in figures(found):
        lines.append(f"\n{row['shape']} {row['kernel']}: {row['tried']} candidates")
        for name in ("table", "best"):
            costs = row[f"{name}_costs"]
            told = ", ".join(f"{call} {cost:.4g}" for call, cost in costs.items())
            told = told or row["table_out"]
            lines.append(f"  {name:6}{told:40}  {_values_text(row[f'{name}_values'])}")
        lines += [f"  {count} out: {reason}" for reason, count in row["out"].items()]
    return "\n".join(lines)


def figures(found: Found) -> list[dict[str, Any]]:
    """What was measured, one row per shape and kernel."""
    rows = []
    for heads in found.shapes:
        for kernel in dict.fromkeys(trial.kernel for trial in found.trials):
            own = [t for t in found.trials if (t.job.heads, t.kernel) == (heads, kernel)]
            table = next(trial for trial in own if trial.shipped)
            values = found.best.get((kernel, dims_of(table)))
            best = next((trial for trial in own if trial.values == values), None)
            reasons = Counter(_kind(trial.verdict.out) for trial in own if trial.verdict.out)
            rows.append(
                {
                    "shape": heads.name,
                    "kernel": kernel,
                    "table_values": table.values,
                    "table_costs": dict(table.verdict.costs),
                    "table_out": table.verdict.out,
                    "best_values": values,
                    "best_costs": dict(best.verdict.costs) if best else {},
                    "tried": len(own),
                    "out": dict(reasons),
                }
            )
    return rows


def document(found: Found, before: dict[str, Any]) -> dict[str, Any]:
    """The table of a run over what the file held before, with what was measured beside it."""
    job = found.job
    facts = {key: value for key, value in machine_facts(job.device).items() if value is not None}
    run = {
        "date": date.today().isoformat(),
        "machine": facts,
        "emulated": job.emulated,
        "dtype": job.dtype,
        "length": job.length,
        "cost": "issue cycles" if job.emulated else "milliseconds",
        "figures": figures(found),
    }
    kernels: Table = {name: list(entries) for name, entries in before.get("kernels", {}).items()}
    element_size = getattr(torch, job.dtype).itemsize
    for (kernel, dims), values in found.best.items():
        use = {"element_size": element_size, "head_dim": max(dims), "exact_dims": [list(dims)]}
        others = [entry for entry in kernels.get(kernel, []) if not _same_use(entry, use)]
        kernels[kernel] = [{**use, **values}, *others]
    how = "ranked by emulated cycles" if job.emulated else f"measured on {facts['device_name']}"
    return {
        "architecture": job.arch,
        "status": f"Written by nsa-port tune, {how}.",
        "kernels": kernels,
        "measured": [*before.get("measured", []), run],
    }


def to_text(content: dict[str, Any]) -> str:
    """JSON with one line per entry, as the shipped tables have it."""
    text = json.dumps({**content, "kernels": {}}, indent=2)
    lists = ",\n".join(
        f'    "{kernel}": [\n'
        + ",\n".join(f"      {json.dumps(entry)}" for entry in entries)
        + "\n    ]"
        for kernel, entries in content["kernels"].items()
    )
    return text.replace('"kernels": {}', f'"kernels": {{\n{lists}\n  }}', 1) + "\n"


def _same_use(entry: Entry, use: Entry) -> bool:
    return all(entry.get(name) == use[name] for name in tables.CONDITIONS)


def _kind(reason: str) -> str:
    """A reason without its numbers, so that like reasons are counted together."""
    if reason.startswith("spills"):
        return "spills registers"
    return "too much shared memory" if reason.startswith("OutOfResources") else reason


def _values_text(values: Values | None) -> str:
    return "none" if values is None else ", ".join(f"{k}={v}" for k, v in values.items())
