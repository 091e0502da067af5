"""Conversations that show images."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ggufkit.errors import IntegrityError, SourceError, UsageError
from ggufkit.llamacpp.batching import ContextOptions
from ggufkit.llamacpp.conversing import ChatTemplate
from ggufkit.llamacpp.images import Seen
from ggufkit.llamacpp.template import Message
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.serve.chat import Conversation, Style
from ggufkit.serve.dialogue import converse
from ggufkit.serve.engine import Engine
from ggufkit.serve.model import ChatModel, Sampling
from ggufkit.serve.requests import Request
from tests.chatting import FakeModel
from tests.pictures import picture
from tests.serve.backends import FakeBackend, expected
from tests.serve.test_dialogue import Recorder, reader

GREEDY = Sampling(temperature=0, max_tokens=6)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(seeing: tuple[Path, Path], native: NativeBuild) -> Iterator[ChatModel]:
    path, mmproj = seeing
    room = ContextOptions(context=512, threads=1)
    with ChatModel(path, context=room, mmproj=mmproj, build=native) as loaded:
        yield loaded


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "one.png", tmp_path / "two.png"]
    for seed, path in enumerate(paths):
        path.write_bytes(picture(seed))
    return paths


def asking(text: str, *images: Path) -> list[Message]:
    return [{"role": "user", "content": text, "images": [str(path) for path in images]}]


def say(model: ChatModel, messages: list[Message]) -> str:
    return "".join(model.stream(messages, GREEDY))


def test_an_image_changes_the_answer(model: ChatModel, images: list[Path]) -> None:
    one, two = (say(model, asking("What is it?", path)) for path in images)
    assert one != two
    assert one != say(model, asking("What is it?"))
    both = model._tokens(asking("Both?", *images))
    assert len(both.images) == 2 * len(model._tokens(asking("One?", images[0])).images)
    assert say(model, asking("Both?", *images))


def test_an_image_that_was_seen_is_not_computed_again(
    model: ChatModel, images: list[Path], seeing: tuple[Path, Path], native: NativeBuild
) -> None:
    first = asking("What is it?", images[0])
    answer = say(model, first)
    more: list[Message] = [
        *first,
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "Sure?"},
    ]
    second = say(model, more)
    prompt = model._tokens(more)
    assert model.statistics.cached_tokens > max(prompt.images)
    room = ContextOptions(context=512, threads=1)
    with ChatModel(seeing[0], context=room, mmproj=seeing[1], build=native) as fresh:
        assert say(fresh, more) == second
        assert fresh.statistics.cached_tokens == 0


def test_an_image_stays_what_it_was_when_it_was_shown(model: ChatModel, images: list[Path]) -> None:
    before = say(model, asking("What is it?", images[0]))
    images[0].write_bytes(picture(7))
    assert say(model, asking("What is it?", images[0])) == before


def test_images_that_cannot_be_shown(model: ChatModel, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be read"):
        model.look(tmp_path / "none.png")
    text = tmp_path / "text.png"
    text.write_text("this is text")
    with pytest.raises(UsageError, match=r"text\.png: this is no image"):
        model.look(text)


def test_a_model_without_a_projector_says_what_it_needs(
    seeing: tuple[Path, Path], native: NativeBuild, images: list[Path]
) -> None:
    with (
        ChatModel(seeing[0], context=ContextOptions(context=64), build=native) as blind,
        pytest.raises(UsageError, match="need the model's projector") as caught,
    ):
        blind.look(images[0])
    # There is one beside it.
    assert f"--mmproj {seeing[1]}" in caught.value.hint


# Templates that want content in parts.

PARTS = (
    "{% for m in messages %}{{ m.role }}:{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}\n{% endfor %}"
)
EITHER = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}"
    "{% else %}parts{% endif %}{% endfor %}"
)


def test_a_template_gets_what_it_wants() -> None:
    said: list[Message] = [{"role": "user", "content": "Hello"}]
    assert ChatTemplate(PARTS).render(said) == "user:Hello"
    assert ChatTemplate(EITHER).render(said) == "Hello"


# The conversation.


def test_an_image_is_part_of_the_next_message(tmp_path: Path) -> None:
    model = FakeModel(["A dog"], ["Yes"])
    model.sees = True
    conversation, writer = Conversation(model), Recorder()
    converse(conversation, reader("/image dog.png", "What is it?", "Sure?"), writer)
    assert ("say", "the next message shows dog.png, 4 x 3 pixels") in writer.told
    shown = [message.get("images") for message in conversation.history]
    assert shown == [[str(Path("dog.png").absolute())], None, None, None]
    saved = tmp_path / "talk.json"
    conversation.save(saved)
    again = Conversation(FakeModel())
    again.load(saved)
    assert again.history == conversation.history
    saved.write_text(
        saved.read_text().replace(str(Path("dog.png").absolute()), "").replace('""', "7")
    )
    with pytest.raises(IntegrityError):
        again.load(saved)


def test_an_image_waits_until_there_is_an_answer() -> None:
    model = FakeModel([UsageError("too long")], ["A dog"])
    model.sees = True
    conversation = Conversation(model)
    conversation.show(Path("dog.png"))
    with pytest.raises(UsageError, match="too long"):
        list(conversation.ask("What is it?"))
    assert list(conversation.ask("And now?")) == ["A dog"]
    assert conversation.history[0]["images"]
    conversation.show(Path("cat.png"))
    conversation.reset()
    assert conversation._images == []


def test_a_completion_shows_nothing() -> None:
    with pytest.raises(UsageError, match="a completion has no images"):
        Conversation(FakeModel(), style=Style(completion=True)).show(Path("dog.png"))


# The engine.


def test_images_are_computed_where_they_stand() -> None:
    first, second = Seen((-1, -2, -3), None), Seen((-7, -8), None)  # type: ignore[arg-type]
    prompt = [5, 6, *first.tokens, 9, *second.tokens, 10, 11]
    images = {2: first, 6: second}
    backend = FakeBackend(batch=4)
    engine = Engine(backend)
    try:
        others = [engine.submit(Request([20 + n], max_tokens=8)) for n in range(2)]
        answer = engine.submit(Request(prompt, images=images, max_tokens=4)).answer()
        assert list(answer.tokens) == expected(prompt, 4)
        assert [list(o.answer().tokens) for o in others] == [
            expected([20 + n], 8) for n in range(2)
        ]
        again = engine.submit(Request([*prompt, 12], images=images, max_tokens=4)).answer()
        assert list(again.tokens) == expected([*prompt, 12], 4)
        assert len(backend.seen) == 2
        with pytest.raises(UsageError, match="not among the model's"):
            engine.submit(Request([5, -1]))
    finally:
        engine.close(drain=False)


def test_images_find_room_when_others_are_set_back() -> None:
    image = Seen(tuple(range(-30, 0)), None)  # type: ignore[arg-type]
    backend = FakeBackend(context=64, cells=64, batch=8)
    engine = Engine(backend)
    try:
        prompts = [[*b"first", *image.tokens, 9], [*b"other", *image.tokens, 8]]
        tickets = [
            engine.submit(Request(p, images={5: image}, max_tokens=20, remember=False))
            for p in prompts
        ]
        answers = [list(ticket.answer().tokens) for ticket in tickets]
        assert answers == [expected(p, 20) for p in prompts]
    finally:
        engine.close(drain=False)


# The command.


def test_the_command_shows_images(
    run_cli: Run, seeing: tuple[Path, Path], images: list[Path]
) -> None:
    model, mmproj = seeing
    ask = ["chat", model, "-p", "What is it?", "-st", "-n", "6", "--temp", "0", "-c", "512"]
    told = [run_cli(*ask, "--mmproj", mmproj, "--image", path) for path in images]
    assert [code for code, _, _ in told] == [0, 0]
    assert told[0][1] != told[1][1]
    code, _, err = run_cli(*ask, "--image", images[0])
    assert code == 2
    assert "--mmproj" in err
