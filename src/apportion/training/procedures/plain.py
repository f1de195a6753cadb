"""Plain training: the adapters train from the first step to the last."""

from __future__ import annotations

from apportion.training.procedures.base import Procedure


class Plain(Procedure):
    """Train in one phase, without further steps."""
