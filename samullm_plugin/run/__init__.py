"""Carries plans out: coordinator, journal, metrics, report."""
