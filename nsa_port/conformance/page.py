"""The report as one self-contained page: no script, no request, light and dark, wide and narrow."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from nsa_port.conformance import LEVELS, report
from nsa_port.conformance.case import FAIL, PASS, UNSUPPORTED

Document = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]

_DTYPES = ("float32", "float16", "bfloat16", "float64")
_SIGNS = {PASS: "✓", FAIL: "✕", UNSUPPORTED: "○"}
_LEAST, _MOST = 0.003, 4.0
"""The range of the overview's axis; what lies outside is drawn at its ends."""
_LANE, _STACK = 62, 7


def render(found: Document) -> str:
    """The page of one result."""
    who, environment = found["backend"], found["environment"]
    title = f"{who['name']} on {environment['device_name']}"
    body = [
        _hero(found),
        _tiles(found),
        _levels(found),
        _overview(found["cases"]),
        _matrix(found["cases"]),
        _failures(found["cases"]),
        _unsupported(found["cases"]),
        _environment(found),
        _method(found),
    ]
    return shell(f"nsa_port conformance: {title}", "\n".join(filter(None, body)))


def shell(title: str, body: str) -> str:
    """A whole page around `body`, with the style inside."""
    style = resources.files("nsa_port.conformance").joinpath("style.css").read_text("utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def text(value: object) -> str:
    return html.escape(str(value))


def verdict(found: Document) -> str:
    """The pill that says whether the backend conforms."""
    kind, words = report.verdict(found)
    return f'<div class="verdict {kind}">{_SIGNS[kind]} {text(words)}</div>'


def _hero(found: Document) -> str:
    who, environment = found["backend"], found["environment"]
    instead = f", {who['stand_in']} in place of the hardware" if who["stand_in"] else ""
    return f"""<header>
<p class="eyebrow">NSA_PORT CONFORMANCE SUITE {text(found["suite"]["version"])}</p>
<div class="hero">
<div>
<h1>{text(who["name"])} on {text(environment["device_name"])}</h1>
<p class="lead">Native Sparse Attention held to the float64 reference, levels 0 to
{found["suite"]["level"]}{text(instead)}. torch {text(environment["torch"])},
{text(environment["arch"])}, {text(found["finished"][:10])}.</p>
</div>
{verdict(found)}
</div>
</header>"""


def _tiles(found: Document) -> str:
    summary = found["summary"]
    ratios = [case["ratio"] for case in found["cases"] if case["ratio"] is not None]
    infinite = any(case["measured"] and case["ratio"] is None for case in found["cases"])
    worst = math.inf if infinite else max(ratios, default=0.0)
    headroom = (
        (FAIL, "over", "budget: the worst run errs more than it may")
        if worst > 1
        else ("", f"{worst:.0%}", "of its error budget used by the tightest run")
    )
    tiles = [
        (PASS, summary[PASS], "runs passed"),
        (FAIL if summary[FAIL] else "", summary[FAIL], "runs failed"),
        (UNSUPPORTED if summary[UNSUPPORTED] else "", summary[UNSUPPORTED], "runs unsupported"),
        headroom,
        ("", _duration(found["seconds"]), "for the whole suite"),
    ]
    cells = "".join(
        f'<div class="card"><div class="tile-value {kind}">{text(value)}</div>'
        f'<div class="tile-label">{label}</div></div>'
        for kind, value, label in tiles
    )
    return f'<section class="tiles" aria-label="Summary">{cells}</section>'


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _levels(found: Document) -> str:
    lines = []
    for level, title in LEVELS.items():
        cases = [case for case in found["cases"] if case["level"] == level]
        counts = {kind: sum(case["outcome"] == kind for case in cases) for kind in _SIGNS}
        parts = "".join(
            f'<span class="{kind}" style="flex:{count}"></span>'
            for kind, count in counts.items()
            if count
        )
        told = ", ".join(f"{n} {_WORDS[kind]}" for kind, n in counts.items() if n) or "not run"
        lines.append(
            f'<div class="level"><h3>Level {level} · {text(title)}</h3>'
            f'<div class="bar" role="img" aria-label="{told}">{parts}</div>'
            f'<div class="count">{told}</div></div>'
        )
    declared = found["backend"]["declared_level"]
    return (
        f"<h2>Levels</h2><p class='lead'>The backend declares level {declared}: up to there, "
        f"nothing may be unsupported but what the machine itself cannot hold or run.</p>"
        f"<section class='card levels'>{''.join(lines)}</section>"
    )


_WORDS = {PASS: "passed", FAIL: "failed", UNSUPPORTED: "unsupported"}


def _overview(cases: Rows) -> str:
    """Every measured run as a dot: how much of its budget its worst error uses."""
    measured = [case for case in cases if case["measured"]]
    lanes = [d for d in _DTYPES if any(case["dtype"] == d for case in measured)]
    if not lanes:
        return ""
    height = _LANE * len(lanes) + 34
    ticks = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0]
    parts = [f'<rect class="over" x="{_at(1)}" y="0" width="{100 - _place(1):.2f}%" '
             f'height="{height - 26}" rx="4"/>']  # fmt: skip
    for tick in ticks:
        kind = "budget" if tick == 1 else "axis"
        name = "budget" if tick == 1 else f"≤ {tick:g}" if tick == _LEAST else f"{tick:g}"
        parts.append(
            f'<line class="{kind}" x1="{_at(tick)}" x2="{_at(tick)}" y1="0" y2="{height - 26}"/>'
            f'<text class="{kind}-name" x="{_at(tick)}" y="{height - 8}" '
            f'text-anchor="middle">{name}</text>'
        )
    for lane, dtype in enumerate(lanes):
        middle = lane * _LANE + _LANE / 2 + 6
        parts.append(f'<text x="0" y="{lane * _LANE + 14}">{dtype}</text>')
        parts += _swarm([case for case in measured if case["dtype"] == dtype], middle)
    return f"""<h2>Headroom</h2>
<p class="lead">Each dot is one run: its worst error as a share of its budget, on a logarithmic
axis. The dashed line is the budget: twice the error of plain PyTorch in the same dtype, plus what
rounding alone may do, both against float64.</p>
<section class="card"><svg height="{height}" role="img"
aria-label="error over budget of every run, by dtype">{"".join(parts)}</svg></section>"""


