"""Independent jobs on single-thread worker processes, with their progress shown in one place.

On a machine that also does something else, one thread per process is far faster than one process with several threads: those
wait for each other at every operation (sampling with two threads was measured at 0.23 s per image on two idle cores, and
between 2 and 6 s with another process on one of them).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from typing import Any, TypeVar

import torch
from rich.progress import Progress, TaskID

Job = TypeVar("Job")
Result = TypeVar("Result")
POLL_SECONDS = 0.1
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # Activations of a few megabytes are freed and allocated again all the time. Keeping that memory spares glibc a tenth of
    # the whole sampling time, 0.06 s per image.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 25),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}


class Reporter:
    """Reports a job's progress by ``(worker, text, total)`` events; an empty text means that one step is done."""

    def __init__(self, send: Callable[[tuple[int, str, int | None]], None]) -> None:
        self.send = send

    def start(self, text: str, total: int | None = None) -> None:
        """Begin a task of ``total`` steps; ``None`` if their number is unknown."""
        self.send((os.getpid(), text, total))

    def step(self) -> None:
        self.send((os.getpid(), "", None))


class Bars:
    """Draws events: a bar over all jobs, counted in their steps, and one bar per worker. Draws nothing without a display."""

    def __init__(self, progress: Progress | None, steps: int) -> None:
        self.progress = progress
        self.workers: dict[int, TaskID] = {}
        if progress:
            self.all = progress.add_task("all rows", total=steps)

    def handle(self, event: tuple[int, str, int | None]) -> None:
        if not self.progress:
            return
        worker, text, total = event
        if worker not in self.workers:
            self.workers[worker] = self.progress.add_task("", total=None)
        if text:
            self.progress.reset(self.workers[worker], description=text, total=total)
        else:
            self.progress.advance(self.workers[worker])
            self.progress.advance(self.all)

    def close(self) -> None:
        if self.progress:
            for task in self.workers.values():
                self.progress.remove_task(task)


def run_jobs(
    function: Callable[[Job, Reporter], Result],
    jobs: Sequence[Job],
    *,
    workers: int,
    steps: int,
    progress: Progress | None = None,
) -> list[Result]:
    """``[function(job, reporter) for job in jobs]``, on ``workers`` processes of one thread each if there are several.

    Args:
        function: importable by name; jobs and results can be pickled.
        jobs: the last is started first.
        workers: 1 runs everything in this process, with all its threads.
        steps: number of steps that all jobs together will report.
        progress: a running rich progress display, or ``None``.
    """
    bars = Bars(progress, steps)
    try:
        if workers == 1:
            return [function(job, Reporter(bars.handle)) for job in jobs]
        return _run_on_processes(function, jobs, workers, bars)
    finally:
        bars.close()


def _run_on_processes(function: Callable[[Job, Reporter], Result], jobs: Sequence[Job], workers: int, bars: Bars) -> list[Result]:
    context = get_context("spawn")  # a fork would copy OpenMP's state in the middle of something
    events = context.Queue()
    others = set(active_children())
    with (
        ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(events,)) as pool,
        _environment(WORKER_ENVIRONMENT),
    ):
        futures: list[Future[Result]] = [pool.submit(_run_job, function, job) for job in reversed(jobs)]
        try:
            waiting: set[Future[Result]] = set(futures)
            while waiting:
                done, waiting = wait(waiting, timeout=POLL_SECONDS)
                while not events.empty():
                    bars.handle(events.get())
                for future in done:
                    future.result()  # raise what a worker raised now, not when all are done
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if not isinstance(error, Exception):  # interrupted or ended: do not wait for the jobs in progress
                for process in set(active_children()) - others:
                    process.terminate()
            raise
        return [future.result() for future in reversed(futures)]


_reporter: Reporter | None = None  # the reporter of this worker process


def _start_worker(events: Any) -> None:
    global _reporter
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end quietly with the main process
    torch.set_num_threads(1)
    _reporter = Reporter(events.put)


def _run_job(function: Callable[[Job, Reporter], Result], job: Job) -> Result:
    assert _reporter is not None
    return function(job, _reporter)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while; processes started meanwhile inherit them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
