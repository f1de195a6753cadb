"""Names of weights in published checkpoints, by which inference servers know them.

transformers renames some when it loads a checkpoint. A server that meets the new names keeps the adapter and never uses
it, or refuses it.
"""

from __future__ import annotations

import re

# By model type: what a module's or a site's name is replaced with. Types that are not listed keep their names.
_RENAMED: dict[str, tuple[tuple[re.Pattern[str], str], ...]] = {
    "mixtral": (
        (re.compile(r"\.mlp\.experts\.(\d+)\.gate_proj$"), r".block_sparse_moe.experts.\1.w1"),
        (re.compile(r"\.mlp\.experts\.(\d+)\.down_proj$"), r".block_sparse_moe.experts.\1.w2"),
        (re.compile(r"\.mlp\.experts\.(\d+)\.up_proj$"), r".block_sparse_moe.experts.\1.w3"),
        (re.compile(r"\.mlp\.gate$"), ".block_sparse_moe.gate"),
    )
}


def checkpoint_name(site: str, model_type: str) -> str:
    """Return the name that a site has in a checkpoint, without ``.weight``.

    Args:
        site: The site's name.
        model_type: The model's type.

    Returns:
        The name.

    Example:
        >>> checkpoint_name("model.layers.0.mlp.experts.5.up_proj", "mixtral")
        'model.layers.0.block_sparse_moe.experts.5.w3'
    """
    for pattern, name in _RENAMED.get(model_type, ()):
        site = pattern.sub(name, site)
    return site
