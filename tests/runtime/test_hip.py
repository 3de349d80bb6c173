"""runtime/hip.c over a HIP that is a real library without a GPU: what it loads, launches, restores, and reports."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import tvm_ffi

from tests.rocm_on_host import hip, needs_lld, tensor
from tests.rocm_on_host.tensor import OnGpu, call
from vllm_compile.errors import TargetError
from vllm_compile.runtime import kfd
from vllm_compile.runtime.executor import load_kernels, torch_stream
from vllm_compile.runtime.manifest import check_target
from vllm_compile.schedules.rocm.build import build_library
from vllm_compile.schedules.rocm.elementwise import silu_mul
from vllm_compile.schedules.rocm.paged_attention import paged_attention
from vllm_compile.schedules.rocm.rope_cache import qkv_rope_cache
from vllm_compile.targets.rocm import for_arch

TOKENS, WIDTH = 5, 2080


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("hip") / "kernels.so"
    build_library({"gate": silu_mul(WIDTH), "rope": qkv_rope_cache(4, 2, 32)}, for_arch("gfx90a"), path)
    return path


@pytest.fixture
def kernels(library, tmp_path):
    """Loaded anew: a library knows what it has loaded where."""
    copy = tmp_path / "kernels.so"
    copy.write_bytes(library.read_bytes())
    return load_kernels(copy)


@pytest.fixture
def gate():
    return [torch.zeros(TOKENS, 2 * WIDTH).bfloat16(), torch.zeros(TOKENS, WIDTH).bfloat16()]


@needs_lld
def test_grid_and_arguments_are_as_the_code_object_lays_them_out(kernels, gate):
    with hip.recording() as recorded:
        call(kernels("gate"), *gate)
    (launch,) = recorded.launches
    assert launch.kernel == "gate_kernel"
    assert launch.grid == (TOKENS, -(-WIDTH // 8 // 256), 1)
    assert launch.block == (256, 1, 1)
    x, out = (tensor.data_ptr() for tensor in gate)
    assert launch.arguments == {"x_TC": x, "out_TI": out, "tokens": TOKENS}
    assert launch.pointers == {"x_TC", "out_TI"}


@needs_lld
def test_strides_and_sizes_of_the_cache(kernels):
    kv = torch.zeros(9, 16, 2, 64).bfloat16().transpose(1, 2)  # token major
    given = {
        "qkv": torch.zeros(TOKENS, 8 * 32).bfloat16(),
        "cos": torch.zeros(TOKENS, 32).bfloat16(),
        "sin": torch.zeros(TOKENS, 32).bfloat16(),
        "kv": kv,
        "slots": torch.zeros(TOKENS, dtype=torch.int64),
        "q": torch.zeros(TOKENS, 4, 32).bfloat16(),
    }
    with hip.recording() as recorded:
        call(kernels("rope"), *given.values())
    arguments = recorded.launches[0].arguments
    sizes = {"block_size": 16, "block_stride": 2048, "head_stride": 64, "token_stride": 128, "tokens": TOKENS}
    assert {name: arguments[name] for name in sizes} == sizes
    assert arguments["kv_BHNC"] == kv.data_ptr()


@needs_lld
def test_a_module_is_loaded_once_a_device_and_the_device_is_restored(kernels, gate):
    library, _ = hip.load()
    with hip.recording() as recorded:
        for device in (0, 1, 1, 0):
            call(kernels("gate"), *gate, device=device)
    assert recorded.loads == [("gfx90a", 0), ("gfx90a", 1)]
    assert [launch.device for launch in recorded.launches] == [0, 1, 1, 0]
    current = hip.ctypes.c_int(-1)
    assert library.hipGetDevice(hip.ctypes.byref(current)) == 0
    assert current.value == 0


@pytest.fixture(scope="module")
def attention(tmp_path_factory):
    """Split into two parts at most, of one token."""
    path = tmp_path_factory.mktemp("attention") / "kernels.so"
    build_library({"attention": paged_attention(2, 2, 64, 0.1, 1, 4)}, for_arch("gfx90a"), path)
    return load_kernels(path)("attention")


@needs_lld
def test_parts_of_attention_are_in_a_workspace_of_the_device(attention):
    def arguments(tokens):
        sizes = torch.full((1,), 9, dtype=torch.int32)
        starts = torch.tensor([0, tokens], dtype=torch.int32)
        q, kv = torch.zeros(tokens, 2, 64).bfloat16(), torch.zeros(3, 2, 16, 128).bfloat16()
        return (q, kv, torch.zeros(1, 2, dtype=torch.int32), sizes, starts, torch.empty_like(q))

    with hip.recording() as recorded:
        for device in (0, 1, 0):
            call(attention, *arguments(1), device=device)
        call(attention, *arguments(2))
    grids = [launch.grid for launch in recorded.launches]
    assert grids == 3 * [(2, 1, 2), (2, 1, 1)] + [(2, 2, 1)], "two tokens are not split"
    first, second, again = (
        {launch.arguments["workspace"] for launch in recorded.launches[i : i + 2]} for i in range(0, 6, 2)
    )
    assert len(first) == len(second) == 1
    assert first == again != second


@needs_lld
def test_launches_are_on_torchs_stream(kernels, gate, monkeypatch):
    stream = SimpleNamespace(device_index=1, cuda_stream=0x1230)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    with hip.recording() as recorded:
        with torch_stream(torch.device("cuda")):
            call(kernels("gate"), *gate, device=1)
            call(kernels("gate"), *gate, device=0)
        call(kernels("gate"), *gate, device=1)
    assert [launch.stream for launch in recorded.launches] == [0x1230, None, None]


@needs_lld
def test_errors_of_hip_are_raised(kernels, gate):
    with hip.recording() as recorded:
        recorded.refuse_loads = True
        with pytest.raises(RuntimeError, match="loading the code object: invalid argument"):
            call(kernels("gate"), *gate)
        recorded.refuse_loads = False
        with pytest.raises(RuntimeError, match="hipSetDevice: invalid device ordinal"):
            call(kernels("gate"), *gate, device=7)
        with pytest.raises(RuntimeError, match="gate_kernel: beyond its limits"):
            call(kernels("gate"), *gate, device=64)
        call(kernels("gate"), *gate)
    assert len(recorded.launches) == 1


@needs_lld
def test_host_code_refuses_wrong_tensors(kernels, gate):
    x, out = gate
    with hip.recording() as recorded:
        with pytest.raises(ValueError, match="device_type"):
            kernels("gate")(x, out)
        with pytest.raises((TypeError, ValueError), match="shape"):
            call(kernels("gate"), x, out[:, 1:])
        with pytest.raises((TypeError, ValueError), match="shape"):
            call(kernels("gate"), x, out[1:])
    assert not recorded.launches


WITHOUT_HIP = """
import sys, torch, tvm_ffi
from tests.rocm_on_host.tensor import call
kernel = tvm_ffi.load_module(sys.argv[1])["gate"]
x = torch.zeros(1, 4160).bfloat16()
for attempt in range(2):
    try:
        call(kernel, x, x[:, :2080].contiguous())
    except RuntimeError as error:
        print(error)
