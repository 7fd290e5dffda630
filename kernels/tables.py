"""Tuned values: which tile sizes, warps and stages a kernel is launched with.

One JSON file per architecture, `configs/<arch>.json`, holds under `kernels` a list of entries for
each kernel. Of an entry, `CONDITIONS` say what it is for, the rest are the values. The first that
fits answers. It fits when the element is at most its `element_size` bytes wide and the larger head
dimension at most its `head_dim`. One with `exact_dims` is for these pairs of key and value
dimensions alone: wgmma entries have them, because ptxas 12.8, which triton 3.6 carries, miscompiles
some others (it reads an operand's descriptor from a register that it has not written).

A folder named by the environment variable `NSA_PORT_TABLES` may hold `<arch>.json` files of the
same format, as `nsa-port tune` writes them: their entries come before the shipped ones. A process
reads each file once.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "NSA_PORT_TABLES"
SHIPPED = Path(__file__).parent / "configs"
GENERIC = "generic"
"""The table of architectures that have none, which fits wherever a kernel can run at all."""
GENERIC_AMD = "generic_gfx"
"""The same for AMD's architectures, to which NVIDIA's values say nothing."""

CONDITIONS = ("element_size", "head_dim", "exact_dims")

_MAY_BE_ZERO = (
    "DEPTH", "RELOAD", "fewest_of_large", "fewest_queries", "gluon", "largest_group",
    "matrix_instr_nonkdim", "most_heads", "waves_per_eu", "widest",
)  # fmt: skip
_POWERS = ("num_warps", "OWN_N", "DEPTH")

Values = dict[str, int]
Entry = dict[str, Any]
Table = dict[str, list[Entry]]


class TableError(ValueError):
    """A table of `NSA_PORT_TABLES` cannot be used; the text names the file and the fault."""


def tuned(
    arch: str, kernel: str, element_size: int, key_dim: int, value_dim: int | None = None
) -> Values:
    """The tuned values of a kernel: those of the first entry that fits.

    Architectures without a table take `generic`'s, AMD's `generic_gfx`'s.

    Raises:
        ValueError: the head dimension is larger than any entry's.
        TableError: a table of `NSA_PORT_TABLES` is no table.
    """
    dims = (key_dim, key_dim if value_dim is None else value_dim)
    values = _tuned(_user_folder(), arch, kernel, element_size, dims)
    return {**values, **_changes.get(kernel, {})}


def values_of(entry: Entry) -> Values:
    """An entry without what it is for."""
    return {name: value for name, value in entry.items() if name not in CONDITIONS}


@contextmanager
def tuned_to(changes: Mapping[str, Mapping[str, int]]) -> Iterator[None]:
    """Lay some values of some kernels over the tables' for the length of a `with` statement.

    It holds for the whole process and is meant for trying values out.
    """
    global _changes, _number
    before = _changes, _number
    kernels = {*_changes, *changes}
    _changes = {k: {**_changes.get(k, {}), **changes.get(k, {})} for k in kernels}
    _number = next(_numbers)
    try:
        yield
    finally:
        _changes, _number = before


_changes: Mapping[str, Mapping[str, int]] = {}
_numbers = itertools.count()
_number = next(_numbers)


def state() -> Hashable:
    """Equal at two times only if every kernel's values are the same at both."""
    return _user_folder(), _number


def load_table(arch: str) -> Table:
    """Every entry that answers for an architecture, those of `NSA_PORT_TABLES` among them."""
    return _load(_user_folder(), arch)


def files(arch: str) -> tuple[Path, ...]:
    """Where the entries for an architecture come from, the first first; all of them are tables."""
    _load(_user_folder(), arch)
    own = _own_file(_user_folder(), arch)
    return (_shipped_file(arch),) if own is None else (own, _shipped_file(arch))


def shipped_table(arch: str) -> Table:
    """The table that comes with this package, its maker's generic one for what has none."""
    return dict(json.loads(_shipped_file(arch).read_text(encoding="utf-8"))["kernels"])


