"""The worker that an artifact is served by on a GPU; what it adds to vLLM's needs none."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu_worker import Worker

from vllm_compile.runtime import vllm_runner, vllm_worker
from vllm_compile.runtime.vllm_worker import CompiledWorker


@pytest.mark.parametrize(("name", "given"), [("init_device", ()), ("wake_up", (["kv_cache"],)), ("wake_up", ())])
def test_the_runner_repeats_steps_from_then_on(monkeypatch, name, given):
    """Behind what vLLM does: it makes the runner in the one, and gives it memory without contents in the other."""
    done = []

    def vllms(self, *tags):
        done.append(tags)
        self.model_runner = "a runner"

    monkeypatch.setattr(Worker, name, vllms)
    monkeypatch.setattr(vllm_runner, "repeat_steps", done.append)
    getattr(object.__new__(CompiledWorker), name)(*given)
    assert done == [given, "a runner"]


@pytest.mark.parametrize(
    ("mode", "sleeps", "recorded"),
    [("FULL_DECODE_ONLY", False, True), ("NONE", False, False), ("FULL_DECODE_ONLY", True, False)],
)
def test_prompts_are_recorded_behind_vllms_graphs(monkeypatch, mode, sleeps, recorded):
    """Where vLLM has graphs of whole steps, and keeps their memory."""
    done = []
    worker = object.__new__(CompiledWorker)
    worker.vllm_config = SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode[mode]),
        model_config=SimpleNamespace(enable_sleep_mode=sleeps),
    )
    model = SimpleNamespace(record_prompts=done.append, prompts="of the first time")
    worker.model_runner = SimpleNamespace(get_model=lambda: model)
    monkeypatch.setattr(Worker, "compile_or_warm_up_model", lambda self: done.append(model.prompts) or "times")
    assert worker.compile_or_warm_up_model() == "times"
    assert done == [None, *([worker.vllm_config] if recorded else [])], "vLLM captures what the program launches"

    def fails(config):
        raise torch.OutOfMemoryError("of a GPU")

    model.record_prompts = fails
    warned = []
    monkeypatch.setattr(vllm_worker.logger, "warning", warned.append)
    assert worker.compile_or_warm_up_model() == "times", "what has no graph is served all the same"
    assert len(warned) == recorded


def test_a_vllm_whose_runner_is_made_of_other_parts(monkeypatch):
    """Serves, and says so."""
    said = []
    monkeypatch.setattr(Worker, "init_device", lambda self: None)
    monkeypatch.setitem(sys.modules, vllm_runner.__name__, None)
    monkeypatch.setattr(vllm_worker.logger, "info", lambda text, *values: said.append(text % values))
    object.__new__(CompiledWorker).init_device()
    (line,) = said
    assert line.startswith("Each step's inputs are prepared anew: ")
