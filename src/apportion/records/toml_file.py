"""Read TOML from untrusted files, with the limits of `json_file`."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from apportion.records.json_file import JsonError, check_depth

MAX_TOML_BYTES = 1 << 20  # study files have a few hundred


def read_toml(path: Path, refusal: Callable[[str], Exception]) -> dict[str, Any]:
    """Read a TOML file in UTF-8, with or without a byte order mark.

    Args:
        path: The file.
        refusal: Makes the error to raise from a description of the problem.

    Returns:
        The file's contents.

    Raises:
        Exception: made by `refusal` if the file cannot be read, is too large or nested too deeply, or is not TOML.
    """
    try:
        if path.stat().st_size > MAX_TOML_BYTES:
            raise JsonError(f"the file has more than {MAX_TOML_BYTES:,} bytes")
        data = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
        check_depth(data)
    except OSError as error:
        raise refusal(error.strerror or str(error)) from error
    except RecursionError as error:
        raise refusal("tables and lists are nested too deep") from error
    except ValueError as error:
        raise refusal(str(error)) from error
    return data
