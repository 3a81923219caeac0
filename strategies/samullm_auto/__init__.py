"""Scheduler ``auto``: an anytime search that starts from other schedulers' plans.

The constants of this package are choices, none was fitted. What a change of them does is seen in
``benchmarks/planning.py quality`` (bundled applications) and ``benchmarks/random_quality.py``
(random problems); ``docs/planning.md`` has both tables.
"""
