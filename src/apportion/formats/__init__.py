"""Adapters in the forms that other software reads, written from an adapter's folder without a model's weights."""
