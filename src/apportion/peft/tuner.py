"""PEFT tuner that attaches a plan's adapters, and saves and loads their tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from apportion.adapters.hosts.experts import ExpertLora
from apportion.adapters.hosts.linear import LinearLora
from apportion.adapters.hosts.weight import WeightLora
from apportion.adapters.hosts.wrapped import WrappedModule
from apportion.adapters.merging import obstacle
from apportion.adapters.shapes.base import Adapter
from apportion.compat.peft import ModulePlace, OpenLoraModel, Tensors
from apportion.discovery import find_sites
from apportion.errors import AdapterError, ConfigurationError
from apportion.experts.dispatch import leave
from apportion.peft.bound import BoundPlan, current_binding
from apportion.peft.combine import Combination, combined_plan, write_combined
from apportion.peft.config import ApportionConfig
from apportion.peft.hosted import adapters_of
from apportion.peft.mixed import adapter_per_row
from apportion.peft.shapes import make_expert_shapes, make_shape
from apportion.peft.site_factors import site_factors
from apportion.peft.start import FrozenDraws, draw_frozen, keep_entries, start_factors
from apportion.peft.state import check_complete, check_digests, check_tensors, digests, from_file, gathered, to_file
from apportion.records.shapes.low_rank import LowRank

HOSTS = {"fused": ExpertLora, "weight": WeightLora, "linear": LinearLora}  # by how a site's weight is stored


class ApportionModel(OpenLoraModel):
    """PEFT's LoRA tuner with a plan instead of name patterns.

    Linear layers get PEFT's LoRA layers, or `LinearLora` if another shape than `low_rank` is planned. Stacked experts
    get `ExpertLora`. Routers and other modules with a bare weight get `WeightLora`.
    """

    prefix = "lora_"
    tuner_layer_cls = BaseTunerLayer

    def __init__(
        self,
        model: nn.Module,
        peft_config: ApportionConfig | dict[str, ApportionConfig],
        adapter_name: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(peft_config, ApportionConfig):  # PeftModel passes a dictionary
            raise ConfigurationError(
                "an adapter of apportion can only be used with a PeftModel: loading it into a plain model would "
                "leave the experts' factors at their initial values.",
                fix="apportion.load(model, folder), or PeftModel.from_pretrained(model, folder)",
            )
        self.bound: dict[str, BoundPlan] = {}  # by adapter
        self._not_started: set[str] = set()
        super().__init__(model, peft_config, adapter_name, **kwargs)

    def one_adapter_per_row(self, names: list[str], num_beams: int) -> AbstractContextManager[None]:
        """Support ``adapter_names``."""
        return adapter_per_row(self, names, num_beams)

    def is_adapted(self, path: str) -> bool:
        """Return whether the plan has an adapter in this module."""
        return path in self._attaching.modules

    def bind(self, config: ApportionConfig) -> ApportionConfig:
        """Bind the plan to the model. `target_modules`, which PEFT may shorten to patterns, is only informative."""
        self._attaching = current_binding() or BoundPlan(config.plan, find_sites(self.model))
        config.target_modules = set(self._attaching.modules)
        return config

    def attach(self, config: ApportionConfig, adapter_name: str, target: nn.Module, place: ModulePlace) -> None:
        """Attach the adapters planned for one module."""
        placements, storage = self._attaching.modules[place.path], self._attaching.storage(place.path)
        placement = placements[0]
        if storage == "linear" and isinstance(placement.shape, LowRank) and not isinstance(target, LinearLora):
            config = copy.copy(config)
            config.r, config.lora_alpha = placement.rank, placement.alpha
            self.attach_lora(config, adapter_name, target, place)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        host_type = HOSTS[storage]
        host: Any = target if isinstance(target, host_type) else host_type(base)
        if isinstance(host, LinearLora) and isinstance(target, LoraLayer):
            host.adopt(target)
        if isinstance(host, ExpertLora):
            shape: Adapter = make_expert_shapes(placements, host.places(), config.sparse)
        else:
            shape = make_shape(placement.shape, host.place(), config.sparse)
        host.add_adapter(adapter_name, shape, config.lora_dropout)
        if adapter_name not in self.active_adapters:
            host.requires_grad_(requires_grad=False)
        host.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        if host is not target:
            setattr(place.parent, place.name, host)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attach the adapter, and keep the plan that is bound to the model until the factors are started."""
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            self._take_out(adapter_name)
            raise
        self.bound[adapter_name] = self._attaching
        self._not_started.add(adapter_name)

    def _take_out(self, adapter_name: str) -> None:
        """Remove what was attached of an adapter, so that the model is as before."""
        modules = dict(self.model.named_modules())
        for path, layer in modules.items():
            if not isinstance(layer, BaseTunerLayer):
                continue
            if adapter_name in adapters_of(layer):
                layer.delete_adapter(adapter_name)
            if not adapters_of(layer):
                base = layer.get_base_layer()
                leave(base)
                parent, _, name = path.rpartition(".")
                setattr(modules[parent], name, base)
        self.peft_config.pop(adapter_name, None)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter.

        Args:
            adapter_name: The adapter.
        """
        super().delete_adapter(adapter_name)
        self.bound.pop(adapter_name, None)
        self._not_started.discard(adapter_name)

    def start(self, adapter_name: str) -> None:
        """Start the factors of a new adapter."""
        if adapter_name not in self._not_started:
            return
        self._not_started.remove(adapter_name)
        config, bound = self.peft_config[adapter_name], self.bound[adapter_name]
        frozen = bound.frozen or self._draw_frozen(config, bound)
        start_factors(self.model, adapter_name, config.init_seed, frozen, only_frozen=bound.is_loaded)
        if bound.kept is not None:
            keep_entries(self.model, adapter_name, bound.kept)
        self.bound[adapter_name] = replace(bound, frozen=None, kept=None)

    def _draw_frozen(self, config: ApportionConfig, bound: BoundPlan) -> FrozenDraws | None:
        """Draw the frozen A that checkpoints do not contain, and check that it is the one of training."""
        if bound.is_loaded and config.store_a:
            return None
        frozen = draw_frozen(bound.plan, bound.layout.by_name, config.init_seed)
        if frozen and config.a_checksum and not config.store_a and frozen.checksum != config.a_checksum:
            raise ConfigurationError(
                "the frozen A drawn from the seed differs from the one that the adapter was trained with: another "
                "version of torch draws other numbers.",
                fix=("use the torch version that the adapter was trained with, or train again with --store-a"),
            )
        return frozen

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: Combination = "cat",
        **kwargs: Any,
    ) -> None:
        """Add a combination of adapters as a new adapter.

        Args:
            adapters: Their names.
            weights: One weight per adapter.
            adapter_name: Name of the new one.
            combination_type: ``cat`` (exact) or ``linear``, as in PEFT.
            **kwargs: Arguments of PEFT's other combination types; ignored.

        Raises:
            ConfigurationError: the adapters cannot be combined in this way, or the name is taken.
            AdapterError: the combined factors are not finite.
        """
        if adapter_name in self.peft_config:
            raise ConfigurationError(f"the model already has an adapter {adapter_name!r}.", fix="choose another name")
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown:
            raise ConfigurationError(f"there is no adapter {unknown[0]!r}.", found=", ".join(self.peft_config))
        plans = {name: self.peft_config[name].plan for name in adapters}
        plan = combined_plan(plans, weights, combination_type, find_sites(self.model))
        first = self.peft_config[adapters[0]]
        self.peft_config[adapter_name] = ApportionConfig(
            plan=plan,
            r=plan.rank,
            lora_alpha=plan.alpha,
            task_type=first.task_type,
            base_model_name_or_path=first.base_model_name_or_path,
            inference_mode=first.inference_mode,
        )
        self.inject_adapter(self.model, adapter_name)
        self.cast_and_start(adapter_name)
        write_combined(self.model, plans, weights, combination_type, adapter_name)
        if any(
            not bool(part.isfinite().all()) for _, *parts in site_factors(self.model, adapter_name) for part in parts
        ):
            self.delete_adapter(adapter_name)
            raise AdapterError(
                f"with the weights {list(weights)}, the combined adapter has non-finite numbers.",
                fix="give smaller weights",
            )

    def merge_adapter(self, adapter_names: list[str] | None = None, **kwargs: Any) -> None:
        """Merge adapters into the weights: either all of them, or none if one cannot be merged.

        Args:
            adapter_names: The adapters; by default the active ones.
            **kwargs: Arguments for PEFT.

        Raises:
            ConfigurationError: an adapter has gates, or a weight is quantised, sharded or not in memory.
        """
        self.check_mergeable(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, **kwargs)

    def unload(self) -> nn.Module:
        """Remove the adapters."""
        with self._experts_left():
            unloaded: nn.Module = super().unload()
        return unloaded

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Merge adapters into the weights, and remove all; the arguments are those of PEFT."""
        with self._experts_left():
            merged: nn.Module = super().merge_and_unload(*args, **kwargs)
        return merged

    @contextmanager
    def _experts_left(self) -> Iterator[None]:
        """Let transformers run the experts again at the end."""
        experts = [module.base_layer for module in self.model.modules() if isinstance(module, ExpertLora)]
        yield
        for base in experts:
            leave(base)

    def check_mergeable(self, adapter_names: list[str] | None) -> None:
        """Raise an error, before any weight changes, if an adapter cannot be merged."""
        for path, module in self.model.named_modules():
            if not isinstance(module, BaseTunerLayer):
                continue
            names = [name for name in adapter_names or module.active_adapters if name in adapters_of(module)]
            gated = [name for name in names if isinstance(module, WrappedModule) and module.lora_shape[name].is_gated]
            if gated:
                raise ConfigurationError(
                    f"adapter {gated[0]!r} cannot be merged: its gates depend on the input.",
                    place=f"{path} has several LoRA experts",
                    fix="use the model with the adapter attached",
                )
            parameters = module.merged_parameters() if isinstance(module, WrappedModule) else ("weight",)
            for parameter in parameters if names else ():
                if reason := obstacle(module.get_base_layer(), parameter):
                    raise ConfigurationError(
                        f"adapter {names[0]!r} cannot be merged: a weight that it adapts {reason}.",
                        place=f"{path}.{parameter}",
                        fix=(
                            "use the model with the adapter attached, or load the model unquantised and on one "
                            "process, and merge there"
                        ),
                    )

    @classmethod
    def to_save(cls, model: nn.Module, config: ApportionConfig, adapter_name: str, tensors: Tensors) -> Tensors:
        """Return the adapter's tensors, gathered and one per expert, and record their digests."""
        in_file = to_file(gathered(tensors), model, adapter_name)
        named = {cls.name_in_file(name, adapter_name): tensor for name, tensor in in_file.items()}
        if named:  # some processes of a sharded model have none
            check_complete(named, config.plan, find_sites(model), config.sparse, f"the adapter {adapter_name!r}")
        config.tensor_digests, config.promised_digests = digests(named), None
        return in_file

    @classmethod
    def to_load(
        cls, model: nn.Module, config: ApportionConfig, adapter_name: str, tensors: Tensors
    ) -> tuple[Tensors, Tensors]:
        """Check an adapter's tensors, and return them stacked, under their names in the model."""
        place = f"the adapter {adapter_name!r}"
        check_tensors(tensors, config.plan, find_sites(model), config.sparse, place)
        if config.promised_digests is not None:
            check_digests(tensors, config.promised_digests, place)
            config.promised_digests = None
        return from_file(tensors, model, adapter_name)
