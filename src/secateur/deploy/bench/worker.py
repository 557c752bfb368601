"""A process of its own for each model, which measures when it is told to."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import psutil

from secateur.deploy.bench.runtimes.runtime import Session, Settings, find_runtime
from secateur.runs.errors import SecateurError, reason_of
from secateur.runs.processes import end_with

# The libraries that compute read these when they are imported.
_THREADS = "OMP_NUM_THREADS MKL_NUM_THREADS OPENBLAS_NUM_THREADS".split()

# Nothing large is imported here, since its memory would count as that of every runtime.

Work = Literal["load", "prefill", "decode"]

# Where processes cannot be stopped for a while, turns are not cut up.
_STOP: int | None = getattr(signal, "SIGSTOP", None)
_CONTINUE: int | None = getattr(signal, "SIGCONT", None)
CAN_PAUSE = _STOP is not None


@dataclass(frozen=True)
class Task:
    """What is timed in one turn.

    Attributes:
        work: reading a model, its prompt, or writing.
        batch: sequences at once.
        prompt: tokens of each sequence that are there before.
        tokens: of each sequence that are counted.
    """

    work: Work
    batch: int = 1
    prompt: int = 1
    tokens: int = 1


@dataclass(frozen=True)
class Turn:
    """What one turn took.

    Attributes:
        seconds: wall time of what is timed, while the process was let run.
        processor_seconds: the same of all threads.
        spent: processor time of the whole turn, with what is not timed.
    """

    seconds: float
    processor_seconds: float
    spent: float


@dataclass(frozen=True)
class Resident:
    """What a process has in memory, when everything was measured.

    Attributes:
        before: bytes before a model was loaded.
        loaded: bytes after its first token.
        peak: bytes at the most.
        kernel: what multiplies its matrices, as far as the runtime says.
    """

    before: int
    loaded: int
    peak: int
    kernel: str


@dataclass(frozen=True)
class _Span:
    """What a process timed: from when to when, by the clock that all processes share."""

    begin: float
    end: float
    processor_seconds: float
    spent: float


class Worker:
    """The other end: gives a process its turns, and says why it is gone.

    Attributes:
        label: what sentences call the model and its runtime.
    """

    def __init__(self, label: str, process: Any, connection: Connection, log: Path) -> None:
        self.label = label
        self._process = process
        self._connection = connection
        self._log = log
        self._waiting: Task | None = None
        self._ran: list[tuple[float, float]] = []

    @property
    def pid(self) -> int:
        """Number of the process."""
        return int(self._process.pid)

    def begin(self, task: Task) -> None:
        """Hold a task ready; nothing is done before ``run``."""
        self._waiting = task
        self._ran = []

    def run(self, seconds: float | None) -> Turn | None:
        """Let the process work for a while, or to its end if None.

        Returns:
            What the turn took, None if it goes on.
        """
        began = time.perf_counter()
        if self._waiting is not None:
            self._send("turn", self._waiting)
            self._waiting = None
        else:
            self._signal(_CONTINUE)
        if seconds is not None and not self._poll(seconds):
            self._signal(_STOP)
            self._ran.append((began, time.perf_counter()))
            return None
        span: _Span = self._receive()
        self._ran.append((began, time.perf_counter()))
        parts = [min(end, span.end) - max(begin, span.begin) for begin, end in self._ran]
        return Turn(sum(max(0.0, part) for part in parts), span.processor_seconds, span.spent)

    def memory(self) -> Resident:
        """What its process takes."""
        self._send("memory", None)
        answer: Resident = self._receive()
        return answer

    def _signal(self, number: int | None) -> None:
        if number is not None and self._process.is_alive():
            os.kill(self.pid, number)

    def _poll(self, seconds: float) -> bool:
        with self._alive():
            return self._connection.poll(seconds)

    def _send(self, what: str, task: Task | None) -> None:
        with self._alive():
            self._connection.send((what, task))

    def _receive(self) -> Any:
        with self._alive():
            value, reason = self._connection.recv()
        if reason is not None:
            raise SecateurError(f"{self.label} cannot be measured ({reason}{self._last_words()}).")
        return value

    @contextmanager
    def _alive(self) -> Iterator[None]:
        """Say how the process ended, if it does."""
        try:
            yield
        except (EOFError, OSError):
            self._process.join()
            status = self._process.exitcode
            ended = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
            raise SecateurError(
                f"The process of {self.label} ended with {ended} while it was measured"
                f"{self._last_words()}; there may be too little memory for it."
            ) from None

    def _last_words(self) -> str:
        """The last line that its libraries wrote about an error."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        wrong = [line.strip() for line in lines if "error" in line.lower()]
        return f"; it last said: {reason_of(Exception(wrong[-1]))}" if wrong else ""


