"""Tables and figures of the page on speed and memory, from ``hub/benchmarks/*.csv``; ``generate.py`` writes them.

The files are what ``dyhead-zoo benchmark WHAT --csv hub/benchmarks/WHAT.csv`` wrote. Those that are missing are said to
be missing. The goals were set before the code was written and stand beside the figures, met or not. What others report
is in tables of its own.
"""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from figures import GREY, INK, PALE, Drawing

FOLDER = Path(__file__).parent.parent / "hub" / "benchmarks"
COMPARED, STAGED = ("op", "head", "train", "torchvision", "eval"), ("detector", "photo", "data")
"""Files whose pairs are compared, and files with the stages of a whole; ``memory`` is the one of megabytes."""
COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#76b7b2", "#edc948", "#9c755f", "#ff9da7")

Row = Mapping[str, str]


class Goal(NamedTuple):
    """A limit for what a benchmark gives.

    Attributes:
        text: what is limited, in words.
        file: ``op``, ``head``, ...
        case: regular expression for the names of the cases it is about.
        subject: its time by that of ``baseline``; of memory, its peak over the inputs in MB, or with a baseline the
            ratio of both processes' peaks.
        limit: of that.
        at_least: whether the limit is the least rather than the most.
        plain: what ``subject``, or else ``baseline``, is called where it does without numba.
    """

    text: str
    file: str
    case: str
    subject: str
    baseline: str
    limit: float
    at_least: bool = False
    plain: str = ""

    @property
    def without_numba(self) -> Goal | None:
        """The same for what does without it."""
        if not self.plain:
            return None
        where = "baseline" if self.baseline.startswith("ours") else "subject"
        return self._replace(**{where: self.plain, "plain": ""})

    def shown(self) -> str:
        """Such as ``≤ 1.25``."""
        number = f"{self.limit:.0f} MB" if self.in_megabytes else f"{self.limit:.2f}"
        return f"{'≥' if self.at_least else '≤'} {number}"

    @property
    def in_megabytes(self) -> bool:
        return self.file == "memory" and not self.baseline

    def met(self, value: float) -> bool:
        """Whether a value keeps the limit as far as the table's digits tell."""
        value = round(value, 0 if self.in_megabytes else 2)
        return value >= self.limit if self.at_least else value <= self.limit


GOALS = (
    Goal("operator, forward, over a dense convolution", "op", " forward$", "ours", "dense", 1.25, plain="bag"),
    Goal(
        "operator, forward and backward, over a dense convolution",
        "op",
        "backward$",
        "ours",
        "dense",
        1.30,
        plain="bag",
    ),
    Goal(
        "operator in bfloat16 over a dense convolution in float32",
        "op",
        " forward$",
        "ours bf16",
        "dense",
        0.65,
        plain="bag bf16",
    ),
    Goal("operator over onnxruntime's", "op", " forward$", "ours", "onnxruntime", 1.0, plain="bag"),
    Goal("operator over OpenVINO's", "op", " forward$", "ours", "openvino", 1.0, plain="bag"),
    Goal(
        "six-block head over its dense convolutions alone", "head", "", "fused", "dense convs", 1.25, plain="fused, bag"
    ),
    Goal("the same once its weights are packed, as `fuse()` does", "head", "", "fused, packed", "dense convs", 1.25),
    Goal(
        "training step of the head over one with dense convolutions",
        "train",
        "",
        "ours",
        "dense convs",
        1.15,
        plain="bag",
    ),
    Goal(
        "whole detector: torchvision's operator over ours",
        "detector",
        "^(?!reppoints).*inference$",
        "torchvision op",
        "ours",
        3.5,
        True,
        "ours, bag",
    ),
    Goal(
        "its training step: torchvision's operator over ours",
        "detector",
        "^(?!reppoints).*step$",
        "torchvision op",
        "ours",
        9.0,
        True,
        "ours, bag",
    ),
    *(
        Goal(
            f"{text}: torchvision's operator over ours",
            "detector",
            case,
            "torchvision op",
            "ours",
            3.0,
            True,
            "ours, bag",
        )
        for text, case in (
            ("RepPoints, two deformable convolutions in its own head, training step", "^reppoints_resnet50 .*step$"),
            ("RepPoints with six DyHead blocks, inference", "^reppoints_resnet50_dyhead6 .*inference$"),
            ("RepPoints without them, inference", "^reppoints_resnet50 .*inference$"),
        )
    ),
    Goal(
        "two-stage detectors, fused, over torchvision's with the same weights",
        "torchvision",
        "",
        "ours fused",
        "torchvision",
        1.0,
    ),
    Goal("the same, as built", "torchvision", "", "ours", "torchvision", 1.0),
    Goal("memory of the operator, inference", "memory", "^op .*inference$", "ours", "", 35, plain="bag"),
    Goal("memory of the operator, training", "memory", "^op .*training$", "ours", "", 105, plain="bag"),
    Goal("memory of a training step of the head", "memory", "^head ", "ours", "", 1300, plain="bag"),
    Goal("the same, each block recomputed", "memory", "^head ", "checkpointed", "", 800),
    Goal(
        "process that makes a training step of the detector, over torchvision's operator",
        "memory",
        "^atss_",
        "ours",
        "torchvision op",
        1.0,
    ),
    Goal("process that runs a two-stage detector, over torchvision's", "memory", "rcnn", "ours", "torchvision", 1.0),
)

