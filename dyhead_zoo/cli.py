"""The command line: ``dyhead-zoo list | info | predict | eval | train | explain | import | benchmark | push | pull``.

Each verb is one function that takes the parsed arguments. Nothing heavy is imported before a verb runs, so that
``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import logging
import os
import sys
import types
import typing
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dyhead_zoo.engine.config import TrainConfig
from dyhead_zoo.version import __version__

if TYPE_CHECKING:
    from dyhead_zoo.detector import Detector

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
    for add in (
        _add_list,
        _add_info,
        _add_predict,
        _add_eval,
        _add_train,
        _add_explain,
        _add_import,
        _add_benchmark,
        _add_push,
        _add_pull,
        _add_verify,
    ):
        verb = add(verbs)
        verb.add_argument("--debug", action="store_true", help="show the traceback of an error")
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


_LIST = """
Detectors that have a name: the name, where the weights of its default tag come from (bundled: in the package; hub:
Hugging Face Hub; url: its authors' server, not checked whether it still answers; none: train it), and its weight tags,
the default first. Any other timm backbone works too, by a name of the form FAMILY_BACKBONE[_dyheadN].
"""


# -- list and info ----------------------------------------------------------------------------------------------------


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


# -- predict and eval -------------------------------------------------------------------------------------------------


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
    _add_model_flags(verb)
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
    detector = _load_detector(args.detector, args)
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
    _add_data_flags(verb, "")
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
    _add_model_flags(verb)
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
    from dyhead_zoo.engine.evaluate import evaluate

    if args.fuse and args.output:
        raise ValueError("--output records the weights as they are saved, which --fuse changes: leave one of them out")
    detector = _load_detector(args.name, args)
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
        _write(args.output, record_to_json(evaluation_record(detector, result, annotations=args.annotations, **data)))
    if args.predictions:
        _write(args.predictions, json.dumps(result.predictions) + "\n")
    return 0


# -- train ------------------------------------------------------------------------------------------------------------


def _add_train(verbs: Any) -> argparse.ArgumentParser:
    verb = verbs.add_parser(
        "train",
        help="train on a COCO-format data set",
        description="Train a detector; under torchrun on several devices (torchrun --nproc-per-node 2 -m dyhead_zoo "
        "train ..). Ctrl-C or SIGTERM saves the state (exit status 1); --resume goes on from it.",
    )
    verb.add_argument("name", metavar="NAME", help="detector, with or without a tag")
    _add_data_flags(verb, "")
    _add_data_flags(verb, "val-", required=False)
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
    verb.add_argument("--class-names", type=_names, metavar="A,B,..", help="default: categories of the training file")
    _add_model_args(verb)
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

    _check_device(config.device)
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


# -- explain ----------------------------------------------------------------------------------------------------------


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
    _add_model_args(verb)
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


# -- import -----------------------------------------------------------------------------------------------------------


def _add_import(verbs: Any) -> argparse.ArgumentParser:
    verb = verbs.add_parser(
        "import",
        help="convert a checkpoint of mmdetection, detectron2, torchvision or DETR's authors",
        description="Convert a detector that was trained with another library into a saved detector. Family, backbone "
        "and number of classes are told by its keys; what they do not tell is said, and --as decides it.",
    )
    verb.add_argument("path", type=Path, metavar="PATH", help=".pth, .pt, .bin, .pkl or .safetensors")
    verb.add_argument("--as", dest="name", metavar="NAME", help="what it is: a family, a detector, or name.tag")
    verb.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the saved detector")
    verb.add_argument("--class-names", type=_names, metavar="A,B,..", help="default: those that the file names")
    verb.add_argument("--license", metavar="ID", help="of the weights, such as apache-2.0")
    verb.set_defaults(run=run_import)
    return verb


def run_import(args: argparse.Namespace) -> int:
    """Convert a checkpoint, and say how its nature was told."""
    from dyhead_zoo import save_for_hub
    from dyhead_zoo.convert.guess import import_checkpoint

    detector, guess = import_checkpoint(args.path, args.name, class_names=args.class_names)
    print(guess.summary())
    folder = save_for_hub(detector, args.output, license=args.license)
    print(f"saved: create_detector('local-dir:{folder}')")
    return 0


# -- benchmark --------------------------------------------------------------------------------------------------------


def _add_benchmark(verbs: Any) -> argparse.ArgumentParser:
    verb = verbs.add_parser(
        "benchmark",
        help="measure what things cost on this machine",
        description="op: the deformable convolution; head: six DyHead blocks, inference; train: the same, forward and "
        "backward; each against dense convolutions and torchvision's operator. detector: a whole detector, its parts "
        "and a training step. torchvision: its two-stage detectors beside ours with the same weights. photo: the "
        "stages from a JPEG to boxes. memory: what operator, head and detectors need at their peak, each in a process "
        "of its own. data: making batches, by stages. eval: scoring detections, against pycocotools.",
    )
    choices = ("op", "head", "train", "detector", "torchvision", "photo", "memory", "data", "eval")
    verb.add_argument("what", choices=choices)
    verb.add_argument(
        "name",
        nargs="?",
        metavar="NAME",
        help="of detector, photo and data; default: atss_resnet50_dyhead6, the bundled one, both",
    )
    verb.add_argument("--reps", type=positive_int, metavar="N", help="rounds; default: 7, of memory 3")
    verb.add_argument("--threads", type=positive_int, default=1, metavar="N", help="of PyTorch; default: %(default)s")
    verb.add_argument(
        "--size", type=positive_int, nargs=2, metavar=("H", "W"), help="of the maps (op), images, or files (data)"
    )
    verb.add_argument("--images", type=Path, metavar="DIR", help="data: folder of images; default: synthetic JPEGs")
    verb.add_argument("--annotations", type=Path, metavar="FILE", help="data: COCO-format JSON file of the same")
    verb.add_argument("--csv", type=Path, metavar="FILE", help="also write the figures there")
    verb.set_defaults(run=run_benchmark)
    return verb


def run_benchmark(args: argparse.Namespace) -> int:
    """Measure and print a table."""
    from dyhead_zoo.engine import benchmark, benchmark_cases, benchmark_memory

    given = {"name": args.name, "images": args.images, "annotations": args.annotations}
    given["size"] = tuple(args.size) if args.size else None
    if args.what == "memory":
        benchmark_cases.check_use(args.what, **given)
        benchmark_memory.run_memory_benchmark(
            benchmark_memory.memory_cases(), args.reps or 3, args.csv, threads=args.threads
        )
    else:
        cases = benchmark_cases.cases(args.what, **given)
        benchmark.run_benchmark(cases, args.reps or 7, args.csv, threads=args.threads)
    return 0


# -- the Hub ----------------------------------------------------------------------------------------------------------


def _add_push(verbs: Any) -> argparse.ArgumentParser:
    verb = verbs.add_parser(
        "push",
        help="put a detector on the Hugging Face Hub",
        description="Push a detector to a repository of the Hub, in one commit or none; `hf auth login` or HF_TOKEN "
        "says who you are. A card that is there already stays unless --card gives another.",
    )
    verb.add_argument("detector", metavar="NAME|PATH", help="name.tag, a saved folder, or a weight file of train")
    verb.add_argument("repo_id", metavar="ORG/REPO", help="created if need be")
    verb.add_argument("--private", action="store_true", help="if the repository is created: for you alone")
    verb.add_argument("--revision", metavar="BRANCH", help="default: main")
    verb.add_argument("--tag", metavar="TAG", help="tag for the commit")
    verb.add_argument("--card", type=Path, metavar="FILE", help="README.md")
    verb.add_argument("--record", type=Path, metavar="FILE", help="record of the evaluation, from eval --output")
    verb.add_argument(
        "--license",
        metavar="ID",
        help="of the weights, by the Hub's name, such as apache-2.0; default: as they state; a card of your own stays "
        "as it is",
    )
    verb.add_argument(
        "--message", default="Upload detector", metavar="TEXT", help="of the commit; default: %(default)s"
    )
    verb.add_argument("--dry-run", action="store_true", help="show what would be pushed; send nothing")
    verb.set_defaults(run=run_push)
    return verb


def run_push(args: argparse.Namespace) -> int:
    """Push a detector, or show what a push would send."""
    import shutil
    import tempfile

    from dyhead_zoo import create_detector, push_to_hub, save_for_hub
    from dyhead_zoo.hub import saved_files

    _check_repo_id(args.repo_id)
    card = args.card.read_text(encoding="utf-8") if args.card else None
    record = _read_record(args.record) if args.record else None
    path = Path(args.detector)
    if path.is_dir():
        _check_saved(path)
    with tempfile.TemporaryDirectory() as temporary:
        if path.is_dir() and record is None and args.license is None:
            folder = path
        else:
            detector = create_detector(f"local-dir:{path}" if path.exists() else args.detector, pretrained=True)
            folder = Path(temporary) / "new"
            own_record = _copy_texts(path, folder) if path.is_dir() else None
            record = own_record if record is None else record
            save_for_hub(detector, folder, card=card, record=record, license=args.license, repo_id=args.repo_id)
            if (path / "recipe.json").is_file():  # of the same weights, so it stays true
                shutil.copyfile(path / "recipe.json", folder / "recipe.json")
        if args.dry_run:
            for name in saved_files(folder):
                print(f"{(folder / name).stat().st_size:>12}  {name}")
            print(f"nothing was sent to {args.repo_id}: leave out --dry-run to push")
            return 0
        commit = push_to_hub(
            folder,
            args.repo_id,
            private=args.private,
            revision=args.revision,
            card=card,
            commit_message=args.message,
            tag=args.tag,
        )
    print(f"pushed as {commit}: create_detector('hf-hub:{args.repo_id}@{args.tag or args.revision or commit}')")
    return 0


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.utils import validate_repo_id

    if repo_id.count("/") != 1:
        raise ValueError(f"{repo_id!r} is no repository of the Hub: expected ORG/REPO")
    validate_repo_id(repo_id)


def _check_saved(folder: Path) -> None:
    """Raise a FileNotFoundError, which names the weights of a training run, unless a detector is saved there."""
    from dyhead_zoo.saved import saved_config
    from dyhead_zoo.weight_files import weights_in

    try:
        saved_config(folder)
        weights_in(folder)
    except FileNotFoundError as error:
        best = folder / "best.safetensors"
        if not best.is_file():
            raise
        raise FileNotFoundError(f"{folder} is the folder of a training run: push its weights, {best}") from error


def _copy_texts(folder: Path, copy: Path) -> dict[str, Any] | None:
    """Copy the card and the licence texts of a saved detector, and return the record of its evaluation, if any."""
    import shutil

    from dyhead_zoo.hub import CARD_FILE, RECORD_FILE

    copy.mkdir()
    for name in (CARD_FILE, "LICENSE", "NOTICE"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, copy / name)
    return _read_record(folder / RECORD_FILE) if (folder / RECORD_FILE).is_file() else None


def _read_record(path: Path) -> dict[str, Any]:
    advice = "give a record that `dyhead-zoo eval --output FILE` wrote"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file ({error}): {advice}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} holds a {type(record).__name__}, no record of an evaluation: {advice}")
    return record


def _add_pull(verbs: Any) -> argparse.ArgumentParser:
    verb = verbs.add_parser("pull", help="copy a detector from the Hugging Face Hub to a folder")
    verb.add_argument("repo_id", metavar="ORG/REPO", help="with @REVISION for a branch, tag or commit")
    verb.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="default: the repository's name")
    verb.set_defaults(run=run_pull)
    return verb


def run_pull(args: argparse.Namespace) -> int:
    """Pull a detector."""
    from dyhead_zoo import pull

    repo_id, _, revision = args.repo_id.removeprefix("hf-hub:").partition("@")
    _check_repo_id(repo_id)
    folder = pull(repo_id, args.folder or Path(repo_id.rpartition("/")[2]), revision=revision or None)
    print(f"pulled: create_detector('local-dir:{folder}')")
    return 0


# -- verify -----------------------------------------------------------------------------------------------------------


def _add_verify(verbs: Any) -> argparse.ArgumentParser:
    verb = verbs.add_parser(
        "verify",
        help="recompute what published weights must give",
        description="Recompute the golden tensors that come with weights, and say which stage departs from them and by "
        "how much. Exit status 1: one does.",
    )
    verb.add_argument("name", metavar="NAME", help="name.tag, hf-hub:ORG/REPO[@REVISION], or local-dir:PATH")
    verb.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu, cuda, cuda:1, ..; default: %(default)s")
    verb.set_defaults(run=run_verify)
    return verb


def run_verify(args: argparse.Namespace) -> int:
    """Compare a detector with its golden tensors; 1 if it departs from them."""
    from dyhead_zoo import create_detector
    from dyhead_zoo.golden import golden_path, read_golden, verify

    _check_device(args.device)
    golden, made_with = read_golden(golden_path(args.name))
    result = verify(create_detector(args.name, pretrained=True).to(args.device), golden)
    print(f"golden tensors of {', '.join(f'{key} {value}' for key, value in sorted(made_with.items()))}")
    print(result.report())
    return 0 if result.passed else 1


# -- shared -----------------------------------------------------------------------------------------------------------


def _add_data_flags(verb: argparse.ArgumentParser, prefix: str, required: bool = True) -> None:
    which = "validation" if prefix else "data set"
    verb.add_argument(
        f"--{prefix}images", type=Path, required=required, metavar="DIR", help=f"{which}: folder of images"
    )
    verb.add_argument(
        f"--{prefix}annotations", type=Path, required=required, metavar="FILE", help=f"{which}: COCO-format JSON file"
    )


def _add_model_flags(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights to use instead of the published ones")
    labels = verb.add_mutually_exclusive_group()
    labels.add_argument("--class-names", type=_names, metavar="A,B,..", help="classes of a checkpoint that names none")
    labels.add_argument("--num-classes", type=positive_int, metavar="N", help="their number, if names do not matter")
    verb.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ..; default: a GPU where there is one")
    verb.add_argument("--fuse", action="store_true", help="fold BatchNorm: faster, the same up to rounding")


def _add_model_args(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--model-args",
        nargs="+",
        action="extend",
        type=_key_value,
        default=[],
        metavar="KEY=VALUE",
        help="arguments of create_detector, such as frozen_stages=1",
    )


def _load_detector(name: str | None, args: argparse.Namespace) -> Detector:
    """The detector that the flags of ``_add_model_flags`` ask for, in eval mode.

    Our own weight files carry their detector's name, arguments and labels, so flags need not repeat them.
    """
    import torch

    from dyhead_zoo import DEFAULT_DETECTOR, create_detector
    from dyhead_zoo.saved import saved_config

    _check_device(args.device)
    classes = {"class_names": args.class_names, "num_classes": args.num_classes}
    saved = saved_config(args.checkpoint) if args.checkpoint else None
    if saved and (name is None or name.partition(".")[0] == saved["name"]):
        detector = create_detector(f"local-dir:{args.checkpoint}", **classes)
    else:
        pretrained = args.checkpoint is None
        detector = create_detector(name or DEFAULT_DETECTOR, pretrained, checkpoint=args.checkpoint, **classes)
    detector = detector.to(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return detector.fuse() if args.fuse else detector


def _check_device(device: str | None) -> None:
    """Raise a ValueError, rather than what torch raises, for a device that is not there."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


def _write(path: Path, text: str) -> None:
    from dyhead_zoo.engine.checkpoint import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


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


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _key_value(text: str) -> tuple[str, Any]:
    """``KEY=VALUE``; the value as Python would read it, else as text."""
    key, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value
