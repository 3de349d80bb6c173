"""Fixtures shared by all tests: a fresh seed each run, printed so that a failure can be repeated."""

import os
import secrets
from functools import cache

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "2")

SEED = int(os.environ.get("TEST_SEED") or secrets.randbits(31))


def pytest_report_header(config):
    return f"TEST_SEED={SEED}"


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
