"""Scheduler ``exact``: provably best plans of stated structures, by constraint programming.

The problem is a multi-mode project scheduling problem with minimal time lags (MRCPSP/max; time
lags: Bartusch, Möhring and Radermacher, 1988): modes are parallel sizes, renewable resources the
NVLink groups, lags the tails of consumers. Limits and shares of time are choices;
``benchmarks/stored_instances.py solve`` shows what is proven with them.
"""
