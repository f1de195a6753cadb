"""`SiteName`: what a site is called, parsed and printed in one place."""

from __future__ import annotations

import re
from typing import NamedTuple

_EXPERT = re.compile(r"(?P<module>(?:.+\.)?[^.]*expert[^.]*)\.(?P<expert>\d+)\.(?P<projection>[^.]+)")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer)\.(\d+)(?:\.|$)")


class SiteName(NamedTuple):
    """A site by the module that holds it and, for an expert's projection, which one it is there.

    Written as the module's path, or in the per-expert form that servers use, however a model stores its experts:
    ``model.layers.0.mlp.experts.5.gate_proj``. A module that lists or stacks experts has "expert" in its name.

    Args:
        module: Path of a linear layer, of a router, or of the module that holds the experts.
        expert: The expert's id.
        projection: The expert's projection, as the model names it.

    Example:
        >>> SiteName.parse("model.layers.0.mlp.experts.5.gate_proj")
        SiteName(module='model.layers.0.mlp.experts', expert=5, projection='gate_proj')
        >>> str(SiteName("model.layers.0.self_attn.q_proj"))
        'model.layers.0.self_attn.q_proj'
    """

    module: str
    expert: int | None = None
    projection: str | None = None

    @classmethod
    def parse(cls, text: str) -> SiteName:
        """Read a site's name.

        Args:
            text: As `str` gives it.

        Returns:
            The name.
        """
        match = _EXPERT.fullmatch(text)
        if match is None:
            return cls(text)
        return cls(match["module"], int(match["expert"]), match["projection"])

    @property
    def is_expert(self) -> bool:
        """Whether it is a projection of one expert."""
        return self.expert is not None

    @property
    def layer(self) -> int | None:
        """The decoder layer's number; None where the path names none."""
        match = _LAYER.search(self.module)
        return int(match[1]) if match else None

    @property
    def below_layer(self) -> str:
        """The name below its decoder layer, the same for all experts: ``mlp.experts.*.gate_proj``."""
        rest = _LAYER.split(self.module, maxsplit=1)[-1]
        return rest if self.expert is None else f"{rest}.*.{self.projection}"

    def __str__(self) -> str:
        """Write the name."""
        return self.module if self.expert is None else f"{self.module}.{self.expert}.{self.projection}"
