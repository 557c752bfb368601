from __future__ import annotations

import sys
from pathlib import Path

import pytest

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


def test_work_apart_is_work_in_another_process() -> None:
    import os

    assert apart(os.getpid) != os.getpid()
