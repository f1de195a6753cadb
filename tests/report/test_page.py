"""Pages without a browser: what is in them, where it comes from, and that nothing can break out of them."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import apportion
from apportion.cli.main import app
from apportion.errors import ProfileError
from apportion.records.files import write_text
from apportion.report.charts import chart_data
from apportion.report.commands import plan_command, profile_command
from apportion.report.material import Material, read_material
from apportion.report.page import write_report
from study_folder import METHODS, TASKS, tiny_profile, write_study
from tiny_models import build_dense

EVIL = "</script><b>&{{7*7}}"


def data_in(page: Path) -> dict[str, object]:
    """Read the numbers that a page carries."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())
    return json.loads(found)


def test_a_page_needs_nothing_outside_itself(tmp_path: Path) -> None:
    tiny_profile().save(tmp_path / "p.safetensors")
    written = write_report(tmp_path / "p.safetensors", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    own = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"""(src|href)="(?!data:)|@import|url\(|https?://""", own)
    assert "default-src 'none'" in own
    assert "unsafe-eval" not in own
    assert written.bytes == len(text.encode()) < 6_000_000
    assert written.sections == ("experts", "matrices", "coverage", "overlap")


def test_charts_hold_what_the_profile_holds() -> None:
    profile = tiny_profile()
    data = chart_data_of(profile)
    for number, task in enumerate(TASKS):
        shown = data["tasks"][number]
        assert shown["grids"]["count"] == profile.counts[task].tolist()
        assert torch.allclose(torch.tensor(shown["grids"]["mass"]), profile.routing_mass[task].float(), rtol=1e-5)
        expected = profile.of_task(task).expert_sensitivity().float()
        assert torch.allclose(torch.tensor(shown["grids"]["sensitivity"]), expected, rtol=1e-5)
        assert sum(cell["sum"] for cell in shown["matrices"]) == pytest.approx(
            sum(profile.sensitivity[task].values()), rel=1e-4
        )
    assert data["tasks"][-1]["grids"]["count"] == profile.total_counts().tolist()


def chart_data_of(profile: apportion.Profile) -> dict[str, object]:
    return chart_data(Material("profile", "p", {"tiny": profile}))["profiles"][0]


def test_layers_may_differ_in_their_number_of_experts() -> None:
    profile = tiny_profile(name="deepseek_v3")
    data = chart_data_of(profile)
    assert [layer["layer"] for layer in data["layers"]] == [1, 2]
    assert {cell["name"] for cell in data["tasks"][0]["matrices"]} >= {"mlp.experts.*.down_proj", "mlp.gate_proj"}


def test_a_dense_profile_shows_matrices_alone(tmp_path: Path) -> None:
    model = build_dense()
    ids = torch.randint(3, 60, (3, 8))
    batches = [{"input_ids": ids, "labels": ids}]
    apportion.profile(model, batches, sensitivity=True).save(tmp_path / "d.safetensors")
    assert write_report(tmp_path / "d.safetensors", tmp_path / "r.html").sections == ("matrices",)


def test_a_plan_alone_and_with_its_profile(tmp_path: Path) -> None:
    profile = tiny_profile()
    profile.save(tmp_path / "p.safetensors")
    plan = apportion.plan(profile, "hellora", hot=3, rank=4)
    plan.save(tmp_path / "plan.json")
    alone = write_report(tmp_path / "plan.json", tmp_path / "alone.html")
    assert alone.sections == ("experts", "matrices")
    both = write_report(tmp_path / "plan.json", tmp_path / "both.html", tmp_path / "p.safetensors")
    assert both.sections == ("experts", "matrices", "coverage", "overlap")
    for page in ("alone.html", "both.html"):
        shown = data_in(tmp_path / page)["plans"][0]["experts"]
        expected = [(row, e) for row, ids in enumerate(plan.experts_by_layer().values()) for e in ids]
        assert sorted((cell["row"], cell["expert"]) for cell in shown) == expected
        assert {cell["rank"] for cell in shown} == {4}


def test_a_study_shows_every_run_cell_and_verdict(tmp_path: Path) -> None:
    summary = write_study(tmp_path / "study", tiny_profile())
    written = write_report(tmp_path / "study", tmp_path / "r.html")
    assert written.kind == "study"
    assert written.sections == ("scores", "experts", "matrices", "coverage", "overlap")
    text = (tmp_path / "r.html").read_text()
    for sentence in (*summary.verdicts, *summary.commands):
        assert sentence in text
    assert all(f">{file.stem}<" in text for file in (tmp_path / "study" / "runs").glob("*.json"))
    data = data_in(tmp_path / "r.html")
    assert len(data["scores"]) == len(summary.cells)
    assert data["scores"][0]["exact_match"] == pytest.approx([0.6, 0.57, 0.63])
    assert data["scores"][0]["before"] == {"exact_match": 0.2, "loss": 1.5}
    assert len(data["plans"]) == len(TASKS) * (len(METHODS) - 1) * 2
    assert {"group": "siblings", "label": "cold at 4,000 parameters"}.items() <= data["plans"][2].items()


