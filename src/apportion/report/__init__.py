"""One self-contained HTML page from a study, a demonstration, a profile or a plan."""
