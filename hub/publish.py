"""Publish weights on the Hugging Face Hub, one repository each, as ``<organisation>/<name.tag>``.

    python hub/publish.py                    # a dry run: builds every folder, checks it, says what would be pushed
    python hub/publish.py 'atss_lite0*' --push

Published are the weights in the package, and converted ones whose publisher licenses the weights themselves in terms
that permit it (``license`` and ``license_url`` of the cfg). Each repository gets its card, record, recipe and golden
tensors, and a git tag. What is printed at the end belongs into the cfg: hub id, revision and sha256.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from cards import HUB, card_of, read

from dyhead_zoo import create_detector, get_pretrained_cfg, list_pretrained
from dyhead_zoo.card import LICENCES
from dyhead_zoo.download import sha256_of
from dyhead_zoo.hub import CARD_FILE, PushError, push_to_hub, save_for_hub
from dyhead_zoo.pretrained import BUNDLED, HUB_ORGANISATION, PretrainedCfg
from dyhead_zoo.weight_files import WEIGHTS_FILE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="wildcards of name.tag; default: all that may be published")
    parser.add_argument("--push", action="store_true", help="push; otherwise nothing leaves this machine")
    parser.add_argument("--organisation", default=HUB_ORGANISATION, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="keep the folders here, to look at")
    args = parser.parse_args()
    names = list_pretrained(args.names)
    if not names:
        raise SystemExit(f"no weights match {' '.join(args.names)}: dyhead-zoo list --pretrained shows all")
    failed = False
    for name in names:
        if reason := refusal(get_pretrained_cfg(name)):
            if args.names:  # who asks for all means all that may be published
                print(f"{name}: not published: {reason}")
            continue
        with tempfile.TemporaryDirectory() as temporary:
            folder = (args.output or Path(temporary)) / name
            build(name, folder, f"{args.organisation}/{name}")
            try:
                publish(name, folder, f"{args.organisation}/{name}", args.push)
            except PushError as error:
                failed = True
                print(f"{name}: {error}")
    if failed:
        raise SystemExit(1)


def refusal(cfg: PretrainedCfg) -> str | None:
    """Why weights may not be published again; None if they may."""
    if cfg.license not in LICENCES:
        return f"licence {cfg.license!r} is none of {', '.join(LICENCES)}"
    if cfg.status != "bundled" and not cfg.license_url:
        return (
            f"{cfg.license} is the licence of {cfg.origin_url or 'their source'}; for the weights themselves none is "
            "known (license_url of the cfg)"
        )
    return None


def build(name: str, folder: Path, repo_id: str) -> Path:
    """The folder of one repository; bundled weights go into it as they are, byte by byte."""
    cfg = get_pretrained_cfg(name)
    detector = create_detector(name, pretrained=True)
    record, recipe = read(name, "eval.json"), read(name, "recipe.json")
    save_for_hub(detector, folder, card=card_of(name, repo_id.partition("/")[0]), record=record)
    if cfg.file:
        shutil.copyfile(BUNDLED / cfg.file, folder / WEIGHTS_FILE)
    if recipe is not None:
        shutil.copyfile(HUB / name / "recipe.json", folder / "recipe.json")
    if cfg.license == "apache-2.0":
        shutil.copyfile(HUB.parent / "LICENSE", folder / "LICENSE")
    check(cfg, record, folder)
    return folder


def check(cfg: PretrainedCfg, record: dict[str, Any] | None, folder: Path) -> None:
    """Refuse to publish weights other than those that the cfg names and the record is about."""
    found = sha256_of(folder / WEIGHTS_FILE)
    for where, wanted in (("cfg", cfg.sha256), ("record", (record or {}).get("weights_sha256"))):
        if cfg.file and wanted not in (None, found):
            raise SystemExit(f"{folder.name}: the file's sha256 is {found}, that of the {where} {wanted}")
    create_detector(f"local-dir:{folder}")


def publish(name: str, folder: Path, repo_id: str, push: bool) -> None:
    """Push one folder, or say what would be pushed."""
    revision = get_pretrained_cfg(name).hf_hub_revision or "v1"
    if push:
        card = (folder / CARD_FILE).read_text()
        commit = push_to_hub(folder, repo_id, card=card, tag=revision, commit_message=f"{name} {revision}")
        print(f"{name}: pushed, commit {commit}")
    else:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        listed = ", ".join(f"{path.relative_to(folder)} ({path.stat().st_size:,})" for path in files)
        print(f"{name}: would be pushed (--push): {listed}")
    print(f'    hf_hub_id="{repo_id}",\n    hf_hub_revision="{revision}",')
    print(f'    sha256="{sha256_of(folder / WEIGHTS_FILE)}",')


if __name__ == "__main__":
    main()
