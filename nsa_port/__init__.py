"""Native Sparse Attention on whatever accelerator you have.

    cfg = nsa_port.NSAConfig()
    out = nsa_port.nsa_attention(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, cfg)

Functions live in `nsa_port.functional`, the oracle in `nsa_port.reference`, the choice of backends
in `nsa_port.registry`. Importing this package imports no kernel and touches no device.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from nsa_port import reference
from nsa_port.cache import NSACache
from nsa_port.functional import (
    combine,
    compressed_attention,
    mean_compress,
    nsa_attention,
    select_blocks,
    selected_attention,
    window_attention,
)
from nsa_port.introspect import backends, explain
from nsa_port.kernels.geometry import NSAConfig
from nsa_port.module import NativeSparseAttention
from nsa_port.registry import BackendUnavailable, UnknownBackend, use_backend
from nsa_port.settings import NSAPortWarning

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "NSACache",
    "NSAConfig",
    "NSAPortWarning",
    "NativeSparseAttention",
    "UnknownBackend",
    "backends",
    "combine",
    "compressed_attention",
    "explain",
    "mean_compress",
    "nsa_attention",
    "reference",
    "select_blocks",
    "selected_attention",
    "use_backend",
    "window_attention",
]


class _BackendsPackage(ModuleType):
    """`nsa_port.backends` is a folder of modules, and `nsa_port.backends()` lists the backends."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _list_backends(*args, **kwargs)


_list_backends = backends
sys.modules["nsa_port.backends"].__class__ = _BackendsPackage
globals()["backends"] = sys.modules["nsa_port.backends"]
