"""Option models: what counts as given, what excludes what, and the words for what is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from apportion.errors import ConfigurationError
from apportion.methods.registry import METHODS
from apportion.records.options import (
    GradientOptions,
    HotOptions,
    MethodOptions,
    Options,
    SparseTraining,
    UniformOptions,
    VoteOptions,
    read_options,
)
from apportion.records.site import KINDS

MODELS = {**{name: method.options for name, method in METHODS.items()}, "train": SparseTraining}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_option_is_described(model: type[Options]) -> None:
    for name, field in model.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_defaults_are_valid_and_count_as_given_where_they_are_given(model: type[Options]) -> None:
    defaults = model()
    assert defaults.given == ()
    for name in model.model_fields:
        value = getattr(defaults, name)
        again = model(**{name: value})
        assert again == defaults
        assert again.given == (() if value is None else (name,))


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (GradientOptions, {"budget": "flops=80000", "per": "parameter"}),
        (UniformOptions, {"budget": "experts=20", "targets": ["attention"]}),
        (HotOptions, {"hot": "25%", "ranks": {"router": 2}}),
        (SparseTraining, {"redraw_a": True}),
    ],
)
def test_what_differs_in_complete_options_gives_the_same_options(model: type[Options], options: dict[str, Any]) -> None:
    complete = model(**options).model_dump(mode="json")
    assert complete.keys() == model.model_fields.keys()
    assert model.differing(complete) == options
    assert model(**model.differing(complete)) == model(**options)


def test_none_counts_as_not_given() -> None:
    assert GradientOptions(budget=None, keep=0.25).given == ("keep",)
    assert SparseTraining(dense_steps=None).given == ()


@pytest.mark.parametrize(
    ("model", "options", "names"),
    [
        (GradientOptions, {"keep": 0.25, "budget": 5000}, "keep and budget"),
        (VoteOptions, {"keep": "60%", "budget": "experts=20"}, "keep and budget"),
        (UniformOptions, {"experts": 5, "budget": 5000}, "experts and budget"),
    ],
)
def test_options_that_exclude_each_other_are_refused_at_a_default_s_value_too(
    model: type[Options], options: dict[str, Any], names: str
) -> None:
    for name, value in options.items():
        assert model(**{name: value}).given == (name,)
    with pytest.raises(ConfigurationError, match=f"{names} were both given") as caught:
        model(**options)
    assert "fix:  give one of them" in str(caught.value)


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (HotOptions, {"hott": 4}, ["there is no option 'hott'", "options:  criterion, hot"]),
        (HotOptions, {"hot": "x"}, ["hot='x' is not understood", "25%"]),
        (HotOptions, {"criterion": "norm"}, ["the option criterion='norm' is invalid", "'count'"]),
        (MethodOptions, {"sparsity": 1}, ["the option sparsity=1 is invalid", "less than 1"]),
        (MethodOptions, {"layers": "7-4"}, ["layers='7-4' is not understood"]),
        (MethodOptions, {"ranks": {"head": 4}}, ["'head', which is not a kind", "attention"]),
        (MethodOptions, {"ranks": {"router": 0}}, ["rank=0 for router"]),
        (MethodOptions, {"targets": "atention"}, ["did you mean attention?"]),
        (METHODS["marginal"].options, {"rank_decay": float("inf")}, ["rank_decay=inf is invalid"]),
        (SparseTraining, {"dense_steps": 1}, ["the first step is warm-up"]),
        (SparseTraining, {"dense_lr": float("nan")}, ["dense_lr=nan is not a positive number"]),
        (SparseTraining, {"mask_granularity": "expert"}, ["mask_granularity='expert' is invalid", "'projection'"]),
    ],
)
def test_wrong_options_are_configuration_errors(
    model: type[Options], options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        model(**options)
    for word in words:
        assert word in str(caught.value)


def test_options_by_name_say_whose_they_are() -> None:
    assert read_options(HotOptions, {"hot": "25%"}, "method hellora") == HotOptions(hot="25%")
    with pytest.raises(ConfigurationError, match="method lora has no option 'hot'"):
        read_options(MethodOptions, {"hot": 4}, "method lora")
    with pytest.raises(ConfigurationError, match=r"keep=0 is invalid(.|\n)*place:  method lora_smoe"):
        read_options(VoteOptions, {"keep": 0}, "method lora_smoe")


def test_an_option_by_kind_has_a_flag_for_every_kind() -> None:
    flags = {flag.spelling: flag for flag in MethodOptions.flags()}
    assert [flag.key for flag in flags.values() if flag.option == "ranks"] == list(KINDS)
    assert flags["--rank-router"].value_type is int
    assert flags["--rank-router"].default == "--rank"
    assert flags["--targets"].default == "all"
    assert {flag.name: flag.default for flag in VoteOptions.flags()}["targets"] == "attention,shared,dense"
