"""How much memory there is, and how much a call takes at most.

`python -m nsa_port.conformance.memory BACKEND DTYPE T` prints the peak of a call on the CPU, in a
process of its own because a process's peak cannot be told from what else it did.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

from nsa_port import functional
from nsa_port.backends.interface import Reason
from nsa_port.conformance.case import Unsupported
from nsa_port.conformance.inputs import Inputs, Shape, make
from nsa_port.kernels.geometry import NSAConfig

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def free(device: torch.device) -> int:
    """Bytes that can be had on the device; 0 if that is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    listing = Path("/proc/meminfo")
    found = (
        re.search(r"MemAvailable:\s+(\d+) kB", listing.read_text()) if listing.exists() else None
    )
    return int(found.group(1)) * 1024 if found else 0


def peak(backend: str, device: torch.device, dtype: torch.dtype, num_tokens: int) -> int:
    """Bytes that forward and backward of one call take at most, over those of its inputs.

    Raises:
        Unsupported: nothing on this system tells.
    """
    if device.type == "cuda":
        return _peak_on_cuda(backend, device, dtype, num_tokens)
    if device.type != "cpu" or not _CLEAR.exists():
        raise Unsupported(
            Reason(
                "no_peak_memory",
                f"nothing tells the peak memory of a process on {device.type} here",
                value=f"{device.type}, {sys.platform}",
                bound="torch.cuda's counters, or Linux",
                remedy="run the case on such a system",
            )
        )
    name = str(dtype).removeprefix("torch.")
    command = [sys.executable, "-m", "nsa_port.conformance.memory", backend, name, str(num_tokens)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} fails: {done.stderr.strip()[-400:]}")
    return int(done.stdout)


def _inputs(device: torch.device, dtype: torch.dtype, num_tokens: int) -> Inputs:
    shape = Shape(T=num_tokens, H=4, HK=1, Dk=32, Dv=32, cfg=NSAConfig())
    return make(shape, dtype, device).leaves()


def _forward_and_backward(given: Inputs, backend: str) -> None:
    functional.nsa_attention(*given.tensors, given.cfg, backend=backend).sum().backward()


def _peak_on_cuda(backend: str, device: torch.device, dtype: torch.dtype, num_tokens: int) -> int:
    _forward_and_backward(_inputs(device, dtype, 256), backend)
    given = _inputs(device, dtype, num_tokens)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    _forward_and_backward(given, backend)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_of_this_process(backend: str, dtype: torch.dtype, num_tokens: int) -> int:
    cpu = torch.device("cpu")
    _forward_and_backward(_inputs(cpu, dtype, 256), backend)
    given = _inputs(cpu, dtype, num_tokens)
    _CLEAR.write_text("5")  # the peak starts anew from what is resident now
    before = _resident("VmRSS")
    _forward_and_backward(given, backend)
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", _STATUS.read_text())
    assert found is not None, f"{_STATUS} does not tell {name}"
    return int(found.group(1)) * 1024


if __name__ == "__main__":
    backend_name, dtype_name, tokens = sys.argv[1:]
    print(_peak_of_this_process(backend_name, getattr(torch, dtype_name), int(tokens)))
