"""Put a plan's adapters into a model, and their tensors into a checkpoint and back."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from peft import LoraModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from apportion.adapters.experts import ExpertLora
from apportion.adapters.factors import ExpertFactors, FrozenFactor, SparseFactor
from apportion.adapters.linear import LinearLora
from apportion.adapters.weight import WeightLora
from apportion.discovery import find_sites
from apportion.errors import ConfigurationError, PlanMismatchError
from apportion.peft.combine import Combination, combined_plan, write_combined
from apportion.peft.config import ApportionConfig
from apportion.peft.start import drawn_checksum, start_factors
from apportion.records.plan import Placement, Plan
from apportion.records.site import Layout

_EXPERT_SITE = re.compile(r"(.+)\.(\d+)\.([^.]+)")


class ApportionModel(LoraModel):
    """PEFT's LoRA tuner, with the plan in place of name patterns.

    Linear layers get PEFT's own LoRA layers, or `LinearLora` where several experts are planned. Stacked experts get
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
        ours = placement.is_routed or placement.sparsity > 0 or isinstance(target, LinearLora)
        if storage == "linear" and not ours:
            config = copy.copy(lora_config)
            config.r, config.lora_alpha = placement.rank, placement.alpha
            super()._create_and_replace(config, adapter_name, target, target_name, parent, current_key)
            return
        kind = {"fused": ExpertLora, "weight": WeightLora, "linear": LinearLora}[storage]
        module: Any = target if isinstance(target, kind) else kind(base)
        scale = placement.alpha / placement.rank
        frozen: dict[str, Any] = {"frozen_a": placement.sparsity > 0, "stored_a": lora_config.store_a}
        if isinstance(module, ExpertLora):
            factors = _factors(placements, lambda placed: _kept_entries(lora_config, placed))
            module.add_adapter(adapter_name, factors, lora_config.lora_dropout, **frozen)
        elif isinstance(module, LinearLora):
            if isinstance(target, LoraLayer):
                module.adopt(target)
            module.add_adapter(
                adapter_name,
                placement.rank,
                scale,
                num_experts=placement.num_experts,
                top_k=placement.top_k,
                dropout=lora_config.lora_dropout,
                indices=_kept_entries(lora_config, placement),
                **frozen,
            )
        else:
            indices = _kept_entries(lora_config, placement)
            module.add_adapter(adapter_name, placement.rank, scale, indices=indices, **frozen)
        if adapter_name not in self.active_adapters:
            module.requires_grad_(requires_grad=False)
        module.set_adapter(self.active_adapters, inference_mode=lora_config.inference_mode)
        if module is not target:
            setattr(parent, target_name, module)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attach, and draw every frozen A: no checkpoint brings it."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config: ApportionConfig = self.peft_config[adapter_name]
        plan = config.read_plan()
        if not plan.is_sparse:
            return
        start_factors(model, adapter_name, config.init_seed, frozen=True)
        drawn = drawn_checksum(plan, find_sites(model).by_name, config.init_seed)
        if config.a_checksum and not config.store_a and drawn != config.a_checksum:
            raise ConfigurationError(
                "the frozen A that the seed draws here is not the one that the adapter was trained with: another "
                "version of torch draws other numbers.\n"
                "  fix:  use the torch version that the adapter was trained with, or train it with the A stored "
                "(--store-a)"
            )

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: Combination = "cat",
        **kwargs: Any,
    ) -> None:
        """Add an adapter that is made of others.

        Args:
            adapters: Their names.
            weights: One weight an adapter.
            adapter_name: Name of the new one.
            combination_type: ``cat``, which is exact, or ``linear``; as PEFT has them.
            **kwargs: What only PEFT's other combinations take.

        Raises:
            ConfigurationError: the adapters cannot be combined so, or the name is taken.
        """
        if adapter_name in self.peft_config:
            raise ConfigurationError(f"the model has an adapter {adapter_name!r} already.\n  fix:  choose another name")
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown:
            raise ConfigurationError(f"there is no adapter {unknown[0]!r}.\n  found:  {', '.join(self.peft_config)}")
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
            if isinstance(module, LinearLora):
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
            found |= _unstacked(found, path, module, adapter_name)
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: ApportionConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Stack the experts' factors again, and give every tensor its name in the model."""
        remaining = dict(state_dict)
        stacked: dict[str, Tensor] = {}
        for path, module in _expert_modules(model, adapter_name):
            source = path if any(key.startswith(path + ".") for key in remaining) else f"base_model.model.{path}"
            stacked |= _stacked(remaining, source, path, module, adapter_name)
        for path, module in model.named_modules():
            kept = getattr(module, "lora_B", {})
            if isinstance(module, (LinearLora, WeightLora)) and adapter_name in kept:
                indices = remaining.get(
                    f"{path}.lora_B.indices", remaining.get(f"base_model.model.{path}.lora_B.indices")
                )
                if isinstance(kept[adapter_name], SparseFactor) and indices is not None:
                    kept[adapter_name].keep(indices)
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


