"""`nsa-port info`: this machine, its backends, and why each is or is not available."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from typing import Any

import nsa_port
from nsa_port import environment as machine
from nsa_port import introspect, settings
from nsa_port.kernels import tables


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs")


def main(args: argparse.Namespace) -> int:
    """Print this machine, the switches that are set, and every backend."""
    facts = machine_facts()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    width = max(map(len, settings.VARIABLES))
    rows = {"nsa_port": facts["nsa_port"], "python": facts["python"], **facts["environment"]}
    rows["triton"] = _triton_text(facts["environment"]["triton"])
    rows["tables"] = ", ".join(facts["tables"])
    for name, value in rows.items():
        if value not in (None, "", 0, False):
            print(f"{name:{width}}  {value}")
    for name, value in facts["settings"].items():
        print(f"{name:{width}}  {value or '(unset)'}")
    print()
    for status in introspect.backends():
        print(status)
    return 0


def machine_facts() -> dict[str, Any]:
    """What `info` and reports say of this machine, as JSON can hold it."""
    environment = machine.probe(machine.default_device())
    return {
        "nsa_port": nsa_port.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "environment": dataclasses.asdict(environment),
        "tables": _tables(environment.arch or environment.emulate),
        "settings": {name: settings.value(name) for name in settings.VARIABLES},
        "backends": [dataclasses.asdict(status) for status in introspect.backends()],
    }


def _tables(arch: str) -> list[str]:
    """The files that kernels for `arch` take their tuned values from, or what is wrong with one."""
    try:
        return [str(path) for path in tables.files(arch)] if arch else []
    except tables.TableError as error:
        return [f"unusable: {error}"]


def _triton_text(triton: dict[str, Any] | None) -> str:
    if triton is None:
        return "none"
    compilers, owners = ", ".join(triton["backends"]), ", ".join(triton["owners"])
    return f"{triton['version']} (compilers: {compilers}; installed by: {owners or 'unknown'})"
