"""Compare what chooses masks, each bare, with refit, and with refit and reconstruction.

    python benchmarks/block_methods.py --model DIR --calibration c4.jsonl \\
        --text wikitext2_test.txt --output results.json --markdown table.md

The first contender of every pattern is llm-compressor's SparseGPT, whose time the others are
divided by. Results are written as they come, and a run that is already in the output file is not
repeated; the output file may be that of ``one_shot.py``.
"""

from __future__ import annotations

from harness.bench import main

# ADMM and SparseGPT end in a refit of their own.
FITTED = ("sparsegpt", "admm")
MASKS = ("magnitude", "wanda")
PERMUTED = (("wanda", ""), ("wanda", "+refit"), ("admm", ""), ("auto", ""))
REBUILDS = ("barber", "swaps")
# Allocation inside a block, and between blocks: n:m leaves nothing to allocate.
ALLOCATED = ("besa", "besa-rates", "wanda@sensitivity", "wanda@loss")


def contenders() -> str:
    """Every method with everything after it, at every pattern; then what rebuilds masks."""
    names = ["auto-50", "auto-60", "auto-70", "auto-2:4"]
    names += ["auto@uniform-50", "auto@uniform-60", "auto@uniform-70"]
    for pattern in ("50", "60", "70", "2:4"):
        masks = MASKS if ":" in pattern else MASKS + ALLOCATED
        runs = [(method, ("", "+reconstruct")) for method in FITTED]
        runs += [] if ":" in pattern else [("besa-reconstruct", ("",))]
        runs += [(method, ("", "+refit", "+refit+reconstruct")) for method in masks]
        names += [f"{method}{after}-{pattern}" for method, afters in runs for after in afters]
    for pattern in ("50", "2:4", "4:8"):
        runs = [(method, ("", "+refit")) for method in (*MASKS, "sparsegpt")]
        names += [
            f"{method}+{rebuild}{after}-{pattern}"
            for method, afters in runs
            for rebuild in REBUILDS
            for after in afters
        ]
    for pattern in ("2:4", "4:8"):
        names += [f"{method}+permute{after}-{pattern}" for method, after in PERMUTED]
    return ",".join(names)


if __name__ == "__main__":
    assert __doc__ is not None
    main(__doc__, contenders())
