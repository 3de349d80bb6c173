"""What the choice of kernels asks: configurations of kernel families from a database."""

from __future__ import annotations

from collections.abc import Mapping

from vllm_compile.spec import OpSpec
from vllm_compile.targets import Target

from ..family import KernelFamily, Tuned, Variant
from ..layouts import Layout
from .fingerprint import Fingerprint
from .home import Database, open_database
from .lookup import lookup
from .machine import fingerprint
from .record import How
from .workload import Workload

HOWS = (How.MEASURED, How.ESTIMATED)


class TunedKernels(Tuned):
    """The best configurations known for one machine: measured ones, or estimates where nothing was measured."""

    def __init__(self, database: Database, machine: Fingerprint) -> None:
        self._database = database
        self._machine = machine

    def find(
        self, family: KernelFamily, spec: OpSpec, layouts: Mapping[str, Layout], tokens: tuple[int, int | None]
    ) -> Variant | None:
        """See `Tuned`; the variant's `record` says which one (`id`), and what it is worth (`match`, `changed`, ...).

        Raises:
            DatabaseError: the database cannot be read, or the record is damaged.
        """
        answer = lookup(self._database, workload_of(spec, layouts, tokens), self._machine, HOWS)
        if answer is None:
            return None
        schedule, record = answer.record.schedule.content(), answer.record
        if schedule.get("family") != family.name:
            return None
        provenance = vars(record.provenance) | {"median_us": record.times.median, "how": str(record.how)}
        source = {"id": record.id, "match": str(answer.match), "changed": list(answer.changed), **provenance}
        return Variant(tokens[0], schedule["config"], source)


def workload_of(spec: OpSpec, layouts: Mapping[str, Layout], tokens: tuple[int, int | None]) -> Workload:
    """The workload that a call of a family is tuned as."""
    return Workload.of_call(spec, {name: layout.name for name, layout in layouts.items()}, tokens)


def open_tuned(url: str, target: Target) -> TunedKernels:
    """What the database at `url` knows of this machine; opened for reading."""
    return TunedKernels(open_database(url, writable=False), fingerprint(target))
