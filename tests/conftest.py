"""Fixtures shared by all tests: a fresh seed each run, printed so that a failure can be repeated."""

import os
import secrets
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "2")

SEED = int(os.environ.get("TEST_SEED") or secrets.randbits(31))
os.environ["TEST_SEED"] = str(SEED)  # one seed for all workers of a run
TRAINED = {"trained_llama", "compiled_fp32", "compiled_bf16"}


def pytest_report_header(config):
    return f"TEST_SEED={SEED}"


def pytest_collection_modifyitems(items):
    """Tests that share what is built go to one worker: those of a file, of a family, of the trained model."""
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        group = f"{item.nodeid.partition('::')[0]} {parameters.get('family', '')}"
        item.add_marker(
            pytest.mark.xdist_group("trained" if TRAINED & set(getattr(item, "fixturenames", ())) else group)
        )


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
def tiny(tmp_path_factory):
    """Directory of a random float32 Llama of two layers, in several shards."""
    from tests.models import save

    directory = tmp_path_factory.mktemp("tiny") / "model"
    save(directory, SEED)
    return directory


@pytest.fixture(scope="session")
def tiny_fp32(tiny):
    """The compiled artifact of `tiny` in float32; tests that change it take a copy."""
    from vllm_compile import compile

    return compile(tiny, out=tiny.with_name("float32")).artifact


@pytest.fixture(scope="session")
def tiny_bf16(tiny):
    """The compiled artifact of `tiny` in bfloat16."""
    from vllm_compile import compile

    return compile(tiny, out=tiny.with_name("bfloat16"), dtype="bfloat16").artifact


@pytest.fixture(scope="session")
def trained_llama(tmp_path_factory):
    """Directory of a small Llama that has learnt some Python, in float32, with held-out text beside it."""
    directory = tmp_path_factory.mktemp("trained") / "model"
    script = Path(__file__).parents[1] / "examples" / "train_llama.py"
    subprocess.run([sys.executable, script, "--out", directory, "--steps", "100"], check=True)
    return directory


@pytest.fixture(scope="session")
def compiled_fp32(trained_llama):
    """The compiled artifact of `trained_llama` in float32."""
    from vllm_compile import compile

    return compile(trained_llama, out=trained_llama.with_name("float32")).artifact


@pytest.fixture(scope="session")
def compiled_bf16(trained_llama):
    """The compiled artifact of `trained_llama` in bfloat16."""
    from vllm_compile import compile

    return compile(trained_llama, out=trained_llama.with_name("bfloat16"), dtype="bfloat16").artifact
