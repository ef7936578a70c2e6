"""`python -m fastconv`: the command line where the console script is not on the path, and for torchrun."""

from __future__ import annotations

import sys

from fastconv.cli import main

if __name__ == "__main__":
    sys.exit(main())
