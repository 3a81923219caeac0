"""Measures live engines."""
