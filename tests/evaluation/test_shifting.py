"""The shift analysis of a run: its rows and figures, resume, processes, figure 4's bins, memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bnfctl import console, machine, pool, shards
from bnfctl.analysis.shifts import SCHEMA, Shifts
from bnfctl.artifact import Artifact, Plan, Store
from bnfctl.config import EvalConfig
from bnfctl.data.records import Candidate
from bnfctl.errors import BnfctlError, Interrupted, UsageError
from bnfctl.evaluation import shifting
from bnfctl.evaluation.shifting import FOLDER, bins, figures, measure
from tests import reference
from tests.conftest import REPOSITORY
from tests.model.tiny import VOCABULARY, write_model

CONFIG = EvalConfig(model="policy", tasks=("shifts",), dtype="float32", chunk=2)
TOKENS = ("ll", "z", "lse", "z3", "z4")
LENGTHS = ((5, 9), (1, 4), (12, 31), (3, 2), (8, 17), (1, 6), (7, 3))
"""(prompt, response)"""


def candidates(times: int = 1) -> list[Candidate]:
    """Of seven prompts, or a multiple; the third response was cut off."""
    random = np.random.default_rng(4)
    drawn = [[random.integers(3, VOCABULARY, length).tolist() for length in pair] for pair in LENGTHS * times]
    return [
        Candidate(f"p{i}", 0, "text", response, "length" if i == 2 else "stop", 7, prompt)
        for i, (prompt, response) in enumerate(drawn)
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(policy, reference): two draws of two layers."""
    root = tmp_path_factory.mktemp("models")
    return write_model(root / "policy", torch.float32, 0), write_model(root / "reference", torch.float32, 1)


def measured(
    config: EvalConfig, store: Store, models: tuple[Path, Path], given: Iterable[Candidate] | None = None
) -> Artifact:
    """What the stage does with a draft, from the responses on."""
    with store.draft(Plan("eval", 2, config, {})) as draft:
        draft.open()
        return draft.publish(measure(config, draft, candidates() if given is None else given, *models))


def rows_of(artifact: Artifact) -> list[dict[str, Any]]:
    return list(artifact.rows(folder=FOLDER))


