"""An estimate reads configuration and headers; weights stay where they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from secateur.estimation.estimate import estimate
from secateur.models.reader import CheckpointReader
from secateur.pruning.recipe import Recipe
from tiny import make_checkpoint

RECIPE = {
    "calibration": {"source": "text.txt", "samples": 8, "length": 32},
    "stages": [{"method": "wanda"}],
}
SECATEUR = [sys.executable, "-m", "secateur"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "llama"
    make_checkpoint("llama", folder, hidden_size=128, intermediate_size=256, head_dim=32)
    return folder


class Hub(BaseHTTPRequestHandler):
    """What the hub answers for one model."""

    def __init__(self, model: Path, sent: dict[str, int], *rest: object) -> None:
        self.model, self.sent = model, sent
        super().__init__(*rest)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/tiny"):
            files = [
                {"type": "file", "path": each.name, "rfilename": each.name, "oid": each.name}
                | {"size": each.stat().st_size}
                for each in sorted(self.model.iterdir())
            ]
            whole = {"id": "org/tiny", "sha": COMMIT, "siblings": files}
            self._send(json.dumps(files if "/tree/" in path else whole).encode())
            return
        file = self.model / path.rpartition("/")[2]
        if not path.startswith("/org/tiny/resolve/") or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = file.read_bytes()
        span = self.headers.get("Range", "").removeprefix("bytes=").split("-")
        part = content[int(span[0]) : int(span[1]) + 1] if span[0] else content
        self._send(part, file.name, status=206 if span[0] else 200)

    def _send(self, body: bytes, name: str = "", status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{name or "api"}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            self.sent[name] = self.sent.get(name, 0) + len(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(model: Path) -> Iterator[tuple[str, dict[str, int]]]:
    sent: dict[str, int] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, model, sent))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", sent
    server.shutdown()


def test_of_a_model_on_the_hub_the_headers_are_fetched(
    hub: tuple[str, dict[str, int]], model: Path, tmp_path: Path
) -> None:
    endpoint, sent = hub
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE))
    hub_variables = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
    }
    answer = subprocess.run(
        [*SECATEUR, "estimate", "org/tiny", "--recipe", str(tmp_path / "recipe.yaml"), "--json"],
        env=os.environ | hub_variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    said = json.loads(answer.stdout)
    here = estimate(model, Recipe.from_mapping(RECIPE))
    assert said["model"] == "org/tiny"
    assert (said["weights"], said["output_bytes"]) == (here.weights, here.output_bytes)
    # The client asks for the first 100,000 bytes at once.
    assert sent["model.safetensors"] <= 100_001
    assert (model / "model.safetensors").stat().st_size > 300_000
    assert not [*tmp_path.rglob("*.safetensors")]


def test_no_weight_of_the_model_is_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, mapped = CheckpointReader.read, CheckpointReader.mapped

    def watched(work):  # type: ignore[no-untyped-def]
        def of(reader: CheckpointReader, *rest: object) -> object:
            assert reader.folder != model, "a weight was read"
            return work(reader, *rest)

        return of

    monkeypatch.setattr(CheckpointReader, "read", watched(read))
    monkeypatch.setattr(CheckpointReader, "mapped", watched(mapped))
    assert estimate(model, Recipe.from_mapping(RECIPE)).peak_memory_bytes > 0
