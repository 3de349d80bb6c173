"""Searches: which came to their end, and what failed in them."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "searches",
        sa.Column("workload_id", KEY, nullable=False),
        sa.Column("target_id", KEY, nullable=False),
        sa.Column("space", sa.String(length=64), nullable=False),
        sa.Column("asked", sa.Integer(), nullable=False),
        sa.Column("failed", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["target_id"], ["targets.id"], name=op.f("fk_searches_target_id")),
        sa.ForeignKeyConstraint(["workload_id"], ["workloads.id"], name=op.f("fk_searches_workload_id")),
        sa.PrimaryKeyConstraint("workload_id", "target_id", "space", name=op.f("pk_searches")),
    )
