"""Shifts of a policy against its reference: exact twins, the identity, and what must not change them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, Lfm2Config, Phi3Config, PretrainedConfig

from bnfctl import shards
from bnfctl.analysis import shifts
from bnfctl.analysis.distributions import gini
from bnfctl.analysis.shifts import SCHEMA, ResponseShift, ShiftOptions, Shifts, compare
from bnfctl.data.records import Candidate
from bnfctl.errors import BnfctlError, UsageError
from bnfctl.model.head import Head
from tests import reference
from tests.model.tiny import VOCABULARY, tiny_config, write_any

SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128, "initializer_range": 0.2,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
             "factor": 4.0}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": tiny_config(tie_word_embeddings=False),
    "llama, tied": tiny_config(),
    "gemma2": Gemma2Config(
        **SHAPE, head_dim=16, sliding_window=8, attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
        query_pre_attn_scalar=16,
    ),
    "lfm2, never packed": Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"]),
    "phi3, long positions": Phi3Config(**SHAPE, original_max_position_embeddings=24, rope_parameters=LONG_ROPE),
}  # fmt: skip
LENGTHS = ((5, 9), (1, 1), (12, 31), (3, 1), (8, 17), (1, 6))
"""(prompt, response)"""
FLOAT32 = ShiftOptions(dtype="float32")
NAMES = ("ll", "z", "lse", "z3", "z4")


def candidates() -> list[Candidate]:
    random = np.random.default_rng(3)
    return [
        Candidate(f"p{i // 2}", i % 2, "", random.integers(3, VOCABULARY, response).tolist(), ("stop", "length", None)[i % 3],
                  0, random.integers(3, VOCABULARY, prompt).tolist())
        for i, (prompt, response) in enumerate(LENGTHS)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """(policy, reference) of a configuration: two draws of the same shape."""

    def make(name: str) -> tuple[Path, Path]:
        root = tmp_path_factory.getbasetemp() / name.replace(", ", "-").replace(" ", "-")
        found = root / "policy", root / "reference"
        if not root.exists():
            for seed, folder in enumerate(found):
                write_any(folder, CONFIGS[name], seed=seed)
        return found

    return make


def exact(folder: Path, found: Candidate) -> Tensor:
    """[T, V] logits of the response's places in float64, by the whole model on this sequence alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    assert found.prompt_ids and found.token_ids
    ids = torch.tensor([[*found.prompt_ids, *found.token_ids[:-1]]])
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits[0, len(found.prompt_ids) - 1 :]


def check_close(found: Sequence[ResponseShift], expected: Sequence[ResponseShift], within: float = 1e-5) -> None:
    assert [(shift.prompt_id, shift.sample, shift.sequence, shift.cut) for shift in found] == [
        (shift.prompt_id, shift.sample, shift.sequence, shift.cut) for shift in expected
    ]
    for one, other in zip(found, expected, strict=True):
        for name in NAMES:
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=0, atol=within, err_msg=name)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_shift_is_its_exact_twin(name: str, folders: Callable[[str], tuple[Path, Path]]) -> None:
    policy, ref = folders(name)
    work = Shifts(policy, ref, FLOAT32)
    assert work.packed == (name not in ("lfm2, never packed", "phi3, long positions"))
    made = list(work.measure(candidates()))
    assert len(made) == len(LENGTHS)
    for shift, candidate in zip(made, candidates(), strict=True):
        twin = reference.shifts(exact(policy, candidate), exact(ref, candidate), torch.tensor(candidate.token_ids))
        for part in NAMES:
            values = getattr(shift, part)
            assert values.dtype == np.float32
            np.testing.assert_allclose(values, twin[part].numpy(), rtol=0, atol=1e-5, err_msg=part)
        assert np.abs(twin["ll"].numpy()).max() > 0.01  # the two do differ
        row = shift.row()
        absolute = {"ll": twin["ll"], "z1": twin["z"], "z2": twin["z"].abs(), "z3": twin["z3"], "z4": twin["z4"]}
        for part, tokens in absolute.items():
            assert row[f"{part}_mean"] == pytest.approx(float(tokens.mean()), abs=1e-5), part
            assert row[f"{part}_sum"] == pytest.approx(float(tokens.sum()), abs=1e-5 * len(tokens)), part
        assert row["gini"] == pytest.approx(float(reference.gini(absolute["z2"])), abs=1e-5)
    assert 0 < work.deviation == max(shift.deviation for shift in made) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_has_not_moved_from_itself(dtype: str, folders: Callable[[str], tuple[Path, Path]]) -> None:
    for name in ("llama, tied", "gemma2"):
        policy, _ = folders(name)
        work = Shifts(policy, policy, ShiftOptions(dtype=dtype))
        for shift in work.measure(candidates()):
            assert not any(getattr(shift, part).any() for part in NAMES), name
            row = shift.row()
            assert row["z4_sum"] == row["ll_mean"] == row["gini"] == 0
        assert work.deviation == 0


