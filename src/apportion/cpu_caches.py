"""Room for the products that PyTorch prepares on a CPU: read from the environment when it starts."""

from __future__ import annotations

# oneDNN's own cache and the one that PyTorch keeps before it; 1,024 shapes each where they are not set. In bfloat16
# batches of ever new lengths bring more, and what was forgotten is prepared again.
CPU_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "65536", "LRU_CACHE_CAPACITY": "65536"}
