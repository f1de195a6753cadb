"""How errors lay themselves out, survive pickling and take on context."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from apportion.errors import (
    AdapterError,
    ApportionError,
    ConfigurationError,
    DataError,
    FolderInUseError,
    MissingDependencyError,
    ModelLoadError,
    OutputExistsError,
    OutputPathError,
    OutputWriteError,
    PlanError,
    PlanMismatchError,
    ProfileError,
    TrainingError,
    lay_out,
)

STANDARD: dict[type[ApportionError], type[Exception]] = {
    AdapterError: ValueError,
    ApportionError: Exception,
    ConfigurationError: ValueError,
    DataError: ValueError,
    FolderInUseError: BlockingIOError,
    MissingDependencyError: ImportError,
    ModelLoadError: OSError,
    OutputExistsError: FileExistsError,
    OutputPathError: OSError,
    OutputWriteError: OSError,
    PlanError: ValueError,
    PlanMismatchError: PlanError,
    ProfileError: ValueError,
    TrainingError: RuntimeError,
}


def _subclasses(kind: type[ApportionError]) -> Iterator[type[ApportionError]]:
    yield kind
    for subclass in kind.__subclasses__():
        if subclass.__module__.startswith("apportion."):
            yield from _subclasses(subclass)


def _full(kind: type[ApportionError]) -> ApportionError:
    """Make an error with all that it can hold."""
    if kind is MissingDependencyError:
        return MissingDependencyError("tests", package="pytest", extra="dev").at("here").adding(details={"first": "a"})
    return kind(
        "it is wrong.",
        place=Path("plan.json"),
        found=["a", "b", "c", "d", "e"],
        expected=("f", "g"),
        fix="mend it",
        details={"model": "a dense one", "differs in": ["x", "y"]},
    )


every_kind = pytest.mark.parametrize("kind", list(_subclasses(ApportionError)), ids=lambda kind: kind.__name__)


def test_only_a_first_line_is_shown_as_it_is() -> None:
    assert str(ApportionError("it is wrong.")) == "it is wrong."


def test_labels_are_aligned_on_the_longest_and_the_fix_comes_last() -> None:
    error = ConfigurationError(
        "it is wrong.",
        fix="mend it",
        found="3",
        expected="4",
        place="here",
        details={"differs in": "size", "plan": "p"},
    )
    assert str(error) == (
        "it is wrong.\n"
        "  place:       here\n"
        "  expected:    4\n"
        "  found:       3\n"
        "  differs in:  size\n"
        "  plan:        p\n"
        "  fix:         mend it"
    )


def test_a_fix_alone_stands_two_spaces_behind_its_label() -> None:
    assert str(DataError("a row has no token.", fix="leave it out")) == "a row has no token.\n  fix:  leave it out"


@pytest.mark.parametrize("value", [None, "", [], ()])
def test_what_is_empty_has_no_line(value: str | None) -> None:
    assert str(ApportionError("it is wrong.", found=value, fix="mend it")) == "it is wrong.\n  fix:  mend it"


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["a"], "a"),
        (["a", "b", "c"], "a, b, c"),
        (("a", "b", "c", "d"), "a, b, c and 1 more"),
        ([*"abcdef"], "a, b, c and 3 more"),
    ],
)
def test_of_a_list_three_are_shown_and_the_others_counted(names: list[str], shown: str) -> None:
    assert str(ApportionError("it is wrong.", found=names)) == f"it is wrong.\n  found:  {shown}"
    assert str(ApportionError("it is wrong.", details={"tensors": names})) == f"it is wrong.\n  tensors:  {shown}"


def test_a_path_is_shown_as_text() -> None:
    assert str(ApportionError("it is wrong.", place=Path("a/b"))) == f"it is wrong.\n  place:  {Path('a/b')}"


def test_further_lines_of_a_value_stand_below_its_first() -> None:
    assert lay_out("no.", {"found": "one\ntwo", "fix": "mend"}) == "no.\n  found:  one\n          two\n  fix:    mend"


def test_the_parts_of_an_error_are_attributes() -> None:
    error = _full(PlanError)
    assert (error.what, error.place, error.fix) == ("it is wrong.", Path("plan.json"), "mend it")
    assert (error.found, error.expected) == (["a", "b", "c", "d", "e"], ("f", "g"))
    assert error.details == {"model": "a dense one", "differs in": ["x", "y"]}


def test_every_error_is_tested_here() -> None:
    assert set(_subclasses(ApportionError)) == set(STANDARD)


@every_kind
def test_every_error_is_also_of_a_standard_type(kind: type[ApportionError]) -> None:
    assert issubclass(kind, STANDARD[kind])
    with pytest.raises(STANDARD[kind]) as raised:
        raise _full(kind)
    assert raised.value.args == (raised.value.what,)


@every_kind
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_error_can_be_pickled_and_copied(kind: type[ApportionError], protocol: int) -> None:
    error = _full(kind)
    error.add_note("in the run a")
    for again in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is kind
        assert (str(again), again.args, vars(again)) == (str(error), error.args, vars(error))


def test_every_error_comes_whole_through_another_process() -> None:
    errors = [_full(kind) for kind in _subclasses(ApportionError)]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        again = pool.submit(pickle.loads, pickle.dumps(errors)).result()
    assert [(type(error), str(error)) for error in again] == [(type(error), str(error)) for error in errors]


@every_kind
def test_context_is_added_to_a_copy_of_the_same_type(kind: type[ApportionError]) -> None:
    error = _full(kind)
    before = str(error)
    changed = error.within("task 'a'").at("study.toml").adding(fix="plan again", details={"kept": "all"})
    assert type(changed) is kind
    assert str(error) == before
    assert str(changed).splitlines()[0] == changed.what
    assert f"study.toml: {error.place}" in str(changed)
    assert changed.args == (f"task 'a': {error.what}",)
    assert changed.fix == f"{error.fix}, or plan again"
    assert changed.details == error.details | {"kept": "all"}


def test_an_outer_place_stands_before_the_inner_one() -> None:
    assert ApportionError("it is wrong.").at("study.toml").place == "study.toml"
    assert ApportionError("it is wrong.", place="line 3").at(Path("a.csv")).place == "a.csv: line 3"
    assert ApportionError("it is wrong.", place="line 3").at("").place == "line 3"


def test_a_way_out_is_added_where_there_was_none() -> None:
    assert str(PlanError("it is wrong.").adding(fix="plan again")) == "it is wrong.\n  fix:  plan again"


def test_a_missing_package_says_how_to_install_it() -> None:
    error = MissingDependencyError("GGUF files", package="gguf", extra="gguf")
    assert str(error) == "GGUF files need the package gguf.\n  fix:  pip install 'apportion[gguf]'"
    assert (error.purpose, error.package, error.extra) == ("GGUF files", "gguf", "gguf")
