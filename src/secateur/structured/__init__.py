"""Structured pruning: whole channels and heads go, and what is left is a smaller model."""
