"""`python -m` form of `ckptengine bench`."""

from __future__ import annotations

import sys

from .arguments import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
