"""What the choice of kernels asks: configurations of kernel families from a database."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from vllm_compile.spec import OpSpec
from vllm_compile.targets import Target

from ..family import Config, KernelFamily, Tuned, Variant
from ..layouts import Layout
from .fingerprint import Fingerprint
from .home import Database, open_database
from .lookup import lookup
from .machine import fingerprint
from .record import How, Record
from .workload import Workload

HOWS = (How.MEASURED, How.ESTIMATED)


class TunedKernels(Tuned):
    """The best configurations known for one machine: measured ones, or estimates where nothing was measured."""

    def __init__(self, database: Database, machine: Fingerprint) -> None:
        self._database = database
        self._machine = machine

    def find(
        self,
        family: KernelFamily,
        spec: OpSpec,
        layouts: Mapping[str, Layout],
        tokens: tuple[int, int | None],
        default: Variant,
        problem: Callable[[Config], str],
    ) -> Variant:
        """See `Tuned`; the variant's `record` says which one (`id`), and what it is worth (`match`, `changed`, ...).

        Raises:
            DatabaseError: the database cannot be read, or a record is damaged.
        """
        passed_over: list[Mapping[str, Any]] = []

        def usable(record: Record) -> bool:
            reason = record.schedule.problem(family.name, default.config, problem)
            if reason:
                passed_over.append(_source(record) | {"reason": reason})
            return not reason

        answer = lookup(self._database, workload_of(spec, layouts, tokens), self._machine, HOWS, usable)
        preferred = passed_over[0] if passed_over else None
        if answer is None:
            return replace(default, passed_over=preferred)
        source = _source(answer.record) | {"match": str(answer.match), "changed": list(answer.changed)}
        return Variant(tokens[0], answer.record.schedule.content()["config"], source, preferred)


def _source(record: Record) -> dict[str, Any]:
    """What a manifest says of a record."""
    times = {"median_us": record.times.median, "how": str(record.how)}
    return {"id": record.id, **vars(record.provenance), **times}


def workload_of(spec: OpSpec, layouts: Mapping[str, Layout], tokens: tuple[int, int | None]) -> Workload:
    """The workload that a call of a family is tuned as."""
    return Workload.of_call(spec, {name: layout.name for name, layout in layouts.items()}, tokens)


def open_tuned(url: str, target: Target) -> TunedKernels:
    """What the database at `url` knows of this machine; opened for reading."""
    return TunedKernels(open_database(url, writable=False), fingerprint(target))
