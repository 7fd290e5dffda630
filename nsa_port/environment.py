"""What this machine is: the facts that backends decide on, read without loading any kernel."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re
import sys
from pathlib import Path

import torch

from nsa_port import settings
from nsa_port.backends.interface import Environment, TritonInfo

_TRITON_DISTRIBUTIONS = (
    "triton",
    "pytorch-triton",
    "pytorch-triton-rocm",
    "pytorch-triton-xpu",
    "triton-ascend",
    "triton-rocm",
    "triton-windows",
    "triton-xpu",
)


def probe(device: torch.device) -> Environment:
    """The environment of calls whose tensors live on `device`."""
    return _probe(
        device.type,
        device.index,
        interpreter=os.environ.get("TRITON_INTERPRET") == "1",
        emulate=settings.value("NSA_PORT_EMULATE"),
    )


def default_device() -> torch.device:
    """The accelerator of this machine as torch sees it, or the CPU."""
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    return torch.device("cpu")


def emulated_architecture(backend: str, environment: Environment) -> str:
    """The AMD architecture that the backend's kernels are emulated on, `""` if they are not."""
    emulates = backend == "rocm" and environment.device_type == "cpu"
    return environment.emulate if emulates else ""


@functools.lru_cache(maxsize=64)
def _probe(device_type: str, index: int | None, *, interpreter: bool, emulate: str) -> Environment:
    name, arch, shared_memory, processors = "", "", 0, 0
    if device_type == "cuda":
        properties = torch.cuda.get_device_properties(index or 0)
        name = properties.name
        if torch.version.hip:
            arch = getattr(properties, "gcnArchName", "").split(":")[0]
        else:
            arch = f"sm_{properties.major}{properties.minor}"
        shared_memory = getattr(properties, "shared_memory_per_block_optin", 0)
        processors = properties.multi_processor_count
    elif device_type not in ("cpu", "meta"):
        name = _device_name(device_type, index)
    return Environment(
        device_type=device_type,
        device_name=name,
        arch=arch,
        hip_version=torch.version.hip,
        cuda_version=torch.version.cuda,
        torch_version=torch.__version__,
        shared_memory=shared_memory,
        processors=processors,
        triton=find_triton(),
        interpreter=interpreter,
        emulate=emulate,
        numpy=importlib.util.find_spec("numpy") is not None,
    )


def _device_name(device_type: str, index: int | None) -> str:
    get_name = getattr(getattr(torch, device_type, None), "get_device_name", None)
    return str(get_name(index or 0)) if get_name else device_type


@functools.lru_cache(maxsize=1)
def find_triton() -> TritonInfo | None:
    """The Triton that `import triton` would give, read from its folder and not imported.

    Without compilers and version where pip lists one whose folder is gone: uninstalling one of two
    distributions takes the files that they share.
    """
    folder = _triton_folder()
    owners = tuple(name for name in _TRITON_DISTRIBUTIONS if _installed(name))
    if folder is None:
        return TritonInfo("", (), owners) if owners else None
    text = (folder / "__init__.py").read_text(encoding="utf-8", errors="replace")
    version = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", text)
    backends = folder / "backends"
    found = sorted(p.name for p in backends.iterdir() if p.is_dir()) if backends.is_dir() else []
    return TritonInfo(
        version=version.group(1) if version else "",
        backends=tuple(name for name in found if not name.startswith("_")),
        owners=owners,
    )


def _triton_folder() -> Path | None:
    module = sys.modules.get("triton")
    if module is not None and getattr(module, "__file__", None):
        return Path(str(module.__file__)).parent
    spec = importlib.util.find_spec("triton")
    if spec is None or not spec.origin:
        return None
    return Path(spec.origin).parent


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
