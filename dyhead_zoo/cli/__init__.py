"""The command line, ``dyhead-zoo VERB``.

Each verb is one function that takes the parsed arguments, in a module of this package whose ``VERBS`` add it to the
parser. Nothing heavy is imported before a verb runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from dyhead_zoo.cli import benchmark, catalogue, detect, learn, weights
from dyhead_zoo.version import __version__

USER_ERRORS = (ValueError, OSError, FloatingPointError)
"""What a user can cause: shown as one line. Anything else is a defect and keeps its traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None for those of the process.

    Returns:
        Exit status: 0 done; 1 done in part (some pictures could not be read, or the training was stopped); 2 for what
        the user can mend, with one line on stderr.
    """
    args = build_parser().parse_args(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("dyhead_zoo").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            return args.run(args)
        except USER_ERRORS as error:
            if args.debug:
                raise
            _print_error(str(error) or type(error).__name__)
            return 2


def build_parser() -> argparse.ArgumentParser:
    """All verbs and their flags."""
    parser = _Parser(prog="dyhead-zoo", description="A zoo of object detectors around Dynamic Head.")
    parser.add_argument("--version", action="version", version=f"dyhead-zoo {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for module in (catalogue, detect, learn, weights, benchmark):
        for add in module.VERBS:
            add(verbs).add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


class _Parser(argparse.ArgumentParser):
    """Reports a wrong flag in one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        _print_error(f"{message} (see {self.prog} --help)")
        self.exit(2)


def _print_error(message: str) -> None:
    print(f"dyhead-zoo: error: {message}", file=sys.stderr)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Warnings without the line of source that Python shows with them."""
    print(f"dyhead-zoo: warning: {message}", file=sys.stderr)
