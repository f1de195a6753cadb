"""`load`: read a saved adapter, check that it is complete, and attach it to a model."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from apportion.discovery import find_sites
from apportion.errors import AdapterError, ApportionError, ApportionWarning, ConfigurationError, PlanError, shortened
from apportion.peft.attach import check_architecture
from apportion.peft.bound import BoundPlan, binding
from apportion.peft.config import PEFT_TYPE, ApportionConfig
from apportion.peft.state import check_digests, check_tensors
from apportion.records.json_file import read_json
from apportion.records.outputs import ADAPTER_CONFIG_FILE, ADAPTER_TENSORS_FILE
from apportion.records.plan import Plan
from apportion.records.site import Layout


def load(model: nn.Module, path: str | os.PathLike[str], **kwargs: Any) -> PeftModel:
    """Load a saved adapter with `PeftModel.from_pretrained`, after checking it.

    If the adapter was trained on top of another one, that one is merged into the model first.

    Args:
        model: The base model.
        path: The folder that `save_pretrained` wrote.
        **kwargs: Arguments for `PeftModel.from_pretrained`, such as ``is_trainable``.

    Returns:
        The model with the adapter.

    Raises:
        PlanMismatchError: the adapter belongs to another architecture.
        PlanError: its plan was changed.
        ConfigurationError: there is no adapter in the folder, or the model has adapters already.
        AdapterError: its configuration is damaged, or its tensors do not match its plan or their digests. The model is
            then unchanged.
    """
    if isinstance(model, PeftModel):
        raise ConfigurationError(
            "the model has adapters already.", fix="model.load_adapter(folder, adapter_name=...), or load into the base"
        )
    config = read_adapter_config(path)
    layout = find_sites(model)
    check_architecture(layout, config.plan)
    if config.plan.is_sparse and kwargs.get("low_cpu_mem_usage"):
        raise ConfigurationError(
            "a sparse adapter cannot be loaded with low_cpu_mem_usage: its A is drawn, not read.", fix="leave it out"
        )
    read_state(path, config, layout)
    _check_chain(path, config)
    base = _with_adapter_below(model, path, config)
    try:
        with binding(BoundPlan(config.plan, layout, is_loaded=True)):
            return PeftModel.from_pretrained(base, os.fspath(path), config=config, **kwargs)
    except (AdapterError, ConfigurationError) as error:
        raise _named(error, path) from error


def read_adapter_plan(path: str | os.PathLike[str]) -> Plan:
    """Read the plan that a saved adapter was made from.

    Args:
        path: The adapter's folder.

    Returns:
        The plan.

    Raises:
        ConfigurationError: there is no adapter of this package in the folder.
        AdapterError: its configuration is damaged.
        PlanError: the plan in the folder was changed.
    """
    plan: Plan = read_adapter_config(path).plan
    return plan


def read_adapter_config(path: str | os.PathLike[str]) -> ApportionConfig:
    """Read a saved adapter's configuration.

    Args:
        path: The adapter's folder.

    Returns:
        The configuration.

    Raises:
        ConfigurationError: there is no adapter of this package in the folder.
        AdapterError: the configuration is damaged.
        PlanError: the plan in it was changed.
    """
    folder = os.fspath(path)
    file = Path(folder, ADAPTER_CONFIG_FILE)
    if not file.is_file():
        raise ConfigurationError(f"there is no adapter in {folder}.", fix=f"give a folder with {ADAPTER_CONFIG_FILE}")

    def damaged(found: str) -> AdapterError:
        return AdapterError(
            f"{file} cannot be read: it is truncated or damaged.", found=found, fix="copy it again, or train it again"
        )

    fields = read_json(file, damaged)
    if fields.get("peft_type") != PEFT_TYPE:
        raise ConfigurationError(f"the adapter in {folder} was not made by apportion.", fix="load it with peft itself")
    try:
        config: ApportionConfig = ApportionConfig.from_pretrained(folder)
    except (AdapterError, ConfigurationError, PlanError) as error:
        raise _named(error, path) from error
    except (TypeError, ValueError, KeyError, AttributeError) as error:  # of PEFT, about its own fields
        raise damaged(shortened(str(error), 300)) from error
    return config


def _named(error: ApportionError, path: str | os.PathLike[str]) -> ApportionError:
    """Add the adapter's path to an error's message."""
    return error.within(f"the adapter in {os.fspath(path)} cannot be loaded")


def check_mergeable(plan: Plan, path: str | os.PathLike[str] | None) -> None:
    """Check that an adapter can be merged into weights.

    Args:
        plan: The adapter's plan.
        path: Its folder, for the message.

    Raises:
        ConfigurationError: the adapter has gates that depend on the input.
    """
    routed = next((placement for placement in plan.placements if placement.is_routed), None)
    if routed is not None:
        raise ConfigurationError(
            f"the adapter in {path} cannot be merged: its gates depend on the input.",
            place=f"{routed.site} has {routed.num_experts} LoRA experts",
            fix="use the model with the adapter attached",
        )


def merge_below(model: nn.Module, path: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, str]]:
    """Merge an adapter into a model, so that another one can be trained on top.

    Args:
        model: The base model.
        path: The adapter's folder.

    Returns:
        The model, and the reference to the merged adapter for the next adapter's configuration.

    Raises:
        ConfigurationError: there is no adapter in the folder, or its gates depend on the input.
        PlanMismatchError: it belongs to another architecture.
    """
    check_mergeable(read_adapter_plan(path), path)
    merged = load(model, path).merge_and_unload(safe_merge=True)
    return merged, {"path": str(Path(path).resolve()), "sha256": _weights_digest(path)}


def read_state(path: str | os.PathLike[str], config: ApportionConfig, layout: Layout) -> dict[str, Tensor]:
    """Read an adapter's tensors, and check that they are those that were saved for its plan.

    Args:
        path: The adapter's folder.
        config: Its configuration.
        layout: The base model's sites.

    Returns:
        The tensors under their names in the file.

    Raises:
        AdapterError: the file is missing or damaged, or its tensors are not exactly those of the plan, or not those
            that were saved.
    """
    state, place = _read_tensors(path), f"the adapter in {os.fspath(path)}"
    check_tensors(state, config.plan, layout, config.sparse, place)
    if config.promised_digests is None:
        warnings.warn(
            f"{place} has no digests, so changes to its tensors cannot be detected: it was written by an older "
            "version. Save it again to add them.",
            ApportionWarning,
            stacklevel=3,
        )
    else:
        check_digests(state, config.promised_digests, place)
    return state


def _read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read an adapter's tensors."""
    file = Path(path, ADAPTER_TENSORS_FILE)
    if not file.is_file():
        raise AdapterError(
            f"the adapter in {os.fspath(path)} has no {ADAPTER_TENSORS_FILE}.", fix="copy the whole folder"
        )
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise AdapterError(
            f"{file} cannot be read: it is truncated or damaged.",
            found=str(error),
            fix="copy it again, or train it again",
        ) from error


