"""`nsa-port tune`: find the fastest values on this machine and write them as a table.

Nothing is ever tuned unless asked: a run of this command ends in a file, and the environment
variable `NSA_PORT_TABLES` makes the library use it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from nsa_port import environment as machine
from nsa_port.bench.command import heads_argument
from nsa_port.bench.shapes import STANDARD, parse_heads
from nsa_port.conformance.case import backend_named
from nsa_port.kernels import tables
from nsa_port.kernels.tables import TableError
from nsa_port.tune.candidates import KERNELS
from nsa_port.tune.result import describe, document, to_text
from nsa_port.tune.search import CannotTune, tune
from nsa_port.tune.trial import Job

BACKENDS = ("cuda", "rocm")
_LENGTH, _CHECKED_LENGTH, _EMULATED_LENGTH = 8192, 512, 128
_EMULATED_SHAPE = "4,1,64,64"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `nsa-port tune`."""
    add = parser.add_argument
    add("--backend", choices=BACKENDS, help="by default the one made for the GPU at hand")
    add(
        "--shapes",
        nargs="+",
        type=heads_argument,
        metavar="SHAPE",
        help="A1, A2, B, or H,HK,Dk,Dv; by default A2",
    )
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--length", type=int, help=f"in tokens, by default {_LENGTH}; emulated {_EMULATED_LENGTH}")
    add("--kernels", nargs="+", choices=list(KERNELS), help="by default all")
    add(
        "--may-spill",
        type=int,
        default=0,
        metavar="BYTES",
        help="of a thread's registers, by default 0",
    )
    add("--out", type=Path, metavar="FILE", help="by default ./<architecture>.json")


def main(args: argparse.Namespace) -> int:
    """Try candidates, print what was found, write the table. 2 if nothing can be tuned here."""
    try:
        job = find_job(args.backend, args.dtype, args.length)
        shapes = args.shapes or [parse_heads(_EMULATED_SHAPE) if job.emulated else STANDARD["A2"]]
        out = args.out or Path(f"{job.arch}.json")
        out.parent.mkdir(parents=True, exist_ok=True)
        before = json.loads(out.read_text(encoding="utf-8")) if _is_table(out, job.arch) else {}
        found = tune(job, shapes, args.kernels, args.may_spill)
    except (CannotTune, TableError) as error:
        print(f"nsa-port tune: {error}", file=sys.stderr)
        return 2
    print(describe(found))
    out.write_text(to_text(document(found, before)), encoding="utf-8")
    print(f"\nwritten to {out}; NSA_PORT_TABLES={out.resolve().parent} makes nsa_port use it")
    if out.name != f"{job.arch}.json":
        print(f"once it is called {job.arch}.json, the name under which {job.arch} looks for it")
    return 0


def find_job(backend: str | None, dtype: str, length: int | None) -> Job:
    """What is tuned here: the GPU at hand, or the one that `NSA_PORT_EMULATE` names.

    The job's shape is still to be set.

    Raises:
        CannotTune: there is no GPU, or the backend does not run on it.
    """
    environment = machine.probe(machine.default_device())
    if environment.emulate and backend == "rocm":
        environment = machine.probe(torch.device("cpu"))
    emulated = environment.device_type == "cpu" and bool(environment.emulate)
    if environment.device_type != "cuda" and not emulated:
        raise CannotTune(
            "there is no GPU on this machine whose kernels could be timed; with "
            "NSA_PORT_EMULATE=gfx942 candidates are ranked by the cycles they take to issue"
        )
    native = "rocm" if emulated or environment.hip_version else "cuda"
    chosen = backend_named(backend or native)
    reasons = [reason for reason in chosen.machine_reasons(environment) if not reason.soft]
    if environment.interpreter:
        raise CannotTune("TRITON_INTERPRET=1 keeps kernels from being compiled: unset it")
    if reasons:
        raise CannotTune(f"{chosen.name} does not run here: {'; '.join(map(str, reasons))}")
    length = length or (_EMULATED_LENGTH if emulated else _LENGTH)
    return Job(
        backend=chosen.name,
        module=chosen.kernels["selected_attention"],
        arch=environment.emulate if emulated else environment.arch,
        shared_memory=environment.shared_memory or None,
        device="cpu" if emulated else "cuda",
        heads=STANDARD["A2"],
        dtype=dtype,
        length=length,
        check_length=length if emulated else min(length, _CHECKED_LENGTH),
        emulated=emulated,
    )


def _is_table(path: Path, arch: str) -> bool:
    """Whether there is a table to add to; raises TableError for a file that is none."""
    if not path.exists():
        return False
    tables.read_table(path, arch)
    return True
