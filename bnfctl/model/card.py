"""README.md of a trained model: what it is, what it was made from, how, with which result.

It is part of the artifact's digest: no dates, hosts, paths, timings or versions, only the key's fields, digests and
what metrics.jsonl says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bnfctl import tables
from bnfctl.artifact import Artifact, Pinned
from bnfctl.config import TrainConfig
from bnfctl.hub import split_revision
from bnfctl.model.source import model_dir
from bnfctl.options import key_fields

FILE = "README.md"
_LICENSE = ("license", "license_name", "license_link")
_FIGURES = (
    "objective", "objective_chosen", "objective_rejected", "logp_chosen", "logp_rejected", "shift_chosen",
    "shift_rejected", "margin", "accuracy",
)  # fmt: skip
_CITATION = """```bibtex
@article{mao2024bnf,
  title  = {As Simple as Fine-tuning: {LLM} Alignment via Bidirectional Negative Feedback Loss},
  author = {Mao, Xin and Li, Feng-Lin and Xu, Huimin and Zhang, Wei and Chen, Wang and Luu, Anh Tuan},
  journal = {arXiv preprint arXiv:2410.04834},
  year   = {2024}
}
```"""


def card(config: TrainConfig, inputs: Mapping[str, Pinned], summary: Mapping[str, Any]) -> str:
    """The text of README.md.

    config: as the training ran, `auto` resolved.  inputs: its model and its data, a build artifact.  summary: of
    `training.loop.train`; its `final` and `test` lines are quoted.
    """
    source = _source(inputs["data"])
    header = yaml.safe_dump(_header(config, inputs["model"], source), sort_keys=False)
    parts = [
        f"---\n{header}---",
        _title(config, inputs["model"]),
        _lineage(inputs, source),
        _loss(config),
        _training(config, summary),
        _results(summary),
        _loading(config),
        f"## Citation\n\nThe paper of the BNF loss, [arXiv 2410.04834](https://arxiv.org/abs/2410.04834):\n\n{_CITATION}",
    ]
    return "\n\n".join(parts) + "\n"


def _adapter(config: TrainConfig) -> bool:
    return bool(config.lora) and config.lora_save == "adapter"


def _header(config: TrainConfig, model: Pinned, source: Pinned | None) -> dict[str, Any]:
    """The front matter that the hub reads."""
    header: dict[str, Any] = {}
    if model.kind == "hub-model":
        relation = "adapter" if _adapter(config) else "finetune"
        header |= {"base_model": split_revision(model.ref)[0], "base_model_relation": relation}
    if source is not None and source.kind == "hub-data":
        header["datasets"] = [split_revision(source.ref)[0]]
    header |= {"library_name": "peft" if _adapter(config) else "transformers", "pipeline_tag": "text-generation"}
    return header | {"tags": ["bnfctl", "alignment", config.loss], **_license(model)}


def _license(model: Pinned) -> dict[str, str]:
    """What the base's own README says.

    Of a hub model nothing is said: whether its README is in the cache is chance, and the card must not depend on it.
    """
    if model.kind == "hub-model":
        return {}
    try:
        text = (model_dir(model) / FILE).read_text(encoding="utf-8")
        found = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") else None
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return {}
    given = found if isinstance(found, dict) else {}
    return {name: given[name] for name in _LICENSE if isinstance(given.get(name), str)}


def _source(data: Pinned) -> Pinned | None:
    """What the build was made from, as its own manifest has it; what lies further back may be gone by now."""
    if data.path is None:
        return None
    raw = Artifact(Path(data.path)).manifest.inputs.get("input")
    return Pinned(raw["kind"], raw["ref"], raw["digest"]) if raw else None


def _sampled_from(data: Pinned) -> Pinned | None:
    """The model whose responses the records hold, where they were sampled with bnfctl."""
    raw = Artifact(Path(data.path)).manifest.summary.get("model") if data.path else None
    return Pinned(raw["kind"], raw["ref"], raw["digest"]) if raw else None


def _short(pinned: Pinned) -> str:
    return split_revision(pinned.ref)[0].split("/")[-1] if pinned.kind in ("hub-model", "lab") else "model"


def _named(pinned: Pinned) -> str:
    """An input in words that mean the same elsewhere, and its pin; nothing of a path, which is not in the key."""
    name, commit = split_revision(pinned.ref)
    if pinned.kind in ("hub-model", "hub-data"):
        kind = "datasets/" if pinned.kind == "hub-data" else ""
        return f"[{name}](https://huggingface.co/{kind}{name}) at commit `{commit}`"
    kinds = {"artifact": f"{pinned.ref.split('/')[0]} artifact", "lab": f"`{pinned.ref}` of bnfctl"}
    return f"{kinds.get(pinned.kind, pinned.kind)}, digest `{pinned.digest}`"


def _title(config: TrainConfig, model: Pinned) -> str:
    what = "LoRA adapters that align the base model" if _adapter(config) else "The base model, aligned"
    return f"# {_short(model)}-{config.loss}\n\n{what} with preference data by bnfctl, under the loss `{config.loss}`."


def _lineage(inputs: Mapping[str, Pinned], source: Pinned | None) -> str:
    lines = [f"- base model: {_named(inputs['model'])}", f"- preference records: {_named(inputs['data'])}"]
    if source is not None:
        lines.append(f"- made from: {_named(source)}")
    sampled = _sampled_from(inputs["data"])
    if sampled is not None:
        lines.append(f"- responses sampled from: {_named(sampled)}")
    return "## Lineage\n\n" + "\n".join(lines)


def _loss(config: TrainConfig) -> str:
    """Every hyper-parameter of the loss: the given ones, and the defaults of the others."""
    kind = tables.load(tables.LOSSES, config.loss, "loss")
    values = {field.name.rstrip("_"): field.default for field in dataclasses.fields(kind)}
    for arg in config.loss_arg:
        name, _, value = arg.partition("=")
        values[name.strip()] = value.strip()
    listed = ", ".join(f"{name} = {value}" for name, value in values.items())
    return f"## Loss\n\n`{config.loss}`" + (f" with {listed}." if listed else ", which has no hyper-parameters.")


def _training(config: TrainConfig, summary: Mapping[str, Any]) -> str:
    """The key's fields, as a file that `bnfctl train --config` takes."""
    values = {name: list(v) if isinstance(v, tuple) else v for name, v in key_fields(config).items()}
    size = f"{summary['steps']} steps, {summary['records']} records, {summary['tokens']} trained tokens an epoch."
    return f"## Training\n\n{size}\n\n```yaml\n{yaml.safe_dump(values, sort_keys=False)}```"


