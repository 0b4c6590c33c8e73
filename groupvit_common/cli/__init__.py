"""The command line, `groupvit`: a module per command, which imports what it needs when it runs."""

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code. `SystemExit` for --help, --version and bad usage, as argparse does."""
    from groupvit_common.cli.command_line import main

    return main(arguments)
