"""The analysis as a page to look at: one file, nothing loaded from elsewhere, no script.

Geometry is computed here, `report.html.jinja` draws it.  All text goes through jinja2's escaping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log10, sqrt
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vllm_compile.quantities import binary, count, duration
from vllm_compile.relax_passes.outline_layers import FORWARD, LOGITS
from vllm_compile.targets import Chip

from .analyze import Analysis, Edge
from .figures import OpFigures, StepFigures

TEMPLATE_FOLDER, TEMPLATE = Path(__file__).parent, "report.html.jinja"
PLOT_LEFT, PLOT_RIGHT, PLOT_TOP, PLOT_BOTTOM = 70.0, 740.0, 24.0, 400.0
LABEL_X, LABEL_GAP = 776.0, 19.0
NODE_WIDTH, NODE_HEIGHT, NODE_GAP, LANE = 320, 40, 26, 20


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis: powers of ten from `low` to `high` go to `start` to `end`."""

    low: int
    high: int
    start: float
    end: float

    def at(self, value: float) -> float:
        return self.start + (log10(value) - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        return [(self.at(10.0**power), _power(power)) for power in range(self.low, self.high + 1)]


@dataclass(frozen=True)
class Point:
    """An operator in the roofline plot, and its label beside it."""

    x: float
    y: float
    radius: float
    bound: str
    label: str
    label_y: float
    title: str


@dataclass(frozen=True)
class Roofline:
    """A roofline plot: intensity in FLOP/byte to the right, FLOP/s upwards."""

    x: Axis
    y: Axis
    peak: list[tuple[float, float]]
    sustained: list[tuple[float, float]]
    roofs: list[tuple[float, float, str]]
    points: list[Point]


@dataclass(frozen=True)
class Bar:
    """An operator's share of a step, in percent of the longest bar; by what it goes to."""

    op: OpFigures
    total: str
    share: str
    parts: list[tuple[str, float]]
    title: str


@dataclass(frozen=True)
class Node:
    """An operator in the drawing of a function."""

    y: int
    label: str
    detail: str
    bound: str


@dataclass(frozen=True)
class Drawing:
    """A function's operators from top to bottom, and what skips some of them."""

    name: str
    times: int
    width: int
    height: int
    nodes: list[Node]
    arrows: list[tuple[int, int]]
    skips: list[tuple[int, int, int]]


def render(analysis: Analysis) -> str:
    """The page.

    The graph is coloured by the first step.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(**context_of(analysis))


def context_of(analysis: Analysis) -> dict[str, Any]:
    """What the template is given."""
    dtype = analysis.model["dtype"]
    layers = {name: edges for name, edges in analysis.graph.items() if name not in {FORWARD, LOGITS}}
    return {
        "analysis": analysis,
        "steps": [
            {"figures": step, "roofline": roofline(step, analysis.chip, dtype), "functions": _bars(step)}
            for step in analysis.steps
        ],
        "drawings": [_drawing(name, edges, analysis.steps[0]) for name, edges in layers.items()],
        "node_height": NODE_HEIGHT,
        "label_x": LABEL_X,
        "binary": binary,
        "count": count,
        "duration": duration,
    }


def roofline(step: StepFigures, chip: Chip, dtype: str) -> Roofline:
    """Where each operator that computes stands under the chip's roof; its height is what it is predicted to reach."""
    ops = [op for op in step.ops if op.flops]
    reached = [op.flops / (op.predicted_us * 1e-6) for op in ops]
    ridge = chip.matrix[dtype] / chip.bandwidth
    x = Axis(*_powers([op.intensity for op in ops] + [ridge * 3]), PLOT_LEFT, PLOT_RIGHT)
    y = Axis(*_powers([*reached, chip.matrix[dtype] * 1.2]), PLOT_BOTTOM, PLOT_TOP)
    total = step.predicted_ms * 1e3
    labels = _spread([y.at(value) for value in reached])
    points = [
        Point(
            x=x.at(op.intensity),
            y=y.at(value),
            radius=3.5 + 14 * sqrt(op.predicted_us * op.times / total),
            bound=op.bound,
            label=op.label,
            label_y=label_y,
            title=f"{op.label}: {op.intensity:.3g} FLOP/byte, {count(value)}FLOP/s, "
            f"{duration(op.predicted_us * 1e-6)} x {op.times}, {op.predicted_us * op.times / total:.1%} of the step",
        )
        for op, value, label_y in zip(ops, reached, labels, strict=True)
    ]
    roofs = [(PLOT_RIGHT, y.at(chip.matrix[dtype]), f"{count(chip.matrix[dtype])}FLOP/s {dtype} products")]
    return Roofline(
        x,
        y,
        _roof(x, y, chip.bandwidth, chip.matrix[dtype]),
        _roof(x, y, chip.sustained_bandwidth, chip.sustained_matrix[dtype]),
        roofs,
        points,
    )


def _roof(x: Axis, y: Axis, bandwidth: float, flops: float) -> list[tuple[float, float]]:
    """The roof's line, cut off at the plot's edges."""
    lowest = max(10.0**x.low, 10.0**y.low / bandwidth)
    corners = [(lowest, lowest * bandwidth), (flops / bandwidth, flops), (10.0**x.high, flops)]
    return [(x.at(a), y.at(b)) for a, b in corners]


def _powers(values: Sequence[float]) -> tuple[int, int]:
    """The powers of ten around all values."""
    low, high = int(log10(min(values)) // 1), -int(-log10(max(values)) // 1)
    return low, max(high, low + 1)


def _power(power: int) -> str:
    return count(10.0**power).replace(" ", "") if power >= 0 else f"{10.0**power:g}"


def _spread(wanted: Sequence[float]) -> list[float]:
    """Heights near those wanted, in the same order, with room for a line of text between each two."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    placed = [0.0] * len(wanted)
    last = PLOT_TOP - LABEL_GAP
    for index in order:
        last = placed[index] = max(wanted[index], last + LABEL_GAP)
    overflow = PLOT_BOTTOM
    for index in reversed(order):
        overflow = placed[index] = min(placed[index], overflow)
        overflow -= LABEL_GAP
    return placed


def _bars(step: StepFigures) -> dict[str, list[Bar]]:
    """Bars by function, those of one call of it."""
    longest = max(op.predicted_us * op.times for op in step.ops)
    bars: dict[str, list[Bar]] = {}
    for op in step.ops:
        parts = [("memory", op.memory_us), ("compute", op.compute_us), ("launch", op.launch_us)]
        total = op.predicted_us * op.times
        bars.setdefault(op.function, []).append(
            Bar(
                op,
                duration(total * 1e-6),
                f"{total / step.predicted_ms / 1e3:.1%}",
                [(name, 100 * us * op.times / longest) for name, us in parts],
                ", ".join(f"{name} {duration(us * 1e-6)}" for name, us in parts) + " a call",
            )
        )
    return bars


def _drawing(name: str, edges: Sequence[Edge], step: StepFigures) -> Drawing:
    ops = [op for op in step.ops if op.function == name]
    place = {-1: -1} | {op.number: index for index, op in enumerate(ops)}
    links = {(place[e.source], place[e.sink]) for e in edges if e.source in place and e.sink in place}
    pitch = NODE_HEIGHT + NODE_GAP
    nodes = [
        Node((index + 1) * pitch, op.label, f"{duration(op.predicted_us * 1e-6)} · {op.bound}", op.bound)
        for index, op in enumerate(ops)
    ]
    arrows = [((a + 1) * pitch + NODE_HEIGHT, (b + 1) * pitch) for a, b in sorted(links) if b == a + 1]
    far = sorted(((a, b) for a, b in links if b > a + 1), key=lambda link: link[1] - link[0])
    skips = [
        ((a + 1) * pitch + NODE_HEIGHT // 2, (b + 1) * pitch + NODE_HEIGHT // 2, LANE * (lane + 1))
        for lane, (a, b) in enumerate(far)
    ]
    width = NODE_WIDTH + LANE * (len(far) + 1)
    return Drawing(name, ops[0].times if ops else 0, width, (len(ops) + 1) * pitch, nodes, arrows, skips)
