"""Numbers that would fill the memory or never end are refused at once."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

import apportion
from apportion.records.files import seal

MEMORY_BYTES = 8 * 2**30  # of address space, of which PyTorch's libraries take a part
TIME_S = 120.0  # most of it is the import

REFUSALS = """
import json, sys
import apportion

def refusal(of, arguments):
    try:
        if of == "load":
            apportion.load_plan(arguments)
        else:
            apportion.plan(apportion.load_profile(sys.argv[1]), **arguments)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"

of, cases = json.load(sys.stdin)
print(json.dumps([refusal(of, case) for case in cases]))
"""

OPTIONS: list[tuple[dict[str, Any], str]] = [
    (
        {"layers": "0-1000000000"},
        "ConfigurationError: layers='0-1000000000' includes layer 2, which this model does not have",
    ),
    ({"layers": "1000000000-2000000000"}, "includes layer 1000000000, which this model does not have"),
    ({"layers": "0-" + "9" * 5000}, "ConfigurationError: layers='0-999"),
    ({"method": "uniform", "budget": 10**15}, "PlanError: an adapter has 32768 LoRA experts"),
    ({"method": "uniform", "budget": "experts=1000000000000"}, "LoRA experts of rank 4"),
    ({"method": "uniform", "budget": "9" * 5000}, "is not understood"),
    ({"method": "uniform", "experts": 10**9}, "1000000000 LoRA experts of rank 4"),
    ({"method": "mola", "experts": "1000000000"}, "1000000000 LoRA experts of rank 4"),
    ({"method": "mola", "experts": "9" * 5000}, "ConfigurationError: experts='999"),
    ({"targets": "router", "rank": 10**9}, "ConfigurationError: rank=1000000000 is not a rank"),
    ({"targets": "router", "ranks": {"router": 10**9}}, "PlanError: an adapter has rank 1000000000"),
    ({"rank": "4"}, "ConfigurationError: rank='4' is not a rank"),
]
PLAIN = {"kind": "low_rank", "rank": 4, "alpha": 8.0}
PLACEMENTS: list[tuple[dict[str, Any], str]] = [
    ({"sites": ["{0,1}" * 60]}, "more than 1,000,000 sites, more than any model.\n  place:  placements.0.sites.0\n"),
    ({"sites": ["m", "{0,1,2,3,4,5,6,7,8,9}" * 8]}, "place:  placements.0.sites.1"),
    ({"sites": ["{" + ",".join("a" * 1000) + "}"] * 2000}, "place:  placements.0.sites.1000"),
    ({"sites": ["a.{0,{1,2}}.b"]}, "braces are unbalanced or nested"),
    ({"shape": {"kind": "low_rank", "rank": 10**9, "alpha": 1e9}}, "has rank 1000000000"),
    (
        {"shape": {"kind": "routed", "expert": PLAIN, "num_experts": 10**9, "top_k": 1}},
        "has 1000000000 LoRA experts of rank 4",
    ),
]


@pytest.fixture
def profile(tiny_model: nn.Module, tokens: Tensor) -> apportion.Profile:
    return apportion.profile(tiny_model, [{"input_ids": tokens}])


def refusals(of: str, cases: list[Any], *arguments: Path) -> list[str]:
    """Say what becomes of each case, in a process that may take little memory and little time."""
    done = subprocess.run(
        [sys.executable, "-c", REFUSALS, *map(str, arguments)],
        input=json.dumps([of, cases]),
        capture_output=True,
        text=True,
        timeout=TIME_S,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES)),
    )
    return list(json.loads(done.stdout))


def test_a_resealed_plan_cannot_fill_the_memory(profile: apportion.Profile, tmp_path: Path) -> None:
    data = apportion.plan(profile, "hellora", hot=2, rank=4).as_dict()
    del data["seal"]
    for number, (group, _) in enumerate(PLACEMENTS):
        changed = data | {"placements": [data["placements"][0] | group]}
        (tmp_path / f"{number}.json").write_text(json.dumps(changed | {"seal": seal(changed)}))
    found = refusals("load", [str(tmp_path / f"{number}.json") for number in range(len(PLACEMENTS))])
    for (_, message), refusal in zip(PLACEMENTS, found, strict=True):
        assert refusal.startswith("PlanError: the plan ")
        assert message in refusal
        assert len(refusal) < 1000


def test_an_option_cannot_fill_the_memory(profile: apportion.Profile, tmp_path: Path) -> None:
    profile.save(tmp_path / "p.safetensors")
    cases = [{"method": "lora", "rank": 4} | options for options, _ in OPTIONS]
    found = refusals("plan", cases, tmp_path / "p.safetensors")
    for (_, message), refusal in zip(OPTIONS, found, strict=True):
        assert message in refusal
