"""Fixtures shared by all tests: a fresh seed each run, printed so that a failure can be repeated."""

import fcntl
import os
import secrets
import shutil
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "2")
# Engines talk to themselves, whatever addresses the machine has.
os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
# A process may be held up at any moment.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

SEED = int(os.environ.get("TEST_SEED") or secrets.randbits(31))
os.environ["TEST_SEED"] = str(SEED)  # one seed for all workers of a run


def pytest_report_header(config):
    return f"TEST_SEED={SEED}"


def pytest_collection_modifyitems(items):
    """Tests that share what is built go to one worker: those of a file, of a family.

    Workers take groups in the order of the items (`--no-loadscope-reorder`): long ones first, so that at the end no
    worker is left alone.
    """
    seconds = Counter()  # about
    for item in items:
        seconds[_group(item)] += 20 if item.get_closest_marker("slow") else 1
        item.add_marker(pytest.mark.xdist_group(_group(item)))
    items.sort(key=lambda item: -seconds[_group(item)])


def _group(item) -> str:
    if "family_artifact" in item.fixturenames:
        return item.callspec.params["family"]
    return item.nodeid.partition("::")[0]


@pytest.fixture
def generator(request) -> torch.Generator:
    """Random inputs: another seed each run and each test, repeated by setting TEST_SEED."""
    return torch.Generator().manual_seed(SEED + sum(map(ord, request.node.name)))


@pytest.fixture(scope="session")
def pairs():
    """`pairs(kind)`: a random Llama of a kind of `tests.models.KINDS`, and the same imported."""
    from tests.models import KINDS, pair

    return cache(lambda kind: pair(SEED, **KINDS[kind]))


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """`shared(name, make)`: a directory that all workers of a run have in common; who first wants it makes it.

    `make(directory)` fills an empty one.  Tests change nothing in it: those that want to take a copy.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # a worker's own folder is one of the run's
    (root / "shared").mkdir(exist_ok=True)

    def find(name, make):
        whole, partial = root / "shared" / name, root / "shared" / f"{name}.partial"
        with whole.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
            if not whole.exists():
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                make(partial)
                partial.rename(whole)
        return whole

    return find


@pytest.fixture(scope="session")
def compiled(shared):
    """`compiled(name, model, dtype)`: the artifact of a model, with all kernels and a verdict."""

    def find(name, model, dtype):
        from vllm_compile import compile

        return shared(name, lambda folder: compile(model, out=folder / "artifact", dtype=dtype)) / "artifact"

    return find


@pytest.fixture(scope="session")
def tiny(shared):
    """Directory of a random float32 Llama of two layers, in several shards."""
    from tests.models import save

    return shared("tiny", lambda folder: save(folder / "model", SEED)) / "model"


@pytest.fixture(scope="session")
def tiny_fp32(compiled, tiny):
    """The compiled artifact of `tiny` in float32; tests that change it take a copy."""
    return compiled("tiny_fp32", tiny, "float32")


@pytest.fixture(scope="session")
def tiny_bf16(compiled, tiny):
    """The compiled artifact of `tiny` in bfloat16."""
    return compiled("tiny_bf16", tiny, "bfloat16")


@pytest.fixture(scope="session")
def trained_llama(shared):
    """Directory of a small Llama that has learnt some Python, in float32, with held-out text beside it."""
    script = Path(__file__).parents[1] / "examples" / "train_llama.py"

    def train(folder):
        subprocess.run([sys.executable, script, "--out", folder / "model", "--steps", "60"], check=True)

    return shared("trained", train) / "model"


@pytest.fixture(scope="session")
def compiled_fp32(compiled, trained_llama):
    """The compiled artifact of `trained_llama` in float32."""
    return compiled("trained_fp32", trained_llama, "float32")


@pytest.fixture(scope="session")
def compiled_bf16(compiled, trained_llama):
    """The compiled artifact of `trained_llama` in bfloat16."""
    return compiled("trained_bf16", trained_llama, "bfloat16")


@pytest.fixture(scope="session")
def family_artifact(shared):
    """`family_artifact(family, dtype)`: the artifact of one of `tests/families.py`; not verified, which tests do."""
    from tests.families import compile_family

    def find(family, dtype="float32"):
        name = f"{family} {dtype}"
        return shared(name, lambda folder: compile_family(family, dtype, folder)) / "artifact"

    return find


@pytest.fixture(scope="module")
def few_kernels():
    """Models are compiled with one tile per matrix product."""
    from tests.families import few_kernels

    with few_kernels():
        yield
