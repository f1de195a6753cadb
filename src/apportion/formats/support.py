"""What each engine applies of an adapter, as data, and the refusals that follow from it.

No engine says that it leaves a part of an adapter out. So a part is written for an engine only if a table says that
this engine, in the version named, applies it for this architecture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from apportion.errors import ConfigurationError
from apportion.formats.factors import SavedAdapter
from apportion.records.placement import Placement
from apportion.records.site import Kind

_MERGE_ALL = "merge the whole adapter into the model (apportion merge)"
_MERGE_ROUTER = "add the routers' part to a copy of the base model (--router merge)"

_EXPERTS: tuple[Kind, ...] = ("attention", "experts")
_ALL: tuple[Kind, ...] = ("attention", "router", "experts")
_DENSE: tuple[Kind, ...] = ("attention", "dense")


@dataclass(frozen=True)
class Engine:
    """What an engine applies.

    Args:
        name: The engine's name.
        version: The version that the table was checked on.
        checked: How it was checked.
        applies: The kinds of site that it applies, by the model's type.
        reasons: Why it does not apply a kind: by kind, then by the model's type, or ``*`` for all others.
    """

    name: str
    version: str
    checked: str
    applies: Mapping[str, tuple[Kind, ...]]
    reasons: Mapping[Kind, Mapping[str, str]] = field(default_factory=dict)

    def why_not(self, kind: Kind, model_type: str) -> str:
        """Explain why a kind of site is not applied."""
        reasons = self.reasons.get(kind, {})
        return reasons.get(model_type) or reasons.get("*") or f"not checked with {self.name} {self.version}"


_PLAIN_GATE = "its code keeps the router's plain layer in the expert runner and never calls the one with the adapter"
_PLAIN_PRODUCT = "its graph multiplies with these matrices directly, without looking for an adapter"

LLAMA_CPP = Engine(
    "llama.cpp",
    "b11549",
    "run on tiny models of every architecture in the table",
    {
        "olmoe": _ALL, "mixtral": _ALL, "qwen3_moe": _ALL, "gpt_oss": _ALL,
        "deepseek_v2": ("router", "experts", "shared", "dense"),
        "deepseek_v3": ("router", "experts", "shared", "dense"),
        "llama": _DENSE, "mistral": _DENSE, "qwen2": _DENSE, "qwen3": _DENSE,
    },
    {"attention": dict.fromkeys(("deepseek_v2", "deepseek_v3"), _PLAIN_PRODUCT)},
)  # fmt: skip

VLLM = Engine(
    "vLLM",
    "0.32.0",
    "run on tiny models, on a CPU, with its expert kernel replaced by the same products in PyTorch",
    {
        "olmoe": _ALL, "mixtral": _ALL, "gpt_oss": _ALL, "qwen3_moe": _EXPERTS,
        "llama": _DENSE, "mistral": _DENSE, "qwen2": _DENSE, "qwen3": _DENSE,
    },
    {"router": {"qwen3_moe": _PLAIN_GATE}},
)  # fmt: skip

SGLANG = Engine(
    "SGLang",
    "0.5.23",
    "its loader's code was read; nothing was run",
    {
        "olmoe": _EXPERTS, "mixtral": _EXPERTS, "qwen3_moe": _EXPERTS,
        "deepseek_v2": ("experts", "dense"), "deepseek_v3": ("experts", "dense"),
    },
    {"router": {"*": "it has no adapters for routers and does not start with one"}},
)  # fmt: skip


def check_applied(engine: Engine, adapter: SavedAdapter) -> None:
    """Refuse an adapter of which an engine would apply only a part.

    Args:
        engine: The engine.
        adapter: The adapter.

    Raises:
        ConfigurationError: the adapter has routed LoRA experts, its architecture is not in the table, or it has sites
            of a kind that the engine does not apply.
    """
    model_type = adapter.layout.model_type
    check_foldable(adapter.placements)
    if model_type not in engine.applies:
        raise ConfigurationError(
            f"adapters of {model_type} are not written for {engine.name}: whether it applies them was not checked.",
            details={"checked": ", ".join(engine.applies)},
            fix=_MERGE_ALL,
        )
    for placement in adapter.placements:
        kind = adapter.layout.by_name[placement.site].kind
        if kind not in engine.applies[model_type]:
            raise ConfigurationError(
                f"{engine.name} would not apply the adapter at {placement.site}.",
                details={"reason": engine.why_not(kind, model_type), "checked": f"{engine.name} {engine.version}"},
                fix=", or ".join(_ways_out(kind, engine.applies[model_type])),
            )


def check_foldable(placements: Iterable[Placement]) -> None:
    """Refuse routed LoRA experts, which are no product of two matrices.

    Args:
        placements: An adapter's placements.

    Raises:
        ConfigurationError: a placement depends on the input.
    """
    for placement in placements:
        if placement.is_routed:
            raise ConfigurationError(
                f"{placement.site} has several LoRA experts, chosen per token, which no other software applies.",
                fix="serve the model with apportion attached, or plan with one LoRA expert per matrix",
            )


def _ways_out(kind: Kind, applied: tuple[Kind, ...]) -> list[str]:
    """List what the user can do about sites that an engine does not apply."""
    ways = [_MERGE_ROUTER] if kind == "router" else []
    return [*ways, _MERGE_ALL, f"plan with targets {','.join(applied)}"]
