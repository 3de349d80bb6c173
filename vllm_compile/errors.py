"""Errors that a user can act on: what was wrong, where, and what to do about it.

The command line prints the message as one line and exits with code 2.  Anything
else that escapes is a defect of ours and keeps its traceback.
"""


class VllmCompileError(Exception):
    """Base of every error the toolkit raises on purpose."""


class ModelError(VllmCompileError):
    """The model directory is missing, incomplete, damaged, or not a model that can be imported."""


class UnsupportedError(VllmCompileError):
    """The model is well formed, but an architecture, operator or shape of it is not supported."""


class TargetError(VllmCompileError):
    """The machine, or the named target, cannot run what was asked for."""


class ArtifactError(VllmCompileError):
    """The artifact is damaged, of another schema, or made for another machine."""


class BucketError(VllmCompileError):
    """A bucket file or a trace of requests is missing or damaged, or a plan cannot be made as asked."""


class DatabaseError(VllmCompileError):
    """The tuning database cannot be used as asked: damaged, of another schema, read-only, no such record."""


class UnreachableError(DatabaseError):
    """The database does not answer; the same call may succeed later."""


class LeaseLostError(DatabaseError):
    """A worker's lease on a task has run out: the task is another's, and the result is not taken."""
