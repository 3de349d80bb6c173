"""What a pass is, and the few tools that all of them share.

A pass is a TVM module pass that also counts how often it matched.  The count travels with
the module as an attribute, so a pass stays a plain function from module to module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import count
from typing import Any

import tvm
import tvm_ffi
from tvm import relax
from tvm.ir.expr import GenericConst
from tvm.relax.expr_functor import PyExprMutator, mutator

from vllm_compile.errors import UnsupportedError

MATCHES = "vllm_compile.matches"

# A pass runs behind a call through C++, which would turn other errors of ours into a RuntimeError.
tvm_ffi.register_error(UnsupportedError)

Rewrite = Callable[[Callable[[relax.Expr], relax.Var]], dict[relax.Var, relax.Expr]]


def counted_pass(name: str) -> Callable[[Callable[[tvm.IRModule], tuple[tvm.IRModule, int]]], Any]:
    """Make `(module) -> (module, matches)` a module pass called `name` that records its matches."""

    def decorate(transform: Callable[[tvm.IRModule], tuple[tvm.IRModule, int]]) -> Any:
        @tvm.transform.module_pass(opt_level=0, name=name)
        def run(module: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
            # A pass changes its own copy: whoever holds the module before keeps it as it was.
            transformed, matches = transform(module.clone())
            counts = {**match_counts(module), name: matches}
            return transformed.with_attr(MATCHES, counts)

        run.__doc__ = transform.__doc__
        return run

    return decorate


def match_counts(module: tvm.IRModule) -> dict[str, int]:
    """Pass name -> number of matches, for the passes that have run on `module`."""
    recorded = (module.attrs or {}).get(MATCHES, {})
    return {str(name): int(count) for name, count in recorded.items()}


class Definitions:
    """Which value each variable of a function is bound to, and how often it is used."""

    def __init__(self, function: relax.Function) -> None:
        self.bindings = [b for block in function.body.blocks for b in block.bindings]
        self._value = {b.var: b.value for b in self.bindings}
        self._uses: dict[relax.Var, int] = {}
        for expr in [*self._value.values(), function.body.body]:
            for var in used_vars(expr):
                self._uses[var] = self._uses.get(var, 0) + 1

    def value(self, expr: Any) -> Any:
        """What a variable is bound to; a parameter, or anything else, stands for itself."""
        while isinstance(expr, relax.Var) and expr in self._value:
            expr = self._value[expr]
        return expr

    def call(self, expr: Any, op: str) -> Any:
        """The call of the Relax operator `op` that `expr` is or is bound to, else None."""
        value = self.value(expr)
        named = isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op)
        return value if named and value.op.name == op else None

    def operand(self, expr: Any, op: str, index: int = 0) -> Any:
        """Operand `index` of the call of `op` that `expr` is or is bound to, else None."""
        call = self.call(expr, op)
        return None if call is None else call.args[index]

    def constant(self, expr: Any) -> float | None:
        """The value of a scalar constant, else None."""
        value = self.value(expr)
        scalar = isinstance(value, GenericConst) and isinstance(value.ty, relax.TensorType)
        return float(value.value.numpy()) if scalar and not value.ty.shape.values else None

    def uses(self, var: relax.Var) -> int:
        return self._uses.get(var, 0)

    def is_parameter(self, expr: Any) -> bool:
        """True if `expr` is known from the start of the function."""
        return isinstance(expr, relax.Var) and expr not in self._value


def new_name(name: str, names: set[str]) -> str:
    """The name, with a number if it is one of `names` already; from then on it is one."""
    numbered = (name if n == 1 else f"{name}_{n}" for n in count(1))
    found = next(candidate for candidate in numbered if candidate not in names)
    names.add(found)
    return found


def used_vars(expr: relax.Expr) -> Iterable[relax.Var]:
    """Relax variables in an expression (dimensions are none of them)."""
    return [var for var in relax.analysis.free_vars(expr) if not tvm.ir.is_prim_var(var)]


@mutator
class _Replace(PyExprMutator):
    def __init__(self, module: tvm.IRModule, at: dict[relax.Var, Rewrite]) -> None:
        super().__init__(module)
        self._at = at
        self._replaced: set[relax.Var] = set()

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        if binding.var in self._replaced:
            return
        if binding.var not in self._at:
            super().visit_var_binding_(binding)
            return

        def emit(expr: relax.Expr) -> relax.Var:
            return self.builder_.emit(self.visit_expr(expr))

        for var, expr in self._at[binding.var](emit).items():
            # What leaves its dataflow block must not become a variable of the block.
            inner = isinstance(var, relax.DataflowVar)
            place = self.builder_.emit if inner else self.builder_.emit_output
            self.set_var_remap(var, place(self.visit_expr(expr)))
            self._replaced.add(var)


def replace_bindings(module: tvm.IRModule, function: relax.Function, at: dict[relax.Var, Rewrite]) -> relax.Function:
    """`function` with new code in place of the bindings of the variables in `at`.

    `at[var](emit)` is called where `var` was bound.  It may `emit` expressions over variables of
    the old function, and returns what replaces which old variables from there on.
    """
    return _Replace(module, at).visit_expr(function)


@mutator
class Substitute(PyExprMutator):
    """Puts other expressions in the place of variables; see `substitute`."""


def substitute(expr: relax.Expr, values: Mapping[relax.Var, relax.Expr], using: type = Substitute) -> relax.Expr:
    """`expr` with variables replaced by `values`, rebuilt by the mutator `using`."""
    rebuild = using()
    for var, value in values.items():
        rebuild.set_var_remap(var, value)
    return rebuild.visit_expr(expr)


def replace_by(var: relax.Var, expr: relax.Expr) -> Rewrite:
    """The rewrite that puts one expression in the place of `var`."""
    return lambda emit: {var: expr}


def rewrite_functions(
    module: tvm.IRModule, find: Callable[[relax.Function], dict[relax.Var, Rewrite]]
) -> tuple[tvm.IRModule, int]:
    """Apply the rewrites that `find` names to every Relax function; returns the module and their number."""
    matches = 0
    for name, function in list(module.functions_items()):
        if isinstance(function, relax.Function) and (at := find(function)):
            matches += len(at)
            module.update_func(name, replace_bindings(module, function, at))
    return (clean(module) if matches else module), matches


def same_type(a: relax.Expr, b: relax.Expr) -> bool:
    """True if two expressions have the same shape and dtype."""
    return bool(tvm_ffi.structural_equal(a.ty, b.ty))


def clean(module: tvm.IRModule) -> tvm.IRModule:
    """Remove aliases and what nothing uses any more."""
    module = relax.transform.CanonicalizeBindings()(module)
    return relax.transform.DeadCodeElimination()(module)
