"""Patterns, masks, exact counts, and the plan that divides them among linears."""
