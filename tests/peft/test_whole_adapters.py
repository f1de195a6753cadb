"""Adapters are whole or refused: what is missing, extra, misshapen, changed or not a number is named."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import apportion
from apportion.errors import AdapterError, ApportionWarning, ConfigurationError, PlanError
from apportion.peft.load import read_adapter_plan
from apportion.records.profile import Profile
from tiny_models import build_tiny

ProfileOf = Callable[[nn.Module], Profile]
Tensors = dict[str, Tensor]

_METHODS = {"hellora": {"hot": 2}, "hellori": {"hot": 2}, "uniform": {"experts": "2"}}


def _saved(folder: Path, profile_of: ProfileOf, method: str = "hellora", seed: int = 0) -> nn.Module:
    """Save an adapter with random factors, and give the base model that it belongs to."""
    model = build_tiny("olmoe")
    base = copy.deepcopy(model)
    adapted = apportion.apply(model, apportion.plan(profile_of(base), method, rank=2, **_METHODS[method]))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return base


def _first(tensors: Tensors, ending: str = "") -> str:
    return next(name for name in sorted(tensors) if name.endswith(ending))


def _without_one(tensors: Tensors) -> str:
    del tensors[name := _first(tensors)]
    return f"1 tensor is missing.*{name.removeprefix('base_model.model.')}"


def _without_half(tensors: Tensors) -> str:
    for name in sorted(tensors)[::2]:
        del tensors[name]
    return "tensors are missing"


def _without_all(tensors: Tensors) -> str:
    count = len(tensors)
    tensors.clear()
    return f"{count} tensors are missing"


def _renamed(tensors: Tensors) -> str:
    for name in list(tensors):
        tensors[name.replace("layers", "blocks")] = tensors.pop(name)
    return "tensors are missing"


def _with_one_more(tensors: Tensors) -> str:
    tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(2, 2)
    return "1 tensor is not part of its plan.*embed_tokens.weight"


def _misshapen(tensors: Tensors) -> str:
    name = _first(tensors, "lora_A.weight")
    tensors[name] = tensors[name].t().contiguous()
    return "1 tensor is of another shape"


def _integers(tensors: Tensors) -> str:
    name = _first(tensors, "lora_B.weight")
    tensors[name] = tensors[name].to(torch.int8)
    return "1 tensor is of another type.*int8"


def _not_a_number(tensors: Tensors) -> str:
    tensors[_first(tensors)][0, 0] = torch.nan
    return "1 tensor is not finite"


def _infinite(tensors: Tensors) -> str:
    tensors[_first(tensors)][0, 0] = torch.inf
    return "1 tensor is not finite"


def _flipped(tensors: Tensors) -> str:
    name = _first(tensors)
    tensors[name].view(torch.int32)[0, 0] ^= 1
    return f"1 tensor is not those that were saved.*{name}"


def _swapped(tensors: Tensors) -> str:
    one, other = [name for name in sorted(tensors) if name.endswith("q_proj.lora_A.weight")][:2]
    tensors[one], tensors[other] = tensors[other], tensors[one]
    return "2 tensors are not those that were saved"


DAMAGES = [
    _without_one, _without_half, _without_all, _renamed, _with_one_more, _misshapen, _integers, _not_a_number,
    _infinite, _flipped, _swapped,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_refused_and_the_model_stays_as_it_is(
    damage: Callable[[Tensors], str], profile_of: ProfileOf, tmp_path: Path
) -> None:
    base = _saved(tmp_path, profile_of)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    message = damage(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(AdapterError, match=f"(?s){message}"):
        apportion.load(base, tmp_path)
    assert [name for name, _ in base.named_modules()] == names
    with pytest.raises(AdapterError, match=f"(?s){message}"):
        PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize("ending", [0, 100, -1])
def test_a_truncated_file_is_refused(ending: int, profile_of: ProfileOf, tmp_path: Path) -> None:
    base = _saved(tmp_path, profile_of)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:ending])
    with pytest.raises(AdapterError, match="truncated or damaged"):
        apportion.load(base, tmp_path)


def test_the_tensors_of_another_adapter_of_the_same_plan_are_refused(profile_of: ProfileOf, tmp_path: Path) -> None:
    base = _saved(tmp_path / "one", profile_of)
    _saved(tmp_path / "other", profile_of, seed=1)
    (tmp_path / "other" / "adapter_model.safetensors").rename(tmp_path / "one" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="not those that were saved"):
        apportion.load(base, tmp_path / "one")


@pytest.mark.parametrize("change", ["negative", "doubled", "too large", "fewer"])
def test_impossible_positions_of_a_sparse_adapter_are_refused(
    change: str, profile_of: ProfileOf, tmp_path: Path
) -> None:
    base = _saved(tmp_path, profile_of, "hellori")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith("lora_B.indices") and len(tensors[name]) > 2)
    if change == "fewer":
        tensors[name] = tensors[name][1:].clone()
    else:
        tensors[name][{"negative": 0, "doubled": 1, "too large": -1}[change]] = {
            "negative": -1, "doubled": int(tensors[name][0]), "too large": 10**6,
        }[change]  # fmt: skip
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=name.removeprefix("base_model.model.")):
        apportion.load(base, tmp_path)


@pytest.mark.parametrize("method", list(_METHODS))
def test_an_adapter_without_digests_loads_with_a_warning(method: str, profile_of: ProfileOf, tmp_path: Path) -> None:
    base = _saved(tmp_path, profile_of, method)
    expected = apportion.load(copy.deepcopy(base), tmp_path).state_dict()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["tensor_digests"]
    del config["tensor_digests"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.warns(ApportionWarning, match="has no digests"):
        loaded = apportion.load(base, tmp_path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_loading_over_an_adapter_of_another_plan_is_refused(profile_of: ProfileOf, tmp_path: Path) -> None:
    base = _saved(tmp_path, profile_of)
    other = apportion.apply(base, apportion.plan(profile_of(base), "attention", rank=2))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(AdapterError, match="not part of its plan"):
        other.load_adapter(str(tmp_path), "default")
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_loading_over_an_adapter_after_saving_it_again_works(profile_of: ProfileOf, tmp_path: Path) -> None:
    """Trainers do so when they go back to the best checkpoint."""
    base = _saved(tmp_path, profile_of)
    adapted = apportion.load(base, tmp_path, is_trainable=True)
    expected = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    adapted.save_pretrained(tmp_path / "later")
    adapted.load_adapter(str(tmp_path), "default")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapted.state_dict().items())


def test_a_saved_configuration_does_not_bind_new_tensors(profile_of: ProfileOf, tmp_path: Path) -> None:
    base = _saved(tmp_path, profile_of)
    fresh = get_peft_model(base, PeftConfig.from_pretrained(str(tmp_path)))
    set_peft_model_state_dict(fresh, get_peft_model_state_dict(fresh))


def test_adapters_on_top_of_each_other_in_a_circle_are_refused(profile_of: ProfileOf, tmp_path: Path) -> None:
    base = _saved(tmp_path, profile_of)
    file = tmp_path / "adapter_config.json"
    digest = hashlib.sha256((tmp_path / "adapter_model.safetensors").read_bytes()).hexdigest()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"on_top_of": {"path": str(tmp_path), "sha256": digest}}))
    with pytest.raises(AdapterError, match="on top of itself"):
        apportion.load(base, tmp_path)


@pytest.mark.parametrize("how", ["load_adapter", "from_pretrained"])
def test_transformers_own_loading_is_refused_with_what_works(how: str, profile_of: ProfileOf, tmp_path: Path) -> None:
    base: Any = _saved(tmp_path / "adapter", profile_of)
    base.save_pretrained(tmp_path / "base")
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}
    file.write_text(json.dumps(config))
    load = base.load_adapter if how == "load_adapter" else AutoModelForCausalLM.from_pretrained
    with pytest.raises(ConfigurationError, match=r"apportion.load\(model, folder\)"):
        load(str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b'{"peft_type": "APPOR', "Unterminated string"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 100_000, "nested more than 64 deep"),
        (b'{"r": ' + b"9" * 5000 + b"}", "too many digits"),
        (b"5", "expected an object"),
    ],
    ids=["empty", "cut", "not-utf-8", "deep", "digits", "number"],
)
def test_a_configuration_that_is_no_json_is_refused_by_name(
    content: bytes, message: str, profile_of: ProfileOf, tmp_path: Path
) -> None:
    base = _saved(tmp_path, profile_of)
    (tmp_path / "adapter_config.json").write_bytes(content)
    for read in (lambda: apportion.load(base, tmp_path), lambda: read_adapter_plan(tmp_path)):
        with pytest.raises(AdapterError, match=f"(?s)adapter_config.json cannot be read.*{message}"):
            read()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_dropout": 5}, "place:  lora_dropout"),
        ({"lora_dropout": float("nan")}, "place:  lora_dropout"),
        ({"on_top_of": {"x": "y"}}, r"place:  on_top_of\.path"),
        ({"inference_mode": "maybe"}, "place:  inference_mode"),
        ({"init_seed": "zero"}, "place:  init_seed"),
        ({"rank_pattern": None}, "place:  rank_pattern"),
        ({"tensor_digests": ["a"]}, "place:  tensor_digests"),
        ({"plan": []}, "place:  plan"),
        ({"task_type": "COOKING"}, "found:  Invalid task type"),
    ],
)
def test_a_configuration_with_fields_of_another_type_is_refused_by_name(
    changes: dict[str, Any], message: str, profile_of: ProfileOf, tmp_path: Path
) -> None:
    base = _saved(tmp_path, profile_of)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(AdapterError, match=f"(?s){tmp_path.name}.*{message}"):
        apportion.load(base, tmp_path)


@pytest.mark.parametrize("peft_type", ["LORA", "SORCERY", None, 5, ["APPORTION"]])
def test_an_adapter_of_another_type_is_refused_by_name(peft_type: Any, profile_of: ProfileOf, tmp_path: Path) -> None:
    base = _saved(tmp_path, profile_of)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_type": peft_type}))
    with pytest.raises(ConfigurationError, match=rf"{tmp_path.name} was not made by apportion"):
        apportion.load(base, tmp_path)


@pytest.mark.parametrize("variant", ["use_bdlora", "kasa_config", "use_qalora", "layer_replication"])
def test_a_variant_that_a_plan_cannot_place_is_refused(variant: str, profile_of: ProfileOf, tmp_path: Path) -> None:
    base = _saved(tmp_path, profile_of)
    file = tmp_path / "adapter_config.json"
    value = {"use_qalora": True, "layer_replication": [[0, 1]]}.get(variant, {})
    file.write_text(json.dumps(json.loads(file.read_text()) | {variant: value}))
    with pytest.raises(ConfigurationError, match=f"(?s){tmp_path.name}.*{variant} cannot be combined with a plan"):
        apportion.load(base, tmp_path)


def test_a_changed_plan_in_an_adapter_is_refused_by_name(profile_of: ProfileOf, tmp_path: Path) -> None:
    base = _saved(tmp_path, profile_of)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    config["plan"]["method"] = "other"
    file.write_text(json.dumps(config))
    with pytest.raises(PlanError, match=f"the adapter in .*{tmp_path.name} cannot be loaded: it was changed"):
        apportion.load(base, tmp_path)
