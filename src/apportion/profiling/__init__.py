"""Model and data in, `Profile` out."""
