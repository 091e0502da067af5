"""The endpoints, over a model that is no model."""

import base64
import json
import struct
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest

from ggufkit.serve.api.errors import ApiError
from ggufkit.serve.api.models import Offer
from ggufkit.serve.api.options import Limits
from tests.serve.backends import FakeBackend, expected
from tests.serve.serving import Running, hosted, serving, told

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'


@pytest.fixture(scope="module")
def backend() -> FakeBackend:
    made = FakeBackend(context=4096, cells=32768, batch=512)
    made.scripts[1] = [*b"good day", 0]
    made.scripts[2] = [*f"Let me see. {CALL}".encode(), 0]
    made.scripts[4] = [*f"{CALL}\n{CALL}".encode(), 0]
    made.scripts[3] = ["é€😀".encode()[n] for n in range(9)] + [0]
    return made


@pytest.fixture(scope="module")
def api(backend: FakeBackend) -> Iterator[Running]:
    with serving(hosted(backend)) as running:
        yield running


def events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, last = [line for line in response.text.split("\n\n") if line]
    assert last == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


# Conversations.


def test_a_chat_is_answered(api: Running) -> None:
    answer = api.chat("hi", seed=1).json()
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "fake"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "good day", "refusal": None}
    assert (choice["finish_reason"], choice["logprobs"]) == ("stop", None)
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len("<user>hi<a>")
    assert usage["completion_tokens"] == 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + 8


def test_a_chat_streams(api: Running) -> None:
    response = api.chat("hi", seed=1, stream=True, stream_options={"include_usage": True})
    first, *pieces, end, usage = events(response)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(p["choices"][0]["delta"]["content"] for p in pieces) == "good day"
    assert (end["choices"][0]["delta"], end["choices"][0]["finish_reason"]) == ({}, "stop")
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 8)
    assert all(p["usage"] is None for p in (first, *pieces, end))
    assert len({e["id"] for e in (first, *pieces, end, usage)}) == 1


def test_without_being_asked_a_stream_tells_no_usage(api: Running) -> None:
    assert not any("usage" in e for e in events(api.chat(seed=1, stream=True)))


def test_characters_are_whole_in_a_stream(api: Running) -> None:
    found = events(api.chat(seed=3, stream=True))
    pieces = [e["choices"][0]["delta"].get("content") for e in found]
    assert [p for p in pieces if p] == ["é", "€", "😀"]


def test_several_choices_have_their_own_seeds(api: Running) -> None:
    answer = api.chat(n=2, seed=0, max_tokens=40).json()
    first, second = answer["choices"]
    assert second["message"]["content"] == "good day"
    assert (first["index"], second["index"], first["finish_reason"]) == (0, 1, "length")
    assert answer["usage"]["prompt_tokens"] == len("<user>hi<a>"), "one prompt counts once"
    streamed = events(api.chat(n=2, seed=0, max_tokens=40, stream=True))
    for choice in (first, second):
        own = [c for e in streamed for c in e["choices"] if c["index"] == choice["index"]]
        text = "".join(c["delta"].get("content", "") for c in own)
        assert text == choice["message"]["content"]


def test_logprobs_of_chats(api: Running) -> None:
    answer = api.chat(seed=1, logprobs=True, top_logprobs=2).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert "".join(c["token"] for c in content) == "good day"
    assert all(bytes(c["bytes"]).decode() == c["token"] for c in content)
    assert all(len(c["top_logprobs"]) == 2 and c["logprob"] < 0 for c in content)
    assert "top_logprobs" in told(api.chat(top_logprobs=2), 400)["message"]


