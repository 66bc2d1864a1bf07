"""``dyhead-zoo train``, and ``explain``, which shows beforehand what would learn what."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import types
import typing
from pathlib import Path
from typing import Any

from dyhead_zoo.cli.shared import add_data_flags, add_model_args, check_device, comma_separated, positive_int
from dyhead_zoo.engine.config import TrainConfig


def _add_train(verbs: Any) -> argparse.ArgumentParser:
    verb = verbs.add_parser(
        "train",
        help="train on a COCO-format data set",
        description="Train a detector; under torchrun on several devices (torchrun --nproc-per-node 2 -m dyhead_zoo "
        "train ..). Ctrl-C or SIGTERM saves the state (exit status 1); --resume goes on from it.",
    )
    verb.add_argument("name", metavar="NAME", help="detector, with or without a tag")
    add_data_flags(verb, "")
    add_data_flags(verb, "val-", required=False)
    verb.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the run")
    start = verb.add_mutually_exclusive_group()
    start.add_argument("--pretrained", action="store_true", help="start from NAME's weights, re-headed by class name")
    start.add_argument("--checkpoint", type=Path, metavar="FILE", help="start from these, re-headed by class name")
    start.add_argument(
        "--pretrained-backbone",
        nargs="?",
        const=True,
        metavar="FILE",
        help="start from a backbone in timm's layout; without FILE, the one that timm downloads",
    )
    verb.add_argument(
        "--class-names", type=comma_separated, metavar="A,B,..", help="default: categories of the training file"
    )
    add_model_args(verb)
    verb.add_argument("--resume", action="store_true", help="go on with the run in --output, if there is one")
    settings = verb.add_argument_group("settings")
    for field in dataclasses.fields(TrainConfig):
        _add_setting(settings, field, typing.get_type_hints(TrainConfig)[field.name])
    verb.set_defaults(run=run_train)
    return verb


def run_train(args: argparse.Namespace) -> int:
    """Train one detector; 1 if it was stopped before its last epoch."""
    config = TrainConfig(**{f.name: getattr(args, f.name) for f in dataclasses.fields(TrainConfig)})

    import torch

    from dyhead_zoo import LabelSpace, create_detector, train
    from dyhead_zoo.engine.evaluate import read_annotations

    check_device(config.device)
    torch.manual_seed(config.seed)  # of the fresh weights
    labels = LabelSpace.from_categories(read_annotations(args.annotations)["categories"])
    detector = create_detector(
        args.name,
        pretrained=args.pretrained,
        checkpoint=args.checkpoint,
        pretrained_backbone=args.pretrained_backbone,
        class_names=args.class_names or labels,
        **dict(args.model_args),
    )
    if not (args.pretrained or args.checkpoint or args.pretrained_backbone):
        print(
            "dyhead-zoo: warning: the backbone starts from random weights; start from trained ones with "
            "--pretrained-backbone [FILE] or --pretrained",
            file=sys.stderr,
        )
    try:
        result = train(
            detector,
            images=args.images,
            annotations=args.annotations,
            val_images=args.val_images,
            val_annotations=args.val_annotations,
            output=args.output,
            config=config,
            resume=args.resume,
        )
    except FileExistsError as error:
        raise FileExistsError(str(error).replace("resume=True", "--resume")) from error
    if os.environ.get("RANK", "0") == "0":
        best = f", best AP {result.best_metrics['AP']:.4f}" if result.best_metrics else ""
        print(f"{result.epochs} epochs, {result.steps} steps{best}: {result.best_weights or result.weights}")
    return 1 if result.stopped_by else 0


def _add_setting(group: Any, field: dataclasses.Field[Any], hint: Any) -> None:
    """One flag of a training setting: its type, choices, default and help come from the field."""
    flag, text = "--" + field.name.replace("_", "-"), field.metadata["help"]
    if field.default is not None:
        text += f"; default: {field.default}"
    if hint is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=text)
    elif typing.get_origin(hint) is typing.Literal:
        group.add_argument(flag, choices=typing.get_args(hint), default=field.default, help=text)
    else:
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kind = next(option for option in options if option is not types.NoneType)
        group.add_argument(flag, type=kind, default=field.default, metavar=kind.__name__.upper(), help=text)


def _add_explain(verbs: Any) -> argparse.ArgumentParser:
    verb = verbs.add_parser(
        "explain",
        help="show what would learn each object of a data set",
        description="Before any training: which level, anchors, points or regions each object is assigned to, which "
        "objects nothing learns at this resolution, objects per image against queries, sizes, class balance, "
        "suspicious boxes. No weights are needed.",
    )
    verb.add_argument("--detector", required=True, metavar="NAME", help="with or without a tag")
    verb.add_argument("--annotations", type=Path, required=True, metavar="FILE", help="COCO-format JSON file")
    verb.add_argument("--images", type=Path, metavar="DIR", help="folder of images; needed for pictures only")
    verb.add_argument("--output", type=Path, metavar="DIR", help="folder for all figures as JSON, and for pictures")
    verb.add_argument("--max-images", type=positive_int, metavar="N", help="only the first so many images")
    add_model_args(verb)
    verb.set_defaults(run=run_explain)
    return verb


def run_explain(args: argparse.Namespace) -> int:
    """Print the tables, write the files asked for."""
    from dyhead_zoo.engine.explain import explain
    from dyhead_zoo.engine.info import build_on_meta

    detector, _ = build_on_meta(args.detector, **dict(args.model_args))
    explanation = explain(
        detector,
        annotations=args.annotations,
        images=args.images,
        output=args.output,
        max_images=args.max_images,
        progress=sys.stderr.isatty(),
    )
    print(explanation.summary())
    return 0


VERBS = (_add_train, _add_explain)