def exact(folder: Path, found: Candidate) -> torch.Tensor:
    """[T, V] logits of the response's places in float64, by the whole model on this sequence alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    assert found.prompt_ids and found.token_ids
    ids = torch.tensor([[*found.prompt_ids, *found.token_ids[:-1]]])
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits[0, len(found.prompt_ids) - 1 :]


def test_a_run_measures_what_the_exact_twin_does(store: Store, models: tuple[Path, Path]) -> None:
    made = measured(CONFIG, store, models)
    rows, summary = rows_of(made), made.manifest.summary
    assert {entry["path"].split("/")[0] for entry in made.manifest.files} == {FOLDER} and made.verify() == []
    assert [(row["prompt_id"], row["tokens"], row["cut"]) for row in rows] == [
        (f"p{i}", length, i == 2) for i, (_, length) in enumerate(LENGTHS)
    ]
    twins = []
    for row, candidate in zip(rows, candidates(), strict=True):
        policy, ref = (exact(folder, candidate) for folder in models)
        twins.append(reference.shifts(policy, ref, torch.tensor(candidate.token_ids)))
        for name in TOKENS:
            np.testing.assert_allclose(row[f"token_{name}"], twins[-1][name].numpy(), rtol=0, atol=1e-5, err_msg=name)
    assert (summary["n"], summary["prompts"], summary["total_tokens"]) == (7, 7, sum(n for _, n in LENGTHS))
    for name, tokens in {
        "ll_mean": [twin["ll"].mean() for twin in twins],
        "ll_sum": [twin["ll"].sum() for twin in twins],
        "ll_sum_absolute": [twin["ll"].sum().abs() for twin in twins],
        "z1_mean_absolute": [twin["z"].mean().abs() for twin in twins],
        "z2_mean": [twin["z"].abs().mean() for twin in twins],
        "z2_sum": [twin["z"].abs().sum() for twin in twins],
        "z3_mean": [twin["z3"].mean() for twin in twins],
        "z4_mean": [twin["z4"].mean() for twin in twins],
        "gini": [reference.gini(twin["z"].abs()) for twin in twins],
    }.items():
        values = [float(value) for value in tokens]
        half = NormalDist().inv_cdf(0.975) * stdev(values) / 7**0.5
        wanted = {"mean": fmean(values), "low": fmean(values) - half, "high": fmean(values) + half}
        assert summary[name] == pytest.approx(wanted, abs=1e-4), name
    pooled = reference.gini(torch.cat([twin["z"].abs() for twin in twins]))
    assert summary["gini_pooled"] == pytest.approx(float(pooled), abs=1e-5)
    assert 0 < summary["deviation"] == max(row["deviation"] for row in rows) < 1e-5
    z2, ll = ([row[f"{name}_mean"] for row in rows] for name in ("z2", "ll"))
    assert summary["correlation"]["mean"]["pearson"] == pytest.approx(np.corrcoef(z2, ll)[0, 1])
    assert summary["cut"] == pytest.approx(1 / 7) and summary["uncut"]["n"] == 6
    assert summary["uncut"]["ll_sum"] == pytest.approx(fmean(row["ll_sum"] for row in rows if not row["cut"]))
    json.dumps(summary, allow_nan=False)


def test_a_model_has_not_moved_from_itself(store: Store, models: tuple[Path, Path]) -> None:
    made = measured(CONFIG, store, (models[0], models[0]))
    summary = made.manifest.summary
    for row in rows_of(made):
        assert not any(any(row[f"token_{name}"]) for name in TOKENS)
    for name in ("ll_sum", "ll_mean", "z1_sum", "z2_mean", "z3_mean", "z4_sum", "gini", "z1_sum_absolute"):
        assert summary[name] == {"mean": 0, "low": 0, "high": 0}, name
    assert summary["gini_pooled"] == summary["deviation"] == 0
    assert summary["correlation"]["mean"] == {"pearson": None, "spearman": None}


def test_micro_batches_change_nothing_but_the_rounding(tmp_path: Path, models: tuple[Path, Path]) -> None:
    one, other = (
        rows_of(measured(replace(CONFIG, chunk=size), Store(tmp_path / str(size)), models)) for size in (1, 256)
    )
    for row, same in zip(one, other, strict=True):
        assert row["sequence"] == same["sequence"]
        for name in TOKENS:
            np.testing.assert_allclose(row[f"token_{name}"], same[f"token_{name}"], rtol=0, atol=1e-5)


def test_a_resumed_run_has_the_bytes_of_an_undisturbed_one(
    store: Store, tmp_path: Path, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for parts in (1, 2, 3):
        with monkeypatch.context() as patch:
            patch.setattr(console, "_signal", signal.SIGINT)
            with pytest.raises(Interrupted):
                measured(CONFIG, store, models, candidates() if parts == 1 else ())
        assert len(list(store.home.glob(".drafts/*/scratch/shift-parts/*.parquet"))) == parts
    resumed = measured(CONFIG, store, models, ())
    undisturbed = measured(CONFIG, Store(tmp_path / "undisturbed"), models)
    assert resumed.manifest.digest == undisturbed.manifest.digest
    assert resumed.manifest.summary == undisturbed.manifest.summary
    assert resumed.manifest.provenance["shifts"].startswith("transformers ")


KILLED = """
import json, sys
from pathlib import Path
from bnfctl.artifact import Store
from tests.evaluation.test_shifting import CONFIG, candidates, measured
from dataclasses import replace
policy, reference, home = map(Path, sys.argv[1:])
measured(replace(CONFIG, chunk=1, devices=2), Store(home), (policy, reference), candidates(6))
"""


@pytest.mark.slow
def test_two_processes_and_a_kill_leave_the_bytes_of_one(
    store: Store, tmp_path: Path, models: tuple[Path, Path]
) -> None:
    command = [sys.executable, "-c", KILLED, *map(str, models), str(store.home)]
    process = subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    try:
        deadline = time.monotonic() + 120
        while len(list(store.home.glob(".drafts/*/scratch/shift-parts/*.parquet"))) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    time.sleep(1.0)  # its workers notice
    left = len(list(store.home.glob(".drafts/*/scratch/shift-parts/*.parquet")))
    assert 2 <= left < 6 * len(LENGTHS), "killed in the middle"
    resumed = measured(replace(CONFIG, chunk=1, devices=2), store, models, candidates(6))
    undisturbed = measured(replace(CONFIG, chunk=1), Store(tmp_path / "undisturbed"), models, candidates(6))
    assert resumed.manifest.digest == undisturbed.manifest.digest


@pytest.mark.parametrize(
    ("gpus", "threads", "devices", "job"),
    [
        (0, 1, 3, (3, 1, False)),
        (0, 4, 3, (1, 4, False)),  # else each process would round by its own share of the threads
        (0, 1, 99, (4, 1, False)),  # no more than units
        (2, 4, None, (2, 4, True)),
        (1, 4, None, (1, 4, True)),
    ],
)
def test_processes(
    gpus: int, threads: int, devices: int | None, job: tuple[int, int, bool], store: Store,
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen: list[pool.Job] = []

    def refuse(job: pool.Job, units: Sequence[int]) -> Any:
        seen.append(job)
        assert list(units) == [0, 1, 2, 3]
        raise UsageError("enough")

    monkeypatch.setattr(machine, "visible_gpus", lambda: gpus)
    monkeypatch.setattr(shifting, "cpu_threads", lambda folder: threads)
    monkeypatch.setattr(pool, "run", refuse)
    with pytest.raises(UsageError, match="enough"):
        measured(replace(CONFIG, devices=devices, sampler="hf"), store, models)
    with pytest.raises(UsageError, match="enough"):
        measured(replace(CONFIG, devices=devices, sampler="vllm"), store, models)
    assert [(one.workers, one.threads, one.apart) for one in seen] == [job, (*job[:2], True)]


def test_a_gpu_that_is_too_small_says_so(
    store: Store, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(Shifts, "measure", full)
    with pytest.raises(BnfctlError, match=r"don't fit: CUDA out of memory. Tried to allocate 2 GiB\.$") as caught:
        measured(CONFIG, store, models)
    assert caught.value.hint is not None and "--dtype bfloat16" in caught.value.hint


def test_no_responses_are_an_error(store: Store, models: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="no responses"):
        measured(CONFIG, store, models, ())


def shift_row(number: int, tokens: Sequence[float], cut: bool | None = False, prompt: str = "") -> dict[str, Any]:
    """A row of SCHEMA whose ll and z are `tokens`."""
    row: dict[str, Any] = {
        "prompt_id": prompt or f"p{number}", "sample": 0, "sequence": f"s{number}", "tokens": len(tokens), "cut": cut,
        "gini": 0.5, "gini_corrected": 0.6, "deviation": number * 1e-7,
        **{f"token_{name}": list(tokens) for name in TOKENS},
    }  # fmt: skip
    for name in ("ll", "z1", "z2", "z3", "z4"):
        values = [abs(x) for x in tokens] if name in ("z2", "z3", "z4") else tokens
        row |= {f"{name}_sum": sum(values), f"{name}_mean": fmean(values)}
    return row


def test_figures_by_hand(tmp_path: Path) -> None:
    rows = [shift_row(1, [1, -2], None), shift_row(2, [-3, -3, 0], True), shift_row(3, [4, 4], False)]
    shards.write_shards(tmp_path, rows, SCHEMA)
    found = figures(tmp_path)
    assert (found["n"], found["tokens"], found["total_tokens"]) == (3, pytest.approx(7 / 3), 7)
    assert found["ll_sum"]["mean"] == pytest.approx((-1 - 6 + 8) / 3)
    assert found["ll_sum_absolute"]["mean"] == pytest.approx((1 + 6 + 8) / 3)
    assert found["z1_mean"]["mean"] == pytest.approx((-0.5 - 2 + 4) / 3)
    assert found["z2_mean"]["mean"] == pytest.approx((1.5 + 2 + 4) / 3)
    assert found["gini_pooled"] == pytest.approx(float(reference.gini(torch.tensor([1.0, 2, 3, 3, 0, 4, 4]))))
    assert found["correlation"]["sum"]["spearman"] == pytest.approx(0.5)  # z2 3 6 8 with ll -1 -6 8
    assert found["deviation"] == 3e-7
    assert found["cut"] is None and found["uncut"]["n"] == 2
    assert found["uncut"]["ll_sum"] == pytest.approx(3.5)


def test_responses_to_one_prompt_are_no_two_witnesses(tmp_path: Path) -> None:
    """Each prompt twice: n doubles, the interval stays."""
    random = np.random.default_rng(0)
    single = [shift_row(i, random.normal(size=5).tolist()) for i in range(8)]
    shards.write_shards(tmp_path / "once", single, SCHEMA)
    shards.write_shards(tmp_path / "twice", [row for row in single for _ in range(2)], SCHEMA)
    once, twice = figures(tmp_path / "once"), figures(tmp_path / "twice")
    assert (once["n"], once["prompts"], twice["n"], twice["prompts"]) == (8, 8, 16, 8)
    assert twice["ll_sum"] == pytest.approx(once["ll_sum"])
    assert once["cut"] == 0 and "uncut" not in once


def test_bins_on_the_same_responses_are_paired() -> None:
    dpo = [shift_row(0, [-5, -4, -3, -2, -1]), shift_row(1, [1, 2, 3, 4, 5])]
    bnf = [shift_row(1, [0.1, 0.2, 0.3, 0.4, 0.5]), shift_row(0, [-0.5, -0.4, -0.3, -0.2, -0.1])]
    found = bins({"dpo": iter(dpo), "bnf": iter(bnf)}, "dpo")
    assert found.paired is not None and found.why is None
    means = {name: [one.mean for one in found.paired if one.method == name] for name in ("dpo", "bnf")}
    assert means["dpo"] == pytest.approx([-5, -4, -3, -2, -1, 1, 2, 3, 4, 5])
    assert means["bnf"] == pytest.approx([value / 10 for value in means["dpo"]])
    shares = {name: [one.share for one in found.histogram if one.method == name] for name in ("dpo", "bnf")}
    assert shares["dpo"] == pytest.approx([0.1] * 10)
    # DPO's deciles end at -5, -4, ... -1, 1, ...: the five below 0 lie above -1, and so up to 1 do all others
    assert shares["bnf"] == pytest.approx([0, 0, 0, 0, 0, 1, 0, 0, 0, 0])


def test_bins_on_responses_of_their_own_are_a_histogram() -> None:
    dpo, simpo = [shift_row(0, list(range(20)))], [shift_row(1, [0.0, 0.0, 19.0])]
    found = bins({"simpo": simpo, "dpo": dpo}, "dpo", 5)
    assert found.paired is None and found.why is not None and "in common" in found.why
    assert [one.share for one in found.histogram if one.method == "simpo"] == pytest.approx([2 / 3, 0, 0, 0, 1 / 3])
    assert [one.share for one in found.histogram if one.method == "dpo"] == pytest.approx([0.2] * 5)


def test_bins_say_what_they_lack() -> None:
    rows = [shift_row(0, [1.0, 2.0])]
    with pytest.raises(UsageError, match=r"no shifts of 'dop' \(did you mean 'dpo'\?\)") as caught:
        bins({"dpo": rows, "bnf": rows}, "dop")
    assert caught.value.hint == "one of: dpo, bnf"
    with pytest.raises(UsageError, match="dpo has 2 response tokens; its bins need 10"):
        bins({"bnf": rows, "dpo": rows}, "dpo")
    with pytest.raises(UsageError, match="bnf has 0 response tokens"):
        bins({"bnf": [], "dpo": [shift_row(0, list(range(10)))]}, "dpo")


MEMORY = """
import sys
from pathlib import Path
import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from bnfctl.artifact import Store
from bnfctl.data.records import Candidate
from bnfctl.evaluation.shifting import Measuring
from dataclasses import replace
from tests.evaluation.test_shifting import CONFIG, candidates, measured

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024

