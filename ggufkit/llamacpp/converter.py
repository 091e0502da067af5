"""Runs llama.cpp's converter on a checkpoint whose ``config.json`` counts as it is written.

Run as a script: ``python converter.py SCRIPTS``, the directory of
``convert_hf_to_gguf.py``, whose files stay as they are. What the converter imports takes
seconds, so its task may come later: one line of JSON on stdin, or nothing if there is
none after all. The task holds:

- ``argv``: the converter's arguments;
- ``report``: where to write what was read of the config, or null;
- ``no_mtp``: the files hold no layers for multi-token prediction;
- ``end_tokens``: ids at which an answer ends, the first as the end of the text;
- ``renamed``: names of tensors in the files to names that the converter is shown;
- ``dropped``: names, as shown, of tensors to pass over.

The converter reads the config through transformers' class, which since version 5
renames and drops keys (``rotary_pct`` of GPT-NeoX) and adds some that were never
there (``num_kv_heads`` of Falcon-7B). Here every key of the file keeps its value;
only keys that the file lacks come from the class. It is a process of its own and
starts as fast as the converter alone, so it imports nothing else.
"""

import copy
import importlib
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

STOP_TOKENS = "ggufkit.stop_token_ids"
"""Key of a GGUF for end tokens that llama.cpp has no key for."""
_EOT_TEXTS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>"),
        *("<|end_of_text|>", "<EOT>", "_<EOT>", "[EOT]", "<end_of_utterance>"),
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    )
)
"""Tokens that llama.cpp takes as end of a turn by their text, if no key names one
(``llama_vocab::impl::load``)."""
_EOM_TEXTS = frozenset(("<|eom_id|>",))
_MTP_KEYS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")
_TEXT_PARTS = ("text_config", "llm_config", "lm_config", "language_config")

# Routers of mixtures. transformers computes them so whatever a config says, and
# its classes do not write the keys that published configs have for it.
_SIGMOID = {"scoring_func": "sigmoid"}
_NOAUX = {**_SIGMOID, "topk_method": "noaux_tc"}
ROUTERS: dict[str, dict[str, Any]] = {
    "deepseek_v3": _NOAUX,
    "deepseek_v32": _NOAUX,
    "glm4_moe": _SIGMOID,
    "glm4_moe_lite": _NOAUX,
    "glm_moe_dsa": _NOAUX,
    "dots1": _SIGMOID,
    "exaone_moe": _SIGMOID,
    "afmoe": {"score_func": "sigmoid", "route_norm": True},
    "mimo_v2_flash": _NOAUX,
}
"""Keys by ``model_type``."""


class Reading:
    """What has been read of one config, and what it was filled up with.

    Attributes:
        read: paths of keys that the converter asked for.
        filled: keys that the file lacks, with their values and where those are from.
        config: the config as transformers' class has it; None before it is read.
        raw: ``config.json``.
        known: keys that only the class supplies.
    """

    def __init__(self) -> None:
        self.read: set[str] = set()
        self.filled: dict[str, list[Any]] = {}
        self.config: Any = None
        self.raw: dict[str, Any] = {}
        self.known: dict[str, Any] = {}

    def fill(self, part: dict[str, Any], key: str, value: Any, source: str) -> None:
        """Give a part of the config a value that it lacks."""
        if part.get(key) is None and value is not None:
            part[key] = value
            self.filled[key] = [value, source]

    def missing(self, key: str) -> Any:
        """A key that the converter cannot do without, from transformers' class.

        Raises:
            KeyError: if the class does not know it either.
        """
        text = self.config.get_text_config() if self.config is not None else None
        value = getattr(text, key, None)
        if not isinstance(value, int | float | str | list):
            raise KeyError(key)
        self.filled[key] = [value, f"transformers' {type(text).__name__}"]
        return value


