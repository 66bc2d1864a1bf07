"""The two figures of the page on Dynamic Head, drawn as SVG from a real forward pass; ``generate.py`` writes them.

The detector is the one that ships with the package, the picture the portrait of Grace Hopper that matplotlib brings (US
Navy, public domain).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image

from dyhead_zoo import DEFAULT_DETECTOR, Detections, Detector, create_detector
from dyhead_zoo.data import prepare_images, read_image
from dyhead_zoo.engine.attention import sampling_points
from dyhead_zoo.engine.predict import sample_photo
from dyhead_zoo.layers.dyhead import BlockAttention, DyHeadBlock
from dyhead_zoo.layers.dyhead_paper import PaperBlock
from dyhead_zoo.layers.fpn import Neck

INK, GREY, PALE = "#222222", "#777777", "#dddddd"
PLACES = (("chest", 0.50, 0.80, 2, "#d62728"), ("face", 0.50, 0.40, 1, "#1f77b4"), ("flag", 0.14, 0.40, 1, "#2ca02c"))
"""Where the figure looks: name, x and y as fractions of the photo, index of the pyramid level, colour."""

Shape = tuple[int, ...]


class ForwardPass(NamedTuple):
    """What one forward pass of the bundled detector showed.

    Attributes:
        photo: (3, H, W) uint8, as the detector was given it, without its padding.
        found: detections in pixels of ``photo``.
        blocks: attentions of each DyHead block.
        strides: of the pyramid.
        channels: of the pyramid.
        released: shapes in the first block, by step; one entry per level.
        paper: shapes in the first block of the same detector in the paper's formulation, with fresh weights.
    """

    photo: Tensor
    found: Detections
    blocks: list[BlockAttention]
    strides: tuple[int, ...]
    channels: int
    released: dict[str, list[Any]]
    paper: dict[str, Shape]


def forward_pass() -> ForwardPass:
    """Run the bundled detector, and its twin in the paper's formulation, over the portrait."""
    detector = create_detector(DEFAULT_DETECTOR, pretrained=True)
    ((_, batch),) = prepare_images([read_image(sample_photo())], detector.pretrained_cfg, 1)
    released, blocks = _released_shapes(detector, batch.images, batch.image_sizes)
    with torch.inference_mode():
        (found,) = detector.decode(detector(batch.images, batch.image_sizes))
    height, width = batch.image_sizes[0].tolist()
    neck = detector.neck
    if not isinstance(neck, Neck):
        raise TypeError(f"{DEFAULT_DETECTOR} has no pyramid: choose another detector for the figures")
    paper = _paper_shapes(create_detector(DEFAULT_DETECTOR, formulation="paper"), batch.images, batch.image_sizes)
    photo = batch.images[0, :, :height, :width]
    return ForwardPass(photo, found, blocks, neck.strides, neck.channels, released, paper)


def _released_shapes(
    detector: Detector, images: Tensor, sizes: Tensor
) -> tuple[dict[str, list[Any]], list[BlockAttention]]:
    block = next(module for module in detector.modules() if isinstance(module, DyHeadBlock))
    seen: dict[str, list[Any]] = {key: [] for key in ("input", "mid", "low", "high", "branches", "scale", "task")}

    def inputs_of(name: str) -> Any:
        return lambda _, args: seen[name].append([tuple(arg.shape) for arg in args])

    def branches(_: nn.Module, args: Any, output: Any) -> None:
        seen["input"].extend(tuple(x.shape) for x in args[0])
        seen["branches"].extend([tuple(x.shape) for x in level] for level in output)

    hooks = [getattr(block.spatial, f"conv_{name}").register_forward_pre_hook(inputs_of(name)) for name in _BRANCHES]
    hooks.append(block.spatial.register_forward_hook(branches))
    if block.scale is not None:
        hooks.append(block.scale.register_forward_hook(lambda _, __, output: seen["scale"].append(tuple(output.shape))))
    hooks.append(block.task.register_forward_hook(lambda _, __, output: seen["task"].append(tuple(output.shape))))
    blocks = detector.attention(images, sizes)
    for hook in hooks:
        hook.remove()
    return seen, blocks


_BRANCHES = ("mid", "low", "high")


