"""OpenAI's own client, unchanged, on a tiny model through the real library."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest

from ggufkit.llamacpp.batching import ContextOptions
from ggufkit.llamacpp.sampling import SamplingParams
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.serve.hosting import Hosted, HostOptions, load
from ggufkit.serve.requests import Request
from tests.llamacpp.test_batching import tiny
from tests.serve.serving import TEMPLATE, Running, serving

USER = [{"role": "user", "content": "Say something long enough to be remembered."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"sky": {"$ref": "#/$defs/sky"}, "hot": {"type": "boolean"}},
            "required": ["sky", "hot"],
            "$defs": {"sky": {"enum": ["grey", "blue"]}},
        },
    },
}


@pytest.fixture(scope="module")
def model(native: NativeBuild, tmp_path_factory: pytest.TempPathFactory) -> Hosted:
    directory = tmp_path_factory.mktemp("tiny")
    gguf = tiny(native, directory, "llama")
    template = directory / "template.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    context = ContextOptions(context=512, cells=2048, batch=64, threads=1)
    options = HostOptions(context=context, chat_template=str(template), parallel=4)
    return load("tiny", gguf, options)


@pytest.fixture(scope="module")
def api(model: Hosted) -> Iterator[Running]:
    with serving(model) as running:
        yield running


@pytest.fixture(scope="module")
def client(api: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def ask(client: openai.OpenAI, messages: Any = USER, **fields: Any) -> Any:
    wanted = {"max_tokens": 8, "temperature": 0, **fields}
    return client.chat.completions.create(model="tiny", messages=messages, **wanted)


def test_whole_and_streamed_answers_are_the_same(client: openai.OpenAI) -> None:
    whole = ask(client)
    parts = list(ask(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(p.choices[0].delta.content or "" for p in parts if p.choices)
    assert text == whole.choices[0].message.content
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens == 8


def test_a_growing_conversation_is_computed_once(client: openai.OpenAI) -> None:
    first = ask(client)
    messages = [*USER, {"role": "assistant", "content": first.choices[0].message.content}]
    second = ask(client, [*messages, {"role": "user", "content": "More"}])
    usage = second.usage
    assert usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 1
    assert usage.prompt_tokens > first.usage.prompt_tokens


def test_seeds_make_answers_repeat(client: openai.OpenAI) -> None:
    def say(seed: int) -> str:
        return str(ask(client, seed=seed, temperature=2.0).choices[0].message.content)

    assert say(2**40) == say(2**40)
    assert len({say(n) for n in range(4)}) > 1


def test_logprobs_and_biases(client: openai.OpenAI) -> None:
    answer = ask(client, logprobs=True, top_logprobs=3).choices[0]
    for token in answer.logprobs.content:
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)
        assert token.bytes == list(token.token.encode()) or token.token.startswith("bytes:")
    forced = ask(client, logit_bias={"100": 100}, logprobs=True).choices[0].logprobs.content
    assert len({t.token for t in forced}) == 1


@pytest.mark.parametrize("dialect", ["<tool_call>", "[TOOL_CALLS]", "<|python_tag|>"])
def test_a_forced_call_is_one_whatever_the_model(model: Hosted, dialect: str) -> None:
    from ggufkit.llamacpp.conversing import ChatTemplate
    from ggufkit.llamacpp.rendering import Renderer
    from ggufkit.serve.prompts import PromptMaker

    before = model.prompts
    template = TEMPLATE.replace("<tool_call>", dialect)
    model.prompts = prompts = PromptMaker(Renderer(ChatTemplate(template)))
    other = {"type": "function", "function": {"name": "other"}}
    choice = {"type": "function", "function": {"name": "weather"}}
    try:
        with serving_again(model) as client:
            answer = ask(
                client, tools=[other, WEATHER], tool_choice=choice, max_tokens=200, temperature=1
            ).choices[0]
    finally:
        model.prompts = before
        prompts.close()
    assert answer.finish_reason == "tool_calls"
    (call,) = answer.message.tool_calls
    assert call.function.name == "weather"
    arguments = json.loads(call.function.arguments)
    assert arguments["sky"] in ("grey", "blue")
    assert isinstance(arguments["hot"], bool)


def test_a_conversation_with_functions(client: openai.OpenAI) -> None:
    """What the client gave is handed back as it came, with the function's result."""
    messages: list[Any] = [*USER]
    for _ in range(2):
        asked = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 200}
        message = ask(client, messages, temperature=1, **asked).choices[0].message
        (call,) = message.tool_calls
        messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "12 degrees"}]
    free = ask(client, messages, tools=[WEATHER], parallel_tool_calls=False)
    assert free.usage.completion_tokens == 8
    assert free.usage.prompt_tokens_details.cached_tokens > 0


