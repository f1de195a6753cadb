"""The adapter's configuration: PEFT's LoRA configuration with the plan inside."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig
from peft.utils import PeftType

from apportion.errors import ConfigurationError
from apportion.peft.state import Stores
from apportion.records.mask import Mask
from apportion.records.placement import Placement
from apportion.records.plan import Plan
from apportion.records.site import Storage

PEFT_TYPE = "APPORTION"


@dataclass
class ApportionConfig(LoraConfig):
    """What stands in ``adapter_config.json``.

    Args:
        plan: The whole plan as `Plan.as_dict` gives it: it alone says which sites are adapted.
        init_seed: Seed of the factors' random start.
        dense_b: Whether sparse placements train all of B for now, to find out which entries to keep.
        store_a: Whether checkpoints hold a frozen A; otherwise it is drawn again from the seed.
        a_checksum: SHA-256 of the frozen A that the adapter was trained with.
        tensor_digests: Hashes of the adapter's tensors, as `apportion.peft.state.digests` gives them.
        on_top_of: The adapter that had been merged into the base before this one was trained: ``path`` and ``sha256``.
    """

    plan: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "The plan, as apportion writes it to plan.json"}
    )
    init_seed: int = field(default=0, metadata={"help": "Seed of the factors' random start"})

    dense_b: bool = field(default=False, metadata={"help": "Whether sparse placements train all of B"})
    store_a: bool = field(default=False, metadata={"help": "Whether checkpoints hold a frozen A"})
    a_checksum: str | None = field(default=None, metadata={"help": "SHA-256 of the frozen A"})
    tensor_digests: str | None = field(default=None, metadata={"help": "Hashes of the adapter's tensors"})
    on_top_of: dict[str, str] | None = field(default=None, metadata={"help": "An adapter merged into the base before"})

    def __post_init__(self) -> None:
        """Set the type, and refuse LoRA variants that would be attached to some of the planned sites alone."""
        super().__post_init__()
        self.peft_type = PeftType(PEFT_TYPE)
        self.planned_modules: dict[str, list[Placement]] = {}  # these three are filled when the adapter is attached
        self.storage: dict[str, Storage] = {}
        self.routed_linear_sites: tuple[str, ...] = ()
        self.promised_digests, self.tensor_digests = self.tensor_digests, None  # read from a file; to be written
        self.mask: Mask | None = None  # the kept entries; a checkpoint brings its own
        for name in (
            "use_dora",
            "use_rslora",
            "lora_bias",
            "target_parameters",
            "modules_to_save",
            "layers_to_transform",
        ):
            if getattr(self, name, None):
                raise ConfigurationError(
                    f"{name} cannot be combined with a plan.\n  fix:  leave it out of the adapter's configuration"
                )

    @property
    def stores(self) -> Stores:
        """What the adapter's checkpoints hold of sparse factors."""
        return Stores(frozen_a=self.store_a, dense_b=self.dense_b)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``.

        Args:
            save_directory: The adapter's folder.
            **kwargs: As PEFT takes them.
        """
        super().save_pretrained(save_directory, **kwargs)
        self.tensor_digests = None  # of what was saved; the tensors may change now

    def read_plan(self) -> Plan:
        """Give the plan as an object.

        Returns:
            The plan.

        Raises:
            PlanError: it was changed after it was written.
        """
        return Plan.from_dict(self.plan)
