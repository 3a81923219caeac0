"""``samullm bench policies``: request policies on bundled applications."""
def policies() -> None:
    """x."""
