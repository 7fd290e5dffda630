"""The switches users have: environment variables, read when they matter and never at import."""

from __future__ import annotations

import difflib
import functools
import os
import warnings

VARIABLES = {
    "NSA_PORT_BACKEND": "backend to force: a name, or per operator: cuda,select_blocks=torch",
    "NSA_PORT_FALLBACK": "what automatic choice does when it passes a backend over: warn or error",
    "NSA_PORT_CHECK": "1 checks the data of device tensors too (synchronises with the device)",
    "NSA_PORT_EMULATE": "AMD architecture that `rocm` emulates for CPU tensors, e.g. gfx942",
    "NSA_PORT_TABLES": "folder of <arch>.json tables that come before the tuned values shipped",
}

_PREFIX = "NSA_PORT_"
_scanned = -1
"""How many variables there were when they were last searched for unknown ones."""

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


class NSAPortWarning(UserWarning):
    """What nsa_port warns of: a backend passed over, a variable nobody reads."""


def value(name: str) -> str:
    """The text of a variable of `VARIABLES`, `""` if unset."""
    return os.environ.get(name, "").strip()


def requested_backend() -> str:
    """The text of `NSA_PORT_BACKEND`, `""` if unset."""
    global _scanned
    if len(os.environ) != _scanned:  # a look at every name takes longer than all else here
        _scanned = len(os.environ)
        _warn_of_unknown_variables(tuple(name for name in os.environ if name.startswith(_PREFIX)))
    return value("NSA_PORT_BACKEND")


def fallback_is_error() -> bool:
    """Whether `NSA_PORT_FALLBACK=error` forbids automatic choice to fall back."""
    text = value("NSA_PORT_FALLBACK").lower() or "warn"
    if text not in ("warn", "error"):
        raise ValueError(f"NSA_PORT_FALLBACK must be warn or error, got {text!r}")
    return text == "error"


def check_device_data() -> bool:
    """Whether `NSA_PORT_CHECK` asks to read device tensors for checking."""
    text = value("NSA_PORT_CHECK").lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError(f"NSA_PORT_CHECK must be 1 or 0, got {text!r}")


@functools.lru_cache(maxsize=8)
def _warn_of_unknown_variables(names: tuple[str, ...]) -> None:
    for name in names:
        if name not in VARIABLES:
            near = difflib.get_close_matches(name, VARIABLES, n=1, cutoff=0)
            warnings.warn(
                f"{name} is not a variable of nsa_port; did you mean {near[0]}?",
                NSAPortWarning,
                stacklevel=2,
            )
