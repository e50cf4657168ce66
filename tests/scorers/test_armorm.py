"""ArmoRM: equal to a twin written from the published model, whatever the batch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from bnfctl.artifact import Store
from bnfctl.config import ScoreConfig
from bnfctl.errors import UsageError
from bnfctl.model.attention import NAME as ROWS_ATTENTION
from bnfctl.model.attention import register
from bnfctl.scorers import armorm, prompts
from bnfctl.scorers.armorm import OBJECTIVES, ArmoRM, ArmoRMScorer
from tests.scorers import armorm_twin as twin_files
from tests.scorers.armorm_cases import (
    GROUPS,
    assert_close,
    config,
    flat,
    group,
    outputs,
    retokenized,
    table,
    user,
)
from tests.scorers.armorm_twin import PAD, Twin
from tests.stages.chain import run, write_jsonl

torch.set_num_threads(1)  # tiny tensors: a second thread only waits for a core

PUBLISHED = os.environ.get("BNFCTL_ARMORM")
"""A local copy of RLHFlow/ArmoRM-Llama3-8B-v0.1, for the one test that needs it."""


# the model


def test_the_published_layout_loads_whole(folder: Path) -> None:
    model, info = ArmoRM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info
    stored: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            stored |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    state = model.state_dict()
    assert state.keys() == stored.keys() and len(stored) == 2 + 9 * 2 + 2 + 8 + 1
    for name, tensor in state.items():
        assert tensor.dtype == stored[name].dtype, name
        assert torch.equal(tensor, stored[name]), name


def test_every_output_equals_the_twin(scorer: ArmoRMScorer, exact: torch.Tensor) -> None:
    assert scorer.packs
    found = table(flat(scorer, GROUPS))
    assert float(exact[:, 0].std()) > 0.05, "the scores differ enough to tell them apart"
    assert_close(found, exact)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_of_the_twin_is_the_same(side: str, scorer: ArmoRMScorer, twin: Twin) -> None:
    ids = [twin.encode(one.prompt.messages, candidate.text) for one in GROUPS for candidate in one.candidates]
    width = max(map(len, ids))
    padding = [[PAD] * (width - len(row)) for row in ids]
    rows = [pad + row if side == "left" else row + pad for row, pad in zip(ids, padding, strict=True)]
    batch = torch.tensor(rows)
    assert_close(table(flat(scorer, GROUPS)), outputs(twin(batch, (batch != PAD).long())))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("batch_tokens", [1, 150, 400, 100_000])
def test_batches_and_sharing_change_nothing(
    share: bool, batch_tokens: int, folder: Path, exact: torch.Tensor
) -> None:  # fmt: skip
    scorer = ArmoRMScorer(config(batch_tokens=batch_tokens), folder, share=share)
    assert_close(table(flat(scorer, GROUPS)), exact)
    backwards = [group(0, one.prompt.messages, *(c.text for c in one.candidates[::-1])) for one in GROUPS[::-1]]
    assert_close(table(flat(scorer, backwards)[::-1]), exact)


def test_a_prompt_is_computed_once_for_its_responses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = group(0, (user("long " * 40),), "yes", "no", "maybe", "yes")
    lengths: list[int] = []
    for share, budget in ((True, 8192), (False, 8192), (True, 1)):
        scorer = ArmoRMScorer(config(batch_tokens=budget), folder, share=share)
        seen: list[int] = []
        scorer._model.model.register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        flat(scorer, [one])
        lengths.append(sum(seen))
    prompt = len(scorer._chat.prompt(one.prompt.messages))
    tails = sum(len(scorer._chat.response(text)) for text in ("yes", "no", "maybe"))
    assert lengths == [prompt + tails, 3 * prompt + tails, 3 * prompt + tails]


def test_shared_prompts_score_the_same_in_rows(
    folder: Path, exact: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of a GPU, on this CPU."""
    monkeypatch.setattr(armorm, "_attention", lambda *_: ROWS_ATTENTION)
    monkeypatch.setattr(prompts, "prompts_of", None)
    scorer = ArmoRMScorer(config(), folder)
    assert scorer.packs
    assert_close(table(flat(scorer, GROUPS)), exact)


