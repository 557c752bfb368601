"""The commands themselves: what they print, and how they end."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import secateur
from secateur.cli import COMMANDS, app


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def pruned(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, object]]:
    output = tmp_path_factory.mktemp("cli") / "out"
    flags = ["--method", "sparsegpt", "--refit", "--pattern", "2:4", "--samples", "8"]
    flags += ["--length", "32", "--seed", "3", "--calibration", str(text_file), "--json"]
    flags += ["--save-recipe", str(output.parent / "recipe.yaml")]
    printed = run("prune", str(checkpoints("llama")), "-o", str(output), *flags)
    return output, json.loads(printed)


def test_prune_prints_the_report_it_writes(pruned: tuple[Path, dict[str, object]]) -> None:
    output, report = pruned
    assert report == json.loads((output / "report.json").read_text())
    assert report["schema_version"] == 1
    assert len(report["blocks"]) == 3  # type: ignore[arg-type]


def test_saved_recipe_is_what_ran_and_makes_the_same_bytes(
    pruned: tuple[Path, dict[str, object]], checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    output, report = pruned
    recipe = secateur.Recipe.from_file(output.parent / "recipe.yaml")
    assert recipe.model_dump(mode="json") == report["recipe"]
    assert (output / "secateur" / "recipe.yaml").read_text() == recipe.to_yaml()
    run("prune", str(checkpoints("llama")), "-o", str(tmp_path / "again"), "--recipe",
        str(output.parent / "recipe.yaml"))  # fmt: skip
    for shard in output.glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "again" / shard.name).read_bytes()


def test_inspect_counts_and_lists_patterns(pruned: tuple[Path, dict[str, object]]) -> None:
    output, _ = pruned
    inspection = json.loads(run("inspect", str(output), "--json"))
    assert inspection["sparsity"] == 0.5
    assert "2:4" in inspection["patterns"]
    assert "2:4" in run("inspect", str(output))


def test_simulate_counts_cycles_by_both_formulas(pruned: tuple[Path, dict[str, object]]) -> None:
    output, _ = pruned
    simulation = json.loads(run("simulate", str(output), "--json"))
    assert simulation["total"]["zeros"] * 2 == simulation["total"]["weights"]
    assert set(simulation["total"]["cycles"]) == {"corrected", "released"}
    shown = run("simulate", str(output), "--memory-traffic", "16")
    assert "corrected formula" in shown
    assert "released formula" in shown
    assert "self_attn.q_proj" in shown
    assert "weights of 16 bits" in shown


def test_eval_against_the_dense_model(
    pruned: tuple[Path, dict[str, object]], checkpoints: Callable[..., Path], text_file: Path
) -> None:
    flags = ["--text", str(text_file), "--window", "32", "--max-windows", "5"]
    flags += ["--against", str(checkpoints("llama"))]
    result = json.loads(run("eval", str(pruned[0]), *flags, "--json"))
    assert result["model"]["perplexity"] > 1
    assert result["divergence"]["kl"] > 0
    assert result["protocol"]["windows"] == 5
    shown = run("eval", str(pruned[0]), *flags)
    assert "5 windows of 32 tokens" in shown
    assert "dense - model" in shown


def test_eval_on_tasks(
    pruned: tuple[Path, dict[str, object]], checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    item = {"goal": "dry", "sol1": "use a towel", "sol2": "wet it", "label": 0}
    for task in ("piqa", "boolq"):
        fields = item | {"passage": "Ice is cold.", "question": "is ice hot"}
        (tmp_path / f"{task}_valid.jsonl").write_text((json.dumps(fields) + "\n") * 3)
    flags = ["--tasks", "piqa, boolq", "--task-data", str(tmp_path), "--limit", "2"]
    result = json.loads(run("eval", str(pruned[0]), *flags, "--json"))
    assert result["model"] is None
    assert set(result["zero_shot"]["model"]["tasks"]) == {"piqa", "boolq"}
    shown = run("eval", str(pruned[0]), *flags, "--against", str(checkpoints("llama")))
    assert "dense acc_norm" in shown
    assert "mean" in shown
    assert "local files, first 2 questions" in " ".join(shown.split())


def test_estimate_knows_the_zeros_before_the_run(checkpoints: Callable[..., Path]) -> None:
    flags = ["--pattern", "2:4", "--samples", "8", "--length", "32"]
    estimate = json.loads(run("estimate", str(checkpoints("llama")), *flags, "--json"))
    assert estimate["zeros"] * 2 == estimate["weights"]
    assert estimate["streamed"] is True
    more = json.loads(
        run("estimate", str(checkpoints("llama")), *flags[:3], "16", *flags[4:], "--json")
    )
    assert more["activation_bytes"] > estimate["activation_bytes"]
    integers = ["--quantize", "int4", "--quantize-group", "16", "--asymmetric"]
    sizes = [
        json.loads(run("estimate", str(checkpoints("llama")), *given, *flags[2:], "--json"))[
            "output_bytes"
        ]
        for given in ([], [*integers, "--quantized-format", "dequantized"], integers)
    ]
    assert sizes[0] == sizes[1] > sizes[2]


@pytest.mark.parametrize(
    "what", ["methods", "patterns", "allocations", "formats", "calibrations", "tasks"]
)
def test_ls(what: str) -> None:
    rows = json.loads(run("ls", what, "--json"))
    assert rows
    assert all(row["description"] for row in rows)
    assert all(row["name"] in run("ls", what) for row in rows)


def test_plan_writes_what_prune_follows(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    plan, output = tmp_path / "plan.json", tmp_path / "out"
    flags = ["--calibration", str(text_file), "--samples", "8", "--length", "32"]
    printed = run(
        "plan", str(checkpoints("llama")), "-o", str(plan), "--sparsity", "0.6",
        "--allocate", "sensitivity", *flags, "--json",
    )  # fmt: skip
    assert printed == plan.read_text()
    again = run("plan", str(checkpoints("llama")), "-o", str(plan), "--recipe",
                str(recipe_with(plan, tmp_path)))  # fmt: skip
    assert "model.layers.2.mlp.down_proj" in again
    assert printed == plan.read_text()
    shown = run("prune", str(checkpoints("llama")), "-o", str(output), "--method", "magnitude",
                "--plan", str(plan), *flags)  # fmt: skip
    assert "plan, blocks from 0." in shown
    asked = {name: each["zeros"] for name, each in json.loads(printed)["linears"].items()}
    inspection = json.loads(run("inspect", str(output), "--json"))
    assert {
        each["name"].removesuffix(".weight"): each["zeros"] for each in inspection["linears"]
    } == asked


def recipe_with(plan: Path, folder: Path) -> Path:
    values = {
        "pattern": "0.6",
        "calibration": {"length": 32},
        "allocation": {"method": "plan", "file": str(plan)},
    }
    path = folder / "recipe.yaml"
    path.write_text(secateur.Recipe.from_mapping(values).to_yaml())
    return path


def test_plan_flags_that_contradict_each_other(tmp_path: Path) -> None:
    flags = ["--plan", "plan.json", "--allocate", "owl", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["prune", "MODEL", *flags])
    assert "either --plan or --allocate" in str(result.exception)


def test_errors_are_one_sentence_and_exit_status_1(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "secateur",
            "prune",
            str(tmp_path / "in"),
            "-o",
            str(tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "error" in done.stderr
    assert "a checkpoint folder with safetensors files was expected" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments", [["--help"], ["prune", "--help"], ["ls", "methods"], ["ls", "tasks"], ["train"]]
)
def test_help_lists_and_wrong_usage_need_no_heavy_import(arguments: list[str]) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from secateur.cli import app\n"
        f"CliRunner().invoke(app, {arguments})\n"
        "print({'torch', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_for_all_that_it_takes(command: str) -> None:
    shown = run(command, "--help")
    parameters = inspect.signature(COMMANDS[command]).parameters
    assert shown.count("\n  -") + shown.count("\n  <") >= len(parameters) - 1
    assert "None" not in shown


def test_train_prints_the_report_it_writes(
    checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "options.yaml").write_text(
        "validation_windows: 4\nvalidations: 1\ntokens: 1\noptimiser: {clip: 2.0}\n"
    )
    flags = ["--pattern", "2:4", "--tokens", "640", "--length", "32", "--batch-tokens", "128"]
    flags += ["--learning-rate", "0.001", "--top-k", "8", "--seed", "3", "--log-to", "tensorboard"]
    flags += ["--options", str(tmp_path / "options.yaml")]
    output = tmp_path / "out"
    command = ["train", str(checkpoints("llama")), "-o", str(output), "--data", str(text_file)]
    report = json.loads(run(*command, *flags, "--json"))
    assert report == json.loads((output / "report.json").read_text())
    assert report["steps"] == 5
    assert any((output / "secateur" / "training" / "tensorboard").iterdir())
    assert report["options"]["optimiser"]["learning_rate"] == 0.001
    assert report["options"]["optimiser"]["clip"] == 2.0
    assert report["options"]["distillation"] == {"weight": 0.67, "temperature": 2.0, "top_k": 8}
    shown = run(*command, *flags)
    assert "640 in 5 steps" in shown
    assert "0.500000 counted" in shown
    command[3] = str(tmp_path / "again")
    assert "tokens of 1 of 1 sources from the cache" in run(*command, *flags)


def test_report_writes_a_page_of_one_run_or_several(
    pruned: tuple[Path, dict[str, object]], checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    output, _ = pruned
    default = output / "secateur" / "report.html"
    default.unlink()
    assert str(default) in run("report", str(output))
    assert default.is_file()
    flags = ["--continuations", "--reference", str(checkpoints("llama")), "--device", "cpu"]
    flags += ["--prompt", "the cat", "--prompt", "a dog"]
    page = tmp_path / "page.html"
    assert str(page) in run("report", str(output), "-o", str(page), *flags)
    text = page.read_text()
    assert text.count('class="prompt"') == 2
    assert "the cat" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "the cat"], "are for --continuations"),
        (["--reference", "MODEL"], "are for --continuations"),
        (["--continuations", "--output", "."], "is a folder"),
    ],
)
def test_report_says_what_is_wrong_before_work_starts(
    flags: list[str], message: str, pruned: tuple[Path, dict[str, object]]
) -> None:
    output, _ = pruned
    result = CliRunner().invoke(app, ["report", str(output), *flags])
    assert message in str(result.exception)


def test_files_that_are_something_else_are_not_written_over(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoints("llama")
    config = (source / "config.json").read_bytes()
    theirs = tmp_path / "theirs.txt"
    theirs.write_text("mine")
    for path, reason in [
        (source / "config.json", "lies in the model's folder; name a file elsewhere"),
        (theirs, "is there already and is no {}; name another file"),
        (tmp_path, "is no file; name one to write the {} to"),
        (theirs / "new", "No {} can be written to"),
    ]:
        plan = ["plan", str(source), "-o", str(path)]
        recipe = ["prune", str(source), "-o", str(tmp_path / "out"), "--save-recipe", str(path)]
        for command, noun in ((plan, "plan"), (recipe, "recipe")):
            result = CliRunner().invoke(app, command)
            assert reason.format(noun) in str(result.exception)
    assert (source / "config.json").read_bytes() == config
    assert theirs.read_text() == "mine"
    assert not (tmp_path / "out").exists()
