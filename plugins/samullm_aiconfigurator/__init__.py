"""Iteration latency from the operator tables of the package aiconfigurator."""
