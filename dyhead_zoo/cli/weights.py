"""``dyhead-zoo import``, ``push``, ``pull`` and ``verify``: weights from elsewhere, and from and to the Hub."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dyhead_zoo.cli.shared import add_model_args, check_device, comma_separated


def _add_import(verbs: Any) -> argparse.ArgumentParser:
    verb = verbs.add_parser(
        "import",
        help="convert a checkpoint of mmdetection, detectron2, torchvision or DETR's authors",
        description="Convert a detector that was trained with another library into a saved detector. Family, backbone "
        "and number of classes are told by its keys; the rest is said, and decided by --as or --model-args.",
    )
    verb.add_argument("path", type=Path, metavar="PATH", help=".pth, .pt, .bin, .pkl or .safetensors")
    verb.add_argument("--as", dest="name", metavar="NAME", help="what it is: a family, a detector, or name.tag")
    verb.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the saved detector")
    verb.add_argument(
        "--class-names", type=comma_separated, metavar="A,B,..", help="default: those that the file names"
    )
    verb.add_argument("--license", metavar="ID", help="of the weights, such as apache-2.0")
    add_model_args(verb)
    verb.set_defaults(run=run_import)
    return verb


def run_import(args: argparse.Namespace) -> int:
    """Convert a checkpoint, and say how its nature was told."""
    from dyhead_zoo import save_for_hub
    from dyhead_zoo.convert.guess import import_checkpoint

    arch = dict(args.model_args)
    detector, guess = import_checkpoint(args.path, args.name, class_names=args.class_names, arch=arch)
    print(guess.summary())
    folder = save_for_hub(detector, args.output, license=args.license)
    print(f"saved: create_detector('local-dir:{folder}')")
    return 0


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

    check_device(args.device)
    golden, made_with = read_golden(golden_path(args.name))
    result = verify(create_detector(args.name, pretrained=True).to(args.device), golden)
    print(f"golden tensors of {', '.join(f'{key} {value}' for key, value in sorted(made_with.items()))}")
    print(result.report())
    return 0 if result.passed else 1


VERBS = (_add_import, _add_push, _add_pull, _add_verify)
