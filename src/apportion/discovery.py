"""`find_sites`: find the modules of a model that adapters can be attached to.

A layer of routed experts is recognised by its form: either a module of stacked parameters that `form_of` knows, or a
`ModuleList` of equal small networks of linear layers. The router and shared experts are found in the module that
contains it. All other linear layers inside a numbered decoder layer are attention or a dense MLP, distinguished by
name. Widths and the fingerprint are those of the weights before quantisation, so a model and its quantised version
have the same layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from apportion.compat.accelerate import offloading_device
from apportion.errors import ConfigurationError
from apportion.experts.forms import ExpertForm, form_of
from apportion.experts.weights import refuse_unreadable
from apportion.linear_forms import (
    has_own_forward,
    is_linear,
    is_quantised,
    logical_parameters,
    matrix_shape,
    num_parameters,
)
from apportion.records.site import ExpertBlock, Kind, Layout, Projection, Site, Storage, fingerprint

_LAYER_NUMBER = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer)\.(\d+)(?:\.|$)")
_ATTENTION_NAME = re.compile(r"attn|attention|mamba")
# Matrices that are not sites. The indexer of sparse attention only selects positions, and the weight of Mamba's time
# step projection is read without calling its module: their adapters would not train. Hyper-connections are tiny.
_NO_SITE = re.compile(r"\.indexer\.|\.mamba\.dt_proj$|hyper_connection")
# Experts of a language model that only process images: text is never routed to them.
_OF_IMAGES = re.compile(r"(?:^|\.)vision_")
_MLP_ROLES = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
    "w1": "gate", "w3": "up", "w2": "down",
    "fc1": "up", "fc2": "down",
}  # fmt: skip
_ROUTER_NAME = re.compile(r"\.(gate|router|wg)\b")
_TOP_K_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "top_k",
    "moe_k",
)


def walk_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Iterate over a model's modules, parents first, with the paths that they have without adapters.

    Args:
        model: A plain model, one with adapters attached, or a `PeftModel`.

    Yields:
        Each module's path in the plain model; the module that is called there, adapter included; the base module.
    """

    def walk(path: str, called: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
        base = _without_adapter(called)
        yield path, called, base
        for name, child in base.named_children():
            yield from walk(f"{path}.{name}" if path else name, child)

    yield from walk("", base_model(model))


def base_model(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a `PeftModel`, or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def execution_device(model: nn.Module) -> torch.device:
    """Return the device that a model computes on: that of its weights, or the execution device of offloaded ones.

    Args:
        model: A transformers model, with or without adapters.

    Returns:
        The device for its inputs.
    """
    for module in base_model(model).modules():
        if (device := offloading_device(module)) is not None:
            return device
    return next(base_model(model).parameters()).device


def find_sites(model: nn.Module) -> Layout:
    """Find every matrix of a model that can be adapted.

    Args:
        model: A transformers model on any device, including ``meta``, with or without adapters.

    Returns:
        The sites, and a fingerprint of the architecture.

    Raises:
        ConfigurationError: the model has no linear layers inside numbered decoder layers, its experts are stored in an
            unsupported form, or the number of experts per token is not found.

    Cost: one walk over the modules; no weight is read.
    """
    every_module = {path: base for path, _, base in walk_modules(model)}
    modules = _of_language_model(base_model(model), every_module)
    config = getattr(base_model(model), "config", None)
    parameters = list(logical_parameters(every_module))
    blocks = tuple(block for path, module in modules.items() if (block := _expert_block(path, module, modules, config)))
    _refuse_unknown_experts(modules, blocks)
    others = tuple(_other_sites(modules, blocks))
    model_class = type(base_model(model)).__name__
    if not others and not blocks:
        raise ConfigurationError(
            f"{model_class} cannot be adapted: no linear layer inside a numbered decoder layer was found.",
            fix="give a transformers language model",
        )
    model_type = getattr(config, "model_type", model_class)
    return Layout(
        model_class=model_class,
        model_type=model_type,
        base_parameters=num_parameters(parameters),
        fingerprint=fingerprint(model_type, {parameter.name: parameter.shape for parameter in parameters}),
        others=others,
        blocks=blocks,
    )


def is_expert_list(module: nn.Module) -> bool:
    """Return whether a module is a list of several networks with the same linear layers."""
    if not isinstance(module, nn.ModuleList) or len(module) < 2:
        return False
    forms = [
        tuple((name, matrix_shape(linear)) for name, linear in _linears(_without_adapter(expert))) for expert in module
    ]
    return len(forms[0]) >= 2 and all(form == forms[0] for form in forms)


def find_router(experts_path: str, num_experts: int, modules: dict[str, nn.Module]) -> str | None:
    """Find the router of an experts module: the module beside it with one row of weights per expert.

    If there is none (a router of several layers, or with rows for shared experts too), the name decides.

    Args:
        experts_path: Path of the experts module.
        num_experts: Number of experts in it.
        modules: The model's base modules by path.

    Returns:
        The router's path, or None if it cannot be found.
    """
    parent = experts_path.rpartition(".")[0]
    candidates = []
    for path, module in _below(parent, modules):
        if path.startswith(experts_path + "."):
            continue
        shape = matrix_shape(module)
        if shape is not None and shape[0] == num_experts:
            candidates.append(path)
    named = [path for path in candidates if _ROUTER_NAME.search(path[len(parent) :])]
    if named or candidates:
        return (named or candidates)[0]
    beside = (path for path, _ in _below(parent, modules) if _ROUTER_NAME.fullmatch(path[len(parent) :]))
    return next(beside, None)


def _below(parent: str, modules: dict[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    """List the modules below a path."""
    return [(path, module) for path, module in modules.items() if path.startswith(parent + ".")]


def _of_language_model(model: Any, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Drop modules for images and sound, which get no gradient from text.

    A multimodal model has a separate configuration of its text part, which is its decoder.
    """
    config = getattr(model, "config", None)
    text_config = getattr(config, "get_text_config", lambda: config)()
    if text_config is config or getattr(config, "is_encoder_decoder", False):
        return modules
    decoder = model.get_decoder()
    prefix = next((path for path, module in modules.items() if module is decoder), "")
    inside = {path: module for path, module in modules.items() if not prefix or f"{path}.".startswith(f"{prefix}.")}
    return {path: module for path, module in inside.items() if not _OF_IMAGES.search(path)}


def _without_adapter(module: Any) -> Any:
    """Return the module that adapters wrap."""
    while isinstance(getattr(module, "base_layer", None), nn.Module):
        module = module.base_layer
    return module


def _linears(module: nn.Module) -> list[tuple[str, Any]]:
    """List a module's direct linear layers, without adapters."""
    children = ((name, _without_adapter(child)) for name, child in module.named_children())
    return [(name, child) for name, child in children if is_linear(child)]


def _expert_block(path: str, module: Any, modules: dict[str, nn.Module], config: object) -> ExpertBlock | None:
    """Describe an experts module; return None for other modules."""
    storage: Storage
    refuse_unreadable(module, path)
    try:
        form = form_of(module)
    except ConfigurationError as error:
        raise error.at(path) from None
    if form is not None:
        refuse_unreadable(module, path, form.parameters)
        storage, num_experts, projections = "fused", form.num_experts, _stacked_projections(module, form)
    elif is_expert_list(module) and "expert" in path.rpartition(".")[2]:
        storage, num_experts = "linear", len(module)
        projections = tuple(
            Projection(_MLP_ROLES.get(name, name), name, linear.in_features, linear.out_features)
            for name, linear in _linears(_without_adapter(module[0]))
        )
    else:
        return None
    return ExpertBlock(
        path, _layer_of(path), num_experts, _top_k(path, num_experts, modules, config), projections, storage
    )


def _refuse_unknown_experts(modules: dict[str, nn.Module], blocks: tuple[ExpertBlock, ...]) -> None:
    """Raise an error if the model has experts that were not recognised."""
    known = tuple(block.name for block in blocks)
    for path, module in modules.items():
        matrices = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim > 1]
        class_name = type(module).__name__
        shared = "shared" in path.rpartition(".")[2]  # stacked shared experts are not sites
        holds_experts = matrices or isinstance(module, nn.ModuleDict)
        if not holds_experts or "Expert" not in class_name or "Router" in class_name:
            continue
        if not shared and not path.startswith(known):
            raise ConfigurationError(
                "the experts of this model are stored in a form that is not supported.",
                place=f"{path} ({class_name})",
                fix="use PEFT's own LoRA on attention, or a model that docs/architectures.md lists",
            )


def _stacked_projections(module: nn.Module, form: ExpertForm) -> tuple[Projection, ...]:
    """Return the shapes of stacked projections."""
    shapes = {name: form.shape(module, name) for name in form.projections}
    return tuple(
        Projection(name.removesuffix("_proj"), name, width_in, width_out)
        for name, (_, width_out, width_in) in shapes.items()
    )


def _top_k(path: str, num_experts: int, modules: dict[str, nn.Module], config: object) -> int:
    """Find the number of experts per token."""
    parent = path.rpartition(".")[0]
    router = find_router(path, num_experts, modules)
    text_config = getattr(config, "get_text_config", lambda: config)()
    for owner in (modules.get(router or ""), modules.get(parent), text_config):
        for name in _TOP_K_NAMES:
            value = getattr(owner, name, None)
            if type(value) is int and 0 < value <= num_experts:
                return value
    raise ConfigurationError(
        "the number of experts per token cannot be found.",
        place=f"{path} ({type(modules[path]).__name__}), {num_experts} experts",
        expected=(
            f"{', '.join(_TOP_K_NAMES[:-1])} or {_TOP_K_NAMES[-1]}, from 1 to {num_experts}, in its router, in the "
            "module around it or in the configuration"
        ),
        fix="set num_experts_per_tok in the model's configuration",
    )


def _other_sites(modules: dict[str, Any], blocks: tuple[ExpertBlock, ...]) -> Iterator[Site]:
    """Iterate over all sites except routed experts."""
    routers = tuple(router for b in blocks if (router := find_router(b.name, b.num_experts, modules)))
    inside_routers = tuple(router + "." for router in routers)
    moe_layers = {block.layer for block in blocks}
    inside_experts = tuple(block.name + "." for block in blocks)
    for path, module in modules.items():
        if path in routers and (is_quantised(module) or isinstance(getattr(module, "weight", None), nn.Parameter)):
            yield _site(path, module, "router", "router")
            continue
        if path.startswith(inside_experts) or not _LAYER_NUMBER.search(path) or not is_linear(module):
            continue
        if _NO_SITE.search(path) or (is_quantised(module) and has_own_forward(module)):
            continue
        kind: Kind = "router" if path.startswith(inside_routers) else _kind(path, moe_layers)
        last = path.rpartition(".")[2]
        name = last.removesuffix("_proj")
        if module.out_features > 1:  # a shared expert's gate is a scalar, not a matrix
            yield _site(path, module, kind, name if kind == "router" else _MLP_ROLES.get(last, name))


def _kind(path: str, moe_layers: set[int]) -> Kind:
    """Return whether a linear layer is attention, a shared expert or a dense MLP."""
    inside_layer = _LAYER_NUMBER.split(path, maxsplit=1)[-1]
    if "shared" in inside_layer and _layer_of(path) in moe_layers:
        return "shared"
    last = path.rpartition(".")[2]
    if _ATTENTION_NAME.search(inside_layer) or ("mixer" in inside_layer and last not in _MLP_ROLES):
        return "attention"
    return "dense"


def _site(path: str, module: Any, kind: Kind, projection: str) -> Site:
    """Describe a module with a two-dimensional weight as a site."""
    out_features, in_features = matrix_shape(module) or module.weight.shape
    storage: Storage = "linear" if is_linear(module) and not has_own_forward(module) else "weight"
    return Site(path, kind, _layer_of(path), projection, in_features, out_features, storage=storage)


def _layer_of(path: str) -> int:
    """Read the decoder layer's number from a path."""
    match = _LAYER_NUMBER.search(path)
    return int(match[1]) if match else -1
