"""Step-by-step comparison of the engine simulation with the installed vLLM's own scheduler."""
