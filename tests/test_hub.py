"""Names that do not exist are refused at once: nothing asks the network for them, and nothing asks it twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import apportion
from apportion import hub
from apportion.data.sources import read_rows
from apportion.errors import ConfigurationError, DataError, ModelLoadError
from apportion.loading import load_model


class _Session:
    """Counts how often the hub is asked."""

    def __init__(self, problem: Exception | None) -> None:
        self.asked = 0
        self.problem = problem

    def head(self, url: str, timeout: float) -> None:
        self.asked += 1
        if self.problem:
            raise self.problem


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Session]:
    session = _Session(ConnectionError("no route to host"))
    monkeypatch.setattr(hub, "get_session", lambda: session)
    hub.reason_without_hub.cache_clear()
    yield session
    hub.reason_without_hub.cache_clear()


@pytest.mark.parametrize("name", ["olmoe-1b7b", "OLMoE-1B-7B", "embeddd", "mixtral-8x7"])
def test_a_near_name_is_suggested_before_any_network_is_asked(unreachable: _Session, name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"did you mean (olmoe-1b-7b|embedded|mixtral-8x7b)"):
        apportion.cost(name)
    assert unreachable.asked == 0


def test_a_misspelt_embedded_model_is_not_loaded_from_the_hub(unreachable: _Session) -> None:
    with pytest.raises(ModelLoadError, match="did you mean embedded"):
        load_model("embeddd")
    assert unreachable.asked == 0


def test_without_a_network_a_hub_id_gets_one_error(unreachable: _Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the library was asked")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", fail)
    monkeypatch.setattr("datasets.load_dataset", fail)
    for name in ("some/model", "gpt-oss"):
        with pytest.raises(ModelLoadError, match=r"(?s)the hub does not answer.*no route to host"):
            load_model(name)
    with pytest.raises(ConfigurationError, match=r"(?s)the hub does not answer.*no route to host"):
        apportion.cost("some/model")
    with pytest.raises(DataError, match="no route to host"):
        read_rows("some/rows")
    assert unreachable.asked == 1


def test_what_is_neither_a_path_nor_a_hub_id_is_refused(unreachable: _Session) -> None:
    for name in ("./nothing", "a/b/c", "x y"):
        with pytest.raises(ModelLoadError, match="there is no model"):
            load_model(name)
    with pytest.raises(DataError, match="no id of a data set"):
        read_rows("a/b/c")
    with pytest.raises(DataError, match=r"did you mean task:aiw\?"):
        read_rows("tsk:aiw")
    assert unreachable.asked == 0


def test_a_downloaded_model_is_read_without_the_network(
    unreachable: _Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    (tmp_path / "models--some--model").mkdir()
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))

    def fail(*_: Any, **options: Any) -> None:
        asked.update(options)
        raise OSError("no such file")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", fail)
    with pytest.raises(ModelLoadError, match="no such file"):
        load_model("some/model")
    assert asked["local_files_only"] is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 5000 + "]" * 5000, "nested"),
        ('{"model_type": "olmoe", "num_hidden_layers": 2147483648}', "num_hidden_layers is 2147483648"),
        ('{"model_type": "olmoe", "num_experts": 1000000}', "num_experts is 1000000"),
        ('{"model_type": "olmoe", "hidden_size": "x"}', "hidden_size"),
        ('{"model_type": "olmoe", "rope_parameters": {"rope_type": "dfault"}}', "dfault"),
    ],
)
def test_an_impossible_configuration_is_refused_at_once(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        apportion.cost(tmp_path)
