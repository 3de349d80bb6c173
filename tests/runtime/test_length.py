"""Nothing is served beyond the positions that an artifact has angles for."""

from types import SimpleNamespace

import pytest

from vllm_compile.errors import UnsupportedError
from vllm_compile.runtime.vllm_config import limit_length


def asked(artifact, length, by_user):
    """What vLLM's model configuration says: of linear RoPE, for example, several times the model's length."""
    return SimpleNamespace(
        model=str(artifact), max_model_len=length, original_max_model_len=length if by_user else None
    )


@pytest.mark.parametrize(("length", "served"), [(1024, 256), (257, 256), (256, 256), (100, 100)])
def test_the_length_that_vllm_derives_is_cut(length, served, tiny_fp32):
    settings = asked(tiny_fp32, length, by_user=False)
    limit_length(settings)
    assert settings.max_model_len == served


def test_a_length_that_the_user_asks_for_is_refused(tiny_fp32):
    with pytest.raises(UnsupportedError, match="compiled for up to 256 tokens, not 300"):
        limit_length(asked(tiny_fp32, 300, by_user=True))
    limit_length(asked(tiny_fp32, 256, by_user=True))
