"""vllm-compile: Transformers compiled with TVM, served behind vLLM's own scheduler.

    import vllm_compile
    vllm_compile.compile("path/to/llama", target="cpu", out="llama.artifact")
    program = vllm_compile.load("llama.artifact")

Importing this package imports neither TVM nor torch; each function brings what it needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .driver import CompileResult
    from .runtime.program import Program

__version__ = "0.1.0"


def compile(model: str | Path, target: str = "cpu", out: str | Path = "artifact", **options: Any) -> CompileResult:
    """Compile the Hugging Face model in directory `model` for `target` into the directory `out`.

    Options are the fields of `vllm_compile.driver.CompileOptions`: `dtype` ("bfloat16" or
    "float32"), `strict`, `dummy_weights` (a seed), `dump` (a directory).  Needs the `compile` extra.

    Raises:
        vllm_compile.errors.VllmCompileError: one of its kinds; nothing half-written stays behind.
    """
    from .driver import CompileOptions, compile_model

    return compile_model(model, target, out, CompileOptions(**options))


def load(artifact: str | Path) -> Program:
    """Load a compiled artifact: a callable for engines of your own.

    `program(input_ids, positions, kv, block_table, seq_lens, query_start_loc, slot_mapping)` gives
    hidden states [T, D], `program.logits(hidden)` logits [S, V]; shapes and dtypes of the arguments
    are in `vllm_compile.runtime.program.Program.forward`.

    Raises:
        vllm_compile.errors.ArtifactError: damaged, of another schema, or made for another CPU.
    """
    from .runtime.program import load as load_program

    return load_program(artifact)


__all__ = ["__version__", "compile", "load"]
