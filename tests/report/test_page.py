"""The HTML page about runs: what is on it, and what never stops it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import secateur
from secateur.report.documents.evaluation import Evaluation, TaskScore, TaskScores, ZeroShot
from secateur.report.page import render
from secateur.report.plots import width_plots
from secateur.report.run_files import Json, Run, read_runs
from secateur.report.tables import width_table
from secateur.runs.errors import SecateurError

EVIL = "<script>alert(1)</script>\"'><img src=//evil.example>&"
VOID = {"meta", "link", "br", "img"}


class Reader(HTMLParser):
    """Collects tags and texts, and insists that tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style" and data.strip():
            self.texts.append(" ".join(data.split()))


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def page_of(*folders: Path) -> Reader:
    return read(render(read_runs(folders)))


def test_every_run_ends_with_its_page(runs: dict[str, Path]) -> None:
    for folder in runs.values():
        page = (folder / "secateur" / "report.html").read_text(encoding="utf-8")
        assert page.startswith("<!doctype html>")
        assert "svg" in read(page).tags


def test_page_asks_for_nothing(runs: dict[str, Path]) -> None:
    reader = page_of(*runs.values())
    assert not {"script", "img", "iframe", "object"} & set(reader.tags)
    sources = [value for key, value in reader.attributes if key in ("src", "href", "srcset")]
    assert sources == ["data:,"]
    assert not re.search(r"@import|url\(", render(read_runs(runs.values())))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "ramp",
            [
                "pruned: wanda + refit, 50 % unstructured",
                "50.00 %", "Sparsity of every linear", "mlp.down_proj", "Error of every block",
                "Perplexity", "The same texts, dense and pruned", "def is_prime(n):",
                "OpenVINO, CPU with AMX", "Simulated accelerator", "Blocks",
            ],
        ),
        ("semi", ["2:4", "NVIDIA GPU with sparse tensor cores, torch's semi-structured kernels"]),
        ("small", ["Widths kept", "feed-forward", "transformers, with trust_remote_code"]),
        ("sizes", ["Size against expected loss", "parameters removed from the blocks"]),
        (
            "taught",
            [
                "recovered: blocks + merged LoRA", "Blocks, fitted", "tokens trained on", "Loss",
                "Held-out loss of training, nats per token",
            ],
        ),
        ("trained", ["Loss", "held-out loss, nats per token", "learning rate", "mask changed"]),
    ],
)  # fmt: skip
def test_page_says_what_was_done(name: str, expected: Sequence[str], runs: dict[str, Path]) -> None:
    assert set(expected) - set(page_of(runs[name]).texts) == set()


def test_numbers_are_those_of_the_report(runs: dict[str, Path]) -> None:
    report = json.loads((runs["ramp"] / "report.json").read_text())
    evaluation = json.loads((runs["ramp"] / "secateur" / "evaluation.json").read_text())
    texts = page_of(runs["ramp"]).texts
    for block in report["blocks"]:
        assert f"{block['held_out_error']:.4f}" in texts
    assert f"{evaluation['model']['perplexity']:.2f}" in texts
    assert f"{evaluation['dense']['perplexity']:.2f}" in texts
    assert any("8 windows of 32 tokens, no overlap" in text for text in texts)


def test_several_runs_share_tables_and_plots(runs: dict[str, Path], tmp_path: Path) -> None:
    page = secateur.write_report([runs["ramp"], runs["semi"], runs["ramp"]], tmp_path / "both.html")
    reader = read(page.read_text(encoding="utf-8"))
    assert "2 runs compared" in reader.texts
    assert reader.texts.count("Error of every block") == 1
    lines = [value or "" for key, value in reader.attributes if key == "class"]
    assert {"line s0", "line s1"} <= set(lines)
    assert "line s2" not in lines
    assert [path.name for path in tmp_path.iterdir()] == ["both.html"]


def test_what_runs_share_is_said_once(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["ramp"], tmp_path / "other")
    texts = page_of(runs["ramp"], tmp_path / "other", runs["semi"]).texts
    assert texts.count("OpenVINO, CPU with AMX") == 1
    assert "ramp, other" in texts
    assert texts.count("Forward passes") == texts.count("In all runs") == 1
    assert texts.count("Stages") == 1
    assert texts.count("Pattern") == 3


