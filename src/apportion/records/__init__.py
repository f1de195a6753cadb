"""Frozen data and their files: sites, profiles, plans, costs."""
