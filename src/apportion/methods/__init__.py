"""Planning methods, which turn a profile into placements: one file per method, and their registry."""