"""


@needs_lld
def test_without_hip_the_library_loads_and_says_what_is_missing(library):
    command = [sys.executable, "-c", WITHOUT_HIP, str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("kernels for AMD GPUs need HIP: libamdhip64.so: cannot open") for line in lines)


def test_tensors_of_the_stand_in_are_on_a_gpu():
    given = tvm_ffi.from_dlpack(OnGpu(torch.zeros(3, 4, dtype=torch.int32).T, device=1))
    assert (str(given.device), tuple(given.shape), tuple(given.strides)) == ("rocm:1", (4, 3), (1, 4))
    assert len(tensor.lent) == 1
    del given
    assert not tensor.lent, "given back"


def node(topology, number, **properties):
    folder = topology / str(number)
    (folder / "mem_banks" / "0").mkdir(parents=True)
    (folder / "properties").write_text("".join(f"{name} {value}\n" for name, value in properties.items()))
    (folder / "mem_banks" / "0" / "properties").write_text(f"heap_type 1\nsize_in_bytes {number << 30}\n")


@pytest.fixture
def topology(tmp_path, monkeypatch):
    """A CPU, an MI300X and an MI250X."""
    for variable in (name for names in kfd.VISIBLE for name in names):
        monkeypatch.delenv(variable, raising=False)
    node(tmp_path, 0, simd_count=0, gfx_target_version=0)
    node(tmp_path, 2, simd_count=1216, gfx_target_version=90402)
    node(tmp_path, 10, simd_count=440, gfx_target_version=90010)
    monkeypatch.setattr(kfd, "TOPOLOGY", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("visible", "name"),
    [({}, "gfx942"), ({"HIP_VISIBLE_DEVICES": "1,0"}, "gfx90a"), ({"ROCR_VISIBLE_DEVICES": "1"}, "gfx90a")],
)
def test_first_visible_gpu(topology, monkeypatch, visible, name):
    for variable, value in visible.items():
        monkeypatch.setenv(variable, value)
    assert kfd.detect() == kfd.AmdGpu(name, (2 if name == "gfx942" else 10) << 30)


@pytest.mark.parametrize("visible", ["", "2"])
def test_no_gpu_is_visible(topology, monkeypatch, visible):
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", visible)
    with pytest.raises(TargetError, match="no AMD GPU"):
        kfd.detect()


def test_artifacts_run_on_the_gpu_they_are_made_for(topology, tmp_path):
    check_target("rocm", ["gfx942"], tmp_path)
    with pytest.raises(TargetError, match="compiled for gfx950, but this GPU is gfx942"):
        check_target("rocm", ["gfx950"], tmp_path)


def test_no_driver(topology, monkeypatch):
    monkeypatch.setattr(kfd, "TOPOLOGY", topology / "absent")
    with pytest.raises(TargetError, match="no AMD GPU"):
        kfd.detect()
