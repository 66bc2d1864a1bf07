"""Detect objects in picture files: annotated copies, and one JSON file with all boxes and masks."""

from __future__ import annotations

import glob
import importlib.util
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from dyhead_zoo.engine.checkpoint import write_text
from dyhead_zoo.engine.draw import draw_detections
from dyhead_zoo.ops.masks import mask_area

if TYPE_CHECKING:
    from dyhead_zoo.detector import Detector
    from dyhead_zoo.structures import Detections

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"})
"""What counts as a picture when a folder is read or a pattern is expanded; a file given by name is always tried."""

PREDICTIONS_FILE = "predictions.json"


@dataclass
class PredictedFiles:
    """What ``predict_files`` did.

    Attributes:
        images: COCO-style ``id, file_name, width, height`` of each picture read, with ``picture``: the annotated copy.
        categories: ``id, name`` of the detector's classes.
        annotations: COCO results records, which are annotations too: ``id, image_id, category_id, bbox (xywh in pixels
            of the file), area, iscrowd, score``, and ``segmentation`` (compressed RLE) if the detector makes masks.
        failed: file to reason, of those that could not be read.
    """

    images: list[dict[str, Any]] = field(default_factory=list)
    categories: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def add(self, image: dict[str, Any], records: Iterable[dict[str, Any]]) -> None:
        """Append one picture and its detections; numbers the records."""
        self.images.append(image)
        for record in records:
            _, _, width, height = record["bbox"]
            area = mask_area(record["segmentation"]) if "segmentation" in record else width * height
            numbered = {"id": len(self.annotations) + 1, **record, "area": area, "iscrowd": 0}
            self.annotations.append(numbered)

    def to_json(self) -> str:
        """A COCO-format data set of the detections; ``failed`` is left out."""
        content = {"images": self.images, "categories": self.categories, "annotations": self.annotations}
        return json.dumps(content, indent=1) + "\n"


def predict_files(
    detector: Detector,
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    score_threshold: float = 0.3,
    batch_size: int = 1,
    draw: bool = True,
    attention: bool = False,
    progress: bool = True,
) -> PredictedFiles:
    """Detect objects in picture files and write the results to a folder.

    ``output`` receives ``predictions.json`` and, for each picture, an annotated JPEG of the same name; a second picture
    of that name gets the suffix ``_2``. Files of an earlier run are overwritten. A file that cannot be read is recorded
    in ``failed`` and the others go on.

    Args:
        detector: used as it is; its train/eval mode is restored.
        inputs: files, folders (their pictures, not those of subfolders) and glob patterns (``**`` enters subfolders).
        output: folder; made if missing.
        score_threshold: detections below are neither written nor drawn.
        batch_size: pictures per step.
        draw: write annotated pictures.
        attention: beside each of them, ``<name>_attention.jpg``: see ``draw_attention``.
        progress: show a progress bar.

    Raises:
        FileNotFoundError: if an input does not exist, or a folder or pattern holds no picture.
        ValueError: if ``output`` is a file, or an annotated picture would overwrite an input.
    """
    from tqdm.auto import tqdm

    from dyhead_zoo.engine.attention import draw_attention

    files = find_images(inputs)
    output = Path(output)
    pictures = _picture_names(files) if draw else {}
    _check_output(output, files, pictures.values())
    output.mkdir(parents=True, exist_ok=True)
    labels = detector.label_space
    result = PredictedFiles(
        categories=[{"id": i, "name": name} for i, name in zip(labels.category_ids, labels.names, strict=True)]
    )
    with tqdm(total=len(files), desc="predict", unit="image", disable=not progress) as bar:
        for start in range(0, len(files), batch_size):
            chunk = files[start : start + batch_size]
            images = _read_images(chunk, result.failed)
            found = detector.predict(list(images.values()), score_threshold=score_threshold, batch_size=batch_size)
            for (path, image), detections in zip(images.items(), found, strict=True):
                picture = pictures.get(path)
                _add(result, path, image, detections, picture, detector)
                if picture is not None:
                    _draw(image, detections, labels.names, output / picture)
                    if attention:
                        seen = draw_attention(detector, image, score_threshold=score_threshold)
                        _save(seen, (output / picture).with_stem(f"{Path(picture).stem}_attention"))
            bar.update(len(chunk))
    write_text(output / PREDICTIONS_FILE, result.to_json())
    return result


