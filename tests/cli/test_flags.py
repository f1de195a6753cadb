"""Flags that come from option models: all of them, with their words, and what was typed is what counts as given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner, Result

import apportion
from apportion.cli.flags import option_flags
from apportion.cli.main import app
from apportion.methods.registry import METHODS
from apportion.records.options import MethodOptions, Options, SparseTraining
from apportion.training.settings import TrainSettings

_COMMANDS: Any = typer.main.get_command(app)


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _flags(command: str) -> dict[str, Any]:
    return {spelling: one for one in _COMMANDS.commands[command].params for spelling in one.opts}


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile of the embedded model with sensitivities of two tasks."""
    path = tmp_path_factory.mktemp("profile") / "p.safetensors"
    tasks = ("--data", "a=task:chain_sum", "--data", "b=task:aiw", "--samples", 4)
    done = _run("profile", "embedded", *tasks, "--sensitivity", "-o", path)
    assert done.exit_code == 0, done.output
    return path


@pytest.mark.parametrize("command", ["plan", "cost"])
@pytest.mark.parametrize("method", METHODS)
def test_every_option_of_every_method_is_a_flag_with_its_help(command: str, method: str) -> None:
    flags, options = _flags(command), METHODS[method].options
    spelled = {flag.option for flag in options.flags() if flag.spelling in flags}
    assert spelled == set(options.model_fields)
    for flag in options.flags():
        shown = flags[flag.spelling]
        description = options.model_fields[flag.option].description
        assert description is not None
        assert description.removesuffix(".") in shown.help
        assert shown.rich_help_panel == "Method options"
        assert shown.default is None
        if flag.default is not None:
            assert flag.default in shown.show_default or "for others" in shown.show_default


def test_every_option_of_sparse_training_is_a_flag_with_its_help() -> None:
    flags = _flags("train")
    for name, field in SparseTraining.model_fields.items():
        shown = flags["--" + name.replace("_", "-")]
        assert shown.help == field.description
        assert shown.rich_help_panel == "Sparse plans (lori, hellori)"


def test_flags_of_several_methods_name_whose_default_and_help_are_whose() -> None:
    flags = _flags("plan")
    assert flags["--keep"].show_default == "0.25 for gradient, 0.6 for lora_smoe and random_votes"
    assert flags["--sparsity"].show_default == "0.9 for lori and hellori, 0 for others"
    assert flags["--experts"].show_default == "2-4-6-8 for mola, 5 for uniform"
    assert flags["--max-rank"].show_default == "smaller side of the matrix"
    assert flags["--targets"].show_default.endswith("all for others")
    assert "(mola)" in flags["--experts"].help
    assert "(uniform)" in flags["--experts"].help
    assert "(" not in flags["--layers"].help


def test_an_option_named_as_a_flag_of_the_command_is_refused_when_the_command_is_made() -> None:
    class Seeded(MethodOptions):
        seed: int = 0

    def command(seed: Annotated[int, typer.Option()] = 0, **options: Any) -> None:
        del seed, options

    with pytest.raises(ValueError, match="duplicate parameter name"):
        option_flags({"seeded": Seeded})(command)