ALL_GOALS = (*GOALS, *(plain for goal in GOALS if (plain := goal.without_numba)))

REPORTED = "mmdetection 3 (reported)"
REPORTED_PARTS = {"backbone": 530.0, "FPN": 66.0, "DyHead": 3100.0, "head": 25.0}
REPORTED_WHOLE, REPORTED_STEP = 3750.0, 34000.0
"""Milliseconds of ``atss_resnet50_dyhead6`` at 640x640 on two threads of another machine, an AMD EPYC."""
REPORTED_PEAK = 1983
"""MB of the process at the peak of that training step."""


def read(what: str) -> list[Row]:
    """Rows of a file; none where there is no file."""
    path = FOLDER / f"{what}.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def pages() -> dict[str, Callable[[], str]]:
    """Makers of the generated parts of ``benchmarks.md``, by their names."""
    return {
        "goals": goals,
        **{what: partial(ratios, what) for what in COMPARED},
        **{what: partial(parts, what) for what in STAGED},
        "memory": memory,
    }


def figures() -> dict[str, str]:
    """SVG pictures by file name, of the files that exist."""
    makers: dict[str, Callable[[Sequence[Row]], str]] = {
        **{what: partial(ratios_figure, what) for what in COMPARED},
        **{what: partial(parts_figure, what) for what in STAGED},
        "memory": memory_figure,
    }
    return {figure_name(what): make(rows) for what, make in makers.items() if (rows := read(what))}


def figure_name(what: str) -> str:
    """Of the figure that belongs to a file."""
    return f"benchmark_{what}.svg"


# -- tables ------------------------------------------------------------------------------------------------------------


def goals() -> str:
    """Every goal with the range of what was measured for it."""
    header = ["what", "goal", "measured", "verdict", "without numba"]
    lines = []
    for goal in GOALS:
        plain = goal.without_numba
        others = " ".join(judged(plain)) if plain and measured(plain) else ""
        lines.append([goal.text, goal.shown(), *judged(goal), others])
    return table(header, lines)


def judged(goal: Goal) -> tuple[str, str]:
    """The range of what was measured for a goal, and the verdict."""
    values = [value for _, value in measured(goal)]
    if not values:
        return "", "not measured yet"
    digits = ".0f" if goal.in_megabytes else ".2f"
    low, high = (f"{value:{digits}}" for value in (min(values), max(values)))
    missed = sum(not goal.met(value) for value in values)
    verdict = "met" if not missed else "missed" if missed == len(values) else f"missed in {missed} of {len(values)}"
    return low if low == high else f"{low} to {high}", verdict