class RecordedConfig(dict[str, Any]):
    """A config that notes which of its keys are asked for.

    Args:
        values: the config.
        reading: gets the notes.
        path: where this part of the config is, with a dot at its end.
    """

    def __init__(self, values: dict[str, Any], reading: Reading, path: str = "") -> None:
        self._reading = reading
        self._path = "" if path.rstrip(".") in _TEXT_PARTS else path
        super().__init__()
        for key, value in values.items():
            nested = isinstance(value, dict)
            dict.__setitem__(
                self,
                key,
                RecordedConfig(value, reading, f"{self._path}{key}.") if nested else value,
            )

    def _note(self, key: Any) -> None:
        self._reading.read.add(f"{self._path}{key}")

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def __missing__(self, key: str) -> Any:
        if self._path:
            raise KeyError(key)
        return self._reading.missing(key)

    def __contains__(self, key: object) -> bool:
        self._note(key)
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or the default; noted."""
        self._note(key)
        return super().get(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        """Take a key out; noted."""
        self._note(key)
        return super().pop(key, *default)

    def setdefault(self, key: str, default: Any = None) -> Any:
        """The value of a key, set if it is missing; noted."""
        self._note(key)
        return super().setdefault(key, default)


def merge(raw: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """A config's own values, and where it has none those of transformers' class.

    Args:
        raw: as in ``config.json``.
        known: the same as the class gives it.
    """
    merged = {**known}
    for key, value in raw.items():
        other = known.get(key)
        if value is None and other is not None:
            continue
        if isinstance(value, dict) and isinstance(other, dict) and key.endswith("_config"):
            value = merge(value, other)
        elif "__float__" in json.dumps(value):
            continue  # transformers' spelling of infinity, which it reads itself
        merged[key] = value
    return merged


def translate(config: dict[str, Any], reading: Reading, *, no_mtp: bool) -> None:
    """Put keys as transformers 5 writes them back into the words of published configs."""
    parts = [config, *(config[name] for name in _TEXT_PARTS if isinstance(config.get(name), dict))]
    for part in parts:
        _translate_rope(part, reading)
        kind = str(part.get("model_type"))
        if change := _TRANSLATIONS.get(kind):
            change(part, reading)
        synonyms = ("scoring_func", "score_func", "score_function", "moe_router_activation_func")
        for key, value in ROUTERS.get(kind, {}).items():
            if key not in synonyms or all(part.get(name) is None for name in synonyms):
                reading.fill(part, key, value, f"transformers' code of {kind}")
        for key in _MTP_KEYS if no_mtp else ():
            if part.get(key):
                part[key] = 0


def _translate_rope(part: dict[str, Any], reading: Reading) -> None:
    """``rope_parameters`` holds what had keys of its own."""
    rope = part.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    layers = rope.get("full_attention", rope)
    if not isinstance(layers, dict):
        return
    for key in ("rope_theta", "partial_rotary_factor"):
        if layers.get(key) is not None:
            reading.fill(part, key, layers[key], "rope_parameters")
    if str(part.get("model_type")) in ("gpt_neox", "cohere2", "cohere2_moe"):
        share = layers.get("partial_rotary_factor") or 1.0
        reading.fill(part, "rotary_pct", share, "rope_parameters")


def _translate_falcon(part: dict[str, Any], reading: Reading) -> None:
    """One key/value head, whatever ``num_kv_heads`` says (``FalconAttention``)."""
    if part.get("multi_query", True) and not part.get("new_decoder_architecture"):
        for key in ("num_kv_heads", "n_head_kv"):
            part.pop(key, None)
        reading.filled["num_kv_heads"] = [1, "multi_query"]


def _translate_nemotron_h(part: dict[str, Any], reading: Reading) -> None:
    """The class has keys of a mixture also for models without one."""
    letters = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*"}
    letters |= {"mlp": "-", "moe": "E"}
    kinds = part.get("layers_block_type")
    pattern = part.get("hybrid_override_pattern")
    if not pattern and isinstance(kinds, list) and all(kind in letters for kind in kinds):
        pattern = "".join(letters[kind] for kind in kinds)
    if not isinstance(pattern, str) or "E" in pattern:
        return
    reading.fill(part, "hybrid_override_pattern", pattern, "layers_block_type")
    for key in ("num_experts_per_tok", "n_routed_experts", "n_shared_experts", "n_group"):
        part.pop(key, None)
    for key in ("topk_group", "moe_intermediate_size", "routed_scaling_factor", "norm_topk_prob"):
        part.pop(key, None)


def _translate_granite_hybrid(part: dict[str, Any], reading: Reading) -> None:
    names = {"linear_attention": "mamba", "full_attention": "attention"}
    kinds = part.get("layer_types")
    if isinstance(kinds, list) and any(kind in names for kind in kinds):
        part["layer_types"] = [names.get(kind, kind) for kind in kinds]
        reading.filled["layer_types"] = [part["layer_types"], "layer_types"]


def _translate_mimo(part: dict[str, Any], reading: Reading) -> None:
    """Sliding layers have twice the key/value heads (``MiMoV2FlashAttention``)."""
    rope = part.get("rope_parameters")
    if isinstance(rope, dict) and isinstance(sliding := rope.get("sliding_attention"), dict):
        reading.fill(part, "swa_rope_theta", sliding.get("rope_theta"), "rope_parameters")
        del part["rope_parameters"]  # the converter makes its own of the other keys
    for key, yes, name in (
        ("hybrid_layer_pattern", "sliding_attention", "layer_types"),
        ("moe_layer_freq", "sparse", "mlp_layer_types"),
    ):
        if isinstance(kinds := part.get(name), list):
            reading.fill(part, key, [int(kind == yes) for kind in kinds], name)
    for key in ("head_dim", "v_head_dim", "num_attention_heads"):
        reading.fill(part, f"swa_{key}", part.get(key), key)
    if isinstance(pairs := part.get("num_key_value_heads"), int):
        reading.fill(part, "swa_num_key_value_heads", 2 * pairs, "num_key_value_heads")


def _translate_falcon_h1(part: dict[str, Any], reading: Reading) -> None:
    width, heads = part.get("hidden_size"), part.get("num_attention_heads")
    if isinstance(width, int) and isinstance(heads, int):
        reading.fill(part, "head_dim", width // heads, "hidden_size and num_attention_heads")


def _translate_gpt2(part: dict[str, Any], reading: Reading) -> None:
    if part.get("n_positions") is not None:
        reading.fill(part, "n_ctx", part["n_positions"], "n_positions")


_TRANSLATIONS: dict[str, Callable[[dict[str, Any], Reading], None]] = {
    "falcon": _translate_falcon,
    "falcon_h1": _translate_falcon_h1,
    "nemotron_h": _translate_nemotron_h,
    "granitemoehybrid": _translate_granite_hybrid,
    "mimo_v2_flash": _translate_mimo,
    "gpt2": _translate_gpt2,
}


class _Whole:
    """What the converter gets instead of a config of transformers."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self._values)