def test_a_legend_names_what_is_drawn(runs: dict[str, Path]) -> None:
    (widths,) = width_plots(read_runs([runs["sizes"], runs["ramp"], runs["small"]]))
    assert widths.legend == [("small", 2)]
    (alone,) = width_plots(read_runs([runs["small"]]))
    assert alone.legend == []


def test_widths_count_query_heads(runs: dict[str, Path], tmp_path: Path) -> None:
    def cut_to(kept: int, queries: int) -> Run:
        shutil.copytree(runs["small"], tmp_path / "cut", dirs_exist_ok=True)
        path = tmp_path / "cut" / "report.json"
        report = json.loads(path.read_text())
        for each in report["sub_blocks"]:
            if each["kind"] == "attention":
                each.update(kept=kept, of=4, queries=queries, queries_of=2)
        path.write_text(json.dumps(report))
        return read_runs([tmp_path / "cut"])[0]

    groups, heads = cut_to(2, 2), cut_to(4, 1)
    found = width_table(heads)
    assert found is not None
    assert [row[1:3] for row in found.rows if "attention" in row[0]] == [("4 × 1", "4 × 2")] * 3
    # Half of the heads are left in either.
    assert width_plots([groups])[0].panels == width_plots([heads])[0].panels
    assert width_plots([cut_to(2, 1)])[0].panels != width_plots([heads])[0].panels