def measured(goal: Goal) -> list[tuple[str, float]]:
    """(case, value) of all that a goal is about."""
    rows = [row for row in read(goal.file) if re.search(goal.case, row["case"])]
    if goal.file != "memory":
        return [
            (row["case"], float(row["ratio"]))
            for row in rows
            if (row["subject"], row["baseline"]) == (goal.subject, goal.baseline)
        ]
    found = {(row["case"], row["contestant"]): row for row in rows}
    values = []
    for case in dict.fromkeys(row["case"] for row in rows):
        subject, baseline = found.get((case, goal.subject)), found.get((case, goal.baseline))
        if subject and not goal.baseline:
            values.append((case, float(subject["extra_mb"])))
        elif subject and baseline:
            values.append((case, float(subject["process_mb"]) / float(baseline["process_mb"])))
    return values


def ratios(what: str) -> str:
    """All pairs of a file, with the goals that some have."""
    return missing(what) or "\n\n".join([conditions(what), picture(what), ratio_table(read(what), what)])


def ratio_table(rows: Sequence[Row], what: str) -> str:
    """Ratios with quartiles and times, one row per pair."""
    lines = []
    for row in rows:
        times = f"{ms(row['subject_ms'])} / {ms(row['baseline_ms'])}"
        lines.append(
            [row["case"], f"{row['subject']} / {row['baseline']}", f"{float(row['ratio']):.2f}", spread(row), times]
        )
        goal = goal_of(row, what)
        lines[-1].append(f"{goal.shown()}, {'met' if goal.met(float(row['ratio'])) else 'missed'}" if goal else "")
    return table(["case", "pair", "ratio", "quartiles", "ms", "goal"], lines)


def goal_of(row: Row, what: str) -> Goal | None:
    """The goal that a row of times is held against."""
    pair = row["subject"], row["baseline"]
    fits = (
        g for g in ALL_GOALS if g.file == what and (g.subject, g.baseline) == pair and re.search(g.case, row["case"])
    )
    return next(fits, None)


def parts(what: str) -> str:
    """Pairs that are no shares first, then the stages of each whole."""
    if message := missing(what):
        return message
    stages, pairs = split(read(what))
    blocks = [conditions(what), picture(what)]
    if pairs:
        blocks.append(ratio_table(pairs, what))
    lines = []
    for case, rows in by_case(stages):
        for row in rows:
            lines.append([case, row["subject"], ms(row["subject_ms"]), f"{100 * float(row['ratio']):.1f} %"])
        whole = rows[0]
        count = int(whole.get("images") or 0)
        speed = f", {1000 * count / float(whole['baseline_ms']):.0f} images/s" if count else ""
        lines.append([case, f"**whole**{speed}", ms(statistics.median(float(r["baseline_ms"]) for r in rows)), ""])
    blocks.append(table(["case", "stage", "ms", "share of the whole"], lines))
    if what == "detector":
        blocks.append(reported_parts())
    return "\n\n".join(blocks)


def reported_parts() -> str:
    """What mmdetection's implementation of the same detector took elsewhere."""
    lines = [
        [REPORTED, stage, ms(time), f"{100 * time / REPORTED_WHOLE:.1f} %"] for stage, time in REPORTED_PARTS.items()
    ]
    lines += [[REPORTED, "**whole**", ms(REPORTED_WHOLE), ""], [REPORTED, "training step", ms(REPORTED_STEP), ""]]
    return table(["reported, on another machine", "stage", "ms", "share of the whole"], lines)


