"""Tiny models with quantised experts, and the same models with the dequantised weights in plain parameters."""

from __future__ import annotations

import copy
from typing import Any

import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from torch import nn
from torchao.quantization import Float8WeightOnlyConfig, FqnToConfig, Int8WeightOnlyConfig, quantize_

from apportion.discovery import find_sites
from apportion.experts.forms import known_form
from apportion.experts.weights import dense
from tiny_models import build_tiny

TORCHAO = {"int8": Int8WeightOnlyConfig(), "float8": Float8WeightOnlyConfig()}
QUANTISERS = ("nf4", "fp4, nested", *TORCHAO)
WIDTHS = {"hidden_size": 64, "intermediate_size": 64}  # whole blocks of 64: bitsandbytes' own CPU kernel needs them


def quantise(module: nn.Module, parameters: tuple[str, ...], quantiser: str) -> None:
    """Quantise stacked parameters in place, each named by its path in the module."""
    if quantiser in TORCHAO:
        quantize_(module, FqnToConfig(dict.fromkeys(parameters, TORCHAO[quantiser])), filter_fn=None)
        return
    options: dict[str, Any] = {"nf4": {}, "fp4, nested": {"quant_type": "fp4", "compress_statistics": True}}[quantiser]
    for parameter in parameters:
        path, _, name = parameter.rpartition(".")
        replace_parameter_4bit(module.get_submodule(path), name, **options)


def dequantise(module: nn.Module, packed: nn.Module) -> None:
    """Give a plain experts module the values that a packed one has."""
    form = known_form(module)
    for parameter in form.parameters:
        stored = module.get_parameter(parameter)
        stored.data = dense(packed, parameter, slice(None), stored.dtype).detach().clone().view(stored.shape)


def build_twins(
    quantiser: str, name: str = "olmoe", dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[nn.Module, nn.Module]:
    """Build a model with quantised experts, and its dequantised twin."""
    plain = build_tiny(name, **{**WIDTHS, **changes}).to(dtype).requires_grad_(False)
    plain.set_experts_implementation("eager")  # the one that computes with torchao's int8 experts
    packed = copy.deepcopy(plain)
    for block in find_sites(plain).blocks:
        experts = packed.get_submodule(block.name)
        quantise(experts, known_form(plain.get_submodule(block.name)).parameters, quantiser)
        dequantise(plain.get_submodule(block.name), experts)
    return packed, plain
