"""Third parties' plugins as pip would leave them, shared by the tests of this folder."""

from __future__ import annotations

from tests.host.conftest import install, load, site

__all__ = ["install", "load", "site"]
