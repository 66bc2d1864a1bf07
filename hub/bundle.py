"""Put a trained detector into the package, or measure again one that is in it.

    python hub/bundle.py atss_lite0_dyhead2.coco2148 --checkpoint runs/mine/last.safetensors \
        --images val --annotations val.json --data "COCO 2148/500 subset, 384 px"

Run it from the root of the checkout. It writes ``dyhead_zoo/bundled/<name.tag>.safetensors`` (half precision) and
``.json`` (hash, place on the Hub and figures, which the package reads), and ``hub/<name.tag>/``: the record of the
evaluation, the recipe and the training log. Figures are those of the file that ships. Without ``--checkpoint`` the file
stays, and it is measured again. Then give the tag a line in the cfgs of its family, with
``**bundled_record("<name.tag>")``, and run ``hub/cards.py``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from dyhead_zoo import create_detector, evaluate
from dyhead_zoo.download import sha256_of
from dyhead_zoo.engine.record import evaluation_record, record_to_json
from dyhead_zoo.golden import GOLDEN_FILE, write_golden
from dyhead_zoo.pretrained import BUNDLED, HUB_ORGANISATION
from dyhead_zoo.weight_files import read_state_dict, write_safetensors

HUB = Path(__file__).parent
LIMIT = 15_000_000  # bytes, of a file in the package


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name.tag")
    parser.add_argument("--checkpoint", type=Path, help="best.safetensors or last.safetensors of a run")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--data", required=True, help="data set that the figures are measured on, in words")
    parser.add_argument("--split", default="val", help="its part")
    parser.add_argument("--note", action="append", default=[], help="sentence for the recipe; may be repeated")
    args = parser.parse_args()

    (HUB / args.name).mkdir(exist_ok=True)
    if args.checkpoint:
        bundle(args.checkpoint, args.name)
        copy_run(args.checkpoint.parent, HUB / args.name, args.note)
    measure(args.name, args.images, args.annotations, args.data, args.split)


def bundle(checkpoint: Path, name: str) -> None:
    """Weights of a run in half precision, into the package."""
    tensors, metadata = read_state_dict(checkpoint)
    config = json.loads(metadata["config"])
    if config["name"] != name.partition(".")[0]:
        raise SystemExit(f"{checkpoint} is a {config['name']}, not {name}")
    half = {key: value.half() if value.is_floating_point() else value for key, value in tensors.items()}
    path = BUNDLED / f"{name}.safetensors"
    write_safetensors(path, half, {key: metadata[key] for key in ("name", "config", "label_space")})
    if path.stat().st_size > LIMIT:
        raise SystemExit(f"{path} has {path.stat().st_size} bytes, more than {LIMIT}")


def copy_run(run: Path, folder: Path, notes: list[str]) -> None:
    """The recipe and the log of a run, for the record."""
    described = json.loads((run / "run.json").read_text())
    recipe = {"notes": notes, "config": described["config"], "detector": described["detector"]}
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n")
    shutil.copy(run / "log.jsonl", folder / "log.jsonl")


def measure(name: str, images: Path, annotations: Path, data: str, split: str) -> None:
    """Evaluate a bundled file, and write its record and what the package says of it."""
    weights = BUNDLED / f"{name}.safetensors"
    detector = create_detector(f"local-dir:{weights}")
    result = evaluate(detector, images=images, annotations=annotations)
    record = evaluation_record(detector, result, annotations=annotations, dataset=data, split=split)
    record = {**record, "detector": name, "weights_sha256": sha256_of(weights)}
    (HUB / name / "eval.json").write_text(record_to_json(record))
    write_golden(detector, BUNDLED, f"{name}.{GOLDEN_FILE}")
    (BUNDLED / f"{name}.json").write_text(json.dumps(bundled_record(name, record), indent=1) + "\n")
    print(result.summary())


def bundled_record(name: str, record: dict[str, Any]) -> dict[str, Any]:
    """What the package says of bundled weights, from the record of their evaluation."""
    people = [row for row in record["per_class"] if row["name"] == "person"]
    figures = {**record["metrics"], **{f"person {key}": row[key] for row in people for key in ("AP", "AP50")}}
    data, ran = record["dataset"], record["environment"]
    return {
        "file": f"{name}.safetensors",
        "sha256": record["weights_sha256"],
        "hf_hub_id": f"{HUB_ORGANISATION}/{name}",
        "hf_hub_revision": _revision(name, record["weights_sha256"]),
        "measured": {key: round(value, 4) for key, value in figures.items() if value is not None},
        "measured_on": f"{data['name']}, {data['split']}; torch {ran['torch']}, {ran['device']}, float32",
    }


def _revision(name: str, sha256: str) -> str:
    """The git tag of these weights on the Hub: v1, and the next number whenever the weights change."""
    path = BUNDLED / f"{name}.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    number = int(old.get("hf_hub_revision", "v1").removeprefix("v"))
    return f"v{number + (old.get('sha256', sha256) != sha256)}"


if __name__ == "__main__":
    main()
