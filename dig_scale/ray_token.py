"""The secret of a Ray cluster that this process starts for itself; Ray keeps the first one while the process lives."""

from __future__ import annotations

import os
import secrets
from functools import lru_cache


def share_ray_token() -> None:
    """Set RAY_AUTH_TOKEN for this process and its children, always to the same secret, unless the user has set one."""
    os.environ.setdefault("RAY_AUTH_TOKEN", _secret())


@lru_cache(maxsize=1)
def _secret() -> str:
    return secrets.token_hex(32)
