"""Engines of vLLM in processes of their own: real ones, and ones that only take the time."""
