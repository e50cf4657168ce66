"""train(): what it learns, writes and refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from bnfctl import tables
from bnfctl.artifact import Store
from bnfctl.config import TrainConfig
from bnfctl.data.records import Record, Side
from bnfctl.errors import BnfctlError, UsageError
from bnfctl.losses import Stats, make
from bnfctl.training.batches import Plan, step_data
from bnfctl.training.loop import kl_stats, learning_rate, take_step
from bnfctl.training.setup import load, make_optimizer
from tests.model.tiny import VOCABULARY, write_any, write_model
from tests.training.data import ALONE, make_records, prepare, train


def lines(work: Path, split: str = "train") -> list[dict[str, Any]]:
    every = map(json.loads, (work / "metrics.jsonl").read_text().splitlines())
    return [line for line in every if line["split"] == split]


def config(**fields: Any) -> TrainConfig:
    return TrainConfig(**{"model": "m", "lr": 2e-3, "batch_size": 8, "epochs": 6, **fields})


def test_sft_learns_the_chosen_responses(model_dir: Path, tmp_path: Path) -> None:
    summary = train(config(loss="sft"), model_dir, make_records(16), [], tmp_path)
    objectives = [line["objective"] for line in lines(tmp_path)]
    assert len(objectives) == summary["steps"] == 12
    assert objectives[-1] < objectives[0] - 0.5
    assert objectives[0] == pytest.approx(-lines(tmp_path)[0]["logp_chosen"])


@pytest.mark.parametrize("pairs", [True, False])
def test_bnf_lifts_chosen_and_lowers_rejected(pairs: bool, model_dir: Path, tmp_path: Path) -> None:
    summary = train(config(), model_dir, make_records(16, pairs=pairs), [], tmp_path)
    final = summary["final"]
    assert final["shift_chosen"] > 0.1 and final["shift_rejected"] < -0.1
    assert (final["margin"] is None) == (not pairs)
    assert not pairs or (final["margin"] > 1 and final["accuracy"] > 0.8)
    assert 0 < final["coefficient"] < 1
    assert lines(tmp_path)[0]["coefficient"] == pytest.approx(1, abs=1e-6)


def test_dpo_widens_the_margin(model_dir: Path, tmp_path: Path) -> None:
    train(config(loss="dpo", loss_arg=("beta=0.2",)), model_dir, make_records(16), [], tmp_path)
    first, last = lines(tmp_path)[0], lines(tmp_path)[-1]
    assert first["objective"] == pytest.approx(math.log(2)) and last["objective"] < 0.5
    assert last["margin"] > 1 and last["objective_chosen"] is None


@pytest.mark.parametrize("loss", sorted(tables.LOSSES))
def test_metrics_are_complete_and_repeat(loss: str, model_dir: Path, tmp_path: Path) -> None:
    summaries = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        asked = config(loss=loss, epochs=1)
        summaries.append(train(asked, model_dir, make_records(11), [], tmp_path / name))
        summaries[-1].pop("provenance")
    assert summaries[0] == summaries[1]
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == (tmp_path / "b" / "metrics.jsonl").read_bytes()
    first, short = lines(tmp_path / "a")
    assert (first["records"], short["records"]) == (8, 3)
    assert list(first) == [
        "step", "split", "lr", "objective", "objective_chosen", "logp_chosen", "shift_chosen", "objective_rejected",
        "logp_rejected", "shift_rejected", "margin", "accuracy", "coefficient", "grad_norm", "tokens", "records",
    ]  # fmt: skip
    assert first["tokens"] + short["tokens"] == summaries[0]["tokens"]
    assert (tmp_path / "a" / "log" / "speed.jsonl").read_text().count("\n") == 2


def test_a_short_last_batch_divides_by_its_own_denominator(model_dir: Path, tmp_path: Path) -> None:
    """The step on the 3 records left over is the same as a step on them alone."""
    records = make_records(11)
    plan = Plan(config(epochs=1, lr=0), records)
    short = list(plan.batches())[-1]
    train(plan.config, model_dir, records, [], tmp_path)
    alone = config(epochs=1, batch_size=3, lr=0)
    run = prepare(alone, make("bnf"), [records[p] for p in short], [], model_dir, tmp_path / "alone")
    line = take_step(run, [0, 1, 2], 1, log=True)
    for key in ("objective", "grad_norm", "tokens", "records"):
        assert lines(tmp_path)[-1][key] == pytest.approx(line[key], rel=1e-5, abs=1e-6), key


def test_saved_folder_loads_and_has_moved(model_dir: Path, tmp_path: Path) -> None:
    train(config(), model_dir, make_records(16), [], tmp_path)
    model, before = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "model", model_dir))
    assert model.dtype == before.dtype == torch.bfloat16
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True)]
    assert all(moved)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model")) == len(AutoTokenizer.from_pretrained(model_dir))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_papers_learning_rate_moves_float32_masters(dtype: str, model_dir: Path, tmp_path: Path) -> None:
    """5e-7 is far below bfloat16's resolution: an update of bfloat16 parameters would vanish."""
    asked = config(lr=5e-7, epochs=1, save_dtype="float32", dtype=dtype)
    train(asked, model_dir, make_records(16), [], tmp_path)
    before = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert after.dtype == torch.float32
    for name, parameter in after.named_parameters():
        change = (parameter - before.get_parameter(name)).detach().abs()
        assert 0 < float(change.max()) < 1e-5, name
        assert float((change > 0).float().mean()) > 0.2, name


