"""The command line: every command does its work, and every mistake gets one message and exit code 2."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

import apportion
from apportion.cli.main import app
from tiny_models import build_dense, build_tiny

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call the command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile of the embedded model on two tasks."""
    path = tmp_path_factory.mktemp("profile") / "p.safetensors"
    done = CliRunner().invoke(
        app,
        [
            "profile",
            "embedded",
            "--data",
            "task:syllogism",
            "--data",
            "maths=task:gcd",
            "--samples",
            "16",
            "-o",
            str(path),
        ],
    )
    assert done.exit_code == 0, done.output
    return path


@pytest.fixture(scope="module")
def adapter(profile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan and an adapter trained for a few steps, beside each other."""
    folder = tmp_path_factory.mktemp("adapter")
    runner = CliRunner()
    planned = runner.invoke(app, ["plan", str(profile), "--hot", "4", "--rank", "4", "-o", str(folder / "plan.json")])
    assert planned.exit_code == 0, planned.output
    command = ["train", str(folder / "plan.json"), "--data", "task:syllogism", "--samples", "16", "--steps", "3"]
    trained = runner.invoke(app, [*command, "--batch-size", "4", "--lr", "1e-2", "-o", str(folder / "run")])
    assert trained.exit_code == 0, trained.output
    return folder / "run"


def test_help_is_quick_and_light() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import apportion; from apportion.cli.main import app\n"
        "from typer.testing import CliRunner; result = CliRunner().invoke(app, ['--help'])\n"
        "assert result.exit_code == 0 and 'profile' in result.output\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'trl'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version(run: Run) -> None:
    assert run("--version").output == f"apportion {apportion.__version__}\n"


def test_profile_shows_and_saves(run: Run, profile: Path) -> None:
    measured = apportion.load_profile(profile)
    assert measured.tasks == ("syllogism", "maths")
    assert measured.provenance["model"] == "embedded"
    assert measured.provenance["data"] == {"syllogism": "task:syllogism", "maths": "task:gcd"}
    for task in measured.tasks:
        assert measured.counts[task].sum(1).tolist() == [measured.tokens[task] * 4] * 4
    done = run("profile", "embedded", "--data", "task:gcd", "--samples", 2, "--max-length", 8, "-o", "p.safetensors")
    assert "gcd: 2 rows were longer than 8 tokens and were cut" in done.output
    assert "16 tokens of OlmoeForCausalLM" in done.output


def test_weights_may_stay_on_disk(run: Run, profile: Path) -> None:
    data = ("--data", "maths=task:gcd", "--samples", 2)
    done = run("profile", "embedded", *data, "--low-memory", "-o", "p.safetensors", "--json")
    expected = run("profile", "embedded", *data, "-o", "q.safetensors", "--json")
    assert json.loads(done.stdout)["counts"] == json.loads(expected.stdout)["counts"]
    assert not list(Path.cwd().glob(".weights-*"))


def test_plan_prints_what_it_costs(run: Run, profile: Path) -> None:
    done = run(
        "plan", profile, "--method", "hellora", "--hot", "25%", "--rank", 8, "-o", "plan.json", "--picture", "plan.svg"
    )
    assert done.exit_code == 0, done.output
    assert "●" in Path("plan.svg").read_text()
    plan = apportion.load_plan("plan.json")
    assert plan.options["hot"] == "25%"
    assert plan.alpha == 16
    for figure in (
        f"{plan.cost.trainable_parameters:,}",
        f"{plan.cost.lora_count_ratio:.2%}",
        f"{plan.cost.lora_percentage_ratio:.2%}",
        f"{plan.cost.adapter_flops_per_token:,.0f}",
        "routing measured in the profile",
        "sites: experts",
        "●",
    ):
        assert figure in done.output


def test_json_is_all_there_is(run: Run, profile: Path) -> None:
    done = run("plan", profile, "--method", "lora", "--rank", 8, "-o", "plan.json", "--json")
    assert (
        json.loads(done.stdout)["cost"]["trainable_parameters"]
        == apportion.load_plan("plan.json").cost.trainable_parameters
    )
    done = run("cost", "embedded", "--method", "attention", "--rank", 8, "--json")
    assert json.loads(done.stdout)["sites_by_kind"] == {"attention": 16}
    done = run("methods", "--json")
    assert json.loads(done.stdout)["hellora"]["options"]["hot"] == 8


def test_cost_knows_models_targets_layers_and_ranks(run: Run) -> None:
    done = run("cost", "olmoe-1b-7b", "--method", "hellora", "--hot", 8, "--rank", 32, "--json")
    assert json.loads(done.stdout)["trainable_parameters"] == 47_218_688
    command = ["cost", "olmoe-1b-7b", "--method", "lora", "--targets", "attention.q,router", "--layers", "4-15"]
    done = run(*command, "--rank", 32, "--rank-router", 8, "--json")
    assert json.loads(done.stdout)["trainable_parameters"] == 12 * (32 * (2048 + 2048) + 8 * (2048 + 64))


def test_cost_uses_a_profile(run: Run, profile: Path) -> None:
    even = json.loads(run("cost", "embedded", "--hot", 4, "--rank", 8, "--json").stdout)
    true = json.loads(run("cost", "embedded", "--hot", 4, "--rank", 8, "--profile", profile, "--json").stdout)
    assert (even["routing"], true["routing"]) == ("even", "profile")
    assert even["trainable_parameters"] == true["trainable_parameters"]
    assert even["adapter_flops_per_token"] < true["adapter_flops_per_token"]


def test_methods_are_listed(run: Run) -> None:
    done = run("methods")
    assert all(name in done.output for name in ("lora", "attention", "hellora", "random", "cold", "arXiv:2605.18795"))


def test_train_eval_merge(run: Run, adapter: Path, tmp_path: Path) -> None:
    scored = run("eval", "embedded", "--adapter", adapter, "--data", "task:syllogism", "--samples", 20, "--json")
    assert scored.exit_code == 0, scored.output
    merged = run("merge", adapter, "-o", "merged")
    assert merged.exit_code == 0, merged.output
    again = run("eval", "merged", "--data", "task:syllogism", "--samples", 20, "--json")
    one, other = json.loads(scored.stdout), json.loads(again.stdout)
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert one["exact_match"] == other["exact_match"]
    base = json.loads(run("eval", "embedded", "--data", "task:syllogism", "--samples", 20, "--json").stdout)
    assert base["loss"] != pytest.approx(one["loss"], rel=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(plain).__name__ == "OlmoeForCausalLM"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]


def test_a_finished_run_can_be_read(adapter: Path) -> None:
    assert json.loads((adapter / "run.json").read_text())["model"] == "embedded"
    assert json.loads((adapter / "training.json").read_text())["steps"] == 3
    assert len(load_file(adapter / "adapter_model.safetensors")) == 2 * (16 + 4 + 4 * 4 * 3)


def test_train_refuses_a_folder_in_use_and_resumes(run: Run, adapter: Path) -> None:
    command = ["train", adapter.parent / "plan.json", "--data", "task:syllogism", "--samples", 16, "--steps", 3]
    command += ["--batch-size", 4, "--lr", "1e-2", "-o", adapter]
    refused = run(*command)
    assert refused.exit_code == 2
    assert "is not empty" in refused.stderr
    resumed = run(*command, "--resume", "--json")
    assert json.loads(resumed.stdout)["steps"] == 3
    other = run(*command, "--resume", "--seed", 5)
    assert other.exit_code == 2
    assert "cannot be resumed" in other.stderr


def _mistakes() -> list[Any]:
    plan = ["plan", "{profile}", "-o", "plan.json"]
    train = ["train", "{plan}", "-o", "run"]
    profile = ["profile", "embedded", "-o", "p.safetensors"]
    cost = ["cost", "embedded", "--hot", "4"]
    return [
        pytest.param([*plan, "--hot", "0"], "keeps no experts", id="hot of 0"),
        pytest.param([*plan, "--hot", "17"], "more experts than a layer has", id="too many hot"),
        pytest.param([*plan, "--hot", "120%"], "out of range", id="hot of 120%"),
        pytest.param([*plan, "--method", "helora"], "did you mean hellora", id="misspelt method"),
        pytest.param([*plan, "--method", "lora", "--hot", "4"], "no option 'hot'", id="option of another method"),
        pytest.param([*plan, "--rank", "1000"], "rank 1000 is too large", id="rank too large"),
        pytest.param(
            ["plan", "none.safetensors", "-o", "plan.json"],
            "the profile none.safetensors does not exist",
            id="no profile",
        ),
        pytest.param(["plan", "{broken_profile}", "-o", "plan.json"], "truncated", id="truncated profile"),
        pytest.param(["plan", "{dense_profile}", "-o", "plan.json"], "is a dense model", id="dense model"),
        pytest.param([*profile, "--data", "none.jsonl"], "there is no file", id="no data file"),
        pytest.param([*profile, "--data", "{empty}"], "has no row", id="no rows"),
        pytest.param([*profile, "--data", "{columns}"], "neither prompt and completion", id="missing columns"),
        pytest.param([*profile, "--data", "{xml}"], "is not supported", id="unknown format"),
        pytest.param([*profile, "--data", "a=task:gcd", "--data", "a=task:aiw"], "same name", id="two of one name"),
        pytest.param(
            ["profile", "nobody/nothing", "--data", "task:gcd", "-o", "p.safetensors"],
            "cannot be found",
            id="no network",
        ),
        pytest.param(
            ["profile", "none.gguf", "--data", "task:gcd", "-o", "p.safetensors"],
            "none.gguf does not exist",
            id="no gguf",
        ),
        pytest.param(
            ["profile", "embedded", "--data", "task:gcd", "--low-memory", "--sensitivity", "-o", "p.safetensors"],
            "--sensitivity needs all weights in memory",
            id="gradients of weights on disk",
        ),
        pytest.param(["cost", "nobody/nothing"], "cannot be found", id="no configuration"),
        pytest.param(["cost", "{dense}", "--hot", "2"], "is a dense model", id="cost of a dense model"),
        pytest.param(["cost", "{nonsense}"], "does not recognize this architecture", id="unknown model type"),
        pytest.param(["cost", "{vit}"], "is not a causal language model", id="no language model"),
        pytest.param(["cost", "{uneven}"], "a model of type olmoe cannot be built", id="sizes that do not fit"),
        pytest.param([*cost, "--targets", "atention"], "did you mean attention", id="misspelt target"),
        pytest.param([*cost, "--targets", "experts.dwon"], "no site for the target 'experts.dwon'", id="projection"),
        pytest.param([*cost, "--layers", "four"], "layers='four' is not understood", id="misspelt layers"),
        pytest.param([*cost, "--layers", "0-99"], "layer 4, which this model does not have", id="layers out of range"),
        pytest.param([*cost, "--rank", "0"], "rank=0 is not a rank", id="rank of 0"),
        pytest.param([*cost, "--rank", "97"], "rank 97 is too large", id="rank above the smaller dimension"),
        pytest.param(
            ["train", "none.json", "--data", "task:gcd", "-o", "run"], "the plan none.json does not exist", id="no plan"
        ),
        pytest.param(["train", "{broken_plan}", "--data", "task:gcd", "-o", "run"], "truncated", id="truncated plan"),
        pytest.param(["train", "{edited_plan}", "--data", "task:gcd", "-o", "run"], "was changed", id="edited plan"),
        pytest.param(
            [*train, "--data", "task:gcd", "--model", "{other}"], "has no place for", id="plan of another model"
        ),
        pytest.param([*train, "--data", "task:gcd", "--lr", "0"], "lr=0.0", id="learning rate of 0"),
        pytest.param([*train, "--data", "task:gcds"], "did you mean gcd", id="misspelt task"),
        pytest.param(["merge", "none", "-o", "merged"], "there is no adapter", id="no adapter"),
        pytest.param(["eval", "embedded", "--adapter", "none", "--data", "task:gcd"], "there is no adapter", id="eval"),
    ]


@pytest.mark.parametrize(("arguments", "message"), _mistakes())
def test_mistakes_get_one_message_and_write_nothing(
    run: Run, files: dict[str, Path], tmp_path: Path, arguments: list[str], message: str
) -> None:
    before = _tree(tmp_path)
    done = run(*(argument.format(**files) for argument in arguments))
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.stderr.split())
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert _tree(tmp_path) == before


def _tree(folder: Path) -> dict[Path, bytes | None]:
    """Read all files below a folder; folders count too."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def files(tmp_path: Path, profile: Path, adapter: Path) -> dict[str, Path]:
    """Good and bad inputs by name, all in the test's folder."""
    made = {"profile": profile, "plan": adapter.parent / "plan.json"}
    texts = {"empty": "", "columns": '{"question": "a"}\n', "xml": "<rows/>"}
    for name, text in texts.items():
        made[name] = tmp_path / f"{name}{'.xml' if name == 'xml' else '.jsonl'}"
        made[name].write_text(text)
    configurations = {
        "nonsense": '{"model_type": "nonsense"}',
        "vit": '{"model_type": "vit"}',
        "uneven": '{"model_type": "olmoe", "num_attention_heads": 0}',
    }
    for name, text in configurations.items():
        made[name] = tmp_path / name / "config.json"
        made[name].parent.mkdir()
        made[name].write_text(text)
    plan = made["plan"].read_text()
    made["broken_plan"] = tmp_path / "broken.json"
    made["broken_plan"].write_text(plan[:200])
    made["edited_plan"] = tmp_path / "edited.json"
    made["edited_plan"].write_text(plan.replace('"seed": 0', '"seed": 1'))
    made["broken_profile"] = tmp_path / "broken.safetensors"
    made["broken_profile"].write_bytes(profile.read_bytes()[:-10])
    dense = build_dense()
    made["dense"] = tmp_path / "dense"
    dense.config.save_pretrained(made["dense"])
    made["dense_profile"] = tmp_path / "dense.safetensors"
    apportion.profile(dense, [{"input_ids": dense.dummy_inputs["input_ids"]}]).save(made["dense_profile"])
    made["other"] = tmp_path / "other"
    build_tiny("olmoe").save_pretrained(made["other"])
    _, tokenizer = apportion.embedded()
    tokenizer.save_pretrained(made["other"])
    return made


def test_unknown_options_are_mistakes(run: Run, profile: Path) -> None:
    assert run("plan", profile, "--colour", "red").exit_code == 2


def test_a_full_disk_leaves_nothing(run: Run, profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    done = run("plan", profile, "--hot", 4, "--rank", 4, "-o", "plan.json")
    assert done.exit_code == 1
    assert "the disk is full" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_command_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("apportion.cli.cost.cost_on", interrupt)
    done = run("cost", "embedded")
    assert done.exit_code == 1
    assert done.stderr == "error: interrupted.\n"
