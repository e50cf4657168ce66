"""name=value hyper-parameters, and what is said about a bad one."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest

import bnfctl.losses
from bnfctl import tables
from bnfctl.errors import UsageError
from bnfctl.losses import make
from bnfctl.losses.dpo import DPO
from bnfctl.losses.margin import SLiCHF


def test_defaults_and_values() -> None:
    assert make("dpo") == DPO(beta=0.1)
    assert make("dpo", ("beta=5e-2",)) == DPO(beta=0.05)
    assert make("slic-hf", ("lambda=10", "delta=0")) == SLiCHF(delta=0, lambda_=10)


@pytest.mark.parametrize("name", sorted(tables.LOSSES))
def test_every_loss_is_a_frozen_dataclass(name: str) -> None:
    loss = make(name)
    assert dataclasses.is_dataclass(loss)
    assert hash(loss) == hash(make(name))
    assert set(loss.labels) <= {1, -1}


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("dpoo", (), "did you mean 'dpo'"),
        ("dpo", ("betta=0.1",), "did you mean 'beta'"),
        ("bnf", ("beta=0.1",), "no parameter 'beta'"),
        ("dpo", ("beta=high",), "beta is of type float, not 'high'"),
        ("dpo", ("beta=0",), "above 0"),
        ("dpo", ("beta=nan",), "above 0"),
        ("dpo", ("beta",), "name=value"),
        ("dpo", ("beta=1", "beta=2"), "twice"),
        ("sft", ("normalize=tokens",), "token or response"),
        ("nll-pll", ("normalize=token",), "response or none"),
        ("ipo", ("normalize=response",), "token or none"),
        ("ipo", ("tau=0",), "tau is a finite number above 0, not 0.0"),
        ("orpo", ("lambda=-1",), "lambda is a finite number above 0, not -1.0"),
        ("orpo", ("lambda_=1",), "did you mean 'lambda'"),
        ("slic-hf", ("lambda=-0.1",), "lambda is a finite number of at least 0"),
        ("slic-hf", ("delta=inf",), "delta is a finite number of at least 0, not inf"),
        ("simpo", ("beta=0",), "beta is a finite number above 0"),
        ("simpo", ("gamma=nan",), "gamma is a finite number of at least 0, not nan"),
        ("r-dpo", ("alpha=-1",), "alpha is a finite number of at least 0"),
        ("r-dpo", ("beta=inf",), "beta is a finite number above 0, not inf"),
        ("kto", ("desirable_weight=0",), "desirable_weight is a finite number above 0"),
        ("kto", ("undesirable_weight=nan",), "undesirable_weight is a finite number above 0, not nan"),
    ],
)
def test_bad_hyper_parameters(name: str, args: tuple[str, ...], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make(name, args)


def test_a_family_imports_torch_and_the_loss_types_only() -> None:
    for file in sorted(Path(bnfctl.losses.__file__).parent.glob("*.py")):
        if file.name == "__init__.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                allowed = ("torch", "bnfctl.losses", "dataclasses", "typing", "__future__")
                assert name == "bnfctl.losses" or name.split(".")[0] in allowed, f"{file.name} imports {name}"
