"""One abstract base class per kind of plugin; `samullm_plugin` has them all by name.

Nothing is imported here: engine processes import the executors' interface, and vLLM's CPU build
cannot start in a process that has loaded numba, which the simulation behind other interfaces needs.
"""
