"""The protocol of procedures: hooks into the training of one phase, and the phases of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from apportion.errors import ConfigurationError, PlanError
from apportion.peft.attach import PhaseOptions
from apportion.records.mask import Mask
from apportion.records.options import Options
from apportion.records.plan import Plan
from apportion.training.result import TrainResult
from apportion.training.runs import Run


@dataclass(frozen=True)
class BornGroup:
    """Parameters that start to train during a run, with a learning rate schedule of their own.

    The schedule has as many warm-up steps as the run's, starts at `birth` and ends with the run. Peak and weight decay
    are the run's.

    Args:
        parameters: The parameters; they must not be in the optimizer yet, so they are frozen until then.
        birth: Number of optimizer steps done before they start to train.
    """

    parameters: tuple[nn.Parameter, ...]
    birth: int


class TrainingHooks:
    """What is done beside the trainer's own work. Every hook does nothing unless a subclass overrides it.

    On every process, the hooks are called in this order: `attach`; on resuming, `restore`; for every batch,
    `before_forward` and `penalty`; for every optimizer step, `before_step`, `after_step` and `groups`; for every
    checkpoint, `state` and `plan_now`; after the last step, `finish`; in any case, `detach`.
    """

    def attach(self, model: PeftModel, adapter_name: str, *, num_steps: int, seed: int) -> None:
        """Prepare for training. The weights are loaded, and the optimizer does not exist yet.

        Parameters that do not require a gradient afterwards are not in the optimizer.

        Args:
            model: The model with the adapter.
            adapter_name: The adapter.
            num_steps: Optimizer steps of the phase.
            seed: The run's seed, for random draws.
        """

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a checkpoint.

        Args:
            state: What `state` returned when the checkpoint was written.
        """

    def before_forward(self, inputs: Mapping[str, Any]) -> None:
        """Prepare for a forward pass in training.

        Args:
            inputs: The batch, as the model gets it.
        """

    def penalty(self) -> Tensor | None:
        """Return what is added to the loss of the batch, after its forward pass.

        Returns:
            A scalar, or None. Its weight does not depend on the number of accumulated batches.
        """
        return None

    def before_step(self, step: int, optimizer: Optimizer) -> None:
        """Act before the optimizer's step: gradients are averaged and clipped.

        Args:
            step: Number of optimizer steps done.
            optimizer: The optimizer.
        """

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Act after the optimizer's step: weights have moved, gradients still exist, the schedule has not moved.

        Args:
            step: Number of optimizer steps done before this one.
            optimizer: The optimizer.
        """

    def groups(self) -> Sequence[BornGroup]:
        """Return all parameter groups that were born so far.

        Returns:
            The groups in order of birth. Those that are new join the optimizer.
        """
        return ()

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed run cannot compute again.

        Returns:
            Tensors by name, equal on every process.
        """
        return {}

    def plan_now(self) -> Plan | None:
        """Return the plan that describes the adapter at this point.

        Returns:
            The plan, or None if it did not change. Its `derived_from` is set by the caller.
        """
        return None

    def finish(self) -> Plan | None:
        """Bring the adapter into its final form, after the last step.

        Returns:
            Its plan, or None if it did not change. Its `derived_from` is set by the caller.
        """
        return self.plan_now()

    def detach(self) -> None:
        """Remove what `attach` added to the model. It is also called after an error, even one before `attach`."""


@dataclass(frozen=True)
class Phase:
    """One phase of a run: adapters are attached, trained and saved once.

    Args:
        run: The phase's plan, data, folder and settings.
        hooks: Hooks into its training.
        identity: What a resumed run must share with this one, as `Run.identity` returns it.
        options: Options for `apply`.
        mask: For a sparse plan, the entries of B to train.
        seed: Seed of the factors' initial values; by default that of the settings.
    """

    run: Run
    hooks: TrainingHooks
    identity: dict[str, Any]
    options: PhaseOptions
    mask: Mask | None = None
    seed: int | None = None


TrainPhase: TypeAlias = Callable[[PreTrainedModel, Phase], TrainResult]


class Procedure(TrainingHooks):
    """What happens to a plan's adapters during training. By default, one phase with this object's hooks.

    Args:
        plan: The plan that the run begins with.
        options: The procedure's options, from the plan.
    """

    option_model: ClassVar[type[Options]] = Options

    def __init__(self, plan: Plan, options: Options) -> None:
        self.plan, self.options = plan, options

    def check(self, run: Run) -> None:
        """Check that the procedure can do a run, before anything is written or changed.

        Args:
            run: The run.

        Raises:
            ConfigurationError: an option has no effect with this procedure.
            PlanError: the procedure cannot train the plan.
        """
        if self.plan.is_sparse:
            raise PlanError(
                f"the procedure {self.plan.procedure['name']!r} cannot train a sparse plan.",
                fix="plan again with lori or hellori, or with sparsity 0",
            )
        given = ["a mask"] if run.mask is not None else run.settings.sparse.given
        if given:
            raise ConfigurationError(
                f"{', '.join(given)} was given, but the plan is not sparse.",
                fix="leave it out, or plan with lori or hellori",
            )

    def train(self, model: PreTrainedModel, run: Run, train_phase: TrainPhase) -> TrainResult:
        """Train in one phase. Procedures with several phases override this.

        Args:
            model: The base model; the adapters are attached to it.
            run: The run's plan, data, folder and settings.
            train_phase: Attaches the adapters of a phase to a model, trains and saves them, or resumes the phase.

        Returns:
            The result of the last phase, or of the one that was interrupted.
        """
        return train_phase(model, Phase(run, self, run.identity(), PhaseOptions(on_top_of=run.on_top_of)))
