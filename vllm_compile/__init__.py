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
    from .compilation import CompileResult
    from .runtime.program import Program

__version__ = "0.1.0"


def compile(
    model: str | Path,
    target: str = "cpu",
    out: str | Path = "artifact",
    cache: str | Path | None = None,
    **options: Any,
) -> CompileResult:
    """Compile a model for `target` into the directory `out`.

    `model` is a Hugging Face directory, or an ONNX file of ONNX Runtime GenAI's builder (or the directory it is in).

    Options are the fields of `vllm_compile.compilation.CompileOptions`: `dtype` ("bfloat16" or
    "float32"), `strict`, `dummy_weights` (a seed), `dump` (a directory).  Needs the `compile` extra.
    `cache` is a directory in which kernels are kept for later compiles, and by which a compile with nothing to do is
    known; the command line's is `vllm_compile.cache.default_directory()`, None is none.

    Raises:
        vllm_compile.errors.VllmCompileError: one of its kinds; nothing half-written stays behind.
    """
    from .cache import Cache
    from .compilation import CompileOptions
    from .unchanged import compile_if_changed

    kept = None if cache is None else Cache(Path(cache))
    return compile_if_changed(model, target, out, CompileOptions(**options), cache=kept)


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
