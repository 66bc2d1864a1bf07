"""Write what the documentation takes from the code, the records and a real forward pass.

    python docs/generate.py           write the tables of the pages, and the figures
    python docs/generate.py --check   write nothing; exit status 1 if any of them is stale

A table stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` of its page; the rest of a page is written by
hand. Figures measured by us come from ``hub/<name.tag>/eval.json``, those of others from the ``reported`` field of the
weights' ``PretrainedCfg``; the two never share a column. Sizes come from ``hub/sizes.csv``, see ``hub/sizes.py``.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dyhead_zoo import get_pretrained_cfg, list_detectors, list_pretrained, list_tags
from dyhead_zoo.engine.evaluate import MASK_METRIC_NAMES, METRIC_NAMES

DOCS = Path(__file__).parent
HUB = DOCS.parent / "hub"
TOLERANCE = 0.02
"""Numbers of a figure may differ by this share between machines; anything larger is stale."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table that the reader of the site can sort and filter."""
    lines = [" | ".join(header), " | ".join("---" for _ in header), *(" | ".join(row) for row in rows)]
    return '<div class="sortable" markdown>\n\n' + "\n".join(f"| {line} |" for line in lines) + "\n\n</div>"


def percent(value: float | None) -> str:
    """A figure in 0..1 in percent; empty where there was nothing to measure."""
    return "" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def records() -> dict[str, dict[str, Any]]:
    """Evaluation records by ``name.tag``."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(HUB.glob("*/eval.json"))}


def card_link(name: str) -> str:
    """The name, linked to its model card where there is one."""
    card = DOCS / "cards" / name / "README.md"
    return f"[`{name}`](cards/{name}/README.md)" if card.is_file() else f"`{name}`"


def measured() -> str:
    """What we measured, one row per record; masks have columns where a record has them."""
    rows, masks = [], _masks_measured()
    for name, record in records().items():
        person: dict[str, Any] = next((c for c in record["per_class"] if c["name"] == "person"), {})
        numbers = [percent(record["metrics"][metric]) for metric in METRIC_NAMES]
        low_high = (record["intervals"] or {}).get("AP", ())
        interval = " to ".join(percent(value) for value in low_high)
        where = get_pretrained_cfg(name).measured_on or ""
        numbers[1:] += [percent(record["metrics"].get(metric)) for metric in masks]
        rows.append([card_link(name), numbers[0], interval, *numbers[1:], percent(person.get("AP")), where])
    header = ["weights", "AP", "95 % interval of AP", *METRIC_NAMES[1:], *masks, "person AP", "measured on"]
    return table(header, rows)


def _masks_measured() -> tuple[str, ...]:
    """``MASK_METRIC_NAMES`` if any record has them."""
    return MASK_METRIC_NAMES if any(MASK_METRIC_NAMES[0] in r["metrics"] for r in records().values()) else ()


def reported() -> str:
    """What others report of weights that we can load, one row per tag."""
    rows = []
    for name in list_pretrained():
        cfg = get_pretrained_cfg(name)
        if cfg.reported:
            by = cfg.reported_by or "unknown"
            figures = [f"{cfg.reported[key]:.1f}" if key in cfg.reported else "" for key in ("AP", "mask_AP")]
            rows.append([f"`{name}`", *figures, by, _side(cfg), cfg.license or "not stated"])
    return table(["weights", "AP", "mask AP", "reported by", "shorter / longer side", "licence"], rows)


def _side(cfg: Any) -> str:
    return f"{cfg.short_side} / {cfg.long_side}"


def per_class() -> str:
    """AP of every class, one row per record and class; masks have columns where a record has them."""
    names = ["AP", "AP50", *(name for name in ("mask_AP", "mask_AP50") if _masks_measured())]
    rows = [
        [f"`{name}`", entry["name"], str(entry["num_gts"]), *(percent(entry.get(figure)) for figure in names)]
        for name, record in records().items()
        for entry in record["per_class"]
    ]
    return table(["weights", "class", "objects", *(name.replace("_", " ") for name in names)], rows)


def names() -> str:
    """Registered names, where their weights come from, and their tags."""
    rows = []
    for name in list_detectors(exclude="test_*"):
        tags = ", ".join(f"`{tag}`" for tag in list_tags(name))
        rows.append([f"`{name}`", get_pretrained_cfg(name).status, tags])
    return table(["name", "weights", "tags, the default first"], rows)


def families() -> str:
    """Size, cost, weights and figures of every family, with and without DyHead: one row per detector of sizes.csv."""
    rows = []
    for size in csv.DictReader((HUB / "sizes.csv").open()):
        name = size["name"]
        rows.append(
            [
                size["family"],
                f"`{name}`",
                f"{int(size['parameters']) / 1e6:.1f}",
                f"{int(size['multiply_adds']) / 1e9:.1f}",
                f"{size['height']} x {size['width']}",
                _reported_of(name),
                _measured_of(name),
            ]
        )
    header = ["family", "name", "parameters, M", "multiply-adds, G", "at, px", "tags: AP reported", "AP measured"]
    return table(header, rows)


def _reported_of(name: str) -> str:
    """The tags of a detector with their box AP / mask AP as reported, a line for each source."""
    sources: dict[str, list[str]] = {}
    for tag in list_tags(name):
        cfg = get_pretrained_cfg(f"{name}.{tag}")
        text = " ".join([f"`{tag}`", *([_box_and_mask(cfg.reported)] if cfg.reported else [])])
        sources.setdefault(cfg.reported_by or "", []).append(text if cfg.has_weights else f"{text} (no download)")
    return "<br>".join(", ".join(tags) + (f": {source}" if source else "") for source, tags in sources.items())


def _box_and_mask(figures: Mapping[str, float]) -> str:
    """``40.9`` or ``40.9 / 37.1``, of figures in percent."""
    return " / ".join(f"{figures[key]:.1f}" for key in ("AP", "mask_AP") if key in figures)


def _measured_of(name: str) -> str:
    """The records of a detector's tags: box AP / mask AP, and on what."""
    lines = []
    for weights, record in records().items():
        if weights.partition(".")[0] == name:
            data = (get_pretrained_cfg(weights).measured_on or "").partition(";")[0]
            figures = {name: 100 * value for name, value in record["metrics"].items() if value is not None}
            lines.append(f"`{weights.partition('.')[2]}` {_box_and_mask(figures)}: {data}")
    return "<br>".join(lines)


