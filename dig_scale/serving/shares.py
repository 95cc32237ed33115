"""How a number of samples is divided among the training systems: in proportion to their training frames.

In: the number and the frames by name. Out: a number for each. Seats are given one by one to whom the next is due (Webster's
method), so that asking for more samples never takes one away from a system, and a folder of samples can always be added to.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Mapping

from dig_scale.errors import UserError

_NOT_IN_FOLDER_NAMES = re.compile(r"[^A-Za-z0-9._+-]")


def shares(num: int, frames: Mapping[str, int]) -> dict[str, int]:
    """Samples by name, `num` in all, as near to the proportions of `frames` as whole numbers come; in the order given."""
    counts = dict.fromkeys(frames, 0)
    # the next sample of a system with n of them is due at (2 n + 1) / (2 frames) of the whole
    due = [(0.5 / size, place, name) for place, (name, size) in enumerate(frames.items()) if size > 0]
    if not due:
        raise UserError("no training system has frames: there is nothing to share samples by")
    heapq.heapify(due)
    for _ in range(num):
        _, place, name = due[0]
        counts[name] += 1
        heapq.heapreplace(due, ((counts[name] + 0.5) / frames[name], place, name))
    return counts


def folder_names(names: Iterable[str]) -> dict[str, str]:
    """A folder name for each system; raises UserError where two would be one folder."""
    folders: dict[str, str] = {}
    for name in names:
        folder = _NOT_IN_FOLDER_NAMES.sub("_", name).lstrip(".") or "_"
        if folder in folders.values():
            raise UserError(f"system {name!r}: another system's samples go to {folder!r} too; sample it with --system")
        folders[name] = folder
    return folders