def split(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """(rows that are stages of a whole, other rows)."""
    stages = [
        row for row in rows if row["baseline"] in ("whole", "predict") and not row["subject"].startswith("predict")
    ]
    return stages, [row for row in rows if row not in stages]


def memory() -> str:
    """Peaks of all contestants."""
    if message := missing("memory"):
        return message
    lines = []
    for row in read("memory"):
        goal = next(
            (
                g
                for g in ALL_GOALS
                if g.in_megabytes and g.subject == row["contestant"] and re.search(g.case, row["case"])
            ),
            None,
        )
        value = float(row["extra_mb"])
        verdict = f"{goal.shown()}, {'met' if goal.met(value) else 'missed'}" if goal else ""
        lines.append(
            [row["case"], row["contestant"], f"{value:.0f}", spread(row, 0), f"{float(row['process_mb']):.0f}", verdict]
        )
    header = ["case", "contestant", "MB over the inputs", "quartiles", "MB of the process", "goal"]
    context = f"{REPORTED}, the same training step on another machine: {REPORTED_PEAK} MB of the process."
    return "\n\n".join([conditions("memory"), picture("memory"), table(header, lines), context])


def missing(what: str) -> str:
    """A sentence where there is nothing to show; empty otherwise."""
    return "" if read(what) else f"Not measured yet: `dyhead-zoo benchmark {what} --csv hub/benchmarks/{what}.csv`."


def conditions(what: str) -> str:
    """Machine, threads, turns and versions, as the rows say."""
    rows = read(what)
    names = ("dyhead_zoo", "torch", "torchvision", "timm", "numba", "onnxruntime", "openvino", "pycocotools", "hotcoco")
    versions = ", ".join(f"{name} {rows[0][name]}" for name in names if rows[0].get(name))
    threads = rows[0]["threads"]
    kind = "processes" if what == "memory" else "turns"
    return (
        f"Measured on: {rows[0]['machine']}, {threads} thread{'s' if threads != '1' else ''}; {versions}. "
        f"Medians of {rows[0]['reps']} {kind}."
    )


def picture(what: str) -> str:
    """The figure's place in the page."""
    if what == "memory":
        text = "Peak memory of each contestant"
    else:
        text = "Ratios with quartiles and goals" if what in COMPARED else "Time of each stage"
    return f'<div class="figure" markdown>\n![{text}](assets/{figure_name(what)})\n</div>'


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table that scrolls by itself."""
    text = "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))
    return f'<div class="wide" markdown>\n\n{text}\n\n</div>'


def spread(row: Row, digits: int = 2) -> str:
    """Lower and upper quartile."""
    return f"{float(row['lower']):.{digits}f} to {float(row['upper']):.{digits}f}"


def ms(value: str | float) -> str:
    """Milliseconds with three digits that count."""
    number = float(value)
    return f"{number:.{0 if number >= 100 else 1 if number >= 10 else 2}f}"


def by_case(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Rows of each case, in the file's order."""
    for case in dict.fromkeys(row["case"] for row in rows):
        yield case, [row for row in rows if row["case"] == case]


# -- figures -----------------------------------------------------------------------------------------------------------


def ratios_figure(what: str, rows: Sequence[Row]) -> str:
    """Each ratio as a dot with its quartiles as a line; the goal as a bar across."""
    rows = [row for row in rows if not row["subject"].startswith("torchvision")]
    pairs = list(dict.fromkeys((row["subject"], row["baseline"]) for row in rows))
    rows = sorted(rows, key=lambda row: (pairs.index((row["subject"], row["baseline"])), row["case"].split()[-1]))
    left, width, step, top = 400, 540, 20, 54
    most = max([float(row["upper"]) for row in rows] + [1.5])
    scale = width / most
    drawing = Drawing(left + width + 60, top + step * len(rows) + 30, f"benchmark {what}: ratios of times")
    drawing.text(
        10, 24, "Ratio of times: dot and line are median and quartiles, red is the goal", size=15, weight="bold"
    )
    bottom = top + step * len(rows)
    for tick in range(int(2 * most) + 1):
        x = left + scale * tick / 2
        drawing.line([(x, top - 8), (x, bottom)], color=GREY if tick == 2 else PALE)
        drawing.text(x, bottom + 18, f"{tick / 2:.1f}", color=GREY, anchor="middle")
    for number, row in enumerate(rows):
        y = top + step * number + 4
        drawing.text(left - 10, y + 4, f"{row['case']}: {row['subject']} / {row['baseline']}", anchor="end")
        low, middle, high = (left + scale * float(row[key]) for key in ("lower", "ratio", "upper"))
        label = high + 10
        if goal := goal_of(row, what):
            limit = left + scale * goal.limit
            drawing.rect(limit - 1.5, y - 8, 3, 16, "#d62728")
            label = limit + 8 if high < limit < high + 40 else label
        drawing.line([(low, y), (high, y)], color=INK)
        drawing.circle(middle, y, 4.5, COLOURS[0])
        drawing.text(label, y + 4, f"{float(row['ratio']):.2f}", size=11)
    return str(drawing)


def parts_figure(what: str, rows: Sequence[Row]) -> str:
    """The stages of each whole, one bar of stacked pieces for each case."""
    bars: dict[str, dict[str, float]] = {}
    totals: dict[str, float] = {}
    for case, members in by_case(split(rows)[0]):
        bars[case] = {row["subject"]: float(row["subject_ms"]) for row in members}
        totals[case] = statistics.median(float(row["baseline_ms"]) for row in members)
    if what == "detector":
        bars[REPORTED], totals[REPORTED] = REPORTED_PARTS, REPORTED_WHOLE
    stages = list(dict.fromkeys(stage for bar in bars.values() for stage in bar))
    left, width, step, top = 360, 560, 40, 76
    scale = width / max([*totals.values(), *(sum(bar.values()) for bar in bars.values())])
    drawing = Drawing(left + width + 120, top + step * len(bars) + 10, f"benchmark {what}: time of each stage")
    drawing.text(10, 24, "Milliseconds of each stage; grey is the rest of the whole", size=15, weight="bold")
    for number, stage in enumerate(stages):
        drawing.rect(10 + 130 * number, 40, 12, 12, COLOURS[number % len(COLOURS)])
        drawing.text(28 + 130 * number, 51, stage)
    for number, (case, bar) in enumerate(bars.items()):
        y = top + step * number
        drawing.text(left - 10, y + 18, case, anchor="end", color=GREY if case == REPORTED else INK)
        drawing.rect(left, y, scale * totals[case], 26, PALE)
        x = float(left)
        for stage, milliseconds in bar.items():
            drawing.rect(x, y, scale * milliseconds, 26, COLOURS[stages.index(stage) % len(COLOURS)])
            x += scale * milliseconds
        drawing.text(max(x, left + scale * totals[case]) + 8, y + 18, f"{ms(totals[case])} ms")
    return str(drawing)


def memory_figure(rows: Sequence[Row]) -> str:
    """A bar for each contestant, each case on a scale of its own, with the goals."""
    left, width, step = 200, 560, 26
    cases = list(by_case(rows))
    height = 50 + sum(34 + step * len(members) for _, members in cases)
    drawing = Drawing(left + width + 120, height, "benchmark memory: peaks over the inputs")
    drawing.text(10, 24, "Peak memory over the inputs, MB; red is the goal", size=15, weight="bold")
    y = 50.0
    for case, members in cases:
        drawing.text(10, y + 14, case, weight="bold")
        y += 24
        limits = {g.subject: g.limit for g in ALL_GOALS if g.in_megabytes and re.search(g.case, case)}
        scale = width / max([float(row["extra_mb"]) for row in members] + list(limits.values()))
        for row in members:
            value = float(row["extra_mb"])
            drawing.text(left - 10, y + 14, row["contestant"], anchor="end")
            drawing.rect(left, y, scale * value, 18, COLOURS[0])
            if row["contestant"] in limits:
                drawing.rect(left + scale * limits[row["contestant"]] - 1.5, y - 2, 3, 22, "#d62728")
            drawing.text(left + scale * max(value, limits.get(row["contestant"], 0)) + 8, y + 14, f"{value:.0f}")
            y += step
        y += 10
    return str(drawing)
