"""Named arrays on disk: growing trajectories, packed shards, and a resumable order over them.

The functions pack and verify are in the modules of the same names: `from dig_shards.pack import pack`.
"""

from __future__ import annotations

from dig_shards.errors import ShardError
from dig_shards.fields import POSITION_SCALE, FieldSpec
from dig_shards.lock import break_lock
from dig_shards.manifest import Manifest, load_manifest
from dig_shards.order import Cursor, SystemBatch, batch_ids, system_batch
from dig_shards.permutation import permute
from dig_shards.plan import PackPlan, SplitBy, TrajectorySource
from dig_shards.reader import ShardReader, SystemFrames
from dig_shards.record import Record, Source
from dig_shards.trajectory import TrajectoryReader, TrajectoryWriter
from dig_shards.verify import Report, verify_trajectory

__all__ = [
    "POSITION_SCALE",
    "Cursor",
    "FieldSpec",
    "Manifest",
    "PackPlan",
    "Record",
    "Report",
    "ShardError",
    "ShardReader",
    "Source",
    "SplitBy",
    "SystemBatch",
    "SystemFrames",
    "TrajectoryReader",
    "TrajectorySource",
    "TrajectoryWriter",
    "batch_ids",
    "break_lock",
    "load_manifest",
    "permute",
    "system_batch",
    "verify_trajectory",
]
