"""These models are so small that a second thread costs more than it brings."""

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def plain(tmp_path) -> Path:
    """The directory of a Llama's ONNX graph, to be damaged."""
    from tests.onnx_models import build, llama

    return build(tmp_path, llama())
