"""`cost`: the cost of a method on a model, without downloading weights."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from apportion.configurations import EMBEDDED, config_source, keep_layout, known_configurations, known_layout
from apportion.discovery import find_sites
from apportion.errors import ConfigurationError, shortened
from apportion.methods.planning import check_settings, cost_on
from apportion.models.auto import auto_class
from apportion.models.sources import find_model, first_line, read_config
from apportion.records.cost import Cost
from apportion.records.profile import Profile
from apportion.records.site import Layout


def cost(
    model_or_config: nn.Module | PreTrainedConfig | str | os.PathLike[str],
    method: str = "hellora",
    *,
    rank: int = 32,
    seed: int = 0,
    profile: Profile | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> Cost:
    """Count the cost of a method's adapters on a model.

    Without a profile, even routing is assumed, and the result's `routing` is ``even``. Parameters are exact in both
    cases, unless `hot` is a coverage.

    Args:
        model_or_config: A model, a configuration, or a name for `layout_of`.
        method: Name of the method.
        rank: Rank of every adapter.
        seed: Random seed, for methods that sample.
        profile: Profile of this architecture.
        trust_remote_code: Run Python code that comes with the model.
        **options: Options of the method.

    Returns:
        The cost.

    Raises:
        ConfigurationError: the method, an option or the rank does not fit the model, the configuration is not that of
            a known causal language model, or it needs remote code that is not trusted.
        PlanMismatchError: the profile is of another architecture.
        ProfileError: the method needs a profile, or one with sensitivities.

    Cost: seconds for a new configuration: the model is built on the meta device, without memory for its weights. Its
        layout is cached.
    """
    if isinstance(model_or_config, nn.Module):
        layout = find_sites(model_or_config)
    else:
        fingerprint = None if profile is None else profile.fingerprint
        layout = layout_of(model_or_config, fingerprint, trust_remote_code=trust_remote_code)
    return cost_on(layout, method, check_settings(rank, None, seed), options, profile)


def layout_of(
    config: PreTrainedConfig | str | os.PathLike[str],
    fingerprint: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> Layout:
    """Find a model's sites from its configuration alone.

    Args:
        config: A configuration, ``embedded``, one of `known_configurations`, a hub id, a folder or a ``config.json``.
        fingerprint: Expected fingerprint, if any. A cached layout with another fingerprint is ignored.
        trust_remote_code: Run Python code that comes with the model. If False, models that need it are refused, unless
            transformers implements them.

    Returns:
        The sites.

    Raises:
        ConfigurationError: the configuration cannot be read, is not that of a known causal language model, or needs
            remote code that is not trusted.
    """
    if isinstance(config, PreTrainedConfig):
        return find_sites(empty_model(config, trust_remote_code=trust_remote_code))
    layout = None if trust_remote_code else known_layout(config, fingerprint)
    if layout is None:
        model = empty_model(config, trust_remote_code=trust_remote_code)
        try:
            layout = find_sites(model)
        except ConfigurationError as error:
            raise error.within(os.fspath(config)) from error
        if not trust_remote_code:
            keep_layout(config, layout)
    return layout


def empty_model(
    config: PreTrainedConfig | str | os.PathLike[str], *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build a model on the meta device: all of its modules, and no weights.

    Args:
        config: A configuration, or a name that `layout_of` takes.
        trust_remote_code: Run Python code that comes with the model.

    Returns:
        The model.

    Raises:
        ConfigurationError: the configuration cannot be read, or is not that of a known causal language model.
    """
    if isinstance(config, PreTrainedConfig):
        return _built(config, trust_remote_code=trust_remote_code)
    read = _read(os.fspath(config), trust_remote_code=trust_remote_code)
    try:
        return _built(read, trust_remote_code=trust_remote_code)
    except ConfigurationError as error:
        raise error.within(os.fspath(config)) from error


def _built(config: PreTrainedConfig, *, trust_remote_code: bool) -> PreTrainedModel:
    """Build a model on the meta device from its configuration."""
    auto = auto_class(config, trust_remote_code=trust_remote_code)
    try:
        with torch.device("meta"):
            return auto.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises errors of many kinds
        raise ConfigurationError(
            f"a model of type {config.model_type} cannot be built from this configuration.",
            found=shortened(first_line(error), 300),
            fix="correct the sizes in the configuration",
        ) from error


def _read(name: str, *, trust_remote_code: bool) -> PreTrainedConfig:
    """Read a configuration."""
    source = config_source(name)
    # transformers finds remote code only from the model's folder.
    place = source.removesuffix("config.json") if trust_remote_code else source
    options = find_model(source, (EMBEDDED, *known_configurations()), ConfigurationError)
    return read_config(place, ConfigurationError, trust_remote_code=trust_remote_code, **options)
