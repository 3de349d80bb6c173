"""The most probable token is an entry point of its own."""

import torch
from tvm import relax

from tests import interpreter
from tests.relax_passes.harness import own_operators
from vllm_compile.relax_passes.add_greedy import GREEDY, add_greedy
from vllm_compile.relax_passes.base import match_counts
from vllm_compile.relax_passes.pipeline import passes_for, run_passes


def test_tokens_of_a_models_logits(pairs, generator):
    before, _ = run_passes(pairs("bfloat16").imported.module)
    after = add_greedy(before)
    relax.analysis.well_formed(after)
    assert match_counts(after)["add_greedy"] == 1
    assert own_operators(after[GREEDY]) == {"argmax": 1}
    shape = [1, 7, int(before["logits"].body.body.ty.shape.values[-1])]
    logits_1TV = torch.randn(shape, generator=generator).to(torch.bfloat16)
    tokens_1T1 = interpreter.run(after, GREEDY, logits_1TV)
    assert torch.equal(tokens_1T1, logits_1TV.float().argmax(-1, keepdim=True))
    assert tokens_1T1.dtype == torch.int64
    others = {var.name_hint for var, _ in before.functions_items()}
    assert {var.name_hint for var, _ in after.functions_items()} == others | {GREEDY}


def test_only_where_it_is_served():
    names = [[p.info.name for p in passes_for(operators)] for operators in ((), {"argmax"})]
    assert set(names[1]) - set(names[0]) == {"add_greedy"}
