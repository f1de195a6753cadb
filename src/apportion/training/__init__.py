"""Glue between plans and Hugging Face trainers."""
