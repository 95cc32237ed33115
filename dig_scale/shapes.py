"""Axis legend and array aliases (jaxtyping), checked in the tests and free in production.

B systems in a batch, N sites, P unique site pairs, H heads, D width, K radial kernels, C radial channels,
S samples, F frames, E bonds.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

Positions = Float[torch.Tensor, "B N 3"]
PerSample = Float[torch.Tensor, " B"]
SiteMask = Bool[torch.Tensor, "B N"]
SiteIndex = Int[torch.Tensor, "B N"]
FramePositions = Float[np.ndarray, "F N 3"]
