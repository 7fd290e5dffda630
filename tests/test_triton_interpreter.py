"""The Triton kernels against the reference on CPU tensors, through Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

ROOT = Path(__file__).parent.parent
GROUPS = {
    "branches": "branch_and_its_gradients",
    "selected_by_block": "selected_attention_by_block",
    "everything_else": "not branch_and_its_gradients and not selected_attention_by_block",
}


@pytest.mark.parametrize("group", GROUPS)
def test_what_holds_for_the_operators_holds_in_the_interpreter(group: str) -> None:
    """In a process of its own: Triton decides at import whether to compile or to interpret."""
    command = [
        sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider",
        "tests/triton_operators.py", "-k", GROUPS[group],
    ]  # fmt: skip
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
