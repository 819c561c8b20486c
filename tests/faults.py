"""Workers that are killed, stopped and cut off at random moments, and what the store makes of it.

Each function brings one fault about and returns what happened. After each, the store must be
clean, and hold everything that was committed before.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
from contextlib import contextmanager
import hashlib
import multiprocessing
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
import os
from pathlib import Path
import queue
import random
import signal
import socket
import subprocess
import tempfile
import threading
from threading import Barrier
import time
from typing import Any

import numpy as np
import sqlalchemy as sa
import torch

from optuna_ttp import StoreError
from optuna_ttp.store import _migrate
from optuna_ttp.store import SpectrumStore
from optuna_ttp.task import FineTuningTask
from tests.cases import spectrum
from tests.servers import PostgreSQL


# A clean parent that has imported everything and opened nothing: workers start at once.
_processes: Any = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
_processes.set_forkserver_preload(
    [
        "tests.faults",
        *("alembic.command", "alembic.config", "alembic.script"),
        *("optuna_ttp.ntk._compute", "sqlalchemy.dialects.postgresql.psycopg"),
    ]
)
_LEASE = 1.0
_PATIENCE = 120.0


def task(seed: int, n_samples: int = 90) -> FineTuningTask:
    """A task whose spectrum takes about half a second, and more than one chunk at 90 samples."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_samples, 20, generator=generator)
    y = torch.randint(10, (n_samples,), generator=generator)
    model = torch.nn.Sequential(torch.nn.Linear(20, 48), torch.nn.Tanh(), torch.nn.Linear(48, 10))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return FineTuningTask(model, (x, y))


def open_store(url: str, **options: Any) -> SpectrumStore:
    return SpectrumStore(url, lease_seconds=_LEASE, **options)


def digest(store: SpectrumStore, seed: int) -> str | None:
    """What tells whether two workers got the same numbers."""
    computed = store.get(task(seed))
    return None if computed is None else hashlib.sha256(computed.to_bytes()).hexdigest()


def get_or_compute(url: str, seed: int) -> str:
    """Ask for a spectrum as a worker does and return what tells its bytes apart.

    They hold the second and the duration of the computation: what was computed twice differs.
    """
    torch.set_num_threads(1)
    computed = open_store(url).get_or_compute(
        task(seed), measure_speed=False, probe=False, show_progress_bar=False
    )
    return hashlib.sha256(computed.to_bytes()).hexdigest()


class Worker:
    """A process that does one thing and tells its result or its error."""

    def __init__(self, work: Callable[..., Any], *arguments: Any) -> None:
        self._answers: Queue[tuple[bool, Any]] = _processes.Queue()
        self._process: BaseProcess = _processes.Process(
            target=_answer, args=(self._answers, work, arguments)
        )
        self._process.start()

    def send(self, kind: signal.Signals) -> None:
        pid = self._process.pid
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, kind)

    def kill(self) -> bool:
        """End it without a goodbye; whether it was still at work."""
        self.send(signal.SIGKILL)
        self._process.join()
        return self._process.exitcode == -signal.SIGKILL

    def is_at_work(self) -> bool:
        return self._process.is_alive()

    def wait_until_begun(self) -> None:
        assert self._answers.get(timeout=_PATIENCE) == (True, "begun")

    def result(self) -> Any:
        done: bool = True
        value: Any = "begun"
        try:
            while value == "begun":
                done, value = self._answers.get(timeout=_PATIENCE)
        except queue.Empty:
            self.kill()
            raise TimeoutError("A worker did not come to an end.") from None
        self._process.join()
        if not done:
            raise value
        return value


