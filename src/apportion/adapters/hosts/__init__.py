"""Modules that carry adapters: a linear layer, stacked experts, a bare weight."""
