"""Workloads, targets, records, tokens, tasks."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # SQLite numbers rows by itself only where it is INTEGER


def upgrade() -> None:
    op.create_table(
        "targets",
        sa.Column("id", KEY, nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("ordinal", sa.Integer(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("arch", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_targets")),
        sa.UniqueConstraint("digest", "ordinal", name=op.f("uq_targets_digest_ordinal")),
    )
    op.create_index(op.f("ix_targets_kind_arch"), "targets", ["kind", "arch"], unique=False)
    op.create_table(
        "tasks",
        sa.Column("id", KEY, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("payload", sa.Text(), nullable=False),
        sa.Column("priority", sa.Double(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("max_attempts", sa.Integer(), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("worker", sa.Text(), nullable=True),
        sa.Column("lease_expires", sa.Double(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.Column("result", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.CheckConstraint(
            "state <> 'leased' OR (worker IS NOT NULL AND lease_expires IS NOT NULL)", name=op.f("ck_tasks_lease")
        ),
        sa.CheckConstraint("state IN ('queued', 'leased', 'done', 'failed')", name=op.f("ck_tasks_state")),
        sa.CheckConstraint("attempts <= max_attempts", name=op.f("ck_tasks_attempts")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tasks")),
        sa.UniqueConstraint("digest", name=op.f("uq_tasks_digest")),
    )
    op.create_index("ix_tasks_next", "tasks", ["state", "priority", "id"], unique=False)
    op.create_table(
        "tokens",
        sa.Column("id", KEY, nullable=False),
        sa.Column("team", sa.Text(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("revoked_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tokens")),
        sa.UniqueConstraint("digest", name=op.f("uq_tokens_digest")),
    )
    op.create_table(
        "workloads",
        sa.Column("id", KEY, nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("ordinal", sa.Integer(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workloads")),
        sa.UniqueConstraint("digest", "ordinal", name=op.f("uq_workloads_digest_ordinal")),
    )
    op.create_table(
        "records",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("workload_id", KEY, nullable=False),
        sa.Column("target_id", KEY, nullable=False),
        sa.Column("schedule_kind", sa.Text(), nullable=False),
        sa.Column("schedule_digest", sa.String(length=64), nullable=False),
        sa.Column("schedule", sa.Text(), nullable=False),
        sa.Column("how", sa.Text(), nullable=False),
        sa.Column("median_us", sa.Double(), nullable=False),
        sa.Column("p10_us", sa.Double(), nullable=False),
        sa.Column("p90_us", sa.Double(), nullable=False),
        sa.Column("gb_per_s", sa.Double(), nullable=False),
        sa.Column("roofline_share", sa.Double(), nullable=False),
        sa.Column("error", sa.Double(), nullable=False),
        sa.Column("tolerance", sa.Double(), nullable=False),
        sa.Column("executed_on", sa.Text(), nullable=False),
        sa.Column("author", sa.Text(), nullable=False),
        sa.Column("measured_at", sa.BigInteger(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("source_commit", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.CheckConstraint("executed_on <> ''", name=op.f("ck_records_executed_on")),
        sa.CheckConstraint("how IN ('measured', 'estimated')", name=op.f("ck_records_how")),
        sa.CheckConstraint("schedule_kind IN ('parameters', 'trace')", name=op.f("ck_records_schedule_kind")),
        sa.CheckConstraint("state IN ('candidate', 'verified', 'promoted', 'retired')", name=op.f("ck_records_state")),
        sa.CheckConstraint("0 < p10_us AND p10_us <= median_us AND median_us <= p90_us", name=op.f("ck_records_times")),
        sa.CheckConstraint("0 <= error AND error <= tolerance AND tolerance < 1e300", name=op.f("ck_records_compared")),
        sa.ForeignKeyConstraint(["target_id"], ["targets.id"], name=op.f("fk_records_target_id")),
        sa.ForeignKeyConstraint(["workload_id"], ["workloads.id"], name=op.f("fk_records_workload_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_records")),
    )
    op.create_index(
        "ix_records_fastest", "records", ["workload_id", "target_id", "how", "state", "median_us"], unique=False
    )
    op.create_index(
        "ix_records_schedule", "records", ["workload_id", "target_id", "how", "schedule_digest"], unique=False
    )
