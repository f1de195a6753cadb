"""A training run and its folder: the run's identity, and the checkpoint to resume from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from apportion.data.sources import Row
from apportion.errors import ConfigurationError
from apportion.records.files import seal, write_text
from apportion.records.json_file import read_json
from apportion.records.mask import Mask
from apportion.records.outputs import require_empty
from apportion.records.plan import Plan
from apportion.training.checkpoints import CHECKPOINTS, last_checkpoint, remove_unfinished
from apportion.training.settings import TrainSettings

RUN_FILE = "run.json"
_EARLIER_PLAN = "plan_schema_1"


@dataclass(frozen=True)
class Run:
    """A training run: plan, data, folder and settings.

    Args:
        tokenizer: The model's tokenizer.
        plan: The plan.
        rows: Training rows.
        folder: Folder for the adapter, the checkpoints and the run's files.
        settings: Settings of the run.
        mask: For a sparse plan, the entries to train, if given.
        resume: Resume the run in the folder; start anew if the folder is empty.
        progress: Show a progress bar on standard error.
        facts: Facts to record in the folder: ``model``, ``dtype``, ``data``, ``on_top_of``.
    """

    tokenizer: PreTrainedTokenizerBase
    plan: Plan
    rows: Sequence[Row]
    folder: Path
    settings: TrainSettings
    mask: Mask | None = None
    resume: bool = False
    progress: bool = True
    facts: dict[str, Any] | None = None

    @property
    def on_top_of(self) -> dict[str, str] | None:
        """The adapter that was merged into the base model, as `merge_below` returns it."""
        below: dict[str, str] | None = (self.facts or {}).get("on_top_of")
        return below

    def identity(self) -> dict[str, Any]:
        """Return digests of what must be equal to resume the run: everything except `save_every`."""
        shared = {name: value for name, value in self.settings.resolved().items() if name != "save_every"}
        base = {name: (self.facts or {}).get(name) for name in ("model", "dtype", "on_top_of")}
        return {
            "plan": self.plan.seal,
            _EARLIER_PLAN: self.plan.known_seals[1],
            "rows": seal({"rows": list(self.rows)}),
            "settings": seal(shared),
            "model": seal(base),
            "mask": None if self.mask is None else self.mask.digest,
        }

    def write(self, identity: dict[str, Any]) -> None:
        """Write the run's identity, settings and facts to its folder.

        Args:
            identity: As `identity` returns it, for this run or for the run that it is a phase of.
        """
        facts = {"identity": identity, "settings": self.settings.as_dict(), **(self.facts or {})}
        write_text(self.folder / RUN_FILE, json.dumps(facts, indent=1) + "\n")


def open_run(folder: Path, identity: dict[str, Any], *, resume: bool) -> Path | None:
    """Check a run's folder, and find the checkpoint to resume from.

    Args:
        folder: The folder.
        identity: As `Run.identity` returns it.
        resume: Whether to resume a run in the folder.

    Returns:
        The checkpoint, or None to start from the beginning.

    Raises:
        ConfigurationError: the run in the folder was started with another plan, data or settings.
        OutputExistsError: the folder is not empty and `resume` is False.
        TrainingError: the newest checkpoint was changed since it was written.
    """
    if not resume:
        require_empty(folder)
        return None
    run_file = folder / RUN_FILE
    if not run_file.is_file():
        require_empty(folder)
        return None
    before = _read_identity(run_file)
    accepted: dict[str, tuple[Any, ...]] = {name: (value,) for name, value in identity.items() if name != _EARLIER_PLAN}
    accepted["plan"] += (identity.get(_EARLIER_PLAN),)  # in case an earlier version started the run
    changed = [name for name, values in accepted.items() if before.get(name) not in values]
    if changed:
        raise ConfigurationError(
            f"the run in {folder} cannot be resumed: it was started with other {' and '.join(changed)}.",
            fix="resume with the same plan, data and settings, or choose another output folder",
        )
    checkpoint = last_checkpoint(folder / CHECKPOINTS)
    if checkpoint is None and _EARLIER_PLAN not in before and (folder / CHECKPOINTS).is_dir():
        raise ConfigurationError(
            f"the run in {folder} was started by an earlier version, whose checkpoints cannot be checked.",
            fix="resume with that version, or train into another folder",
        )
    remove_unfinished(folder / CHECKPOINTS, checkpoint)
    return checkpoint


def _read_identity(run_file: Path) -> dict[str, Any]:
    """Read a run's identity from its file."""

    def damaged(found: str) -> ConfigurationError:
        return ConfigurationError(
            f"{run_file} is damaged, so the run cannot be resumed.",
            found=found,
            fix="restore the file, or train into another folder",
        )

    identity = read_json(run_file, damaged).get("identity")
    if not isinstance(identity, dict):
        raise damaged("it has no field 'identity'")
    return identity