def test_clip_bounds_the_update_but_not_the_reported_norm(model_dir: Path, tmp_path: Path) -> None:
    records = make_records(8)
    norms = {}
    for clip in (0.0, 1e-3):
        asked = config(clip=clip, lr=0)
        run = prepare(asked, make("bnf"), records, [], model_dir, tmp_path / str(clip))
        line = take_step(run, list(range(8)), 1, log=True)
        left = torch.nn.utils.get_total_norm([p.grad for p in run.policy.model.parameters() if p.grad is not None])
        norms[clip] = (line["grad_norm"], float(left))
    assert norms[0.0][0] == norms[1e-3][0] == pytest.approx(norms[0.0][1])
    assert norms[1e-3][1] == pytest.approx(1e-3, rel=1e-3)


def test_eval_lines(model_dir: Path, tmp_path: Path) -> None:
    test_set = make_records(5, seed=9)
    summary = train(config(eval_every=5, loss="nll-pll"), model_dir, make_records(16), test_set, tmp_path)
    reports = lines(tmp_path, "test")
    assert [line["step"] for line in reports] == [5, 10, 12]
    assert summary["test"] == reports[-1]
    assert all(math.isfinite(line[key]) for line in reports for key in ("objective", "margin", "accuracy"))
    train(config(eval_every=1, epochs=1, lr=0, loss="bnf"), model_dir, make_records(8), test_set, tmp_path / "b")
    (still,) = lines(tmp_path / "b", "test")
    assert still["margin"] == pytest.approx(0, abs=1e-5) and still["shift_chosen"] == pytest.approx(0, abs=1e-6)


def test_a_report_needs_no_reference_of_the_training_split(model_dir: Path, tmp_path: Path) -> None:
    """SFT has none of its own: its report is measured against rows of the test split alone."""
    train(config(loss="sft", eval_every=1, epochs=1), model_dir, make_records(8), make_records(5, seed=9), tmp_path)
    (made,) = Store(tmp_path / "home").artifacts("reference")
    assert len(list(made.rows())) == 5 * 2
    for key in ("shift_chosen", "shift_rejected", "margin"):
        assert all(line[key] is None for line in lines(tmp_path)), key
        assert all(isinstance(line[key], float) for line in lines(tmp_path, "test")), key


def test_kto_cuts_mismatched_responses_to_the_models_positions(tmp_path: Path) -> None:
    shape = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 24}
    folder = write_any(tmp_path / "gpt2", GPT2Config(**shape))
    records = [Record("a", [5] * 20, (Side(1, [6, 7]),)), Record("b", [5], (Side(-1, [8] * 20),))]
    summary = train(config(loss="kto", epochs=1), folder, records, records, tmp_path / "work")
    assert math.isfinite(summary["final"]["objective"])


