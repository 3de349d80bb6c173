"""A traced model to Relax, with our own operators where they carry a meaning.

TVM's importer does the plain tensor operators.  What it gets wrong, or what should stay whole, is converted by
`torch_converters.py`: linear layers (it would make their result float32 whatever the model's dtype), attention,
embeddings, layer boundaries and position tables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import tvm
from torch import fx
from torch.export.graph_signature import InputKind
from tvm import relax, tirx
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from vllm_compile.errors import UnsupportedError
from vllm_compile.relax_passes.base import substitute
from vllm_compile.spec import Sym

from .hf import TracedModel
from .nodes import name, place
from .position_tables import tabulate_positions
from .recorded_types import difference
from .torch_converters import CONVERTERS


@dataclass(frozen=True)
class ImportedModel:
    """A model in Relax.

    Attributes:
        module: `main(input_ids, positions, weights...) -> logits [1, T, V]`.
        weights: checkpoint name of each weight parameter, by the parameter's name in Relax.
        tables: position tables by the name of their parameter in Relax.
    """

    module: tvm.IRModule
    weights: dict[str, str]
    tables: dict[str, torch.Tensor]


def import_model(traced: TracedModel, max_positions: int) -> ImportedModel:
    """Convert a traced model; position tables cover positions below `max_positions`, and the model's long sequences.

    Raises:
        UnsupportedError: the graph has an operator that cannot be converted; it is named.
    """
    program = traced.program
    positions = next(n for n in program.graph.nodes if n.op == "placeholder" and n.name == "positions")
    tables = tabulate_positions(program, positions, max_positions, traced.long)
    importer = _Importer(
        [relax.Var(f"position_table_{i}", _table_type(t)) for i, t in enumerate(tables)],
        max(max_positions, traced.long.positions),
    )
    try:
        module = importer.from_exported_program(program, True, True, False, dict(CONVERTERS))
    except UnsupportedError as error:
        raise UnsupportedError(f"{traced.config.model_type}: {error}") from error
    names = {
        s.arg.name: s.target.removeprefix("model.")
        for s in program.graph_signature.input_specs
        if s.kind is InputKind.PARAMETER
    }
    main = _rename(module["main"], importer.tables, names)
    module = tvm.IRModule({"main": main})
    weights = {_identifier(name): name for name in names.values()}
    return ImportedModel(module, weights, {v.name: t for v, t in zip(importer.tables, tables, strict=True)})


def _rename(main: relax.Function, tables: list[relax.Var], names: dict[str, str]) -> relax.Function:
    """`main` with the tables as parameters, weights named as in the checkpoint, and T for the tokens."""
    tokens = main.params[0].ty.shape.values[0]
    main = main.bind_symbolic_vars({tokens: tirx.Var(Sym.TOKENS, "int64")})
    renamed = {p: relax.Var(_identifier(names.get(p.name, p.name)), p.ty) for p in main.params}
    body = substitute(main.body, renamed)
    used = set(relax.analysis.free_vars(body))
    parameters = [*renamed.values(), *(table for table in tables if table in used)]
    return relax.Function(parameters, body, main.ret_ty).with_attr("global_symbol", "main")


def _identifier(name: str) -> str:
    """A checkpoint's name for a weight as the name of a variable."""
    return name.replace(".", "_")


def _table_type(table: torch.Tensor) -> relax.TensorType:
    return relax.TensorType(list(table.shape), str(table.dtype).removeprefix("torch."))


class _Importer(ExportedProgramImporter):
    """TVM's importer with our converters; parameters stay on meta, so they are never copied."""

    def __init__(self, tables: list[relax.Var], max_positions: int) -> None:
        super().__init__()
        self.tables, self.max_positions = tables, max_positions

    def _check_unsupported_func_type(self, nodes):
        """Refuse operators that nothing converts; from here on those that are converted say where they stand."""
        for node in nodes:
            if node.op == "call_function":
                if name(node) not in self.convert_map:
                    raise UnsupportedError(f"operator {name(node)} ({place(node)}) is not supported")
                self.convert_map[name(node)] = _named(self.convert_map[name(node)])

    @staticmethod
    def _convert_pytorch_tensor_to_tvm(tensor_value):
        if tensor_value.is_meta:
            return None
        return ExportedProgramImporter._convert_pytorch_tensor_to_tvm(tensor_value)


def _named(convert: Callable[..., Any]) -> Callable[..., Any]:
    """The converter, whose result is of the type recorded for the node.

    Its errors say which operator of which module could not be converted.
    """
    if hasattr(convert, "names_errors"):
        return convert

    @wraps(convert)
    def converted(node: fx.Node, *importer: _Importer) -> Any:
        what = f"operator {name(node)} ({place(node)}) cannot be converted"
        try:
            value = convert(node, *importer)
        except Exception as error:  # TVM's converters raise whatever the operators they call do
            raise UnsupportedError(f"{what}: {' '.join(str(error).split())}") from error
        stands_for_rows = importer and value in importer[0].tables
        if not stands_for_rows and (reason := difference(node, value)):
            raise UnsupportedError(f"{what}: {reason}")
        return value

    converted.__dict__["names_errors"] = True
    return converted
