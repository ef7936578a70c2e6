"""`python -m fastconv`: the command line where the console script is not on the path, and for torchrun."""

from __future__ import annotations

import sys

from fastconv.cli import main

sys.exit(main())
