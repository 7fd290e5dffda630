"""Options for the suite under pytest: `pytest -p nsa_port.conformance.options --pyargs ...`.

With `--pyargs`, pytest reads a package's own conftest.py too late for options, hence `-p`.
"""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nsa_port conformance")
    group.addoption("--nsa-backend", help="whom to test; by default NSA_PORT_BACKEND, else auto")
    group.addoption("--nsa-level", type=int, help="run levels 0 to this; by default the declared")
    group.addoption("--nsa-device", help="by default the one the backend is made for")
