"""The user's data: sources, rows and batches."""
