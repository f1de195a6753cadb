"""LoRI: a frozen A and a sparse B; on LoRA's sites, or on HELLoRA's."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from apportion.methods.base import Method, MethodOptions
from apportion.methods.hellora import place_hellora
from apportion.methods.hot import HotOptions
from apportion.methods.lora import place_lora

SPARSITY = 0.9


class LoriOptions(MethodOptions):
    """Options of `lori`: those of `lora`, with a B that is sparse by default."""

    sparsity: Annotated[float, Field(ge=0, lt=1)] = SPARSITY


class HelloriOptions(HotOptions):
    """Options of `hellori`: those of `hellora`, with a B that is sparse by default."""

    sparsity: Annotated[float, Field(ge=0, lt=1)] = SPARSITY


LORI = Method(
    name="lori",
    summary="as lora, with a frozen A and a B of which 10 % is trained",
    source="LoRI, arXiv:2504.07448",
    options=LoriOptions,
    place=place_lora,
)
HELLORI = Method(
    name="hellori",
    summary="as hellora, with a frozen A and a B of which 10 % is trained",
    source="HELLoRA, arXiv:2605.18795, and LoRI, arXiv:2504.07448",
    options=HelloriOptions,
    place=place_hellora,
)
