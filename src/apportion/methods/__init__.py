"""Profile in, placements out: one file a method, and the table that names them all."""
