"""Ask once whether the Hugging Face hub answers, instead of letting libraries retry for half a minute."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

from huggingface_hub import constants, get_session, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

_TIMEOUT_S = 5.0


def is_hub_id(name: str) -> bool:
    """Return whether a name can be a hub id."""
    try:
        try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return False
    return True


def is_downloaded(name: str, kind: Literal["model", "dataset"]) -> bool:
    """Return whether files of a model or a data set are in the hub's cache on this machine."""
    return Path(constants.HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}").is_dir()


@cache
def reason_without_hub() -> str | None:
    """Return why the hub cannot be asked; None if it answers. The answer is remembered while the process lives."""
    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT_S)
    except Exception as error:  # noqa: BLE001 - the client's own errors differ between its versions
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return None
