"""Evaluation: perplexity, distance from the dense model, and answers to zero-shot tasks."""
