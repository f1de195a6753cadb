"""`SiteName`: parses and formats the names of sites."""

from __future__ import annotations

import re
from typing import NamedTuple

_EXPERT = re.compile(r"(?P<module>(?:.+\.)?[^.]*expert[^.]*)\.(?P<expert>\d+)\.(?P<projection>[^.]+)")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer)\.(\d+)(?:\.|$)")


class SiteName(NamedTuple):
    """The name of a site: its module and, for an expert's projection, the expert and projection.

    Formatted as the module's path, or as one path per expert, as inference servers do, however the model stores its
    experts: ``model.layers.0.mlp.experts.5.gate_proj``. Modules that contain experts have "expert" in their name.

    Args:
        module: Path of a linear layer, a router, or the module that contains the experts.
        expert: The expert's id.
        projection: The expert's projection, as named in the model.

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
        """Parse a site's name.

        Args:
            text: The name, as returned by `str`.

        Returns:
            The parsed name.
        """
        match = _EXPERT.fullmatch(text)
        if match is None:
            return cls(text)
        return cls(match["module"], int(match["expert"]), match["projection"])

    @property
    def is_expert(self) -> bool:
        """Whether the site is a projection of an expert."""
        return self.expert is not None

    @property
    def layer(self) -> int | None:
        """The decoder layer's number; None if the path has none."""
        match = _LAYER.search(self.module)
        return int(match[1]) if match else None

    @property
    def below_layer(self) -> str:
        """The name below its decoder layer, the same for all experts: ``mlp.experts.*.gate_proj``."""
        rest = _LAYER.split(self.module, maxsplit=1)[-1]
        return rest if self.expert is None else f"{rest}.*.{self.projection}"

    def __str__(self) -> str:
        """Format the name."""
        return self.module if self.expert is None else f"{self.module}.{self.expert}.{self.projection}"
