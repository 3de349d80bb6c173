"""The passes that CPU kernels go through leave the same code as all of TVM's."""

import tvm
from tvm import tirx
from tvm.s_tir.pipeline import default_s_tir_pipeline

from tests.models import save
from vllm_compile.driver import lower_model
from vllm_compile.schedules.cpu import pipeline
from vllm_compile.targets import resolve


def test_same_code(tmp_path):
    """Of the first kernel of each kind of call."""
    save(tmp_path / "model", 1, dtype="bfloat16")
    target = resolve("cpu")
    functions = {}
    for spec, kernels in lower_model(tmp_path / "model", target).kernels.items():
        symbol, variant = next(iter(kernels.distinct().items()))
        built = kernels.choice.family.build(spec, variant.config, target)
        functions.setdefault(spec.op, built.with_attr("global_symbol", symbol).with_attr("tirx.noalias", True))
    machine = tvm.target.Target(target.tvm_config())
    bound = tirx.transform.BindTarget(machine.with_host(machine))(tvm.IRModule(functions))
    whole, _, _ = default_s_tir_pipeline()
    ours, theirs = pipeline.lower(bound), whole(bound)
    assert ours.script() == theirs.script()
    without = [p for p in pipeline.passes() if p.info.name != "tirx.CommonSubexprElim"]  # negative control
    assert tvm.transform.Sequential(without)(bound).script() != theirs.script()
