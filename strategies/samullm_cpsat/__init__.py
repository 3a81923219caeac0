"""Scheduler ``exact``: provably best plans of stated structures, by constraint programming."""
