"""`python -m nsa_port.conformance`: the command `nsa-port conformance`, or `compare A B`."""

from __future__ import annotations

import argparse
import sys

from nsa_port.conformance import command, comparison


def main(argv: list[str]) -> int:
    compare = argv[:1] == ["compare"]
    module = comparison if compare else command
    parser = argparse.ArgumentParser(
        prog="python -m nsa_port.conformance" + (" compare" if compare else ""),
        description=(module.__doc__ or "").splitlines()[0],
    )
    module.add_arguments(parser)
    return module.main(parser.parse_args(argv[1:] if compare else argv))


sys.exit(main(sys.argv[1:]))
