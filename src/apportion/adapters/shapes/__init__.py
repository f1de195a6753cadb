"""Shapes of adapters as modules that hold their own tensors, one file per shape."""
