"""What the numbers of a detector mean: class names and, at the COCO boundary, category ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LabelSpace:
    """Contiguous, 0-based labels without a background class.

    Label ``i`` is named ``names[i]`` and is written to COCO-format files as ``category_ids[i]``.

    Raises:
        ValueError: for duplicate names or ids, or lists of different length.
    """

    names: tuple[str, ...]
    category_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.category_ids):
            raise ValueError(f"{len(self.names)} class names but {len(self.category_ids)} category ids: give one each")
        for kind, values in (("class name", self.names), ("category id", self.category_ids)):
            seen: set[Any] = set()
            for value in values:
                if value in seen:
                    raise ValueError(f"{kind} {value!r} appears twice: names and ids must be unique")
                seen.add(value)

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def from_names(cls, names: Iterable[str], category_ids: Iterable[int] | None = None) -> LabelSpace:
        """Names in order; category ids default to 1..N, as most COCO-format tools write them."""
        names = tuple(str(name) for name in names)
        ids = tuple(range(1, len(names) + 1)) if category_ids is None else tuple(int(i) for i in category_ids)
        return cls(names, ids)

    @classmethod
    def from_categories(cls, categories: Iterable[Mapping[str, Any]]) -> LabelSpace:
        """From the ``categories`` list of a COCO-format file, ordered by id; gaps in the ids are kept as they are."""
        rows = sorted(categories, key=lambda c: int(c["id"]))
        return cls(tuple(str(c["name"]) for c in rows), tuple(int(c["id"]) for c in rows))

    @classmethod
    def unnamed(cls, num_classes: int) -> LabelSpace:
        """``class_0 .. class_{N-1}``: a head of N rows whose meaning is not known yet."""
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes}: a detector needs at least one class")
        return cls.from_names(f"class_{i}" for i in range(num_classes))

    def to_dict(self) -> dict[str, list[Any]]:
        return {"names": list(self.names), "category_ids": list(self.category_ids)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Sequence[Any]]) -> LabelSpace:
        return cls.from_names(data["names"], data["category_ids"])


_COCO_NAMES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, "
    "mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, "
    "teddy bear, hair drier, toothbrush"
)
_COCO_UNUSED_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}

COCO_80 = LabelSpace(
    tuple(_COCO_NAMES.split(", ")),
    tuple(i for i in range(1, 91) if i not in _COCO_UNUSED_IDS),
)
"""The 80 thing classes of COCO 2017 with their raw category ids (1..90 with ten gaps)."""
