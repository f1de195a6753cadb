"""Files that earlier code wrote still mean the same; tests/fixtures/README.md says what they are."""

from __future__ import annotations

import copy
import itertools
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import apportion
from apportion.errors import ApportionWarning
from apportion.methods.planning import replan
from apportion.methods.registry import METHODS
from apportion.records.mask import load_mask
from apportion.training.settings import TrainSettings
from apportion.training.sft import train

FIXTURES = Path(__file__).parent / "fixtures"
RECORDED = json.loads((FIXTURES / "recorded.json").read_text())
PLANS = sorted(RECORDED["plans"])
ADAPTERS = sorted(path.name for path in (FIXTURES / "adapters").iterdir())
LOGITS = load_file(FIXTURES / "logits.safetensors")
MACHINE_PATHS = re.compile(rb"/(work|tmp|root|home)\b")

Row = tuple[int, float, int, int, float]


@pytest.fixture(autouse=True)
def _one_thread(_seeded: None) -> None:
    """Add up in the order in which the files' numbers were added up."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(embedded_model: tuple[Any, Any]) -> Any:
    return copy.deepcopy(embedded_model[0]).cpu().float()


@pytest.fixture(scope="module")
def profile() -> apportion.Profile:
    return apportion.load_profile(FIXTURES / "profile.safetensors")


@pytest.fixture(scope="module")
def atol(base: Any) -> float:
    """How far numbers may be from recorded ones: further where the base model alone adds up in another order.

    The base model is no work of this package, so its difference is that of the processor, PyTorch and transformers.
    """
    torch.set_num_threads(1)
    return max(1e-6, 10 * float((_logits(base) - LOGITS["base"]).abs().max()))


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([RECORDED["prompt_tokens"]]), use_cache=False).logits[0, -2:]


def _settings_by_site(plan: apportion.Plan) -> dict[str, Row]:
    return {p.site: (p.rank, p.alpha, p.num_experts, p.top_k, p.sparsity) for p in plan.placements}


def _written_settings(plan: dict[str, Any]) -> dict[str, Row]:
    """Read a plan's file without the package."""
    settings = {}
    for group in plan["placements"]:
        row = (group["rank"], group["alpha"], group["num_experts"], group["top_k"], group["sparsity"])
        for line in group["sites"]:
            parts = [part.split(",") for part in re.split("[{}]", line)]
            settings |= {"".join(chosen): row for chosen in itertools.product(*parts)}
    return settings


def _assert_written_cost(plan: dict[str, Any], cost: apportion.Cost) -> None:
    """Compare every figure that the plan's file has; there may be more."""
    figures = cost.as_dict()
    for name, value in plan["cost"].items():
        exact = not isinstance(value, float)
        assert figures[name] == (value if exact else pytest.approx(value, rel=1e-12)), name


def _assert_same_tensors(found: Path, expected: Path, atol: float = 0.0) -> None:
    tensors, wanted = load_file(found), load_file(expected)
    assert sorted(tensors) == sorted(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=atol, msg=lambda text, name=name: name + text)


def test_the_profile_loads_with_its_digest_and_its_numbers(profile: apportion.Profile) -> None:
    assert profile.digest == RECORDED["profile_digest"]
    written = load_file(FIXTURES / "profile.safetensors")
    assert len(written) == 2 * len(profile.tasks)
    for task in profile.tasks:
        assert torch.equal(profile.counts[task], written[f"counts/{task}"])
        assert torch.equal(profile.routing_mass[task], written[f"routing_mass/{task}"])
        assert len(profile.measured_sensitivity()[task]) == len(profile.layout.by_name) - 4  # but for the routers


def test_the_profile_is_of_the_embedded_model_as_it_is_found_now(profile: apportion.Profile, base: Any) -> None:
    tokens = torch.tensor([RECORDED["prompt_tokens"]])
    assert apportion.profile(base, [{"input_ids": tokens}]).fingerprint == profile.fingerprint


