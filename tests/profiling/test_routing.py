"""Counts: by hand, with and without padding, merged, and without a trace on the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import apportion
from apportion.errors import DataError
from apportion.loading import load_model
from architectures import build
from tiny_models import build_dense, build_tiny


def _by_hand(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Record what every OLMoE router returns, and count it with a plain loop."""
    seen: list[tuple[Tensor, Tensor]] = []
    handles = [
        layer.mlp.gate.register_forward_hook(lambda module, args, output: seen.append((output[2], output[1])))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    counts = torch.zeros(len(seen), 8, dtype=torch.int64)
    mass = torch.zeros(len(seen), 8, dtype=torch.float64)
    for layer, (ids, weights) in enumerate(seen):
        for expert, weight in zip(ids.flatten().tolist(), weights.flatten().tolist(), strict=True):
            counts[layer, expert] += 1
            mass[layer, expert] += weight
    return counts, mass


def test_counts_equal_a_count_by_hand(tiny_model: nn.Module, tokens: Tensor) -> None:
    profile = apportion.profile(tiny_model, [{"input_ids": tokens[:4]}, {"input_ids": tokens[4:]}])
    counts, mass = _by_hand(tiny_model, tokens)
    assert torch.equal(profile.counts["default"], counts)
    assert torch.allclose(profile.routing_mass["default"], mass)
    assert profile.tokens == {"default": tokens.numel()}


def test_counts_add_up(any_model: nn.Module, tokens: Tensor) -> None:
    profile = apportion.profile(any_model, [{"input_ids": tokens}])
    assert profile.counts["default"].sum(1).tolist() == [tokens.numel() * 2] * len(profile.layers)
    assert profile.num_experts.tolist() == [block.num_experts for block in profile.layout.blocks]


def test_scores_of_all_experts_are_read_where_no_ids_are_given(tokens: Tensor) -> None:
    model = build("llama4")
    seen: list[Tensor] = []
    routers = [layer.feed_forward.router for layer in model.model.layers]
    handles = [router.register_forward_hook(lambda module, args, output: seen.append(output[1])) for router in routers]
    profile = apportion.profile(model, [{"input_ids": tokens}])
    for handle in handles:
        handle.remove()
    chosen = [logits.topk(2, dim=-1) for logits in seen]
    counts = torch.stack([torch.bincount(top.indices.flatten(), minlength=8) for top in chosen])
    mass = torch.stack([top.values.double().sigmoid().sum() for top in chosen])
    assert torch.equal(profile.counts["default"], counts)
    assert torch.allclose(profile.routing_mass["default"].sum(1), mass)


def test_a_token_that_skips_the_experts_does_not_count(tokens: Tensor) -> None:
    model = build("zaya")
    for layer in model.model.layers:
        layer.mlp.gate.balancing_biases[-1] = 0.02
    skipped: list[int] = []
    handles = [
        layer.mlp.gate.register_forward_hook(lambda module, args, output: skipped.append(int((output[1] == 0).sum())))
        for layer in model.model.layers
    ]
    profile = apportion.profile(model, [{"input_ids": tokens}])
    for handle in handles:
        handle.remove()
    assert any(skipped)
    assert profile.counts["default"].sum(1).tolist() == [tokens.numel() - count for count in skipped]


def test_padding_does_not_count(tiny_model: nn.Module, tokens: Tensor) -> None:
    lengths = (16, 5, 9)
    alone = [{"input_ids": tokens[row : row + 1, :length]} for row, length in enumerate(lengths)]
    padded = tokens[:3].clone()
    mask = torch.zeros_like(padded)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
        padded[row, length:] = 0
    expected = apportion.profile(tiny_model, alone)
    found = apportion.profile(tiny_model, [{"input_ids": padded, "attention_mask": mask}])
    assert torch.equal(found.counts["default"], expected.counts["default"])
    assert found.counts["default"].sum(1).tolist() == [sum(lengths) * 2] * 2
    assert found.tokens == {"default": sum(lengths)}


def test_tasks_are_counted_apart(tiny_model: nn.Module, tokens: Tensor) -> None:
    both = apportion.profile(tiny_model, {"a": [{"input_ids": tokens[:2]}], "b": [{"input_ids": tokens[2:]}]})
    whole = apportion.profile(tiny_model, [{"input_ids": tokens}])
    assert both.tasks == ("a", "b")
    assert torch.equal(both.total_counts(), whole.counts["default"])
    assert both.of_task("a").tokens == {"a": 32}


def test_the_model_is_as_before(tiny_model: nn.Module, tokens: Tensor) -> None:
    tiny_model.train()
    tiny_model.model.layers[0].eval()
    modes = [module.training for module in tiny_model.modules()]
    state = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    config = tiny_model.config.to_dict()
    apportion.profile(tiny_model, [{"input_ids": tokens}])
    assert [module.training for module in tiny_model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in tiny_model.state_dict().items())
    assert tiny_model.config.to_dict() == config
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in tiny_model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in tiny_model.parameters())
    with pytest.raises(DataError, match="no input_ids"):
        apportion.profile(tiny_model, [{"text": "no tokens"}])
    assert [module.training for module in tiny_model.modules()] == modes
    assert all(not module._forward_pre_hooks for module in tiny_model.modules())


