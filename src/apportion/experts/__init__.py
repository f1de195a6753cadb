"""Stacked experts: the forms in which models hold them, and how to run them, with or without adapters."""