def test_the_clients_helpers(client: openai.OpenAI) -> None:
    """They check each event, and put the answer together again."""

    class Found(pydantic.BaseModel):
        sky: Literal["grey", "blue"]
        hot: bool

    asked: dict[str, Any] = {"model": "tiny", "messages": USER, "max_tokens": 100, "seed": 1}
    whole = client.chat.completions.parse(response_format=Found, **asked)
    assert isinstance(whole.choices[0].message.parsed, Found)
    function = {**WEATHER["function"], "strict": True}  # type: ignore[dict-item]
    called = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    with client.chat.completions.stream(**asked, **called) as stream:  # type: ignore[arg-type]
        kinds = {event.type for event in stream}
        message = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.done" in kinds
    assert message.tool_calls is not None
    assert message.tool_calls[0].function.name == "weather"


def test_completions_of_many_kinds(client: openai.OpenAI, model: Hosted) -> None:
    def complete(prompt: Any = "Once upon", **fields: Any) -> Any:
        asked = {"max_tokens": 6, "temperature": 0, **fields}
        return client.completions.create(model="tiny", prompt=prompt, **asked)

    (choice,) = complete().choices
    streamed = list(complete(stream=True, stream_options={"include_usage": True}))
    assert "".join(c.text for e in streamed for c in e.choices) == choice.text
    assert streamed[-1].usage.completion_tokens == complete().usage.completion_tokens == 6
    assert complete(model.tokenize("Once upon")).choices[0].text == choice.text
    assert [c.text for c in complete(["Once upon"] * 2, n=2).choices] == [choice.text] * 4
    assert complete(echo=True).choices[0].text == f"Once upon{choice.text}"
    assert complete(stop=choice.text[-2:]).choices[0].finish_reason == "stop"
    drawn = {"temperature": 1.5, "top_p": 0.9, "presence_penalty": 1, "seed": 3, "user": "u"}
    assert complete(**drawn).choices[0].text == complete(**drawn).choices[0].text


def test_the_models_are_listed(client: openai.OpenAI) -> None:
    (found,) = client.models.list().data
    assert found == client.models.retrieve("tiny")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("a/b")


