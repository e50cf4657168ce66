"""PairRM's two layouts: what is in their files, and what happens where it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bnfctl.config import ScoreConfig
from bnfctl.data.records import Candidate, Group, Prompt
from bnfctl.errors import UsageError
from bnfctl.scorers import deberta_pairs
from bnfctl.scorers.deberta_pairs import PairModel, read_layout
from bnfctl.scorers.pairrm import PairRMScorer
from tests.scorers.pairrm_folder import LARGE, PUBLISHED, Maker, published_tensors

CONFIG = ScoreConfig(input="x", scorer="pairrm", dtype="float32")
GROUP = Group(
    Prompt("p", ({"role": "user", "content": "why?"},)),
    tuple(Candidate("p", number, text) for number, text in enumerate(["because", "no", "I hate you!"])),
)


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    return Maker(tmp_path, monkeypatch)


def values(folder: Path) -> list[float | None]:
    return [reward.value for reward in next(PairRMScorer(CONFIG, folder).score([GROUP]))]


def test_the_published_size_has_the_published_tensors() -> None:
    """24 layers of 1024, without memory: every name and shape."""
    with torch.device("meta"):
        model = PairModel(PUBLISHED)
    found = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert found == published_tensors(1024, 4096, 24, 256)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert 430e6 < sum(value.numel() for value in model.parameters()) < 440e6


def test_both_layouts_mean_the_same(checkpoint: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(deberta_pairs.BODIES, LARGE, PUBLISHED)
    large: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
             "max_position_embeddings": 512, "position_buckets": 256}  # fmt: skip
    assert read_layout(checkpoint("PairRM")) == read_layout(checkpoint("PairRM-hf", **large))


LAYER = "pretrained_model.encoder.layer.1."
WRONG: list[tuple[dict[str, torch.Tensor | None], str]] = [
    (
        {LAYER + "output.dense.weight": None, "head_layer.1.bias": None},
        rf"lacks {LAYER}output\.dense\.weight \[32, 48\]",
    ),
    ({"head_layer.4.weight": torch.zeros(2, 32)}, r"head_layer\.4\.weight is \[2, 32\], expected \[1, 32\]"),
    ({"head_layer.1.weight": torch.zeros(32, 64).int()}, r"head_layer\.1\.weight is I32, expected F32"),
    ({LAYER + "attention.self.pos_key_proj.weight": torch.zeros(2)}, r"unexpected .*pos_key_proj"),
    ({"sigmoid.weight": torch.zeros(2)}, r"unexpected sigmoid\.weight"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_tensors_name_the_first_difference(change: Any, message: str, checkpoint: Maker) -> None:
    folder = checkpoint("PairRM", change)
    with pytest.raises(UsageError, match=message) as caught:
        PairRMScorer(CONFIG, folder)
    assert caught.value.where == str(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("PairRM", {"ranker_type": "summareranker"}, "ranker_type is 'summareranker', expected 'pairranker'"),
        ("PairRM", {"model_name": "roberta-large"}, "model_name is 'roberta-large'"),
        ("PairRM", {"reduce_type": "max"}, "reduce_type"),
        ("PairRM", {"source_maxlength": "absent"}, "source_maxlength is None"),
        ("PairRM", {"candidate_maxlength": 3}, "candidate_maxlength is 3"),
        ("PairRM-hf", {"model_type": "deberta"}, "model_type is 'deberta', expected 'deberta-v2'"),
        ("PairRM-hf", {"position_biased_input": "absent"}, "position_biased_input is None, expected False"),
        ("PairRM-hf", {"share_att_key": False}, "share_att_key is False"),
        ("PairRM-hf", {"pos_att_type": ["c2p"]}, "pos_att_type"),
        ("PairRM-hf", {"layer_norm_eps": "1e-7"}, "layer_norm_eps is '1e-7'"),
        ("PairRM-hf", {"hidden_size": True}, "hidden_size is True"),
        ("PairRM-hf", {"num_attention_heads": 5}, "multiple of the number of attention"),
        ("PairRM-hf", {"source_prefix_id": 128002}, r"<\|source\|> is 128001, expected 128002"),
    ],
)
def test_wrong_configs_name_the_first_difference(layout: str, change: Any, message: str, checkpoint: Maker) -> None:
    with pytest.raises(UsageError, match=message):
        PairRMScorer(CONFIG, checkpoint(layout, **change))


def test_the_older_spelling_of_the_attention_types(checkpoint: Maker) -> None:
    folder = checkpoint("PairRM-hf", pos_att_type="p2c|c2p")
    assert values(folder) == values(checkpoint())


def test_the_buffer_of_old_versions_is_tolerated(checkpoint: Maker) -> None:
    old = {"pretrained_model.embeddings.position_ids": torch.arange(32)[None]}
    found = values(checkpoint("PairRM", old))
    assert found == values(checkpoint())


def test_parameters_that_can_run_code_are_refused(checkpoint: Maker) -> None:
    folder = checkpoint()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (folder / "training_args.bin").unlink()
    with pytest.raises(UsageError, match=r"no model\.safetensors, and pytorch_model\.bin could run code") as caught:
        PairRMScorer(CONFIG, folder)
    assert "safetensors" in str(caught.value.hint)


def test_broken_parameters_are_a_usage_error(checkpoint: Maker) -> None:
    folder = checkpoint()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UsageError, match="cannot read"):
        PairRMScorer(CONFIG, folder)
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UsageError, match="not a safetensors file"):
        PairRMScorer(CONFIG, folder)


def test_wrong_tokenizers_are_usage_errors(checkpoint: Maker) -> None:
    folder = checkpoint()
    file = folder / "tokenizer.json"
    spec = json.loads(file.read_text())
    for change, message in [
        ({"post_processor": None}, r"<\|source\|>a is .* expected \[1, 128001"),
        ({"added_tokens": spec["added_tokens"][:-1]}, r"<\|candidate\|> is None"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}}, "BPE"),
        ({"normalizer": 7}, "cannot load"),
    ]:
        file.write_text(json.dumps({**spec, **change}))
        with pytest.raises(UsageError, match=message) as caught:
            PairRMScorer(CONFIG, folder)
        assert caught.value.where == str(file)
    file.unlink()
    with pytest.raises(UsageError, match=r"no tokenizer\.json"):
        PairRMScorer(CONFIG, folder)


def test_the_checkpoint_is_what_was_published(checkpoint: Maker) -> None:
    """The fixture itself: float32, the names of both repositories."""
    found = load_file(checkpoint() / "model.safetensors")
    assert {name: list(value.shape) for name, value in found.items()} == published_tensors(32, 48, 2, 8)
    assert {value.dtype for value in found.values()} == {torch.float32}