def _read_config_as_written(base: Any, reading: Reading, no_mtp: bool) -> None:
    """Let the converter's ``load_hparams`` see the whole config, and note what is read of it."""
    original = base.AutoConfig

    class AutoConfig:
        @staticmethod
        def from_pretrained(directory: Path, **options: Any) -> _Whole:
            if reading.config is None:
                reading.config = original.from_pretrained(directory, **options)
                reading.raw = json.loads((Path(directory) / "config.json").read_bytes())
                reading.known = reading.config.to_dict()
            whole = merge(reading.raw, reading.known)
            translate(whole, reading, no_mtp=no_mtp)
            return _Whole(whole)

    base.AutoConfig = AutoConfig
    load = base.ModelBase.load_hparams

    def load_hparams(directory: Path, is_mistral_format: bool) -> RecordedConfig:
        loaded = load(directory, is_mistral_format)
        reading.raw = reading.raw or loaded
        return RecordedConfig(loaded, reading)

    def set_hparams(model: Any, values: dict[str, Any]) -> None:
        if not isinstance(values, RecordedConfig):
            # Some classes read config.json by themselves.
            values = {**values}
            translate(values, reading, no_mtp=no_mtp)
        model.__dict__["_hparams"] = RecordedConfig(values, reading)

    base.ModelBase.load_hparams = staticmethod(load_hparams)
    base.ModelBase.hparams = property(lambda model: model.__dict__["_hparams"], set_hparams)


