"""Output of commands: names are shown as they are, never read as markup or as control characters."""

from __future__ import annotations

import itertools
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from apportion.errors import printable

_UNLIMITED = 100_000  # columns


class Terminal(Console):
    """A console that prints any text as it is.

    Square brackets are no markup. Control characters are escaped, in cells of tables also line breaks. If the output is
    not a terminal, tables are as wide as their contents. On a narrow terminal, numbers are wrapped before the columns
    that tell rows apart, and nothing is cut.

    Args:
        **options: As `rich.console.Console` takes them.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)
        if not self.is_terminal:
            self.width = _UNLIMITED

    @property
    def has_colours(self) -> bool:
        """Whether colours are shown."""
        return self.color_system is not None and not self.no_color

    def print(self, *objects: Any, **options: Any) -> None:
        """Print texts, tables and other renderables.

        Args:
            *objects: What to print. Line breaks of texts are kept.
            **options: As `rich.console.Console.print` takes them.
        """
        for table in objects:
            if isinstance(table, Table):
                _fit(table, self.width)
        super().print(*(Text(printable(one)) if isinstance(one, str) else one for one in objects), **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Convert the text of a cell or a title.

        Args:
            text: The text.
            **options: As `rich.console.Console.render_str` takes them.

        Returns:
            The text, with control characters and line breaks escaped.
        """
        return super().render_str(printable(text, keep=""), **options)

    def say(self, label: str, style: str, message: str) -> None:
        """Print a message after a coloured label, without wrapping it.

        Args:
            label: Such as ``error:``.
            style: Style of the label.
            message: The message.
        """
        self.print(Text.assemble((label, style), " ", printable(message)), soft_wrap=True)


def as_text(text: str) -> Text:
    """Return a text for a spinner, which would read strings as markup."""
    return Text(printable(text))


def _fit(table: Table, width: int) -> None:
    """Wrap cells instead of cutting them: numbers first, then the columns before them, which tell rows apart."""
    leading = list(itertools.takewhile(lambda column: column.justify != "right", table.columns))
    names_width = sum(max((len(str(cell)) for cell in column.cells), default=0) for column in leading)
    for column in table.columns:
        column.overflow = "fold"
    for column in leading:
        column.no_wrap = names_width <= width // 2
