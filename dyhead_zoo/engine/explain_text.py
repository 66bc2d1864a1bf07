"""The figures of an explanation as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_MAX_CLASSES = 16
"""Rows of the table of classes; ``Explanation.to_dict`` has all."""


def summary(data: dict[str, Any]) -> str:
    """Text of ``Explanation.to_dict()``: crowds, objects without positives, levels, regions, sizes, classes, faults."""
    classes = data["classes"]
    parts = [
        f"{data['detector']}, {data['input']}: {data['annotations']}, {data['images']} images, "
        f"{data['objects']} objects, {len(classes)} classes",
        _crowds(data["objects_per_image"]),
        *(_positives(data) if data["assigned_to"] else _undecided()),
        _levels(data["levels"]),
        *(_regions(data["regions"]) if "regions" in data else ()),
        _table([{"side after resizing": f"{r['from']}..{r['to'] or ''} px", **_part(r)} for r in data["sizes"]]),
        *_classes(classes),
    ]
    parts += [f"suspicious: {len(rows)} x {kind} ({_where(rows)})" for kind, rows in data["suspicious"].items()]
    parts += [f"repaired: {count} x {kind}" for kind, count in data["repairs"].items()]
    return "\n\n".join(part for part in parts if part)


def _crowds(data: dict[str, Any]) -> str:
    lines = [f"objects per image: {_spread(data)}, at most {data['most']}"]
    for row in data["limits"]:
        start = f"{row['limit']} {row['what']} per image: "
        if not row["images"]:
            lines.append(start + "no image has more objects")
        elif row["what"] == "queries":
            lines.append(start + f"{row['images']} images have more objects, {row['objects']} can never be matched")
        else:
            lines.append(start + f"{row['images']} images have more objects, {row['objects']} can never be found")
    return "\n".join(lines)


def _positives(data: dict[str, Any]) -> Iterator[str]:
    none, place = data["without_positives"], data["assigned_to"]
    outdone = none["outdone_by_others"]
    yield (
        f"{none['objects']} objects ({none['share']:.1%}) without a positive: {none['objects'] - outdone} that no "
        f"{place} fits, {outdone} that lose theirs to other objects"
    )
    if weak := data.get("weak_positives"):
        count = f"{weak['objects_with_no_other']} objects ({weak['share']:.1%})"
        yield f"{count} with nothing but weak positives: {weak['what']}"
    yield f"positives per object: {_spread(data['positives_per_object'])}"


def _undecided() -> Iterator[str]:
    yield "each object is learned by one query; predictions decide by which one: nothing to count before training"


def _levels(rows: list[dict[str, Any]]) -> str:
    return _table([_level(row) for row in rows])


def _level(row: dict[str, Any]) -> dict[str, str]:
    cells = {"stride": f"{row['stride']}", "places/image": f"{row['places_per_image']:.0f}"}
    if "positives" in row:
        cells |= {"positives": f"{row['positives']}", "share": f"{row['share_of_positives']:.1%}"}
        cells |= {"weak": f"{row['weak_positives']}"} if "weak_positives" in row else {}
        cells |= {"objects": f"{row['objects']}", "positives/object": _number(row["positives_per_object"], ".1f")}
    cells |= {"side in strides (10% 50% 90%)": _three(row["sides_in_strides"])}
    if "objects_under_a_stride" in row:
        cells |= {"objects under a stride": f"{row['objects_under_a_stride']} ({row['share_under_a_stride']:.1%})"}
    return cells


def _regions(data: dict[str, Any]) -> Iterator[str]:
    yield "regions with the objects' own boxes, which every stage learns from, are read from\n" + _table(
        [
            {
                "stride": f"{row['stride']}",
                "objects": f"{row['objects']}",
                "share": f"{row['share']:.1%}",
                "side in strides (10% 50% 90%)": _three(row["sides_in_strides"]),
            }
            for row in data["levels"]
        ]
    )
    iou = data["best_anchor_iou"]
    yield (
        "if the anchors, clipped to the picture, were the proposals (best IoU of an object with one: median "
        f"{_number(iou['median'], '.2f')}, a tenth has at most {_number(iou['low'], '.2f')}), the stages would take "
        "for objects\n"
    ) + _table(
        [
            {
                "stage": f"{number}",
                "from IoU": f"{row['iou']:g}",
                "objects with one": f"{row['objects']} ({row['share']:.1%})",
                "anchors/object (10% 50% 90%)": _three(row["anchors_per_object"], 0),
            }
            for number, row in enumerate(data["stages"], start=1)
        ]
    )


def _classes(classes: list[dict[str, Any]]) -> Iterator[str]:
    counts = [row["objects"] for row in classes if row["objects"]]
    if counts:
        yield (
            f"class balance: the most frequent class has {counts[0] / counts[-1]:.3g} times the objects of the rarest, "
            f"{len(classes) - len(counts)} of {len(classes)} classes have none"
        )
        yield _table([{"class": row["class"], **_part(row)} for row in _ends(classes)])


def _part(row: dict[str, Any]) -> dict[str, str]:
    """Cells of some of the objects."""

    def of_all(count: int) -> str:
        return f"{count} ({count / max(row['objects'], 1):.1%})"

    cells = {"objects": f"{row['objects']}", "share": f"{row['share']:.1%}"}
    if "without_positives" in row:
        cells |= {"without positives": of_all(row["without_positives"])}
    if "only_weak_positives" in row:
        cells |= {"only weak ones": of_all(row["only_weak_positives"])}
    cells |= {"median side": f"{row['side']:.0f} px"}
    if "positives_per_object" in row:
        cells |= {"positives/object": f"{row['positives_per_object']:.1f}"}
    return cells


def _spread(data: dict[str, Any]) -> str:
    low, median, high = (_number(data[name], "g") for name in ("low", "median", "high"))
    return f"median {median}, a tenth has at most {low}, a tenth at least {high}"


def _three(data: dict[str, float | None], digits: int = 1) -> str:
    if data["median"] is None:
        return "-"
    return " ".join(f"{data[name]:.{digits}f}" for name in ("low", "median", "high"))


def _number(value: float | None, form: str) -> str:
    """A dash where nothing was measured, such as a mean over no objects."""
    return "-" if value is None else format(value, form)


def _ends(classes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The most frequent and the rarest classes, of those that have objects."""
    half, classes = _MAX_CLASSES // 2, [row for row in classes if row["objects"]]
    return classes if len(classes) <= _MAX_CLASSES else classes[:half] + classes[-half:]


def _where(rows: list[dict[str, Any]]) -> str:
    shown = [f"image id {row['image_id']}: {row['class']} {row['box']}" for row in rows[:3]]
    return "; ".join(shown) + ("; ..." if len(rows) > 3 else "")


def _table(rows: list[dict[str, str]]) -> str:
    """Columns of equal width, aligned at the right; the keys are the titles. Nothing without rows."""
    if not rows:
        return ""
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in cells)
