"""Modules that know tensors and nothing of models."""