def _paper_shapes(detector: Detector, images: Tensor, sizes: Tensor) -> dict[str, Shape]:
    block = next(module for module in detector.modules() if isinstance(module, PaperBlock))
    seen: dict[str, Shape] = {}

    def keep(*names: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            for name, value in zip(names, output, strict=True):
                seen.setdefault(name, tuple(value[0].shape) if isinstance(value, tuple) else tuple(value.shape))

        return hook

    block.register_forward_pre_hook(lambda _, args: seen.setdefault("input", tuple(args[0].shape)) and None)
    block.register_forward_hook(lambda _, __, output: seen.setdefault("output", tuple(output.shape)) and None)
    for part, names in (
        (block.scale, ("weights", "scaled")),
        (block.spatial, ("offsets", "masks", "sampled")),
        (block.task, ("coefficients", "activated")),
    ):
        if part is not None:
            part.register_forward_hook(keep(*names))
    detector.attention(images, sizes)
    return seen


def level_name(level: int) -> str:
    """``P3`` for the finest level, of stride 8."""
    return f"P{level + 3}"


def show(shape: Sequence[int]) -> str:
    """``1 × 96 × 48 × 44``."""
    return " × ".join(map(str, shape))


# -- drawing ----------------------------------------------------------------------------------------------------------


class Drawing:
    """Elements of an SVG picture, in pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            'font-family="Helvetica, Arial, sans-serif" font-size="12">',
            f"<title>{title}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{GREY}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="white"/>',
        ]

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = 12,
        color: str = INK,
        anchor: str = "start",
        weight: str = "",
    ) -> None:
        bold = f' font-weight="{weight}"' if weight else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{color}" text-anchor="{anchor}"{bold}>'
            f"{text}</text>"
        )

    def rect(self, x: float, y: float, width: float, height: float, fill: str, stroke: str = "none") -> None:
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}" stroke="{stroke}"/>'
        )

    def circle(self, x: float, y: float, radius: float, fill: str, stroke: str = "white") -> None:
        self.parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{fill}" fill-opacity="0.85" stroke="{stroke}"/>'
        )

    def line(self, points: Iterable[tuple[float, float]], *, color: str = GREY, tip: bool = False) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        end = ' marker-end="url(#tip)"' if tip else ""
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{color}"{end}/>')

    def image(self, x: float, y: float, width: float, height: float, picture: Image.Image, kind: str) -> None:
        buffer = io.BytesIO()
        picture.save(buffer, kind, **({"quality": 80} if kind == "JPEG" else {}))
        data = base64.b64encode(buffer.getvalue()).decode()
        crisp = ' style="image-rendering:pixelated"' if kind == "PNG" else ""
        self.parts.append(
            f'<image x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'preserveAspectRatio="none"{crisp} href="data:image/{kind.lower()};base64,{data}"/>'
        )

    def box(self, x: float, y: float, width: float, lines: Sequence[str], fill: str) -> None:
        """A rounded box with a bold first line, its top left corner at (x, y)."""
        height = 12 + 16 * len(lines)
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="5" fill="{fill}" '
            f'stroke="{GREY}"/>'
        )
        for number, line in enumerate(lines):
            self.text(x + width / 2, y + 18 + 16 * number, line, anchor="middle", weight="" if number else "bold")

    def __str__(self) -> str:
        return "\n".join([*self.parts, "</svg>"]) + "\n"


def attention_figure(seen: ForwardPass) -> str:
    """Scale weights, sampling points with their masks, and task coefficients of every block, as SVG."""
    width, top = 980, 40
    photo_width = 400
    photo_height = round(photo_width * seen.photo.shape[1] / seen.photo.shape[2])
    drawing = Drawing(width, top + photo_height + 90, "What the three attentions of DyHead compute for one photo")
    drawing.text(10, 24, "Spatial attention, last block", size=15, weight="bold")
    _draw_photo(drawing, seen, 10, top, photo_width, photo_height)
    x = photo_width + 50
    drawing.text(x, 24, "Scale attention: weight of each branch", size=15, weight="bold")
    y = _draw_scale(drawing, seen, x, top)
    drawing.text(x, y + 34, "Task attention: coefficients of the channels", size=15, weight="bold")
    _draw_task(drawing, seen, x, y + 50, width - x - 20)
    return str(drawing)


def _draw_photo(drawing: Drawing, seen: ForwardPass, x: float, y: float, width: int, height: int) -> None:
    zoom = width / seen.photo.shape[2]
    drawing.image(x, y, width, height, to_pil_image(seen.photo).resize((width, height)), "JPEG")
    for number, (name, right, down, level, color) in enumerate(PLACES):
        stride = seen.strides[level]
        rows, columns = seen.blocks[-1].offsets[level].shape[-2:]
        row = min(int(down * seen.photo.shape[1] / stride), rows - 1)
        column = min(int(right * seen.photo.shape[2] / stride), columns - 1)
        for k in range(9):  # where an ordinary convolution would look
            px, py = (((i + d + 0.5) * stride * zoom) for i, d in ((column, k % 3 - 1), (row, k // 3 - 1)))
            drawing.rect(x + px - 2, y + py - 2, 4, 4, "white", color)
        taps = sampling_points(seen.blocks[-1], level, (row, column), stride)
        for (px, py), mask in zip((taps.points * zoom).tolist(), taps.masks.tolist(), strict=True):
            drawing.circle(x + px, y + py, 2 + 8 * mask**0.5, color)
        total = f"{name}, {level_name(level)}: masks {taps.masks.min():.2f} to {taps.masks.max():.2f}"
        drawing.circle(x + 8, y + height + 20 + 18 * number, 6, color)
        drawing.text(x + 22, y + height + 24 + 18 * number, total)
    drawing.rect(x + 232, y + height + 16, 6, 6, "white", INK)
    drawing.text(x + 246, y + height + 24, "plain 3 × 3 grid")
    drawing.text(x + 228, y + height + 42, "circle: sampled point,")
    drawing.text(x + 228, y + height + 60, "its area grows with the mask")


def _draw_scale(drawing: Drawing, seen: ForwardPass, x: float, y: float) -> float:
    """One matrix per block: levels by branches. Returns the lower end."""
    cell, row = 54, 20
    names = ("own", "finer", "coarser")
    for number, block in enumerate(seen.blocks):
        left = x + number * 250
        drawing.text(left, y + 12, f"block {number + 1}", color=GREY)
        for column, name in enumerate(names):
            drawing.text(left + 60 + cell * column + cell / 2, y + 12, name, color=GREY, anchor="middle")
        for level, weights in enumerate(block.scale):
            top = y + 20 + row * level
            drawing.text(left + 30, top + 14, level_name(level))
            present = [True, level > 0, level + 1 < len(block.scale)]
            values = iter(weights[0].tolist())
            for column, there in enumerate(present):
                box = (left + 60 + cell * column, top, cell - 2, row - 2)
                if not there:
                    drawing.rect(*box, "white", PALE)
                    continue
                value = next(values)
                drawing.rect(*box, _shade(2 * value - 1))
                drawing.text(box[0] + box[2] / 2, top + 13, f"{value:.2f}", anchor="middle")
    return y + 20 + row * len(seen.strides)


def _shade(value: float) -> str:
    """White at 0, orange at 1, in steps of a tenth, so that rounding does not show."""
    step = round(10 * min(max(value, 0.0), 1.0)) / 10
    return "#" + "".join(f"{round(255 + step * (full - 255)):02x}" for full in (242, 142, 43))


def _draw_task(drawing: Drawing, seen: ForwardPass, x: float, y: float, width: float) -> None:
    """Strips: a row per level, a column per channel, blue below and red above what makes a ReLU."""
    neutral = (("a1", 1.0, 1.0), ("b1", 0.0, 0.5), ("a2", 0.0, 1.0), ("b2", 0.0, 0.5))
    row, order = 6, (0, 2, 1, 3)
    for number, block in enumerate(seen.blocks):
        drawing.text(x, y + 12, f"block {number + 1}: rows P3 to {level_name(len(seen.strides) - 1)}", color=GREY)
        y += 20
        for index in order:
            name, middle, reach = neutral[index]
            values = torch.stack([task[0, index] for task in block.task])
            drawing.text(x, y + 20, name)
            height = row * len(values)
            drawing.image(x + 24, y, width - 130, height, _strip((values - middle) / reach), "PNG")
            drawing.text(x + width - 98, y + 20, f"{values.min():.2f} to {values.max():.2f}", color=GREY)
            y += height + 6
        y += 6
    drawing.text(
        x, y + 10, f"each column is one of {seen.channels} channels; white is a ReLU (a1 = 1, others 0),", color=GREY
    )
    drawing.text(x, y + 26, "red above it, blue below, full colour at the ends of the range", color=GREY)


def _strip(values: Tensor) -> Image.Image:
    """(rows, columns) in -1..1 to a picture of one pixel each: blue, white, red."""
    v = values.clamp(-1, 1)[..., None]
    red, blue = torch.tensor([214.0, 39.0, 40.0]), torch.tensor([31.0, 119.0, 180.0])
    end = torch.where(v >= 0, red, blue)
    return Image.fromarray((255 + v.abs() * (end - 255)).round().to(torch.uint8).numpy())


def shapes_figure(seen: ForwardPass) -> str:
    """What meets what, with the shapes of the forward pass: one level of the released block, and the paper's block."""
    drawing = Drawing(1120, 640, "Shapes after each attention, in the released code and in the paper")
    _draw_released(drawing, seen, 2)
    _draw_paper(drawing, seen, 400)
    return str(drawing)


_FEATURE, _ATTENTION = "#eef3fa", "#fdf0e3"


def _draw_released(drawing: Drawing, seen: ForwardPass, level: int) -> None:
    r = seen.released
    name, finer, coarser = level_name(level), level_name(level - 1), level_name(level + 1)
    mid, low, high = r["mid"][level], r["low"][level - 1], r["high"][level]
    first_weight = sum(len(branches) for branches in r["branches"][:level])
    drawing.text(10, 24, f"Released code: one block, seen from level {name}", size=15, weight="bold")
    rows = (50, 160, 270)
    inputs = ((finer, low[0]), (name, mid[0]), (coarser, high[0]))
    titles = ("low: DCN, stride 2", "mid: DCN, stride 1", "high: DCN, upsampled")
    branches = (r["branches"][level][1], r["branches"][level][0], r["branches"][level][2])
    fields = (low[1:], mid[1:], high[1:])
    for y, (source, shape), title, field, branch in zip(rows, inputs, titles, fields, branches, strict=True):
        drawing.box(10, y, 150, (f"x of {source}", show(shape)), _FEATURE)
        drawing.line([(160, y + 22), (196, y + 22)], tip=True)
        drawing.box(200, y - 8, 220, (title, f"offsets {show(field[0])}", f"masks {show(field[1])}"), _ATTENTION)
        drawing.line([(420, y + 22), (456, y + 22)], tip=True)
        drawing.box(460, y, 150, ("branch", show(branch)), _FEATURE)
        drawing.line([(610, y + 22), (646, y + 22)], tip=True)
        drawing.box(650, y, 130, ("scale weight", show(r["scale"][first_weight])), _ATTENTION)
    drawing.line([(85, rows[1] + 44), (85, rows[1] + 66), (310, rows[1] + 66), (310, rows[2] - 12)], tip=True)
    drawing.line([(85, rows[1]), (85, rows[1] - 24), (310, rows[1] - 24), (310, rows[0] + 56)], tip=True)
    drawing.text(94, rows[1] + 80, f"offsets and masks of {name} for all three", size=11, color=GREY)
    for y in rows:
        drawing.line([(780, y + 22), (800, y + 22), (800, rows[1] + 22), (816, rows[1] + 22)], tip=y == rows[1])
    mean = r["task"][level]
    drawing.box(820, rows[1], 140, ("mean", show(mean)), _FEATURE)
    task = seen.blocks[0].task[level]
    drawing.line([(890, rows[1] + 44), (890, rows[2] - 12)], tip=True)
    drawing.box(820, rows[2] - 8, 140, ("task coefficients", show(task.shape)), _ATTENTION)
    drawing.line([(960, rows[2] + 14), (1040, rows[2] + 14), (1040, rows[1] + 48)], tip=True)
    drawing.line([(960, rows[1] + 22), (976, rows[1] + 22)], tip=True)
    drawing.box(980, rows[1], 130, (f"new x of {name}", show(mean)), _FEATURE)


def _draw_paper(drawing: Drawing, seen: ForwardPass, top: float) -> None:
    p, levels = seen.paper, seen.released["input"]
    drawing.line([(10, top - 34), (1110, top - 34)], color=PALE)
    drawing.text(10, top, "The paper: one block, all levels as one tensor L × S × C", size=15, weight="bold")
    drawing.box(10, top + 30, 150, ("pyramid", *(show(shape) for shape in levels)), _FEATURE)
    y = top + 60
    drawing.line([(160, y + 22), (186, y + 22)], tip=True)
    steps = (
        ("resized to the median", p["input"], "scale weights", (show(p["weights"]),)),
        (
            "after scale attention",
            p["scaled"],
            "one deformable conv.",
            (f"offsets {show(p['offsets'])}", f"masks {show(p['masks'])}"),
        ),
        ("after spatial attention", p["sampled"], "task coefficients", (f"4 × ({show(p['coefficients'])})",)),
    )
    for number, (title, shape, attention, lines) in enumerate(steps):
        x = 190 + 235 * number
        drawing.box(x, y, 190, (title, show(shape)), _FEATURE)
        drawing.line([(x + 95, y + 44), (x + 95, y + 86)], tip=True)
        drawing.box(x + 5, y + 90, 180, (attention, *lines), _ATTENTION)
        drawing.line([(x + 185, y + 112), (x + 212, y + 112), (x + 212, y + 22), (x + 231, y + 22)], tip=True)
    drawing.box(895, y, 190, ("after task attention", show(p["output"])), _FEATURE)
    drawing.text(660, top + 212, "the sum over the levels is used as each of them", size=11, color=GREY)
