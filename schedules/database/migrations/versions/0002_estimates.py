"""Estimates: records without a comparison, which are neither verified nor promoted."""

import sqlalchemy as sa
from alembic import op
from alembic.operations import BatchOperations

revision = "0002"
down_revision = "0001"

CHECKS = {
    "compared": "how = 'estimated' AND error IS NULL AND tolerance IS NULL AND executed_on IS NULL"
    " OR error IS NOT NULL AND tolerance IS NOT NULL AND executed_on IS NOT NULL"
    " AND 0 <= error AND error <= tolerance AND tolerance < 1e300",
    "estimates": "how <> 'estimated' OR state IN ('candidate', 'retired')",
}
UNCHANGED = {
    "executed_on": "executed_on <> ''",
    "how": "how IN ('measured', 'estimated')",
    "schedule_kind": "schedule_kind IN ('parameters', 'trace')",
    "state": "state IN ('candidate', 'verified', 'promoted', 'retired')",
    "times": "0 < p10_us AND p10_us <= median_us AND median_us <= p90_us",
}


def upgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        # SQLite changes a column by copying the table; only newer SQLAlchemy finds its CHECK constraints.
        before = sa.Table("records", sa.MetaData(), autoload_with=op.get_bind())
        checks = tuple(sa.CheckConstraint(text, _named(name)) for name, text in (CHECKS | UNCHANGED).items())
        before.constraints -= {c for c in before.constraints if isinstance(c, sa.CheckConstraint)}
        with op.batch_alter_table("records", copy_from=before, table_args=checks) as table:
            _nullable(table)
        return
    with op.batch_alter_table("records") as table:
        _nullable(table)
        table.drop_constraint(_named("compared"), type_="check")
        for name, text in CHECKS.items():
            table.create_check_constraint(_named(name), text)


def _named(check: str) -> str:
    return op.f(f"ck_records_{check}")


def _nullable(table: BatchOperations) -> None:
    for name, kind in (("error", sa.Double()), ("tolerance", sa.Double()), ("executed_on", sa.Text())):
        table.alter_column(name, existing_type=kind, nullable=True)
