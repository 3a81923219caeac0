"""Applications times schedulers."""
