"""A shape and a family of experts that are defined here, from measurement to merged model and stock PEFT."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM

import apportion
from apportion.adapters.shapes.base import Draw, LoraPair, Place, Shape
from apportion.experts.forms import ExpertForm, Stacked, register_form
from apportion.methods.base import AdapterSettings, Method
from apportion.methods.registry import METHODS
from apportion.methods.targets import targeted_sites
from apportion.peft.shapes import register_shape
from apportion.records.options import MethodOptions
from apportion.records.placement import Placement
from apportion.records.profile import Profile
from apportion.records.shapes.base import Part, ScaledFactors
from apportion.training.settings import TrainSettings
from apportion.training.sft import train


@dataclass(frozen=True)
class Weighted(ScaledFactors):
    """LoRA whose rank-one terms have trained weights."""

    kind: ClassVar[str] = "test_weighted"

    def parts(self, in_features: int, out_features: int) -> Iterator[Part]:
        yield Part(self.rank * in_features)
        yield Part(self.rank * out_features)
        yield Part(self.rank)


class WeightedModule(Shape):
    """``scale · B diag(e) A``."""

    def __init__(self, place: Place, rank: int, scale: float) -> None:
        super().__init__()
        kwargs: dict[str, Any] = {"device": place.device, "dtype": place.dtype}
        self.scale = scale
        self.lora_A = nn.Parameter(torch.empty(*place.copies, rank, place.in_features, **kwargs))
        self.lora_B = nn.Parameter(torch.zeros(*place.copies, place.out_features, rank, **kwargs))
        self.lora_E = nn.Parameter(torch.ones(*place.copies, rank, 1, **kwargs))

    def as_lora(self) -> LoraPair:
        return LoraPair(self.lora_A * self.lora_E, self.lora_B, self.scale)

    def start(self, draw: Draw) -> None:
        draw(self.lora_A)


class FoldedConfig(OlmoeConfig):
    model_type = "folded"


class FoldedExperts(nn.Module):
    """Stacked experts in a form of their own."""

    def __init__(self, config: FoldedConfig) -> None:
        super().__init__()
        sizes = (config.num_experts, config.hidden_size, 2 * config.intermediate_size)
        self.folded_in = nn.Parameter(torch.randn(sizes) * 0.2)
        self.folded_out = nn.Parameter(torch.randn(sizes[0], config.intermediate_size, config.hidden_size) * 0.2)

    def activate(self, product: Tensor) -> Tensor:
        up, gate = product.chunk(2, -1)
        return up * gate.sigmoid()

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for expert, (into, out_of) in enumerate(zip(self.folded_in, self.folded_out, strict=True)):
            rows, slots = torch.where(ids == expert)
            added = self.activate(hidden[rows] @ into) @ out_of
            out = out.index_add(0, rows, added * weights[rows, slots, None])
        return out


class FoldedForCausalLM(OlmoeForCausalLM):
    """OLMoE with such experts."""

    config_class = FoldedConfig

    def __init__(self, config: FoldedConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.experts = FoldedExperts(config)


def _activate(module: FoldedExperts, entered: Mapping[str, Tensor]) -> Tensor:
    return module.activate(entered["folded_in"])


def folded_form(module: Any) -> ExpertForm | None:
    if not isinstance(module, FoldedExperts):
        return None
    width = module.folded_out.shape[1]
    return ExpertForm(
        num_experts=len(module.folded_in),
        projections={
            "up_proj": Stacked("folded_in", transposed=True, rows=slice(0, width)),
            "gate_proj": Stacked("folded_in", transposed=True, rows=slice(width, None)),
            "down_proj": Stacked("folded_out", transposed=True),
        },
        activate=_activate,
    )


def place_weighted(profile: Profile, options: MethodOptions, settings: AdapterSettings) -> list[Placement]:
    placed = settings.at(targeted_sites(options, profile.layout))
    return [replace(one, shape=Weighted(one.rank, one.alpha)) for one in placed]


register_shape(Weighted, lambda record, place: WeightedModule(place, record.rank, record.alpha / record.rank))
register_form(folded_form)
AutoConfig.register("folded", FoldedConfig)
AutoModelForCausalLM.register(FoldedConfig, FoldedForCausalLM)


@pytest.fixture(autouse=True)
def _method() -> Iterator[None]:
    METHODS["weighted"] = Method("weighted", "weighted LoRA", "here", MethodOptions, place_weighted)
    yield
    del METHODS["weighted"]


@pytest.fixture
def model_and_tokenizer(embedded_model: tuple[nn.Module, Any]) -> tuple[Any, Any]:
    torch.manual_seed(0)
    tokenizer = embedded_model[1]
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = FoldedConfig(vocab_size=len(tokenizer), num_experts=6, num_experts_per_tok=2, **sizes)
    return FoldedForCausalLM(config).eval(), tokenizer


def test_a_shape_and_a_family_train_resume_and_merge(model_and_tokenizer: tuple[Any, Any], tmp_path: Path) -> None:
    base, tokenizer = model_and_tokenizer
    batch = tokenizer(["Calculate 5 - 3."], return_tensors="pt")
    profile = apportion.profile(base, [batch])
    plan = apportion.plan(profile, "weighted", rank=2)
    plan.save(tmp_path / "plan.json")
    plan = apportion.load_plan(tmp_path / "plan.json")
    assert plan.cost.sites_by_kind == {"attention": 8, "router": 2, "experts": 36}
    assert {placement.shape.kind for placement in plan.placements} == {"test_weighted"}
    rows = [{"prompt": f"{number} +", "completion": " 1"} for number in range(16)]
    settings = TrainSettings(steps=4, batch_size=4, save_every=2, lr=1e-2, max_length=32)
    runs = [train(copy.deepcopy(base), tokenizer, plan, rows, tmp_path / "whole", settings, progress=False)]
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for name in ("adapter_model.safetensors", "adapter_config.json", "training.json"):
        (tmp_path / "resumed" / name).unlink()
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "checkpoint-4")
    resumed = train(
        copy.deepcopy(base), tokenizer, plan, rows, tmp_path / "resumed", settings, resume=True, progress=False
    )
    runs.append(resumed)
    assert runs[0].model.receipt.trainable_parameters == plan.cost.trainable_parameters
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "resumed"))
    assert first == second
    loaded = apportion.load(copy.deepcopy(base), tmp_path / "whole").eval()
    with torch.no_grad():
        expected = loaded(**batch).logits
        assert torch.equal(expected, runs[0].model.eval()(**batch).logits)
        assert not torch.allclose(base(**batch).logits, expected, atol=1e-3)
        assert torch.allclose(loaded.merge_and_unload()(**batch).logits, expected, atol=1e-4)


def test_an_adapter_of_the_shape_on_linear_layers_loads_in_stock_peft(
    model_and_tokenizer: tuple[Any, Any], tmp_path: Path
) -> None:
    base, tokenizer = model_and_tokenizer
    base.save_pretrained(tmp_path / "base")
    batch = tokenizer(["Calculate 5 - 3."], return_tensors="pt")
    profile = apportion.profile(base, [batch])
    adapted = apportion.apply(copy.deepcopy(base), apportion.plan(profile, "weighted", rank=2, targets="attention"))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    apportion.export(tmp_path / "adapter", tmp_path / "plain", model=tmp_path / "base")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "plain").eval()
    assert torch.allclose(theirs(**batch).logits, adapted.eval()(**batch).logits, atol=1e-4)
