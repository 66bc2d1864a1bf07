"""How far the figures of COCOeval depend on which images happen to be in the data set.

A percentile bootstrap over images: draw as many images as there are, with replacement, compute AP of the draw, repeat,
and report the middle 95 % (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13). Matching
detections to objects happens within one image and does not depend on the others, so it is done once; a draw only
weights each image by how often it was drawn.
A detection of an image drawn twice is the same as two detections of equal score, so the weighted curve is COCOeval's
curve of the data set with that image twice (but for detections of one image and class with exactly equal scores, whose
copies COCOeval would take in turns).

A draw repeats images, and AP of repeated images is a little higher on average (the best precision "at this recall or a
higher one" profits from chance), so the intervals lie somewhat high; they are not corrected for that.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dyhead_zoo.engine.evaluate import Backend, Overlap, match_images

LEVEL = 0.95
"""Share of the draws that lie within an interval."""

_RECALLS = np.linspace(0.0, 1.0, 101)  # COCOeval's recThrs
_EPSILON = np.spacing(1)  # COCOeval's, against 0 / 0
_CHUNK = 100  # draws at a time, which bounds the memory


class ClassMatches(NamedTuple):
    """What one class contributes, over all images; D detections, best score first, and T IoU thresholds.

    Attributes:
        objects: (images,) objects to be found in each image, crowd regions left out.
        image: (D,) index of each detection's image.
        hit: (T, D) whether it found an object.
        ignored: (T, D) whether it neither helps nor harms, as it lies on a crowd region.
    """

    objects: NDArray[np.int64]
    image: NDArray[np.int64]
    hit: NDArray[np.bool_]
    ignored: NDArray[np.bool_]


def bootstrap_intervals(
    annotations: str | Path | Mapping[str, Any],
    predictions: Sequence[Mapping[str, Any]],
    *,
    image_ids: Collection[int] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    backend: Backend = "auto",
    overlap: Overlap = "bbox",
) -> dict[str, list[float]]:
    """Confidence intervals of AP and AP50 for any COCO results records.

    Args:
        annotations: COCO-format file or its content.
        predictions: ``image_id, category_id, bbox (xywh), score`` each, or ``segmentation`` instead of ``bbox``.
        image_ids: use these images only; None for all of the file.
        resamples: draws.
        seed: of the draws; the same seed gives the same intervals.
        backend: see ``evaluate``.
        overlap: of boxes (``"bbox"``) or masks (``"segm"``).

    Returns:
        ``AP`` and ``AP50`` to ``[low, high]`` in 0..1, the 2.5th and 97.5th percentile of the draws; NaN where
        there is no object.

    Raises:
        ValueError: for less than one draw, a file that is not in COCO format, or predictions on images that it does not
            list.
    """
    if resamples < 1:
        raise ValueError(f"resamples={resamples}: draw at least once, better a thousand times")
    matches = match_images(annotations, predictions, image_ids=image_ids, backend=backend, overlap=overlap)
    classes, count = class_matches(matches)
    generator = np.random.default_rng(seed)
    draws = []
    for start in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - start)
        draws.append(average_precision(classes, generator.multinomial(count, [1 / count] * count, size=size)))
    drawn = np.concatenate(draws)
    drawn = drawn[~np.isnan(drawn[:, 0])]  # draws without any object
    if not len(drawn):
        return {"AP": [math.nan, math.nan], "AP50": [math.nan, math.nan]}
    tails = [50 * (1 - LEVEL), 50 * (1 + LEVEL)]
    figures = {"AP": drawn.mean(axis=1), "AP50": drawn[:, 0]}
    return {name: [float(v) for v in np.percentile(values, tails)] for name, values in figures.items()}


def class_matches(matches: tuple[list[dict[str, Any]], list[int]]) -> tuple[list[ClassMatches], int]:
    """COCOeval's matches per image and class, gathered by class.

    Args:
        matches: of ``match_images``.

    Returns:
        One entry per class that has objects or detections, and the number of images.
    """
    entries, image_ids = matches
    index = {image_id: i for i, image_id in enumerate(image_ids)}
    by_class: dict[int, list[dict[str, Any]]] = {}
    for entry in sorted(entries, key=lambda entry: index[entry["image_id"]]):
        by_class.setdefault(entry["category_id"], []).append(entry)
    return [_gather(by_class[category], index) for category in sorted(by_class)], len(image_ids)


def _gather(entries: list[dict[str, Any]], index: Mapping[int, int]) -> ClassMatches:
    objects = np.zeros(len(index), np.int64)
    for entry in entries:
        objects[index[entry["image_id"]]] = np.logical_not(entry["gtIgnore"]).sum()
    scores = np.concatenate([np.asarray(entry["dtScores"], float) for entry in entries])
    image = np.concatenate([np.full(len(entry["dtScores"]), index[entry["image_id"]]) for entry in entries])
    matched = np.concatenate([np.asarray(entry["dtMatches"]) != 0 for entry in entries], axis=1)
    ignored = np.concatenate([np.asarray(entry["dtIgnore"], bool) for entry in entries], axis=1)
    best_first = np.argsort(-scores, kind="mergesort")  # stable, as in COCOeval: ties stay in the order of the images
    return ClassMatches(objects, image[best_first], (matched & ~ignored)[:, best_first], ignored[:, best_first])


def average_precision(classes: Sequence[ClassMatches], weights: NDArray[np.int64]) -> NDArray[np.float64]:
    """AP at each IoU threshold, for several draws of the images.

    Args:
        classes: of ``class_matches``.
        weights: (draws, images), how often each image was drawn.

    Returns:
        (draws, T), the mean over the classes that have objects in the draw; NaN if none has.
    """
    thresholds = len(classes[0].hit) if classes else 1
    total = np.zeros((len(weights), thresholds))
    present = np.zeros((len(weights), 1), np.int64)
    for of_class in classes:
        objects = weights @ of_class.objects
        present[:, 0] += objects > 0
        total += _class_average_precision(of_class, weights, np.maximum(objects, 1)) * (objects > 0)[:, None]
    return np.divide(total, present, out=np.full_like(total, np.nan), where=present > 0)


def _class_average_precision(
    of_class: ClassMatches, weights: NDArray[np.int64], objects: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(draws, T): the mean, over 101 recalls, of the best precision at that recall or a higher one.

    Precision can be best only where an object is found, so the curve is computed there alone.
    """
    drawn = np.ascontiguousarray(weights.T, np.int32)[of_class.image]  # (D, draws): running sums along the first axis
    seen = np.cumsum(drawn, axis=0, dtype=np.int32)
    result = np.zeros((len(weights), len(of_class.hit)))
    for t, (hit, ignored) in enumerate(zip(of_class.hit, of_class.ignored, strict=True)):
        at = np.flatnonzero(hit)
        if not len(at):
            continue
        found = np.cumsum(drawn[at], axis=0, dtype=np.int32)
        precision = found / (seen[at] - _running(drawn, np.flatnonzero(ignored), at) + _EPSILON)
        envelope = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        reached = np.searchsorted(_RECALLS, found / objects, side="right")
        result[:, t] = (np.diff(reached, axis=0, prepend=0) * envelope).sum(axis=0) / len(_RECALLS)
    return result


def _running(drawn: NDArray[np.int32], rows: NDArray[np.int64], at: NDArray[np.int64]) -> NDArray[np.int32]:
    """(len(at), draws): sums of some rows of ``drawn``, up to each place of ``at``."""
    sums = np.zeros((len(rows) + 1, drawn.shape[1]), np.int32)
    np.cumsum(drawn[rows], axis=0, out=sums[1:])
    return sums[np.searchsorted(rows, at)]
