"""A tokenizer as llama.cpp knows it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from secateur.models.locate import load_tokenizer
from secateur.runs.errors import SecateurError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(digits: str) -> list[tuple[Any, ...]]:
    pattern = f"{_CONTRACTIONS}|{_WORDS}|{digits}|{_REST}"
    return [("Split", pattern, "Isolated", False), ("ByteLevel", False, False)]


_GPT2 = ("ByteLevel", False, True)
# How text is cut before merges, by the names that llama.cpp has for it.
_CUTS = {
    "gpt-2": [_GPT2],
    "smollm": [("Digits", True), _GPT2],
    "llama-bpe": _split(r"\p{N}{1,3}"),
    "qwen2": _split(r"\p{N}"),
}
# With these, llama.cpp takes a word that is a token whole.
_WHOLE_WORDS = {"llama-bpe"}
# llama.cpp leaves NFC out; all GGUF files of these do without.
_COMPOSED = {"qwen2"}
_SPACE = "▁"
# Where files as llama.cpp knows them for these tokenizers differ from transformers.
_NOTES = {
    "NFC": "llama.cpp does not compose characters (NFC) first, so decomposed ones get other tokens",
    "Metaspace": "llama.cpp puts a space in front of every text and behind special tokens, "
    "transformers only where none is, and maybe not behind special tokens",
}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Vocabulary:
    """What the file says of a tokenizer.

    Attributes:
        model: ``gpt2`` for byte-level BPE, ``llama`` for BPE on characters with bytes to fall back
            on.
        cut: how text is cut before merges; None if it is not.
        tokens: by id.
        types: of tokens.
        merges: pairs in their order, for ``gpt2``.
        scores: of tokens, for ``llama``: the best pair that makes a token joins first.
        prefix: whether text gets a space in front.
        special: ids by what they are for.
        adds_bos: whether text begins with BOS.
        adds_eos: whether text ends with EOS.
        template: of conversations.
        notes: on text that gets other tokens in llama.cpp.
    """

    model: str
    cut: str | None
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    prefix: bool = False
    special: Mapping[str, int] = field(default_factory=dict)
    adds_bos: bool = False
    adds_eos: bool = False
    template: str | None = None
    notes: list[str] = field(default_factory=list)

    def write_keys(self, writer: gguf.GGUFWriter) -> None:
        """Put the tokenizer into a file."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.cut or "default")
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.prefix)
        if self.merges:
            writer.add_token_merges(self.merges)
        for kind, token in self.special.items():
            getattr(writer, f"add_{kind}_token_id")(token)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(self.adds_eos)
        if self.template:
            writer.add_chat_template(self.template)


def describe_tokenizer(folder: Path, rows: int, *, trust_remote_code: bool = False) -> Vocabulary:
    """Say what llama.cpp needs to know of a checkpoint's tokenizer.

    Args:
        folder: the checkpoint.
        rows: of the embedding; as many tokens are named.
        trust_remote_code: let the checkpoint's own Python code run.

    Raises:
        SecateurError: llama.cpp would cut text otherwise.
    """
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refusal(folder, "has no tokenizer.json")
    said: dict[str, Any] = json.loads(backend.to_str())
    model, added = said["model"], said["added_tokens"]
    if model["type"] != "BPE" or model.get("dropout"):
        raise _refusal(folder, f"is of type {model['type']}")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _refusal(folder, f"has {key}")
    for token in added:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise _refusal(folder, f"has the token {token['content']} that looks around itself")
    pairs = [tuple(each.split(" ") if isinstance(each, str) else each) for each in model["merges"]]
    if not pairs:
        raise _refusal(folder, "has no merges")
    tokens, types = _tokens(folder, model["vocab"], added, rows)
    bos, eos = _ends(folder, tokenizer)
    kinds = ("bos", "eos", "unk", "pad")
    special = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in kinds}
    steps = [
        *_sequence(said["normalizer"], "normalizers"),
        *_sequence(said["pre_tokenizer"], "pretokenizers"),
    ]
    common: dict[str, Any] = {
        "notes": [_NOTES[each["type"]] for each in steps if each["type"] in _NOTES],
        "tokens": tokens,
        "types": types,
        "special": {kind: token for kind, token in special.items() if token is not None},
        "adds_bos": bos,
        "adds_eos": eos,
        "template": _template(tokenizer),
    }
    if model.get("byte_fallback"):
        prefix = _prefix(folder, steps)
        own = {token["content"] for token in added}
        scores = _scores(folder, model["vocab"], pairs, own)
        for index, token in enumerate(tokens):
            if types[index] == TokenType.NORMAL and _BYTE.fullmatch(token):
                types[index] = TokenType.BYTE
        if "unk" in common["special"]:
            types[common["special"]["unk"]] = TokenType.UNKNOWN
        ranked = [scores.get(token, 0.0) for token in tokens]
        return Vocabulary("llama", None, scores=ranked, prefix=prefix, **common)
    merges = [" ".join(pair) for pair in pairs]
    return Vocabulary("gpt2", _cut(folder, said), merges=merges, **common)


