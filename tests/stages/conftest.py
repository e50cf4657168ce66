"""A tiny policy, a tiny reward model, and the first three stages run once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models import make_llama, make_reward_model
from tests.stages.chain import Chain, make_chain

torch.set_num_threads(1)  # tiny tensors: a second thread only waits for a core


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of its responses stop, some are cut off; its template and its tokenizer both add BOS."""
    return make_llama(tmp_path_factory.mktemp("policy") / "model", stop=2.0)


@pytest.fixture(scope="session")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reward_model(tmp_path_factory.mktemp("reward") / "model")


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory, policy: Path) -> Chain:
    return make_chain(tmp_path_factory.mktemp("chain"), policy)
