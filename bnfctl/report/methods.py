"""Which models are runs of one method, what a method is called, and which base it belongs to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bnfctl.artifact import Artifact
from bnfctl.config import CONFIGS
from bnfctl.hub import split_revision
from bnfctl.options import canonical, fields
from bnfctl.report.sources import BASE, Method, Run
from bnfctl.report.table import printable

DISPLAYED = {
    "sft": "SFT", "nll-pll": "NLL-PLL", "slic-hf": "SLiC-HF", "dpo": "DPO", "ipo": "IPO", "kto": "KTO",
    "r-dpo": "RDPO", "orpo": "ORPO", "simpo": "SimPO", "bnf": "BNF",
}  # fmt: skip
"""Losses by the names and in the order of the paper's table 4."""
_NOT_THE_METHOD = ("seed", "loss", "loss_arg")


@dataclass(eq=False)
class _Model:
    """A model while its evals are put together."""

    key: str
    """The train artifact's ref, or what the model's content is told by."""
    name: str
    base: str | None = None
    """Key of the base model."""
    train: Artifact | None = None
    named: str = ""
    """In the rows of its evals."""
    evals: list[Artifact] = field(default_factory=list)


def methods_of(
    trains: Sequence[Artifact], evals: Sequence[Artifact], builds: Mapping[str, Artifact], names: Mapping[str, str]
) -> Iterator[Method]:
    """Base by base: the base, the methods in the paper's order, models of files; then models without a base."""
    models = _models(trains, evals, names)
    bases = list(dict.fromkeys(model.base for model in models.values() if model.base is not None))
    loose = [model for model in models.values() if model.train is None and model.base is None]
    for key in bases:
        name = models[key].name if key in models else key
        base = [models[key]] if key in models and models[key].evals else []
        theirs = [model for model in models.values() if model.base == key]
        for model in base:
            yield _method(BASE, name, [model], builds)
        yield from _labelled([model for model in theirs if model.train is not None], name, builds)
        # With one base there is one table, and who imports other models wants them in it.
        others = loose if len(bases) == 1 else []
        for model in [*(one for one in theirs if one.train is None), *others]:
            if model.key != key:
                yield _method(model.name, name, [model], builds)
    if len(bases) != 1:
        for model in loose:
            if model.key not in bases:
                yield _method(model.name, "", [model], builds)


def _models(trains: Sequence[Artifact], evals: Sequence[Artifact], names: Mapping[str, str]) -> dict[str, _Model]:
    models: dict[str, _Model] = {}
    for train in trains:
        pinned = train.manifest.inputs["model"]
        base = models.setdefault(key_of(pinned), _Model(key_of(pinned), name_of(pinned, names)))
        mine = models.setdefault(train.ref, _Model(train.ref, names.get(train.ref, train.ref)))
        mine.train, mine.base, mine.named = train, base.key, mine.named or train.ref
    # Models that were run here first: files may hold responses of theirs.
    for artifact in sorted(evals, key=lambda one: "model" not in one.manifest.inputs):
        made_by = artifact.manifest.inputs.get("model")
        for name in artifact.manifest.summary["models"]:
            if made_by is not None and len(artifact.manifest.summary["models"]) == 1:
                key = key_of(made_by)
                model = models.setdefault(key, _Model(key, name_of(made_by, names)))
                if model.train is None:
                    model.base = model.base or _base_of(artifact, evals)
            else:
                known = next((one for one in models.values() if name in (one.key, one.named)), None)
                model = known or models.setdefault(name, _Model(name, name, _base_of(artifact, evals)))
            model.named = model.named or name
            model.evals.append(artifact)
    _tell_apart(list(models.values()))
    return models


def _tell_apart(models: Sequence[_Model]) -> None:
    """Two contents under one name (two commits of a model) get the beginning of their digest to it.

    Names of files are anybody's: none is the one that a base has in tables, or has characters that nobody sees.
    """
    counts = Counter(model.name for model in models)
    for model in models:
        if counts[model.name] > 1 and model.key != model.name:
            model.name += f" ({model.key[:8]})"
        elif model.name == BASE:
            model.name = f"the model {BASE}"
        model.name = printable(model.name)


def _base_of(artifact: Artifact, evals: Iterable[Artifact]) -> str | None:
    """The key of the model that `--base` names: of an import, or of a model whose training is not here."""
    raw = artifact.manifest.inputs.get("base")
    base = next((one for one in evals if raw is not None and one.ref == raw["ref"]), None)
    pinned = base.manifest.inputs.get("model") if base is not None else None
    return key_of(pinned) if pinned is not None else None


