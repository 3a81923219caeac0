"""``python -m samullm_plugin``: the same as ``samullm``."""

from __future__ import annotations

import sys

from samullm_plugin.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
