"""Put a plan's adapters into a model, and their tensors into a checkpoint and back."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from peft import LoraModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from apportion.adapters.experts import ExpertFactors, ExpertLora
from apportion.adapters.routed import RoutedLora
from apportion.adapters.weight import WeightLora
from apportion.discovery import find_sites
from apportion.errors import ConfigurationError, PlanMismatchError
from apportion.peft.config import ApportionConfig
from apportion.records.plan import Placement, Plan
from apportion.records.site import Layout

_EXPERT_SITE = re.compile(r"(.+)\.(\d+)\.([^.]+)")


class ApportionModel(LoraModel):
    """PEFT's LoRA tuner, with the plan in place of name patterns.

    Linear layers get PEFT's own LoRA layers, or `RoutedLora` where several experts are planned. Stacked experts get
    `ExpertLora`, routers and other modules with a bare weight get `WeightLora`.
    """

    prefix = "lora_"
    tuner_layer_cls = BaseTunerLayer

    @staticmethod
    def _check_target_module_exists(peft_config: ApportionConfig, key: str) -> bool:
        """Tell whether the plan has an adapter in this module."""
        return key in peft_config.planned_modules

    def _prepare_adapter_config(self, peft_config: ApportionConfig, model_config: dict[str, Any]) -> ApportionConfig:
        """Read the plan once; `target_modules`, which PEFT may shorten to patterns, is for readers alone."""
        layout = find_sites(self.model)
        peft_config.planned_modules = planned_modules(peft_config.read_plan(), layout)
        peft_config.storage = {
            path: layout.by_name[placements[0].site].storage for path, placements in peft_config.planned_modules.items()
        }
        peft_config.target_modules = set(peft_config.planned_modules)
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
        """Attach what is planned for one module."""
        placements = lora_config.planned_modules[current_key]
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        storage = lora_config.storage[current_key]
        placement = placements[0]
        routed = placement.is_routed or isinstance(target, RoutedLora)
        if storage == "linear" and not routed:
            config = copy.copy(lora_config)
            config.r, config.lora_alpha = placement.rank, placement.alpha
            super()._create_and_replace(config, adapter_name, target, target_name, parent, current_key)
            return
        kind = {"fused": ExpertLora, "weight": WeightLora, "linear": RoutedLora}[storage]
        module: Any = target if isinstance(target, kind) else kind(base)
        scale = placement.alpha / placement.rank
        if isinstance(module, ExpertLora):
            module.add_adapter(adapter_name, _factors(placements), lora_config.lora_dropout)
        elif isinstance(module, RoutedLora):
            if isinstance(target, LoraLayer):
                module.adopt(target)
            module.add_adapter(
                adapter_name,
                placement.rank,
                scale,
                num_experts=placement.num_experts,
                top_k=placement.top_k,
                dropout=lora_config.lora_dropout,
            )
        else:
            module.add_adapter(adapter_name, placement.rank, scale)
        if adapter_name not in self.active_adapters:
            module.requires_grad_(requires_grad=False)
        module.set_adapter(self.active_adapters, inference_mode=lora_config.inference_mode)
        if module is not target:
            setattr(parent, target_name, module)

    def merge_adapter(self, adapter_names: list[str] | None = None, **kwargs: Any) -> None:
        """Fold adapters into the weights, all of them or, where one has a gate, none.

        Args:
            adapter_names: The adapters; the active ones where not given.
            **kwargs: As PEFT takes them.

        Raises:
            ConfigurationError: a gate depends on the input.
        """
        self._refuse_gates(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, **kwargs)

    def _unload_and_optionally_merge(self, *args: Any, merge: bool = True, **kwargs: Any) -> nn.Module:
        """Take the adapters off, folded in or not."""
        if merge:
            self._refuse_gates(kwargs.get("adapter_names"))
        unloaded: nn.Module = super()._unload_and_optionally_merge(*args, merge=merge, **kwargs)
        return unloaded

    def _refuse_gates(self, adapter_names: list[str] | None) -> None:
        """Refuse to merge adapters whose gate depends on the input, before any weight is changed."""
        for path, module in self.model.named_modules():
            if isinstance(module, RoutedLora):
                for name in adapter_names or module.active_adapters:
                    if module.num_experts.get(name, 1) > 1:
                        raise ConfigurationError(
                            f"adapter {name!r} cannot be merged: its gates depend on the input.\n"
                            f"  place:  {path} has {module.num_experts[name]} LoRA experts\n"
                            "  fix:    use the model with the adapter attached"
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
        """Give the adapter's tensors, the experts' factors one by one."""
        found: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        for path, module in _expert_modules(model, adapter_name):
            for name, factors in module.factors[adapter_name].items():
                a = torch.split(found.pop(f"{path}.lora_A.{adapter_name}.{name}"), list(factors.ranks))
                b = torch.split(found.pop(f"{path}.lora_B.{adapter_name}.{name}"), list(factors.ranks))
                for expert, a_RI, b_RO in zip(factors.experts, a, b, strict=True):
                    found[f"{path}.{expert}.{name}.lora_A.{adapter_name}.weight"] = a_RI.clone()
                    found[f"{path}.{expert}.{name}.lora_B.{adapter_name}.weight"] = b_RO.t().contiguous()
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: ApportionConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Stack the experts' factors again, and give every tensor its name in the model."""
        remaining = dict(state_dict)
        stacked = {}
        for path, module in _expert_modules(model, adapter_name):
            source = path if any(key.startswith(path + ".") for key in remaining) else f"base_model.model.{path}"
            for name, factors in module.factors[adapter_name].items():
                keys = [f"{source}.{expert}.{name}" for expert in factors.experts]
                if all(f"{key}.lora_{side}.weight" in remaining for key in keys for side in "AB"):
                    a = [remaining.pop(f"{key}.lora_A.weight") for key in keys]
                    b = [remaining.pop(f"{key}.lora_B.weight").t() for key in keys]
                    stacked[f"{path}.lora_A.{adapter_name}.{name}"] = torch.cat(a)
                    stacked[f"{path}.lora_B.{adapter_name}.{name}"] = torch.cat(b)
        rest: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, remaining)
        return rest | stacked


def planned_modules(plan: Plan, layout: Layout) -> dict[str, list[Placement]]:
    """Gather a plan's placements by the module that holds the site.

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
                f"the adapter stands on {placement.site}, which this model lacks.\n"
                f"  model:    {layout.describe()}\n  adapter:  made for {plan.model}"
            )
        fused = site.storage == "fused"
        modules[site.name.rsplit(".", 2)[0] if fused else site.name].append(placement)
    return dict(modules)


def _factors(placements: Iterable[Placement]) -> dict[str, ExpertFactors]:
    """Describe one layer's planned experts by projection."""
    by_projection: dict[str, list[tuple[int, Placement]]] = defaultdict(list)
    for placement in placements:
        _, expert, projection = cast("re.Match[str]", _EXPERT_SITE.fullmatch(placement.site)).groups()
        by_projection[projection].append((int(expert), placement))
    return {
        projection: ExpertFactors(
            experts=tuple(expert for expert, _ in planned),
            ranks=tuple(placement.rank for _, placement in planned),
            scales=tuple(placement.alpha / placement.rank for _, placement in planned),
        )
        for projection, planned in ((name, sorted(found)) for name, found in by_projection.items())
    }


def _expert_modules(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, ExpertLora]]:
    """Go through the stacked experts that have an adapter of this name."""
    for path, module in model.named_modules():
        if isinstance(module, ExpertLora) and adapter_name in module.factors:
            yield path, module
