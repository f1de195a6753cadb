"""Silence progress bars and warnings of other libraries."""

from __future__ import annotations

import os
import warnings

import datasets
import transformers

from apportion.errors import ApportionWarning


def quiet() -> None:
    """Silence progress bars and warnings of transformers and datasets. Apportion's own stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("always", category=ApportionWarning)
