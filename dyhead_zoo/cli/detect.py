"""``dyhead-zoo predict`` and ``eval``: detectors that have learned."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dyhead_zoo.cli.shared import add_data_flags, add_model_flags, load_detector, positive_int, probability


def _add_predict(verbs: Any) -> argparse.ArgumentParser:
    verb = verbs.add_parser(
        "predict",
        help="detect objects in pictures",
        description="Detect objects in pictures; write annotated copies and predictions.json (COCO format). Files of "
        "an earlier run are overwritten. Exit status 1: some pictures could not be read.",
    )
    verb.add_argument(
        "inputs",
        nargs="*",
        metavar="IMAGE|FOLDER|GLOB",
        help="pictures; without any, a photograph that ships with matplotlib",
    )
    verb.add_argument(
        "--detector", metavar="NAME", help="default: that of the checkpoint, or the one that ships with the package"
    )
    verb.add_argument("--output", type=Path, default=Path("runs/predict"), metavar="DIR", help="default: %(default)s")
    add_model_flags(verb)
    verb.add_argument("--score-threshold", type=probability, default=0.3, metavar="S", help="default: %(default)s")
    verb.add_argument("--batch-size", type=positive_int, default=1, metavar="N", help="default: %(default)s")
    pictures = verb.add_mutually_exclusive_group()
    pictures.add_argument(
        "--attention", action="store_true", help="also draw where DyHead's attentions look, as <name>_attention.jpg"
    )
    pictures.add_argument("--no-draw", dest="draw", action="store_false", help="write predictions.json only")
    verb.set_defaults(run=run_predict)
    return verb


def run_predict(args: argparse.Namespace) -> int:
    """Detect objects in files; 1 if some could not be read."""
    from dyhead_zoo.engine.predict import PREDICTIONS_FILE, find_images, predict_files, sample_photo

    if not args.inputs:
        print("no input given: using the portrait of Grace Hopper that ships with matplotlib (US Navy, public domain)")
    files = find_images(args.inputs or [sample_photo()])  # a wrong path is told before weights are loaded
    detector = load_detector(args.detector, args)
    result = predict_files(
        detector,
        files,
        args.output,
        score_threshold=args.score_threshold,
        batch_size=args.batch_size,
        draw=args.draw,
        attention=args.attention,
        progress=sys.stderr.isatty(),
    )
    names = {category["id"]: category["name"] for category in result.categories}
    for image in result.images:
        found = [a for a in result.annotations if a["image_id"] == image["id"]]
        shown = ", ".join(f"{names[a['category_id']]} {a['score']:.2f}" for a in found) or "nothing found"
        print(f"{image['file_name']}: {shown}")
    for path, reason in result.failed.items():
        print(f"dyhead-zoo: could not read {path}: {reason}", file=sys.stderr)
    print(
        f"{len(result.images)} pictures, {len(result.annotations)} detections with a score of at least "
        f"{args.score_threshold:g}: {args.output / PREDICTIONS_FILE}"
    )
    return 1 if result.failed else 0


def _add_eval(verbs: Any) -> argparse.ArgumentParser:
    verb = verbs.add_parser(
        "eval",
        help="average precision on a COCO-format data set",
        description="COCO box metrics on a data set. Classes are matched by name; objects of a class that the detector "
        "does not know count as misses.",
    )
    verb.add_argument("name", metavar="NAME", help="detector, with or without a tag")
    add_data_flags(verb, "")
    verb.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="JSON file for the record: figures, by class too, their confidence intervals, and what ran",
    )
    verb.add_argument("--data-name", metavar="TEXT", help="data set in words, for the record; default: the file's name")
    verb.add_argument("--split", default="val", metavar="TEXT", help="its part, for the record; default: %(default)s")
    verb.add_argument(
        "--predictions", type=Path, metavar="FILE", help="JSON file for all detections, COCO results format"
    )
    add_model_flags(verb)
    verb.add_argument("--batch-size", type=positive_int, default=1, metavar="N", help="default: %(default)s")
    verb.add_argument("--num-workers", type=int, default=0, metavar="N", help="processes that read images; default: 0")
    verb.add_argument("--max-images", type=positive_int, metavar="N", help="only the first so many images")
    verb.add_argument(
        "--backend",
        choices=("auto", "pycocotools", "hotcoco"),
        default="auto",
        help="what computes the metrics; auto: hotcoco where installed, which gives the same numbers sooner",
    )
    verb.set_defaults(run=run_eval)
    return verb


def run_eval(args: argparse.Namespace) -> int:
    """Evaluate one detector, print the table, write the files asked for."""
    from dyhead_zoo.engine.checkpoint import check_writable, write_text
    from dyhead_zoo.engine.evaluate import evaluate

    if args.fuse and args.output:
        raise ValueError("--output records the weights as they are saved, which --fuse changes: leave one of them out")
    for path in filter(None, (args.output, args.predictions)):
        check_writable(path)
    detector = load_detector(args.name, args)
    result = evaluate(
        detector,
        images=args.images,
        annotations=args.annotations,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        max_images=args.max_images,
        backend=args.backend,
        progress=sys.stderr.isatty(),
    )
    print(result.summary())
    if args.output:
        from dyhead_zoo.engine.record import evaluation_record, record_to_json

        data = {"dataset": args.data_name or args.annotations.name, "split": args.split}
        write_text(
            args.output, record_to_json(evaluation_record(detector, result, annotations=args.annotations, **data))
        )
    if args.predictions:
        write_text(args.predictions, json.dumps(result.predictions) + "\n")
    return 0


VERBS = (_add_predict, _add_eval)
