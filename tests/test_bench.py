"""The benchmark on a small model: every peer runs, and the figures are those of what was timed."""

import json

import pytest

from vllm_compile.bench import DECODE_STEPS, step_bytes
from vllm_compile.cli import main
from vllm_compile.runtime.program import load


@pytest.mark.slow
def test_figures(trained_llama, compiled_fp32, capsys):
    command = ["bench", str(compiled_fp32), "--model", str(trained_llama), "--against", "vllm-eager,hf"]
    assert main([*command, "--batch", "2", "--repeats", "1", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {(row["engine"], row["workload"]): row for row in figures["rows"]}
    assert set(rows) == {(e, w) for e in ("compiled", "vllm-eager", "hf") for w in ("decode", "prefill")}
    read = step_bytes(load(compiled_fp32).plan, 2, 128 + DECODE_STEPS["cpu"] // 2)
    for (engine, workload), row in rows.items():
        tokens = 2 if workload == "decode" else row["length"]
        assert row["tokens_per_second"] == pytest.approx(tokens / row["milliseconds"] * 1e3)
        ratio = row["milliseconds"] / rows["compiled", workload]["milliseconds"]
        assert row["speedup"] == pytest.approx(ratio), engine
        if workload == "decode":
            assert row["gigabytes_per_second"] == pytest.approx(read / row["milliseconds"] / 1e6)


def test_unknown_peer(compiled_fp32):
    with pytest.raises(SystemExit):
        main(["bench", str(compiled_fp32), "--against", "llama.cpp"])