folder, responses, V = Path(sys.argv[1]), int(sys.argv[2]), 128256
config = LlamaConfig(vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=1, max_position_embeddings=2048)
models = folder / "0", folder / "1"
for seed, model in enumerate(models):
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
random = np.random.default_rng(0)

def drawn():
    for number in range(responses):
        ids = random.integers(3, V, 1100).tolist()
        yield Candidate(f"p{number}", 0, "", ids[100:], "stop", 0, ids[:100])

loaded, load = 0.0, Measuring.__init__

def watched(self, request):
    global loaded
    load(self, request)
    loaded = status("VmRSS")

Measuring.__init__ = watched
made = measured(replace(CONFIG, chunk=4), Store(folder / f"artifacts-{responses}"), models, drawn())
assert made.manifest.summary["total_tokens"] == 1000 * responses
print(status("VmHWM") - loaded, made.manifest.summary["deviation"])
"""


@pytest.mark.slow
def test_a_thousand_long_responses_stay_under_two_gigabytes(tmp_path: Path) -> None:
    """At vocabulary 128k, from responses to figures: the peak beyond the models, and what each response adds to it."""

    # What is freed goes back to the system at once, so that the peak is of what is held, not of a fragmented heap.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "ARROW_DEFAULT_MEMORY_POOL": "system"}

    def peak(responses: int) -> float:
        command = [sys.executable, "-c", MEMORY, str(tmp_path), str(responses)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        mib, deviation = map(float, done.stdout.split())
        assert deviation < 1e-4
        return mib

    few, more = peak(2), peak(8)
    assert more < 500, (few, more)
    assert few + 1000 * max(0.0, more - few) / 6 < 2000, (few, more)