def test_an_adapted_model_is_profiled_through_its_adapters(tiny_model: nn.Module, tokens: Tensor) -> None:
    before = apportion.profile(tiny_model, [{"input_ids": tokens}])
    adapted = apportion.apply(tiny_model, apportion.plan(before, "hellora", hot=2, rank=4))
    after = apportion.profile(adapted, [{"input_ids": tokens}])
    assert after.fingerprint == before.fingerprint
    assert torch.equal(after.counts["default"], before.counts["default"])


def test_a_dense_model_has_sites_and_no_counts(tokens: Tensor) -> None:
    profile = apportion.profile(build_dense(), [{"input_ids": tokens}])
    assert profile.layers == ()
    assert profile.tokens == {"default": tokens.numel()}


@pytest.mark.parametrize(
    "batches", [[], [{"input_ids": torch.ones(1, 4, dtype=torch.int64), "attention_mask": torch.zeros(1, 4)}]]
)
def test_nothing_to_profile_is_an_error(tiny_model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    with pytest.raises(DataError, match="nothing to profile"):
        apportion.profile(tiny_model, batches)


def _process(rank: int, folder: str, tokens: Tensor) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = build_tiny("olmoe")
    own = tokens[rank * 3 : rank * 3 + 3]
    apportion.profile(model, [{"input_ids": own, "labels": own}], sensitivity=True).save(f"{folder}/{rank}.safetensors")
    torch.distributed.destroy_process_group()


def test_processes_add_up(tokens: Tensor, tmp_path: Path) -> None:
    mp.spawn(_process, args=(str(tmp_path), tokens), nprocs=2)
    model = build_tiny("olmoe")
    whole = apportion.profile(model, [{"input_ids": tokens, "labels": tokens}], sensitivity=True)
    for rank in range(2):
        found = apportion.load_profile(tmp_path / f"{rank}.safetensors")
        assert torch.equal(found.total_counts(), whole.total_counts())
        assert found.tokens == whole.tokens
        assert found.sensitivity["default"] == pytest.approx(whole.sensitivity["default"], rel=1e-4)


def test_weights_on_disk_give_the_same_counts(tmp_path: Path) -> None:
    in_memory, tokenizer = load_model("embedded")
    on_disk, _ = load_model("embedded", offload=tmp_path)
    assert all(parameter.is_meta for name, parameter in on_disk.named_parameters() if "experts" in name)
    batch = tokenizer(["Calculate 5 - 3 - 6.", "Sort: b, a, d, c"], return_tensors="pt", padding=True)
    expected, found = apportion.profile(in_memory, [batch]), apportion.profile(on_disk, [batch])
    assert torch.equal(found.counts["default"], expected.counts["default"])
    assert torch.allclose(found.routing_mass["default"], expected.routing_mass["default"])
    assert found.fingerprint == expected.fingerprint
