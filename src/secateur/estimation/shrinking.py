"""Memory of ``shrink``."""

from __future__ import annotations

from pathlib import Path

from secateur.estimation.estimate import text_bytes
from secateur.estimation.trial import Trial, peak_of, resident
from secateur.models.checkpoint import Checkpoint
from secateur.models.headers import headers_of
from secateur.report.documents.prune import Needs
from secateur.shrinking.job import choose_sub_blocks
from secateur.shrinking.options import ShrinkOptions
from secateur.shrinking.shrink import shrink

# Sub-models of a round of the preset paper are tried one after the other.
_MASKS = 4


def estimate_shrinking(
    model: str | Path, options: ShrinkOptions | None = None, *, trust_remote_code: bool = False
) -> Needs:
    """Estimate the peak memory of ``shrink``; arguments are its own.

    Raises:
        SecateurError: model or options are refused.
    """
    options = options or ShrinkOptions()
    with headers_of(model) as folder:
        source = Checkpoint.open(folder, trust_remote_code=trust_remote_code)
        return Needs(model=str(model), peak_memory_bytes=_shrinking_peak(source, options))


def _shrinking_peak(source: Checkpoint, options: ShrinkOptions) -> int:
    calibration = options.calibration
    sub_blocks = choose_sub_blocks(source, options)
    cut = {each.kind for each in sub_blocks if not each.fixed}
    # Blocks of the miniature are others; what no block may lose is the same.
    skipped = sorted({f"*.{each.output}" for each in sub_blocks if each.kind not in cut})

    def run(trial: Trial) -> None:
        values = options.model_dump(mode="json", exclude_unset=True, exclude={"only"})
        values["skip"] = skipped
        values["calibration"] = {
            "source": str(trial.text),
            "samples": calibration.samples,
            "length": trial.length(calibration.length),
        }
        if options.grid is not None:
            values["grid"] = max(1, options.grid // trial.divisor)
        if options.preset == "paper":
            values |= {"masks": min(options.masks, _MASKS), "step": options.sparsity}
        else:
            # Time decides nothing of memory.
            values |= {
                "budget": "parameters",
                "trial_tokens": trial.length(options.trial_tokens),
                "batch_tokens": trial.length(options.batch_tokens),
            }
        shrink(
            trial.model,
            trial.output,
            ShrinkOptions.from_mapping(values),
        )

    before = resident()
    tokens = calibration.samples * calibration.length
    peak = peak_of(source, run, tokens=tokens, depth=len(source.blocks))
    written = text_bytes(source, calibration, options.dtype, options.device)
    return max(peak, before + written)
