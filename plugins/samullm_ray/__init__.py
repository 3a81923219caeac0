"""Executor ``ray``: engines on the machines of a Ray cluster."""