def test_the_identity_holds_on_every_token(folders: Callable[[str], tuple[Path, Path]]) -> None:
    for name in ("llama", "gemma2"):
        for shift in Shifts(*folders(name), FLOAT32).measure(candidates()):
            np.testing.assert_allclose(shift.ll, shift.z - shift.lse, rtol=0, atol=1e-5)
            assert np.abs(shift.ll - (shift.z - shift.lse)).max() == pytest.approx(shift.deviation, abs=1e-7)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_order_and_batches_change_nothing(layout: str, folders: Callable[[str], tuple[Path, Path]]) -> None:
    work = Shifts(*folders("gemma2"), replace(FLOAT32, layout=layout))
    assert work.packed == (layout == "packed")
    whole = list(work.measure(candidates()))
    check_close(list(work.measure(reversed(candidates())))[::-1], whole)
    check_close([shift for candidate in candidates() for shift in work.measure([candidate])], whole)
    for budget in (1, 40, 10**6):
        again = Shifts(*folders("gemma2"), replace(FLOAT32, micro_tokens=budget, longest=60))
        check_close(list(again.measure(candidates())), whole)


def test_chunks_of_tokens_and_vocabulary_change_nothing(
    folders: Callable[[str], tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Shifts(*folders("llama"), FLOAT32)
    whole = list(work.measure(candidates()))
    largest, inner = 0, shifts._logits

    def watched(head: Head, hidden: Tensor) -> Tensor:
        nonlocal largest
        logits = inner(head, hidden)
        largest = max(largest, logits.numel())
        return logits

    monkeypatch.setattr(shifts, "_logits", watched)
    monkeypatch.setattr(shifts, "CHUNK_ELEMENTS", {work.device.type: 2 * VOCABULARY + 5})
    check_close(list(work.measure(candidates())), whole)
    assert largest == 2 * VOCABULARY  # and the matrix came in blocks of 9 rows of 64
    monkeypatch.setattr(shifts, "CHUNK_ELEMENTS", {work.device.type: 1})
    check_close(list(work.measure(candidates()[:2])), whole[:2])


def test_z4_knows_no_constant_and_z1_to_z3_do() -> None:
    """The same softmax, all logits 2.5 higher: the log-likelihood has not moved."""
    hidden, target = torch.randn(9, 8, generator=torch.Generator().manual_seed(1)), torch.arange(9)
    matrix = torch.randn(20, 8, generator=torch.Generator().manual_seed(2))
    ll, z, lse, z3, z4, *_ = compare((Head(matrix, torch.full((20,), 2.5)), Head(matrix)), (hidden, hidden), target)
    for shift, constant in ((ll, 0), (z, 2.5), (lse, 2.5), (z3, 2.5), (z4, 0)):
        torch.testing.assert_close(shift, torch.full((9,), float(constant)), rtol=0, atol=1e-5)


def test_heads_have_a_bias_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(4)
    hidden, matrix, bias = (torch.randn(2, *shape, generator=draw) for shape in ((7, 8), (20, 8), (20,)))
    target = torch.arange(7)
    monkeypatch.setattr(shifts, "CHUNK_ELEMENTS", {"cpu": 40})  # 2 tokens, 5 entries of the vocabulary
    found = compare((Head(matrix[0], bias[0]), Head(matrix[1], bias[1])), (hidden[0], hidden[1]), target)
    logits = hidden.double() @ matrix.double().mT + bias.double()[:, None]
    for name, shift in zip(NAMES, found, strict=False):
        torch.testing.assert_close(shift.double(), reference.shifts(*logits, target)[name], rtol=0, atol=1e-5)


def test_confident_tokens_keep_their_digits() -> None:
    """log p of -1e-8 and -1e-17: a logit minus a log-sum-exp of some 40 knows nothing of them."""
    target = torch.tensor([3])
    matrices = [torch.eye(30) * size for size in (40.0, 20.0)]
    hidden = torch.eye(30)[target]
    found = compare((Head(matrices[0]), Head(matrices[1])), (hidden, hidden), target)
    twin = reference.shifts(*(matrix.double()[target] for matrix in matrices), target)
    assert float(found[0]) == pytest.approx(float(twin["ll"]), rel=1e-5)
    assert 0 < float(found[0]) < 1e-7


def test_rows_are_parquet_and_say_what_is_known(folders: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    made = list(Shifts(*folders("llama"), FLOAT32).measure(candidates()))
    shards.write_shards(tmp_path / "rows", (shift.row() for shift in made), SCHEMA)
    rows = list(shards.read_rows(tmp_path / "rows"))
    assert [(row["prompt_id"], row["sample"], row["tokens"], row["cut"]) for row in rows] == [
        ("p0", 0, 9, False), ("p0", 1, 1, True), ("p1", 0, 31, None), ("p1", 1, 1, False), ("p2", 0, 17, True),
        ("p2", 1, 6, None),
    ]  # fmt: skip
    assert len({row["sequence"] for row in rows}) == len(rows)
    for row, shift in zip(rows, made, strict=True):
        for name in NAMES:
            assert row[f"token_{name}"] == getattr(shift, name).tolist()
        assert row["gini"] == gini(np.abs(row["token_z"])) and row["z2_sum"] >= abs(row["z1_sum"])
        assert row["gini_corrected"] == pytest.approx(row["gini"] * row["tokens"] / max(1, row["tokens"] - 1))
        assert row["z3_mean"] == pytest.approx(np.mean(row["token_z3"]))
    first = candidates()[0]
    others = [first, replace(first, token_ids=[9]), replace(first, prompt_ids=[9]), replace(first, sample=7)]
    names = [shift.sequence for shift in Shifts(*folders("llama"), FLOAT32).measure(others)]
    assert len(set(names)) == 3 and names[0] == names[3]
    again = next(Shifts(*reversed(folders("llama")), FLOAT32).measure(candidates()))
    assert again.sequence == rows[0]["sequence"]
    np.testing.assert_allclose(again.ll, -made[0].ll, atol=1e-6)


def test_reads_no_further_ahead_than_a_micro_batch(folders: Callable[[str], tuple[Path, Path]]) -> None:
    read = 0

    def endless() -> Iterator[Candidate]:
        nonlocal read
        while True:
            read += 1
            yield candidates()[0]

    found = Shifts(*folders("llama"), replace(FLOAT32, micro_tokens=3 * 13)).measure(endless())
    for number in range(1, 8):
        next(found)
        assert read == (number + 2) // 3 * 3 + 1  # whole micro-batches of three, and the one that no longer fits


def test_the_run_stops_where_the_identity_fails(
    folders: Callable[[str], tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, calls = shifts._reduced, 0

    def wrong(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal calls
        numbers, values, logits = inner(*args)
        calls += 1
        numbers[2] += 1e-3 * (calls % 2)  # the policy's log-sum-exp alone
        return numbers, values, logits

    monkeypatch.setattr(shifts, "_reduced", wrong)
    with pytest.raises(BnfctlError, match=r"differ by 0\.001") as caught:
        list(Shifts(*folders("llama"), FLOAT32).measure(candidates()))
    assert caught.value.where == "prompt p0, sample 0" and caught.value.exit_code == 1


def test_numbers_that_are_not_finite_name_the_response(
    folders: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    broken = write_any(tmp_path / "broken", CONFIGS["llama"])
    tensors = load_file(broken / "model.safetensors")
    tensors["model.embed_tokens.weight"][150] = torch.inf
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    bad = replace(candidates()[3], prompt_ids=[9, 150])
    work = Shifts(broken, folders("llama")[1], FLOAT32)
    assert np.isfinite(next(work.measure([Candidate("x", 0, "", [5], "stop", 0, [9])])).ll).all()
    with pytest.raises(BnfctlError, match="not finite") as caught:
        list(work.measure([bad]))
    assert caught.value.where == "prompt p1, sample 1" and caught.value.hint == "try --dtype float32"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"token_ids": None}, "need the token ids"),
        ({"token_ids": []}, "at least one token"),
        ({"prompt_ids": None}, "need the token ids"),
        ({"token_ids": [5, VOCABULARY]}, f"token {VOCABULARY} is not in the models' vocabulary of {VOCABULARY}"),
        ({"prompt_ids": [-1]}, "token -1 is not in"),
        ({"token_ids": [5] * 124}, "has 129 tokens, more than 128"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    change: dict[str, Any], what: str, folders: Callable[[str], tuple[Path, Path]]
) -> None:
    work = Shifts(*folders("llama"), FLOAT32)
    first, second, *_ = candidates()
    with pytest.raises(UsageError, match=what) as caught:
        list(work.measure([second, replace(first, **change)]))
    assert caught.value.where == "prompt p0, sample 0"


def test_two_vocabularies_are_refused(folders: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    larger = write_any(tmp_path / "larger", tiny_config(vocab_size=VOCABULARY + 13))
    with pytest.raises(UsageError, match=f"vocabulary of {VOCABULARY + 13} tokens, the reference one of {VOCABULARY}"):
        Shifts(larger, folders("llama")[1], FLOAT32)
