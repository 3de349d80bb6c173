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