def test_messages_become_a_prompt(api: Running, backend: FakeBackend) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {
            "role": "developer",
            "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}],
        },
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]
    body = {"messages": messages, "max_tokens": 1, "temperature": 0, "repeat_penalty": 1.1}
    assert api.http.post("/v1/chat/completions", json=body).status_code == 200
    prompt = bytes(backend.samplers[-1].primed).decode()
    spelled = '{"name": "f", "arguments": {"x": 1}}'
    assert prompt == f"<system>be brief<assistant>{spelled}<tool>42<a>"


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_length_is_limited(api: Running, limit: str) -> None:
    answer = api.chat(**{limit: 3}).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3


def test_stop_strings_end_an_answer(api: Running) -> None:
    for stop in ("d d", ["zzz", "d d"]):
        choice = api.chat(seed=1, stop=stop).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("goo", "stop")


# Functions.


def test_a_call_of_a_function_is_told_from_text(api: Running) -> None:
    choice = api.chat(seed=2, tools=[WEATHER]).json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert choice["message"]["content"] == "Let me see. "
    assert choice["finish_reason"] == "tool_calls"
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}
    assert len(call["id"]) == 9


def test_calls_stream(api: Running) -> None:
    found = events(api.chat(seed=2, tools=[WEATHER], stream=True))
    deltas = [e["choices"][0]["delta"] for e in found]
    assert "".join(d.get("content") or "" for d in deltas) == "Let me see. "
    (call,) = [c for d in deltas for c in d.get("tool_calls", [])]
    assert call["index"] == 0
    assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}
    assert found[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_several_calls_unless_one_is_asked_for(api: Running) -> None:
    for stream in (False, True):
        for fields, count in (({}, 2), ({"parallel_tool_calls": False}, 1)):
            answer = api.chat(seed=4, tools=[WEATHER], stream=stream, **fields)
            told_of = (
                [e["choices"][0]["delta"] for e in events(answer)]
                if stream
                else [answer.json()["choices"][0]["message"]]
            )
            calls = [call for part in told_of for call in part.get("tool_calls", [])]
            assert len({call["id"] for call in calls}) == count


def test_without_tools_a_call_is_text(api: Running) -> None:
    for fields in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        message = api.chat(seed=2, **fields).json()["choices"][0]["message"]
        assert message["content"] == f"Let me see. {CALL}"
        assert "tool_calls" not in message


def test_a_choice_must_be_among_the_tools(api: Running) -> None:
    choice = {"type": "function", "function": {"name": "other"}}
    assert told(api.chat(tools=[WEATHER], tool_choice=choice), 400)["param"] == "tool_choice"
    assert told(api.chat(tool_choice="required"), 400)["param"] == "tool_choice"
    asked = api.chat(tools=[WEATHER], grammar='root ::= "a"')
    assert told(asked, 400)["param"] == "tool_choice"
    assert told(api.chat(functions=[]), 400)["param"] == "functions"


# Completions.


def test_a_text_is_gone_on_with(api: Running) -> None:
    answer = api.complete("hello", max_tokens=5).json()
    assert answer["object"] == "text_completion"
    (choice,) = answer["choices"]
    assert choice["text"] == bytes(expected(b"hello", 5)).decode()
    assert (choice["finish_reason"], choice["logprobs"]) == ("length", None)
    assert len(api.complete("hello").json()["choices"][0]["text"]) == 16


@pytest.mark.parametrize(
    "prompt", [["ab", "cde"], [list(b"ab"), list(b"cde")]], ids=["texts", "tokens"]
)
def test_many_prompts_in_one_request(api: Running, prompt: Any) -> None:
    answer = api.complete(prompt, max_tokens=3, n=2).json()
    texts = [choice["text"] for choice in answer["choices"]]
    wanted = [bytes(expected(p, 3)).decode() for p in (b"ab", b"ab", b"cde", b"cde")]
    assert texts == wanted
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 5


def test_more_prompts_than_may_wait_are_all_answered() -> None:
    prompts = [f"prompt {n}" for n in range(60)]
    with serving(hosted(queue=4)) as api:
        choices = api.complete(prompts, max_tokens=2).json()["choices"]
    assert [c["text"] for c in choices] == [
        bytes(expected(p.encode(), 2)).decode() for p in prompts
    ]


def test_echo_and_logprobs_of_the_prompt(api: Running) -> None:
    asked = {"max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    (choice,) = api.complete(list(b"abc"), **asked).json()["choices"]
    logprobs = choice["logprobs"]
    assert choice["text"].startswith("abc")
    assert logprobs["tokens"][:3] == ["a", "b", "c"]
    assert logprobs["token_logprobs"][:3] == [None, -0.98, -0.99]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == 4
    alone = api.complete("abc", **{**asked, "max_tokens": 0}).json()["choices"][0]
    assert alone["text"] == "abc"
    assert alone["logprobs"]["token_logprobs"] == [None, -0.98, -0.99]


def test_completions_stream(api: Running) -> None:
    found = events(api.complete("hello", max_tokens=4, stream=True, echo=True, logprobs=0))
    text = "".join(e["choices"][0]["text"] for e in found)
    assert text == "hello" + bytes(expected(b"hello", 4)).decode()
    told_tokens = [t for e in found for t in (e["choices"][0]["logprobs"] or {}).get("tokens", [])]
    assert "".join(told_tokens) == text
    offsets = [o for e in found for o in (e["choices"][0]["logprobs"] or {}).get("text_offset", [])]
    assert offsets == list(range(9))


def test_what_cannot_be_is_refused(api: Running) -> None:
    assert told(api.complete(suffix="x"), 400)["param"] == "suffix"
    assert told(api.complete(best_of=3), 400)["param"] == "best_of"
    assert told(api.complete(max_tokens=0), 400)["param"] == "max_tokens"
    assert "not among" in told(api.complete([300]), 400)["message"]
    assert "not among" in told(api.complete([-1], echo=True, logprobs=1), 400)["message"]
    assert "empty" in told(api.complete(""), 400)["message"]
    assert told(api.complete([[]]), 400)
    assert told(api.complete(["x"] * 1025, n=2), 400)["param"] == "n"
    many = api.complete(["x" * 4000] * 24, echo=True, logprobs=20)
    assert told(many, 400)["param"] == "logprobs"


# Embeddings and tokens.


def test_a_text_to_embed_ends_as_the_tokenizer_ends_it(api: Running) -> None:
    asked = {"input": ["ab", "abc"]}
    usage = api.http.post("/v1/embeddings", json=asked).json()["usage"]
    assert usage["prompt_tokens"] == len("ab$") + len("abc$")
    tokens = api.http.post("/v1/embeddings", json={"input": [list(b"ab")]}).json()["usage"]
    assert tokens["prompt_tokens"] == len("ab"), "tokens are taken as they are"
    assert api.chat("x").json()["usage"]["prompt_tokens"] == len("<user>x<a>")


def test_embeddings_are_of_length_one(api: Running) -> None:
    asked = {"input": ["ab", "c"]}
    answer = api.http.post("/v1/embeddings", json=asked).json()
    vectors = [row["embedding"] for row in answer["data"]]
    assert [sum(x * x for x in v) for v in vectors] == pytest.approx([1, 1])
    assert vectors[0][0] / vectors[0][1] == pytest.approx((97 + 98 + 36) / 3)
    assert answer["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    packed = api.http.post("/v1/embeddings", json={**asked, "encoding_format": "base64"}).json()
    raw = base64.b64decode(packed["data"][0]["embedding"])
    assert struct.unpack("<2f", raw) == pytest.approx(vectors[0])
    refused = api.http.post("/v1/embeddings", json={**asked, "dimensions": 2})
    assert told(refused, 400)["param"] == "dimensions"
    long = api.http.post("/v1/embeddings", json={"input": "x" * 100})
    assert told(long, 400)["code"] == "context_length_exceeded"


def test_tokens_there_and_back(api: Running) -> None:
    found = api.http.post("/tokenize", json={"content": "héllo"}).json()
    assert found == {"tokens": list("héllo".encode()), "count": 6, "max_model_len": 4096}
    back = api.http.post("/detokenize", json={"tokens": found["tokens"]}).json()
    assert back["content"] == "héllo"
    assert api.http.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []
    assert api.http.post("/detokenize", json={"tokens": []}).json()["content"] == ""
    assert told(api.http.post("/tokenize", json={}), 400)
    assert told(api.http.post("/detokenize", json={"tokens": [256]}), 400)


# What the server says of itself.


def test_models_are_listed(api: Running) -> None:
    (model,) = api.http.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("fake", "model")
    api.chat(max_tokens=1)
    assert api.http.get("/v1/models/fake").json()["max_model_len"] == 4096
    assert told(api.http.get("/v1/models/none"), 404)["code"] == "model_not_found"


def test_health_and_metrics(api: Running) -> None:
    api.chat(max_tokens=3)
    assert api.http.get("/health").json() == {"status": "ok"}
    found = api.http.get("/metrics")
    assert found.headers["content-type"].startswith("text/plain")
    lines = dict(
        line.rsplit(" ", 1) for line in found.text.splitlines() if not line.startswith("#")
    )
    assert float(lines['ggufkit_generated_tokens_total{model="fake"}']) >= 3
    assert float(lines['ggufkit_running{model="fake"}']) == 0
    assert float(lines['ggufkit_finished_total{model="fake",reason="length"}']) >= 1
    key = 'ggufkit_requests_total{path="/v1/chat/completions",status="200"}'
    assert float(lines[key]) >= 1


# Bad input.


BAD = {
    "not JSON": b'{"messages": [',
    "not UTF-8": b'{"messages": "\xff"}',
    "NaN": b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    "infinity": b'{"messages": [{"role": "user", "content": "x"}], "top_p": 1e999}',
    "half a surrogate pair": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "nested": b"[" * 100_000,
    "a list": b"[]",
    "nothing": b"",
    "no messages": b'{"messages": []}',
    "a role that is none": b'{"messages": [{"role": "king", "content": "x"}]}',
    "an image": b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
}


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_what_is_not_text_is_refused_by_name(api: Running, kind: str) -> None:
    content = [{"type": "text", "text": "What is it?"}, {"type": kind, kind: {"url": "data:,"}}]
    messages = [{"role": "user", "content": content}]
    error = told(api.http.post("/v1/chat/completions", json={"messages": messages}), 400)
    assert f"type '{kind}'" in error["message"]
    assert "text alone, without images" in error["message"]
    assert error["param"] == "messages.0.content"


@pytest.mark.parametrize("body", BAD.values(), ids=BAD)
def test_malformed_requests(api: Running, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    told(api.http.post("/v1/chat/completions", content=body, headers=headers), 400)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -1},
        {"temperature": "hot"},
        {"top_p": 2},
        {"top_k": -3},
        {"min_p": -0.1},
        {"repeat_penalty": 0},
        {"presence_penalty": 1e9},
        {"max_tokens": 0},
        {"max_tokens": -5},
        {"max_tokens": 1.5},
        {"n": 0},
        {"n": 1000},
        {"stop": ""},
        {"stop": ["x"] * 100},
        {"stop": "x" * 257},
        {"logit_bias": {"-1": 1}},
        {"logit_bias": {"x": 1}},
        {"logit_bias": {"1": 1e30}},
        {"logprobs": True, "top_logprobs": 21},
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "odd"}}}},
        {"tools": [{"type": "function", "function": {"name": "no spaces"}}]},
        {"chat_template_kwargs": {"messages": []}},
        {"grammar": 'root ::= (((("x"?){100}){100}){100}){100}'},
    ],
    ids=lambda fields: str(fields)[:60],
)
def test_values_that_make_no_sense(api: Running, fields: dict[str, Any]) -> None:
    assert told(api.chat(**fields), 400)["type"] == "invalid_request_error"


