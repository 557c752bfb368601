"""Run contenders as whole processes, measure them from outside, keep and show the results."""
