"""What tests of the seam with vLLM share."""

import pytest


@pytest.fixture(scope="module")
def stand_in():
    """Artifacts are served by `torch_program`."""
    from tests.runtime import torch_program
    from vllm_compile.runtime import program

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "load", torch_program.load)
        yield