_STARTS = {"backbone": "ImageNet weights of the backbone", "detector": "the bundled detector", "random": "nothing"}


def learned(file: str, only: str = "") -> Callable[[], str]:
    """What ``hub/learn.py`` wrote, one row per detector and start: mean and range over the seeds.

    ``only``: rows whose arguments have these words.
    """

    def rows() -> str:
        groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
        for row in (row for row in csv.DictReader((HUB / file).open()) if only in row["arguments"]):
            groups.setdefault((row["detector"], row["start"], row["arguments"], row["steps"]), []).append(row)
        lines = []
        for (name, start, arguments, steps), runs in groups.items():
            spreads = []
            for metric in ("AP50", "AP"):
                values = [100 * float(run[metric]) for run in runs]
                spreads.append(_spread(values) if len(values) > 1 else f"{values[0]:.1f}")
            lines.append([f"`{name}`", arguments, _STARTS[start], steps, str(len(runs)), *spreads])
        return table(["detector", "arguments", "starts from", "steps", "seeds", "AP50", "AP"], lines)

    return rows


def towers_and_dyhead() -> str:
    """AP50 of the one-stage families with towers and with DyHead, mean and range over the seeds of families.csv."""
    runs: dict[str, dict[bool, list[float]]] = {}
    for row in csv.DictReader((HUB / "families.csv").open()):
        family = row["detector"].partition("_")[0]
        runs.setdefault(family, {}).setdefault("towers" in row["arguments"], []).append(100 * float(row["AP50"]))
    lines = []
    for family, kinds in sorted(runs.items()):
        cells = [_spread(kinds[towers]) if towers in kinds else "" for towers in (True, False)]
        lines.append([f"`{family}_lite0_dyhead2`", *cells, str(min(len(values) for values in kinds.values()))])
    return table(["detector", "AP50, four tower convolutions", "AP50, two DyHead blocks", "seeds"], lines)


