"""The command `nsa-port`, also `python -m nsa_port`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import nsa_port

COMMANDS = {
    "info": ("nsa_port.info", "this machine, its backends, and why each is or is not available"),
    "demo": ("nsa_port.demo", "train a small language model with NSA next to a dense one"),
    "conformance": ("nsa_port.conformance.command", "hold a backend to the reference"),
    "compare": ("nsa_port.conformance.comparison", "two conformance results side by side"),
    "bench": ("nsa_port.bench.command", "speed and memory next to dense attention"),
    "tune": ("nsa_port.tune.command", "find the fastest kernel settings for this GPU"),
}
"""Subcommand -> the module with its `add_arguments(parser)` and `main(args) -> int`, and help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="nsa-port", description="Native Sparse Attention on whatever accelerator you have."
    )
    parser.add_argument("--version", action="version", version=nsa_port.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked = next((word for word in argv if not word.startswith("-")), None)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == asked:  # loading only what runs keeps `nsa-port info` quick
            importlib.import_module(module).add_arguments(command)
    args = parser.parse_args(argv)
    code: int = importlib.import_module(COMMANDS[args.command][0]).main(args)
    return code
