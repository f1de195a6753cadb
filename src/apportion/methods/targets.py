"""`targets`: which kinds of sites, or which single projections, a method may use."""

from __future__ import annotations

from apportion.errors import ConfigurationError
from apportion.records.option_texts import layer_ranges
from apportion.records.options import MethodOptions
from apportion.records.site import Layout, Site


def parse_layers(value: str | None, layout: Layout) -> set[int] | None:
    """Read decoder layers from a text.

    Args:
        value: Such as ``4-15`` or ``0,2,4-7``; None for all.
        layout: The model's sites, for the layers that there are.

    Returns:
        The layers, or None for all.

    Raises:
        ConfigurationError: the text is no list of layers, or the model lacks one of them.
    """
    if value is None:
        return None
    known = {site.layer for site in layout.others} | {block.layer for block in layout.blocks}
    layers: set[int] = set()
    for first, last in layer_ranges(value):
        # Comparing as it goes, this ends at the first layer that the model lacks, however far the range goes on.
        lacking = next((layer for layer in range(first, last + 1) if layer not in known), None)
        if lacking is not None:
            raise ConfigurationError(
                f"layers={value!r} asks for layer {lacking}, which this model lacks.",
                found=f"layers {min(known)} to {max(known)}",
            )
        layers.update(range(first, last + 1))
    return layers


def targeted_sites(options: MethodOptions, layout: Layout) -> list[Site]:
    """Give the sites that a method's targets and layers leave, in the layout's order.

    Args:
        options: The method's options.
        layout: The model's sites.

    Returns:
        The sites.

    Raises:
        ConfigurationError: the model has nothing for a target, a layer or a kind with a rank of its own.
    """
    layers = parse_layers(options.layers, layout)
    sites = select_sites(layout, options.targets, layers, by_name="targets" in options.given)
    for kind in options.ranks:
        if not any(site.kind == kind for site in sites):
            raise ConfigurationError(
                f"a rank was given for {kind}, and no {kind} is adapted.",
                details={"model": layout.describe()},
                fix=f"leave the rank out, or add {kind} to the targets",
            )
    return sites


def select_sites(
    layout: Layout, targets: tuple[str, ...], layers: set[int] | None = None, *, by_name: bool = True
) -> list[Site]:
    """Give the sites that the targets name, in the layout's order.

    Args:
        layout: The model's sites.
        targets: Kinds, or single projections of kinds.
        layers: As `parse_layers` returns them.
        by_name: Whether somebody asked for these targets; of a method's own ones, kinds that the model lacks are left
            out.

    Returns:
        The sites.

    Raises:
        ConfigurationError: the model has no site for a target that was asked for by name.
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
                f"this model has nothing for the target {missing[0]!r}{' in these layers' if layers else ''}.",
                details={"model": layout.describe()},
                fix=f"choose among {', '.join(known)}, or a whole kind",
            )
    return chosen
