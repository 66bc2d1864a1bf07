"""Flags that several verbs have, and what they stand for."""

from __future__ import annotations

import argparse
import ast
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dyhead_zoo.detector import Detector


def add_data_flags(verb: argparse.ArgumentParser, prefix: str, required: bool = True) -> None:
    """``--<prefix>images`` and ``--<prefix>annotations``."""
    which = "validation" if prefix else "data set"
    verb.add_argument(
        f"--{prefix}images", type=Path, required=required, metavar="DIR", help=f"{which}: folder of images"
    )
    verb.add_argument(
        f"--{prefix}annotations", type=Path, required=required, metavar="FILE", help=f"{which}: COCO-format JSON file"
    )


def add_model_flags(verb: argparse.ArgumentParser) -> None:
    """What ``load_detector`` reads, besides the name."""
    verb.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights to use instead of the published ones")
    labels = verb.add_mutually_exclusive_group()
    labels.add_argument(
        "--class-names", type=comma_separated, metavar="A,B,..", help="classes of a checkpoint that names none"
    )
    labels.add_argument("--num-classes", type=positive_int, metavar="N", help="their number, if names do not matter")
    verb.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ..; default: a GPU where there is one")
    verb.add_argument("--fuse", action="store_true", help="fold BatchNorm: faster, the same up to rounding")


def add_model_args(verb: argparse.ArgumentParser) -> None:
    """``--model-args``, a list of pairs."""
    verb.add_argument(
        "--model-args",
        nargs="+",
        action="extend",
        type=key_value,
        default=[],
        metavar="KEY=VALUE",
        help="arguments of create_detector, such as frozen_stages=1",
    )


def load_detector(name: str | None, args: argparse.Namespace) -> Detector:
    """The detector that the flags of ``add_model_flags`` ask for, in eval mode.

    Our own weight files carry their detector's name, arguments and labels, so flags need not repeat them.
    """
    import torch

    from dyhead_zoo import DEFAULT_DETECTOR, create_detector
    from dyhead_zoo.saved import saved_config

    check_device(args.device)
    classes = {"class_names": args.class_names, "num_classes": args.num_classes}
    saved = saved_config(args.checkpoint) if args.checkpoint else None
    if saved and (name is None or name.partition(".")[0] == saved["name"]):
        detector = create_detector(f"local-dir:{args.checkpoint}", **classes)
    else:
        pretrained = args.checkpoint is None
        detector = create_detector(name or DEFAULT_DETECTOR, pretrained, checkpoint=args.checkpoint, **classes)
    detector = detector.to(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return detector.fuse() if args.fuse else detector


def check_device(device: str | None) -> None:
    """Raise a ValueError, rather than what torch raises, for a device that is not there."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


def positive_int(text: str) -> int:
    """A count on the command line; argparse shows this function's name for what is no number."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def probability(text: str) -> float:
    """A score on the command line; argparse shows this function's name for what is no number."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in 0..1")
    return float(text)


def comma_separated(text: str) -> list[str]:
    """``A,B,..`` as a list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def key_value(text: str) -> tuple[str, Any]:
    """``KEY=VALUE``; the value as Python would read it, else as text."""
    key, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value
