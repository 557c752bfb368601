"""The environment of the other tool."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
REQUIREMENTS = HERE / "requirements-peers.txt"
PEER_SCRIPT = HERE / "peers" / "llm_compressor.py"


def peer_python(environment: Path) -> Path:
    """Return the interpreter of the contender's environment, made first if it is absent."""
    python = environment / "bin" / "python"
    if not python.is_file():
        print(f"Making the contender's environment in {environment}", file=sys.stderr)
        venv.create(environment, with_pip=True)
        torch = f"torch=={pinned_versions()['torch']}"
        for what in ([torch], ["--requirement", str(REQUIREMENTS)]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *what], check=True)
    return python


def pinned_versions() -> dict[str, str]:
    """Return the versions that the contender's environment must have."""
    lines = REQUIREMENTS.read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def check_versions(python: Path) -> None:
    """Check that an environment is the pinned one.

    Raises:
        SystemExit: a package is missing or has another version.
    """
    pins = pinned_versions()
    code = (
        "import importlib.metadata as m, json, sys;"
        "print(json.dumps({n: m.version(n).partition('+')[0] for n in sys.argv[1:]}))"
    )
    done = subprocess.run([python, "-c", code, *pins], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{done.stderr}{python} lacks what {REQUIREMENTS.name} lists.")
    for name, version in json.loads(done.stdout).items():
        if version != pins[name]:
            raise SystemExit(f"{python} has {name} {version}, the bench wants {pins[name]}.")
