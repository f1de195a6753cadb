"""Forms of stacked experts: views of the weights, and the sorted run that equals each model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apportion.discovery import find_sites
from apportion.experts.forms import form_of, known_form
from apportion.experts.run import base_product, run_experts, token_of_rows
from architectures import build
from tiny_models import build_tiny

# One of each: halves, transposed and interleaved with biases, no gate, a norm, rows under one another, all at once.
FORMS = ["olmoe", "gpt_oss", "openai_privacy_filter", "nemotron_h", "muse_spark", "dbrx", "llama4"]


def _experts(name: str, tokens: Tensor) -> tuple[nn.Module, tuple[Any, ...], Tensor]:
    """Give a model's last experts module, what it was called with, and what it returned."""
    model = build(name)
    module = model.get_submodule(find_sites(model).blocks[-1].name)
    calls: list[tuple[tuple[Any, ...], Tensor]] = []
    module.register_forward_hook(lambda _module, args, output: calls.append((args, output)))
    with torch.no_grad():
        model(input_ids=tokens)
    ((args, output),) = calls
    return module, args, output


@pytest.mark.parametrize("name", FORMS)
def test_the_sorted_run_is_the_models_own(name: str, tokens: Tensor) -> None:
    module, args, expected = _experts(name, tokens)
    hidden, ids, weights = args if len(args) == 3 else (args[0], None, None)
    seen: list[str] = []

    def product(parameter: str, x: Tensor, ends: Tensor) -> Tensor:
        seen.append(parameter)
        out = base_product(module, known_form(module), parameter, x, ends)
        assert len(x) == len(out) == int(ends[-1])
        parts = known_form(module).split(parameter, out)
        return known_form(module).join(parameter, parts)

    with torch.no_grad():
        found = run_experts(module, hidden, ids, weights, product)
    assert torch.allclose(found, expected, atol=1e-6)
    assert sorted(set(seen)) == sorted({stacked.parameter for stacked in known_form(module).projections.values()})


@pytest.mark.parametrize("name", FORMS)
def test_every_weight_is_in_one_view(name: str) -> None:
    model = build(name)
    module = model.get_submodule(find_sites(model).blocks[0].name)
    form = known_form(module)
    with torch.no_grad():
        for number, projection in enumerate(form.projections):
            form.weights(module, projection).fill_(number)
    stacked = {name: p for name, p in module.named_parameters() if "bias" not in name and p.ndim > 1}
    sizes = [form.weights(module, projection).numel() for projection in form.projections]
    values = torch.cat([parameter.flatten() for parameter in stacked.values()])
    assert torch.bincount(values.long()).tolist() == sizes


@pytest.mark.parametrize("name", ["olmoe", "llama4"])
def test_rows_know_their_tokens(name: str, tokens: Tensor) -> None:
    module, args, _ = _experts(name, tokens)
    hidden, ids, weights = args if len(args) == 3 else (args[0], None, None)
    form = known_form(module)
    copies = 1 if ids is not None else form.num_experts
    rows = token_of_rows(module, hidden, ids)
    assert len(rows) == 2 * len(hidden) // copies
    assert torch.equal(rows.bincount(), torch.full((len(hidden) // copies,), 2))
    if ids is None:
        return

    def product(parameter: str, x: Tensor, ends: Tensor) -> Tensor:
        assert parameter == "down_proj" or torch.equal(x, hidden[rows])
        return base_product(module, known_form(module), parameter, x, ends)

    run_experts(module, hidden, ids, weights, product)


def test_other_modules_have_no_form() -> None:
    model = build_tiny("listed")
    assert all(form_of(module) is None for module in model.modules())
    with pytest.raises(TypeError, match="Linear is no module of stacked experts"):
        known_form(nn.Linear(2, 2))
