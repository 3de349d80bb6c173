"""Predicted steps beside measured ones: the table of docs/analysis.md, and a CPU on the spot."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.analysis import predictions
from vllm_compile import lossless
from vllm_compile.driver import CompileOptions, compile_model
from vllm_compile.targets import CHIPS

LIMIT = 25  # percent
BASELINE = Path(__file__).parents[2] / "benchmarks" / "baseline.md"
LINEAR = re.compile(
    r"^\| Llama\S+ \| \w+ \| (\d+) x (\d+) \| 1 \| ([\d.]+) \| [\d.]+ \| [\d.]+ \| [^|]+ \| ([\d.]+) \|", re.MULTILINE
)


def within(predicted: float, measured: float) -> bool:
    return abs(predicted / measured - 1) <= LIMIT / 100


def test_documented_steps():
    """Each line of the table is what the analysis says today, and within the limit."""
    rows = predictions.rows()
    assert {row.model for row in rows} == set(predictions.MODELS)
    assert {(row.chip, row.engine) for row in rows} == {("h200", "vLLM"), ("h100", "vLLM"), ("h100", "compiled")}
    batches = {row.batch for row in rows if (row.chip, row.model, row.phase) == ("h200", "Llama-3.1-8B", "decode")}
    assert batches == {1, 8, 16, 64, 256}
    for row in rows:
        assert predictions.predicted(row) == row, "print the table again: python -m tests.analysis.predictions"
        assert abs(row.error) <= LIMIT, row.text()
        assert within(row.predicted, row.measured), row.text()


def test_a_wrong_chip_is_noticed():
    """Negative control: the same steps on a chip of two thirds of the bandwidth are not within the limit."""
    rows = [row for row in predictions.rows() if row.chip == "h200" and row.phase == "decode" and row.batch == 1]
    slower = [predictions.predicted(replace(row, chip="h100")) for row in rows]
    assert not any(within(row.predicted, row.measured) for row in slower if row.model != "Llama-3.2-1B")


@pytest.mark.parametrize("name", ["h200", "h100"])
def test_launches_are_those_of_linear_layers_alone(name):
    """The constants of `targets/cuda.py` from the tables that they come from."""
    chip = CHIPS["cuda"][name]
    section = BASELINE.read_text().split(f"## Linear layers on an {name.upper()}")[1].split("\n## ")[0]
    ours, vendor = [], []
    for n, k, cublas_us, lossless_us in LINEAR.findall(section):
        N, K = int(n), int(k)
        vendor.append(float(cublas_us) * 1e-6 - 2 * N * K / chip.sustained_bandwidth)
        ours.append(float(lossless_us) * 1e-6 - lossless.offsets(N, K)[2] / chip.sustained_bandwidth)
    assert len(ours) >= 5
    assert statistics.median(ours) == pytest.approx(chip.launch, abs=0.1e-6)
    assert chip.vendor_launch == pytest.approx(statistics.median(vendor), abs=0.1e-6)


@pytest.mark.slow
@pytest.mark.timed
def test_steps_on_this_cpu(config_directory, tmp_path):
    """A decode step and a prefill that really run, on one thread, weights packed as they are by default.

    Up to three tries, as others may be at work.
    """
    sizes = {
        "vocab_size": 48000,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
    }
    config = config_directory(**sizes)
    artifact = compile_model(config, "cpu", tmp_path / "artifact", CompileOptions(weightless=True)).artifact
    command = [sys.executable, "-m", "tests.analysis.cpu_steps", config, artifact, "lossless"]
    seen = []
    for _ in range(3):
        done = subprocess.run(
            ["env", "OMP_NUM_THREADS=1", *command], capture_output=True, text=True, cwd=Path(__file__).parents[2]
        )
        assert done.returncode == 0, done.stderr
        seen.append(json.loads(done.stdout.splitlines()[-1]))
        if all(within(*seen[-1][step]) for step in ("decode 1", "prefill 1")):
            break
    else:
        pytest.fail(f"predicted and measured milliseconds: {seen}")
    decode, prefill = seen[-1]["decode 1"], seen[-1]["prefill 1"]
    assert not within(decode[0], prefill[1]), "negative control: the one is not the other"
