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


def test_defaults_and_values() -> None:
    assert make("dpo") == DPO(beta=0.1)
    assert make("dpo", ("beta=5e-2",)) == DPO(beta=0.05)


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
