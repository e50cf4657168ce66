"""A tiny ArmoRM for the files that test it; other files have a `folder` and a `scorer` of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bnfctl.scorers.armorm import ArmoRMScorer
from tests.scorers.armorm_cases import alone, config
from tests.scorers.armorm_twin import Twin, write_checkpoint


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("armorm") / "model")


@pytest.fixture(scope="session")
def scorer(folder: Path) -> ArmoRMScorer:
    return ArmoRMScorer(config(), folder)


@pytest.fixture(scope="session")
def twin(folder: Path) -> Twin:
    return Twin(folder)


@pytest.fixture(scope="session")
def exact(twin: Twin) -> torch.Tensor:
    """[N, 39] of all candidates of GROUPS, by the twin."""
    return alone(twin)
