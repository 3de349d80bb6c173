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
