"""stub"""

from pathlib import Path


def write_page(folder: Path, path: Path) -> None: ...
