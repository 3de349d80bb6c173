"""Which models share kernels, and what makes kernels other ones."""

from __future__ import annotations

import dataclasses

import pytest

from tests import models
from vllm_compile import kernel_cache
from vllm_compile.cache import Cache, key_of
from vllm_compile.driver import lower_model
from vllm_compile.kernel_cache import KernelCache, library_facts
from vllm_compile.lowering import Lowered
from vllm_compile.schedules.family import Variant
from vllm_compile.targets import resolve

TARGET = resolve("cpu")
ROPE = {"rope_type": "default", "rope_theta": 5e5}


@pytest.fixture(scope="module")
def lowered(tmp_path_factory):
    """`lowered(fields)`: the kernels of a small Llama with these fields."""

    known: dict[str, Lowered] = {}

    def lower(**fields):
        if str(fields) not in known:
            directory = tmp_path_factory.mktemp("model")
            models.config(**{"hidden_size": 64} | fields).save_pretrained(directory)
            known[str(fields)] = lower_model(directory, TARGET)
        return known[str(fields)]

    return lower


def key(lowered, target=TARGET) -> str:
    return key_of(library_facts(lowered, target))


def test_models_of_equal_shapes_share(lowered):
    """Whatever their depth, and whatever does not reach a kernel."""
    alike = ({"num_hidden_layers": 5}, {"initializer_range": 0.5}, {"bos_token_id": 7}, {"rope_parameters": ROPE})
    assert {key(lowered(**fields)) for fields in alike} == {key(lowered())}


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 128},
        {"intermediate_size": 80},
        {"vocab_size": 96},
        {"num_key_value_heads": 1},
        {"dtype": "bfloat16"},
        {"attention_bias": True},
        {"rms_norm_eps": 1e-3},
    ],
    ids=str,
)
def test_other_shapes_and_attributes_do_not(lowered, fields):
    assert key(lowered(**fields)) != key(lowered())


def test_configurations_and_families(lowered):
    model = lowered()
    spec, kernels = next((s, k) for s, k in model.kernels.items() if s.op == "linear")
    first, *rest = kernels.choice.variants

    def with_choice(**changes):
        choice = dataclasses.replace(kernels.choice, **changes)
        changed = dataclasses.replace(kernels, choice=choice)
        return dataclasses.replace(model, kernels=model.kernels | {spec: changed})

    other = Variant(first.min_tokens, {**first.config, "rows": 3})
    embedding = next(k.choice.family for s, k in model.kernels.items() if s.op == "embedding")
    assert key(with_choice(variants=[other, *rest])) != key(model)
    assert key(with_choice(family=embedding)) != key(model)
    found = Variant(first.min_tokens, first.config, record={"id": "where the configuration comes from"})
    assert key(with_choice(variants=[found, *rest])) == key(model)


def test_another_target(lowered):
    assert key(lowered(), dataclasses.replace(TARGET, l1_bytes=TARGET.l1_bytes // 2)) != key(lowered())


def test_names_of_kernels_are_the_libraries_symbols(lowered):
    model = lowered()
    spec, kernels = next(iter(model.kernels.items()))
    renamed = dataclasses.replace(kernels, symbols=tuple(f"{symbol}_" for symbol in kernels.symbols))
    assert key(dataclasses.replace(model, kernels=model.kernels | {spec: renamed})) != key(model)


def test_kept_and_restored(lowered, tmp_path):
    store = Cache(tmp_path / "cache")
    entry, library = KernelCache(store, lowered(), TARGET), tmp_path / "kernels.so"
    assert not entry.restore(library)
    assert not library.exists()
    library.write_bytes(b"machine code")
    entry.keep(library)
    library.unlink()
    assert KernelCache(store, lowered(num_hidden_layers=5), TARGET).restore(library)
    assert library.read_bytes() == b"machine code"
    assert not KernelCache(store, lowered(vocab_size=96), TARGET).restore(library)
    (found,) = store.entries()
    assert found.kind == kernel_cache.KIND
    assert "kernels for cpu: " in found.about
