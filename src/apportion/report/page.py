"""The page itself: everything that it needs is inside it, and it may reach for nothing else."""

from __future__ import annotations

import base64
import hashlib
import os
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from apportion._version import __version__
from apportion.records.files import write_text
from apportion.records.outputs import check_output
from apportion.report.charts import chart_data
from apportion.report.facts import facts
from apportion.report.material import Material, read_material
from apportion.report.tables import result_tables


@dataclass(frozen=True)
class Written:
    """What was written: the kind of thing shown, the page's file, its size and its sections."""

    kind: str
    report: str
    bytes: int
    sections: tuple[str, ...]


def write_report(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    profile: str | os.PathLike[str] | None = None,
    *,
    force: bool = False,
) -> Written:
    """Make one HTML page that needs no network from a study, a demonstration, a profile or a plan.

    Args:
        path: A study's or a demonstration's folder, a profile (``.safetensors``) or a plan (``.json``).
        output: The page; one that is there is replaced, another file is not.
        profile: The profile that a plan was made from, where the path is a plan.
        force: Replace another file too, unless the page is made from it.

    Returns:
        What was written.

    Raises:
        ConfigurationError: there is nothing there that a page can be made from.
        OutputExistsError: the output is a folder, a file that is no such page, or what the page is made from.
        OutputPathError: nothing can be written there.
    """
    check_output(output, "report", inputs=(path, profile) if profile else (path,), force=force)
    material = read_material(path, profile)
    data = chart_data(material)
    sections = _sections(data)
    text = _render(material, data, sections)
    write_text(output, text)
    return Written(material.kind, os.fspath(output), len(text.encode()), sections)


def _sections(data: dict[str, Any]) -> tuple[str, ...]:
    """Tell which charts there is something to draw in."""
    tasks = [task for profile in data["profiles"] for task in profile["tasks"]]
    shown = {
        "scores": bool(data["scores"]),
        "experts": any(profile["layers"] for profile in data["profiles"]),
        "matrices": any(task["matrices"] for task in tasks) or bool(data["plans"]),
        "coverage": any(task["grids"] for task in tasks),
        "overlap": any(len(profile["tasks"]) > 1 and profile["layers"] for profile in data["profiles"]),
    }
    return tuple(name for name, holds in shown.items() if holds)


def _render(material: Material, data: dict[str, Any], sections: tuple[str, ...]) -> str:
    """Fill the template. Whatever comes from files is escaped; scripts run by their hash alone."""
    scripts = [get_plotlyjs(), _asset("charts.js"), _asset("page.js")]
    environment = Environment(
        loader=PackageLoader("apportion", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment.get_template("page.html.j2").render(
        version=__version__,
        material=material,
        facts=facts(material),
        sections=sections,
        tables=result_tables(material),
        data=data,
        style=Markup(_asset("page.css")),  # noqa: S704 - our own file
        scripts=[Markup(script) for script in scripts],  # noqa: S704 - Plotly's and our own
        script_hashes=[base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts],
    )


def _asset(name: str) -> str:
    """Read a file that stands beside this one."""
    return resources.files("apportion.report").joinpath(name).read_text(encoding="utf-8")
