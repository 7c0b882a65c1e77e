"""The rows of the published 3D table."""

ROWS = ("gnt-add", "gnt-add-shift", "gnt-add-shift-moe", "gnt-shift")
"""The recipes of the published 3D table, in its order."""