def test_answers_follow_schemas_and_grammars(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = ask(client, response_format=wanted, max_tokens=60).choices[0]
    assert json.loads(answer.message.content)["a"] in (1, 2)
    some = ask(client, extra_body={"grammar": 'root ::= "yes" | "no"'}, max_tokens=20)
    assert some.choices[0].message.content in ("yes", "no")


def test_a_grammar_that_never_ends_is_bounded(client: openai.OpenAI) -> None:
    answer = ask(client, extra_body={"grammar": 'root ::= "a"*'}, max_tokens=30).choices[0]
    assert set(answer.message.content) <= {"a"}
    full = ask(client, extra_body={"grammar": 'root ::= "a"+ "b"'}, max_tokens=None)
    assert full.usage.total_tokens <= 512


def test_prompts_are_scored_as_answers_are(client: openai.OpenAI, model: Hosted) -> None:
    """What an evaluation asks: echo and logprobs, for tokens, in batches."""
    prompt = model.tokenize("Once upon a time there was")
    request = Request(prompt, SamplingParams(temperature=0), max_tokens=6, logprobs=1)
    written = model.engine.submit(request).answer()
    batch = [[*prompt, *written.tokens], prompt]
    asked = {"max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    scored = client.completions.create(model="tiny", prompt=batch, **asked)  # type: ignore[call-overload]
    first = scored.choices[0].logprobs
    assert first is not None
    assert first.token_logprobs is not None
    assert first.top_logprobs is not None
    assert first.token_logprobs[0] is None
    assert len(first.token_logprobs) == len(prompt) + 6 + 1
    found = first.token_logprobs[len(prompt) : -1]
    assert found == pytest.approx([c.logprob for c in written.chosen], abs=1e-3)
    for value, top in zip(found, first.top_logprobs[len(prompt) : -1], strict=True):
        assert value == max(top.values()), "the greedy answer is the likeliest"


def test_embeddings(client: openai.OpenAI, model: Hosted) -> None:
    texts = ["one text", "another", "one text"]
    rows = client.embeddings.create(model="tiny", input=texts).data
    assert rows[0].embedding == pytest.approx(rows[2].embedding)
    assert rows[0].embedding != pytest.approx(rows[1].embedding)
    tokens = client.embeddings.create(model="tiny", input=[model.tokenize(t) for t in texts]).data
    assert tokens[1].embedding == pytest.approx(rows[1].embedding)
    plain = client.embeddings.create(model="tiny", input="one text", encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(rows[0].embedding, abs=1e-6)


def test_errors_are_the_clients_own(client: openai.OpenAI, api: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'none'"):
        client.chat.completions.create(model="none", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.BadRequestError, match="context"):
        ask(client, [{"role": "user", "content": "word " * 2000}])
    with pytest.raises(openai.BadRequestError, match="grammar"):
        ask(client, extra_body={"grammar": "root ::= ("})
    with serving_again(None, keys=("right",)) as other, pytest.raises(openai.AuthenticationError):
        other.models.list()


def test_leaving_a_stream_frees_the_model(client: openai.OpenAI, model: Hosted) -> None:
    from tests.serve.serving import eventually

    stream = ask(client, stream=True, max_tokens=400)
    next(iter(stream))
    stream.close()
    eventually(lambda: model.engine.metrics().running == 0)


def test_many_at_once(api: Running) -> None:
    import asyncio

    async def all_of_them() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key="x") as client:
            jobs = (
                client.completions.create(
                    model="tiny", prompt=f"Number {n}", max_tokens=5, temperature=0
                )
                for n in range(40)
            )
            return list(await asyncio.gather(*jobs))

    answers = asyncio.run(all_of_them())
    assert all(a.usage.completion_tokens <= 5 for a in answers)


class serving_again:  # noqa: N801 - reads as a function
    """The same model on another server, which does not close it in the end."""

    def __init__(self, model: Hosted | None, **options: Any) -> None:
        from dataclasses import replace

        from ggufkit.serve.api.models import Offer

        borrowed = replace(model) if model else None
        if borrowed is not None:
            borrowed.close = lambda **_: None  # type: ignore[method-assign]
        self._serving = serving(Offer("tiny", 1, lambda: borrowed), **options)  # type: ignore[arg-type,return-value]

    def __enter__(self) -> openai.OpenAI:
        api = self._serving.__enter__()
        self._client = openai.OpenAI(base_url=f"{api.url}/v1", api_key="wrong", max_retries=0)
        return self._client

    def __exit__(self, *error: Any) -> None:
        self._client.close()
        self._serving.__exit__(*error)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    from ggufkit.errors import GgufkitError

    with pytest.raises(GgufkitError):
        load("x", tmp_path / "none.gguf")