def find_images(inputs: str | Path | Iterable[str | Path]) -> list[Path]:
    """Files behind a mixture of files, folders and glob patterns, in the order given, each once.

    Raises:
        FileNotFoundError: naming the input that leads to no picture.
    """
    inputs = [inputs] if isinstance(inputs, str | Path) else inputs
    found: dict[Path, Path] = {}
    for entry in inputs:
        path = Path(entry)
        if path.is_file():
            matches = [path]
        elif path.is_dir():
            matches = _pictures_only(path.iterdir())
        else:
            matches = _pictures_only(Path(name) for name in glob.glob(str(entry), recursive=True))
        if not matches:
            what = "holds no picture" if path.is_dir() else "does not exist, and as a pattern matches no picture"
            raise FileNotFoundError(f"{entry} {what} ({', '.join(sorted(IMAGE_SUFFIXES))})")
        for match in matches:
            found.setdefault(match.resolve(), match)
    if not found:
        raise FileNotFoundError("no input: give picture files, folders or glob patterns")
    return list(found.values())


def sample_photo() -> Path:
    """A photograph to try a detector on without any file at hand: matplotlib's sample, a portrait of Grace Hopper.

    The portrait is by the US Navy, in the public domain.

    Raises:
        FileNotFoundError: if matplotlib, which the extra ``demo`` installs, is not there.
    """
    spec = importlib.util.find_spec("matplotlib")  # found without being imported
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the sample photograph comes with matplotlib, which is not installed: name a picture, or install the extra "
            "with pip install 'dyhead-zoo[demo]'"
        )
    return Path(spec.origin).parent / "mpl-data" / "sample_data" / "grace_hopper.jpg"


def _pictures_only(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES)


def _picture_names(files: Iterable[Path]) -> dict[Path, str]:
    """A name for the annotated copy of each file; unique also where the file system ignores case."""
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in files:
        name, number = f"{path.stem}.jpg", 1
        while name.lower() in taken:
            number += 1
            name = f"{path.stem}_{number}.jpg"
        taken.add(name.lower())
        names[path] = name
    return names


def _check_output(output: Path, files: Iterable[Path], pictures: Iterable[str]) -> None:
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file: give a folder")
    inputs = {path.resolve() for path in files}
    for picture in pictures:
        if (output / picture).resolve() in inputs:
            raise ValueError(f"{output / picture} is an input and would be overwritten: choose another output folder")


def _read_images(paths: Sequence[Path], failed: dict[str, str]) -> dict[Path, Tensor]:
    """Pictures (3, H, W) uint8 by path; those that cannot be read go to ``failed``."""
    from dyhead_zoo.data.images import read_image

    images: dict[Path, Tensor] = {}
    for path in paths:
        try:
            images[path] = read_image(path)
        except (OSError, ValueError) as error:
            failed[str(path)] = str(error)
    return images


def _add(
    result: PredictedFiles, path: Path, image: Tensor, detections: Detections, picture: str | None, detector: Detector
) -> None:
    image_id = len(result.images) + 1
    height, width = image.shape[-2:]
    entry = {"id": image_id, "file_name": str(path), "width": width, "height": height}
    if picture is not None:
        entry["picture"] = picture
    result.add(entry, detections.to_coco(image_id, detector.label_space, (height, width)))


def _draw(image: Tensor, detections: Detections, names: Sequence[str], path: Path) -> None:
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    _save(draw_detections(picture, detections, names), path)


def _save(picture: Image.Image, path: Path) -> None:
    """As JPEG with full chroma resolution: thin coloured lines would fade otherwise."""
    picture.save(path, quality=92, subsampling=0)
