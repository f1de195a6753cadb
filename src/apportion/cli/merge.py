"""`apportion merge`."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from apportion.cli.base import base_of
from apportion.cli.quiet import quiet
from apportion.loading import load_model
from apportion.peft.load import check_mergeable, load, read_adapter_plan
from apportion.records.outputs import check_output_folder


def run(
    console: Console, *, adapter: Path, output: Path, model: str | None, dtype: str | None, trust_remote_code: bool
) -> dict[str, Any]:
    """Merge and save; the output folder appears whole."""
    quiet()
    name = base_of(adapter, model)
    check_output_folder(output, inputs=(adapter, name), renamed=True)
    check_mergeable(read_adapter_plan(adapter), adapter)
    loaded, tokenizer = load_model(name, dtype, trust_remote_code=trust_remote_code)
    merged = load(loaded, adapter).merge_and_unload(safe_merge=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        merged.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)
        if output.exists():
            output.rmdir()
        temporary.replace(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    console.print(f"{adapter} merged into {name} -> {output}")
    return {"model": str(output), "base": name}
