"""``python -m dyhead_zoo``: the command line, also under ``torchrun -m dyhead_zoo``."""

import sys

from dyhead_zoo.cli import main

sys.exit(main())
