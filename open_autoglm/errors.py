"""The error tree.

    AutoGLMError
    └── UserError             the request cannot be met as written: one sentence, exit code 2
        ├── CheckpointError   the checkpoint is missing, damaged or not acceptable
        └── StudyError        the output directory cannot be used

What a *runtime* does wrong is never one of these: it becomes a trial's ``status`` and ``reason``.
Anything else that is raised is a bug of ours (exit code 1, with its traceback).
"""

from __future__ import annotations


class AutoGLMError(Exception):
    """Base of every error this package raises on purpose."""


class UserError(AutoGLMError):
    """The request is wrong; the message says what, where, and how to mend it."""


class CheckpointError(UserError):
    """The checkpoint is missing, damaged, or of a kind that is refused by default."""


class StudyError(UserError):
    """The output directory cannot be used for this study."""
