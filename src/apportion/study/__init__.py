"""Compare methods fairly: a matrix of runs at equal budgets, and what its numbers can and cannot tell."""
