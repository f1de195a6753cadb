"""Stacked experts: how their weights are stored and read."""