def test_every_method_has_a_plan() -> None:
    """Methods that came later need none."""
    planned = {arguments["method"] for arguments in RECORDED["plans"].values()}
    assert len(planned) == 13
    assert planned <= set(METHODS)
    assert sorted(path.stem for path in (FIXTURES / "plans").iterdir()) == PLANS


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_loads_and_is_made_again(name: str, profile: apportion.Profile, tmp_path: Path) -> None:
    written = json.loads((FIXTURES / "plans" / f"{name}.json").read_text())
    loaded = apportion.load_plan(FIXTURES / "plans" / f"{name}.json")
    again = apportion.plan(profile, **RECORDED["plans"][name])
    from_file = replan(profile, loaded)
    loaded.save(tmp_path / "plan.json")
    for plan in (loaded, again, from_file, apportion.load_plan(tmp_path / "plan.json")):
        assert _settings_by_site(plan) == _written_settings(written)
        _assert_written_cost(written, plan.cost)
        assert (plan.method, plan.rank, plan.alpha, plan.seed) == tuple(
            written[field] for field in ("method", "rank", "alpha", "seed")
        )
        assert (plan.fingerprint, plan.profile_digest) == (written["fingerprint"], RECORDED["profile_digest"])


def test_the_embedded_model_gives_its_logits_but_for_rounding(atol: float) -> None:
    assert atol < 1e-3
    assert sorted(LOGITS) == sorted(["base", *ADAPTERS])


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name != "old_style"])
def test_an_adapter_gives_its_logits_and_is_saved_again_as_it_was(
    name: str, base: Any, atol: float, tmp_path: Path
) -> None:
    model = apportion.load(copy.deepcopy(base), FIXTURES / "adapters" / name)
    torch.testing.assert_close(_logits(model), LOGITS[name], rtol=0, atol=atol)
    assert (LOGITS[name] - LOGITS["base"]).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    _assert_same_tensors(
        tmp_path / "adapter_model.safetensors", FIXTURES / "adapters" / name / "adapter_model.safetensors"
    )
    # What was loaded from an old file can be loaded from the new one too.
    again = apportion.load(copy.deepcopy(base), tmp_path)
    assert torch.equal(_logits(again), _logits(model))


def test_an_adapter_without_digests_gives_its_logits_with_a_warning_until_it_is_saved(
    base: Any, atol: float, tmp_path: Path
) -> None:
    with pytest.warns(ApportionWarning, match="has no digests"):
        model = apportion.load(copy.deepcopy(base), FIXTURES / "adapters" / "old_style")
    torch.testing.assert_close(_logits(model), LOGITS["old_style"], rtol=0, atol=atol)
    model.save_pretrained(tmp_path)
    assert torch.equal(_logits(apportion.load(copy.deepcopy(base), tmp_path)), _logits(model))


@pytest.mark.parametrize("name", sorted(RECORDED["runs"]))
@pytest.mark.skipif(torch.cuda.is_available(), reason="the runs were begun on a CPU, and would go on a GPU")
def test_a_run_goes_on_and_ends_with_its_weights(
    name: str, base: Any, embedded_model: tuple[Any, Any], atol: float, tmp_path: Path
) -> None:
    shutil.copytree(FIXTURES / name, tmp_path / "run")
    plan = apportion.load_plan(FIXTURES / "plans" / f"{RECORDED['runs'][name]}.json")
    rows = [json.loads(line) for line in (FIXTURES / "rows.jsonl").read_text().splitlines()]
    with warnings.catch_warnings():
        warnings.simplefilter("error", ApportionWarning)  # it must not begin anew
        result = train(
            copy.deepcopy(base),
            embedded_model[1],
            plan,
            rows,
            tmp_path / "run",
            TrainSettings(**RECORDED["settings"]),
            mask=load_mask(FIXTURES / "mask.safetensors") if plan.is_sparse else None,
            resume=True,
            progress=False,
            facts=RECORDED["facts"],
        )
    assert result.steps == 4
    manifest = Path("checkpoints", "checkpoint-2", "manifest.json")  # a run that begins anew writes other timings
    assert (tmp_path / "run" / manifest).read_bytes() == (FIXTURES / name / manifest).read_bytes()
    _assert_same_tensors(
        tmp_path / "run" / "adapter_model.safetensors", FIXTURES / f"{name}_expected.safetensors", atol
    )


def test_no_file_names_a_path_of_the_machine_that_made_it() -> None:
    files = [path for path in FIXTURES.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    named = [path for path in files if path.suffix != ".py" and MACHINE_PATHS.search(path.read_bytes())]
    assert named == []
    assert sum(path.stat().st_size for path in files) < 1_500_000
