"""Ask once whether the Hugging Face hub answers, instead of letting libraries retry for half a minute."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils._http import get_session
from huggingface_hub.utils._validators import validate_repo_id

_TIMEOUT_S = 5.0


def is_hub_id(name: str) -> bool:
    """Return whether a name can be a hub id."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_downloaded(name: str, kind: Literal["model", "dataset"]) -> bool:
    """Return whether files of a model or a data set are in the hub's cache on this machine."""
    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type=kind)).is_dir()


@cache
def reason_without_hub() -> str | None:
    """Return why the hub cannot be asked; None if it answers. The answer is remembered while the process lives."""
    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT_S)
    except Exception as error:  # noqa: BLE001 - the client's own errors differ between its versions
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return None
