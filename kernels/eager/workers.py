"""Spreads independent pieces of work over threads: one long run each instead of many short teams.

Tiles are small enough for a core's cache, so splitting each operation over all cores would spend
more time at barriers than in arithmetic, and far more where another process wants a core too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

_LEAST_WORK = 1 << 22


def run(tasks: Sequence[Callable[[], None]], work: int) -> None:
    """Run all tasks, in threads if `work` (multiplications, roughly) pays for starting them.

    Tasks write to places of their own, so the outcome does not depend on the threads. Each worker
    gets its share of PyTorch's own threads.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(tasks))
    if workers < 2 or work < _LEAST_WORK:
        with sized_for(work):
            for task in tasks:
                task()
        return
    inference = torch.is_inference_mode_enabled()

    def guarded(task: Callable[[], None]) -> None:
        with torch.inference_mode(inference), torch.no_grad():  # both are per thread
            task()

    try:
        with ThreadPoolExecutor(
            workers, initializer=torch.set_num_threads, initargs=(threads // workers,)
        ) as pool:
            for future in [pool.submit(guarded, task) for task in tasks]:
                future.result()
    finally:
        # A thread's own number is also what threads started later begin with.
        torch.set_num_threads(threads)


@contextmanager
def sized_for(work: int) -> Iterator[None]:
    """Keep to one thread where `work` is too little for a team of them, as in decoding."""
    threads = torch.get_num_threads()
    if threads == 1 or work >= _LEAST_WORK:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
