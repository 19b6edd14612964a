"""``python -m ckptengine``."""

import sys

from ckptengine.cli import main

sys.exit(main())
