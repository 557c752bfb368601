"""The model card of a run: README.md as the hub shows it, from the run's own files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from huggingface_hub import ModelCardData

from secateur.models.files import CARD
from secateur.report.parts import Definitions, Table
from secateur.report.run_files import Json, Run, parse_file, read_runs
from secateur.report.speed import measured_tables
from secateur.report.summary import done, headline, own_figures
from secateur.report.tables import evaluation_tables, notes, speed_table
from secateur.runs.files import is_signed, sign, write_text

# What was done, as far as it decides the result. Times and machines are of one session.
_TERMS = {
    "Teacher", "Stages", "Pattern", "Allocation", "Options", "Low rank", "Text", "Calibration",
}  # fmt: skip
_PATH = re.compile(r"(?<![\w:/])(?:~|\.{1,2})?(?:/[^\s/,;:()]+)*/([^\s/,;:()]+)")


def write_card(folder: str | Path) -> Path | None:
    """Write the model card of a finished run anew from what lies in its folder.

    Commands that add to a folder call it again: the card says what the page says of evaluations and
    speed. It is the same for the same report files and holds no path of this machine.

    Returns:
        where it is; None if nothing was written, since the run has no result to describe or someone
        else has written in the README.md that is there.

    Raises:
        SecateurError: the folder holds no finished run, or the file cannot be written.
    """
    (run,) = read_runs([folder])
    path = run.folder / CARD
    if run.kind == "curve" or (path.exists() and not is_signed(path)):
        return None
    write_text(path, sign(_card(replace(run, label="this model"))))
    return path


def _card(run: Run) -> str:
    config = parse_file(run.folder / "config.json")
    name = _model(run)
    parts = [
        f"---\n{_metadata(run)}\n---\n",
        f"# {_plain(name)}, {_plain(headline(run))}\n",
        _opening(run, name),
        *_section("What was done", _definitions(done([run]))),
        *_section("Figures", [*_figures(run), *map(_table, evaluation_tables([run]))]),
        *_section("Where it pays", list(map(_table, _speed(run)))),
        *_section("How to load", [_loading(run, config)]),
    ]
    if (said := notes(run)) is not None:
        parts += _section("Notes", ["\n".join(f"- {_plain(line)}" for line in said.entries) + "\n"])
    return "\n".join(parts)


def _speed(run: Run) -> list[Table]:
    """What was measured; before that, what is expected."""
    expected = speed_table(run)
    return measured_tables(run) + ([] if expected is None else [expected])


def _metadata(run: Run) -> str:
    origin = run.report.at("origin")
    data = ModelCardData(
        base_model=origin.text("base_model"),
        language=origin.texts("language") or None,
        license=origin.text("license"),
        license_name=origin.text("license_name"),
        license_link=origin.text("license_link"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["secateur", headline(run).partition(":")[0]],
    )
    return data.to_yaml()


def _model(run: Run) -> str:
    """The model's name; of a folder the last part alone."""
    name = run.report.at("origin").text("base_model") or run.report.text("model") or "A model"
    return Path(name).name or name


def _opening(run: Run, name: str) -> str:
    base = run.report.at("origin").text("base_model")
    source = f"[{base}](https://huggingface.co/{base})" if base else _plain(name)
    version = run.report.text("machine", "versions", "secateur")
    tool = f"secateur {version}" if version else "secateur"
    lines = [f"Made from {source} with {_plain(tool)}."]
    if not run.report.at("origin").text("license"):
        lines.append("The files of the model it was made from name no licence; that model's holds.")
    return " ".join(lines) + "\n"


def _section(title: str, parts: Sequence[str]) -> list[str]:
    return [f"## {title}\n", *parts] if parts else []


def _definitions(found: Sequence[Definitions]) -> list[str]:
    entries = [entry for each in found for entry in each.entries if entry[0] in _TERMS]
    lines = [f"- **{_plain(term)}**: {_plain(text)}" for term, text in entries]
    return ["\n".join(lines) + "\n"] if lines else []


def _figures(run: Run) -> Iterator[str]:
    lines = [
        f"- {_plain(each.label)}: {_plain(each.value)}"
        + (f" ({_plain(each.beside)})" if each.beside else "")
        for each in own_figures(run)
    ]
    if lines:
        yield "\n".join(lines) + "\n"


def _table(table: Table) -> str:
    rows = [table.head, ["---"] * len(table.head), *table.rows]
    lines = [f"| {' | '.join(map(_plain, row))} |" for row in rows]
    if table.title:
        lines = [f"**{_plain(table.title)}**", "", *lines]
    if table.caption:
        lines += ["", _plain(table.caption)]
    return "\n".join(lines) + "\n"


def _loading(run: Run, config: Json) -> str:
    own_code = config.at("auto_map")
    trust = ", trust_remote_code=True" if own_code else ""
    lines = [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "."  # this folder, or its name on the hub',
        f'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto"{trust})',
        f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})",
        "```",
    ]
    if own_code:
        lines += ["", "Python files in the folder build the model, so they have to be trusted."]
    if config.text("quantization_config", "quant_method") == "compressed-tensors":
        lines += ["", "Weights are packed integers: `pip install compressed-tensors`."]
    if run.report.at("low_rank"):
        lines += ["", "An adapter for peft lies in `low-rank`; the figures are those with it."]
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Text without a path of this machine, which Markdown shows as it is."""
    short = _PATH.sub(r"\1", " ".join(text.split()))
    return re.sub(r"([\\|<>*_`\[\]])", r"\\\1", short)