def _swarm(cases: Rows, middle: float) -> list[str]:
    """Dots that would overlap are stacked around the middle of their lane."""
    taken: dict[int, int] = {}
    dots = []
    for case in sorted(cases, key=lambda case: case["ratio"] or 0):
        ratio = math.inf if case["ratio"] is None else case["ratio"]
        column = round(_place(ratio) / 0.9)
        while taken.get(column, 0) >= _STACK:
            column += 1
        at = taken[column] = taken.get(column, 0) + 1
        offset = at // 2 * 6.5 * (1 if at % 2 else -1)
        dots.append(
            f'<circle class="dot fill-{case["dtype"]}" cx="{column * 0.9:.2f}%" '
            f'cy="{middle + offset:.1f}" r="4">'
            f"<title>{text(_tooltip(case))}</title></circle>"
        )
    return dots


def _place(ratio: float) -> float:
    """Where on the overview's axis a ratio stands, in percent."""
    clamped = min(max(ratio, _LEAST), _MOST)
    return 5 + 88 * math.log(clamped / _LEAST) / math.log(_MOST / _LEAST)


def _at(ratio: float) -> str:
    return f"{_place(ratio):.2f}%"


def _tooltip(case: Mapping[str, Any]) -> str:
    lines = [f"{case['id']}: {case['outcome']}"]
    if case["measured"]:
        values = (case[name] for name in ("error", "budget", "ratio"))
        error, budget, ratio = ("infinite" if v is None else f"{v:.3g}" for v in values)
        lines.append(f"{case['worst']}: error {error}, budget {budget}, ratio {ratio}")
    lines += [f"[{reason['code']}] {reason['message']}" for reason in case["reasons"]]
    lines += [*case["failures"][:3], *case["notes"], f"{case['seconds']:.2f} s"]
    return "\n".join(lines)


