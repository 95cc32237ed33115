"""Where a template stands among the site features of a residue: importers write it there, networks read it."""

from __future__ import annotations

WAVELENGTHS = (320.0, 160.0, 80.0, 40.0, 20.0)
"""Å; of the sines and cosines that tell places."""
LENGTH = 100.0
"""Å; unit of the coordinates themselves."""
_WAVES = 6 * len(WAVELENGTHS)
WAVES, TURNS, PLACES = slice(0, _WAVES), slice(_WAVES, _WAVES + 9), slice(_WAVES + 9, _WAVES + 12)
"""Waves of the three coordinates, the nine of the frame, and the coordinates, all along the template's own axes."""
TEMPLATE_FEATURES = PLACES.stop