def test_a_plan_that_contenders_share_is_shown_for_each(tmp_path: Path) -> None:
    write_study(tmp_path / "study", tiny_profile())
    material = read_material(tmp_path / "study")
    study = material.study
    assert study is not None
    shared = next(run for run in study.runs if run.contender == "hellora")
    place = {"task": shared.task, "contender": "lora", "budget": shared.budget}
    twin = next(run for run in study.runs if place.items() <= dict(run).items())
    runs = tuple(
        run.model_copy(update={"plan": shared.plan, "plan_seal": shared.plan_seal}) if run.plan == twin.plan else run
        for run in study.runs
    )
    plans = {file: plan for file, plan in material.plans.items() if file != twin.plan}
    shown = chart_data(replace(material, plans=plans, study=replace(study, runs=runs)))["plans"]
    assert len(shown) == len(material.plans) == len(plans) + 1
    twins = [(plan["group"], plan["method"]) for plan in shown if plan["label"] == "lora at 4,000 parameters"]
    assert twins == [("siblings", "hellora"), ("legs", "lora")]


def test_an_unsummarised_study_has_runs_and_no_verdict(tmp_path: Path) -> None:
    write_study(tmp_path / "study", tiny_profile())
    (tmp_path / "study" / "summary.json").unlink()
    written = write_report(tmp_path / "study", tmp_path / "r.html")
    assert "scores" not in written.sections
    assert "No verdict yet" in (tmp_path / "r.html").read_text()


def test_names_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    write_study(tmp_path / "study", tiny_profile((EVIL, "plain")))
    write_report(tmp_path / "study", tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert EVIL not in text
    assert "&lt;/script&gt;&lt;b&gt;&amp;{{7*7}}" in text
    assert data_in(tmp_path / "r.html")["profiles"][0]["tasks"][0]["name"] == EVIL


def test_a_profile_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    profile = tiny_profile()
    site = next(iter(profile.sensitivity[TASKS[0]]))
    profile.sensitivity[TASKS[0]][site] = float("inf")
    profile.save(tmp_path / "p.safetensors")
    with pytest.raises(ProfileError, match="should be a finite number"):
        write_report(tmp_path / "p.safetensors", tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_sums_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    profile = tiny_profile()
    norms = profile.sensitivity[TASKS[0]]
    norms.update(dict.fromkeys(norms, 1e308))  # each is finite, and their sums are not
    profile.save(tmp_path / "p.safetensors")
    write_report(tmp_path / "p.safetensors", tmp_path / "r.html")
    matrices = data_in(tmp_path / "r.html")["profiles"][0]["tasks"][0]["matrices"]
    assert {matrix["sum"] is None for matrix in matrices if matrix["sites"] > 1} == {True}


def test_a_demonstration(tmp_path: Path) -> None:
    results = Path(__file__).parents[2] / "docs" / "results" / "demo.json"
    profile = tiny_profile()
    profile.save(tmp_path / "demo" / "profile.safetensors")
    write_text(tmp_path / "demo" / "results.json", results.read_text())
    apportion.plan(profile, "hellora", hot=2, rank=4).save(tmp_path / "demo" / "siblings" / "hellora" / "plan.json")
    assert write_report(tmp_path / "demo", tmp_path / "r.html").kind == "demonstration"
    text = (tmp_path / "r.html").read_text()
    assert "996,352" in text
    assert "siblings/hellora" in text


def test_commands_make_the_same_files_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = CliRunner()
    data = ["--data", "sums=task:gcd", "--data", "task:aiw", "--samples", "3", "--max-length", "50"]
    assert run.invoke(app, ["profile", "embedded", *data, "--sensitivity", "-o", "p.safetensors"]).exit_code == 0
    options = ["--method", "hellori", "--hot", "25%", "--targets", "experts,router", "--rank-router", "2"]
    assert run.invoke(app, ["plan", "p.safetensors", *options, "--rank", "4", "-o", "plan.json"]).exit_code == 0
    profile, plan = apportion.load_profile("p.safetensors"), apportion.load_plan("plan.json")
    for command in (profile_command(profile, "q.safetensors"), plan_command(plan, "q.safetensors", "again.json")):
        words = shlex.split(command)
        assert words[0] == "apportion"
        done = run.invoke(app, words[1:])
        assert done.exit_code == 0, done.output
    assert apportion.load_profile("q.safetensors").digest == profile.digest
    assert Path("again.json").read_bytes() == Path("plan.json").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "none does not exist"),
        (["."], "is neither a study's folder nor that of a finished demonstration"),
        (["notes.txt"], "is not a folder, a .safetensors file or a .json file"),
        (["none.json"], "the plan none.json does not exist"),
        (["p.safetensors", "--profile", "p.safetensors"], "is not a plan"),
        (["plan.json", "--profile", "other.safetensors"], "are for different models"),
        (["p.safetensors", "-o", "."], "is a folder; a file was expected"),
        (["broken"], "is damaged"),
        (["empty"], "results.json is damaged"),
    ],
)
def test_mistakes_get_one_message_and_write_nothing(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    profile = tiny_profile()
    profile.save("p.safetensors")
    apportion.plan(profile, "hellora", hot=2, rank=4).save("plan.json")
    tiny_profile(name="mixtral").save("other.safetensors")
    write_text("notes.txt", "")
    write_text("broken/results.json", "{")
    write_text("empty/results.json", "[]")
    done = CliRunner().invoke(app, ["report", *arguments])
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.stderr.split())
    assert not Path("report.html").exists()


def test_the_command_says_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_profile().save("p.safetensors")
    done = CliRunner().invoke(app, ["report", "p.safetensors", "-o", "pages/r.html", "--json"])
    told = json.loads(done.stdout)
    assert told["kind"] == "profile"
    assert told["bytes"] == Path("pages/r.html").stat().st_size
    assert read_material("p.safetensors").name == "p"