def test_many_short_responses_to_a_long_prompt_stay_small_in_attention() -> None:
    sequences = [armorm._Sequence(0, [5] * 900, (1, i)) for i in range(100)]
    for batch in armorm._batches(sequences, 1000, share=True):
        assert len(batch) * 902 <= armorm._SPREAD * 1000
    assert sum(map(len, armorm._batches(sequences, 1000, share=True))) == 100


def test_the_heads_stay_float32_under_a_bfloat16_trunk(folder: Path, exact: torch.Tensor) -> None:
    scorer = ArmoRMScorer(config(dtype="bfloat16"), folder)
    kinds = {name.split(".")[0]: p.dtype for name, p in scorer._model.named_parameters()}
    heads = ("regression_layer", "reward_transform_matrix", "gating")
    assert kinds == {"model": torch.bfloat16, **dict.fromkeys(heads, torch.float32)}
    found = table(flat(scorer, GROUPS))
    assert_close(found, exact, 0.3)
    assert not torch.equal(found[:, 0], found[:, 0].bfloat16().float()), "bfloat16 heads would quantise the score"


@pytest.mark.parametrize("share", [True, False])
def test_an_attention_that_mixes_documents_is_not_used(
    share: bool, folder: Path, exact: torch.Tensor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def mixing(module: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        groups = query.shape[1] // key.shape[1]
        k, v = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, k, v, is_causal=True)
        return out.transpose(1, 2), None

    with monkeypatch.context() as patch:
        patch.setattr("bnfctl.model.attention.rows_attention", mixing)
        patch.setattr("bnfctl.scorers.prompts.prompts_attention", mixing)
        scorer = ArmoRMScorer(config(), folder, share=share)
    register()
    prompts.register()
    assert not scorer.packs
    assert "one forward per response" in capsys.readouterr().err
    assert_close(table(flat(scorer, GROUPS)), exact)


def test_no_remote_code_runs(folder: Path) -> None:
    assert "raise" in (folder / "modeling_custom.py").read_text()
    assert flat(ArmoRMScorer(config(trust_remote_code=True), folder), GROUPS[:1])


# the layout


def _head_in_bfloat16(parameters: dict[str, torch.Tensor]) -> None:
    parameters["gating.layers.1.bias"] = parameters["gating.layers.1.bias"].bfloat16()


def _other_shape(parameters: dict[str, torch.Tensor]) -> None:
    parameters["regression_layer.weight"] = parameters["regression_layer.weight"][:10]


def _score_head(parameters: dict[str, torch.Tensor]) -> None:
    parameters["score.weight"] = torch.zeros(1, 32)


def _no_matrix(parameters: dict[str, torch.Tensor]) -> None:
    del parameters["reward_transform_matrix"], parameters["gating.logit_scale"]


def _integers(parameters: dict[str, torch.Tensor]) -> None:
    parameters["model.norm.weight"] = parameters["model.norm.weight"].to(torch.int8)


@pytest.mark.parametrize(
    ("change", "first"),
    [
        (_head_in_bfloat16, "gating.layers.1.bias is stored as BF16, expected F32"),
        (_other_shape, r"regression_layer.weight is \[10, 32\], expected \[19, 32\]"),
        (_score_head, "a tensor that ArmoRM lacks: score.weight"),
        (_no_matrix, "lacks reward_transform_matrix"),
        (_integers, "model.norm.weight is stored as I8"),
    ],
)
def test_a_wrong_tensor_is_named(
    change: Callable[[dict[str, torch.Tensor]], None], first: str, folder: Path, tmp_path: Path
) -> None:
    path = retokenized(folder, tmp_path / "wrong")
    settings = json.loads((path / "config.json").read_text())
    parameters = twin_files.random_parameters(settings, 0)
    change(parameters)
    for file in [*path.glob("model*"), path / "config.json"]:
        file.unlink()
    twin_files.write_parameters(path, settings, parameters)
    with pytest.raises(UsageError, match=first) as caught:
        ArmoRMScorer(config(), path)
    assert caught.value.where == str(path) and caught.value.hint


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"num_objectives": 10}, "10 objectives, not 19"),
        ({"gating_temperature": None}, "gating_temperature None"),
        ({"gating_n_hidden": 2}, r"gating.layers.2.weight is \[24, 24\], expected \[19, 24\]"),
        ({"num_hidden_layers": 3}, "lacks model.layers.2"),
        (
            {"architectures": ["LlamaForSequenceClassification"], "num_objectives": None, "gating_n_hidden": None},
            "this is LlamaForSequenceClassification",
        ),
    ],
)
def test_a_wrong_config_is_named(changes: dict[str, Any], first: str, folder: Path, tmp_path: Path) -> None:
    path = retokenized(folder, tmp_path / "wrong")
    settings = {**json.loads((path / "config.json").read_text()), **changes}
    (path / "config.json").unlink()
    kept = {name: value for name, value in settings.items() if value is not None or name in ("rope_scaling",)}
    (path / "config.json").write_text(json.dumps(kept))
    with pytest.raises(UsageError, match=first):
        ArmoRMScorer(config(), path)


