"""Procedures: what happens to adapters during training. One file per procedure."""