@contextmanager
def worker(
    label: str, runtime: str, path: Path, settings: Settings, vocabulary: int
) -> Iterator[Worker]:
    """A process that has a model in a runtime; it ends with this block, however that ends."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        log = Path(folder, "log")
        log.touch()
        arguments = (there, os.getpid(), log, runtime, path, settings, vocabulary)
        process = spawn.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        there.close()
        try:
            yield Worker(label, process, here, log)
        finally:
            here.close()
            process.kill()
            process.join()


def _serve(
    connection: Connection,
    parent: int,
    log: Path,
    runtime: str,
    path: Path,
    settings: Settings,
    vocabulary: int,
) -> None:
    """Answer until the other end is gone."""
    end_with(parent)
    # The terminal sends an interrupt to all; the parent ends this process in its own time.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    written = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(written, stream)
    os.environ.update(dict.fromkeys(_THREADS, str(settings.threads)))
    _pin(settings.threads)
    measured = _Measured(runtime, path, settings, vocabulary)
    with suppress(EOFError, OSError):
        while True:
            what, task = connection.recv()
            try:
                answer = measured.memory() if what == "memory" else measured.turn(task)
                connection.send((answer, None))
            except Exception as error:
                connection.send((None, reason_of(error)))


def _pin(threads: int) -> None:
    """Stay on as many cores as there are threads, so that no turn moves between them."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


class _Measured:
    """A model in this process, and what it costs."""

    def __init__(self, runtime: str, path: Path, settings: Settings, vocabulary: int) -> None:
        self._path = path
        self._settings = settings
        self._runtime = find_runtime(runtime)
        self._vocabulary = vocabulary
        self._session: Session | None = None
        self._before = self._loaded = 0

    def turn(self, task: Task) -> _Span:
        if task.work == "load":
            return self._turn_of_loading()
        assert self._session is not None, "loading comes first"
        marks = [_now()]
        written = self._session.generate(
            prompts(self._vocabulary, task.batch, task.prompt),
            # The first token belongs to the prompt.
            task.tokens + 1 if task.work == "decode" else 1,
            lambda: marks.append(_now()),
        )
        marks.append(_now())
        spent = marks[-1][1] - marks[0][1]
        wanted = task.batch * (task.tokens + 1 if task.work == "decode" else 1)
        if len(marks) != 3 or written != wanted:
            raise RuntimeError(f"it wrote {written} tokens where {wanted} were asked for")
        begin, first, last = marks
        return _span(begin, first, spent) if task.work == "prefill" else _span(first, last, spent)

    def _turn_of_loading(self) -> _Span:
        """Load the model anew, until it has written its first token."""
        if self._session is None:
            import_module(self._runtime.module)
            self._before = _resident()
        else:
            self._session.close()
            self._session = None
            gc.collect()
        began = _now()
        self._session = self._runtime.load(self._path, self._settings)
        self._session.generate(prompts(self._vocabulary, 1, 1), 1, lambda: None)
        ended = _now()
        self._loaded = self._loaded or _resident()
        return _span(began, ended, ended[1] - began[1])

    def memory(self) -> Resident:
        kernel = "" if self._session is None else self._session.kernel
        return Resident(self._before, self._loaded, _peak(), kernel)


def prompts(vocabulary: int, batch: int, length: int) -> Sequence[Sequence[int]]:
    """The same random tokens for everyone, from the middle of the vocabulary.

    Tokens with a meaning of their own, such as places for images, stand at its ends.
    """
    draw = random.Random(0)
    low, high = vocabulary // 4, max(vocabulary // 4 + 1, vocabulary // 2)
    return [[draw.randrange(low, high) for _ in range(length)] for _ in range(batch)]


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _span(first: tuple[float, float], last: tuple[float, float], spent: float) -> _Span:
    return _Span(first[0], last[0], last[1] - first[1], spent)


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


def _peak() -> int:
    """Largest resident size of this program; what the system notes by process begins earlier."""
    try:
        with open("/proc/self/status", encoding="ascii") as lines:
            found = next(line for line in lines if line.startswith("VmHWM:"))
        return 1024 * int(found.split()[1])
    except (OSError, StopIteration):
        from secateur.runs.machine import peak_memory

        return peak_memory()
