"""Recover a model that was cut: its blocks one by one, then the whole, by the dense model."""
