"""How a dense and a pruned model go on with the same texts."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from secateur.evaluation.inputs import GivenModel
from secateur.report.run_files import Run, read_runs
from secateur.runs.device import resolve_device, resolve_dtype
from secateur.runs.errors import SecateurError
from secateur.runs.files import write_json
from secateur.runs.progress import Progress, silent
from secateur.text.encoder import Encoder

# A fact, an explanation, a program: what suffers first is not the same in all three.
PROMPTS = (
    "The capital of Italy is",
    "To prune an apple tree in winter, the gardener first",
    "def is_prime(n):",
)
_TOKENS = 48


class Continuation(BaseModel):
    """One text and how it goes on."""

    prompt: str
    dense: str
    pruned: str


class Continuations(BaseModel):
    """Several texts; what ``DIR/secateur/continuations.json`` holds."""

    model: str
    reference: str = Field(description="the dense model")
    dtype: str = Field(description="of the weights and of forward passes")
    device: str
    tokens: int = Field(description="written at most")
    continuations: list[Continuation]


def continue_texts(
    folder: str | Path,
    reference: str | Path | None = None,
    prompts: Sequence[str] = PROMPTS,
    *,
    tokens: int = _TOKENS,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Continuations:
    """Let a dense and a pruned model go on with texts, and write that beside the run's report.

    The likeliest token is taken each time. One model is in memory at a time.

    Args:
        folder: output folder of a finished run that made a model.
        reference: the dense model; that which the run names if None.
        prompts: plain texts, no chat template is put around them.
        tokens: to write at most.
        device: auto, cpu, cuda or cuda:N.
        trust_remote_code: let the checkpoints' own Python code run.
        progress: called with (phase, done, total).

    Raises:
        SecateurError: the folder holds no model, the dense model is not to be found, or a prompt
            is empty.
    """
    if not all(prompts):
        raise SecateurError("There is nothing to go on with in an empty prompt; give it a word.")
    (run,) = read_runs([folder])
    name = str(reference or _dense_name(run))
    place = resolve_device(device)
    dtype = resolve_dtype("auto", place)
    pruned = GivenModel.find(run.folder, trust_remote_code)
    dense = GivenModel.find(name, trust_remote_code)
    tokenizer = pruned.tokenizer()
    assert tokenizer is not None, "it lies in a folder"
    encoder = Encoder.of(tokenizer, rows=pruned.vocabulary)
    begun = [encoder.begun(prompt) for prompt in prompts]
    total, written = 2 * len(prompts), list[list[str]]()
    progress("Continuing texts", 0, total)
    for each in (dense, pruned):
        model = each.load(place, dtype)
        written.append([])
        for ids in begun:
            written[-1].append(_continued(model, tokenizer, ids, tokens))
            progress("Continuing texts", sum(map(len, written)), total)
        del model
        gc.collect()
    result = Continuations(
        model=run.label,
        reference=name,
        dtype=str(dtype).removeprefix("torch."),
        device=str(place),
        tokens=tokens,
        continuations=[
            Continuation(prompt=prompt, dense=one, pruned=other)
            for prompt, one, other in zip(prompts, *written, strict=True)
        ],
    )
    write_json(run.folder / "secateur" / "continuations.json", result.model_dump(mode="json"))
    return result


def _dense_name(run: Run) -> str:
    if run.kind == "curve":
        raise SecateurError(
            f"{run.folder} holds a curve and no model that could write; leave out --continuations."
        )
    # What is trained may come pruned or cut, but its teacher is dense.
    name = run.report.text("teacher" if run.kind in ("train", "recover") else "model")
    if name is None:
        raise SecateurError(
            f"The report in {run.folder} does not say which model is the dense one; name it with "
            "--reference."
        )
    return name


def _continued(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], tokens: int
) -> str:
    end = tokenizer.eos_token_id
    # The checkpoint's own settings may sample, or punish what is repeated.
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=tokens, eos_token_id=end, pad_token_id=end
    )
    generate: Any = model.generate
    prompt_1N = torch.tensor([prompt], device=model.device)
    whole_1N = generate(prompt_1N, attention_mask=torch.ones_like(prompt_1N))
    written = whole_1N[0, prompt_1N.shape[1] :].tolist()
    return str(tokenizer.decode([token for token in written if token != end]))
