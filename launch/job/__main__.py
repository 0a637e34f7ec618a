"""``python -m anemoi_dist.launch.job``, as written in every batch script."""

import sys

from .batch import main

if __name__ == "__main__":
    sys.exit(main())
