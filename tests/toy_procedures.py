"""Procedures as a user would define them, outside the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.optim import Optimizer

from apportion.discovery import find_sites
from apportion.peft.replace import replace_adapter
from apportion.peft.site_factors import site_factors
from apportion.records.options import Options
from apportion.records.plan import Plan
from apportion.records.shapes import LowRank
from apportion.training.procedures.base import BornGroup, Procedure
from apportion.training.procedures.plans import with_placements

BIRTH = 3  # steps before every A starts to train


class PruningOptions(Options):
    weight: float = 0.01


class Pruning(Procedure):
    """Penalise B by its running norm, zero random entries of it, train A late, and keep half of the ranks."""

    option_model = PruningOptions

    def attach(self, model: Any, adapter_name: str, *, num_steps: int, seed: int) -> None:
        self.model, self.adapter_name, self.num_steps, self.seed = model, adapter_name, num_steps, seed
        self.draws, self.norm, self.birth = 0, torch.zeros(()), None
        self.b = [p for name, p in model.named_parameters() if ".lora_B." in name]
        self.a = [p for name, p in model.named_parameters() if ".lora_A." in name]
        for parameter in self.a:
            parameter.requires_grad_(False)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.draws, self.norm = int(state["draws"]), state["norm"]
        self.birth = int(state["birth"]) if state["birth"] >= 0 else None

    def penalty(self) -> Tensor:
        return self.options.weight * (1 + self.norm) * sum(parameter.square().sum() for parameter in self.b)

    @torch.no_grad()
    def after_step(self, step: int, optimizer: Optimizer) -> None:
        self.draws += 1
        self.norm = 0.5 * self.norm + 0.5 * sum(parameter.square().sum() for parameter in self.b)
        generator = torch.Generator().manual_seed(1000 * self.seed + self.draws)
        for parameter in self.b:
            parameter[torch.rand(parameter.shape, generator=generator) < 0.1] = 0
        if step + 1 == BIRTH:
            self.birth = BIRTH

    def groups(self) -> Sequence[BornGroup]:
        return () if self.birth is None else (BornGroup(tuple(self.a), self.birth),)

    def state(self) -> dict[str, Tensor]:
        birth = torch.tensor(-1 if self.birth is None else self.birth)
        return {"draws": torch.tensor(self.draws), "norm": self.norm, "birth": birth}

    def finish(self) -> Plan:
        halves = [replace(p, shape=LowRank(p.rank // 2, p.alpha / 2)) for p in self.plan.placements]
        plan = with_placements(self.plan, halves, find_sites(self.model))
        factors = {}
        for site, a, b in site_factors(self.model, self.adapter_name):
            best = (a.norm(dim=1) * b.norm(dim=0)).topk(len(a) // 2).indices
            factors[site] = a[best], b[:, best]
        replace_adapter(self.model, self.adapter_name, plan, factors)
        return plan


class Halving(Procedure):
    """Keep the first half of all ranks of PEFT's own layers after the third step, and Adam's moments of it."""

    def attach(self, model: Any, adapter_name: str, **_: Any) -> None:
        self.model, self.adapter_name = model, adapter_name

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        if step != 2:
            return
        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                for factor, dim in ((module.lora_A["default"], 0), (module.lora_B["default"], 1)):
                    half = slice(factor.weight.shape[dim] // 2)
                    cut: Callable[[Tensor], Tensor] = lambda x, dim=dim, half=half: (  # noqa: E731
                        x[half] if dim == 0 else x[:, half]
                    ).clone()
                    moments = optimizer.state[factor.weight]
                    moments |= {name: cut(moments[name]) for name in ("exp_avg", "exp_avg_sq")}
                    factor.weight.grad, factor.weight.data = None, cut(factor.weight.data)
        halves = [replace(p, shape=LowRank(p.rank // 2, p.alpha / 2)) for p in self.plan.placements]
        self.halved = with_placements(self.plan, halves, find_sites(self.model))

    def plan_now(self) -> Plan | None:
        return getattr(self, "halved", None)


class Recording(Procedure):
    """Note every call."""

    calls: list[Any] = []  # noqa: RUF012

    def attach(self, model: Any, adapter_name: str, *, num_steps: int, seed: int) -> None:
        self.b = [p for name, p in model.named_parameters() if ".lora_B." in name]
        assert all(parameter.requires_grad for parameter in self.b)
        self.calls.append(("attach", adapter_name, num_steps, seed))

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.calls.append(("restore", sorted(state)))

    def before_forward(self, inputs: Mapping[str, Any]) -> None:
        self.calls.append(("before_forward", "attention_mask" in inputs))

    def penalty(self) -> Tensor:
        self.calls.append("penalty")
        return 0.5 + 0 * self.b[0].sum()

    def before_step(self, step: int, optimizer: Optimizer) -> None:
        self.before = [parameter.detach().clone() for parameter in self.b]
        norm = torch.cat([parameter.grad.flatten() for parameter in self.b]).norm()
        self.calls.append(("before_step", step, bool(norm < 1e-3 + 1e-6)))

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        moved = [not torch.equal(parameter, before) for parameter, before in zip(self.b, self.before, strict=True)]
        has_gradient = all(parameter.grad is not None and parameter.grad.any() for parameter in self.b)
        self.calls.append(("after_step", step, any(moved), has_gradient, optimizer.param_groups[0]["lr"] > 0))

    def state(self) -> dict[str, Tensor]:
        self.calls.append("state")
        return {"one": torch.ones(1)}

    def finish(self) -> None:
        self.calls.append("finish")

    def detach(self) -> None:
        self.calls.append("detach")
