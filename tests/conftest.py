"""Small models and data that every test may use."""

from __future__ import annotations

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["COLUMNS"] = "160"
os.environ["APPORTION_CACHE"] = os.path.join(tempfile.mkdtemp(), "cache")

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from apportion.loading import embedded
from apportion.profiling.run import profile as measure
from apportion.records.profile import Profile
from tiny_models import TINY, build_tiny

collect_ignore = ["serve_check/vllm_engine.py"]  # imports vLLM, in an environment of its own

settings.register_profile("untimed", deadline=None)  # other work on the machine must not fail a test
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Start every test from the same random numbers, on two threads at most."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    return


@pytest.fixture
def tiny_model() -> nn.Module:
    """A random OLMoE: 2 layers of 8 experts, 2 of them a token."""
    return build_tiny("olmoe")


@pytest.fixture(params=sorted(TINY))
def any_model(request: pytest.FixtureRequest) -> nn.Module:
    """Each small Mixture-of-Experts model in turn."""
    return build_tiny(request.param)


@pytest.fixture
def tokens() -> Tensor:
    """Six sequences of sixteen tokens."""
    return torch.randint(3, 64, (6, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def profile_of(tokens: Tensor) -> Callable[[nn.Module], Profile]:
    """Profile a small model on the tokens."""
    return lambda model: measure(model, [{"input_ids": tokens}])


@pytest.fixture(scope="session")
def embedded_model() -> tuple[nn.Module, object]:
    """The embedded model, loaded once; tests that train copy it."""
    return embedded()
