"""The server sampler against a stub: n children and their seeds, refusals, kills; and against vLLM's real server."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bnfctl.client.servers import Backoff
from bnfctl.config import GenerateConfig
from bnfctl.data.records import Candidate, Prompt
from bnfctl.errors import BnfctlError, UsageError
from bnfctl.samplers import Decoding, prompt_seed
from bnfctl.samplers.server import ServerSampler
from tests import models
from tests.conftest import REPOSITORY
from tests.real_server import vllm_server
from tests.stub_server import Call, StubServer, slow, text_of

PROMPTS = [Prompt(f"p{i}", ({"role": "user", "content": f"say {i}"},)) for i in range(20)]
CHUNKS = [(index, PROMPTS[start : start + 4]) for index, start in enumerate(range(0, 20, 4))]


def config(*urls: str, **changes: Any) -> GenerateConfig:
    given: dict[str, Any] = {
        "prompts": "p.jsonl", "sampler": "server", "server": urls, "n": 3, "max_tokens": 12, "concurrency": 4,
        "timeout": 5.0, "retries": 3,
    }  # fmt: skip
    return GenerateConfig(**{**given, **changes})


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    return tmp_path / "answers.sqlite"


def sample(made: GenerateConfig, answers: Path | None, folder: Path | None = None) -> list[Candidate]:
    sampler = ServerSampler(made, folder, answers, Backoff(0.01, 0.05))
    found = dict(sampler.sample(CHUNKS))
    assert sorted(found) == list(range(5))
    return [candidate for index in range(5) for candidate in found[index]]


def expected(n: int = 3) -> list[Candidate]:
    made = []
    for prompt in PROMPTS:
        seed = prompt_seed(0, prompt.id)
        for i in range(n):
            text = text_of({"messages": list(prompt.messages), "seed": seed}, i)
            made.append(Candidate(prompt.id, i, text, finish_reason="stop", seed=seed + i, source="stub"))
    return made


def test_one_request_per_prompt_with_n_children_and_its_own_seed(answers: Path) -> None:
    with StubServer() as stub:
        assert sample(config(stub.url), answers) == expected()
        assert len(stub.bodies) == 20
        body = stub.bodies[0]
        assert set(body) == {"model", "messages", "n", "seed", "temperature", "top_p", "max_tokens"}
        assert (body["n"], body["temperature"], body["top_p"], body["max_tokens"]) == (3, 0.8, 0.95, 12)


@pytest.mark.parametrize("cap", [1, 2])
def test_children_that_a_server_leaves_out_are_asked_for_one_by_one(cap: int, answers: Path) -> None:
    with StubServer(cap=cap) as stub:
        assert sample(config(stub.url), answers) == expected()
        assert len(stub.bodies) == 20 * (1 + 3 - cap)
        assert set(stub.asked.values()) == {1}
        assert sample(config(stub.url), answers) == expected()
        assert len(stub.bodies) == 20 * (1 + 3 - cap)


def test_a_server_that_refuses_n_is_asked_one_by_one(answers: Path) -> None:
    def fault(call: Call) -> bool:
        return "n" in call.body and call.send(400, {"error": {"message": "n must be 1"}})

    with StubServer(fault) as stub:
        assert sample(config(stub.url), answers) == expected()
        assert len(stub.bodies) == 80


def test_a_refusal_names_the_prompt_and_says_what_the_server_said(answers: Path) -> None:
    with StubServer(lambda call: call.send(400, {"error": {"message": "no such voice"}})) as stub:
        with pytest.raises(BnfctlError, match=r"prompt p\d+: 400 no such voice") as caught:
            sample(config(stub.url, n=1), answers)
        assert caught.value.exit_code == 1


def test_where_max_tokens_exceeds_the_context_the_context_decides(answers: Path) -> None:
    def fault(call: Call) -> bool:
        return "max_tokens" in call.body and call.send(400, {"message": "maximum context length is 16 tokens"})

    with StubServer(fault) as stub:
        assert sample(config(stub.url), answers) == expected()


def test_a_prompt_that_fills_the_context_is_an_error_or_dropped(answers: Path) -> None:
    def fault(call: Call) -> bool:
        return "say 7" in json.dumps(call.body) and call.send(400, {"message": "the prompt is too long"})

    with StubServer(fault) as stub:
        with pytest.raises(BnfctlError, match="p7: 400 the prompt is too long") as caught:
            sample(config(stub.url), answers)
        assert "--long-prompts drop" in (caught.value.hint or "")
        found = sample(config(stub.url, long_prompts="drop"), answers)
        assert found == [candidate for candidate in expected() if candidate.prompt_id != "p7"]


CONTENT = {"message": "Invalid prompt.", "type": "invalid_request_error", "code": "invalid_prompt"}


@pytest.mark.parametrize("status", [400, 403])
@pytest.mark.parametrize("refused", [1, 5])
def test_a_prompt_whose_content_is_refused_has_no_candidates_and_the_run_goes_on(
    status: int, refused: int, answers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nasty = [f"p{i}" for i in range(refused)]

    def fault(call: Call) -> bool:
        said = call.body["messages"][0]["content"]
        return said in [f"say {name[1:]}" for name in nasty] and call.send(status, {"error": CONTENT})

    with StubServer(fault) as stub:
        sampler = ServerSampler(config(stub.url), None, answers, Backoff(0.01, 0.05))
        found = dict(sampler.sample(CHUNKS))
        made = [candidate for index in range(5) for candidate in found[index]]
        assert made == [candidate for candidate in expected() if candidate.prompt_id not in nasty]
        assert sampler.usage["refused"] == refused and sum(stub.asked.values()) == 20
    told = capsys.readouterr().err.splitlines()
    assert len([line for line in told if "refuses the content of prompt p" in line]) == min(refused, 3)
    assert any("5 requests were refused" in line for line in told) == (refused == 5)
    assert f"{status} Invalid prompt. (the text is refused: invalid_prompt)" in told[0]


def test_a_forbidden_server_is_an_error(answers: Path) -> None:
    with StubServer(lambda call: call.send(403, {"error": {"message": "no access to this model"}})) as stub:
        with pytest.raises(BnfctlError, match="403 no access"):
            sample(config(stub.url), answers)


def test_a_model_that_wants_the_newer_name_of_max_tokens_gets_it(answers: Path) -> None:
    message = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."
    fault = lambda call: "max_tokens" in call.body and call.send(400, {"error": {"message": message}})  # noqa: E731
    with StubServer(fault) as stub:
        assert sample(config(stub.url), answers) == expected()
        old = [body for body in stub.bodies if "max_tokens" in body]
        assert 1 <= len(old) <= 2 * 4, "what was under way at the first refusal, and no more"
        assert [body["max_completion_tokens"] for body in stub.bodies if body not in old] == [12] * 20
        assert sample(config(stub.url), answers) == expected()
        assert len(stub.bodies) <= 20 + 4 * 4, "the answers were kept"


def test_a_parameter_that_the_server_does_not_know_drops_no_prompt(answers: Path) -> None:
    with StubServer(lambda call: call.send(400, {"message": "Unsupported parameter: 'max_tokens'"})) as stub:
        with pytest.raises(BnfctlError, match="Unsupported parameter: 'max_tokens'") as caught:
            sample(config(stub.url, long_prompts="drop"), answers)
        assert caught.value.hint is None


def test_faults_leave_no_trace_and_nothing_is_asked_twice(answers: Path) -> None:
    faults = {
        1: lambda call: call.send(429, {}, Retry_After="0.05"), 4: lambda call: call.send(500, {}), 5: Call.drop,
        9: lambda call: call.send(200, b"{"), 12: lambda call: call.send(200, {"choices": []}),
    }  # fmt: skip
    with StubServer(lambda call: call.number in faults and bool(faults[call.number](call))) as stub:
        assert sample(config(stub.url), answers) == expected()
        assert sum(stub.asked.values()) == 25
        assert set(stub.answered.values()) == {1}


def test_other_servers_and_another_chunk_size_ask_only_for_the_rest(answers: Path) -> None:
    with StubServer() as one:
        sampler = ServerSampler(config(one.url), None, answers)
        for _ in sampler.sample(CHUNKS[:2]):
            pass
    with StubServer() as two, StubServer() as three:
        assert sample(config(two.url, three.url, concurrency=9), answers) == expected()
        assert len(two.bodies) + len(three.bodies) == 12


def test_chunks_are_pulled_only_when_there_is_room() -> None:
    pulled = []

    def chunks() -> Iterator[tuple[int, list[Prompt]]]:
        for index, prompts in CHUNKS:
            pulled.append(index)
            yield index, prompts

    with StubServer(slow(0.02)) as stub:
        sampler = ServerSampler(config(stub.url, concurrency=1), None, None)
        found = sampler.sample(chunks())
        next(found)
        assert len(pulled) <= 3
        assert len(list(found)) == 4
        assert list(sampler.sample([(7, [])])) == [(7, [])]


def test_other_decoding_and_finish_reasons(answers: Path) -> None:
    def fault(call: Call) -> bool:
        reasons = ("stop", "length", "content_filter", None)
        choices = [{"message": {"content": "x"}, "finish_reason": reason} for reason in reasons]
        return call.send(200, {"choices": choices})

    with StubServer(fault) as stub:
        sampler = ServerSampler(config(stub.url), None, answers)
        ((_, found),) = sampler.sample(
            [(0, PROMPTS[:1])], Decoding(n=4, temperature=1.0, top_p=1.0, max_tokens=3, seed=5)
        )
        assert [candidate.finish_reason for candidate in found] == ["stop", "length", "content_filter", None]
        assert stub.bodies[0]["seed"] == prompt_seed(5, "p0")


def test_a_model_needs_vllm_and_so_do_template_arguments(tmp_path: Path) -> None:
    models.make_tokenizer(tmp_path)
    with StubServer() as stub:
        with pytest.raises(UsageError, match="is not vLLM") as caught:
            ServerSampler(config(stub.url), tmp_path, None)
        assert "leave --model out" in (caught.value.hint or "")
        with pytest.raises(UsageError, match="only vLLM's server"):
            ServerSampler(config(stub.url, chat_template_kwargs=("enable_thinking=false",)), None, None)
        assert not stub.bodies


def test_a_vllm_without_token_ids_is_an_error(tmp_path: Path, answers: Path) -> None:
    models.make_llama(tmp_path / "m")
    with StubServer(owner="vllm") as stub:
        with pytest.raises(BnfctlError, match="no token ids"):
            sample(config(stub.url), answers, tmp_path / "m")
        assert {body["return_token_ids"] for body in stub.bodies} == {True}


def test_a_prompt_longer_than_the_context_of_the_model(tmp_path: Path) -> None:
    models.make_llama(tmp_path / "m")
    long = [(0, [Prompt("long", ({"role": "user", "content": "x" * 300},), where="p.jsonl:1")])]
    with StubServer(owner="vllm") as stub:
        with pytest.raises(UsageError, match="the server's context is 256") as caught:
            list(ServerSampler(config(stub.url), tmp_path / "m", None).sample(long))
        assert caught.value.where == "p.jsonl:1"
        dropping = ServerSampler(config(stub.url, long_prompts="drop"), tmp_path / "m", None)
        assert list(dropping.sample(long)) == [(0, [])]


CHILD = """
import sys
from pathlib import Path
from tests.samplers.test_server import CHUNKS, ServerSampler, config
for index, _ in ServerSampler(config(sys.argv[2], concurrency=2), None, Path(sys.argv[1])).sample(CHUNKS):
    print(index, flush=True)
