"""The one error of this package: a file, array or request that the caller can put right."""

from __future__ import annotations


class ShardError(ValueError):
    """A store, shard, array or plan is not as the format demands; the message names it and says what to do."""
