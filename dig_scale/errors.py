"""Errors that a user can act on: one clear line with the next step. The command line prints them without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input or an unmet precondition; the message names what was found, what was expected and the next step."""


class RecipeError(UserError):
    """A recipe or an override does not fit the schema."""


class InvalidSystemError(UserError):
    """A molecular system is inconsistent; the message names the system, the atom and the file."""


class TrainingError(UserError):
    """Training cannot go on; the message names the step and the systems of the batch."""
