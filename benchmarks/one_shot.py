"""Prune one model with secateur and with llm-compressor, in one run, on the same tokens.

    python benchmarks/one_shot.py --model DIR --calibration c4.jsonl --text wikitext2_test.txt \\
        --peer-env .venv-peers --output results.json --markdown table.md

Every contender is a whole process from a model on disk to a pruned model on disk. Results are
written as they come, and a run that is already in the output file is not repeated.
"""

from __future__ import annotations

from harness.bench import main

CONTENDERS = (
    "sparsegpt-50,wanda-50,wanda+refit-50,admm-50,sparsegpt-2:4,wanda-2:4,wanda+refit-2:4,admm-2:4"
)

if __name__ == "__main__":
    assert __doc__ is not None
    main(__doc__, CONTENDERS)
