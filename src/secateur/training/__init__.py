"""Training of pruned models: masks that adapt, the dense model as teacher, zeros that stay."""
