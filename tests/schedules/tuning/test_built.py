"""CUDA's candidates: built here, measured on a machine with a GPU, for which a CPU stands in, thread by thread."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests import models
from tests.cuda_on_host.prim_func import run_kernel
from tests.cuda_on_host.runner import AVAILABLE
from tests.schedules.database.samples import CPU, H200
from vllm_compile.cli import main
from vllm_compile.driver import lower_model
from vllm_compile.errors import VllmCompileError
from vllm_compile.schedules.database import Match, commit, lookup, open_database
from vllm_compile.schedules.database.machine import fingerprint
from vllm_compile.schedules.database.tuned import TunedKernels
from vllm_compile.schedules.select import choose, token_ranges
from vllm_compile.schedules.tuning import device, measure
from vllm_compile.schedules.tuning.built import build, built
from vllm_compile.schedules.tuning.device import BROKEN, Cpu, Cuda
from vllm_compile.schedules.tuning.extract import tasks_of
from vllm_compile.schedules.tuning.prepare import call_of
from vllm_compile.schedules.tuning.task import MEASURE_BUILT, Task
from vllm_compile.targets import resolve

TARGET = resolve("cuda")
GPU = {"device": "NVIDIA H200", "core_mhz": 1980, "memory_mhz": 3201, "driver": "580.82.07"}
pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None or not AVAILABLE, reason="needs nvcc and g++")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cuda") / "model"
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "head_dim": 64, "vocab_size": 160}
    models.save(directory, 1, dtype="bfloat16", num_key_value_heads=2, **sizes)
    return directory


@pytest.fixture(scope="module")
def task(model):
    """The down projection up to 16 tokens: in each of two ranges the default and another candidate."""
    tasks = tasks_of(lower_model(model, TARGET), TARGET, trials=2)
    found = next(task for task in tasks if "model_mlp_down_proj_weight" in task.names)
    return replace(found, ranges=found.ranges[:1])


@pytest.fixture(scope="module")
def folder(task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    assert list(build([task], folder)) == [task]
    return folder


class EmulatedGpu(Cpu):
    """A GPU in all but its name and where tensors lie."""

    name = "an emulator"
    machine = Cuda.machine


@pytest.fixture
def emulated(folder, monkeypatch):
    """Kernels run by emulation of the PrimFuncs that the library was made of; `broken` ones give something else."""
    tasks, broken = [], set()

    def load(library):
        assert library.is_file()
        (task,) = tasks
        configs = json.loads((library.parent / "case.json").read_text())["configs"]
        spec = call_of(json.loads(task.ranges[0].workload.text))
        family = choose(spec, TARGET).family

        def kernel(symbol):
            function = family.build(spec, configs[symbol], TARGET)

            def call(*tensors):
                tensors = [torch.from_dlpack(tensor) for tensor in tensors]
                run_kernel(function, *tensors)
                if symbol in broken:
                    tensors[-1][0, 0] += 1

            return call

        return kernel

    monkeypatch.setattr(EmulatedGpu, "load", lambda gpu, library: load(library))
    monkeypatch.setattr(measure, "COLD_BYTES", 1)
    monkeypatch.setattr(measure, "TURNS", 1)
    monkeypatch.setattr(measure, "FINAL_TURNS", 2)
    monkeypatch.setitem(device.DEVICES, "cuda", EmulatedGpu)
    monkeypatch.setattr(device, "with_gpu", lambda machine: replace(machine, **GPU))
    found, machine = built(folder)
    tasks += found
    return SimpleNamespace(task=found[0], machine=machine, broken=broken)


def test_measured_elsewhere_and_found_by_compile(emulated, task, database):
    """Its record is of the machine with the GPU; one without a GPU, which compiles, finds it by the architecture."""
    assert replace(emulated.task, method=task.method, built="") == task
    assert (emulated.machine.device, emulated.machine.driver, emulated.machine.arch) == (
        GPU["device"],
        GPU["driver"],
        "sm_90a",
    )
    outcome = measure.measure_built(emulated.task.payload())
    (summary,), (record,) = outcome.result, outcome.records
    assert (summary["tried"], summary["wrong"]) == (len(task.ranges[0].configs), [])
    assert record.verdict.error <= 1
    assert record.verdict.executed_on == "an emulator"
    assert (record.target, record.workload) == (emulated.machine, task.ranges[0].workload)
    commit(database, [replace(record, target=replace(record.target, driver=""))])
    spec = call_of(json.loads(record.workload.text))
    first = choose(spec, TARGET, tuned=TunedKernels(database, fingerprint(TARGET))).variants[0]
    assert first.config == record.schedule.content()["config"]
    assert (first.record["match"], first.record["how"]) == (Match.ARCHITECTURE, "measured")


def test_a_wrong_kernel_is_not_preferred(emulated, task):
    default, other = task.ranges[0].configs
    emulated.broken.add("k1")
    outcome = measure.measure_built(emulated.task.payload())
    assert outcome.result[0]["wrong"] == [other]
    assert outcome.records[0].schedule.content()["config"] == default
    emulated.broken.add("k0")
    with pytest.raises(RuntimeError, match=r"the default .* is wrong"):
        measure.measure_built(emulated.task.payload())


def test_candidates_are_those_that_compile_admits(model):
    for task in tasks_of(lower_model(model, TARGET), TARGET, trials=10**3):
        spec = call_of(json.loads(task.ranges[0].workload.text))
        choice = choose(spec, TARGET)
        for wanted, (least, _) in zip(task.ranges, token_ranges(choice.variants, choice.vendor), strict=True):
            assert len(wanted.configs) > 1
            assert all(choice.family.admits(spec, c, least, TARGET) for c in wanted.configs)
        assert Task.from_json(json.loads(json.dumps(task.to_json()))) == task


def test_from_the_command_line(folder, emulated, task, tmp_path, monkeypatch, capsys):
    """What `--build` made is measured once; the second time it is known."""

    class InThisProcess:
        def run(self, held, lost):
            assert held.kind == MEASURE_BUILT
            return measure.measure_built(json.loads(json.dumps(held.payload)))

        def close(self):
            pass

    monkeypatch.setattr("vllm_compile.cli_tune._executor", lambda method: InThisProcess())
    url = str(tmp_path / "tuning.db")
    for state in ("done", "known"):
        assert main(["tune", "--measure", str(folder), "--db", url, "--json"]) == 0
        (told,) = json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"]
        assert (told["state"], told["weights"]) == (state, list(task.names))
    with open_database(url, writable=False) as database:
        assert lookup(database, task.ranges[0].workload, emulated.machine).match == Match.EXACT


def test_a_folder_of_an_older_form_is_refused(folder, tmp_path):
    older = tmp_path / "older"
    shutil.copytree(folder, older)
    (case,) = older.glob("task*/case.json")
    case.write_text(json.dumps({k: v for k, v in json.loads(case.read_text()).items() if k != "seed"}))
    with pytest.raises(VllmCompileError, match=r"older vllm-compile: `tune --build` it again"):
        built(older)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(model, capfd):
    assert main(["tune", "--model", str(model), "--target", "cuda", "--db", "x.db"]) == 2
    assert "--build DIR" in capfd.readouterr().err


def test_a_device_that_answers_no_more_ends_its_process(monkeypatch):
    """So that the search takes it for a crash, and looks for the candidate."""
    ended = []
    monkeypatch.setattr("os._exit", ended.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda where: None)
    Cuda().check()
    assert ended == []

    def fail(where):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    Cuda().check()
    assert ended == [BROKEN]


def test_a_gpu_is_timed_by_a_graph_of_all_copies(monkeypatch):
    """All calls are captured, in turns, until they are enough; a turn replays them, and its time is shared out."""
    captured, replayed = [], []
    events = lambda enable_timing: SimpleNamespace(  # noqa: E731
        record=lambda: None, synchronize=lambda: None, elapsed_time=lambda end: 0.012
    )
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: replayed.append(1)))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", events)
    monkeypatch.setattr(device, "torch_stream", lambda where: nullcontext())
    monkeypatch.setattr(device, "GRAPH_CALLS", 4)
    timer = Cuda().timer([lambda i=i: captured.append(i) for i in range(3)])
    assert timer(7) == pytest.approx(2.0)
    assert timer(8) == pytest.approx(2.0)
    assert (captured, len(replayed)) == ([0, 1, 2] * 2, 2)


def test_a_task_may_name_part_of_a_machine():
    """Who submits without a GPU knows no driver: any worker of the architecture will do; but no other."""
    unknown = replace(H200, driver="", device="", core_mhz=0, memory_mhz=0)
    assert unknown.key != H200.key
    assert unknown.describes(H200)
    assert H200.describes(H200)
    assert not H200.describes(unknown)
    assert not unknown.describes(replace(H200, arch="sm_100a"))
    assert not unknown.describes(CPU)
