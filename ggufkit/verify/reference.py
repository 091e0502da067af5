"""What transformers says of a checkpoint: tokens, rendered conversations, predictions.

Run as a module it answers one line of JSON for each that it reads, so that its
imports and its memory are paid by a process of its own, beside the converter.
"""

import importlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggufkit.errors import CheckpointError, GgufkitError
from ggufkit.llamacpp.template import StoppedClock
from ggufkit.llamacpp.workers import serve, time_limit
from ggufkit.values import Json
from ggufkit.verify import probe

if TYPE_CHECKING:
    import torch

LOGITS, ROUNDED = "logits.npy", "rounded.npy"
"""Files of predictions: as the checkpoint is, and with inputs rounded as ggml rounds them."""
_TEMPLATE_SECONDS = 10.0
_SHARE_OF_MEMORY = 0.4
"""A model that takes more of the free memory than this, as float32, is streamed."""


def collect(request: Json, out: Path) -> dict[str, Json]:
    """Ask transformers.

    Args:
        request: ``checkpoint`` (directory), ``original`` (the same before anything was
            mended), ``trust_remote_code``, ``parameters``, ``available_nbytes`` of
            memory, ``threads``, ``stored`` (dtype of the GGUF's matrices), ``scratch``.
        out: a directory for the predictions.

    Returns:
        Values of JSON: ``tokenizer``, ``conversations``, ``predictions``, each with an
        ``error`` instead where transformers failed; and ``seconds``.
    """
    path = Path(request["checkpoint"])
    trust = bool(request["trust_remote_code"])
    started = time.monotonic()
    answer: dict[str, Json] = {}
    tokenizer: Any = None
    with _kept(answer, "tokenizer"):
        tokenizer = _load_tokenizer(path, trust)
        answer["tokenizer"] = _tokens(tokenizer)
    with _kept(answer, "conversations"):
        if tokenizer is not None and request["original"] != request["checkpoint"]:
            # Whether the right template was chosen is for the checkpoint as it was to say.
            chooser = _load_tokenizer(Path(request["original"]), trust)
            tokenizer.chat_template = chooser.chat_template
        answer["conversations"] = _conversations(tokenizer) if tokenizer is not None else []
    with _kept(answer, "predictions"):
        answer["predictions"] = _predictions(request, tokenizer, out)
    return {**answer, "seconds": round(time.monotonic() - started, 2)}


@contextmanager
def _kept(answer: dict[str, Json], name: str) -> Iterator[None]:
    """Keep what others' code raises as an answer: there is then nothing to compare with."""
    try:
        yield
    except Exception as error:  # transformers raises whatever comes its way
        text = " ".join(str(error).split())[:400]
        ours = isinstance(error, GgufkitError)
        answer[name] = {"error": text if ours else f"{type(error).__name__}: {text}"}


def _load_tokenizer(path: Path, trust: bool) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
    tokenizer.model_max_length = int(1e30)
    return tokenizer


# Tokens.


def _tokens(tokenizer: Any) -> dict[str, Json]:
    texts: dict[int, str] = {number: text for text, number in tokenizer.get_vocab().items()}
    added = [
        {
            "id": number,
            **{
                key: getattr(token, key)
                for key in ("content", "special", "normalized", "lstrip", "rstrip", "single_word")
            },
        }
        for number, token in sorted(tokenizer.added_tokens_decoder.items())
    ]
    lines = [
        *(("plain", text) for text in probe.PLAIN),
        *(("blank", text) for text in probe.BLANK),
        *(("rare", text) for text in probe.RARE),
        *(("plain", text) for text in probe.normalized_lines(_normalizer(tokenizer))),
        *probe.added_lines(added),
    ]
    bare, whole = (
        list(tokenizer("a b", add_special_tokens=special).input_ids) for special in (False, True)
    )
    at = next((n for n in range(len(whole)) if whole[n : n + len(bare)] == bare), 0)
    size = max(texts, default=-1) + 1
    return {
        "texts": [texts.get(n) for n in range(size)],
        "added": added,
        "lines": [[kind, text, encode(tokenizer, text)] for kind, text in lines],
        "begin": whole[:at],
        "end": whole[at + len(bare) :],
        "special": {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "unk")},
    }


