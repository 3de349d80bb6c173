"""Which GPU CUDA calls its first, by a nvidia-smi that tells of made-up ones; and what a worker may measure on it."""

from __future__ import annotations

import pytest

from vllm_compile.cli import main
from vllm_compile.errors import TargetError
from vllm_compile.schedules.database import gpu
from vllm_compile.schedules.database.executors import LocalExecutor
from vllm_compile.schedules.database.machine import fingerprint, with_gpu
from vllm_compile.targets import resolve

from .samples import CPU

FIRST = "0, GPU-11aa22bb-0000, NVIDIA H200, 1980, 3201, 580.82.07, 9.0"
SECOND = "1, GPU-11aa33cc-0000, NVIDIA H200, 1755, 3201, 580.82.07, 9.0"
OLDER = "1, GPU-44dd-0000, NVIDIA A100, 1410, [N/A], 580.82.07, 8.0"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """`machine(rows, **variables)`: a machine of these GPUs; the variables of the environment are those of CUDA."""
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def make(*rows, **variables):
        command = tmp_path / "nvidia-smi"
        command.write_text(f"#!/bin/sh\ncase $1 in *{gpu.FIELDS}) cat <<'END'\n{chr(10).join(rows)}\nEND\nesac\n")
        command.chmod(0o755)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return make


@pytest.mark.parametrize(
    ("visible", "clock"),
    [
        (None, 1980),
        ("0", 1980),
        ("1", 1755),
        (" 1,0", 1755),
        ("GPU-11aa33cc-0000", 1755),
        ("GPU-11aa33,GPU-11aa22", 1755),
        ("GPU-11aa", None),  # begins both
        ("GPU-99", None),
        ("", None),
        ("-1", None),
        ("-1,0", None),
        ("2,0", None),
        ("MIG-11aa22bb-0000", None),
    ],
)
def test_what_is_visible(machine, visible, clock):
    machine(FIRST, SECOND, **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}))
    found = gpu.first_visible()
    assert (None if found is None else found.core_mhz) == clock
    here = fingerprint(resolve("cuda"))
    assert (here.core_mhz, here.device) == ((clock, "NVIDIA H200") if clock else (0, ""))


def test_different_gpus_are_not_told_apart_by_an_index(machine):
    """CUDA's first is the fastest, whichever bus it is on."""
    machine(OLDER.replace("1,", "0,"), SECOND)
    assert gpu.first_visible() is None
    assert gpu.is_ambiguous()
    machine(FIRST, OLDER, CUDA_VISIBLE_DEVICES="2")
    assert not gpu.is_ambiguous(), "there is none"
    machine(FIRST, OLDER, CUDA_VISIBLE_DEVICES="GPU-44dd")
    assert not gpu.is_ambiguous()
    assert (gpu.first_visible().name, gpu.first_visible().memory_mhz) == ("NVIDIA A100", 0)
    machine(FIRST, OLDER, CUDA_VISIBLE_DEVICES="1", CUDA_DEVICE_ORDER="PCI_BUS_ID")
    assert gpu.first_visible().name == "NVIDIA A100"
    assert not gpu.is_ambiguous()


@pytest.mark.parametrize(("rows", "said"), [((FIRST, OLDER), True), ((FIRST, SECOND), False), ((), False)])
def test_a_worker_says_that_it_cannot_tell_its_gpus(machine, rows, said, tmp_path, capfd):
    machine(*rows)
    assert main(["worker", "--db", str(tmp_path / "tuning.db"), "--until-empty"]) == 0
    words = " ".join(capfd.readouterr().err.split())
    assert ("different GPUs, and which is CUDA's first cannot be told" in words) == said


@pytest.mark.parametrize("rows", [(), ("NVIDIA-SMI has failed, because it cannot talk to the driver",)])
def test_no_gpu(machine, rows):
    machine(*rows)
    assert gpu.first_visible() is None
    assert with_gpu(CPU) == CPU


def test_no_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.first_visible() is None


@pytest.mark.parametrize(
    ("rows", "nvcc", "kinds"),
    [
        ([FIRST], True, ["cpu", "cuda"]),
        ([], True, ["cpu"]),
        ([FIRST], False, ["cpu"]),
        ([OLDER.replace("1,", "0,")], True, ["cpu"]),
        ([FIRST.replace("580", "570")], True, ["cpu"]),
    ],
)
def test_what_a_worker_may_measure(machine, tmp_path, monkeypatch, rows, nvcc, kinds):
    """Nothing of a GPU that is not there, cannot run the kernels, or cannot be built for."""

    def missing():
        raise TargetError("nvcc was not found")

    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\necho made up\n")
    compiler.chmod(0o755)
    monkeypatch.setattr("vllm_compile.toolchain.find_nvcc", (lambda: str(compiler)) if nvcc else missing)
    machine(*rows)
    found = LocalExecutor({}, 1).machines()
    assert [machine.kind for machine in found] == kinds
    assert found == [fingerprint(resolve(kind)) for kind in kinds]
