"""Write the layouts of the embedded model and of the configurations that ship with the package.

Run it after a change of discovery or of a configuration; a test compares the files with what discovery finds.

    python recipes/ship_layouts.py
"""

from __future__ import annotations

from transformers import AutoConfig

from apportion.accounting import layout_of
from apportion.configurations import EMBEDDED, config_source, known_configurations, shipped_layout_file, write_layout

if __name__ == "__main__":
    for name in (EMBEDDED, *known_configurations()):
        layout = layout_of(AutoConfig.from_pretrained(config_source(name)))
        write_layout(layout, shipped_layout_file(name))
        print(f"{name}: {layout.describe()} -> {shipped_layout_file(name)}")
