"""Triton's interpreter with a check on every access: no kernel may touch what it was not given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter


def check_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise where a load, store or atomic leaves the storages of the launch's tensors."""
    storages: list[tuple[int, int]] = []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    original = {
        name: getattr(builder, name)
        for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw")
    }
    arguments = executor._init_args_hst

    def remember(self: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        args, kwargs = arguments(self, args, kwargs)
        storages.clear()
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                storages.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
        return args, kwargs

    def check(pointers: Any, mask: Any) -> None:
        wanted = np.broadcast_to(mask.data.astype(bool), pointers.data.shape)
        addresses = pointers.data[wanted].astype(np.uint64)
        inside = np.zeros(addresses.shape, dtype=bool)
        size = pointers.get_element_ty().primitive_bitwidth // 8
        for start, stop in storages:
            inside |= (addresses >= start) & (addresses + np.uint64(size) <= stop)
        if not inside.all():
            raise IndexError(f"{(~inside).sum()} of {inside.size} accesses are out of bounds")

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return original["create_masked_load"](self, pointers, mask, *rest)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return original["create_masked_store"](self, pointers, value, mask, *rest)

    def atomic(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return original["create_atomic_rmw"](self, operation, pointers, value, mask, *rest)

    monkeypatch.setattr(executor, "_init_args_hst", remember)
    monkeypatch.setattr(builder, "create_masked_load", load)
    monkeypatch.setattr(builder, "create_masked_store", store)
    monkeypatch.setattr(builder, "create_atomic_rmw", atomic)
