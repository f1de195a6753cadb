"""Runs one after the other in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from apportion.errors import ApportionError
from apportion.study.executors.base import Benches, Record, Work, do, limited_threads


@dataclass(frozen=True)
class Here:
    """Does work in this process.

    Args:
        benches: Returns the bench of a model.
        threads: Threads of PyTorch.
        keep_adapters: Keep every run's adapter in the study's folder.
    """

    benches: Benches
    threads: int
    keep_adapters: bool = False

    def run(self, work: Sequence[Work]) -> Iterator[tuple[Work, Record | ApportionError]]:
        """Do work in its order, as `Executor.run`."""
        for one in work:
            with limited_threads(self.threads):
                result = do(self.benches(one.job.model), one, keep_adapters=self.keep_adapters)
            yield one, result
