"""`targets`: the kinds of sites, or single projections, that a method may adapt."""

from __future__ import annotations

from apportion.errors import ConfigurationError
from apportion.records.option_texts import layer_ranges
from apportion.records.options import MethodOptions
from apportion.records.site import Layout, Site


def parse_layers(value: str | None, layout: Layout) -> set[int] | None:
    """Parse decoder layers, and check that the model has them.

    Args:
        value: Such as ``4-15`` or ``0,2,4-7``; None for all.
        layout: The model's sites.

    Returns:
        The layers, or None for all.

    Raises:
        ConfigurationError: the text is not a list of layers, or the model does not have a layer.
    """
    if value is None:
        return None
    known = {site.layer for site in layout.others} | {block.layer for block in layout.blocks}
    layers: set[int] = set()
    for first, last in layer_ranges(value):
        # The generator stops at the first missing layer, so that a huge range is not expanded.
        missing = next((layer for layer in range(first, last + 1) if layer not in known), None)
        if missing is not None:
            raise ConfigurationError(
                f"layers={value!r} includes layer {missing}, which this model does not have.",
                found=f"layers {min(known)} to {max(known)}",
            )
        layers.update(range(first, last + 1))
    return layers


def targeted_sites(options: MethodOptions, layout: Layout) -> list[Site]:
    """Return the sites that match a method's targets and layers, in the layout's order.

    Args:
        options: The method's options.
        layout: The model's sites.

    Returns:
        The sites.

    Raises:
        ConfigurationError: no site matches a given target or a kind with a given rank, or the model does not have a
            layer.
    """
    layers = parse_layers(options.layers, layout)
    sites = select_sites(layout, options.targets, layers, by_name="targets" in options.given)
    for kind in options.ranks:
        if not any(site.kind == kind for site in sites):
            raise ConfigurationError(
                f"a rank was given for {kind}, but no site of this kind is adapted.",
                details={"model": layout.describe()},
                fix=f"drop the rank, or add {kind} to the targets",
            )
    return sites


def select_sites(
    layout: Layout, targets: tuple[str, ...], layers: set[int] | None = None, *, by_name: bool = True
) -> list[Site]:
    """Return the sites that match the targets, in the layout's order.

    Args:
        layout: The model's sites.
        targets: Kinds, or single projections of kinds.
        layers: Layers, as returned by `parse_layers`.
        by_name: Whether the user gave the targets. If False, targets that match no site are skipped.

    Returns:
        The sites.

    Raises:
        ConfigurationError: a target given by the user matches no site.
    """
    chosen = [
        site
        for site in layout.sites()
        if (site.kind in targets or f"{site.kind}.{site.projection}" in targets)
        and (layers is None or site.layer in layers)
    ]
    if by_name:
        have = {site.kind for site in chosen} | {f"{site.kind}.{site.projection}" for site in chosen}
        missing = [target for target in targets if target not in have]
        if missing:
            known = sorted({f"{site.kind}.{site.projection}" for site in layout.sites()})
            raise ConfigurationError(
                f"this model has no site for the target {missing[0]!r}{' in these layers' if layers else ''}.",
                details={"model": layout.describe()},
                fix=f"choose among {', '.join(known)}, or a whole kind",
            )
    return chosen
