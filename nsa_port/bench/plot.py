"""Drawing what was measured, with matplotlib."""

from __future__ import annotations

from typing import Any

Point = tuple[int, float]


def lines(results: dict[str, Any]) -> dict[str, dict[str, list[Point]]]:
    """Panel -> line -> points `(length, value)`: milliseconds of each group, then MB of memory."""
    panels: dict[str, dict[str, list[Point]]] = {}
    compared = {row["group"] for row in results["ratios"]}
    several = len({row["shape"] for row in results["rows"]}) > 1

    def add(panel: str, row: dict[str, Any], value: float) -> None:
        name = f"{row['shape']} {row['name']}" if several else row["name"]
        panels.setdefault(panel, {}).setdefault(name, []).append((row["length"], value))

    for row in results["rows"]:
        if row["group"] in compared and row["seconds"]:
            add(f"{row['group']}, ms", row, row["seconds"] * 1e3)
    for row in results["memory"]:
        if row["bytes"]:
            add("memory over the inputs, MB", row, row["bytes"] / 1e6)
    return panels


def plot(results: dict[str, Any], path: str) -> None:
    """Time and memory over length, NSA beside dense attention, as a picture at `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = lines(results)
    columns = max(1, len(panels))
    figure, axes = pyplot.subplots(1, columns, figsize=(5 * columns, 4), squeeze=False)
    for axis, (title, drawn) in zip(axes[0], panels.items(), strict=False):
        for name, points in drawn.items():
            axis.loglog(*zip(*sorted(points), strict=True), "o-", label=name)
        axis.set_xscale("log", base=2)
        axis.set(title=title, xlabel="tokens")
        axis.legend()
    figure.suptitle(f"{results['machine']['device_name']}, {results['date']}")
    figure.tight_layout()
    figure.savefig(path)