def _spread(values: Sequence[float]) -> str:
    """``62.1 (59.9 to 66.5)``, the mean and the range."""
    return f"{sum(values) / len(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def released_shapes(seen: Any) -> str:
    """The shape after each step of the first released block, one row per level."""
    from figures import level_name, show

    r, rows, first = seen.released, [], 0
    for level, branches in enumerate(r["branches"]):
        own = f"{show(r['mid'][level][1])}<br>{show(r['mid'][level][2])}"
        coarser = "none"
        if level + 1 < len(r["branches"]):
            coarser = f"{show(r['high'][level][1])}<br>{show(r['high'][level][2])}"
        count, x = len(branches), show(r["task"][level])
        weights = f"{count} × ({show(r['scale'][first])})"
        first += count
        task = show(seen.blocks[0].task[level].shape)
        rows.append([level_name(level), own, coarser, f"{count} × ({show(branches[0])})", weights, x, task, x])
    header = [
        "level",
        "offsets<br>masks",
        "those of the<br>coarser branch",
        "after spatial:<br>branches",
        "scale weights",
    ]
    return _plain([*header, "after scale:<br>mean", "task<br>coefficients", "after task"], rows)


def paper_shapes(seen: Any) -> str:
    """The shape after each step of the first block in the paper's formulation."""
    from figures import show

    p, levels = seen.paper, ", ".join(show(shape) for shape in seen.released["input"])
    rows = [
        ["levels, resized to the median level", "", show(p["input"])],
        ["scale", f"weights {show(p['weights'])}", show(p["scaled"])],
        ["spatial", f"offsets {show(p['offsets'])}, masks {show(p['masks'])}", show(p["sampled"])],
        ["task", f"a1, b1, a2, b2: 4 × ({show(p['coefficients'])})", show(p["activated"])],
        ["levels, resized back after the last block", "", levels],
    ]
    return _plain(["step", "attention", "features afterwards"], rows)


def _plain(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose cells do not wrap."""
    lines = "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))
    return f'<div class="wide" markdown>\n\n{lines}\n\n</div>'


def fill(page: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """A page with its generated tables replaced.

    Raises:
        ValueError: if the page lacks the place of a table.
    """
    for name, make in tables.items():
        place = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not place.search(page):
            raise ValueError(f"no place for the table {name!r}: add <!-- begin {name} --> and <!-- end {name} -->")
        content = make()
        page = place.sub(lambda m, content=content: f"{m[1]}{content}\n{m[2]}", page)  # type: ignore[misc]
    return page


def generated() -> dict[Path, str]:
    """Every generated file with its content."""
    import benchmarks
    from figures import attention_figure, forward_pass, shapes_figure

    seen = forward_pass()
    pages: dict[str, dict[str, Callable[[], str]]] = {
        "benchmarks.md": benchmarks.pages(),
        "results.md": {"measured": measured, "reported": reported, "per class": per_class},
        "detectors.md": {"names": names},
        "families.md": {"families": families, "learned": towers_and_dyhead, "by heart": learned("overfit.csv")},
        "finetune.md": {"fruit": learned("fruit300.csv")},
        "dyhead.md": {
            "by heart": learned("overfit.csv", "formulation="),
            "released shapes": lambda: released_shapes(seen),
            "paper shapes": lambda: paper_shapes(seen),
        },
    }
    files = {DOCS / page: fill((DOCS / page).read_text(), tables) for page, tables in pages.items()}
    files |= {DOCS / "assets" / name: figure for name, figure in benchmarks.figures().items()}
    files[DOCS / "assets" / "attention.svg"] = attention_figure(seen)
    files[DOCS / "assets" / "shapes.svg"] = shapes_figure(seen)
    return files


def same(committed: str, fresh: str) -> bool:
    """Equal but for pictures within an SVG, whose bytes depend on libraries, and for the last digits of its numbers."""
    number = re.compile(r"-?\d+\.\d+")
    old, new = (re.sub(r"base64,[^\"]*", "", text) for text in (committed, fresh))
    if number.sub("", old) != number.sub("", new):
        return False
    pairs = zip(number.findall(old), number.findall(new), strict=True)
    return all(math.isclose(float(a), float(b), rel_tol=TOLERANCE, abs_tol=TOLERANCE) for a, b in pairs)


def stale(files: Mapping[Path, str]) -> list[Path]:
    """Files whose committed content is not the generated one."""

    def fits(path: Path, text: str) -> bool:
        old = path.read_text() if path.is_file() else ""
        return same(old, text) if path.suffix == ".svg" else old == text

    return [path for path, text in files.items() if not fits(path, text)]


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check; 1 if something is stale."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a file is stale")
    args = parser.parse_args(argv)
    files = generated()
    old = stale(files)
    for path in old:
        print(f"{path.relative_to(DOCS.parent)} {'is stale: run python docs/generate.py' if args.check else 'written'}")
        if not args.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files[path])
    return 1 if args.check and old else 0


if __name__ == "__main__":
    sys.exit(main())
