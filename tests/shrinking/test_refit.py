"""Blocks cut and refitted one after the other, and the checkpoint they make."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from secateur.blocks.streams import Batches, Stream
from secateur.models.capture import logits_after
from secateur.shrinking.export import export
from secateur.shrinking.layout import plan_layout
from secateur.shrinking.options import Form
from secateur.shrinking.refit import CutSubBlock, cut_blocks, pass_cut_blocks, read_refitted
from secateur.shrinking.source import Source, open_source
from secateur.shrinking.units import Width, find_sub_blocks

FAMILIES = [
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "opt", "gpt2",
]  # fmt: skip
CPU = torch.device("cpu")


def tokens() -> torch.Tensor:
    """Text of few words, so that there is something to fit to."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(4, 260, (12, 4), generator=generator)
    return words[torch.randint(0, 12, (16, 6), generator=generator)].flatten(1)


def stream_of(source: Source) -> Stream:
    batches = Batches.of(16, 24, 96)
    return Stream(source.store(CPU), tokens(), batches, CPU, torch.float32, None, 10**9)


def some_widths(source: Source) -> list[Width]:
    """None, some and all units, in turn; in the last attention all, but fewer query heads."""
    shares = (0.5, 0.5, 0.0, 0.7, 1.0, 0.0)
    sub_blocks = find_sub_blocks(source.blocks)
    widths = [
        Width(round(share * each.units), each.heads_per_unit)
        for share, each in zip(shares, sub_blocks, strict=True)
    ]
    return [*widths[:4], Width(sub_blocks[4].units, 1), widths[5]]


def cut_all(source: Source, folder: Path, stream: Stream) -> list[CutSubBlock]:
    blocks = cut_blocks(
        source.store(CPU), find_sub_blocks(source.blocks), some_widths(source), stream, folder
    )
    return [each for block in blocks for each in block]


@pytest.mark.parametrize(
    ("family", "form", "dtype"),
    [(family, form, torch.float32) for family in FAMILIES for form in ("uneven", "padded")]
    + [("llama", "uneven", torch.bfloat16), ("gpt2", "uneven", torch.bfloat16)],
)
def test_what_was_measured_is_what_is_saved(
    family: str, form: Form, dtype: torch.dtype, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    source = open_source(checkpoints(family, dtype))
    sub_blocks = find_sub_blocks(source.blocks)
    stream = stream_of(source)
    kept = [each.kept for each in cut_all(source, tmp_path / "refitted", stream)]
    reached = [each.width_of(units) for each, units in zip(sub_blocks, kept, strict=True)]
    assert reached == some_widths(source)
    layout = plan_layout(source, sub_blocks, some_widths(source), form)
    refitted = partial(read_refitted, tmp_path / "refitted")
    export(source, sub_blocks, kept, layout, tmp_path / "out", refitted)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, trust_remote_code=form == "uneven"
    ).eval()
    store = source.store(CPU)
    with torch.no_grad(), store.head():
        expected = logits_after(store.blocks, tokens(), stream.x_SLD)
        torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_refit_is_never_worse_on_held_out_text(
    family: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    source = open_source(checkpoints(family))
    done = cut_all(source, tmp_path, stream_of(source))
    assert all(each.error <= each.plain_error for each in done)
    assert any(each.error < 0.9 * each.plain_error for each in done)
    for each, width, sub_block in zip(
        done, some_widths(source), find_sub_blocks(source.blocks), strict=True
    ):
        assert (each.error == 0) == (width == sub_block.whole)
        assert (each.error == 1) == (width.units == 0)
    assert all(parameter.is_meta for block in source.blocks for parameter in block.parameters())


def test_the_stream_passes_finished_blocks_as_it_did(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    source = open_source(checkpoints("llama"))
    sub_blocks = find_sub_blocks(source.blocks)
    stream, again = stream_of(source), stream_of(source)
    kept = [each.kept for each in cut_all(source, tmp_path, stream)]
    pass_cut_blocks(source.store(CPU), sub_blocks[:4], kept[:4], again, tmp_path)
    assert again.position == 2
    cut_all(source, tmp_path, again)
    assert torch.equal(again.x_SLD, stream.x_SLD)