def _matrix(cases: Rows) -> str:
    dtypes = [d for d in _DTYPES if any(case["dtype"] == d for case in cases)]
    columns = max(len(dtypes), 1)
    sections = []
    for level, title in LEVELS.items():
        names = list(dict.fromkeys(case["case"] for case in cases if case["level"] == level))
        if not names:
            continue
        rows = [_row([case for case in cases if case["case"] == name], dtypes) for name in names]
        heads = "".join(f'<span role="columnheader">{dtype}</span>' for dtype in dtypes or [""])
        sections.append(
            f'<section class="card matrix" role="table" style="--columns:{columns}" '
            f'aria-label="Level {level}: {text(title)}">'
            f'<div class="row head" role="row"><span role="columnheader">Level {level} · '
            f'{text(title)}</span>{heads}<span role="columnheader">share of budget</span></div>'
            f"{''.join(rows)}</section>"
        )
    legend = "".join(f'<span><i class="fill-{d}"></i>{d}</span>' for d in dtypes)
    return (
        "<h2>Cases</h2><p class='lead'>✓ passed, ✕ failed, ○ unsupported with a reason; the number "
        "is the worst error's share of its budget, none where the case demands equality to the "
        f"bit.</p><div class='legend'>{legend}</div>{''.join(sections)}"
    )


def _row(runs: Rows, dtypes: Sequence[str]) -> str:
    first = runs[0]
    by_dtype = {run["dtype"]: run for run in runs}
    if "" in by_dtype:
        cells = _cell(by_dtype[""], " wide")
    else:
        cells = "".join(
            _cell(by_dtype[dtype]) if dtype in by_dtype else '<div class="cell none">·</div>'
            for dtype in dtypes
        )
    return (
        f'<div class="row" role="row"><div class="name" role="rowheader" '
        f'title="{text("A failure means: " + first["shows"])}">{text(first["title"])}'
        f"<small>{text(first['case'])}</small>{_notes(runs)}</div>{cells}"
        f'<div class="plot" role="cell">{_bar(runs)}</div></div>'
    )


def _notes(runs: Rows, most: int = 3) -> str:
    """What the runs remarked on themselves, e.g. the lengths tried."""
    notes = list(dict.fromkeys(note for run in runs for note in run["notes"]))
    return "".join(f"<small>{text(note)}</small>" for note in notes[:most])


def _cell(run: Mapping[str, Any], more: str = "") -> str:
    ratio = run["ratio"]
    shown = _SIGNS[run["outcome"]]
    if run["outcome"] != UNSUPPORTED and run["measured"]:
        shown += " " + ("∞" if ratio is None else f"{ratio:.2f}" if ratio < 100 else "≫ 1")
    return (
        f'<div class="cell {run["outcome"]}{more}" role="cell" title="{text(_tooltip(run))}">'
        f'<span class="dtype">{run["dtype"]}</span>{shown}</div>'
    )


def _bar(runs: Rows) -> str:
    """A small linear plot, 0 to the budget, with a dot for each dtype."""
    measured = [run for run in runs if run["measured"] and run["outcome"] != UNSUPPORTED]
    if not measured:
        return ""
    dots = []
    for run in measured:
        ratio = 1.0 if run["ratio"] is None else min(run["ratio"], 1.0)
        dots.append(
            f'<circle class="dot fill-{run["dtype"]}" cx="{3 + 92 * ratio:.1f}%" cy="10" r="4.5">'
            f"<title>{text(_tooltip(run))}</title></circle>"
        )
    return (
        '<svg height="20" role="img" aria-label="share of the error budget">'
        '<line class="track" x1="3%" x2="95%" y1="10" y2="10"/>'
        '<line class="end" x1="95%" x2="95%" y1="4" y2="16"/>'
        f"{''.join(dots)}</svg>"
    )


