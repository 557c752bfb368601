"""What a user should know before trusting the figures of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from secateur.methods.stage import BlockStage, GroupStage
from secateur.models.inspection import TRACE
from secateur.pruning.recipe import Recipe
from secateur.report.documents.prune import BlockReport
from secateur.text.options import note_on_tokens


def notes_on_run(
    recipe: Recipe, shapes: Mapping[str, tuple[int, int]], blocks: Sequence[BlockReport]
) -> list[str]:
    """All notes on a run as a whole.

    Args:
        recipe: what was done.
        shapes: (out, in) of the linears that were worked on, by full name.
        blocks: what became of them.
    """
    return [
        *_on_zeros(recipe, blocks),
        *_on_tokens(recipe, shapes),
        *_on_rejections(recipe, blocks),
    ]


def _on_tokens(recipe: Recipe, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Say where a stage has fewer tokens to fit on than a linear has inputs."""
    fitting = [
        stage.method
        for stage in recipe.stages
        if isinstance(stage, GroupStage) and stage.needs == "gram"
    ]
    tokens = recipe.fitted_windows * recipe.calibration.length
    return note_on_tokens(fitting, tokens, max(width for _, width in shapes.values()))


def _on_rejections(recipe: Recipe, blocks: Sequence[BlockReport]) -> list[str]:
    """Name stages of which held-out text took nothing."""
    rejected: Counter[str] = Counter()
    for block in blocks:
        rejected.update(block.rejected)
    linears = sum(len(block.linears) for block in blocks)
    notes = []
    for stage in recipe.stages:
        asked = len(blocks) if isinstance(stage, BlockStage) else linears
        if 0 < asked <= rejected[stage.method]:
            notes.append(
                f"{stage.method} changed nothing: held-out text rejected it everywhere; give more "
                "calibration text, or leave it out."
            )
    return notes


def _on_zeros(recipe: Recipe, blocks: Sequence[BlockReport]) -> list[str]:
    """Say where zeros are not what pruning made."""
    notes = []
    left = [each for block in blocks for each in block.left.values()]
    if left:
        share = sum(each.weights for each in left)
        notes.append(
            f"{len(left)} linears with {share:,} weights were left as they are, by only and skip; "
            "the sparsity is that of the others."
        )
    linears = [each for block in blocks for each in block.linears.values()]
    zeros, weights = (
        sum(each.zeros_before for each in linears),
        sum(each.weights for each in linears),
    )
    if zeros > TRACE * weights and not recipe.keeps_masks:
        notes.append(
            f"{zeros / weights:.1%} of the weights were zero before; those zeros count as pruned, "
            "so less was removed than the sparsity says."
        )
    return notes
