import pytest

from vllm_compile.analysis.analyze import Analysis, analyze
from vllm_compile.targets.cuda import H200

# The least that CUDA has kernels for.
SIZES = {"hidden_size": 256, "intermediate_size": 512, "dtype": "bfloat16"}


@pytest.fixture(scope="session")
def config_directory(tmp_path_factory):
    """`config_directory(**changes)`: a directory with the config.json of a small Llama in it, and nothing else."""
    from tests import models

    def make(**changes):
        settings = models.config(**SIZES | changes)
        settings.architectures = ["LlamaForCausalLM"]
        directory = tmp_path_factory.mktemp("config") / "small"
        settings.save_pretrained(directory)
        return directory

    return make


@pytest.fixture(scope="session")
def analysis(config_directory) -> Analysis:
    """Of a small Llama, on an H200."""
    return analyze(config_directory(), "cuda", [1, 3], [8, 40], H200)
