"""Request policies: in which order and on which replica the requests of a node run."""
