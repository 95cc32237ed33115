"""The secret of a Ray cluster that this process starts for itself; Ray keeps the first one it sees while the process lives."""

from __future__ import annotations

import os
import secrets
from functools import lru_cache
from pathlib import Path

_TOKEN_OF_RAY = Path(".ray") / "auth_token"


def share_ray_token() -> None:
    """Set RAY_AUTH_TOKEN for this process and its children, always to the same secret.

    Left alone where the user has named a secret or Ray has one in the home folder, which this process may already hold.
    """
    secret = _secret()
    if secret and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secret)


@lru_cache(maxsize=1)
def _secret() -> str | None:
    return None if (Path.home() / _TOKEN_OF_RAY).exists() else secrets.token_hex(32)
