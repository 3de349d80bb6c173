"""Nothing is served beyond the positions that an artifact has angles for."""

import json
from types import SimpleNamespace

import pytest

from vllm_compile.errors import UnsupportedError
from vllm_compile.runtime.manifest import PLAN
from vllm_compile.runtime.vllm_config import limit_length


def asked(artifact, length, by_user):
    """What vLLM's model configuration says: of linear RoPE, for example, several times the model's length."""
    return SimpleNamespace(
        model=str(artifact), max_model_len=length, original_max_model_len=length if by_user else None
    )


@pytest.fixture
def longrope(tiny_fp32, tmp_path):
    """The plan of an artifact that serves sequences of up to 1,024 tokens with other angles."""
    plan = json.loads((tiny_fp32 / PLAN).read_text())
    plan["model"]["long_positions"] = 1024
    (tmp_path / PLAN).write_text(json.dumps(plan))
    return tmp_path


@pytest.mark.parametrize(("length", "served"), [(1024, 256), (257, 256), (256, 256), (100, 100)])
def test_the_length_that_vllm_derives_is_cut(length, served, tiny_fp32):
    settings = asked(tiny_fp32, length, by_user=False)
    limit_length(settings)
    assert settings.max_model_len == served


def test_longer_sequences_are_for_those_who_ask_for_them(longrope):
    """Shorter ones are served with the angles they were trained with else."""
    derived = asked(longrope, 1024, by_user=False)
    limit_length(derived)
    assert derived.max_model_len == 256
    by_user = asked(longrope, 1024, by_user=True)
    limit_length(by_user)
    assert by_user.max_model_len == 1024
    with pytest.raises(UnsupportedError, match="compiled for up to 1024 tokens, not 1025"):
        limit_length(asked(longrope, 1025, by_user=True))


def test_a_length_that_the_user_asks_for_is_refused(tiny_fp32):
    with pytest.raises(UnsupportedError, match="compiled for up to 256 tokens, not 300"):
        limit_length(asked(tiny_fp32, 300, by_user=True))
    limit_length(asked(tiny_fp32, 256, by_user=True))
