"""Applications from Python: describe, plan, run, and take the results as tables."""
