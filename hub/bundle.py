"""Put a trained detector into the package: weights in half precision, and a record of what they measure.

    python hub/bundle.py runs/mine/best.safetensors atss_lite0_dyhead2.coco2148 \
        --images val --annotations val.json --data "COCO 2148/500 subset, 384 px, val"

Run it from the root of the checkout.

Writes ``dyhead_zoo/bundled/<name.tag>.safetensors`` and ``.json`` (hash and figures, which the package reads), and
``hub/<name.tag>/`` with the full evaluation, the recipe and the training log. Figures are those of the file that ships.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
from pathlib import Path

import torch

from dyhead_zoo import create_detector, evaluate
from dyhead_zoo.pretrained import BUNDLED
from dyhead_zoo.weights import read_state_dict, sha256_of, write_safetensors

LIMIT = 15_000_000  # bytes, of a file in the package


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="best.safetensors or last.safetensors of a run")
    parser.add_argument("name", help="name.tag")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--data", required=True, help="what the figures are measured on, in words")
    args = parser.parse_args()

    tensors, metadata = read_state_dict(args.checkpoint)
    config = json.loads(metadata["config"])
    if config["name"] != args.name.partition(".")[0]:
        raise SystemExit(f"{args.checkpoint} is a {config['name']}, not {args.name}")
    half = {key: value.half() if value.is_floating_point() else value for key, value in tensors.items()}
    weights = BUNDLED / f"{args.name}.safetensors"
    write_safetensors(weights, half, {key: metadata[key] for key in ("name", "config", "label_space")})
    if weights.stat().st_size > LIMIT:
        raise SystemExit(f"{weights} has {weights.stat().st_size} bytes, more than {LIMIT}")

    result = evaluate(
        create_detector(f"local-dir:{weights}"), images=args.images, annotations=args.annotations, progress=False
    )
    person = next((row for row in result.per_class if row["name"] == "person"), {})
    figures = {**result.metrics, **{f"person {key}": person[key] for key in ("AP", "AP50") if key in person}}
    record = {
        "file": weights.name,
        "sha256": sha256_of(weights),
        "measured": {key: round(value, 4) for key, value in figures.items()},
        "measured_on": f"{args.data}; torch {torch.__version__}, {platform.machine()} CPU, float32",
    }
    (BUNDLED / f"{args.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    folder = Path(__file__).parent / args.name
    folder.mkdir(exist_ok=True)
    (folder / "eval.json").write_text(result.to_json())
    run = args.checkpoint.parent
    recipe = json.loads((run / "run.json").read_text())
    (folder / "recipe.json").write_text(
        json.dumps({key: recipe[key] for key in ("config", "detector")}, indent=1) + "\n"
    )
    shutil.copy(run / "log.jsonl", folder / "log.jsonl")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
