"""A backend from another distribution, as a vendor would ship it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

BACKEND = '''
from nsa_port.backends.torch import TorchBackend

class Vendor(TorchBackend):
    """PyTorch's kernels under another name, taken only where it is forced."""
    name = "vendor"
    level = 2

    def is_native(self, environment):
        return False

BACKEND = Vendor()
'''


@pytest.fixture
def plugged_in(tmp_path: Path) -> dict[str, str]:
    """The environment of processes in which a distribution registers the backend `vendor`."""
    (tmp_path / "vendor_nsa.py").write_text(BACKEND)
    metadata = tmp_path / "vendor_nsa-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vendor-nsa\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[nsa_port.backends]\nvendor = vendor_nsa:BACKEND\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def run(environment: dict[str, str], *arguments: str) -> str:
    command = [sys.executable, "-m", "nsa_port", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_a_plugged_in_backend_is_listed(plugged_in: dict[str, str]) -> None:
    facts = json.loads(run(plugged_in, "info", "--json"))
    names = [backend["name"] for backend in facts["backends"]]
    assert names == ["cuda", "rocm", "vendor", "torch"]


def test_the_suite_runs_on_a_plugged_in_backend(plugged_in: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "report"
    printed = run(
        plugged_in, "conformance", "--backend", "vendor", "--level", "0", "--out", str(out)
    )
    assert "vendor" in printed
    assert list(out.glob("*.json"))
