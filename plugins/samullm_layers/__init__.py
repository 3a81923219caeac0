"""Iteration latency composed from measured layers: ``layers``."""