def test_kto_without_a_second_prompt(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [Record(r.id, [5, 6], r.sides) for r in make_records(3)]
    run = prepare(config(loss="kto"), make("kto"), records, [], model_dir, tmp_path)
    assert "train split: all records have one prompt, so KTO's reference point is 0" in capsys.readouterr().err
    data = step_data(run.splits["train"].records, range(3), run.splits["train"].keep)
    assert kl_stats(run, "train", range(3), data) == Stats(kl=0.0)
    assert math.isfinite(take_step(run, [0, 1, 2], 1, log=True)["objective"])


def test_long_rotary_frequencies_are_refused(tmp_path: Path) -> None:
    """transformers takes them for a whole micro-batch, so a short sequence's numbers depend on its neighbours."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16, "factor": 2.0,
            "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}  # fmt: skip
    folder = write_model(tmp_path / "m", rope_parameters=rope)
    train(config(loss="sft", epochs=1), folder, [Record("a", [5] * 6, (Side(1, [6] * 10),))], [], tmp_path / "short")
    with pytest.raises(UsageError, match="sequences of 17 tokens need this model's long rotary") as caught:
        train(config(), folder, [Record("a", [5] * 6, (Side(1, [6] * 11),))], [], tmp_path / "long")
    assert (caught.value.where, caught.value.hint) == ("--max-length", "--max-length 16")
    # KTO puts a prompt before the responses to another one.
    crossed = [Record("a", [5] * 10, (Side(1, [6]),)), Record("b", [5], (Side(1, [6] * 10),))]
    with pytest.raises(UsageError, match="sequences of 20 tokens"):
        train(config(loss="kto"), folder, crossed, [], tmp_path / "kto")
    train(config(loss="kto", epochs=1, max_length=16), folder, crossed, [], tmp_path / "kto-cut")


def test_an_empty_test_split_is_said(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = train(config(eval_every=1, epochs=1), model_dir, make_records(8), [], tmp_path)
    assert "the test split is empty" in capsys.readouterr().err
    assert summary["test"] is None


def test_log_every_keeps_the_last_step(model_dir: Path, tmp_path: Path) -> None:
    train(config(log_every=5), model_dir, make_records(16), [], tmp_path)
    assert [line["step"] for line in lines(tmp_path)] == [5, 10, 12]


def test_reports_change_no_step(model_dir: Path, tmp_path: Path) -> None:
    """Fewer lines, a test split, another cadence of checkpoints: the trained bytes are the same."""
    variants = [{}, {"log_every": 4}, {"eval_every": 3}, {"save_every": 2}]
    saved = []
    for i, fields in enumerate(variants):
        train(config(**fields, epochs=3), model_dir, make_records(16), make_records(3, seed=5), tmp_path / str(i))
        saved.append((tmp_path / str(i) / "model" / "model.safetensors").read_bytes())
    assert len(set(saved)) == 1


def test_sft_leaves_out_records_without_a_chosen_response(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = make_records(10, pairs=False)
    summary = train(config(loss="sft", epochs=1), model_dir, records, [], tmp_path)
    assert (summary["records"], summary["records_left_out"]) == (5, 5)
    assert "5 records have no response" in capsys.readouterr().err
    assert not (tmp_path / "home").exists(), "no reference without a use for it"
    with pytest.raises(UsageError, match="finds no chosen response"):
        train(config(loss="sft"), model_dir, records[1::2], [], tmp_path / "none")


def test_dpo_needs_pairs(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs both sides") as caught:
        train(config(loss="dpo"), model_dir, make_records(4) + make_records(1, seed=1, pairs=False), [], tmp_path)
    assert "--loss bnf" in str(caught.value.hint) and "--pairing-ratio 1" in str(caught.value.hint)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (Record("x", [], (Side(1, [4]),)), "at least one token"),
        (Record("x", [4], (Side(1, []),)), "at least one token"),
        (Record("x", [4], ()), "at least one token"),
        (Record("x", [4] * 20, (Side(1, [4]), Side(-1, [5] * 13))), "33 tokens; --max-length is 32"),
        (Record("x", [4], (Side(1, [4]), Side(-1, [VOCABULARY]))), "token 307 is not in the model's vocabulary of 307"),
        (Record("x", [999, 4], (Side(1, [4]),)), "token 999 is not in"),
        (Record("x", [4], (Side(1, [4, -100]),)), "token -100 is not in"),
    ],
)
def test_records_that_cannot_be_trained_on(record: Record, says: str, model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        train(config(max_length=32), model_dir, [record], [], tmp_path)
    assert caught.value.where == "record x"
    assert not list(tmp_path.iterdir())
    # A record of the test split is refused where there is a report on it, and else not looked at.
    asked = config(max_length=32, eval_every=2)
    with pytest.raises(UsageError, match=says):
        train(asked, model_dir, make_records(2), [record], tmp_path)


@pytest.mark.parametrize("label", [1, -1])
@pytest.mark.parametrize("loss", sorted(name for name in tables.LOSSES if not make(name).needs_pairs))
def test_all_responses_of_one_label(loss: str, label: int, model_dir: Path, tmp_path: Path) -> None:
    records = [r for r in make_records(16, pairs=False) if r.sides[0].label == label]
    if label not in make(loss).labels:
        with pytest.raises(UsageError, match="finds no chosen response"):
            train(config(loss=loss), model_dir, records, [], tmp_path)
        return
    train(config(loss=loss, epochs=2), model_dir, records, [], tmp_path)
    first, last = lines(tmp_path)
    own, other = ("chosen", "rejected") if label > 0 else ("rejected", "chosen")
    assert (last[f"logp_{own}"] - first[f"logp_{own}"]) * label > 0
    assert first[f"logp_{other}"] is first[f"objective_{other}"] is None


@pytest.mark.parametrize("loss", ["sft", "bnf"])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_parameters_that_are_not_finite(number: float, loss: str, tmp_path: Path) -> None:
    """In a row that no record uses, too: the softmax of any token would have it."""
    folder = write_model(tmp_path / "m", tie_word_embeddings=False)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][300, 5] = number
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"lm_head\.weight has numbers that are not finite") as caught:
        train(config(loss=loss), folder, make_records(4), [], tmp_path / "work")
    assert caught.value.where == str(folder)
    assert not (tmp_path / "work" / "home").exists()


def test_a_number_that_is_not_finite_stops_the_run(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(BnfctlError, match=r"step \d+: the gradient norm is") as caught:
        train(config(lr=1e30, warmup=0, clip=0), model_dir, make_records(16), [], tmp_path)
    assert caught.value.hint is not None and "--lr" in caught.value.hint
    assert not (tmp_path / "model").exists()


def test_logits_that_overflow_make_no_reference(tmp_path: Path) -> None:
    """Finite parameters whose products are not."""
    folder = write_model(tmp_path / "m", tie_word_embeddings=False)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][300] = 3e38
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UsageError, match="the logits of this LlamaForCausalLM are not finite"):
        train(config(), folder, make_records(4), [], tmp_path / "work")
    assert not list((tmp_path / "work" / "home").glob("reference/*"))


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    asked = config(lr=1.0, warmup=0.1)
    rates = [learning_rate(asked, step, 100) for step in range(101)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.5) and rates[100] == pytest.approx(0, abs=1e-12)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(config(lr=1.0, warmup=0), 0, 1) == 1.0
    assert learning_rate(config(lr=1.0, warmup=1), 4, 5) == 1.0


def test_every_optimizer_field_arrives(model_dir: Path) -> None:
    asked = config(lr=0.5, beta1=0.6, beta2=0.7, eps=0.25, weight_decay=0.125)
    matrices, vectors = make_optimizer(asked, load(asked, model_dir, ALONE, sharded=False)).param_groups
    for group, decay in ((matrices, 0.125), (vectors, 0.0)):
        assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.5, (0.6, 0.7), 0.25, decay)
    assert {p.ndim for p in matrices["params"]} == {2} and {p.ndim for p in vectors["params"]} == {1}