def test_runs_of_one_name_are_told_apart(runs: dict[str, Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(runs["semi"], tmp_path / name / "out")
    found = read_runs([tmp_path / "one" / "out", tmp_path / "two" / "out", runs["ramp"]])
    assert [run.label for run in found] == ["one/out", "two/out", "ramp"]


def test_perplexities_of_different_protocols_stand_apart(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(runs["ramp"], tmp_path / "other")
    path = tmp_path / "other" / "secateur" / "evaluation.json"
    evaluation = json.loads(path.read_text())
    assert page_of(runs["ramp"], tmp_path / "other").texts.count("Perplexity") == 1
    evaluation["protocol"]["window"] = 16
    path.write_text(json.dumps(evaluation))
    assert page_of(runs["ramp"], tmp_path / "other").texts.count("Perplexity") == 2


def test_zero_shot_scores_stand_beside_the_dense_ones(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    def scores(model: str, acc: float) -> TaskScores:
        task = TaskScore(
            items=50, acc=acc, acc_stderr=0.07, acc_norm=acc + 0.01, acc_norm_stderr=None
        )
        return TaskScores(model=model, tasks={"piqa": task}, mean_acc=acc, mean_acc_stderr=0.07)

    found = ZeroShot(
        model=scores("pruned", 0.5),
        dense=scores("dense", 0.6),
        lm_eval="0.4",
        data={"piqa": "hub"},
        limit=50,
        forward_dtype="float32",
        seconds=1.0,
    )
    shutil.copytree(runs["semi"], tmp_path / "run")
    (tmp_path / "run" / "secateur" / "evaluation-tasks.json").write_text(
        Evaluation(zero_shot=found, seconds=0.0).model_dump_json()
    )
    texts = page_of(tmp_path / "run").texts
    assert "Perplexity" not in texts
    begin = texts.index("Zero-shot")
    row = ["piqa", "60.0 % ± 7.0", "50.0 % ± 7.0", "piqa, norm.", "61.0 %", "51.0 %"]
    assert texts[begin + 1 : begin + 9] == ["dense", "run", *row]
    assert "dense 60.0 %" in texts
    assert "piqa, first 50 of each" in texts


def test_padded_models_are_not_promised_to_be_faster(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["small"], tmp_path / "padded")
    path = tmp_path / "padded" / "report.json"
    report = json.loads(path.read_text())
    for form, promise in {
        "padded": "no faster, no smaller",
        "uniform": "Everywhere the dense model runs",
    }.items():
        report["options"]["form"] = form
        path.write_text(json.dumps(report))
        assert promise in page_of(tmp_path / "padded").texts


def test_texts_of_runs_are_escaped(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "<b>&run"
    shutil.copytree(runs["ramp"], folder)
    for path in (folder / "report.json", *(folder / "secateur").glob("*.json")):
        path.write_text(json.dumps(_map_texts(json.loads(path.read_text()))))
    reader = page_of(folder, runs["semi"])
    assert not {"script", "img", "b"} & set(reader.tags)
    assert any(EVIL in text for text in reader.texts)


def _map_texts(value: Any) -> Any:
    """All texts and names of a document, with markup put behind them."""
    if isinstance(value, dict):
        return {key: _map_texts(each) for key, each in value.items()} | {
            f"{key}{EVIL}": _map_texts(each) for key, each in value.items() if "." in key
        }
    if isinstance(value, list):
        return [_map_texts(each) for each in value]
    return value + EVIL if isinstance(value, str) else value


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@pytest.mark.parametrize("name", ["ramp", "small", "sizes", "taught", "trained"])
def test_no_document_stops_the_page(name: str, runs: dict[str, Path]) -> None:
    """Whatever stands in place of a part of a document, or if it is missing."""
    (run,) = read_runs([runs[name]])
    documents = {
        "report": run.report,
        "simulation": run.simulation,
        "continuations": run.continuations,
        "benches": run.benches[0] if run.benches else Json(),
    }

    @settings(max_examples=40)
    @given(st.sampled_from([key for key, found in documents.items() if found]), st.data())
    def check(key: str, data: st.DataObject) -> None:
        value = json.loads(json.dumps(documents[key].value))
        for _ in range(data.draw(st.integers(1, 3))):
            _replace_a_part(value, data)
        changed = [Json(value)] if key == "benches" else Json(value)
        read(render([Run(**{**vars(run), key: changed})]))

    check()


def _replace_a_part(value: Any, data: st.DataObject) -> None:
    """Go down a random way, and put something else at its end, or nothing."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = data.draw(st.sampled_from(keys))
        inner = value[key]
        if isinstance(inner, dict | list) and inner and data.draw(st.integers(0, 2)):
            value = inner
            continue
        if data.draw(st.booleans()):
            value[key] = data.draw(JSON)
        else:
            del value[key]
        return


def test_old_reports_lack_what_is_new(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"blocks": [{"held_out_error": 0.25}]}')
    texts = page_of(tmp_path).texts
    assert "0.2500" in texts
    (tmp_path / "report.json").write_text('{"validation": {}, "blocks": []}')
    page_of(tmp_path)


def test_files_beside_the_report_that_are_damaged_are_named(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(runs["ramp"], tmp_path / "run")
    (tmp_path / "run" / "secateur" / "evaluation.json").write_text("")
    (tmp_path / "run" / "secateur" / "simulation.json").write_bytes(b"\xff\xfe[")
    texts = page_of(tmp_path / "run").texts
    assert "evaluation.json beside the report is no readable JSON." in texts
    assert "simulation.json beside the report is no readable JSON." in texts


def test_half_a_line_of_a_log_is_left_out(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["trained"], tmp_path / "trained")
    log = tmp_path / "trained" / "secateur" / "training" / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 11, "cross')
    assert page_of(tmp_path / "trained").texts == page_of(runs["trained"]).texts
    log.unlink()
    assert "Loss" in page_of(tmp_path / "trained").texts


def _no_folder(folder: Path) -> None:
    folder.rmdir()


def _unfinished(folder: Path) -> None:
    (folder / "secateur").mkdir()
    (folder / "secateur" / "manifest.json").write_text("{}")


def _half_written(folder: Path) -> None:
    (folder / "report.json").write_text('{"blocks": [')


def _something_else(folder: Path) -> None:
    (folder / "report.json").write_text('{"tests": 3}')


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_no_folder, "There is no folder"),
        (lambda folder: None, "has neither report.json nor curve.json"),
        (_unfinished, "is not finished"),
        (_half_written, "is no JSON"),
        (_something_else, "is no report of prune, shrink, recover or train"),
    ],
)
def test_folders_without_a_run_are_refused(
    make: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    make(folder)
    with pytest.raises(SecateurError, match=message):
        secateur.write_report(folder, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_where_the_page_goes_is_settled_first(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match="name a file with --output"):
        secateur.write_report([runs["ramp"], runs["semi"]])
    with pytest.raises(SecateurError, match="is a folder; name the file"):
        secateur.write_report(runs["ramp"], tmp_path)
    with pytest.raises(SecateurError, match="name one or more"):
        secateur.write_report([])
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SecateurError, match="cannot be written"):
        secateur.write_report(runs["ramp"], tmp_path / "file" / "page.html")