def key_of(pinned: Mapping[str, Any]) -> str:
    """What tells a model from others: a train artifact's ref, else its content."""
    return str(pinned["ref"] if pinned["kind"] == "artifact" else pinned["digest"] or pinned["ref"])


def name_of(pinned: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """A pinned model for people: a hub id without its commit, a folder's name, an artifact's name."""
    ref = str(pinned["ref"])
    if pinned["kind"] == "artifact":
        return names.get(ref, ref)
    if pinned["kind"] == "hub-model":
        return split_revision(ref)[0]
    return Path(ref).name if pinned["kind"] == "folder" else ref


def _labelled(models: Sequence[_Model], base: str, builds: Mapping[str, Artifact]) -> Iterator[Method]:
    """Trained models of one base: those that differ in their seed only are one method."""
    groups: dict[bytes, list[_Model]] = {}
    for model in models:
        groups.setdefault(canonical([settings(model.train), _data(model).get("digest")]), []).append(model)
    plain: dict[str, list[list[_Model]]] = {}
    for group in groups.values():
        plain.setdefault(_plain_label(group[0]), []).append(group)
    order = list(DISPLAYED.values())
    for label in sorted(plain, key=lambda one: (order.index(one.split()[0]) if one.split()[0] in order else -1, one)):
        same = plain[label]
        suffixes = _suffixes([group[0] for group in same], builds) if len(same) > 1 else [""]
        for group, suffix in zip(same, suffixes, strict=True):
            yield _method(label + suffix, base, sorted(group, key=_seed), builds)


def _seed(model: _Model) -> tuple[int, str]:
    return (model.train.manifest.config["seed"] if model.train else -1, model.key)


def _plain_label(model: _Model) -> str:
    assert model.train is not None
    config = model.train.manifest.config
    return " ".join([DISPLAYED.get(config["loss"], config["loss"]), *sorted(config["loss_arg"])])


def settings(artifact: Artifact | None) -> dict[str, Any]:
    """The fields of its config that make a method: those in the key, but for inputs, seed and how often it reports."""
    if artifact is None:
        return {}
    config = artifact.manifest.config
    kept = [
        one.name
        for one in fields(CONFIGS[artifact.manifest.stage])
        if one.metadata["key"] and not one.metadata["input"]
    ]
    skipped = ("seed", "log_every", "eval_every") if artifact.manifest.stage == "train" else ()
    return {name: config[name] for name in kept if name in config and name not in skipped}


def _data(model: _Model) -> Mapping[str, Any]:
    """What it was trained on, pinned; empty where that is not known."""
    return (model.train.manifest.inputs.get("data") if model.train else None) or {}


def _build(model: _Model, builds: Mapping[str, Artifact]) -> Artifact | None:
    return builds.get(_data(model).get("ref", ""))


def _suffixes(models: Sequence[_Model], builds: Mapping[str, Artifact]) -> list[str]:
    """What tells methods of one loss apart: settings of the training, then of the build, then the build itself."""
    trained = [settings(model.train) for model in models]
    built = [settings(_build(model, builds)) for model in models]
    parts: list[list[str]] = [[] for _ in models]
    for group in (trained, built):
        for name in dict.fromkeys(name for one in group for name in one):
            values = [one.get(name) for one in group]
            if name in _NOT_THE_METHOD or all(value == values[0] for value in values):
                continue
            for part, value in zip(parts, values, strict=True):
                part.append(_setting(name, value))
    if len({tuple(part) for part in parts}) < len(models):
        for part, model in zip(parts, models, strict=True):
            part.append(_data(model).get("ref") or model.key)
    return [f" ({', '.join(part)})" for part in parts]


def _setting(name: str, value: Any) -> str:
    if name == "pairing_ratio" and value is not None:
        return f"{value:.0%} pairs"
    return f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"


def _method(label: str, base: str, models: Sequence[_Model], builds: Mapping[str, Artifact]) -> Method:
    runs = [_run(model, label, base, builds) for model in models]
    return Method(label, base, tuple(runs))


def _run(model: _Model, label: str, base: str, builds: Mapping[str, Artifact]) -> Run:
    # As a base, a trained model stands for itself: its own seed and data are those of another table.
    train = model.train if label != BASE else None
    build = _build(model, builds) if train is not None else None
    return Run(
        model.key if model.train is not None else model.name,
        model.named or model.key, label, train.manifest.config["seed"] if train is not None else None, base, train,
        tuple(model.evals), build, build.manifest.config.get("pairing_ratio") if build is not None else None,
    )  # fmt: skip
