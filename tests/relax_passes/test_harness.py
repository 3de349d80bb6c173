"""Negative controls: passes that change a meaning are noticed by the checks of these tests."""

import pytest
import torch
from tvm import relax

from tests.relax_passes.harness import Served, apply, module
from vllm_compile.accuracy import relative_error
from vllm_compile.ops import RMS_NORM
from vllm_compile.relax_passes.base import Definitions, counted_pass, replace_by, rewrite_functions
from vllm_compile.relax_passes.page_kv_cache import page_kv_cache


@counted_pass("larger_epsilon")
def larger_epsilon(module):
    def find(function):
        norms = [b for b in Definitions(function).bindings if RMS_NORM.matches(b.value)]
        return {
            b.var: replace_by(b.var, RMS_NORM({"x": b.value.args[0], "weight": b.value.args[1]}, eps=1e-2))
            for b in norms
        }

    return rewrite_functions(module, find)


@counted_pass("add_becomes_multiply")
def add_becomes_multiply(module):
    def find(function):
        d = Definitions(function)
        adds = [b for b in d.bindings if d.call(b.value, "relax.add") is not None]
        return {b.var: replace_by(b.var, relax.op.multiply(*b.value.args)) for b in adds}

    return rewrite_functions(module, find)


@pytest.mark.parametrize("broken", [larger_epsilon, add_becomes_multiply])
def test_apply_notices_another_meaning(broken, generator):
    def build(emit, x, weight):
        return emit(RMS_NORM({"x": emit(relax.op.add(x, x)), "weight": weight}, eps=1e-5))

    with pytest.raises(AssertionError):
        apply(broken, module(build, x=(1, "T", 8), weight=(8,)), generator)


BREAKS = {
    "a later token is seen": lambda step: step["seq_lens"].add_(1),
    "another position": lambda step: step["positions"].mul_(2),
    "another page": lambda step: step["block_table"].copy_(step["block_table"].roll(1)),
    "another slot": lambda step: step["slot_mapping"].sub_(1),
}


@pytest.mark.parametrize("what", BREAKS)
def test_served_notices_a_broken_batch(what, pairs, generator):
    served = Served(page_kv_cache(pairs("two layers").imported.module), pairs("two layers"))
    ids = torch.randint(0, 80, (21,), generator=generator, dtype=torch.int32)
    batch = served.batch([32])
    step = batch.step([0], [len(ids)])
    expected = served.logits(ids, served.batch([32]), step)
    BREAKS[what](step)
    for cache in batch.kv:
        cache.zero_()
    assert relative_error(served.logits(ids, batch, step), expected) > 1e-3
