"""Self-contained HTML pages of a study, a demonstration, a profile or a plan."""
