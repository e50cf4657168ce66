from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from bnfctl import samplers
from bnfctl.config import GenerateConfig
from bnfctl.data.records import Prompt
from bnfctl.errors import UsageError
from tests import models


def decoding(**changes: object) -> samplers.Decoding:
    given = {"n": 1, "temperature": 0.0, "top_p": 1.0, "max_tokens": 8, "seed": 0}
    return samplers.Decoding(**{**given, **changes})  # type: ignore[arg-type]


def prompt(name: str, text: str) -> Prompt:
    return Prompt(name, ({"role": "user", "content": text},), where=f"prompts.jsonl:{name}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    models.make_tokenizer(path)
    (path / "config.json").write_text('{"max_position_embeddings": 40}')
    return path


def test_auto_takes_vllm_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers.importlib.util, "find_spec", lambda name: object() if name == "vllm" else None)
    assert samplers.resolve("auto") == "vllm"
    monkeypatch.setattr(samplers.importlib.util, "find_spec", lambda name: None)
    assert samplers.resolve("auto") == "hf"
    assert samplers.resolve("vllm") == "vllm"


def test_resolving_imports_no_engine() -> None:
    code = (
        "import sys; from bnfctl import samplers; samplers.resolve('auto'); import bnfctl.samplers.vllm\n"
        "assert not {'torch', 'transformers', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_several_greedy_responses_are_refused() -> None:
    with pytest.raises(UsageError, match="the same") as caught:
        decoding(n=2)
    assert caught.value.where == "--n"
    decoding(n=2, temperature=0.1)


def test_decoding_of_a_generate_config_takes_every_field() -> None:
    config = GenerateConfig(
        prompts="x", n=3, temperature=0.5, top_p=0.6, max_tokens=7, seed=8, chunk=9, dtype="float32", gpu_memory=0.4,
        trust_remote_code=True, chat_template_kwargs=("x=1",), tensor_parallel=2,
        long_prompts="drop",
    )  # fmt: skip
    wanted = samplers.Decoding(3, 0.5, 0.6, 7, 8, 9, "float32", 0.4, True, ("x=1",), 2, "drop")
    assert samplers.Decoding.of(config) == wanted


def test_prompt_seeds_are_fixed_and_have_53_bits() -> None:
    assert samplers.prompt_seed(0, "p0") == 2868716529404235  # a promise: the same for ever
    seeds = {samplers.prompt_seed(run, f"p{i}") for run in range(3) for i in range(1000)}
    assert len(seeds) == 3000
    assert max(seeds) < 2**53
    assert max(seeds) > 2**52
    ordered = sorted(seeds)
    assert min(b - a for a, b in itertools.pairwise(ordered)) > 1000
    samplers.prompt_seed(0, "half \ud83d")


def checked(folder: Path, prompts: list[Prompt], on_long: str) -> tuple[list[Prompt], int]:
    counts: Counter[str] = Counter()
    return list(samplers.check_prompts(folder, prompts, decoding(), on_long, counts)), counts["dropped_long"]


def test_prompts_that_do_not_fit(folder: Path) -> None:
    short, long = prompt("a", "hi"), prompt("b", "x" * 60)
    assert checked(folder, [short], "error") == ([short], 0)
    assert checked(folder, [long, short, long], "drop") == ([short], 2)
    with pytest.raises(UsageError) as caught:
        checked(folder, [short, long], "error")
    assert caught.value.where == "prompts.jsonl:b"
    assert "--long-prompts drop" in (caught.value.hint or "")


def test_prompts_are_checked_as_they_come(folder: Path) -> None:
    def endless() -> Iterator[Prompt]:
        for number in itertools.count():
            yield prompt(str(number), "hi")

    passed = samplers.check_prompts(folder, endless(), decoding(), "error", Counter())
    assert [one.id for one in itertools.islice(passed, 3)] == ["0", "1", "2"]


def test_a_prompt_needs_room_for_one_token(folder: Path) -> None:
    around = [prompt(str(size), "x" * size) for size in range(30, 40)]
    kept, dropped = checked(folder, around, "drop")
    tokenizer = samplers.load_tokenizer(folder, False)
    assert dropped == 10 - len(kept)
    assert len(samplers.render(tokenizer, kept[-1], {})) == 39
    made = samplers.requests(tokenizer, 40, kept, decoding(max_tokens=3))
    assert made[-1].max_tokens == 1
    assert all(request.max_tokens == min(3, 40 - len(request.ids)) for request in made)
    with pytest.raises(UsageError):
        samplers.requests(tokenizer, 40, around, decoding())
    dropped_here = samplers.requests(tokenizer, 40, around, decoding(long_prompts="drop"))
    assert [request.prompt_id for request in dropped_here] == [one.id for one in kept]


def test_arguments_of_the_chat_template_reach_every_rendering(tmp_path: Path) -> None:
    template = models.TEMPLATE + "{%- if not enable_thinking -%}{{- 'no thinking' -}}{%- endif -%}"
    tokenizer = models.make_tokenizer(tmp_path, template=template)
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 24}')
    asked = prompt("a", "hi")
    long, short = decoding(), decoding(chat_template_kwargs=("enable_thinking=true",))
    (plain,) = samplers.requests(tokenizer, 99, [asked], long)
    (thinking,) = samplers.requests(tokenizer, 99, [asked], short)
    assert tokenizer.decode(plain.ids[len(thinking.ids) :]) == "no thinking"
    assert plain.ids[: len(thinking.ids)] == thinking.ids
    counts: Counter[str] = Counter()
    limit = f'{{"max_position_embeddings": {len(plain.ids)}}}'
    (tmp_path / "config.json").write_text(limit)
    assert list(samplers.check_prompts(tmp_path, [asked], short, "drop", counts)) == [asked]
    assert list(samplers.check_prompts(tmp_path, [asked], long, "drop", counts)) == []


def test_a_prompt_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    models.make_tokenizer(tmp_path, template="{{ raise_exception('no') }}")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError) as caught:
        checked(tmp_path, [prompt("a", "x")], "drop")
    assert caught.value.where == "prompts.jsonl:a"


def test_candidate_ends_at_the_stop_or_the_limit(folder: Path) -> None:
    tokenizer = samplers.load_tokenizer(folder, False)
    request = samplers.Request("p", [1], 4, 0)
    done = samplers.candidate(tokenizer, request, 1, [71, 72, 259, 258, 258], [257, 259], 5)
    assert (done.text, done.token_ids, done.finish_reason, done.seed) == ("hi", [71, 72, 259], "stop", 5)
    cut = samplers.candidate(tokenizer, request, 0, [71, 72, 71, 72, 259], [257, 259], 5)
    assert (cut.text, cut.token_ids, cut.finish_reason) == ("hihi", [71, 72, 71, 72], "length")
