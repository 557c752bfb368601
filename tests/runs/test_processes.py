from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from children import is_gone, noted, until
from secateur.runs.errors import SecateurError
from secateur.runs.processes import apart, measure, output_of


def test_a_process_is_measured_from_outside(tmp_path: Path) -> None:
    code = "block = bytearray(b'x' * 150_000_000); print('done')"
    measured = measure([sys.executable, "-c", code], tmp_path / "log")
    assert measured.peak_bytes > 150_000_000
    assert measured.cpu_seconds > 0
    assert measured.seconds > 0
    assert (tmp_path / "log").read_text() == "done\n"


def test_what_a_process_prints(tmp_path: Path) -> None:
    code = "import sys; print('result'); print('progress', file=sys.stderr)"
    assert output_of([sys.executable, "-c", code], tmp_path / "log") == "result\n"
    assert (tmp_path / "log").read_text() == "progress\n"


@pytest.mark.parametrize("run", [measure, output_of])
def test_a_failure_shows_the_end_of_the_output(run: object, tmp_path: Path) -> None:
    code = "import sys; sys.exit('what went wrong')"
    with pytest.raises(SecateurError, match=r"ended with status 1:\nwhat went wrong"):
        run([sys.executable, "-c", code], tmp_path / "log")  # type: ignore[operator]


def test_a_program_that_cannot_start(tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match="gone cannot be started"):
        measure(["./gone"], tmp_path / "log")


def test_work_apart_is_work_in_another_process() -> None:
    assert apart(os.getpid) != os.getpid()


def test_what_goes_wrong_apart() -> None:
    with pytest.raises(ValueError, match="no-number"):
        apart(int, "no-number")
    with pytest.raises(SecateurError, match="ended with status 3 before its work was done"):
        apart(os._exit, 3)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a child")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "call", ["measure([sys.executable, '-c', WAIT], LOG)", "apart(exec, WAIT)"]
)
def test_no_process_outlives_the_one_that_waits_for_it(
    call: str, end: signal.Signals, tmp_path: Path
) -> None:
    file = tmp_path / "child"
    wait = f"import os, time; open({str(file)!r}, 'w').write(f'{{os.getpid()}}.'); time.sleep(600)"
    code = "import sys; from pathlib import Path; from secateur.runs.processes import *\n"
    code += f"if __name__ == '__main__':\n  WAIT, LOG = {wait!r}, Path({str(tmp_path / 'log')!r})"
    script = tmp_path / "wait.py"
    script.write_text(f"{code}\n  {call}\n")
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL)
    until(lambda: noted(file))
    process.send_signal(end)
    assert process.wait(60) != 0
    until(lambda: is_gone(file))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what runs")
def test_an_interrupt_ends_what_the_process_has_started(tmp_path: Path) -> None:
    file = tmp_path / "grandchild"
    start = f"""
import subprocess, sys
waiting = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(file)!r}, "w").write(f"{{waiting.pid}}.")
waiting.wait()
"""

    def stop_once_it_runs(*_: object) -> None:
        if noted(file):
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop_once_it_runs)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    try:
        with pytest.raises(KeyboardInterrupt):
            measure([sys.executable, "-c", start], tmp_path / "log")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    until(lambda: is_gone(file))