"""


def test_a_killed_run_goes_on_and_gives_the_same_candidates(answers: Path) -> None:
    with StubServer(slow(0.05), cap=2) as one:
        command = [sys.executable, "-c", CHILD, str(answers), one.url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as child:
            assert child.stdout is not None
            whole = int(child.stdout.readline())
            os.kill(child.pid, signal.SIGKILL)
    before = {identity for identity, _ in one.answered.items()}
    with StubServer(cap=2) as two, StubServer(cap=2) as three:
        assert sample(config(two.url, three.url, concurrency=7), answers) == expected()
        again = set(two.asked) | set(three.asked)
    assert len(again & before) <= 2  # in flight at the kill
    assert not [body for body in map(json.loads, again) if f"say {4 * whole}" == body["messages"][0]["content"]]


needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.make_llama(tmp_path_factory.mktemp("llama"), stop=1.2)


@pytest.fixture(scope="module")
def real(folder: Path) -> Iterator[str]:
    with vllm_server(folder) as url:
        yield url


def ids(candidates: list[Candidate]) -> list[tuple[Any, ...]]:
    return [(c.prompt_id, c.sample, c.token_ids, c.text, c.finish_reason, c.seed, c.prompt_ids) for c in candidates]


@pytest.mark.vllm
@needs_vllm
def test_real_server_gives_the_same_ids_as_the_engine_in_this_process(real: str, folder: Path, answers: Path) -> None:
    from bnfctl.samplers.vllm import VLLMSampler

    asked = config(real, dtype="float32", temperature=1.0)
    found = sample(asked, answers, folder)
    engine = VLLMSampler(folder, Decoding.of(asked))
    inside = dict(engine.sample(CHUNKS))
    assert ids(found) == ids([candidate for index in range(5) for candidate in inside[index]])
    assert {c.finish_reason for c in found} == {"stop", "length"}
    assert len({tuple(c.token_ids or ()) for c in found}) > 50  # top_k 2 of the generation config does not leak


@pytest.mark.vllm
@needs_vllm
def test_real_server_without_the_model_gives_the_same_texts(real: str, folder: Path, answers: Path) -> None:
    asked = config(real, temperature=1.0)
    sampler = ServerSampler(asked, None, answers)
    assert sampler.served.vllm
    assert sampler.served.context == 256
    assert sampler.version.startswith("server ") and ", vllm " in sampler.version
    chunks = dict(sampler.sample(CHUNKS))
    found = [candidate for index in sorted(chunks) for candidate in chunks[index]]
    with_ids = sample(asked, answers, folder)
    # half a character at the end: the server leaves it out, we show it
    assert [(c.prompt_id, c.sample, c.text.rstrip("�"), c.finish_reason, c.seed) for c in found] == [
        (c.prompt_id, c.sample, c.text.rstrip("�"), c.finish_reason, c.seed) for c in with_ids
    ]
    assert {c.finish_reason for c in found} == {"stop", "length"}
    assert {c.token_ids for c in found} == {None}


@pytest.mark.vllm
@needs_vllm
def test_real_server_with_a_long_prompt_and_another_tokenizer(real: str, tmp_path: Path) -> None:
    prompts = [
        Prompt("long", ({"role": "user", "content": "x" * 235},)),
        Prompt("full", ({"role": "user", "content": "x" * 300},)),
    ]
    sampler = ServerSampler(config(real, long_prompts="drop", max_tokens=100), None, None)
    ((_, found),) = sampler.sample([(0, prompts)])
    assert [c.prompt_id for c in found] == ["long"] * 3
    models.make_spaced_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="another tokenizer than --model"):
        ServerSampler(config(real), tmp_path, None)