def test_a_grammar_of_a_hundred_thousand_parentheses(api: Running) -> None:
    assert told(api.chat(grammar="root ::= " + "(" * 100_000), 400)


def test_a_prompt_over_the_context_is_refused_and_never_cut(api: Running) -> None:
    error = told(api.chat("x" * 5000), 400)
    assert error["code"] == "context_length_exceeded"
    assert "4096" in error["message"]
    assert told(api.complete("x" * 5000, echo=True, logprobs=1), 400)["code"] == error["code"]


def test_unknown_models_paths_and_methods(api: Running) -> None:
    error = told(api.chat(model="gpt-5"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    told(api.http.get("/v1/nothing"), 404)
    told(api.http.get("/v1/chat/completions"), 405)


def test_a_text_that_cannot_fit_is_not_even_tokenized(api: Running) -> None:
    words = api.service.models.loaded[0].words
    before, asked = words.tokenize, list[int]()
    words.tokenize = lambda text, **_: asked.append(len(text)) or [1]  # type: ignore[method-assign,func-returns-value]
    try:
        error = told(api.complete("x" * 1_000_000), 400)
    finally:
        words.tokenize = before  # type: ignore[method-assign]
    assert (error["code"], asked) == ("context_length_exceeded", [])
    told(api.http.post("/tokenize", json={"content": "x" * (1 << 20) + "x"}), 400)


def test_a_flood_of_messages_holds_nobody_up(api: Running) -> None:
    body = {"messages": [{"role": "nobody"}] * 200_000}
    assert "role" in told(api.http.post("/v1/chat/completions", json=body), 400)["message"]
    body = {"messages": [{"role": "user", "content": ""}] * 10_001}
    assert told(api.http.post("/v1/chat/completions", json=body), 400)["param"] == "messages"


def test_a_large_request_is_refused(api: Running) -> None:
    error = told(api.chat("x" * 10_000_000), 413)
    assert error["code"] == "request_too_large"

    def pieces() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 100_000

    headers = {"Content-Type": "application/json"}
    told(api.http.post("/v1/chat/completions", content=pieces(), headers=headers), 413)
    assert api.chat(seed=1).status_code == 200


def test_a_refusal_of_the_template_is_told() -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with serving(hosted(template=template)) as api:
        error = told(api.chat(), 400)
    assert "roles must alternate" in error["message"]


def test_a_model_without_a_template_completes() -> None:
    with serving(hosted(template=None)) as api:
        assert told(api.chat(), 400)["code"] == "no_chat_template"
        assert api.complete("x").status_code == 200


# Keys and other pages.


def test_keys_let_in() -> None:
    with serving(hosted(), keys=("first", "s\u00e9cond")) as api:
        for key in ("wrong", "firs", "first-"):
            response = api.http.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert told(response, 401)["code"] == "invalid_api_key"
        assert told(api.http.get("/v1/models"), 401)["type"] == "authentication_error"
        told(api.http.get("/metrics"), 401)
        for key in ("first", "s\u00e9cond"):
            headers = {"Authorization": f"Bearer {key}".encode()}
            assert api.http.get("/v1/models", headers=headers).status_code == 200
        assert api.http.get("/health").status_code == 200


def test_other_pages_may_ask_only_if_they_are_named() -> None:
    asked = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
    with serving(hosted()) as api:
        assert "access-control-allow-origin" not in api.http.get("/health", headers=asked).headers
    with serving(hosted(), keys=("k",), origins=("http://page",)) as api:
        allowed = api.http.options("/v1/models", headers=asked)
        assert allowed.headers["access-control-allow-origin"] == "http://page"
        assert "POST" in allowed.headers["access-control-allow-methods"]
        refused = api.http.options("/v1/models", headers={**asked, "Origin": "http://other"})
        assert refused.status_code == 400


def test_the_server_limits_lengths() -> None:
    with serving(hosted(), limits=Limits(max_tokens=4, shutdown_seconds=0.1)) as api:
        assert api.chat(max_tokens=50).json()["usage"]["completion_tokens"] == 4
        assert api.chat().json()["usage"]["completion_tokens"] == 4


def test_pages_elsewhere_cannot_pass_for_this_machine() -> None:
    """By a name of theirs that leads here, or by a form that browsers send unasked."""
    with serving(hosted(), own_names=True) as api:
        port = api.address[1]
        for name in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "[::"):
            response = api.http.get("/v1/models", headers={"Host": name})
            assert told(response, 403)["code"] == "unknown_host"
        for name in ("localhost", f"localhost:{port}", "[::1]:80", "10.0.0.7", "a.localhost"):
            assert api.http.get("/v1/models", headers={"Host": name}).status_code == 200
        body = b'{"prompt": "x"}'
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            told(
                api.http.post("/v1/completions", content=body, headers={"Content-Type": kind}), 400
            )
        told(api.http.post("/v1/completions", content=body), 400)


# Several models.


def test_models_are_loaded_on_demand_and_the_longest_unused_goes() -> None:
    made: dict[str, list[Any]] = {"a": [], "b": [], "c": []}

    def offer(name: str) -> Offer:
        def load() -> Any:
            made[name].append(hosted(name=name))
            return made[name][-1]

        return Offer(name, 10, load)

    with serving(*map(offer, "abc"), limit_nbytes=25) as api:
        assert told(api.chat(), 400)["param"] == "model"
        for name in "aba":
            assert api.chat(model=name, max_tokens=1).json()["model"] == name
        assert {n: len(m) for n, m in made.items()} == {"a": 1, "b": 1, "c": 0}
        assert api.chat(model="c", max_tokens=1).status_code == 200
        loaded = {m["id"]: m["loaded"] for m in api.http.get("/v1/models").json()["data"]}
        assert loaded == {"a": True, "b": False, "c": True}
        assert not made["b"][0].engine.healthy
        assert made["b"][0].scorer.closed
        assert api.chat(model="b", max_tokens=1).status_code == 200
        assert len(made["b"]) == 2
    assert not any(m.engine.healthy for models in made.values() for m in models)


def test_a_model_in_use_is_not_unloaded() -> None:
    backend = FakeBackend(gated=True)
    first = hosted(backend, "a")
    offers = (Offer("a", 10, lambda: first), Offer("b", 10, lambda: hosted(name="b")))
    with serving(*offers, limit_nbytes=15, wait_seconds=0.3) as api:
        body = {"prompt": "x", "model": "a", "stream": True, "max_tokens": 3}
        backend.allow(1)
        with api.http.stream("POST", "/v1/completions", json=body) as stream:
            refused = told(api.chat(model="b"), 503)
            assert refused["code"] == "no_memory"
            backend.allow(5)
            assert b"[DONE]" in stream.read()
        assert api.chat(model="b", max_tokens=1).status_code == 200
        assert not first.engine.healthy


def test_a_model_that_cannot_be_loaded_is_told_each_time() -> None:
    def load() -> Any:
        raise ApiError(500, "broken file", code="model_not_loaded")

    with serving(Offer("bad", 1, load), hosted(name="good")) as api:
        for _ in range(2):
            assert told(api.chat(model="bad"), 500)["code"] == "model_not_loaded"
        assert api.chat(model="good", max_tokens=1).status_code == 200


def test_a_model_whose_engine_failed_is_loaded_again() -> None:
    backend = FakeBackend()
    made = [hosted(backend, template=None), hosted(template=None)]
    queue = list(made)
    with serving(Offer("m", 1, lambda: queue.pop(0))) as api:
        assert api.complete("x").status_code == 200
        made[0].engine.close(drain=False)
        assert api.complete("x").status_code == 200
        assert not queue
