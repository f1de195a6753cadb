"""What apportion uses of other libraries beyond their public interface, one module per library, and nowhere else.

Each module says which versions it was checked on, and what to look at when a new version breaks it. `make test-lowest`
and `make test-newest` run the tests with the lowest and the newest versions that the package allows.

Classes in `apportion.models` are outside this rule: they define the hooks with a leading underscore that transformers
documents for authors of models.
"""
