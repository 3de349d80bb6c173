"""Tasks for a machine: a column of the queue, of what their payloads have said so far."""

import json
from typing import Any

import sqlalchemy as sa
from alembic import op

from vllm_compile.canonical import canonical, sha256

revision = "0003"
down_revision = "0002"

TASKS = sa.table("tasks", *map(sa.column, ("id", "kind", "payload", "digest", "machine_id")))
TARGETS = sa.table("targets", *map(sa.column, ("id", "digest", "ordinal", "text", "kind", "arch")))
KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TEXTS = ("kind", "arch", "device", "driver", "toolkit", "tvm")
NUMBERS = ("cores", "core_mhz", "memory_mhz", "intrinsics")
FINGERPRINT = dict.fromkeys(TEXTS, str) | dict.fromkeys(NUMBERS, int)  # as this schema's version writes it


def upgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":  # which adds no constraint to a table, but a column with one
        refers = "CONSTRAINT fk_tasks_machine_id REFERENCES targets (id)"
        op.execute(f"ALTER TABLE tasks ADD COLUMN machine_id INTEGER {refers}")
    else:
        op.add_column("tasks", sa.Column("machine_id", KEY, nullable=True))
        op.create_foreign_key(op.f("fk_tasks_machine_id"), "tasks", "targets", ["machine_id"], ["id"])
    op.drop_index("ix_tasks_next", "tasks")
    op.create_index("ix_tasks_next", "tasks", ["state", "machine_id", "priority", "id"], unique=False)
    measured = sa.select(TASKS.c.id, TASKS.c.kind, TASKS.c.payload).where(TASKS.c.kind == "measure")
    for task in op.get_bind().execute(measured).all():
        payload = json.loads(task.payload)
        machine = payload.get("machine") if isinstance(payload, dict) else None
        if isinstance(machine, str) and (content := _fingerprint(machine)) is not None:
            digest = sha256(canonical([task.kind, task.payload, machine]))
            changed = sa.update(TASKS).where(TASKS.c.id == task.id)
            op.get_bind().execute(changed.values(machine_id=_target(machine, content), digest=digest))


def _fingerprint(machine: str) -> dict[str, Any] | None:
    """What the text of a machine says; None if it is none: whoever measures refuses such a task."""
    try:
        content = json.loads(machine)
    except ValueError:
        return None
    known = isinstance(content, dict) and {name: type(value) for name, value in content.items()} == FINGERPRINT
    return content if known else None


def _target(text: str, content: dict[str, Any]) -> int:
    """The id of the target of this text, made if there is none."""
    digest = sha256(text)
    same = sa.select(TARGETS.c.id, TARGETS.c.text).where(TARGETS.c.digest == digest)
    rows = op.get_bind().execute(same).all()
    for row in rows:
        if row.text == text:
            return row.id
    about = {"kind": content["kind"], "arch": content["arch"], "ordinal": len(rows)}
    op.get_bind().execute(sa.insert(TARGETS).values(digest=digest, text=text, **about))
    return _target(text, content)
