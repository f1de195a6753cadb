"""Run by two processes together: what holds of adapters on a model that FSDP shards."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

import apportion
from apportion.errors import ConfigurationError
from tiny_models import build_tiny

FAMILIES = ("olmoe", "gpt_oss")


def adapted(family: str, method: str = "hellora") -> tuple[nn.Module, nn.Module]:
    """Build a tiny model with random adapters; the same on every process. Give the plain model too."""
    tokens = torch.randint(3, 64, (6, 16), generator=torch.Generator().manual_seed(1))
    model = build_tiny(family)
    base = copy.deepcopy(model)
    profile = apportion.profile(model, [{"input_ids": tokens}])
    peft_model = apportion.apply(model, apportion.plan(profile, method, hot=2, rank=2))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return peft_model.train(), base


def gradients(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """Give the whole gradients of a batch."""
    model(input_ids=tokens, labels=tokens).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}


def check_training(family: str, units: str) -> None:
    """Compare the gradients of a sharded model, each process with its rows, with those of one process."""
    mesh = init_device_mesh("cpu", (2,))
    tokens = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(5))
    whole, _ = adapted(family)
    expected = gradients(whole, tokens)
    sharded, _ = adapted(family)
    inner: Any = sharded.get_base_model()
    for layer in inner.model.layers:
        fully_shard(layer.mlp.experts.base_layer if units == "experts" else layer, mesh=mesh)
    if units == "layers":
        fully_shard(sharded, mesh=mesh)
    for layer in inner.model.layers:
        experts = layer.mlp.experts
        assert all(isinstance(parameter, DTensor) for parameter in experts.base_layer.parameters())
        factors = [*experts.lora_shape.parameters()]
        assert all(isinstance(factor, DTensor) == (units == "layers") for factor in factors)
    found = gradients(sharded, tokens[dist.get_rank() :: 2])
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        if units == "experts":  # the factors are plain there, so nobody has averaged their gradients yet
            dist.all_reduce(grad)
            grad.div_(2)
        assert torch.allclose(grad, expected[name], atol=1e-6), name
    assert any(bool(grad.any()) for name, grad in expected.items() if "experts" in name)


def check_fsdp1() -> None:
    """FSDP1 shows its views of weights beside the parameters; the router's adapter must train all the same."""
    tokens = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(5))
    whole, _ = adapted("olmoe")
    expected = gradients(whole, tokens)
    sharded, _ = adapted("olmoe")
    wrap = ModuleWrapPolicy({type(sharded.get_base_model().model.layers[0])})
    wrapped = FullyShardedDataParallel(sharded, auto_wrap_policy=wrap, use_orig_params=True, device_id="cpu")
    wrapped(input_ids=tokens[dist.get_rank() :: 2], labels=tokens[dist.get_rank() :: 2]).loss.backward()
    with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
        found = {name.replace("_fsdp_wrapped_module.", ""): p.grad for name, p in wrapped.named_parameters()}
        for name, grad in expected.items():
            assert torch.allclose(found[name], grad, atol=1e-6), name
    assert any(bool(grad.any()) for name, grad in expected.items() if "mlp.gate.lora_shape.default.lora_B" in name)


def check_saving(method: str, folder: Path) -> None:
    """Save a sharded model on every process, and with the state of the first alone."""
    mesh = init_device_mesh("cpu", (2,))
    whole, base = adapted("olmoe", method)
    expected = get_peft_model_state_dict(whole)
    sharded, _ = adapted("olmoe", method)
    for layer in sharded.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    sharded.save_pretrained(folder)
    dist.barrier()
    saved = load_file(folder / "adapter_model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    apportion.load(base, folder)
    state = {name: tensor.full_tensor() for name, tensor in sharded.state_dict().items() if isinstance(tensor, DTensor)}
    state |= {name: tensor for name, tensor in sharded.state_dict().items() if not isinstance(tensor, DTensor)}
    given = state if dist.get_rank() == 0 else {}
    gathered = get_peft_model_state_dict(sharded, state_dict=given)
    assert gathered.keys() == (expected.keys() if given else set())


def check_refusals() -> None:
    """Neither attach to a sharded model nor merge into one."""
    mesh = init_device_mesh("cpu", (2,))
    peft_model, base = adapted("olmoe")
    plan = peft_model.peft_config["default"].plan
    for model, act in ((base, lambda: apportion.apply(base, plan)), (peft_model, peft_model.merge_and_unload)):
        inner: Any = model.get_base_model() if model is peft_model else model
        for layer in inner.model.layers:
            fully_shard(layer, mesh=mesh)
        names = [name for name, _ in model.named_modules()]
        with pytest.raises(ConfigurationError, match="sharded over processes"):
            act()
        assert [name for name, _ in model.named_modules()] == names


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for kind in FAMILIES:
        check_training(kind, "layers")
        check_training(kind, "experts")
    check_fsdp1()
    for kind in ("hellora", "hellori"):
        check_saving(kind, Path(sys.argv[1], kind))
    check_refusals()
    dist.destroy_process_group()
