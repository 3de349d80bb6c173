"""The report in a real browser."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import pairwise

import pytest
from jinja2 import Environment, FileSystemLoader

from tests.analysis.browser import Page, open_page, screenshot
from vllm_compile.analysis import report
from vllm_compile.analysis.analyze import Analysis, analyze
from vllm_compile.analysis.report import context_of, render, roofline
from vllm_compile.targets.cuda import H200

SCRIPT = "<script>document.title='taken'</script>"
IMAGE = "<img src=x onerror=alert(1)>"


@pytest.fixture
def show(tmp_path):
    """`show(html)` -> the page as a browser holds it."""
    profiles = iter(range(9))

    def run(html: str, *switches: str) -> Page:
        file = tmp_path / "report.html"
        file.write_text(html)
        return open_page(file, tmp_path / f"profile{next(profiles)}", *switches)

    return run


def test_page(analysis, show):
    """Every operator is a point in each step's plot, a bar, and a box if it stands in a layer; nothing is loaded."""
    page = show(render(analysis))
    steps, ops = analysis.steps, analysis.steps[0].ops
    assert page.count("svg", "roofline") == page.count("div", "step") == len(steps)
    assert page.count("circle", "point") == sum(op.flops > 0 for step in steps for op in step.ops)
    assert page.count("div", "bar") == sum(len(step.ops) for step in steps)
    assert page.count("rect", "node") == sum(op.function == "layer_0" for op in ops)
    assert page.count("polyline", "roof") == len(steps)
    assert "linear down_proj" in page.html
    assert page.console == []
    assert page.requests == []
    assert page.count("script") == page.count("link", "stylesheet") == page.count("iframe") == 0


def test_points_are_where_their_figures_are(analysis, show):
    """In the browser's own coordinates: to the right by intensity, upwards by FLOP/s, none above the roof."""
    step = analysis.steps[0]
    plot = roofline(step, analysis.chip, "bfloat16")
    circles = [e.attributes for e in show(render(analysis)).elements if e.tag == "circle"]
    drawn = [(float(c["cx"]), float(c["cy"])) for c in circles[: len(plot.points)]]
    assert drawn == [(point.x, point.y) for point in plot.points]
    ops = [op for op in step.ops if op.flops]
    by_intensity = sorted(range(len(ops)), key=lambda i: ops[i].intensity)
    assert sorted(range(len(ops)), key=lambda i: drawn[i][0]) == by_intensity
    for op, (_, y) in zip(ops, drawn, strict=True):
        assert y >= plot.y.at(min(analysis.chip.bandwidth * op.intensity, analysis.chip.matrix["bfloat16"]))
    heights = sorted(point.label_y for point in plot.points)
    assert all(b - a >= report.LABEL_GAP - 1e-6 for a, b in pairwise(heights)), "labels overlap"


@pytest.fixture
def hostile(config_directory, tmp_path) -> Analysis:
    """A model whose directory and architecture are HTML."""
    directory = tmp_path / f"small {IMAGE}"
    shutil.copytree(config_directory(), directory)
    config = directory / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", SCRIPT))
    return analyze(directory, "cuda", [1], [8], H200)


def injected(page: Page) -> int:
    """Elements that only a model's own words can have made."""
    return page.count("script") + page.count("img")


def test_what_configurations_say_is_text(hostile, show):
    page = show(render(hostile))
    assert injected(page) == 0
    assert "&lt;script&gt;" in page.html
    assert "&lt;img src=x" in page.html
    assert "<title>small &lt;img" in page.html


def test_an_unescaped_template_is_noticed(hostile, show):
    """Negative control; even there the page's policy lets no script run."""
    folder = FileSystemLoader(report.TEMPLATE_FOLDER)
    careless = Environment(loader=folder, autoescape=False, trim_blocks=True)
    page = show(careless.get_template(report.TEMPLATE).render(**context_of(hostile)))
    assert injected(page) > 0
    assert "<title>taken" not in page.html


def test_a_page_that_loads_and_fails_is_noticed(analysis, show):
    """Negative control of the checks above: without its policy, with an address and a broken script."""
    html = render(analysis).replace("http-equiv", "name")
    page = show(
        html.replace("</body>", "<script src='http://127.0.0.1:9/x.js'></script><script>broken()</script></body>")
    )
    assert page.console
    assert page.requests == ["http://127.0.0.1:9/x.js"]


def test_it_can_be_looked_at(analysis, tmp_path):
    """In light and dark: two pictures that differ."""
    file = tmp_path / "report.html"
    file.write_text(render(analysis))
    images = [tmp_path / "light.png", tmp_path / "dark.png"]
    for number, (image, switches) in enumerate(zip(images, ([], ["--force-dark-mode"]), strict=True)):
        screenshot(file, tmp_path / f"picture{number}", image, *switches)
    light, dark = (image.read_bytes() for image in images)
    assert min(len(light), len(dark)) > 50_000
    assert light != dark


def test_what_does_not_fit_is_said(analysis):
    small = replace(analysis, chip=replace(analysis.chip, memory_bytes=1000))
    assert "too large" in render(small)
    assert "too large" not in render(analysis)
