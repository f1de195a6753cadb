"""Run exported adapters with stock PEFT and transformers alone.

python stock_peft.py OUTPUT BASE:ADAPTER ...    # writes the logits of every way to load each
"""

import sys

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM


def logits_of(base: str, adapter: str) -> dict[str, Tensor]:
    """Attach by PEFT, attach by transformers, and merge."""
    tokens = torch.randint(3, 64, (1, 24), generator=torch.Generator().manual_seed(1))
    attached = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    loaded = AutoModelForCausalLM.from_pretrained(base).eval()
    loaded.load_adapter(adapter)
    with torch.no_grad():
        logits = {"attached": attached(input_ids=tokens).logits, "loaded": loaded(input_ids=tokens).logits}
        logits["merged"] = attached.merge_and_unload()(input_ids=tokens).logits
    return {f"{adapter}:{way}": each.contiguous() for way, each in logits.items()}


if __name__ == "__main__":
    output, *pairs = sys.argv[1:]
    logits = {}
    for pair in pairs:
        logits |= logits_of(*pair.split(":"))
    assert not any(name.partition(".")[0] == "apportion" for name in sys.modules)
    save_file(logits, output)