def test_a_missing_shard(folder: Path, tmp_path: Path) -> None:
    path = retokenized(folder, tmp_path / "wrong")
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UsageError, match="lacks reward_transform_matrix"):
        ArmoRMScorer(config(), path)
    (path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(UsageError, match=r"no \*\.safetensors"):
        ArmoRMScorer(config(), path)


# the stage, and the released model


def test_the_stage_keeps_objectives_and_gating(folder: Path, store: Store, tmp_path: Path, twin: Twin) -> None:
    rows = [{"id": "a", "prompt": "Hi", "responses": ["yes", "no", "x" * 600]}]
    path = write_jsonl(tmp_path / "r.jsonl", rows)
    made = run(ScoreConfig(input=str(path), scorer="armorm", model=str(folder), dtype="float32"), store)
    found = list(made.rows())
    assert made.manifest.summary["null_rewards"] == 1 and "too_long" in found[2]["extra"]
    for row, text in zip(found, ("yes", "no"), strict=False):
        extra = json.loads(row["extra"])
        exact = outputs(twin.one(twin.encode((user("Hi"),), text)))
        values = [row["reward"], *(extra[part][name] for part in ("objectives", "gating") for name in OBJECTIVES)]
        assert_close(torch.tensor(values), exact)


def test_the_stage_asks_for_the_model(store: Store, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", [{"prompt": "Hi", "responses": ["yes"]}])
    with pytest.raises(UsageError, match="armorm needs a model") as caught:
        run(ScoreConfig(input=str(path), scorer="armorm"), store)
    assert caught.value.where == "--model"


@pytest.fixture
def released() -> Path:
    if PUBLISHED is None:
        pytest.skip("set BNFCTL_ARMORM to a local folder of RLHFlow/ArmoRM-Llama3-8B-v0.1")
    return Path(PUBLISHED)


@pytest.mark.slow
def test_the_published_check_values(released: Path) -> None:
    """The example of the model card, computed there in bfloat16 throughout, hence the tolerances."""
    asked = 'What are some synonyms for the word "beautiful"?'
    response = "Nicely, Beautifully, Handsome, Stunning, Wonderful, Gorgeous, Pretty, Stunning, Elegant"
    scorer = ArmoRMScorer(config(dtype="bfloat16"), released)
    (reward,) = flat(scorer, [group(0, (user(asked),), response)])
    rescaled = [value * 5 - 0.5 for value in reward.extra["objectives"].values()][:5]
    assert rescaled == pytest.approx([2.781, 2.859, 3.484, 1.385, 1.297], abs=0.05)
    gating = torch.tensor(list(reward.extra["gating"].values()))
    coefficients = gating @ scorer._model.reward_transform_matrix.cpu().T
    largest = coefficients.abs().topk(3).indices.tolist()
    names = ["code-complexity", "helpsteer-verbosity", "ultrafeedback-instruction_following"]
    assert [OBJECTIVES[i] for i in largest] == names
    assert coefficients[largest].tolist() == pytest.approx([0.19922, -0.10864, 0.07861], abs=0.005)
