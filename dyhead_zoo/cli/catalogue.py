"""``dyhead-zoo list`` and ``info``: which detectors there are, and what is known of one."""

from __future__ import annotations

import argparse
from typing import Any

_LIST = """
Detectors that have a name: the name, where the weights of its default tag come from (bundled: in the package; hub:
Hugging Face Hub; url: its authors' server, not checked whether it still answers; none: train it), and its weight tags,
the default first. Any other timm backbone works too, by a name of the form FAMILY_BACKBONE[_dyheadN].
"""


def _add_list(verbs: Any) -> argparse.ArgumentParser:
    verb = verbs.add_parser("list", help="names of detectors", description=_LIST)
    verb.add_argument("filter", nargs="?", default="", metavar="FILTER", help="wildcard, such as '*swin*'")
    verb.add_argument("--pretrained", action="store_true", help="only weights that exist, one line a tag")
    verb.add_argument(
        "--exclude", action="append", default=[], metavar="FILTER", help="leave these out; may be repeated"
    )
    verb.set_defaults(run=run_list)
    return verb


def run_list(args: argparse.Namespace) -> int:
    """Print a table of names, where their weights come from, and their tags, the default first."""
    from dyhead_zoo import get_pretrained_cfg, list_detectors, list_tags

    names = list_detectors(args.filter, pretrained=args.pretrained, exclude=args.exclude)
    if not names:
        raise ValueError(f"no detector matches {args.filter!r}: dyhead-zoo list shows all names")
    width = max(map(len, names))
    for name in names:
        tags = "" if args.pretrained else ", ".join(list_tags(name))
        print(f"{name:<{width}}  {get_pretrained_cfg(name).status:<7}  {tags}".rstrip())
    return 0


def _add_info(verbs: Any) -> argparse.ArgumentParser:
    verb = verbs.add_parser("info", help="size, labels, input and source of one detector")
    verb.add_argument("name", metavar="NAME", help="detector, with or without a tag")
    verb.set_defaults(run=run_info)
    return verb


def run_info(args: argparse.Namespace) -> int:
    """Print what is known of one detector."""
    from dyhead_zoo.engine.info import describe

    print(describe(args.name))
    return 0


VERBS = (_add_list, _add_info)
