"""The HTML page. It is self-contained and loads nothing from the network."""

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
    """Result of `write_report`: the kind of contents, the page's file, its size and its sections."""

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
    """Write a self-contained HTML page of a study, a demonstration, a profile or a plan.

    Args:
        path: Folder of a study or a demonstration, a profile (``.safetensors``) or a plan (``.json``).
        output: Output file. An existing report is overwritten, other files are not.
        profile: Profile that the plan was made from, if the path is a plan.
        force: Overwrite any file that is not an input.

    Returns:
        The kind of contents, the file, its size and its sections.

    Raises:
        ConfigurationError: no page can be made from the path.
        OutputExistsError: the output is a folder, a file other than a report, or an input.
        OutputPathError: the output is not writable.
    """
    check_output(output, "report", inputs=(path, profile) if profile else (path,), force=force)
    material = read_material(path, profile)
    data = chart_data(material)
    sections = _sections(data)
    text = _render(material, data, sections)
    write_text(output, text)
    return Written(material.kind, os.fspath(output), len(text.encode()), sections)


def _sections(data: dict[str, Any]) -> tuple[str, ...]:
    """Return the charts that have data."""
    tasks = [task for profile in data["profiles"] for task in profile["tasks"]]
    has_data = {
        "scores": bool(data["scores"]),
        "experts": any(profile["layers"] for profile in data["profiles"]),
        "matrices": any(task["matrices"] for task in tasks) or bool(data["plans"]),
        "coverage": any(task["grids"] for task in tasks),
        "overlap": any(len(profile["tasks"]) > 1 and profile["layers"] for profile in data["profiles"]),
    }
    return tuple(name for name, present in has_data.items() if present)


def _render(material: Material, data: dict[str, Any], sections: tuple[str, ...]) -> str:
    """Fill the template. Contents of files are escaped; only scripts with a listed hash run."""
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
    """Read a file of this package."""
    return resources.files("apportion.report").joinpath(name).read_text(encoding="utf-8")
