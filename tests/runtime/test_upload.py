"""Weights on their way to a device."""

from __future__ import annotations

import pytest
import torch

from vllm_compile.runtime.upload import CHUNK_BYTES, upload


def tensors(generator: torch.Generator) -> dict[str, torch.Tensor]:
    shapes = {"several chunks": (5, CHUNK_BYTES // 7), "one": (1,), "none": (0, 3), "scalar": ()}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return made | {"strided": made["several chunks"].T[1:9], "bytes": torch.arange(255, dtype=torch.uint8)}


def test_on_a_cpu_nothing_is_copied(generator):
    given = tensors(generator)
    assert all(tensor is given[name] for name, tensor in upload(given, torch.device("cpu")).items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_bits_on_a_gpu(generator):
    given, device = tensors(generator), torch.device("cuda")
    given["there already"] = torch.ones(3, device=device)
    placed = upload(given, device)
    assert list(placed) == list(given)
    for name, tensor in given.items():
        assert placed[name].device == torch.device("cuda", torch.cuda.current_device())
        assert torch.equal(placed[name].cpu(), tensor.cpu()), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_the_device_that_is_current(generator):
    with torch.cuda.device(1):
        placed = upload(tensors(generator), torch.device("cuda"))
    assert {tensor.device.index for tensor in placed.values()} == {1}