def read_table(path: Path, arch: str) -> Table:
    """A table that a user gives for `arch`, held to what the shipped one looks like.

    Raises:
        TableError: it is no JSON, names kernels or values that nobody reads, lacks some, or is for
            another architecture.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TableError(f"{path} is not a table: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("kernels"), dict):
        raise TableError(f"{path} is not a table: it has no object 'kernels'")
    if content.get("architecture", arch or GENERIC) != (arch or GENERIC):
        raise TableError(f"{path} is for {content['architecture']!r}, not for {arch or GENERIC!r}")
    shipped = shipped_table(arch)
    for kernel, entries in content["kernels"].items():
        if kernel not in shipped:
            known = ", ".join(shipped)
            raise TableError(f"{path}: no kernel is called {kernel!r}; there are {known}")
        if not isinstance(entries, list):
            raise TableError(f"{path}: {kernel} is not a list of entries")
        for number, entry in enumerate(entries):
            fault = _fault(entry, shipped[kernel])
            if fault:
                raise TableError(f"{path}: {kernel}, entry {number}: {fault}")
    return dict(content["kernels"])


def _user_folder() -> str:
    return os.environ.get(FOLDER_VARIABLE, "").strip()


def _own_file(folder: str, arch: str) -> Path | None:
    if not folder:
        return None
    if not Path(folder).is_dir():
        raise TableError(f"{FOLDER_VARIABLE}={folder} is not a folder")
    path = Path(folder) / f"{arch or GENERIC}.json"
    return path if path.exists() else None


def _shipped_file(arch: str) -> Path:
    path = SHIPPED / f"{arch}.json"
    if not arch or not path.exists():
        path = SHIPPED / f"{GENERIC_AMD if arch.startswith('gfx') else GENERIC}.json"
    return path


@cache
def _tuned(folder: str, arch: str, kernel: str, element_size: int, dims: tuple[int, int]) -> Values:
    for entry in _load(folder, arch)[kernel]:
        if element_size > entry["element_size"] or max(dims) > entry["head_dim"]:
            continue
        if "exact_dims" in entry and list(dims) not in entry["exact_dims"]:
            continue
        return values_of(entry)
    raise ValueError(f"{kernel}: no entry for head dimension {max(dims)} on {arch or GENERIC}")


@cache
def _load(folder: str, arch: str) -> Table:
    shipped, path = shipped_table(arch), _own_file(folder, arch)
    if path is None:
        return shipped
    own = read_table(path, arch)
    return {kernel: [*own.get(kernel, []), *entries] for kernel, entries in shipped.items()}


def _fault(entry: Any, shipped: list[Entry]) -> str:
    """What is wrong with a user's entry of a kernel, `""` if nothing."""
    if not isinstance(entry, dict):
        return f"{entry!r} is not an object"
    required = set.intersection(*(set(row) for row in shipped))
    known = set.union({"exact_dims"}, *(set(row) for row in shipped))
    if missing := sorted(required - set(entry)):
        return f"{', '.join(missing)} missing"
    if unknown := sorted(set(entry) - known):
        return f"nobody reads {', '.join(unknown)}; the names are {', '.join(sorted(known))}"
    if "exact_dims" in entry and not _is_pairs(entry["exact_dims"]):
        return f"exact_dims must be pairs of key and value dimensions, got {entry['exact_dims']!r}"
    for name, value in entry.items():
        if name == "exact_dims":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            return f"{name} must be an integer, got {value!r}"
        if value < 0 or (value == 0 and name not in _MAY_BE_ZERO):
            return f"{name} must be positive, got {value}"
        if (name.startswith("BLOCK_") or name in _POWERS) and value & (value - 1):
            return f"{name} must be a power of two, got {value}"
        if name.startswith("BLOCK_") and value < 16:
            return f"{name} must be at least 16, what matrix units take, got {value}"
    return ""


def _is_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(dim) is int for dim in pair)
        for pair in value
    )
