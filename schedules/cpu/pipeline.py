"""How TIR of CPU kernels becomes code: TVM's default passes, but for those that find nothing to do in them.

Our kernels have their buffers at their size, their conditions where they belong, and no threads or shared memory.
Passes that look for more take more than half of the time (CompactBufferAllocation 27 %, HoistIfThenElse 15 %), and
leave each kernel as it was.
"""

from __future__ import annotations

import tvm
from tvm import s_tir, tirx
from tvm.s_tir.pipeline import finalize_device_passes, finalize_host_passes

NAME = "vllm_compile.cpu"


def passes() -> list[tvm.transform.Pass]:
    """In TVM's order."""
    return [
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.LowerMatchBuffer(),
        s_tir.transform.StmtSimplify(),
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
        tirx.transform.BF16ComputeLegalize(),
        tirx.transform.NarrowDataType(32),
        s_tir.transform.LoopPartition(),
        tirx.transform.VectorizeLoop(True),
        tirx.transform.StorageRewrite(),
        tirx.transform.UnrollLoop(),
        s_tir.transform.RenormalizeSplitPattern(),
        tirx.transform.StmtSimplify(),
        tirx.transform.RemoveNoOp(),
        s_tir.transform.RewriteUnsafeSelect(),
        tirx.transform.CommonSubexprElim(),
        tirx.transform.VerifyMemory(),
        tirx.transform.AnnotateEntryFunc(),
        tirx.transform.SplitHostDevice(),
        tirx.transform.MakePackedAPI(),
        tirx.transform.BF16StorageLegalize(),
    ]


@tvm.transform.module_pass(opt_level=0, name=NAME)
def lower(module: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
    """All of them."""
    return tvm.transform.Sequential(passes())(module)


tirx.register_tir_pipeline(NAME, lambda: (lower, finalize_host_passes, finalize_device_passes))
