"""`nsa-port compare A.json B.json`: two results of the suite, side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsa_port.conformance import LEVELS, page, report
from nsa_port.conformance.case import PASS

Run = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Pair:
    """One run of the suite in both results; None where it did not take place."""

    id: str
    level: int
    title: str
    runs: tuple[Run | None, Run | None]

    @property
    def differs(self) -> bool:
        """Whether the outcomes differ."""
        first, second = (run and run["outcome"] for run in self.runs)
        return first != second


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", type=Path, metavar="A.json")
    parser.add_argument("second", type=Path, metavar="B.json")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page as well")


def main(args: argparse.Namespace) -> int:
    """Print both, what differs first; 0 if no outcome differs, 1 if one does, 2 on bad files."""
    try:
        found = report.read(args.first), report.read(args.second)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    pairs = paired(*found)
    print(as_text(found, pairs))
    if args.html:
        args.html.write_text(as_page(found, pairs), encoding="utf-8")
        print(f"wrote {args.html}")
    return 1 if any(pair.differs for pair in pairs) else 0


def paired(first: report.Document, second: report.Document) -> list[Pair]:
    """The runs of both results, in the suite's order, the first result's before others."""
    by_id = [{case["id"]: case for case in found["cases"]} for found in (first, second)]
    pairs = [
        Pair(case["id"], case["level"], case["title"], (by_id[0].get(name), by_id[1].get(name)))
        for name, case in {**by_id[1], **by_id[0]}.items()
    ]
    order = {name: at for at, name in enumerate([*by_id[0], *by_id[1]][::-1])}
    return sorted(pairs, key=lambda pair: (pair.level, -order[pair.id]))


def as_text(found: tuple[report.Document, report.Document], pairs: Sequence[Pair]) -> str:
    """Machines, then outcomes that differ, then every run."""
    facts = [page.facts(one) for one in found]
    names = list(dict.fromkeys([*facts[0], *facts[1]]))
    rows = [(name, facts[0].get(name, "-"), facts[1].get(name, "-")) for name in names]
    first, second = (report.verdict(one)[1] for one in found)
    rows.append(("verdict", first, second))
    parts = [_columns(rows)]
    differing = [pair for pair in pairs if pair.differs]
    if differing:
        lines = [(pair.id, *(_told(run) for run in pair.runs)) for pair in differing]
        parts.append("outcomes that differ\n" + _columns(lines))
    every = [(pair.id, *(_told(run) for run in pair.runs)) for pair in pairs if not pair.differs]
    if every:
        parts.append("equal outcomes, with the share of the error budget\n" + _columns(every))
    return "\n\n".join(parts)


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [min(max(map(len, column)), 60) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _told(run: Run | None) -> str:
    if run is None:
        return "not run"
    if run["reasons"]:
        return f"{run['outcome']} ({', '.join(reason['code'] for reason in run['reasons'])})"
    if not run["measured"]:
        return str(run["outcome"])
    return f"{run['outcome']} {_ratio(run['ratio'])}"


def _ratio(ratio: float | None) -> str:
    if ratio is None:
        return "infinite"
    return f"{ratio:.2f}" if ratio < 100 else f"{ratio:.0e}"


def as_page(found: tuple[report.Document, report.Document], pairs: Sequence[Pair]) -> str:
    """The same as a self-contained page."""
    names = [f"{one['backend']['name']} on {one['environment']['device_name']}" for one in found]
    heads = "".join(
        f"<section class='card'><h3>{page.text(name)}</h3><p>{page.verdict(one)}</p>"
        f"{page.definitions(page.facts(one))}</section>"
        for name, one in zip(names, found, strict=True)
    )
    differing = [pair for pair in pairs if pair.differs]
    parts = [
        '<header><p class="eyebrow">NSA_PORT CONFORMANCE, COMPARED</p>'
        f"<h1>{page.text(names[0])} and {page.text(names[1])}</h1></header>",
        f"<div class='sides'>{heads}</div>",
    ]
    if differing:
        parts.append(f"<h2>Outcomes that differ</h2>{_table(names, differing)}")
    for level, title in LEVELS.items():
        same = [pair for pair in pairs if pair.level == level and not pair.differs]
        if same:
            parts.append(f"<h2>Level {level}: {page.text(title)}</h2>{_table(names, same)}")
    return page.shell(f"nsa_port conformance: {names[0]} and {names[1]}", "\n".join(parts))


def _table(names: Sequence[str], pairs: Sequence[Pair]) -> str:
    rows = "".join(
        f"<tr><td>{page.text(pair.title)}<br><small><code>{page.text(pair.id)}</code></small></td>"
        + "".join(f"<td class='{_kind(run)}'>{page.text(_told(run))}</td>" for run in pair.runs)
        + "</tr>"
        for pair in pairs
    )
    heads = "".join(f"<th>{page.text(name)}</th>" for name in names)
    return (
        "<section class='card scroll'><table><thead><tr><th>case</th>"
        f"{heads}</tr></thead><tbody>{rows}</tbody></table></section>"
    )


def _kind(run: Run | None) -> str:
    return "" if run is None or run["outcome"] == PASS else str(run["outcome"])
