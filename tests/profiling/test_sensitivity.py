"""Sensitivity: equal to dense gradients, sample by sample, without a trace on the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import apportion
from apportion.discovery import find_sites
from apportion.errors import ApportionWarning, ConfigurationError, DataError, ProfileError
from apportion.experts.forms import known_form
from apportion.profiling import totals as totals_module
from apportion.profiling.block_coordinate import block_coordinate_meter
from apportion.profiling.norms import Rows, expert_squared_norms, gram_is_cheaper
from apportion.profiling.sensitivity import summed_sample_losses
from apportion.profiling.totals import TaskTotals
from architectures import UNMARKED, build
from tiny_models import TINY, build_dense, build_tiny

Batch = dict[str, Tensor]


def _batch(tokens: Tensor, lengths: list[int]) -> Batch:
    """Pad rows of these lengths; the second half of each is labelled."""
    ids, mask = tokens[: len(lengths)].clone(), torch.zeros_like(tokens[: len(lengths)])
    labels = torch.full_like(ids, -100)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
        ids[row, length:] = 0
        labels[row, length // 2 : length] = ids[row, length // 2 : length]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def dense_sensitivity(model: Any, batch: Batch) -> dict[str, float]:
    """Form every dense gradient, one row at a time, and add up its square."""
    layout = find_sites(model)
    found = dict.fromkeys((site.name for site in layout.sites() if site.storage != "weight"), 0.0)
    for row in range(len(batch["input_ids"])):
        length = int(batch["attention_mask"][row].sum())
        ids, labels = batch["input_ids"][row : row + 1, :length], batch["labels"][row : row + 1, :length]
        model.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        for site in layout.sites():
            if site.storage == "weight":
                continue
            if site.storage == "linear":
                grad = model.get_submodule(site.name).weight.grad
            else:
                path, expert, projection = site.name.rsplit(".", 2)
                base = model.get_submodule(path)
                form = known_form(base)
                holder = base.get_parameter(form.projections[projection].parameter)
                grad = None if holder.grad is None else form.view(holder.grad, projection)[int(expert)]
            found[site.name] += 0.0 if grad is None else float(grad.double().square().sum())
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", [*sorted(TINY), *sorted(UNMARKED), "dense"])
def test_one_pass_equals_dense_gradients(name: str, tokens: Tensor) -> None:
    model = build_dense() if name == "dense" else build(name) if name in UNMARKED else build_tiny(name)
    batch = _batch(tokens, [16, 5, 9, 12])
    profile = apportion.profile(model, [batch], sensitivity=True)
    expected = dense_sensitivity(model, batch)
    assert profile.sensitivity["default"] == pytest.approx(expected, rel=1e-3, abs=1e-12)
    assert sum(value > 0 for value in expected.values()) > len(expected) / 2
    assert torch.equal(profile.total_counts(), apportion.profile(model, [batch]).total_counts())


def test_the_embedded_model_equals_dense_gradients(embedded_model: tuple[nn.Module, Any]) -> None:
    model, tokenizer = embedded_model
    texts = ["Calculate 5 - 3 - 6.\nAnswer: -4", "Reverse the word: stone.\nAnswer: enots"]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    batch = _batch(torch.zeros(2, max(map(len, rows)), dtype=torch.int64), [len(row) for row in rows])
    for number, row in enumerate(rows):
        batch["input_ids"][number, : len(row)] = torch.tensor(row)
        batch["labels"][number, len(row) - 3 : len(row)] = torch.tensor(row[-3:])
        batch["labels"][number, : len(row) - 3] = -100
    measured = apportion.profile(model, [batch], sensitivity=True).sensitivity["default"]
    expected = dense_sensitivity(model, batch)
    largest = max(expected.values())
    assert measured == pytest.approx(expected, rel=1e-3, abs=1e-9 * largest)


def test_with_adapters_it_is_the_gradient_of_the_effective_weight(tokens: Tensor) -> None:
    model = build_tiny("olmoe")
    batch = _batch(tokens, [16, 9])
    plan = apportion.plan(apportion.profile(model, [batch]), "hellora", hot=4, rank=4)
    adapted = apportion.apply(model, plan)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    measured = apportion.profile(adapted, [batch], sensitivity=True).sensitivity["default"]
    merged = apportion.profile(adapted.merge_and_unload(), [batch], sensitivity=True).sensitivity["default"]
    assert measured == pytest.approx(merged, rel=1e-3, abs=1e-12)


def test_nothing_about_the_model_is_different(tiny_model: nn.Module, tokens: Tensor) -> None:
    tiny_model.train()
    next(tiny_model.parameters()).requires_grad_(False)
    before = {name: (p.clone(), p.requires_grad, p.grad) for name, p in tiny_model.named_parameters()}
    for procedure in ("one-pass", "block-coordinate"):
        apportion.profile(tiny_model, [_batch(tokens, [16, 9, 5, 7])], sensitivity=procedure)
        for name, parameter in tiny_model.named_parameters():
            assert torch.equal(parameter, before[name][0])
            assert parameter.requires_grad == before[name][1]
            assert parameter.grad is None
    assert tiny_model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_model.modules())
    assert not any("forward" in vars(module) for module in tiny_model.modules())


def test_block_coordinate_measures_one_layer_a_row(tiny_model: nn.Module, tokens: Tensor) -> None:
    batch = _batch(tokens, [16])
    layout = find_sites(tiny_model)
    totals = TaskTotals.zeros(layout)
    with block_coordinate_meter(tiny_model, layout, totals) as run_batch:
        run_batch(batch)
    one = totals.sensitivity
    assert one.keys() == {name for name in one if ".layers.1." in name}
    dense = {name: value for name, value in dense_sensitivity(tiny_model, batch).items() if name in one}
    norm = sum(dense.values()) ** 0.5
    assert norm > 1  # so that clipping shows
    assert one == pytest.approx({name: value / norm**2 for name, value in dense.items()}, rel=1e-3, abs=1e-10)
    both = apportion.profile(tiny_model, [_batch(tokens, [16, 16])], sensitivity="block-coordinate")
    assert len(both.sensitivity["default"]) == 2 * len(one)


@given(samples=st.lists(st.integers(0, 6), min_size=1, max_size=4), wide=st.booleans(), seed=st.integers(0, 99))
def test_norms_of_experts_equal_plain_gradients(samples: list[int], wide: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    width = 40 if wide else 3  # both sides of the choice between Gram matrices and gradients
    sizes = [sum(samples), 0, sum(samples)]
    ids = torch.tensor([number for number, count in enumerate(samples) for _ in range(count)] * 2, dtype=torch.int64)
    x = torch.randn(len(ids), width, generator=generator)
    grads = [torch.randn(len(ids), 5, generator=generator) for _ in range(2)]
    found = expert_squared_norms(x, grads, ids, sizes)
    for grad, norms in zip(grads, found, strict=True):
        start = 0
        for size, norm in zip(sizes, norms, strict=True):
            rows = slice(start, start + size)
            expected = sum(
                float((grad[rows][ids[rows] == s].t() @ x[rows][ids[rows] == s]).square().sum())
                for s in range(len(samples))
            )
            assert float(norm) == pytest.approx(expected, rel=1e-4, abs=1e-6)
            start += size


def test_both_ways_to_a_norm_agree() -> None:
    for positions in (3, 60):
        x, grad = torch.randn(2, positions, 24), torch.randn(2, positions, 30)
        assert gram_is_cheaper(positions, 24, 30) == (positions == 3)
        expected = (grad.mT @ x).square().sum((1, 2))
        assert torch.allclose(Rows(x).squared_norms(grad), expected, rtol=1e-4)


@torch.no_grad()
def test_samples_count_alike_whatever_their_length(tokens: Tensor) -> None:
    batch = _batch(tokens, [16, 4])
    summed = summed_sample_losses(build_dense(), batch)
    alone = [summed_sample_losses(build_dense(), _batch(tokens[row:], [n])) for row, n in enumerate((16, 4))]
    assert float(summed) == pytest.approx(float(sum(alone)), rel=1e-5)


def test_a_stopped_measurement_goes_on(
    tiny_model: nn.Module, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [_batch(tokens[row:], [16, 7]) for row in range(4)]
    whole = apportion.profile(tiny_model, {"a": batches, "b": batches[:2]}, sensitivity=True)
    monkeypatch.setattr(totals_module, "_SAVE_EVERY_S", 0.0)
    file = tmp_path / "p.partial"

    def stopping() -> Any:
        yield from batches[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apportion.profile(tiny_model, {"a": stopping(), "b": batches[:2]}, sensitivity=True, partial=file)
    assert file.is_file()
    seen = []
    hook = tiny_model.register_forward_pre_hook(lambda module, args: seen.append(1))
    resumed = apportion.profile(tiny_model, {"a": batches, "b": batches[:2]}, sensitivity=True, partial=file)
    hook.remove()
    assert len(seen) == 3  # the fourth batch of a, and both of b
    assert resumed.digest == whole.digest
    assert not file.exists()


def test_totals_of_another_measurement_are_ignored(
    tiny_model: nn.Module, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "p.partial"
    file.write_bytes(b"damaged")
    with pytest.warns(ApportionWarning, match="measured again"):
        profile = apportion.profile(tiny_model, [_batch(tokens, [16])], partial=file)
    assert profile.tokens == {"default": 16}

    def stopping() -> Any:
        yield _batch(tokens, [16])
        raise KeyboardInterrupt

    monkeypatch.setattr(totals_module, "_SAVE_EVERY_S", 0.0)
    for other in ("weights", "facts", "batches"):
        with pytest.raises(KeyboardInterrupt):
            apportion.profile(tiny_model, stopping(), partial=file)
        model = build_tiny("olmoe", seed=1) if other == "weights" else tiny_model
        facts = {"rows": 7} if other == "facts" else None
        lengths = [9] if other == "batches" else [16]
        if other == "batches":
            with pytest.raises(DataError, match="not those that the measurement was started with"):
                apportion.profile(model, [_batch(tokens[1:], lengths)] * 2, provenance=facts, partial=file)
        else:
            profile = apportion.profile(model, [_batch(tokens[1:], lengths)], provenance=facts, partial=file)
            assert profile.tokens == {"default": 16}


def test_too_few_rows_for_every_layer_are_refused(tiny_model: nn.Module, tokens: Tensor) -> None:
    with pytest.raises(ProfileError, match="task 'default' has 1 rows, too few"):
        apportion.profile(tiny_model, [_batch(tokens, [16])], sensitivity="block-coordinate")


def test_rows_without_labels_count_for_nothing(tokens: Tensor) -> None:
    for name in ("olmoe", "listed"):
        batch = _batch(tokens, [16, 9])
        batch["labels"][1] = -100
        both = apportion.profile(build_tiny(name), [batch], sensitivity=True).sensitivity["default"]
        alone = apportion.profile(build_tiny(name), [_batch(tokens, [16])], sensitivity=True).sensitivity["default"]
        assert both == pytest.approx(alone, rel=1e-3, abs=1e-12)


def test_bad_input_is_refused(tiny_model: nn.Module, tokens: Tensor) -> None:
    batch = _batch(tokens, [16])
    with pytest.raises(ConfigurationError, match="one-pass, block-coordinate"):
        apportion.profile(tiny_model, [batch], sensitivity="twice")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no labels"):
        apportion.profile(tiny_model, [{"input_ids": tokens}], sensitivity=True)
    with pytest.raises(DataError, match="no labelled token"):
        apportion.profile(tiny_model, [batch | {"labels": torch.full_like(tokens[:1], -100)}], sensitivity=True)


def test_a_loss_that_is_not_finite_is_refused(tiny_model: Any, tokens: Tensor) -> None:
    with torch.no_grad():
        tiny_model.lm_head.weight[0] = float("nan")
    with pytest.raises(ProfileError, match="task 'default': the loss is nan"):
        apportion.profile(tiny_model, [_batch(tokens, [16])], sensitivity=True)


def test_a_gradient_that_is_zero_everywhere_is_refused(tiny_model: Any, tokens: Tensor) -> None:
    with torch.no_grad():
        tiny_model.lm_head.weight.zero_()
    with pytest.raises(ProfileError, match="task 'default' is zero everywhere"):
        apportion.profile(tiny_model, [_batch(tokens, [16])], sensitivity=True)
