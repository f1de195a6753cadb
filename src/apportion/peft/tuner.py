"""PEFT tuner that attaches a plan's adapters, and saves and loads their tensors."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from apportion.adapters.hosts.experts import ExpertLora
from apportion.adapters.hosts.linear import LinearLora
from apportion.adapters.hosts.weight import WeightLora
from apportion.adapters.hosts.wrapped import WrappedModule
from apportion.adapters.merging import obstacle
from apportion.adapters.specs import ExpertFactors, FactorOptions, FactorSpec
from apportion.discovery import find_sites
from apportion.errors import AdapterError, ConfigurationError, PlanMismatchError
from apportion.experts.dispatch import leave
from apportion.peft.combine import Combination, combined_plan, write_combined
from apportion.peft.config import ApportionConfig
from apportion.peft.mixed import adapter_per_row
from apportion.peft.site_factors import site_factors
from apportion.peft.start import drawn_checksum, start_factors
from apportion.peft.state import check_digests, check_tensors, digests, gathered, restacked, unstacked
from apportion.records.placement import Placement
from apportion.records.plan import Plan
from apportion.records.site import Layout


class ApportionModel(LoraModel):
    """PEFT's LoRA tuner with a plan instead of name patterns.

    Linear layers get PEFT's LoRA layers, or `LinearLora` if several LoRA experts are planned. Stacked experts get
    `ExpertLora`. Routers and other modules with a bare weight get `WeightLora`.
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
        super().__init__(model, peft_config, adapter_name, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Support ``adapter_names``: one adapter per row of the batch."""
        names = kwargs.get("adapter_names")
        if names is None:
            with super()._enable_peft_forward_hooks(*args, **kwargs):
                yield
            return
        with adapter_per_row(self, names, kwargs.get("num_beams") or 1):
            yield

    @staticmethod
    def _check_target_module_exists(peft_config: ApportionConfig, key: str) -> bool:
        """Return whether the plan has an adapter in this module."""
        return key in peft_config.planned_modules

    def _prepare_adapter_config(self, peft_config: ApportionConfig, model_config: dict[str, Any]) -> ApportionConfig:
        """Read the plan once. `target_modules`, which PEFT may shorten to patterns, is only informative."""
        layout = find_sites(self.model)
        peft_config.planned_modules = planned_modules(peft_config.read_plan(), layout)
        peft_config.storage = {
            path: layout.by_name[placements[0].site].storage for path, placements in peft_config.planned_modules.items()
        }
        peft_config.target_modules = set(peft_config.planned_modules)
        sites = (layout.by_name[path] for path, storage in peft_config.storage.items() if storage == "linear")
        peft_config.routed_linear_sites = tuple(site.name for site in sites if site.kind == "experts")
        return peft_config

    def _create_and_replace(
        self,
        lora_config: ApportionConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        """Attach the adapters planned for one module."""
        placements = lora_config.planned_modules[current_key]
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        storage = lora_config.storage[current_key]
        placement = placements[0]
        ours = placement.is_routed or placement.sparsity > 0 or isinstance(target, LinearLora)
        if storage == "linear" and not ours:
            config = copy.copy(lora_config)
            config.r, config.lora_alpha = placement.rank, placement.alpha
            super()._create_and_replace(config, adapter_name, target, target_name, parent, current_key)
            return
        kind = {"fused": ExpertLora, "weight": WeightLora, "linear": LinearLora}[storage]
        module: Any = target if isinstance(target, kind) else kind(base)
        if isinstance(module, LinearLora) and isinstance(target, LoraLayer):
            module.adopt(target)
        options = FactorOptions(
            dropout=lora_config.lora_dropout, frozen_a=placement.sparsity > 0, stored_a=lora_config.store_a
        )
        if isinstance(module, ExpertLora):
            module.add_adapter(adapter_name, _expert_factors(lora_config, placements), options)
        else:
            module.add_adapter(adapter_name, _factor_spec(lora_config, placement), options)
        if adapter_name not in self.active_adapters:
            module.requires_grad_(requires_grad=False)
        module.set_adapter(self.active_adapters, inference_mode=lora_config.inference_mode)
        if module is not target:
            setattr(parent, target_name, module)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attach the adapter and draw every frozen A, which checkpoints do not contain."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config: ApportionConfig = self.peft_config[adapter_name]
        plan = config.read_plan()
        if not plan.is_sparse:
            return
        start_factors(model, adapter_name, config.init_seed, frozen=True)
        drawn = drawn_checksum(plan, find_sites(model).by_name, config.init_seed)
        if config.a_checksum and not config.store_a and drawn != config.a_checksum:
            raise ConfigurationError(
                "the frozen A drawn from the seed differs from the one that the adapter was trained with: another "
                "version of torch draws other numbers.",
                fix=("use the torch version that the adapter was trained with, or train again with --store-a"),
            )

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
        plans = {name: self.peft_config[name].read_plan() for name in adapters}
        plan = combined_plan(plans, weights, combination_type, find_sites(self.model))
        first = self.peft_config[adapters[0]]
        self.peft_config[adapter_name] = ApportionConfig(
            plan=plan.as_dict(),
            r=plan.rank,
            lora_alpha=plan.alpha,
            task_type=first.task_type,
            base_model_name_or_path=first.base_model_name_or_path,
            inference_mode=first.inference_mode,
        )
        self.inject_adapter(self.model, adapter_name)
        self._cast_adapter_dtype(adapter_name=adapter_name, autocast_adapter_dtype=True)
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
        self._check_mergeable(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, **kwargs)

    def _unload_and_optionally_merge(self, *args: Any, merge: bool = True, **kwargs: Any) -> nn.Module:
        """Remove the adapters, merging them first if `merge` is set."""
        if merge:
            self._check_mergeable(kwargs.get("adapter_names"))
        experts = [module.base_layer for module in self.model.modules() if isinstance(module, ExpertLora)]
        unloaded: nn.Module = super()._unload_and_optionally_merge(*args, merge=merge, **kwargs)
        for base in experts:
            leave(base)
        return unloaded

    def _check_mergeable(self, adapter_names: list[str] | None) -> None:
        """Raise an error, before any weight changes, if an adapter cannot be merged."""
        for path, module in self.model.named_modules():
            if not isinstance(module, BaseTunerLayer):
                continue
            names = [name for name in adapter_names or module.active_adapters if name in getattr(module, "lora_A", {})]
            gated = [name for name in names if isinstance(module, LinearLora) and module.num_experts[name] > 1]
            if gated:
                raise ConfigurationError(
                    f"adapter {gated[0]!r} cannot be merged: its gates depend on the input.",
                    place=f"{path} has {module.num_experts[gated[0]]} LoRA experts",
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
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: ApportionConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Return the adapter's tensors, gathered and one per expert, and record their digests."""
        in_model: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        tensors = unstacked(gathered(in_model), model, adapter_name)
        named = {cls._remove_adapter_name_from_key(name, adapter_name): tensor for name, tensor in tensors.items()}
        config.tensor_digests, config.promised_digests = digests(named), None
        return tensors

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: ApportionConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check an adapter's tensors, and return them stacked, under their names in the model."""
        place = f"the adapter {adapter_name!r}"
        check_tensors(state_dict, config.read_plan(), find_sites(model), config.stores, place)
        if config.promised_digests is not None:
            check_digests(state_dict, config.promised_digests, place)
            config.promised_digests = None
        stacked, rest = restacked(state_dict, model, adapter_name)
        named: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, rest)
        return named | stacked


