"""`python -m fastconv.cli`: the command line where the console script is not on the path."""

from __future__ import annotations

import sys

from fastconv.cli import main

sys.exit(main())
