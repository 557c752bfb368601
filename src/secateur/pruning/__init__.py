"""Prune: from a recipe to a checkpoint and a report."""