def _weights_digest(path: str | os.PathLike[str]) -> str:
    """Hash an adapter's tensors."""
    return hashlib.sha256(Path(path, ADAPTER_TENSORS_FILE).read_bytes()).hexdigest()


def _check_chain(path: str | os.PathLike[str], config: ApportionConfig) -> None:
    """Raise an error if adapters are trained on top of each other in a cycle."""
    seen = set()
    folder: Path | None = Path(path)
    while folder is not None:
        if folder.resolve() in seen:
            raise AdapterError(
                f"the adapter in {os.fspath(path)} claims to be trained on top of itself.", place=folder,
                fix="copy the whole adapter again, or train it again",
            )  # fmt: skip
        seen.add(folder.resolve())
        below = config.on_top_of
        folder = Path(below["path"]) if below and Path(below["path"]).is_dir() else None
        config = config if folder is None else read_adapter_config(folder)


def _with_adapter_below(model: nn.Module, path: str | os.PathLike[str], config: ApportionConfig) -> nn.Module:
    """Merge the adapter that an adapter was trained on top of, if any."""
    below = config.on_top_of
    if below is None:
        return model
    folder = Path(below["path"])
    if not os.path.isfile(folder / ADAPTER_TENSORS_FILE) or _weights_digest(folder) != below["sha256"]:
        raise ConfigurationError(
            f"the adapter in {path} was trained on top of another one, which is missing or was changed.",
            place=folder,
            fix="restore that adapter",
        )
    merged, _ = merge_below(model, folder)
    return merged
