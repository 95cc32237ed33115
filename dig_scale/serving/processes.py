"""A pool of processes on one machine that share its cores, and that end with the process that started them.

In: how many, and what each does once when it starts. Out: a ProcessPoolExecutor. Knows nothing of what is computed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from threading import Thread
from typing import Any

import torch


def process_count(wanted: int | None) -> int:
    """As many processes as are wanted, else one per GPU, else one per core."""
    if wanted is not None:
        return wanted
    return torch.cuda.device_count() or len(os.sched_getaffinity(0))


@contextmanager
def processes(count: int, begin: Callable[..., None], *given: Any) -> Iterator[ProcessPoolExecutor]:
    """`count` processes, each of which calls begin(*given) first and has its share of the cores for threads of torch."""
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    pool = ProcessPoolExecutor(
        count, mp_context=get_context("spawn"), initializer=_begun, initargs=(threads, begin, given)
    )
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begun(threads: int, begin: Callable[..., None], given: tuple[Any, ...]) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    begin(*given)


def _end_with_parent() -> None:
    """Leave when the process that started this one is gone, however it ended."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(3)
