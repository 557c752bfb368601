from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
from lm_eval import evaluate as lm_eval_evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from secateur.evaluation.evaluate import evaluate
from secateur.evaluation.likelihood import Likelihood
from secateur.evaluation.tasks import TASKS, TaskChoice, load_tasks
from secateur.runs.errors import SecateurError
from secateur.text.encoder import Encoder
from tiny import make_checkpoint, make_tokenizer

ARC = {
    "question": "What melts?",
    "choices": {"text": ["ice", "stone", "a wooden chair"], "label": ["A", "B", "C"]},
    "answerKey": "A",
}
ITEMS: dict[str, list[dict[str, object]]] = {
    "piqa_valid": [
        {"goal": "open a tin", "sol1": "use a key", "sol2": "sing to it", "label": 0},
        {"goal": "dry hair", "sol1": "wet it again", "sol2": "use a towel", "label": 1},
        {"goal": "boil", "sol1": "heat it", "sol2": "cool it for a long time", "label": 0},
        {"goal": "sleep", "sol1": "run", "sol2": "lie down", "label": 1},
        {"goal": "read", "sol1": "light a lamp", "sol2": "shut", "label": 0},
    ],
    "arc_easy_test": [ARC, ARC | {"answerKey": "C"}],
    "arc_challenge_test": [ARC, ARC | {"answerKey": "B"}],
    "hellaswag_val": [
        {
            "ind": 1,
            "activity_label": "Roof",
            "ctx_a": "A man sits.",
            "ctx_b": "he",
            "ctx": "A man sits. he",
            "endings": ["eats [title] now.", "flies.", "is  green.", "rolls."],
            "label": "3",
        }
    ],
    "openbookqa_test": [
        {
            "question_stem": "Fog is near",
            "choices": {"text": ["a marsh", "sand"], "label": ["A", "B"]},
            "answerKey": " A",
        }
    ],
    "rte_val": [{"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0, "idx": 0}],
    "winogrande_dev": [
        {"sentence": "Al met Bo and _ left.", "option1": "Al", "option2": "Bo", "answer": "2"}
    ],
    "boolq_validation": [{"passage": "Ice is cold.", "question": "is ice hot", "label": 0}],
    "lambada_openai_test": [{"text": "the cat sat on the mat"}],
}


@pytest.fixture(scope="module")
def task_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for name, items in ITEMS.items():
        lines = "".join(json.dumps(item) + "\n" for item in items)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of enough positions for a prompt; its tokens are bytes."""
    folder = tmp_path_factory.mktemp("long")
    make_checkpoint("llama", folder, max_position_embeddings=256)
    return folder


@pytest.fixture(scope="module")
def model(long: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(long)
    return model


def log_likelihood(model: PreTrainedModel, context: str, continuation: str) -> float:
    tokenizer = make_tokenizer()
    before = tokenizer.encode(context, add_special_tokens=False)
    after = tokenizer.encode(continuation, add_special_tokens=False)
    with torch.no_grad():
        log_p = model(torch.tensor([before + after])).logits.double().log_softmax(-1)[0]
    return sum(float(log_p[len(before) + i - 1, token]) for i, token in enumerate(after))


def test_accuracy_is_that_of_choices_computed_one_by_one(
    long: Path, model: PreTrainedModel, task_data: Path
) -> None:
    result = evaluate(long, tasks=["piqa"], task_data=task_data, dtype="float32")
    right: list[int] = []
    right_norm: list[int] = []
    for item in ITEMS["piqa_valid"]:
        choices = [str(item["sol1"]), str(item["sol2"])]
        context = f"Question: {item['goal']}\nAnswer:"
        values = [log_likelihood(model, context, f" {choice}") for choice in choices]
        normed = [value / len(choice) for value, choice in zip(values, choices, strict=True)]
        right.append(int(values[1] > values[0]) == item["label"])
        right_norm.append(int(normed[1] > normed[0]) == item["label"])
    assert result.zero_shot is not None
    score = result.zero_shot.model.tasks["piqa"]
    assert (score.items, score.acc, score.acc_norm) == (5, sum(right) / 5, sum(right_norm) / 5)
    share = score.acc
    assert score.acc_stderr == pytest.approx((share * (1 - share) / 4) ** 0.5)
    assert (result.model, result.protocol) == (None, None)


def test_all_tasks_agree_with_lm_eval_itself(
    long: Path, model: PreTrainedModel, task_data: Path, tmp_path: Path
) -> None:
    result = evaluate(long, tasks=list(TASKS), task_data=task_data, dtype="float32").zero_shot
    assert result is not None
    theirs = HFLM(pretrained=model, tokenizer=make_tokenizer(), batch_size=1)
    loaded = load_tasks(TaskChoice.check(list(TASKS), task_data, None), tmp_path)
    expected = lm_eval_evaluate(theirs, loaded, bootstrap_iters=1, log_samples=False)["results"]
    assert set(result.model.tasks) == set(expected) == set(TASKS)
    for name, score in result.model.tasks.items():
        assert score.acc == expected[name]["acc,none"]
        assert score.acc_norm == expected[name].get("acc_norm,none")
    accuracies = [score.acc for score in result.model.tasks.values()]
    assert result.model.mean_acc == pytest.approx(sum(accuracies) / len(accuracies))
    # A single question has no standard error, and so the mean has none.
    assert result.model.tasks["rte"].acc_stderr is None
    assert result.model.mean_acc_stderr is None


def test_likelihoods_do_not_depend_on_batches(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    lm = Likelihood(model, Encoder.of(tokenizer), torch.float32)
    pairs = [("a b", " c"), ("a b", " d e f"), ("x", " yes"), ("x", " yet"), ("long " * 9, "end")]
    requests = [((c, t), lm.tok_encode(c), lm.tok_encode(t)) for c, t in pairs]
    at_once = lm._loglikelihood_tokens(requests)
    for (value, _), (context, continuation) in zip(at_once, pairs, strict=True):
        assert value == pytest.approx(log_likelihood(model, context, continuation), rel=1e-4)
    lm.batch_tokens = 1
    alone = lm._loglikelihood_tokens(requests)
    assert [value for value, _ in alone] == pytest.approx([value for value, _ in at_once])


def test_the_likeliest_continuation_is_known(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    context = [5, 6, 7]
    with torch.no_grad():
        best = int(model(torch.tensor([context])).logits[0, -1].argmax())
    lm = Likelihood(model, Encoder.of(tokenizer), torch.float32)
    other = best - 1
    answers = lm._loglikelihood_tokens([(("", ""), context, [best]), (("", ""), context, [other])])
    assert [greedy for _, greedy in answers] == [True, False]


def test_batches_shrink_until_they_fit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = Likelihood(model, Encoder.of(tokenizer), torch.float32)
    requests = [(("", ""), [5, 6, token], [9]) for token in range(10, 19)]
    expected = lm._loglikelihood_tokens(requests)
    forward, sizes = model.model.forward, []

    def small_memory(input_ids: torch.Tensor, **options: object) -> object:
        sizes.append(len(input_ids))
        if len(input_ids) > 3:
            raise torch.OutOfMemoryError
        return forward(input_ids=input_ids, **options)

    monkeypatch.setattr(model.model, "forward", small_memory)
    answers = lm._loglikelihood_tokens(requests)
    assert [value for value, _ in answers] == pytest.approx([value for value, _ in expected])
    assert [size for size in sizes if size > 1] == [9, 4, 2, 2, 2, 2]


def test_what_is_too_long_loses_its_beginning(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    lm = Likelihood(model, Encoder.of(tokenizer), torch.float32)
    ((value, _),) = lm._loglikelihood_tokens([(("", ""), [5] * 100 + [7] * 255, [9, 8])])
    ((expected, _),) = lm._loglikelihood_tokens([(("", ""), [7] * 255, [9, 8])])
    assert value == expected
    with pytest.raises(SecateurError, match="choice of 257 tokens is longer than the 256"):
        lm._loglikelihood_tokens([(("", ""), [5], [9] * 257)])


def test_logits_that_are_no_numbers(tmp_path: Path, task_data: Path) -> None:
    make_checkpoint("llama", tmp_path, max_position_embeddings=256)
    broken = AutoModelForCausalLM.from_pretrained(tmp_path)
    broken.lm_head.weight.data[7] = float("nan")
    with pytest.raises(SecateurError, match="Logits are NaN in a zero-shot task"):
        evaluate(broken, tokenizer=make_tokenizer(), tasks=["piqa"], task_data=task_data)


def test_a_limit_and_the_dense_model_beside(
    long: Path, task_data: Path, text_file: Path, tmp_path: Path
) -> None:
    make_checkpoint("llama", tmp_path / "other", seed=1, max_position_embeddings=256)
    result = evaluate(
        tmp_path / "other",
        text=text_file,
        window=32,
        max_windows=3,
        tasks=["piqa", "arc_easy"],
        task_data=task_data,
        limit=2,
        against=long,
    )
    alone = evaluate(long, tasks=["piqa", "arc_easy"], task_data=task_data, limit=2).zero_shot
    assert result.zero_shot is not None and alone is not None
    assert result.zero_shot.dense == alone.model
    assert {score.items for score in result.zero_shot.model.tasks.values()} == {2}
    assert result.zero_shot.limit == 2
    errors = [score.acc_stderr or 0 for score in alone.model.tasks.values()]
    assert alone.model.mean_acc_stderr == pytest.approx(sum(e * e for e in errors) ** 0.5 / 2)
    assert result.model is not None


def test_local_files_need_no_network_and_leave_nothing_behind(
    long: Path, task_data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = sorted(task_data.iterdir())
    evaluate(long, tasks=["hellaswag"], task_data=task_data)
    assert sorted(task_data.iterdir()) == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["piqua"]}, "no task 'piqua'; did you mean piqa"),
        ({"tasks": ["piqa"], "limit": 0}, r"limit is not valid: .* 1"),
        ({"tasks": ["piqa"], "task_data": "nowhere"}, "no folder nowhere with task data"),
    ],
)
def test_bad_input(long: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        evaluate(long, **options)  # type: ignore[arg-type]


def test_a_missing_file_is_named(long: Path, tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match=r"no file rte_validation\.jsonl or rte_valid\.jsonl"):
        evaluate(long, tasks=["rte"], task_data=tmp_path)


def test_data_of_another_form(long: Path, tmp_path: Path) -> None:
    (tmp_path / "piqa_valid.jsonl").write_text('{"text": "no goal"}\n')
    with pytest.raises(SecateurError, match=r"data of piqa in .* cannot be used"):
        evaluate(long, tasks=["piqa"], task_data=tmp_path)


def test_the_hub_out_of_reach(long: Path) -> None:
    with pytest.raises(SecateurError, match="data of rte on the hub cannot be fetched"):
        evaluate(long, tasks=["rte"])


def test_without_lm_eval(long: Path, task_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.evaluation.tasks.find_spec", lambda name: None)
    with pytest.raises(SecateurError, match=r"pip install 'secateur\[tasks\]'"):
        evaluate(long, tasks=["piqa"], task_data=task_data)


def test_in_memory_is_as_on_disk(
    long: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task_data: Path,
) -> None:
    on_disk = evaluate(long, tasks=["piqa"], task_data=task_data).zero_shot
    in_memory = evaluate(model, tasks=["piqa"], task_data=task_data, tokenizer=tokenizer).zero_shot
    assert on_disk is not None and in_memory is not None
    assert in_memory.model.tasks == on_disk.model.tasks
