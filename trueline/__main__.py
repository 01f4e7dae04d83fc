"""`python -m trueline` and `torchrun -m trueline`: the same as the `trueline` command."""

import sys

from trueline.cli import main

if __name__ == "__main__":
    sys.exit(main())