def _refusal(folder: Path, what: str) -> SecateurError:
    return SecateurError(
        f"The tokenizer of {folder} {what}, for which llama.cpp has no equal that is known here; "
        "export a model with a BPE tokenizer of Llama, Qwen, SmolLM, GPT-2 or Gemma."
    )


def _tokens(
    folder: Path, vocabulary: Mapping[str, int], added: list[dict[str, Any]], rows: int
) -> tuple[list[str], list[int]]:
    named = {index: (token, TokenType.NORMAL) for token, index in vocabulary.items()}
    for token in added:
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        named[token["id"]] = (token["content"], kind)
    if max(named) >= rows:
        raise SecateurError(
            f"The tokenizer of {folder} has a token {max(named)}, but the embedding has {rows} "
            "rows; use the tokenizer of this model."
        )
    found = [named.get(index, (f"[PAD{index}]", TokenType.UNUSED)) for index in range(rows)]
    return [token for token, _ in found], [kind for _, kind in found]


def _ends(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether text gets BOS in front and EOS behind."""
    text = "a b"
    bare: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer(text)["input_ids"]
    for bos in (False, True):
        for eos in (False, True):
            if whole == [tokenizer.bos_token_id] * bos + bare + [tokenizer.eos_token_id] * eos:
                return bos, eos
    raise _refusal(folder, "puts more than BOS and EOS around a text")


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template: Any = tokenizer.chat_template
    found: str | None = template.get("default") if isinstance(template, dict) else template
    return found


# Byte-level BPE.


def _cut(folder: Path, said: Mapping[str, Any]) -> str:
    steps = [_step(each) for each in _sequence(said["pre_tokenizer"], "pretokenizers")]
    name = next((name for name, known in _CUTS.items() if known == steps), None)
    if name is None:
        raise _refusal(folder, "cuts text in its own way")
    if bool(said["model"].get("ignore_merges")) != (name in _WHOLE_WORDS):
        raise _refusal(folder, "treats words that are tokens in its own way")
    normalizer = [each["type"] for each in _sequence(said["normalizer"], "normalizers")]
    if normalizer and (normalizer != ["NFC"] or name not in _COMPOSED):
        raise _refusal(folder, f"changes text by {normalizer[0]}")
    return name


def _sequence(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return step[key] if step["type"] == "Sequence" else [step]


def _step(step: dict[str, Any]) -> tuple[Any, ...]:
    match step:
        case {"type": "ByteLevel"}:
            return "ByteLevel", step["add_prefix_space"], step["use_regex"]
        case {"type": "Digits"}:
            return "Digits", step["individual_digits"]
        case {"type": "Split", "pattern": {"Regex": pattern}}:
            return "Split", pattern, step["behavior"], step["invert"]
    return (step["type"],)


# BPE on characters.


def _prefix(folder: Path, steps: list[dict[str, Any]]) -> bool:
    """Whether text gets a space in front."""
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if replaced in steps:
        # Once spaces are replaced there are none to split at.
        steps = [
            step for step in steps if step.get("pattern") != {"String": " "} or step == replaced
        ]
    match steps:
        case [{"type": "Metaspace", "replacement": "▁", "split": False, "prepend_scheme": scheme}]:
            return bool(scheme != "never")
        case [{"type": "Prepend", "prepend": "▁"}, step] if step == replaced:
            return True
        case [step] if step == replaced:
            return False
    raise _refusal(folder, "treats spaces in its own way")


def _scores(
    folder: Path, vocabulary: Mapping[str, int], pairs: list[tuple[str, ...]], added: set[str]
) -> dict[str, float]:
    """Scores that join the same pairs in the same order as merges do.

    llama.cpp joins whatever two tokens make a third, the one of the best score first. So the pairs
    of a token have to be together in the order, and no token may have other halves.
    """
    scores: dict[str, float] = {}
    last = ""
    for rank, pair in enumerate(pairs):
        token = "".join(pair)
        if token != last and token in scores and token not in added:
            raise _refusal(folder, f"makes {token} of pairs of different ranks")
        scores.setdefault(token, -float(rank))
        last = token
    known = set(pairs)
    for token in vocabulary:
        if token in added or _BYTE.fullmatch(token):
            continue
        for middle in range(1, len(token)):
            pair = (token[:middle], token[middle:])
            if pair[0] in vocabulary and pair[1] in vocabulary and pair not in known:
                raise _refusal(folder, f"does not join {pair[0]} and {pair[1]}")
    return scores
