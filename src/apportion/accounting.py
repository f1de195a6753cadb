"""`cost`: what a method would cost on a model, before a weight is downloaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from apportion.discovery import find_sites
from apportion.errors import ConfigurationError, PlanMismatchError, ProfileError
from apportion.methods.planning import build_plan, check_settings, even_profile
from apportion.methods.registry import find_method
from apportion.models.auto import auto_class, needs_remote_code, remote_code_refusal
from apportion.records.cost import Cost
from apportion.records.profile import Profile
from apportion.records.site import Layout


def cost(
    model_or_config: nn.Module | PreTrainedConfig | str | os.PathLike[str],
    method: str = "hellora",
    *,
    rank: int = 32,
    alpha: float | None = None,
    seed: int = 0,
    profile: Profile | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> Cost:
    """Count what a method's adapters cost on a model.

    Without a profile every expert is taken to have the same share of the tokens, and the result's `routing` says
    ``even``. Parameters are exact either way, except where `hot` is a coverage.

    Args:
        model_or_config: A model, a configuration, or a folder or ``config.json`` to read one from.
        method: A method's name.
        rank: Rank of every adapter.
        alpha: Scale numerator; it costs nothing.
        seed: Seed of methods that draw at random.
        profile: What was measured on this architecture.
        trust_remote_code: Run Python code that comes with the model.
        **options: The method's own options.

    Returns:
        The cost.

    Raises:
        ConfigurationError: the method, an option or the rank does not fit the model, or the configuration is of no
            known causal language model, or comes with code that was not to be run.
        PlanMismatchError: the profile is of another architecture.
        ProfileError: the method needs a profile, or one with sensitivities.

    Cost: the model is built on the meta device: no weight is allocated.
    """
    if isinstance(model_or_config, nn.Module):
        layout = find_sites(model_or_config)
    else:
        layout = layout_of(model_or_config, trust_remote_code=trust_remote_code)
    if profile is not None and profile.fingerprint != layout.fingerprint:
        raise PlanMismatchError(
            "the profile was made for another architecture.",
            details={"model": layout.describe(), "profile": profile.layout.describe()},
            fix="profile this model",
        )
    if profile is None and find_method(method).reads_tasks:
        raise ProfileError(
            f"what {method} costs depends on the tasks.",
            fix="give a profile, for all of these methods but random_votes one made with --sensitivity",
        )
    settings = check_settings(rank, alpha, seed)
    measured = even_profile(layout) if profile is None else profile
    return build_plan(measured, method, settings, options, "even" if profile is None else "profile").cost


def layout_of(config: PreTrainedConfig | str | os.PathLike[str], *, trust_remote_code: bool = False) -> Layout:
    """Find a model's sites from its configuration alone.

    Args:
        config: A configuration, or a folder or ``config.json`` to read one from.
        trust_remote_code: Run Python code that comes with the model. Without it such a model is refused, unless
            transformers has an implementation of its own.

    Returns:
        The sites.

    Raises:
        ConfigurationError: the configuration cannot be read, is of no known causal language model, or comes with code
            that was not to be run.
    """
    if not isinstance(config, PreTrainedConfig):
        path = os.fspath(config)
        # Code that comes with a model is found by its folder alone.
        place = Path(path).parent if trust_remote_code and Path(path).name == "config.json" else path
        try:
            config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, TypeError, ImportError) as error:
            if needs_remote_code(error):
                raise remote_code_refusal(ConfigurationError, path) from error
            raise ConfigurationError(
                f"the configuration {path} cannot be read.",
                found=_first_line(error),
                fix="give a config.json of a model type that this version of transformers knows",
            ) from error
    auto = auto_class(config, trust_remote_code=trust_remote_code)
    try:
        with torch.device("meta"):
            model = auto.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise ConfigurationError(
            f"no {config.model_type} model can be built from this configuration.",
            found=_first_line(error),
            fix="mend its sizes",
        ) from error
    return find_sites(model)


def _first_line(error: Exception) -> str:
    """Leave out what other libraries advise after saying what is wrong."""
    return str(error).strip().partition("\n")[0]