def test_commands_get_what_was_typed_and_nothing_else() -> None:
    class Switched(Options):
        switch: bool = False
        number: float = 1.0
        word: str = "a"

    seen: list[dict[str, Any]] = []
    small = typer.Typer()

    @small.command()
    @option_flags({"small": Switched, "other": MethodOptions})
    def command(own: int = 3, **options: Any) -> None:
        seen.append({"own": own} | options)

    for words in ([], ["--no-switch", "--number", "1"], ["--rank-router", "2", "--rank-shared", "4", "--own", "5"]):
        done = CliRunner().invoke(small, words)
        assert done.exit_code == 0, done.output
    assert seen == [
        {"own": 3},
        {"own": 3, "switch": False, "number": 1.0},
        {"own": 5, "ranks": {"router": 2, "shared": 4}},
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ("gradient", "--keep", "0.25", "--budget", "9000"),
        ("lora_smoe", "--keep", "60%", "--budget", "experts=20"),
        ("random_votes", "--keep", "0.6", "--budget", "experts=20"),
        ("uniform", "--experts", "5", "--budget", "9000"),
    ],
)
def test_a_default_that_is_typed_beside_a_budget_is_refused(
    profile: Path, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    done = _run("plan", profile, "--method", *arguments, "--rank", 2, "-o", tmp_path / "p.json")
    assert done.exit_code == 2, done.output
    assert "were both given" in done.output
    assert not (tmp_path / "p.json").exists()
    given_alone = _run(
        "plan", profile, "--method", arguments[0], *arguments[3:], "--rank", 2, "-o", tmp_path / "p.json"
    )
    assert given_alone.exit_code == 0, given_alone.output


def test_an_option_of_another_method_is_refused(profile: Path, tmp_path: Path) -> None:
    for arguments in (("lora", "--hot", "8"), ("hellora", "--rank-decay", "2"), ("gradient", "--top-k", "2")):
        done = _run("plan", profile, "--method", *arguments, "-o", tmp_path / "p.json")
        assert done.exit_code == 2, done.output
        assert f"method {arguments[0]} has no option '{arguments[1][2:].replace('-', '_')}'" in done.output


def test_exponents_of_marginal_are_flags(profile: Path, tmp_path: Path) -> None:
    command = ("plan", profile, "--method", "marginal", "--budget", 20_000)
    for decay in (0.5, 4):
        done = _run(*command, "--rank-decay", decay, "--sensitivity-power", 1, "-o", tmp_path / f"{decay}.json")
        assert done.exit_code == 0, done.output
    slow, fast = (apportion.load_plan(tmp_path / f"{decay}.json") for decay in (0.5, 4))
    assert slow.options["rank_decay"] == 0.5
    assert len(slow.placements) < len(fast.placements)


def test_targets_are_missed_where_they_were_named_though_they_are_the_default(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config.write_text(json.dumps({"model_type": "llama", "vocab_size": 64, "num_key_value_heads": 2} | sizes))
    targets = "attention,router,experts,shared,dense"
    assert _run("cost", config, "--method", "lora", "--rank", 2).exit_code == 0
    done = _run("cost", config, "--method", "lora", "--rank", 2, "--targets", targets)
    assert done.exit_code == 2, done.output
    assert "this model has no site for the target 'router'" in done.output


def test_attention_refuses_targets_and_ranks_that_it_would_drop() -> None:
    assert _run("cost", "embedded", "--method", "attention", "--targets", "attention.q", "--rank", 2).exit_code == 0
    for words, name in ((("--targets", "attention,experts.down"), "experts.down"), (("--rank-router", 2), "router")):
        done = _run("cost", "embedded", "--method", "attention", "--rank", 2, *words)
        assert done.exit_code == 2, done.output
        assert f"{name} was given" in done.output


def test_a_default_of_sparse_training_that_is_typed_is_refused_for_whole_adapters(
    profile: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    assert _run("plan", profile, "--method", "attention", "--rank", 2, "-o", plan).exit_code == 0
    command = ("train", plan, "--data", "task:aiw", "--samples", 4, "--steps", 1, "-o", tmp_path / "run")
    for words in (("--mask-granularity", "global"), ("--no-store-a",)):
        done = _run(*command, *words)
        assert done.exit_code == 2, done.output
        assert "was given, but the plan is not sparse" in done.output


def test_settings_of_runs_that_differ_in_spelled_out_defaults_are_the_same_run() -> None:
    spelled_out = TrainSettings(sparse=SparseTraining(mask_granularity="global", store_a=False))
    assert spelled_out.resolved() == TrainSettings().resolved()
    assert spelled_out.as_dict()["sparse"] == {"mask_granularity": "global", "store_a": False}
    assert TrainSettings(**spelled_out.as_dict()) == spelled_out
    assert TrainSettings().as_dict()["sparse"] == {}


def test_methods_are_listed_with_descriptions_of_their_options() -> None:
    listed = json.loads(_run("methods", "--json").stdout)
    assert listed.keys() == METHODS.keys()
    for name, method in METHODS.items():
        described = {option: field.description for option, field in method.options.model_fields.items()}
        assert listed[name]["descriptions"] == described
        assert listed[name]["options"].keys() == described.keys()