def _kept_entries(config: ApportionConfig, placement: Placement) -> Tensor | None:
    """Give the entries of a site's B that train; None where all do. A checkpoint that is read brings its own."""
    if not placement.sparsity or config.dense_b:
        return None
    return torch.zeros(0, dtype=torch.int32) if config.mask is None else config.mask.indices[placement.site]


def _factors(placements: Iterable[Placement], kept: Callable[[Placement], Tensor | None]) -> dict[str, ExpertFactors]:
    """Describe one layer's planned experts by projection."""
    by_projection: dict[str, list[tuple[int, Placement]]] = defaultdict(list)
    for placement in placements:
        _, expert, projection = cast("re.Match[str]", _EXPERT_SITE.fullmatch(placement.site)).groups()
        by_projection[projection].append((int(expert), placement))
    described = {}
    for projection, found in by_projection.items():
        planned = [placement for _, placement in sorted(found, key=lambda pair: pair[0])]
        indices = [entries for placement in planned if (entries := kept(placement)) is not None]
        described[projection] = ExpertFactors(
            experts=tuple(sorted(expert for expert, _ in found)),
            ranks=tuple(placement.rank for placement in planned),
            scales=tuple(placement.alpha / placement.rank for placement in planned),
            indices=tuple(indices) if indices else None,
        )
    return described


def _unstacked(state: dict[str, Tensor], path: str, module: ExpertLora, adapter: str) -> dict[str, Tensor]:
    """Take a layer's stacked factors out of a state dictionary, and give them expert by expert."""
    single: dict[str, Tensor] = {}
    for name, factors in module.factors[adapter].items():
        ranks, keys = list(factors.ranks), [f"{path}.{expert}.{name}" for expert in factors.experts]
        a = state.pop(f"{path}.lora_A.{adapter}.{name}", state.pop(f"{path}.lora_A.{adapter}.{name}.weight", None))
        if a is not None:
            parts = zip(keys, torch.split(a, ranks), strict=True)
            single |= {f"{key}.lora_A.{adapter}.weight": part.clone() for key, part in parts}
        if factors.indices is None:
            parts = zip(keys, torch.split(state.pop(f"{path}.lora_B.{adapter}.{name}"), ranks), strict=True)
            single |= {f"{key}.lora_B.{adapter}.weight": part.t().contiguous() for key, part in parts}
            continue
        state.pop(f"{path}.lora_B.{adapter}.{name}.indices")
        values = state.pop(f"{path}.lora_B.{adapter}.{name}.values")
        own = zip(keys, torch.split(values, [len(i) for i in factors.indices]), factors.indices, strict=True)
        for key, part, indices in own:
            single[f"{key}.lora_B.{adapter}.values"] = part.clone()
            single[f"{key}.lora_B.{adapter}.indices"] = indices.to(torch.int32)
    return single


def _stacked(state: dict[str, Tensor], source: str, path: str, module: ExpertLora, adapter: str) -> dict[str, Tensor]:
    """Take a layer's factors out of a checkpoint expert by expert, and give them stacked."""
    stacked: dict[str, Tensor] = {}
    for name, factors in module.factors[adapter].items():
        keys = [f"{source}.{expert}.{name}" for expert in factors.experts]

        def take(ending: str, keys: list[str] = keys) -> list[Tensor] | None:
            whole = all(f"{key}.{ending}" in state for key in keys)
            return [state.pop(f"{key}.{ending}") for key in keys] if whole else None

        a, b = take("lora_A.weight"), take("lora_B.weight")
        values, indices = take("lora_B.values"), take("lora_B.indices")
        own_a, own_b = f"{path}.lora_A.{adapter}.{name}", f"{path}.lora_B.{adapter}.{name}"
        if a is not None:
            frozen = isinstance(module.lora_A[adapter][name], FrozenFactor)
            stacked[f"{own_a}.weight" if frozen else own_a] = torch.cat(a)
        if b is not None:
            stacked[own_b] = torch.cat([part.t() for part in b])
        if values is not None and indices is not None:
            module.keep(adapter, name, indices)
            stacked[f"{own_b}.values"] = torch.cat(values)
            stacked[f"{own_b}.indices"] = module.lora_B[adapter][name].indices
    return stacked


def _expert_modules(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, ExpertLora]]:
    """Go through the stacked experts that have an adapter of this name."""
    for path, module in model.named_modules():
        if isinstance(module, ExpertLora) and adapter_name in module.factors:
            yield path, module