def planned_modules(plan: Plan, layout: Layout) -> dict[str, list[Placement]]:
    """Group a plan's placements by the module that holds the site.

    Args:
        plan: The plan.
        layout: The model's sites.

    Returns:
        Placements by module path: one for a linear layer or a router, many for stacked experts.

    Raises:
        PlanMismatchError: the model lacks a planned site.
    """
    modules: dict[str, list[Placement]] = defaultdict(list)
    for placement in plan.placements:
        site = layout.by_name.get(placement.site)
        if site is None:
            raise PlanMismatchError(
                f"the adapter has a site {placement.site}, which this model lacks.",
                details={"model": layout.describe(), "adapter": f"made for {plan.model}"},
            )
        fused = site.storage == "fused"
        modules[placement.name.module if fused else site.name].append(placement)
    return dict(modules)


def _kept_entries(config: ApportionConfig, placement: Placement) -> Tensor | None:
    """Return the trainable entries of a site's B, or None for all. A checkpoint that is loaded replaces them."""
    if not placement.sparsity or config.dense_b:
        return None
    return torch.zeros(0, dtype=torch.int32) if config.mask is None else config.mask.indices[placement.site]


def _factor_spec(config: ApportionConfig, placement: Placement) -> FactorSpec:
    """Describe what is planned for one matrix."""
    return FactorSpec(
        rank=placement.rank,
        scale=placement.scale,
        num_experts=placement.num_experts,
        top_k=placement.top_k,
        indices=_kept_entries(config, placement),
    )


def _expert_factors(config: ApportionConfig, placements: Iterable[Placement]) -> dict[str, ExpertFactors]:
    """Describe one layer's planned experts by projection."""
    by_projection: dict[str, dict[int, Placement]] = defaultdict(dict)
    for placement in placements:
        _, expert, projection = placement.name
        if expert is not None and projection is not None:
            by_projection[projection][expert] = placement
    factors = {}
    for projection, by_expert in by_projection.items():
        experts = tuple(sorted(by_expert))
        planned = [by_expert[expert] for expert in experts]
        indices = [entries for placement in planned if (entries := _kept_entries(config, placement)) is not None]
        factors[projection] = ExpertFactors(
            experts=experts,
            ranks=tuple(placement.rank for placement in planned),
            scales=tuple(placement.scale for placement in planned),
            indices=tuple(indices) if indices else None,
        )
    return factors
