"""Measured steps beside predicted ones: `python -m tests.analysis.predictions` prints the table of docs/analysis.md.

Measured figures stand in that table alone, where this reads them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from transformers import LlamaConfig

from vllm_compile.analysis.cost import Workload
from vllm_compile.analysis.graph import Call, calls
from vllm_compile.analysis.kernels import Chooser, library
from vllm_compile.analysis.savings import Step, run_in_step
from vllm_compile.driver import fuse_model
from vllm_compile.targets import CHIPS, resolve

DOCS = Path(__file__).parents[2] / "docs" / "analysis.md"
ROW = re.compile(
    r"^\| (?P<chip>h\d00) \| (?P<model>[^|]+) \| (?P<engine>compiled|vLLM) \| (?P<phase>decode|prefill) "
    r"\| (?P<batch>\d+) \| (?P<context>[\d,]+) "
    r"\| (?P<measured>[\d.]+) \| (?P<predicted>[\d.]+) \| (?P<error>[+-]\d+) % \|$",
    re.MULTILINE,
)
COMMON = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "dtype": "bfloat16",
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int, head_dim: int, tied: bool = False) -> dict:
    return {
        **COMMON,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "tie_word_embeddings": tied,
    }


MODELS = {
    "Llama-3.2-1B": _sizes(2048, 8192, 16, 32, 64, tied=True),
    "Llama-3.1-8B": _sizes(4096, 14336, 32, 32, 128),
    "Llama-3.1-70B": _sizes(8192, 28672, 80, 64, 128),
}


@dataclass(frozen=True)
class Row:
    """A line of the table: milliseconds of a step, and the prediction's error in percent, as they are written there."""

    chip: str
    model: str
    engine: str
    phase: str
    batch: int
    context: int
    measured: float
    predicted: float
    error: int

    def text(self) -> str:
        """The line."""
        figures = f"{self.measured:.4g} | {self.predicted:.4g} | {self.error:+d} %"
        what = f"{self.chip} | {self.model} | {self.engine} | {self.phase} | {self.batch} | {self.context:,}"
        return f"| {what} | {figures} |"


def rows() -> list[Row]:
    """The table of docs/analysis.md."""
    return [
        Row(
            match["chip"],
            match["model"],
            match["engine"],
            match["phase"],
            int(match["batch"]),
            int(match["context"].replace(",", "")),
            float(match["measured"]),
            float(match["predicted"]),
            int(match["error"]),
        )
        for match in ROW.finditer(DOCS.read_text())
    ]


@cache
def _calls(model: str) -> Sequence[Call]:
    """Its operators; tracing takes two layers, as all are alike."""
    sizes = MODELS[model]
    module, _ = fuse_model(LlamaConfig(**sizes | {"num_hidden_layers": 2}), "bfloat16")
    found = run_in_step(calls(module))
    assert {call.times for call in found} == {1, 2}
    return [replace(call, times=sizes["num_hidden_layers"]) if call.times == 2 else call for call in found]


def predicted(row: Row) -> Row:
    """The row as the analysis says it is today, with rotation and attention apart as when it was measured."""
    workload = Workload(row.batch, 1, row.context) if row.phase == "decode" else Workload(row.batch, row.context, 0)
    execution = library if row.engine == "vLLM" else Chooser(resolve(row.chip)).compiled
    step = Step(workload, "bfloat16", CHIPS["cuda"][row.chip])
    milliseconds = float(f"{step.total(_calls(row.model), execution).time.total * 1e3:.4g}")
    return replace(row, predicted=milliseconds, error=round(100 * (milliseconds / row.measured - 1)))


if __name__ == "__main__":
    for row in rows():
        print(predicted(row).text())