def _failures(cases: Rows) -> str:
    failed = [case for case in cases if case["outcome"] == FAIL]
    if not failed:
        return ""
    entries = "".join(
        f'<div class="finding"><h3 class="fail">✕ {text(case["id"])}</h3>'
        f"<p>{text(case['title'])}. A failure means: {text(case['shows'])}.</p>"
        f"{_bullets(case['failures'])}</div>"
        for case in failed
    )
    return f'<h2>Failures</h2><section class="card">{entries}</section>'


def _bullets(lines: Sequence[str], most: int = 6) -> str:
    shown = [f"<li>{text(line)}</li>" for line in lines[:most]]
    if len(lines) > most:
        shown.append(f"<li>and {len(lines) - most} more, see the JSON</li>")
    return f"<ul>{''.join(shown)}</ul>"


def _unsupported(cases: Rows) -> str:
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for case in cases:
        for reason in case["reasons"]:
            key = tuple(str(reason[n]) for n in ("code", "message", "value", "bound", "remedy"))
            groups.setdefault(key, []).append(case)
    if not groups:
        return ""
    entries = "".join(_reason(key, concerned) for key, concerned in groups.items())
    return (
        "<h2>Unsupported</h2><p class='lead'>In the words of the backend, or of the suite where "
        "the machine itself cannot hold a case: the same reasons that dispatch gives to users.</p>"
        f"<section class='card'>{entries}</section>"
    )


def _reason(key: tuple[str, ...], concerned: Rows) -> str:
    code, message, value, bound, remedy = key
    named = (("value", value), ("bound", bound), ("remedy", remedy))
    details = [f"{name}: {told}" for name, told in named if told]
    breach = (
        " <span class='fail'>within the declared level</span>" if concerned[0]["breach"] else ""
    )
    ids = ", ".join(dict.fromkeys(case["id"] for case in concerned))
    return (
        f'<div class="finding"><h3><span class="unsupported">○ <code>{text(code)}</code></span>'
        f"{breach}</h3><p>{text(message)}</p>{_bullets([*details, f'concerns {ids}'])}</div>"
    )


def _environment(found: Document) -> str:
    return f"<h2>Environment</h2><section class='card'>{definitions(facts(found))}</section>"


def facts(found: Document) -> dict[str, str]:
    """What tells two results apart, in words."""
    environment, git = found["environment"], found["git"]
    told = {
        "backend": f"{found['backend']['name']}, declares level "
        f"{found['backend']['declared_level']}",
        "runs on": found["backend"]["stand_in"] or "the device itself",
        "device": f"{environment['device_name']} ({environment['device']})",
        "architecture": environment["arch"],
        "torch": environment["torch"],
        "triton": environment["triton"],
        "CUDA": environment["cuda"],
        "HIP": environment["hip"],
        "python": environment["python"],
        "system": environment["os"],
        "nsa_port": environment["nsa_port"],
        "git": f"{git['commit'][:12]}{' with changes' if git['dirty'] else ''}" if git else "",
        "suite": f"{found['suite']['version']}, levels 0 to {found['suite']['level']}",
        "finished": found["finished"].replace("T", " ").replace("+00:00", " UTC"),
    }
    told |= {name: value for name, value in environment["settings"].items() if value}
    return {name: str(value) for name, value in told.items() if value}


def definitions(pairs: Mapping[str, str]) -> str:
    return (
        "<dl>"
        + "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in pairs.items())
        + "</dl>"
    )


def _method(found: Document) -> str:
    command = (
        f"nsa-port conformance --backend {found['backend']['name']} "
        f"--level {found['suite']['level']} --out DIR"
    )
    return f"""<h2>How it is judged</h2>
<section class="card">
<p>One rule, no table of tolerances: <code>error ≤ 2 · (error of plain PyTorch in the same dtype +
rounding band)</code>, both errors against the reference in float64, for the largest element and
for the norm. Chosen blocks must be the reference's; another block is accepted only where both
scores lie within that budget of each other. Unsupported is only what the backend itself
answers to dispatch, or a case that this machine cannot hold or run at all.</p>
<pre><code>{text(command)}</code></pre>
</section>
<footer>Generated by nsa_port {text(found["environment"]["nsa_port"])}. This page loads nothing
from anywhere.</footer>"""
