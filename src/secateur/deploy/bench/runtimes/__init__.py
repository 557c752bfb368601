"""Runtimes that models are measured in; one joins by its module and its line here."""

from __future__ import annotations

# The module and the class of each, which are imported when they are needed.
RUNTIMES = {
    "transformers": "transformers.Transformers",
    "llama.cpp": "llama_cpp.LlamaCpp",
    "openvino": "openvino.OpenVino",
}