def _normalizer(tokenizer: Any) -> Json:
    """What the tokenizer does to a text before it looks at it, as its file has it."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    return json.loads(normalizer.__getstate__()) if normalizer is not None else None


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text, with nothing put before or after it."""
    return [int(t) for t in tokenizer(text, add_special_tokens=False).input_ids]


def _conversations(tokenizer: Any) -> list[dict[str, Json]]:
    found = []
    if not getattr(tokenizer, "chat_template", None):
        return []
    for conversation in probe.CONVERSATIONS:
        texts, refused = _renderings(tokenizer, conversation)
        row: dict[str, Json] = {"name": conversation.name, "texts": texts, "refused": refused}
        row["ids"] = encode(tokenizer, texts[0]) if texts else []
        found.append(row)
    return found


def _renderings(tokenizer: Any, conversation: probe.Conversation) -> tuple[list[str], str]:
    """What the template makes of a conversation, of each form of it that it takes.

    Returns:
        The texts, that of the first form first; and why it refused one.
    """
    texts: list[str] = []
    refused = ""
    for messages in conversation.forms:
        try:
            with time_limit(_TEMPLATE_SECONDS):
                text = tokenizer.apply_chat_template(
                    messages, tools=conversation.tools, tokenize=False, add_generation_prompt=True
                )
        except TimeoutError as error:
            raise CheckpointError(f"the chat template does not end: {error}") from error
        except Exception as error:  # a template raises whatever Python has
            refused = refused or f"{type(error).__name__}: {error}"[:200]
            continue
        texts += [text] if text not in texts else []
    return texts, refused


# Predictions.


def _predictions(request: Json, tokenizer: Any, out: Path) -> dict[str, Json]:
    import numpy as np
    import torch
    from transformers import AutoConfig

    path, trust = Path(request["checkpoint"]), bool(request["trust_remote_code"])
    torch.set_num_threads(int(request["threads"]))
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
    raw = json.loads((path / "config.json").read_bytes())
    text_config = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise CheckpointError("the model has an encoder and a decoder")
    longest = int(getattr(text_config, "max_position_embeddings", None) or 1 << 30)
    length = probe.probe_length(raw, int(request["parameters"]), min(longest, 4096))
    tokens = _passage_tokens(tokenizer, length, int(text_config.vocab_size))
    positions = probe.probe_positions(len(tokens))
    halves = str(request.get("stored") or "") in ("F16", "BF16") or _has_gelu(config)
    with torch.inference_mode():
        model, loading = _load_model(config, request)
        exact, rounded = _forward(model, tokens, positions, halves, str(request.get("stored")))
    np.save(out / LOGITS, exact)
    if rounded is not None:
        np.save(out / ROUNDED, rounded)
    return {
        "tokens": tokens,
        "positions": positions,
        "rounded": rounded is not None,
        **loading,
    }


def _passage_tokens(tokenizer: Any, length: int, vocabulary: int) -> list[int]:
    found: list[int] = []
    if tokenizer is not None:
        found = list(tokenizer(probe.passage()).input_ids)
        found = [t for t in found if t < vocabulary]
    if not found:
        # Without a tokenizer any tokens must do; their order is arbitrary and fixed.
        found = [(7 * n * n + 3 * n) % vocabulary for n in range(length)]
    while len(found) < length:
        found += found[1:]
    return found[:length]


def _has_gelu(config: Any) -> bool:
    """Whether an activation is one that ggml reads from a table of half precision."""
    text = config.get_text_config()
    keys = ("hidden_act", "hidden_activation", "activation_function", "activation")
    return any("gelu" in str(getattr(text, key, "")).lower() for key in keys)


def _load_model(config: Any, request: Json) -> tuple[Any, dict[str, Json]]:
    import torch
    import transformers

    path, trust = Path(request["checkpoint"]), bool(request["trust_remote_code"])
    name = (config.architectures or [""])[0]
    maker = getattr(transformers, name, transformers.AutoModelForCausalLM)
    options: dict[str, Any] = {} if hasattr(transformers, name) else {"trust_remote_code": trust}
    if 4 * int(request["parameters"]) > _SHARE_OF_MEMORY * int(request["available_nbytes"]):
        options |= _streaming(maker, config, Path(request["scratch"]), options)
    model, info = maker.from_pretrained(
        path,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
        **options,
    )
    return model.eval(), {
        key: sorted(str(k if isinstance(k, str) else k[0]) for k in info.get(key) or ())
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }


def _streaming(maker: Any, config: Any, scratch: Path, options: Json) -> dict[str, Any]:
    """How blocks stay on disk until their turn: accelerate's hooks read them then."""
    import torch
    from accelerate import init_empty_weights

    with init_empty_weights():
        named = not hasattr(maker, "from_config")  # a class of its own, no AutoModel
        empty = maker(config) if named else maker.from_config(config, **options)
    lists = {
        name: module
        for name, module in empty.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) > 1
    }
    blocks = max(lists, key=lambda n: sum(p.numel() for p in lists[n].parameters()), default="")
    places: dict[str, str] = {}
    for name, module in empty.named_modules():
        if name.startswith(f"{blocks}.") and name.count(".") == blocks.count(".") + 1:
            places[name] = "disk"
        elif not list(module.children()) and not name.startswith(f"{blocks}."):
            places[name] = "cpu"
    for name, _ in empty.named_parameters():
        if not any(name.startswith(f"{place}.") or name == place for place in places):
            places[name] = "cpu"
    return {"device_map": places, "offload_folder": str(scratch)}


def _forward(
    model: Any, tokens: list[int], positions: list[int], halves: bool, stored: str
) -> tuple[Any, Any]:
    """Predictions at some positions, float32, shape (positions, vocabulary); and rounded ones."""
    import torch

    ids = torch.tensor([tokens] * (2 if halves else 1))
    with _rounding_second(model, stored) if halves else nullcontext():
        logits = model(input_ids=ids, use_cache=False, **_keeping(model, positions)).logits
    if logits.shape[1] != len(positions):
        logits = logits[:, positions]
    found = logits.float().numpy()
    return found[0], found[1] if halves else None


def _keeping(model: Any, positions: list[int]) -> dict[str, Any]:
    import inspect

    import torch

    known = inspect.signature(model.forward).parameters.get("logits_to_keep")
    # Code that comes with a checkpoint may take nothing but a number of last positions.
    if known is None or known.annotation in (int, "int"):
        return {}
    return {"logits_to_keep": torch.tensor(positions)}


@contextmanager
def _rounding_second(model: Any, stored: str) -> Iterator[None]:
    """Round what the second of two sequences multiplies, as ggml's CPU kernels do.

    ggml multiplies weights of 16 bits with inputs rounded to the weights' type, and
    reads GELU from a table of half precision (``ggml-cpu``: ``vec_dot_type``,
    ``ggml_table_gelu_f16``). How far that moves the predictions of this very model is
    the bound for what may differ.
    """
    import torch

    kind = {"F16": torch.float16, "BF16": torch.bfloat16}.get(stored)
    handles = []

    def round_(value: "torch.Tensor", to: "torch.dtype") -> "torch.Tensor":
        if value.shape[0] != 2:
            return value
        value = value.clone()
        value[1] = value[1].to(to).to(value.dtype)
        return value

    def before(to: "torch.dtype") -> Callable[..., Any]:
        return lambda _, inputs: (round_(inputs[0], to), *inputs[1:])

    for module in model.modules():
        name = type(module).__name__.lower()
        if kind is not None and (isinstance(module, torch.nn.Linear) or name == "conv1d"):
            handles.append(module.register_forward_pre_hook(before(kind)))
        elif "gelu" in name and not list(module.children()):
            handles.append(module.register_forward_pre_hook(before(torch.float16)))
            handles.append(
                module.register_forward_hook(lambda _, __, after: round_(after, torch.float16))
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# The process.


def main() -> None:
    """Answer what comes on stdin, until it ends."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

    def prepare() -> None:
        from transformers.utils import chat_template_utils

        chat_template_utils.datetime = StoppedClock
        for module in ("modeling_utils", "models.auto.modeling_auto"):
            importlib.import_module(f"transformers.{module}")

    serve(lambda request: collect(request, Path(request["out"])), prepare)


if __name__ == "__main__":
    main()
