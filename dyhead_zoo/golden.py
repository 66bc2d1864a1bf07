"""Golden tensors: a small input, and what a detector makes of it at every stage.

A file of them lies beside published weights. ``verify`` recomputes it and says which stage departs first and by how
much: whether the weights, the code and the machine agree with those of the publisher. Of each tensor the file holds the
shape, three statistics and a sample, so that it stays below 200 kB.
"""

from __future__ import annotations

import copy
import math
import platform
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torchvision
from torch import Tensor
from torchvision.ops import box_iou

from dyhead_zoo.detector import Detector, eval_mode
from dyhead_zoo.download import hub_file
from dyhead_zoo.layers.backbone import Backbone
from dyhead_zoo.pretrained import BUNDLED
from dyhead_zoo.registry import get_pretrained_cfg
from dyhead_zoo.structures import Detections
from dyhead_zoo.version import __version__
from dyhead_zoo.weight_files import INDEX_FILE, WEIGHTS_FILE
from dyhead_zoo.weights import CheckpointError, read_state_dict, write_safetensors

GOLDEN_FILE = "golden.safetensors"
"""Name of the file in a folder or repository; that of bundled weights is ``<name.tag>.golden.safetensors``."""

STAGES = ("backbone", "pyramid", "raw", "detections")
"""In the order of computation: the first that departs is where the cause lies."""

TOLERANCE = 1e-3
"""Of a tensor's largest value: float32 on other processors stays well below it, other weights do not."""
MIN_IOU, MAX_SCORE_CHANGE = 0.95, 0.01
"""Two detections of one label that overlap so much, with scores so close, are the same."""
MAX_MASK_CHANGE = 0.05
"""Mean difference of the probabilities of two such detections' masks, up to which they are the same too."""
MAX_UNMATCHED = 0.05
"""Share of detections without a counterpart that rounding may cause, where one is near a threshold."""

_BESIDE = ".golden.safetensors"
_SIZE = (96, 128)  # pixels of the canvas, before it is rounded up to the divisor
_SAMPLES, _MASK_SAMPLES = 512, 64  # of a tensor; of the mask of one detection
_STEP = 1_000_003  # a prime, so that the sample meets all rows, columns and channels
_PARTS = ("shape", "stats", "sample")
_DETECTION_PARTS = ("boxes", "scores", "labels")  # and "masks", of detectors that make them
_REGIONS = ((0.0, 0.0, 1.0, 1.0), (0.1, 0.1, 0.6, 0.5), (0.4, 0.3, 0.9, 0.95), (0.05, 0.5, 0.3, 0.8))  # of the picture


@dataclass(frozen=True)
class Deviation:
    """How far one tensor, or the detections of one picture, are from the golden ones.

    Attributes:
        name: such as ``pyramid.2`` or ``raw.cls_logits.0``; begins with the stage.
        absolute: largest difference; of matched detections, in pixels.
        relative: ``absolute`` by the largest golden value; of detections, the share without a counterpart.
        note: the deviation in words, for where it is too large.
    """

    name: str
    absolute: float
    relative: float
    note: str

    @property
    def stage(self) -> str:
        """One of ``STAGES``."""
        return self.name.partition(".")[0]

    @property
    def passed(self) -> bool:
        """Whether ``relative`` is within ``TOLERANCE`` or, of detections, ``MAX_UNMATCHED``."""
        return self.relative <= (MAX_UNMATCHED if self.stage == "detections" else TOLERANCE)


