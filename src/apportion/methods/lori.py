"""LoRI: a frozen A and a sparse B, on the sites of LoRA or HELLoRA."""

from __future__ import annotations

from apportion.methods.base import Method
from apportion.methods.hellora import place_hellora
from apportion.methods.lora import place_lora
from apportion.records.options import HelloriOptions, LoriOptions

LORI = Method(
    name="lori",
    summary="lora with a frozen A and a sparse B (10 % trained)",
    source="LoRI, arXiv:2504.07448",
    options=LoriOptions,
    place=place_lora,
)
HELLORI = Method(
    name="hellori",
    summary="hellora with a frozen A and a sparse B (10 % trained)",
    source="HELLoRA, arXiv:2605.18795, and LoRI, arXiv:2504.07448",
    options=HelloriOptions,
    place=place_hellora,
)
