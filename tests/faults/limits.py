"""What a mutant may take, and how many of a kind are read in a row."""

MEMORY_BYTES = 6 * 2**30  # of address space, of which the libraries take less than one
MUTANT_S = 20
PER_ROUND = 4  # mutants of each kind
