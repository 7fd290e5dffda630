"""Reasons that the two Triton backends share: is there a Triton, and does it suit the device?"""

from __future__ import annotations

import functools

import torch
from packaging.version import InvalidVersion, Version

from nsa_port.backends.interface import Environment, Problem, Reason

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_HEAD = 256


def triton_reasons(
    environment: Environment, *, least: str, compiler: str, distribution: str
) -> tuple[Reason, ...]:
    """Why the installed Triton cannot serve: missing, too old, or without this compiler.

    Args:
        least: the oldest version that runs our kernels.
        compiler: the folder of the compiler backend inside the module, `nvidia` or `amd`.
        distribution: what to install.
    """
    triton = environment.triton
    if triton is None or not (triton.version or triton.backends):
        owners = triton.owners if triton else ()
        listed = f", although {' and '.join(owners)} count as installed" if owners else ""
        return (
            Reason(
                "triton_missing",
                f"there is no module triton{listed}",
                value="its files are gone" if owners else "not installed",
                bound=f"triton >= {least} with its {compiler} compiler",
                remedy=_reinstall(owners, distribution)
                if owners
                else f"pip install {distribution}",
            ),
        )
    found = []
    if not _at_least(triton.version, least):
        found.append(
            Reason(
                "triton_too_old",
                f"the module triton is version {triton.version or 'unknown'}",
                value=triton.version or "unknown",
                bound=f">= {least}",
                remedy=f"pip install --upgrade {distribution}",
            )
        )
    if compiler not in triton.backends:
        found.append(
            Reason(
                "triton_lacks_compiler",
                f"the module triton has no {compiler} compiler, only "
                f"{', '.join(triton.backends) or 'none'}",
                value=", ".join(triton.backends) or "none",
                bound=compiler,
                remedy=_reinstall(triton.owners, distribution),
            )
        )
    if found and len(triton.owners) > 1:
        found.append(
            Reason(
                "triton_overwritten",
                f"{' and '.join(triton.owners)} install the same folder; the last one won",
                value=", ".join(triton.owners),
                bound="one distribution",
                remedy=_reinstall(triton.owners, distribution),
            )
        )
    return tuple(found)


def dtype_reasons(name: str, problem: Problem, *, bfloat16: bool = True) -> tuple[Reason, ...]:
    """Why the dtype does not run; the interpreter computes bfloat16 wrongly, so it is refused."""
    allowed = tuple(dtype for dtype in DTYPES if bfloat16 or dtype != torch.bfloat16)
    if problem.dtype in allowed:
        return ()
    return (
        Reason(
            "dtype_unsupported",
            f"{name} does not compute in {problem.dtype} here",
            value=str(problem.dtype),
            bound=", ".join(map(str, allowed)),
            remedy="convert the tensors, or backend='torch'",
        ),
    )


def head_dim_reasons(problem: Problem) -> tuple[Reason, ...]:
    """Why the head dimensions do not run: no tuned table has an entry for larger ones."""
    largest = max(problem.key_dim, problem.value_dim)
    if largest <= LARGEST_HEAD:
        return ()
    return (
        Reason(
            "head_dim_too_large",
            f"the largest head dimension is {largest}",
            value=str(largest),
            bound=f"at most {LARGEST_HEAD}",
            remedy="backend='torch'",
        ),
    )


@functools.lru_cache(maxsize=8)
def _at_least(version: str, least: str) -> bool:
    try:
        return Version(Version(version).base_version) >= Version(least)
    except InvalidVersion:
        return False


def _reinstall(owners: tuple[str, ...], distribution: str) -> str:
    return f"pip uninstall -y {' '.join(owners) or 'triton'} && pip install {distribution}"
