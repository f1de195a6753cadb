"""Find a model by name and read its configuration. What cannot be found is refused before a network is asked."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from apportion.errors import ApportionError, ConfigurationError, shortened
from apportion.hub import is_downloaded, is_hub_id, reason_without_hub
from apportion.models.auto import needs_remote_code, remote_code_refusal
from apportion.records.json_file import read_json
from apportion.records.names import nearest

_MAX_LAYERS, _MAX_EXPERTS = 2_000, 20_000  # more than any known model; building more takes minutes
_SHOWN_CHARS = 300


def find_model(name: str, known: Iterable[str], kind: type[ApportionError]) -> dict[str, Any]:
    """Check that a model can be found.

    Args:
        name: A path or a hub id.
        known: Names of models that ship with the package.
        kind: Class of the error to raise.

    Returns:
        Options for `from_pretrained`: use only local files if the hub does not answer.

    Raises:
        ApportionError: of the given class, if there is no such path, a known name is near, or the hub does not answer
            and the model was never downloaded.
    """
    if Path(name).exists():
        return {}
    downloaded = is_hub_id(name) and is_downloaded(name, "model")
    near = None if downloaded or "/" in name else nearest(name, known)
    if near:
        raise kind(f"there is no model {name!r}.", fix=f"did you mean {near}?")
    if not is_hub_id(name):
        raise kind(f"there is no model {shortened(name)!r}.", fix="give a folder or file that exists, or a hub id")
    reason = reason_without_hub()
    if reason and not downloaded:
        raise kind(
            f"the model {name!r} cannot be found: it is not on this machine, and the hub does not answer.",
            found=reason,
            fix="give a name that ships with the package, a folder, or a hub id with a connection to the hub",
        )
    return {"local_files_only": True} if reason else {}


def read_config(source: str, kind: type[ApportionError], **options: Any) -> PreTrainedConfig:
    """Read a configuration, and check that a model of it can be built in reasonable time.

    Args:
        source: A folder, a ``config.json``, or a hub id.
        kind: Class of the error to raise.
        **options: As `transformers.AutoConfig.from_pretrained` takes them.

    Returns:
        The configuration.

    Raises:
        ApportionError: of the given class, if the configuration cannot be read, is impossible, or needs remote code
            that is not trusted.
    """

    def refusal(found: str) -> ApportionError:
        return kind(
            f"the configuration {source} cannot be read.",
            found=shortened(found, _SHOWN_CHARS),
            fix="give a config.json of a model type that this version of transformers supports",
        )

    path = Path(source)
    file = path / "config.json" if path.is_dir() else path
    if file.is_file() and "gguf_file" not in options:
        read_json(file, refusal)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source, **options)
        _check_sizes(config)
    except Exception as error:  # transformers raises errors of many kinds
        if isinstance(error, ImportError) and "gguf_file" in options:
            raise
        if needs_remote_code(error):
            raise remote_code_refusal(kind, source) from error
        raise refusal(first_line(error)) from error
    return config


def first_line(error: Exception) -> str:
    """Return the first line of an error, without the advice that other libraries append."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _check_sizes(config: PreTrainedConfig) -> None:
    """Refuse numbers of layers and experts that no model has."""
    for name, value in config.to_dict().items():
        limit = _MAX_LAYERS if "layer" in name else _MAX_EXPERTS if "expert" in name else None
        if limit is not None and isinstance(value, int) and value > limit:
            raise ConfigurationError(f"{name} is {shortened(str(value))}, more than any model has")
