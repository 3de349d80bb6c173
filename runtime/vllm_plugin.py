"""The `vllm.general_plugins` entry point: makes vLLM know compiled artifacts.

vLLM calls it in each of its processes, whatever model is served, so it stays light.
"""

ARCHITECTURE = "VllmCompileForCausalLM"


def register() -> None:
    """Tells vLLM of our architecture, of the settings it is served with, and of how its weights are read."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry

    from .vllm_config import DUMMY_FORMAT, LOAD_FORMAT, ServingConfig
    from .vllm_loader import ArtifactLoader, DummyLoader
    from .vllm_model import VllmCompileForCausalLM

    # The class, not its name: vLLM looks at a named class in a subprocess, which costs eight seconds.
    ModelRegistry.register_model(ARCHITECTURE, VllmCompileForCausalLM)
    MODELS_CONFIG_MAP[ARCHITECTURE] = ServingConfig
    register_model_loader(LOAD_FORMAT)(ArtifactLoader)
    register_model_loader(DUMMY_FORMAT)(DummyLoader)