def _show_other_tensors(gguf: Any, renamed: dict[str, str], dropped: Iterable[str]) -> None:
    """Show tensors by their usual names, and not at all those that are to be passed over."""
    hidden = set(dropped)
    local = gguf.utility.SafetensorsLocal
    enter = local.__enter__

    def shown(file: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        tensors = enter(file, *args, **kwargs)
        named = {renamed.get(name, name): tensor for name, tensor in tensors.items()}
        return {name: tensor for name, tensor in named.items() if name not in hidden}

    local.__enter__ = shown


def end_token_keys(
    ends: list[int], tokens: list[Any], eos: int | None
) -> tuple[dict[str, int], list[int]]:
    """Where end tokens go: into llama.cpp's own keys, and the rest into ours.

    Args:
        ends: their ids, the first as the end of the text.
        tokens: texts of the vocabulary.
        eos: the id that the converter takes as the end of the text, if any.

    Returns:
        Ids by the keys ``eos``, ``eot`` and ``eom``, and ids without a key.
    """
    ends = [n for n in ends if 0 <= n < len(tokens)]
    keys: dict[str, int] = {}
    if eos is None and ends:
        eos = keys["eos"] = ends[0]
    rest = [n for n in dict.fromkeys(ends) if n != eos]
    texts = {t.decode("utf-8", "replace") if isinstance(t, bytes) else str(t) for t in tokens}
    for key, known in (("eot", _EOT_TEXTS), ("eom", _EOM_TEXTS)):
        # A token that llama.cpp finds by its text must not lose its place.
        if rest and not texts & known:
            keys[key] = rest.pop(0)
    return keys, rest


def _write_end_tokens(gguf: Any, ends: list[int]) -> None:
    """Add end tokens to the metadata right before it is written."""
    writer = gguf.GGUFWriter
    write = writer.write_header_to_file

    def write_header(self: Any, *args: Any, **kwargs: Any) -> None:
        data = self.kv_data[0]
        tokens = data.get("tokenizer.ggml.tokens")
        if tokens is not None:
            own = {
                name: data[f"tokenizer.ggml.{name}_token_id"].value
                for name in ("eos", "eot", "eom")
                if f"tokenizer.ggml.{name}_token_id" in data
            }
            wanted = [n for n in ends if n not in (own.get("eot"), own.get("eom"))]
            keys, rest = end_token_keys(wanted, tokens.value, own.get("eos"))
            for name, number in keys.items():
                if name in own:
                    rest.append(number)
                else:
                    self.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
            if rest:
                self.add_array(STOP_TOKENS, rest)
        write(self, *args, **kwargs)

    writer.write_header_to_file = write_header


def report_of(reading: Reading, converter: str) -> dict[str, Any]:
    """What was read of the config, for people and for ``ggufkit verify``."""
    raw = {key: value for key, value in reading.raw.items() if not isinstance(value, dict)}
    for name in _TEXT_PARTS:
        if isinstance(part := reading.raw.get(name), dict):
            raw |= {key: value for key, value in part.items() if not isinstance(value, dict)}
    for part in (reading.raw, *(reading.raw.get(name) or {} for name in _TEXT_PARTS)):
        for name in ("rope_parameters", "rope_scaling"):
            raw |= _flattened(part.get(name), name)
    read = reading.read | {key.replace("rope_parameters", "rope_scaling") for key in reading.read}
    unread = {key: value for key, value in raw.items() if key not in read}
    defaults = _class_defaults(reading.config)
    taken = {key: value for key, value in reading.known.items() if key in reading.read}
    return {
        "converter": converter,
        "read": sorted(key for key in raw if key in read),
        "unread": unread,
        "class_defaults": {key: defaults[key] for key in unread if key in defaults},
        "from_class": {key: value for key, value in taken.items() if key not in raw},
        "filled": {key: value for key, value in reading.filled.items() if key in reading.read},
    }


def _flattened(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        nested = isinstance(inner, dict)
        flat |= _flattened(inner, f"{path}.{key}") if nested else {f"{path}.{key}": inner}
    return flat


def _class_defaults(config: Any) -> dict[str, Any]:
    """What a config of this class holds if a file says nothing."""
    if config is None:
        return {}
    try:
        return type(config.get_text_config())().to_dict()  # type: ignore[no-any-return]
    except Exception:  # a class may need arguments; then there is nothing to compare with
        return {}


def main(scripts: str) -> None:
    """Import the converter, then run it once; see the module's description."""
    # This file's directory has modules called like packages that the converter needs.
    sys.path[0] = scripts
    tool: Any = importlib.import_module("convert_hf_to_gguf")
    base: Any = importlib.import_module("conversion.base")
    line = sys.stdin.buffer.readline()
    if line.endswith(b"\n"):
        _run(tool, base, json.loads(line))


def _run(tool: Any, base: Any, given: dict[str, Any]) -> None:
    sys.argv = ["convert_hf_to_gguf.py", *given["argv"]]
    reading = Reading()
    _read_config_as_written(base, reading, given["no_mtp"])
    _show_other_tensors(tool.gguf, given["renamed"], given["dropped"])
    _write_end_tokens(tool.gguf, given["end_tokens"])
    base.ModelBase.no_mtp = given["no_mtp"]
    found: list[str] = []
    find = tool.get_model_class

    def get_model_class(*args: Any, **kwargs: Any) -> Any:
        model_class = find(*args, **kwargs)
        found.append(model_class.__name__)
        return model_class

    tool.get_model_class = get_model_class
    try:
        tool.main()
    finally:
        if given["report"]:
            report = report_of(reading, found[0] if found else "")
            Path(given["report"]).write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
