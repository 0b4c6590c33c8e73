"""`python -m conversion SOURCE DEST ...` is `groupvit convert SOURCE DEST ...`; so are `verify` and `inspect`."""

import sys

from groupvit_common.cli import main

if __name__ == "__main__":
    arguments = sys.argv[1:]
    named = bool(arguments) and arguments[0] in ("convert", "verify", "inspect")
    sys.exit(main(arguments if named else ["convert", *arguments]))
