"""Holds a backend to the reference on calls drawn at random, for as long as it is let.

Sizes, config, dtype, strides, packed sequences and positions are drawn; forward, the choice of
blocks and backward are held to the float64 reference by the suite's rule, and calls that come again
must give the same to the bit. Prints what fails, and fails if anything does.

    python ci/random_calls.py --backend cuda --seconds 200 --jobs 14

Under Triton's interpreter or an emulated GPU, `--tokens` and `--scores` keep calls small enough.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_port import environment
from nsa_port.backends.interface import Backend
from nsa_port.conformance import hold
from nsa_port.conformance.case import REQUIRED, Context, backend_named, default_device
from nsa_port.conformance.inputs import NAMES, Inputs, Shape, like, make, run
from nsa_port.conformance.poison import uninitialised_memory_is_nan
from nsa_port.kernels.geometry import NSAConfig
from nsa_port.tune.trial import is_dead

DIMS = (
    *[(128, 128)] * 6, *[(192, 128)] * 4, *[(64, 64)] * 3,
    (256, 256), (192, 192), (80, 256), (100, 36), (32, 64), (96, 96), (160, 128), (128, 64),
    (64, 128), (24, 40), (16, 16), (8, 8), (192, 64),
)  # fmt: skip
GROUPS = (1, 2, 3, 4, 4, 5, 8, 12, 16, 16, 16, 20, 32, 48, 64)
EDGES = (127, 128, 129, 1023, 1024, 1025, 2048)
"""Lengths around which kernels take turns."""
_FEWEST_QUERIES = 32


class Limits(NamedTuple):
    """How large a call may be: scores, that is queries times keys times heads, and tokens."""

    scores: float
    tokens: int


def draw_config(pick: random.Random) -> NSAConfig:
    if pick.random() < 0.35:
        return NSAConfig()
    while True:
        stride = pick.choice((1, 2, 4, 5, 8, 12, 16, 32))
        size = stride * pick.choice((1, 1, 2, 2, 3, 4, 8))
        select = stride * pick.choice((1, 2, 3, 4, 4, 6, 8, 16))
        init, local = pick.choice((0, 1, 1, 2, 3)), pick.choice((0, 1, 2, 2, 4))
        number = pick.choice((1, 2, 3, 5, 8, 13, 16, 16, 17, 24, 32, 40))
        window = pick.choice((1, 7, 16, 33, 64, 100, 200, 512, 777))
        score_map = pick.choice(("overlap", "overlap", "literal"))
        try:
            return NSAConfig(size, stride, select, number, init, local, window, score_map)
        except ValueError:  # sizes that do not go together
            continue


def draw_lengths(pick: random.Random, tokens: int) -> tuple[tuple[int, int], ...]:
    """Packed sequences of (queries, keys), empty ones among them."""
    lengths = []
    for _ in range(pick.randint(1, 6)):
        queries = pick.choice((0, 1, pick.randint(0, max(1, tokens // 2))))
        more = pick.choice((0, 0, 0, 1, pick.randint(0, tokens)))
        lengths.append((queries, queries + more))
    return tuple(lengths) if any(keys for _, keys in lengths) else ((5, 5),)


def draw_shape(pick: random.Random, limits: Limits) -> Shape:
    def length() -> int:
        return int(math.exp(pick.uniform(0, math.log(limits.tokens))))

    edges = [x for x in EDGES if x <= limits.tokens]
    T = pick.choice(edges) if edges and pick.random() < 0.2 else length()
    S = T if pick.random() < 0.6 else T + length()
    lengths = draw_lengths(pick, T) if pick.random() < 0.35 else ()
    if lengths:
        T, S = (sum(numbers) for numbers in zip(*lengths, strict=True))
    Dk, Dv = pick.choice(DIMS)
    HK, G, B = pick.choice((1, 1, 2, 2, 3, 4)), pick.choice(GROUPS), pick.choice((1, 1, 1, 2, 3))
    HK = max(1, min(HK, int(limits.scores / max(1, T * S * G))))
    while G > 1 and limits.scores < T * S * HK * G:
        G //= 2
    return Shape(
        T=T, S=S, B=1 if lengths or limits.scores < T * S * HK * G * B else B, H=HK * G, HK=HK,
        Dk=Dk, Dv=Dv, cfg=draw_config(pick), lengths=lengths,
        scale=None if pick.random() < 0.85 else pick.choice((0.5, -0.1, 1e-3)),
    )  # fmt: skip


def with_strides(pick: random.Random, tensor: Tensor) -> Tensor:
    """The same values, contiguous, by heads, or as a part of something larger."""
    kind = pick.choice(("as it is", "as it is", "by heads", "columns", "rows"))
    if kind == "by heads":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "columns":
        return torch.cat((tensor, tensor), 3)[..., : tensor.shape[3]]
    if kind == "rows":
        return torch.nn.functional.pad(tensor, (0, 0, 0, 0, 2, 1))[:, 2 : 2 + tensor.shape[1]]
    return tensor


def draw(seed: int, device: torch.device, dtypes: Sequence[torch.dtype], limits: Limits) -> Inputs:
    pick = random.Random(seed)
    shape = draw_shape(pick, limits)
    inputs = make(shape, pick.choice(dtypes), device, seed=seed)
    if pick.random() < 0.4:
        inputs = inputs.map(partial(with_strides, pick))
    if not shape.lengths and pick.random() < 0.15:
        size = (shape.B, shape.T) if pick.random() < 0.5 else (shape.T,)
        generator = torch.Generator().manual_seed(seed)
        positions = torch.randint(-1, inputs.num_keys, size, generator=generator)
        inputs = replace(inputs, positions=positions.to(device, torch.int32))
    return inputs


def check(context: Context, inputs: Inputs) -> None:
    """Both ways against the reference, memory that nothing wrote reading as NaN; then again, as
    often as it takes for calls to be repeated, to the bit.

    The gradients of few queries may be all cancellation, which the suite's rule has no measure for.
    """
    with uninitialised_memory_is_nan():
        got = hold.forward(context, inputs)
        if inputs.q.shape[1] >= _FEWEST_QUERIES:
            hold.backward(context, inputs)
    leaves = inputs.leaves()
    first: tuple[Tensor, ...] = ()
    for _ in range(1 if context.slow else 4):
        again = run(leaves, context.name, needs_grad=True)
        for name, one, other in zip(got._fields, got, again, strict=True):
            context.same(name, other.detach(), one.detach())
        gradients = torch.autograd.grad(again.out, leaves.tensors, like(again.out, 99))
        first = first or gradients
        for name, one, other in zip(NAMES, first, gradients, strict=True):
            context.same(f"d{name}", other, one)


def described(inputs: Inputs) -> str:
    shapes = " ".join(str(list(x.shape)) for x in (inputs.q, inputs.k_cmp, inputs.v_slc))
    packed = [x.tolist() for x in (inputs.cu_seqlens, inputs.cu_seqlens_k) if x is not None]
    positions = "" if inputs.positions is None else ", positions"
    dtype = str(inputs.q.dtype).removeprefix("torch.")
    return f"{dtype} {shapes} {packed or ''}{positions}, scale {inputs.scale}, {inputs.cfg}"


class Tried(NamedTuple):
    """What came of one call: `faults` is empty if nothing is wrong."""

    seed: int
    faults: str = ""
    is_held: bool = True
    device_works: bool = True


def try_one(seed: int, chosen: Backend, limits: Limits) -> Tried:
    device = default_device(chosen)
    context = Context(chosen, device)
    # Triton's interpreter is wrong for bfloat16.
    interpreted = environment.probe(device).interpreter
    dtypes = [x for x in REQUIRED if not (interpreted and x == torch.bfloat16)]
    inputs = draw(seed, device, dtypes, limits)
    context.dtype = inputs.q.dtype
    try:
        check(context, inputs)
    except torch.OutOfMemoryError:
        return Tried(seed, is_held=False)
    except Exception as error:
        text = f"{type(error).__name__}: {str(error)[:500]}"
        return Tried(seed, f"{described(inputs)}\n  {text}", device_works=not is_dead(device))
    broken = [
        f"{m.name}: {m.error:.3g} > {m.budget:.3g}" for m in context.measurements if not m.holds
    ]
    found = [*context.failures, *broken]
    return Tried(seed, f"{described(inputs)}\n  {'; '.join(found[:5])}" if found else "")


def try_many(first: int, step: int, seconds: float, backend: str, limits: Limits) -> list[Tried]:
    chosen, end = backend_named(backend), time.monotonic() + seconds
    torch.set_num_threads(1)
    tried = []
    for seed in itertools.count(first, step):
        tried.append(try_one(seed, chosen, limits))
        if torch.cuda.is_available() and tried[-1].device_works:
            torch.cuda.empty_cache()
        if time.monotonic() > end or not tried[-1].device_works:
            return tried
    raise AssertionError("seeds do not end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1, help="the first; each call has its own")
    parser.add_argument("--tokens", type=int, default=3500, help="of a sequence, at most")
    parser.add_argument("--scores", type=float, default=2.5e8, help="queries x keys x heads")
    args = parser.parse_args()
    limits = Limits(args.scores, args.tokens)
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        jobs = [
            pool.submit(try_many, args.seed + i, args.jobs, args.seconds, args.backend, limits)
            for i in range(args.jobs)
        ]
        tried = [one for job in jobs for one in job.result()]
    faulty = [one for one in tried if one.faults]
    for one in faulty:
        print(f"seed {one.seed}: {one.faults}")
    held = sum(one.is_held for one in tried)
    print(f"{args.backend}: {held} calls held, {len(faulty)} of them faulty; "
          f"{len(tried) - held} did not fit into memory")  # fmt: skip
    sys.exit(bool(faulty))


if __name__ == "__main__":
    main()
