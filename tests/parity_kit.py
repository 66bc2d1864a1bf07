"""Access to mmdetection's reference outputs: a folder named by ``DYHEAD_ZOO_PARITY``.

Without the variable the larger cases are skipped; ``tests/parity`` holds two small ones that always run.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

SMALL = Path(__file__).parent / "parity"


class Case:
    """One model of the kit: its manifest, generated weights and pictures, and the stored outputs."""

    def __init__(self, name: str) -> None:
        folder = Path(os.environ.get("DYHEAD_ZOO_PARITY", SMALL)) / name
        if not folder.is_dir():
            pytest.skip("DYHEAD_ZOO_PARITY is not set: no reference outputs of this model")
        self.manifest = json.loads((folder / "manifest.json").read_text())
        losses = folder / "losses_seed1.json"
        self.losses = json.loads(losses.read_text()) if losses.exists() else {}
        with safe_open(folder / "outputs_seed1.safetensors", "pt") as f:
            self.batches = json.loads((f.metadata() or {}).get("batches", "{}"))
            self.outputs: dict[str, Tensor] = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
        self.generator = _generator(folder.parent)

    def state_dict(self) -> dict[str, Tensor]:
        return self.generator.make_state_dict(self.manifest, 1)

    def value(self, key: str, shape: list[int]) -> Tensor:
        rule = {"shape": shape, "dtype": "float32", "dist": "normal", "a": 0, "b": 1}
        return torch.from_numpy(self.generator.value(1, key, rule))

    def pictures(self, specs: list[dict[str, int]]) -> tuple[Tensor, Tensor]:
        """Generated pictures, padded together: (B, 3, H, W) uint8 and their sizes (B, 2)."""
        divisor = self.manifest["preprocess"]["pad_divisor"]
        canvas = [-(-max(s[side] for s in specs) // divisor) * divisor for side in ("height", "width")]
        images = torch.zeros(len(specs), 3, *canvas, dtype=torch.uint8)
        for slot, spec in zip(images, specs, strict=True):
            picture = torch.from_numpy(self.generator.make_image(spec["seed"], spec["height"], spec["width"]))
            slot[:, : spec["height"], : spec["width"]] = picture
        return images, torch.tensor([[s["height"], s["width"]] for s in specs])


def _generator(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("parity_weights", root / "weights.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_near(actual: Tensor, expected: Tensor, what: str, share: float = 1e-4) -> None:
    """Equal up to ``share`` of the largest expected value."""
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=share * float(expected.abs().max()), msg=lambda m: f"{what}: {m}"
    )


def assert_same_detections(actual: Any, expected: dict[str, Tensor], excused: int = 2) -> None:
    """Detections matched by label and box (not by rank): boxes to 0.02 px, scores to 1e-4."""
    free = set(range(len(actual)))
    unmatched = 0
    for box, score, label in zip(expected["boxes"], expected["scores"], expected["labels"], strict=True):
        hits = [
            i
            for i in free
            if actual.labels[i] == label
            and (actual.boxes[i] - box).abs().max() < 0.02
            and abs(actual.scores[i] - score) < 1e-4
        ]
        if hits:
            free.remove(hits[0])
        else:
            unmatched += 1
    assert unmatched <= excused, f"{unmatched} of {len(expected['labels'])} reference detections have no counterpart"
    assert len(free) <= excused, f"{len(free)} detections have no counterpart in the reference"
