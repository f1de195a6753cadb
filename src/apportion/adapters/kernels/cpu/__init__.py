"""Stacked experts with low-rank terms on a CPU, where moving rows through memory costs more than arithmetic."""
