"""The page in a browser without a network: what is drawn, what the switches and keys do, and how it looks."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, Page, expect, sync_playwright

import apportion
from apportion.records.profile import Profile
from apportion.records.site import ExpertBlock, Projection
from apportion.report.page import write_report
from study_folder import TASKS, tiny_profile, write_study

PICTURES = Path(__file__).parents[2] / "build" / "screenshots"
EVIL = "</script><b>%{x}"
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The system's Chromium, or Playwright's own."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        if not found and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("there is no browser: install chromium, or run: playwright install chromium")
        opened = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def profile() -> Profile:
    """Two tasks on a tiny model."""
    return tiny_profile()


@pytest.fixture(scope="module")
def study(profile: Profile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a study."""
    folder = tmp_path_factory.mktemp("page")
    write_study(folder / "study", profile)
    write_report(folder / "study", folder / "study.html")
    return folder / "study.html"


@pytest.fixture
def visit(browser: Browser) -> Iterator[Open]:
    """Open a page from disk with the network off; afterwards nothing may have gone wrong or been asked for."""
    contexts, wrong = [], []

    def visit(file: Path, width: int = 1280, height: int = 900, colours: str = "light") -> Page:
        context = browser.new_context(
            offline=True, color_scheme=colours, viewport={"width": width, "height": height}, reduced_motion="reduce"
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("request", lambda request: None if request.url.startswith("data:") else asked.append(request.url))
        asked: list[str] = []
        page.goto(file.as_uri())
        page.wait_for_function("document.querySelectorAll('.chart .plot-container').length > 0")
        assert asked == [file.as_uri()]
        return page

    yield visit
    for context in contexts:
        context.close()
    assert wrong == []


def drawn(page: Page, section: str = "experts") -> list[list[float]]:
    """Read the numbers that a heat map draws, row by row."""
    return page.evaluate(f"document.querySelector('#{section} .chart').data[0].z.map((row) => Array.from(row))")


def flat(rows: list[list[float]]) -> list[float]:
    """Put the rows of a heat map one after the other."""
    return [value for row in rows for value in row]


def marked(page: Page) -> set[tuple[int, int]]:
    """Read which cells are marked as planned, as rows and experts."""
    trace = page.evaluate("document.querySelector('#experts .chart').data[1] ?? {x: [], y: []}")
    return set(zip(trace["y"], trace["x"], strict=True))


def cell(page: Page, row: int, column: int, section: str = "experts") -> tuple[float, float]:
    """Tell where a cell of a heat map is in the window."""
    page.locator(f"#{section} .chart").scroll_into_view_if_needed()
    return tuple(
        page.evaluate(
            """([section, row, column]) => {
                const chart = document.querySelector(`#${section} .chart`), { xaxis, yaxis } = chart._fullLayout;
                const box = chart.getBoundingClientRect();
                return [box.left + xaxis._offset + xaxis.d2p(column), box.top + yaxis._offset + yaxis.d2p(row)];
            }""",
            [section, row, column],
        )
    )


def picture(page: Page, name: str) -> None:
    """Store how the page looks."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"{name}.png", full_page=True)


def test_switches_change_what_is_drawn(visit: Open, study: Path, profile: Profile) -> None:
    page = visit(study)
    expected = {
        "count": {task: profile.counts[task] for task in TASKS},
        "mass": {task: profile.routing_mass[task] for task in TASKS},
        "sensitivity": {task: profile.of_task(task).expert_sensitivity() for task in TASKS},
    }
    for quantity, of_task in expected.items():
        page.select_option("#experts [name=quantity]", quantity)
        for task in TASKS:
            page.select_option("#experts [name=task]", label=task)
            assert flat(drawn(page)) == pytest.approx(of_task[task].flatten().tolist(), rel=1e-5)
    page.select_option("#experts [name=quantity]", "count")
    page.select_option("#experts [name=task]", label="all tasks together")
    assert drawn(page) == profile.total_counts().tolist()
    page.select_option("#experts [name=colours]", "share")
    assert [sum(row) for row in drawn(page)] == pytest.approx([1.0, 1.0])


def test_the_plan_switch_marks_its_experts(visit: Open, study: Path, profile: Profile) -> None:
    page = visit(study)
    for method in ("hellora", "cold"):
        plan = apportion.plan(profile.of_task("siblings"), method, hot=3, rank=4)
        page.select_option("#experts [name=plan]", label=f"{method} at 4,000 parameters")
        expected = {(row, e) for row, ids in enumerate(plan.experts_by_layer().values()) for e in ids}
        assert marked(page) == expected
        page.select_option("#experts [name=quantity]", "rank")
        assert {(r, e) for r, row in enumerate(drawn(page)) for e, rank in enumerate(row) if rank == 4} == expected
        page.select_option("#experts [name=quantity]", "count")
    page.select_option("#experts [name=plan]", label="none")
    assert marked(page) == set()


def test_pointing_at_a_cell_shows_its_numbers(visit: Open, study: Path, profile: Profile) -> None:
    page = visit(study)
    hot = set(apportion.plan(profile.of_task("siblings"), "hellora", hot=3, rank=4).experts_by_layer().popitem()[1])
    for row, column in ((0, 2), (1, 5), (1, min(hot))):
        page.mouse.move(*cell(page, row, column))
        label = page.locator("#experts .hoverlayer")
        expect(label).to_contain_text(f"layer {row}, expert {column}")
        count = int(profile.counts["siblings"][row, column])
        expect(label).to_contain_text(f"selections {count:,}, ")
        share = re.search(r"selections \S+ (\S+) % of the layer", label.text_content())[1]
        assert float(share) == pytest.approx(100 * count / int(profile.counts["siblings"][row].sum()), abs=0.051)
        if row == 1:
            expect(label).to_contain_text("planned, rank 4" if column in hot else "not planned")
        expect(page.locator("#experts .readout")).to_contain_text(f"layer {row}, expert {column}; selections {count:,}")


def test_everything_works_with_the_keyboard_alone(visit: Open, study: Path, profile: Profile) -> None:
    page = visit(study)
    for _ in range(200):
        page.keyboard.press("Tab")
        focus = page.evaluate(
            "() => { const at = document.activeElement; return [at.closest('section')?.id, at.name || at.className]; }"
        )
        if focus == ["experts", "task"]:
            page.keyboard.press("ArrowDown")
            assert drawn(page) == profile.counts["legs"].tolist()
        if focus[0] == "experts" and "chart" in focus[1]:
            break
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    count = int(profile.counts["legs"][1, 1])
    expect(page.locator("#experts .readout")).to_contain_text(f"layer 1, expert 1; selections {count:,}")
    expect(page.locator("#experts .hoverlayer")).to_contain_text("layer 1, expert 1")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    table = page.locator("#experts .numbers table")
    expect(table.locator("caption")).to_contain_text("selections: legs")
    assert table.locator("tbody tr").nth(1).locator("td").nth(1).inner_text().rstrip(" *") == f"{count:,}"


def test_hot_sets_overlap_as_counted_by_hand(visit: Open, study: Path, profile: Profile) -> None:
    page = visit(study)
    page.locator("#overlap [name=k]").focus()
    for k in (2, 3):  # it begins at the model's top-k
        sets = [
            [set(row.sort(descending=True, stable=True).indices[:k].tolist()) for row in profile.counts[task]]
            for task in TASKS
        ]
        index = sum(len(a & b) / len(a | b) for a, b in zip(*sets, strict=True)) / len(sets[0])
        assert flat(drawn(page, "overlap")) == pytest.approx([1, index, index, 1])
        page.keyboard.press("ArrowRight")


def test_coverage_is_the_share_of_the_hottest(visit: Open, study: Path, profile: Profile) -> None:
    page = visit(study)
    curves = page.evaluate("document.querySelector('#coverage .chart').data.map((trace) => trace.y)")
    counts = profile.counts["siblings"].double()
    shares = counts.sort(descending=True).values.cumsum(1) / counts.sum(1, keepdim=True)
    for curve, row in zip(curves, shares, strict=False):
        assert curve == pytest.approx([0, *row.tolist()])
    assert curves[-1] == pytest.approx([0, *shares.mean(0).tolist()])


def test_scores_have_intervals_and_contenders_can_be_hidden(visit: Open, study: Path) -> None:
    page = visit(study)
    traces = "document.querySelector('#scores .chart').data"
    names = page.evaluate(f"{traces}.map((trace) => trace.name)")
    assert names == ["hellora", "cold", "attention", "lora", "full"]
    assert page.evaluate(f"{traces}[1].y") == pytest.approx([0.5, 0.7])
    assert page.evaluate(f"{traces}[1].error_y.array") == pytest.approx([0.03, 0.03])
    page.locator("#scores .chips button", has_text="cold").press("Enter")
    assert page.evaluate(f"{traces}.map((trace) => trace.name)") == ["hellora", "attention", "lora", "full"]
    page.select_option("#scores [name=metric]", "forgetting")
    assert page.evaluate(f"{traces}[0].y") == pytest.approx([0.1, 0.1])


def test_tables_sort_by_value(visit: Open, study: Path) -> None:
    page = visit(study)
    table = page.locator("section", has=page.get_by_role("heading", name="Runs")).locator("table")
    column = table.locator("thead th", has_text=re.compile("^after"))
    position = column.evaluate("(header) => header.cellIndex")
    for direction in ("ascending", "descending"):
        column.get_by_role("button").press("Enter")
        assert column.get_attribute("aria-sort") == direction
        shown = table.locator(f"tbody tr > :nth-child({position + 1})").all_inner_texts()
        assert shown == sorted(shown, reverse=direction == "descending")


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_both_themes_are_readable(visit: Open, study: Path, colours: str) -> None:
    page = visit(study, colours=colours)
    picture(page, f"report-{colours}")
    found = page.evaluate(
        """() => ["h1", ".about", ".facts dt", ".verdict .first", ".readout", "summary", "select", "td", "caption",
                  "pre"].map((name) => document.querySelector(name)).map((element) => {
                let behind = element;
                while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
                return [element.tagName, getComputedStyle(element).color, getComputedStyle(behind).backgroundColor];
            })"""
    )
    for name, colour, behind in found:
        assert _contrast(colour, behind) >= 4.5, (name, colour, behind)
    page_is_dark = _luminance(found[0][2]) < 0.2
    assert page_is_dark == (colours == "dark")
    axis = page.evaluate("document.querySelector('#coverage .chart').layout.font.color")
    assert _contrast(_rgb(axis), found[1][2]) >= 4.5


def test_charts_follow_a_change_of_theme(visit: Open, study: Path) -> None:
    page = visit(study)
    chart = "document.querySelector('#experts .chart')"
    look = f"[{chart}.layout.font.color, {chart}.data[0].colorscale[4][1]]"
    light = page.evaluate(look)
    for media, scheme, other in (("screen", "dark", True), ("print", "dark", False), ("screen", "dark", True)):
        page.emulate_media(media=media, color_scheme=scheme)
        page.wait_for_function(
            f"(light) => {look}.every((colour, index) => (colour !== light[index]) === {str(other).lower()})", arg=light
        )


def test_a_phone_shows_everything_without_sideways_scrolling(visit: Open, study: Path) -> None:
    page = visit(study, width=360, height=740)
    picture(page, "report-phone")
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    small = page.evaluate(
        """[...document.querySelectorAll("select, .chips button, input")].filter((item) => item.offsetParent)
            .filter((item) => item.getBoundingClientRect().height < 32).length"""
    )
    assert small == 0


def test_print_is_light_expanded_and_without_controls(visit: Open, study: Path) -> None:
    page = visit(study, colours="dark")
    page.emulate_media(media="print")
    picture(page, "report-print")
    assert _luminance(page.evaluate("getComputedStyle(document.querySelector('h1')).color")) < 0.2
    for hidden in (".controls", ".readout", "summary"):
        assert not page.locator(hidden).first.is_visible()
    cut = page.evaluate(
        """[...document.querySelectorAll('.scroll')].filter((box) => box.offsetParent)
            .filter((box) => box.scrollHeight > box.clientHeight + 2).length"""
    )
    assert cut == 0
    assert len(page.pdf(prefer_css_page_size=True)) > 20_000


def test_names_are_text_everywhere(visit: Open, tmp_path: Path) -> None:
    write_study(tmp_path / "study", tiny_profile((EVIL, "plain")))
    write_report(tmp_path / "study", tmp_path / "r.html")
    page = visit(tmp_path / "r.html")
    assert page.locator("#experts [name=task] option").first.inner_text() == EVIL
    assert page.locator("b").count() == 0
    expect(page.locator("#overlap .ytick").first).to_have_text(EVIL)
    page.mouse.move(*cell(page, 0, 1, "overlap"))
    expect(page.locator("#overlap .readout")).to_contain_text(f"{EVIL} and plain; Jaccard index")


def test_a_plan_alone_and_a_dense_profile(visit: Open, profile: Profile, tmp_path: Path) -> None:
    plan = apportion.plan(profile, "lora_smoe", rank=4)
    plan.save(tmp_path / "plan.json")
    write_report(tmp_path / "plan.json", tmp_path / "plan.html")
    page = visit(tmp_path / "plan.html")
    assert sum(flat(drawn(page, "matrices"))) == sum(p.rank * p.num_experts for p in plan.placements)
    picture(page, "plan")
    sites = [site for site in profile.layout.others if site.storage == "linear"]
    dense = Profile(
        layout=apportion.Layout("Dense", "dense", 10**6, "d" * 64, tuple(sites)),
        counts={"t": profile.counts[TASKS[0]][:0, :0]},
        routing_mass={"t": profile.routing_mass[TASKS[0]][:0, :0]},
        tokens={"t": 48},
        sensitivity={"t": {site.name: profile.sensitivity[TASKS[0]][site.name] for site in sites}},
    )
    dense.save(tmp_path / "dense.safetensors")
    write_report(tmp_path / "dense.safetensors", tmp_path / "dense.html")
    page = visit(tmp_path / "dense.html")
    assert flat(drawn(page, "matrices")) == pytest.approx(list(dense.sensitivity["t"].values()), rel=1e-5)


def test_a_large_model_stays_usable(visit: Open, tmp_path: Path) -> None:
    profile = _large_profile(layers=58, experts=256)
    profile.save(tmp_path / "p.safetensors")
    apportion.plan(profile, "lora", rank=2).save(tmp_path / "plan.json")
    written = write_report(tmp_path / "plan.json", tmp_path / "r.html", tmp_path / "p.safetensors")
    assert written.bytes < 7_000_000
    page = visit(tmp_path / "r.html", width=360, height=740)
    assert len(marked(page)) == 58 * 256
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    took = page.evaluate(
        """() => {
            const control = document.querySelector("#experts [name=quantity]"), start = performance.now();
            control.value = "mass";
            control.dispatchEvent(new Event("input", { bubbles: true }));
            return performance.now() - start;
        }"""
    )
    assert took < 5000  # half a second on a quiet machine


def _large_profile(layers: int, experts: int) -> Profile:
    """Make a profile as wide as DeepSeek-V3's out of nothing."""
    down = Projection("down", "down_proj", 64, 64)
    blocks = tuple(ExpertBlock(f"model.layers.{n}.mlp.experts", n, experts, 8, (down,)) for n in range(layers))
    counts = torch.randint(0, 9000, (layers, experts))
    tasks = ("mathematics", "code")
    return Profile(
        layout=apportion.Layout("Large", "large", 10**9, "f" * 64, (), blocks),
        counts={task: counts.clone() for task in tasks},
        routing_mass={task: counts.double() / 7 for task in tasks},
        tokens=dict.fromkeys(tasks, 10_000),
        provenance={"model": "large"},
    )


def _luminance(colour: str) -> float:
    """Give the relative luminance of rgb(...), as WCAG defines it."""
    channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    """Give the contrast ratio of two colours."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _rgb(colour: str) -> str:
    """Turn #rrggbb into rgb(...)."""
    return "rgb({}, {}, {})".format(*(int(colour[place : place + 2], 16) for place in (1, 3, 5)))
