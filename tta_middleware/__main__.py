"""``python -m tta_middleware``: the command ``tta`` where no script of that name is on the path."""

from __future__ import annotations

import sys

from tta_middleware.cli import main

if __name__ == "__main__":
    sys.exit(main())
