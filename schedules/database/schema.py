"""The tables.  A change here needs a migration in `migrations/versions`; a test compares the two."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "pk": "pk_%(table_name)s",
}
metadata = MetaData(naming_convention=NAMES)

# SQLite numbers rows by itself only where the type is INTEGER.
Key = BigInteger().with_variant(Integer(), "sqlite")
Digest = String(64)

# Different texts with one digest are told apart by `ordinal`: 0, but after a collision.
workloads = Table(
    "workloads",
    metadata,
    Column("id", Key, primary_key=True),
    Column("digest", Digest, nullable=False),
    Column("ordinal", Integer, nullable=False),
    Column("text", Text, nullable=False),
    UniqueConstraint("digest", "ordinal"),
)

targets = Table(
    "targets",
    metadata,
    Column("id", Key, primary_key=True),
    Column("digest", Digest, nullable=False),
    Column("ordinal", Integer, nullable=False),
    Column("text", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("arch", Text, nullable=False),
    UniqueConstraint("digest", "ordinal"),
    Index(None, "kind", "arch"),
)

records = Table(
    "records",
    metadata,
    Column("id", Digest, primary_key=True),
    Column("workload_id", Key, ForeignKey("workloads.id"), nullable=False),
    Column("target_id", Key, ForeignKey("targets.id"), nullable=False),
    Column("schedule_kind", Text, nullable=False),
    Column("schedule_digest", Digest, nullable=False),
    Column("schedule", Text, nullable=False),
    Column("how", Text, nullable=False),
    Column("median_us", Double, nullable=False),
    Column("p10_us", Double, nullable=False),
    Column("p90_us", Double, nullable=False),
    Column("gb_per_s", Double, nullable=False),
    Column("roofline_share", Double, nullable=False),
    Column("error", Double),
    Column("tolerance", Double),
    Column("executed_on", Text),
    Column("author", Text, nullable=False),
    Column("measured_at", BigInteger, nullable=False),
    Column("host", Text, nullable=False),
    Column("source_commit", Text, nullable=False),
    Column("state", Text, nullable=False),
    CheckConstraint("schedule_kind IN ('parameters', 'trace')", "schedule_kind"),
    CheckConstraint("how IN ('measured', 'estimated')", "how"),
    CheckConstraint("state IN ('candidate', 'verified', 'promoted', 'retired')", "state"),
    CheckConstraint("0 < p10_us AND p10_us <= median_us AND median_us <= p90_us", "times"),
    # A CHECK lets unknown pass: what must not be NULL is said to be NOT NULL.
    CheckConstraint(
        "how = 'estimated' AND error IS NULL AND tolerance IS NULL AND executed_on IS NULL"
        " OR error IS NOT NULL AND tolerance IS NOT NULL AND executed_on IS NOT NULL"
        " AND 0 <= error AND error <= tolerance AND tolerance < 1e300",
        "compared",
    ),
    CheckConstraint("executed_on <> ''", "executed_on"),
    CheckConstraint("how <> 'estimated' OR state IN ('candidate', 'retired')", "estimates"),
    # What a lookup reads: the fastest of a state, which is its first entry.
    Index("ix_records_fastest", "workload_id", "target_id", "how", "state", "median_us"),
    Index("ix_records_schedule", "workload_id", "target_id", "how", "schedule_digest"),
)

# What searches leave beside records (searches.py); `failed` is a JSON list of digests.
searches = Table(
    "searches",
    metadata,
    Column("workload_id", Key, ForeignKey("workloads.id"), primary_key=True),
    Column("target_id", Key, ForeignKey("targets.id"), primary_key=True),
    Column("space", Digest, primary_key=True),
    Column("asked", Integer, nullable=False),
    Column("failed", Text, nullable=False),
)

tokens = Table(
    "tokens",
    metadata,
    Column("id", Key, primary_key=True),
    Column("team", Text, nullable=False),
    Column("digest", Digest, nullable=False, unique=True),
    Column("created_at", Double, nullable=False),
    Column("revoked_at", Double),
)

# Times are seconds since 1970 by the database's clock.
tasks = Table(
    "tasks",
    metadata,
    Column("id", Key, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("digest", Digest, nullable=False, unique=True),
    Column("payload", Text, nullable=False),
    Column("machine_id", Key, ForeignKey("targets.id")),  # which, as far as it matters; NULL: any
    Column("priority", Double, nullable=False),
    Column("state", Text, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("max_attempts", Integer, nullable=False),
    Column("fence", BigInteger, nullable=False),
    Column("worker", Text),
    Column("lease_expires", Double),
    Column("created_at", Double, nullable=False),
    Column("finished_at", Double),
    Column("result", Text),
    Column("error", Text),
    CheckConstraint("state IN ('queued', 'leased', 'done', 'failed')", "state"),
    CheckConstraint("attempts <= max_attempts", "attempts"),
    CheckConstraint("state <> 'leased' OR (worker IS NOT NULL AND lease_expires IS NOT NULL)", "lease"),
    Index("ix_tasks_next", "state", "machine_id", "priority", "id"),  # state first: leases that ran out are of any
)