@dataclass(frozen=True)
class Verification:
    """Outcome of ``verify``: a deviation for each tensor."""

    deviations: tuple[Deviation, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing departs."""
        return self.departs is None

    @property
    def departs(self) -> Deviation | None:
        """Where the detector departs from the golden tensors: the worst tensor of the first stage that does."""
        failed = [d for d in self.deviations if not d.passed]
        return min(failed, key=lambda d: (STAGES.index(d.stage), -d.relative), default=None)

    def report(self) -> str:
        """A line for each stage, its worst tensor named, and the verdict."""
        lines = [f"{'stage':<12}{'tensors':>7}  {'largest deviation':>17}  {'of its scale':>12}"]
        for stage in STAGES:
            members = [d for d in self.deviations if d.stage == stage]
            worst = max(members, key=lambda d: d.relative)
            figures = f"{len(members):>7}  {worst.absolute:>17.2e}  {worst.relative:>12.2e}"
            lines.append(f"{stage:<12}{figures}  {'ok' if worst.passed else 'DEPARTS':<7}  {worst.name}")
        first = self.departs
        verdict = f"departs at {first.name}: {first.note}" if first else "agrees with the golden tensors"
        return "\n".join([*lines, verdict])


def make_golden(detector: Detector) -> dict[str, Tensor]:
    """The input and what the detector makes of it.

    Returns:
        ``input.images`` (2, C, H, W) uint8 and ``input.image_sizes`` (2, 2); for every level of the backbone and of the
        pyramid and every tensor of the raw output ``<name>.shape``, ``<name>.stats`` (mean, standard deviation, largest
        absolute value) and ``<name>.sample``; ``detections.<picture>.boxes``, ``.scores``, ``.labels`` and, of
        detectors that make masks, ``.masks`` (N, 64), some cells of each. Of two-stage detectors the raw output goes on
        with what they say of a few fixed regions, ``raw.regions``, since weak weights may detect nothing in these
        pictures. All on the CPU.

    Raises:
        ValueError: if an output is not a number.
    """
    images, image_sizes = _pictures(detector)
    golden = {"input.images": images, "input.image_sizes": image_sizes, **_observe(detector, images, image_sizes)}
    if broken := [key for key, value in golden.items() if value.isnan().any()]:
        raise ValueError(f"{detector.name} gives NaN in {broken[0]}: there is nothing to verify against")
    return golden


def write_golden(detector: Detector, folder: str | Path, file_name: str = GOLDEN_FILE) -> Path:
    """Write the golden tensors of a detector to ``folder``, with the versions and the hardware that made them.

    Returns:
        The path of the file.
    """
    path = Path(folder) / file_name
    device = torch.cuda.get_device_name(detector.device) if detector.device.type == "cuda" else detector.device.type
    versions = {"dyhead_zoo": __version__, "torch": torch.__version__}
    versions |= {"torchvision": torchvision.__version__, "timm": timm.__version__}
    made = {"name": detector.name, "dtype": "float32", "hardware": f"{platform.machine()} {device}"}
    write_safetensors(path, make_golden(detector), made | versions)
    return path


def read_golden(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a file that ``write_golden`` wrote.

    Raises:
        FileNotFoundError: if there is none.
        CheckpointError: if it is damaged or holds something else.
    """
    try:
        golden, made_with = read_state_dict(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no golden tensors at {path}: save_for_hub and push write them") from error
    try:
        _check(golden)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return golden, made_with


def golden_path(name: str) -> Path:
    """The golden tensors of published or saved weights; fetched, if need be.

    Args:
        name: as for ``create_detector``: a name with or without a tag, ``hf-hub:org/repo[@revision]``, or
            ``local-dir:`` with a folder or a weight file.

    Raises:
        ValueError: if nobody publishes any for this name.
        FileNotFoundError: for a folder or weight file that does not exist.
        DownloadError: if they cannot be had.
    """
    scheme, _, rest = name.partition(":")
    if scheme == "local-dir":
        return _beside(Path(rest))
    if scheme == "hf-hub":
        repo_id, _, revision = rest.partition("@")
        return hub_file(repo_id, GOLDEN_FILE, revision=revision or None)
    cfg = get_pretrained_cfg(name)
    if cfg.file:
        return BUNDLED / Path(cfg.file).with_suffix(_BESIDE)
    if cfg.hf_hub_id:
        return hub_file(cfg.hf_hub_id, GOLDEN_FILE, revision=cfg.hf_hub_revision)
    raise ValueError(
        f"{name} has no golden tensors: only bundled weights, repositories and saved folders come with them"
    )


def _beside(path: Path) -> Path:
    """Where the golden tensors of a saved folder or a weight file lie."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: expected a saved folder or a weight file")
    if path.is_dir():
        return path / GOLDEN_FILE
    return path.with_name(GOLDEN_FILE) if path.name in (WEIGHTS_FILE, INDEX_FILE) else path.with_suffix(_BESIDE)


def verify(detector: Detector, golden: Mapping[str, Tensor]) -> Verification:
    """Recompute golden tensors, on the detector's device and in float32, and compare.

    Args:
        detector: the one to test.
        golden: from ``make_golden`` or ``read_golden``.

    Raises:
        ValueError: if ``golden`` is incomplete.
    """
    _check(golden)
    actual = _observe(detector, golden["input.images"], golden["input.image_sizes"])
    names = dict.fromkeys(key.rpartition(".")[0] for key in (*actual, *golden) if not key.startswith("input."))
    return Verification(tuple(_compare(name, golden, actual) for name in names))


def _check(golden: Mapping[str, Tensor]) -> None:
    """Raise a ValueError unless these are complete golden tensors."""
    names = {key.rpartition(".")[0] for key in golden}
    stages = {name.partition(".")[0] for name in names}
    wanted = {f"{name}.{part}" for name in names for part in _parts(name)}
    if absent := sorted({"input", *STAGES} ^ stages) or sorted(wanted - set(golden)):
        raise ValueError(f"no golden tensors, or incomplete ones (see {absent[0]!r}): make them by write_golden")


def _parts(name: str) -> tuple[str, ...]:
    stage = name.partition(".")[0]
    return {"input": ("images", "image_sizes"), "detections": _DETECTION_PARTS}.get(stage, _PARTS)


# -- computing --------------------------------------------------------------------------------------------------------


def _pictures(detector: Detector) -> tuple[Tensor, Tensor]:
    """Two pictures of different size on one canvas, by integer arithmetic, which is the same everywhere."""
    divisor = detector.pretrained_cfg.pad_divisor
    limit = cast(Backbone, detector.backbone).image_size or (math.inf, math.inf)
    height, width = (int(min(math.ceil(a / divisor) * divisor, b)) for a, b in zip(_SIZE, limit, strict=True))
    y, x = torch.arange(height)[:, None], torch.arange(width)[None]
    disc = (x - width // 3) ** 2 + (y - height // 3) ** 2 < (height // 5) ** 2
    block = (x > width // 2) & (x < 7 * width // 8) & (y > height // 2) & (y < 7 * height // 8)
    channels = []
    for channel in range(detector.in_chans):
        ground = 40 + 120 * y // height + (x * 37 + y * 101 + x * y * (channel + 3)) % 29
        ground = torch.where(disc, 220 - 60 * channel % 200, ground)
        channels.append(torch.where(block, 70 * channel % 200 + 24 * ((x // 4 + y // 4) % 2), ground))
    first = torch.stack(channels).to(torch.uint8)
    second = first.flip(-1)
    size = (3 * height // 4, 5 * width // 8)
    second[:, size[0] :] = 0
    second[:, :, size[1] :] = 0
    return torch.stack([first, second]), torch.tensor([(height, width), size])


@torch.no_grad()
def _observe(detector: Detector, images: Tensor, image_sizes: Tensor) -> dict[str, Tensor]:
    """What every stage gives for these images, in the layout of ``make_golden`` and the order of computation."""
    if detector.mean.dtype != torch.float32:  # files of half precision are run in float32 by those who load them
        detector = copy.deepcopy(detector).float()
    device = detector.device
    images, image_sizes = images.to(device), image_sizes.to(device)
    with eval_mode(detector), torch.autocast(device.type, enabled=False), _without_tf32(device):
        features = detector.backbone(detector.normalise(images, image_sizes))
        pyramid = detector.neck(features)
        raw = detector(images, image_sizes)
        regions = _look_at_regions(detector, raw)
        found = detector.decode(raw)
    seen: dict[str, Tensor] = {}
    outputs = (*zip(STAGES, (features, pyramid, raw), strict=False), ("raw.regions", regions))
    for stage, output in outputs:
        for name, tensor in _leaves(stage, output):
            seen |= {f"{name}.{part}": x for part, x in zip(_PARTS, _summarise(tensor.cpu()), strict=True)}
    for i, detections in enumerate(found):
        seen |= {f"detections.{i}.{part}": getattr(detections, part).cpu() for part in _DETECTION_PARTS}
        if detections.masks is not None:
            seen[f"detections.{i}.masks"] = _sample_masks(detections.masks.cpu())
    return seen


def _look_at_regions(detector: Detector, raw: Any) -> tuple[Any, ...]:
    """What a two-stage detector says of fixed regions of each picture, and the masks it draws there; () for others."""
    head: Any = detector.head
    if not hasattr(head, "roi_forward"):
        return ()
    sides = raw.image_sizes.flip(1).repeat(1, 2)  # width, height, width, height
    boxes = [torch.tensor(_REGIONS, device=sides.device) * size for size in sides]
    stages = head.roi_forward(raw.features, boxes, raw.image_sizes)
    if not detector.wants_masks:
        return (stages,)
    labels = torch.arange(len(boxes) * len(_REGIONS), device=sides.device) % len(detector.label_space)
    return stages, head.mask_logits(raw.features, boxes, labels)


def _sample_masks(masks: Tensor) -> Tensor:
    """The same cells of each of (N, M, M) masks, spread over it: (N, at most 64)."""
    cells = masks.flatten(1).float()
    return cells[:, torch.arange(min(_MASK_SAMPLES, cells.shape[1])) * _STEP % max(cells.shape[1], 1)]


def _without_tf32(device: torch.device) -> AbstractContextManager[None]:
    """GPUs shorten the mantissas of convolutions by default; here every digit counts."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if device.type == "cuda" else nullcontext()


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of nested named tuples, tuples and lists, with its path; numbers become tensors, None is skipped."""
    if isinstance(value, (Tensor, int, float)):
        yield name, torch.as_tensor(value)
    elif isinstance(value, (tuple, list)):
        for key, item in zip(getattr(value, "_fields", range(len(value))), value, strict=True):
            yield from _leaves(f"{name}.{key}", item)
    elif value is not None:
        raise ValueError(f"{name} is of {type(value).__name__}: outputs are tensors, numbers, or tuples of such")


def _summarise(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shape; mean, standard deviation and largest absolute value of what is finite; a sample spread over the tensor."""
    values = tensor.double().flatten()
    finite = values[~values.isinf()]  # scores masked by -inf are legitimate
    stats = torch.zeros(3, dtype=torch.float64)
    if len(finite):
        stats = torch.stack([finite.mean(), finite.std(correction=0), finite.abs().max()])
    rows = torch.arange(len(values))
    if len(rows) > _SAMPLES:
        rows = rows[:_SAMPLES] * _STEP % len(rows)
    return torch.tensor(tensor.shape, dtype=torch.int64), stats.float(), values[rows].float()


# -- comparing --------------------------------------------------------------------------------------------------------


def _compare(name: str, golden: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> Deviation:
    """One tensor, or the detections of one picture."""
    first = f"{name}.{_parts(name)[0]}"
    if first not in golden or first not in actual:
        return Deviation(name, math.inf, math.inf, f"is missing from {_where_missing(first not in golden)}")
    if name.startswith("detections."):
        return _compare_detections(name, _detections(name, golden), _detections(name, actual))
    wanted, found = ([side[f"{name}.{part}"] for part in _PARTS] for side in (golden, actual))
    if not torch.equal(wanted[0], found[0]):
        note = f"its shape is {found[0].tolist()}, that of the golden tensor {wanted[0].tolist()}"
        return Deviation(name, math.inf, math.inf, note)
    a, b = torch.cat(wanted[1:]), torch.cat(found[1:])
    difference = torch.where(a == b, 0.0, (a - b).abs())  # inf - inf is no difference
    absolute = float(difference.nan_to_num(nan=math.inf).max())
    relative = absolute / max(float(wanted[1][2]), 1e-6)
    note = f"deviates by {relative:.1e} of its scale, more than {TOLERANCE:.0e}"
    return Deviation(name, absolute, relative, note)


def _where_missing(in_golden: bool) -> str:
    if not in_golden:
        return "what the detector gives"
    return (  # unverified is not verified, so nothing is skipped
        "the golden tensors, as from files of older versions: if the weights are known to be right, make new ones by "
        "dyhead_zoo.golden.write_golden(detector, FOLDER)"
    )


def _detections(name: str, side: Mapping[str, Tensor]) -> Detections:
    boxes, scores, labels = (side[f"{name}.{part}"] for part in _DETECTION_PARTS)
    return Detections(boxes, scores, labels, side.get(f"{name}.masks"))


def _compare_detections(name: str, wanted: Detections, found: Detections) -> Deviation:
    """Match by label, score, overlap and mask, since rounding may change the order; masks are samples (N, cells)."""
    if (wanted.masks is None) != (found.masks is None):
        missing = _where_missing(wanted.masks is None)
        return Deviation(name, math.inf, math.inf, f"its masks are missing from {missing}")
    overlap = box_iou(wanted.boxes, found.boxes)
    overlap[wanted.labels[:, None] != found.labels] = 0
    overlap[(wanted.scores[:, None] - found.scores).abs() > MAX_SCORE_CHANGE] = 0
    if wanted.masks is not None and found.masks is not None:
        change = (wanted.masks[:, None] - found.masks).abs().mean(-1)
        overlap[~(change <= MAX_MASK_CHANGE)] = 0
    shifts = []
    for row in range(len(wanted) if len(found) else 0):
        value, column = overlap[row].max(0)
        if value >= MIN_IOU:
            shifts.append(float((wanted.boxes[row] - found.boxes[column]).abs().max()))
            overlap[:, column] = 0  # taken
    number = max(len(wanted), len(found))
    unmatched = number - len(shifts)
    note = f"{unmatched} of {number} detections have no counterpart"
    return Deviation(name, max(shifts, default=0.0), unmatched / max(number, 1), note)
