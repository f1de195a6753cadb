"""PEFT's registry of methods, its table of LoRA layers, and the steps of its tuner.

Checked on: peft 0.21.
When it breaks: `peft.utils.register_peft_method` requires that `PeftType`, an enumeration, has the method's name.
`peft.tuners.lora.LoraModel` chooses a LoRA layer by the class of a layer and of its weight. `OpenLoraModel` overrides
methods of `peft.tuners.tuners_utils.BaseTuner`; look there for new names and for the order of the steps.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.utils import PeftType, register_peft_method
from torch import Tensor, nn

Tensors = dict[str, Tensor]


class ModulePlace(NamedTuple):
    """Where a module is in a model: its path, its parent, and its name there."""

    path: str
    parent: nn.Module
    name: str


def register_method(name: str, config_class: type[Any], model_class: type[Any], prefix: str) -> None:
    """Register a method with PEFT, once. Its name becomes a member of PEFT's enumeration.

    Args:
        name: The method's name, in capitals.
        config_class: Class of its configuration.
        model_class: Class of its tuner.
        prefix: Prefix of the names of its parameters.
    """
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    setattr(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    register_peft_method(name=name.lower(), config_cls=config_class, model_cls=model_class, prefix=prefix)


class OpenLoraModel(LoraModel):
    """PEFT's tuner for LoRA, with public names for the steps that a subclass replaces."""

    @abstractmethod
    def one_adapter_per_row(self, names: list[str], num_beams: int) -> AbstractContextManager[None]:
        """Return a context in which each row of a batch uses an adapter of its own.

        Args:
            names: Adapters by row.
            num_beams: Beams per row in generation.

        Returns:
            The context.
        """

    @abstractmethod
    def bind(self, config: Any) -> Any:
        """Prepare for an adapter, before any module changes.

        Args:
            config: The adapter's configuration.

        Returns:
            The configuration.
        """

    @abstractmethod
    def is_adapted(self, path: str) -> bool:
        """Return whether the adapter that is being attached changes a module.

        Args:
            path: The module's path.

        Returns:
            Whether the plan names it.
        """

    @abstractmethod
    def attach(self, config: Any, adapter_name: str, target: nn.Module, place: ModulePlace) -> None:
        """Attach an adapter to one module.

        Args:
            config: The adapter's configuration.
            adapter_name: The adapter.
            target: The module, or the layer that adapts it already.
            place: Where it is in the model.
        """

    def attach_lora(self, config: Any, adapter_name: str, target: nn.Module, place: ModulePlace) -> None:
        """Attach PEFT's own LoRA to one linear layer; the arguments are those of `attach`."""
        super()._create_and_replace(config, adapter_name, target, place.name, place.parent, place.path)

    @abstractmethod
    def start(self, adapter_name: str) -> None:
        """Start a new adapter's factors, whose types are set.

        Args:
            adapter_name: The adapter. It may be started already.
        """

    @abstractmethod
    def check_mergeable(self, adapter_names: list[str] | None) -> None:
        """Raise an error, before any weight changes, if an adapter cannot be merged.

        Args:
            adapter_names: The adapters; the active ones if None.
        """

    @classmethod
    @abstractmethod
    def to_save(cls, model: nn.Module, config: Any, adapter_name: str, tensors: Tensors) -> Tensors:
        """Return an adapter's tensors as a checkpoint holds them.

        Args:
            model: The model.
            config: The adapter's configuration.
            adapter_name: The adapter.
            tensors: Its tensors in the model, by name.

        Returns:
            Tensors by name, which still has the adapter's.
        """

    @classmethod
    @abstractmethod
    def to_load(cls, model: nn.Module, config: Any, adapter_name: str, tensors: Tensors) -> tuple[Tensors, Tensors]:
        """Return a checkpoint's tensors as the model takes them.

        Args:
            model: The model.
            config: The adapter's configuration.
            adapter_name: The adapter.
            tensors: Tensors of the checkpoint, by name.

        Returns:
            Those with their names in the model, and those that PEFT gives their names.
        """

    @classmethod
    def name_in_file(cls, name: str, adapter_name: str) -> str:
        """Return a tensor's name without the adapter's."""
        without: str = cls._remove_adapter_name_from_key(name, adapter_name)
        return without

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is None:
            context = super()._enable_peft_forward_hooks(*args, **kwargs)
        else:
            context = self.one_adapter_per_row(names, kwargs.get("num_beams") or 1)
        with context:
            yield

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return self.bind(peft_config)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:
        return self.is_adapted(key)

    def _create_and_replace(
        self,
        lora_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        self.attach(lora_config, adapter_name, target, ModulePlace(current_key, parent, target_name))

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        self.start(adapter_name)

    def cast_and_start(self, adapter_name: str) -> None:
        """Set the types of a new adapter's factors, and start them, as PEFT does after `inject_adapter`."""
        self._cast_adapter_dtype(adapter_name)

    def _unload_and_optionally_merge(self, *args: Any, merge: bool = True, **kwargs: Any) -> nn.Module:
        if merge:
            self.check_mergeable(kwargs.get("adapter_names"))
        unloaded: nn.Module = super()._unload_and_optionally_merge(*args, merge=merge, **kwargs)
        return unloaded

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: Tensors, unwanted_adapter_names: list[str]
    ) -> Tensors:
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return cls.to_save(model, config, adapter_name, tensors)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: Tensors
    ) -> Tensors:
        named, rest = cls.to_load(model, config, adapter_name, state_dict)
        by_peft: Tensors = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, rest)
        return by_peft | named


def has_lora_layer(module: nn.Module) -> bool:
    """Return whether PEFT has a LoRA layer for a linear layer.

    Args:
        module: The linear layer, which does not change.

    Returns:
        Whether a LoRA layer of rank 1 could be built around it. It is dropped.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            LoraModel._create_new_module(LoraConfig(r=1), "default", module, r=1, lora_alpha=1)
    except (TypeError, ValueError):
        return False
    return True
