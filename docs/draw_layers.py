"""Draw the package's layers from the import contract and the docstrings: docs/images/layers.svg.

    python docs/draw_layers.py

Each row may import the rows below it, never those above; packages of one row do not import each other.
"""

from __future__ import annotations

import ast
import textwrap
import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "layers.svg"
WIDTH, ROW, GAP, LINE_CHARS_PX = 1000, 66, 10, 6.4
LEFT_OUT = {"__main__", "_version"}


def rows() -> list[list[str]]:
    """Read the contract's layers, from the top down."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["name"] == "Layers")
    named = [[name for name in layer.split(" | ") if name not in LEFT_OUT] for layer in layers]
    return [names for names in named if names]


def purpose(name: str) -> str:
    """Read the first line of a package's or a module's docstring, without the full stop."""
    path = ROOT / "src" / "apportion" / name
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(source.read_text())) or ""
    return docstring.partition("\n")[0].rstrip(".").replace("`", "")


def box(name: str, left: float, top: float, width: float) -> str:
    """Draw one package."""
    lines = textwrap.wrap(purpose(name), int((width - 16) / LINE_CHARS_PX), max_lines=3, placeholder=" …")
    words = "".join(
        f'<text x="{left + 8:.0f}" y="{top + 32 + 12 * number:.0f}" class="what">{escape(line)}</text>'
        for number, line in enumerate(lines)
    )
    return (
        f'<rect x="{left:.0f}" y="{top:.0f}" width="{width:.0f}" height="{ROW}" rx="6"/>'
        f'<text x="{left + 8:.0f}" y="{top + 18:.0f}" class="name">{escape(name)}</text>{words}'
    )


def picture() -> str:
    """Draw all rows."""
    boxes = []
    for number, names in enumerate(rows()):
        width = (WIDTH - GAP * (len(names) - 1)) / len(names)
        boxes += [box(name, (width + GAP) * place, (ROW + GAP) * number, width) for place, name in enumerate(names)]
    height = (ROW + GAP) * len(rows()) - GAP
    style = (
        "rect{fill:#f4f6fa;stroke:#9aa7bd}text{font-family:sans-serif;fill:#1c2848}"
        ".name{font-size:14px;font-weight:bold}.what{font-size:11px;font-weight:normal}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">'
        f"<title>The layers of apportion: each row imports only rows below it</title><style>{style}</style>\n"
        + "\n".join(boxes)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    PICTURE.write_text(picture())
    print(PICTURE)