def _answer(answers: Queue[Any], work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    answers.put((True, "begun"))
    try:
        answers.put((True, work(*arguments)))
    except Exception as error:
        answers.put((False, error))


def at_once(n_processes: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Do something in several processes, which wait for each other first; return the results.

    The work gets the barrier that it must wait at, and the arguments.
    """
    start = _processes.Barrier(n_processes)
    workers = [Worker(work, start, *arguments) for _ in range(n_processes)]
    return [worker.result() for worker in workers]


def open_and_count(start: Barrier, url: str, migrations: Path | None = None) -> int:
    """Open a store and return how many spectra it lists.

    With a folder of migrations this process is of a version 2 that has them.
    """
    if migrations is not None:
        module: Any = _migrate
        module.MIGRATIONS, module.HEAD = migrations, "0002"
    start.wait(_PATIENCE)
    return len(open_store(url).list())


def compute_three_ranks(start: Barrier, url: str) -> int:
    """Compute three spectra of a task, store a fourth, and return how many are listed."""
    torch.set_num_threads(1)
    one = task(0, n_samples=5)
    settings: dict[str, Any] = {"measure_speed": False, "probe": False}
    start.wait(_PATIENCE)
    store = open_store(url)
    for rank in (1, 2, 3):
        store.get_or_compute(one, rank=rank, show_progress_bar=False, **settings)
        store.put(spectrum())
    return len(store.list())


def check(url: str, seeds: list[int]) -> None:
    """Nothing is damaged, half-written or orphaned, and all that was committed is there."""
    store = open_store(url)
    verification = store.verify()
    assert verification.is_clean, verification
    stored = {line.fingerprint for line in store.list()}
    missing = [seed for seed in seeds if task(seed).fingerprint not in stored]
    assert not missing, f"The spectra {missing} are lost."


def kill_owner(url: str, seed: int, generator: random.Random, seconds: float) -> dict[str, Any]:
    """The worker that computes is killed; one that waits must finish."""
    owner = Worker(get_or_compute, url, seed)
    owner.wait_until_begun()
    successor = Worker(get_or_compute, url, seed)
    successor.wait_until_begun()
    time.sleep(generator.uniform(0, seconds))
    was_at_work = owner.kill()
    result = successor.result()
    assert result == digest(open_store(url), seed)
    return {"hit": was_at_work}


def read_for_ever(url: str, seed: int) -> None:
    store = open_store(url)
    while True:
        assert store.get(task(seed)) is not None


def kill_reader(url: str, seed: int, generator: random.Random, seconds: float) -> dict[str, Any]:
    """A worker that reads is killed."""
    before = get_or_compute(url, seed)
    reader = Worker(read_for_ever, url, seed)
    reader.wait_until_begun()
    time.sleep(generator.uniform(0, seconds))
    was_at_work = reader.kill()
    assert digest(open_store(url), seed) == before
    return {"hit": was_at_work}


def write(url: str, seed: int, seconds: float) -> str:
    """Write a spectrum again and again, each time as a whole, for so long at least."""
    torch.set_num_threads(1)
    from optuna_ttp.ntk import compute_spectrum

    computed = compute_spectrum(
        task(seed), measure_speed=False, probe=False, show_progress_bar=False
    )
    store = open_store(url)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        store.put(computed, overwrite=True)
    return hashlib.sha256(computed.to_bytes()).hexdigest()


def kill_writer(url: str, seed: int, generator: random.Random, seconds: float) -> dict[str, Any]:
    """A worker that replaces a spectrum is killed: the old or the new one is there."""
    get_or_compute(url, seed)
    before = open_store(url).get(task(seed))
    writer = Worker(write, url, seed, _PATIENCE)
    writer.wait_until_begun()
    time.sleep(seconds + generator.uniform(0, seconds))
    was_at_work = writer.kill()
    after = open_store(url).get(task(seed))
    assert before is not None
    assert after is not None
    # Computed twice, at different times, from the same numbers.
    np.testing.assert_allclose(after.eigenvalues, before.eigenvalues, rtol=1e-3)
    return {"hit": was_at_work}


def wait_until_stored(url: str, seed: int) -> None:
    store = open_store(url)
    deadline = time.monotonic() + _PATIENCE
    while task(seed).fingerprint not in {line.fingerprint for line in store.list()}:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def restart_server(
    url: str, seed: int, generator: random.Random, seconds: float, server: PostgreSQL
) -> dict[str, Any]:
    """The server crashes and comes back while a worker writes, which must not notice."""
    writer = Worker(write, url, seed, 2.0 * seconds)
    wait_until_stored(url, seed)
    time.sleep(generator.uniform(0, seconds))
    was_at_work = writer.is_at_work()
    server.restart("immediate")
    result = writer.result()
    assert result == digest(open_store(url), seed)
    return {"hit": was_at_work}


def stop_owner(url: str, seed: int, generator: random.Random, seconds: float) -> dict[str, Any]:
    """The worker that computes stands still for longer than its lease, then goes on."""
    owner = Worker(get_or_compute, url, seed)
    owner.wait_until_begun()
    time.sleep(generator.uniform(0, seconds))
    was_at_work = owner.is_at_work()
    owner.send(signal.SIGSTOP)
    successor = Worker(get_or_compute, url, seed)
    successor.wait_until_begun()
    time.sleep(1.5 * _LEASE)
    # It may have been stopped within a transaction, which holds SQLite's lock.
    owner.send(signal.SIGCONT)
    results = {successor.result(), owner.result()}
    assert results == {digest(open_store(url), seed)}
    return {"hit": was_at_work}


def cut_connection(
    url: str, seed: int, generator: random.Random, seconds: float
) -> dict[str, Any]:
    """All connections of a worker are reset at once; it must go on with new ones."""
    with Proxy(url) as proxy:
        worker = Worker(write, proxy.url, seed, 2.0 * seconds)
        wait_until_stored(url, seed)
        time.sleep(generator.uniform(0, seconds))
        was_at_work = worker.is_at_work()
        n_cut = proxy.cut()
        result = worker.result()
    assert result == digest(open_store(url), seed)
    return {"hit": was_at_work and n_cut > 0}


class Proxy:
    """Stands between a worker and its server, and can cut the wire."""

    def __init__(self, url: str) -> None:
        target = sa.make_url(url)
        assert target.host is not None
        assert target.port is not None
        self._target = (target.host, target.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.url = target.set(port=port).render_as_string(hide_password=False)
        self._ends: list[socket.socket] = []

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._listener.close()
        self.cut()

    def cut(self) -> int:
        ends, self._ends = self._ends, []
        n_open = 0
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
                n_open += 1
        return n_open

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._ends += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(2**16):
            sink.sendall(data)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@contextmanager
def small_disk(megabytes: int) -> Iterator[Path]:
    """A file system of its own, which can be full. Needs the right to mount one."""
    folder = Path(tempfile.mkdtemp(prefix="ttp-disk-"))
    options = ["-t", "tmpfs", "-o", f"size={megabytes}m,mode=777", "tmpfs"]
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, check=False)
    if done.returncode:
        folder.rmdir()
        raise PermissionError("No file system can be mounted here.")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
        folder.rmdir()


def fill_disk(url: str, disk: Path, seed: int, generator: random.Random) -> dict[str, Any]:
    """The disk is full somewhere within a write: it fails, and works once there is space."""
    first = get_or_compute(url, seed)
    n_bytes = sum(line.n_bytes for line in open_store(url).list())
    filler = disk / "filler"
    status = os.statvfs(disk)
    free = status.f_bavail * status.f_frsize
    n_filled = free - int(generator.uniform(0.05, 1.0) * n_bytes)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, n_filled)
    failed = False
    try:
        get_or_compute(url, seed + 1)
    except StoreError:
        failed = True
    filler.unlink()
    check(url, [seed] if failed else [seed, seed + 1])
    assert digest(open_store(url), seed) == first
    second = get_or_compute(url, seed + 1)
    assert digest(open_store(url), seed + 1) == second
    return {"hit": failed}
