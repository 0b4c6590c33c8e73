"""`python -m groupvit_common.cli`."""

import sys

from groupvit_common.cli import main

if __name__ == "__main__":
    sys.exit(main())
