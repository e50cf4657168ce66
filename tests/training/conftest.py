"""A tiny model to train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.model.tiny import write_model

torch.set_num_threads(1)  # tiny tensors: a second thread only waits for a core


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny") / "model")
