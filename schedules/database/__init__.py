"""The tuning database: which schedule is the fastest for a call, measured where, by whom.

One schema, two homes: a SQLite file, or a PostgreSQL server that a team shares.  Nothing here imports TVM but
`meta_schedule`, the adapter for TVM's own search.  docs/tuning-database.md is the guide.

    with open_database("tuning.db") as database:
        commit(database, [record])
        answer = lookup(database, workload, fingerprint)
"""

from .fingerprint import Fingerprint
from .home import Database, open_database
from .lookup import Answer, Match, lookup
from .record import How, Provenance, Record, Schedule, State, Times, Verdict
from .store import commit
from .workload import Workload

__all__ = [
    "Answer",
    "Database",
    "Fingerprint",
    "How",
    "Match",
    "Provenance",
    "Record",
    "Schedule",
    "State",
    "Times",
    "Verdict",
    "Workload",
    "commit",
    "lookup",
    "open_database",
]