def _results(summary: Mapping[str, Any]) -> str:
    columns = {"last training step": summary.get("final"), "test split": summary.get("test")}
    shown = {title: line for title, line in columns.items() if line}
    if not shown:
        return "## Results\n\nNo step was logged."
    rows = [["", *shown], ["---", *("---:" for _ in shown)]]
    for name in _FIGURES:
        if any(line.get(name) is not None for line in shown.values()):
            rows.append([name, *(_figure(line.get(name)) for line in shown.values())])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    units = (
        "logp: mean log-probability of a token, nats; shift: its change from the reference.  "
        "margin: mean over pairs of the chosen response's log-ratio to the reference minus the rejected one's, nats; "
        "accuracy: share of pairs where it is above 0."
    )
    return f"## Results\n\n{table}\n\n{units}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _loading(config: TrainConfig) -> str:
    code = ", trust_remote_code=True" if config.trust_remote_code else ""
    flag = " --trust-remote-code" if config.trust_remote_code else ""
    if _adapter(config):
        python = (
            "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n\n"
            f'model = AutoPeftModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="auto"{code})'
        )
        rank = max(8, 1 << (config.lora - 1).bit_length())  # vLLM takes powers of two
        shell = f"vllm serve BASE_MODEL --enable-lora --max-lora-rank {rank} --lora-modules {config.loss}=THIS_FOLDER"
    else:
        python = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="auto"{code})'
        )
        shell = "vllm serve THIS_FOLDER"
    python += f'\ntokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER"{code})'
    return f"## Use\n\n```python\n{python}\n```\n\n```bash\n{shell}{flag}\n```"
