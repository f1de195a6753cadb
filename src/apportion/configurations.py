"""Configurations that ship with the package, and cached layouts.

Finding a layout means building the model without its weights, which needs PyTorch and takes seconds. A layout depends
only on the configuration. Layouts of shipped configurations are shipped too; others are kept in the user's cache.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from platformdirs import user_cache_path

from apportion._version import __version__
from apportion.errors import ApportionError
from apportion.records.files import whole_file
from apportion.records.json_file import parse_record
from apportion.records.site import Layout

EMBEDDED = "embedded"
CACHE_VARIABLE = "APPORTION_CACHE"
ASSETS = Path(str(files("apportion"))) / "assets"

_CONFIGS, _LAYOUTS = ASSETS / "configs", ASSETS / "layouts"
_MAX_LAYOUT_BYTES = 1 << 26
_SUFFIX = ".json.gz"


@cache
def known_configurations() -> tuple[str, ...]:
    """Return the names of the models whose configuration ships with the package."""
    return tuple(sorted(path.stem for path in _CONFIGS.glob("*.json")))


def config_source(name: str | os.PathLike[str]) -> str:
    """Return the path or hub id of a model's configuration, for transformers.

    Args:
        name: ``embedded``, one of `known_configurations`, a hub id, a folder, or a ``config.json``.

    Returns:
        A path or a hub id.
    """
    text = os.fspath(name)
    if text == EMBEDDED:
        return str(ASSETS / EMBEDDED)
    return str(_CONFIGS / f"{text}.json") if text in known_configurations() else text


def known_layout(name: str | os.PathLike[str], fingerprint: str | None = None) -> Layout | None:
    """Return the shipped or cached layout of a model.

    Args:
        name: A name for `config_source`.
        fingerprint: Fingerprint that the layout must have, if any.

    Returns:
        The layout; None if it is unknown or has another fingerprint.
    """
    text = os.fspath(name)
    file = shipped_layout_file(text) if text in (EMBEDDED, *known_configurations()) else layout_file(text)
    layout = None if file is None else _read_layout(file)
    return layout if layout and fingerprint in (None, layout.fingerprint) else None


def keep_layout(name: str | os.PathLike[str], layout: Layout) -> None:
    """Store a layout in the user's cache, so that it is found without PyTorch next time.

    Args:
        name: A name for `config_source`. If its configuration file is not on this machine, nothing is stored.
        layout: The layout.
    """
    file = layout_file(name)
    if file is not None:
        with suppress(OSError, ApportionError):  # a cache that is full, read-only or missing is ignored
            write_layout(layout, file)


def write_layout(layout: Layout, path: Path) -> None:
    """Write a layout as compressed JSON. Equal layouts give equal bytes.

    Args:
        layout: The layout.
        path: Output file.
    """
    text = json.dumps(layout.as_dict(), separators=(",", ":"))
    with whole_file(path) as temporary:
        temporary.write_bytes(gzip.compress(text.encode(), mtime=0))


def shipped_layout_file(name: str) -> Path:
    """Return the path of a shipped layout."""
    return _LAYOUTS / f"{name}{_SUFFIX}"


def _read_layout(path: Path) -> Layout | None:
    """Read a layout; return None if the file is missing or damaged."""
    try:
        with gzip.open(path) as opened:
            text = opened.read(_MAX_LAYOUT_BYTES)
        return Layout.from_dict(parse_record(text))
    except (OSError, EOFError, ValueError, zlib.error):
        return None


def layout_file(name: str | os.PathLike[str]) -> Path | None:
    """Return the cache file of a configuration's layout, keyed by its contents and the versions of the libraries.

    Args:
        name: A name for `config_source`.

    Returns:
        The file; None if the configuration is not on this machine.
    """
    config = _config_file(os.fspath(name))
    if config is None:
        return None
    try:
        text = config.read_bytes()
    except OSError:
        return None
    versions = f"{__version__}|{version('transformers')}|{version('torch')}|"
    key = hashlib.sha256(versions.encode() + text).hexdigest()
    folder = os.environ.get(CACHE_VARIABLE)
    return (Path(folder) if folder else user_cache_path("apportion")) / "layouts" / f"{key}{_SUFFIX}"


def _config_file(name: str) -> Path | None:
    """Return the local configuration file of a folder, a file or a downloaded hub id."""
    path = Path(config_source(name))
    if path.is_dir():
        return path / "config.json"
    if path.is_file():
        return path
    with suppress(HFValidationError, OSError):
        cached = try_to_load_from_cache(name, "config.json")
        return Path(cached) if isinstance(cached, str) else None
    return None
