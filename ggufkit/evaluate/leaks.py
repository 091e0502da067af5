"""Whether a model is measured on text that it was calibrated on.

AWQ and importance matrices fit a model to their calibration text, so on that text
it looks better than it is. Runs of words that two texts share show a leak, as in
the GPT-3 paper (Brown et al. 2020, "Language Models are Few-Shot Learners",
appendix C): 13 words, without regard to case, spacing and punctuation.

Of a text a set of 64-bit hashes is kept; of a very long one only hashes below a
limit, which is a sample of its runs and the same for both texts (Broder 1997, "On
the resemblance and containment of documents"). So memory has a bound.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ggufkit.errors import GgufkitError, IntegrityError
from ggufkit.evaluate.perplexity import name_in_store
from ggufkit.llamacpp.gguf import read_gguf
from ggufkit.progress import Progress
from ggufkit.store import MANIFEST, Store, read_manifest
from ggufkit.texts.load import BUILT_IN, load_calibration
from ggufkit.values import Json, RunManifest, Text

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Hashes = npt.NDArray[np.uint64]

RUN_WORDS = 13
"""Words of a run: as many seldom agree by chance, and a sentence or two hold them."""
THRESHOLD = 0.05
"""Share of a text's runs from which on a model must not be measured on it.

Texts that have nothing to do with each other share less than a thousandth; what
quotes the same sources, such as two halves of one manual, a few hundredths. At a
twentieth a leak weighs at most a twentieth in the mean over the text.
"""
_VERSION = 2
_MAX_HASHES = 1 << 22
_BLOCK_CHARACTERS = 1 << 20
# Where words are not spaced (Chinese, Japanese), each character counts as one.
_UNSPACED = "\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_CALIBRATING = {"awq": "AWQ", "importance": "importance matrix"}
"""Stages that look at a calibration text."""


@dataclass(frozen=True)
class Calibrated:
    """That a model was calibrated on a text.

    Attributes:
        by: what looked at the text, such as ``AWQ``.
        name: of the text; empty if it is not known.
        digest: SHA-256 of the text; empty if it is not known.
    """

    by: str
    name: str = ""
    digest: str = ""


@dataclass(frozen=True)
class Leak:
    """How much of a text a model was calibrated on.

    Attributes:
        overlap: share of the text's runs of words that a calibration text of the model
            holds too, the largest if there are several; None if there is none, or it
            is not known.
        notes: what could not be looked at, and leaks that were allowed.
    """

    overlap: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def told(self) -> bool:
        """Whether it is so much that it is said wherever the figure is shown."""
        return is_leak(self.overlap)


def is_leak(overlap: float | None) -> bool:
    """Whether an overlap makes figures too good."""
    return overlap is not None and overlap >= THRESHOLD


# --- what a model was calibrated on ------------------------------------------


def records_of(store: Store, manifest: RunManifest) -> tuple[Calibrated, ...]:
    """What a manifest says about calibration, itself or through those of its inputs.

    Args:
        store: where inputs are looked up by their digests.
        manifest: of any stage on the way to a GGUF.
    """
    if isinstance(told := manifest.facts.get("calibrated"), list):
        return tuple(Calibrated(**record) for record in told)
    if by := _CALIBRATING.get(manifest.stage):
        name = str(manifest.facts.get("calibration", ""))
        return (Calibrated(by, name, str(manifest.inputs.get("calibration", ""))),)
    recipe = manifest.options.get("recipe") or {}
    roles = {
        "AWQ": manifest.inputs.get("scales"),
        "importance matrix": manifest.inputs.get("importance") or recipe.get("imatrix"),
        "": manifest.inputs.get("gguf"),
    }
    found: list[Calibrated] = []
    for by, digest in roles.items():
        made_by = _maker(store, digest) if digest else None
        if made_by:
            found += records_of(store, made_by)
        elif digest and by:
            found.append(Calibrated(by))
    return tuple(dict.fromkeys(found))


def _maker(store: Store, digest: str) -> RunManifest | None:
    """The manifest of what made a file, by the file's digest."""
    for artifact in store.artifacts():
        if any(output.sha256 == digest for output in artifact.manifest.outputs.values()):
            return artifact.manifest
    return None


def records_of_scales(store: Store, scales: Path) -> tuple[Calibrated, ...]:
    """What scales in a file were searched on, by the manifest beside it or in the store."""
    found = _records_of_file(store, scales)
    return (Calibrated("AWQ"),) if found is None else found


def records_of_imatrix(store: Store, imatrix: Path) -> tuple[Calibrated, ...]:
    """What an importance matrix was made of, as far as the store or the file itself knows.

    Args:
        store: the models directory.
        imatrix: the file, in llama.cpp's GGUF format or its older one, which names no text.
    """
    if (found := _records_of_file(store, imatrix)) is not None:
        return found
    by = "importance matrix"
    try:
        named = read_gguf(imatrix).metadata.get("imatrix.datasets") or [""]
    except IntegrityError:
        named = [""]
    return tuple(Calibrated(by, str(name)) for name in named)


def _records_of_file(store: Store, path: Path) -> tuple[Calibrated, ...] | None:
    digest = store.digest(path).sha256
    with suppress(OSError, IntegrityError):
        beside = read_manifest(path.resolve().parent / MANIFEST)
        if any(output.sha256 == digest for output in beside.outputs.values()):
            return records_of(store, beside)
    made_by = _maker(store, digest)
    return records_of(store, made_by) if made_by else None


def records_in(metadata: Mapping[str, Json]) -> tuple[Calibrated, ...]:
    """What a GGUF itself says: llama-quantize notes the imatrix's text in it."""
    if "quantize.imatrix.file" not in metadata:
        return ()
    return (Calibrated("importance matrix", str(metadata.get("quantize.imatrix.dataset", ""))),)


def calibrations_of(
    store: Store, model: Path, manifest: RunManifest | None
) -> tuple[Calibrated, ...] | None:
    """What a GGUF was calibrated on.

    Args:
        store: the models directory.
        model: the GGUF.
        manifest: the one that says how it was made, if there is one.

    Returns:
        The records, none if it was not calibrated; None if that is not known.
    """
    told = records_of(store, manifest) if manifest else ()
    # A file that was fetched, or made with somebody's imatrix, may know itself.
    own = records_in(read_gguf(model, arrays=False).metadata)
    named = [r for r in told if r.name or r.digest]
    if own and not any(r.by == own[0].by for r in named):
        told = (*(r for r in told if r.by != own[0].by), *own)
    return told if told or (manifest and _tells_all(manifest)) else None


def _tells_all(manifest: RunManifest) -> bool:
    """Whether a manifest that names no calibration means that there was none."""
    return "calibrated" in manifest.facts or "scales" in manifest.inputs


def find_calibration(record: Calibrated, cache: Path, progress: Progress) -> Path | None:
    """The calibration text itself, if it is still to be found.

    Args:
        record: what is known of it.
        cache: holds texts by their digests.
        progress: told if a built-in text has to be made.
    """
    for suffix in (".txt", ".jsonl") if record.digest else ():
        path = cache / "texts" / f"{record.digest[:16]}{suffix}"
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == record.digest:
            return path
    if not record.name or not (record.name in BUILT_IN or Path(record.name).is_file()):
        return None
    try:
        text = load_calibration(record.name, cache=cache, progress=progress)
    except GgufkitError:
        return None
    same = record.digest in ("", text.digest) or _is_digest_of(record)
    # A built-in text of another Python differs little; a file of this name may be anything.
    return text.path if same or record.name in BUILT_IN else None


def _is_digest_of(record: Calibrated) -> bool:
    """Whether a record has the digest of the file itself, as older ones of chats have."""
    path = Path(record.name)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == record.digest


# --- how much two texts share ------------------------------------------------


def overlap(text: Path, calibration: Path) -> float | None:
    """The share of a text's distinct runs of words that stand in another text too.

    Args:
        text: a UTF-8 file.
        calibration: a UTF-8 file, or JSON lines, of which all strings count.

    Returns:
        0 to 1; None if the text has fewer than :data:`RUN_WORDS` words.
    """
    import numpy as np

    ours, theirs = Sketch(), Sketch()
    for sketch, path in ((ours, text), (theirs, calibration)):
        for hashes in _runs(_blocks(path)):
            sketch.add(hashes)
    limit = min(ours.limit, theirs.limit)
    kept = ours.below(limit)
    if not len(kept):
        return None
    shared = np.intersect1d(kept, theirs.below(limit), assume_unique=True)
    return len(shared) / len(kept)


@dataclass
class Sketch:
    """A set of hashes; of many, those below a limit.

    Attributes:
        limit: hashes below it are kept.
    """

    limit: int = 1 << 64
    _kept: "list[Hashes]" = field(default_factory=list)

    def add(self, hashes: "Hashes") -> None:
        """Add some hashes, and lower the limit while there are too many."""
        import numpy as np

        self._kept.append(np.unique(hashes[hashes <= np.uint64(self.limit - 1)]))
        while sum(map(len, self._kept)) > _MAX_HASHES:
            self._kept = [np.unique(np.concatenate(self._kept))]
            if len(self._kept[0]) > _MAX_HASHES // 2:
                self.limit //= 2
                self._kept = [self.below(self.limit)]

    def below(self, limit: int) -> "Hashes":
        """The distinct hashes below a limit, sorted."""
        import numpy as np

        every = np.unique(np.concatenate([*self._kept, np.empty(0, np.uint64)]))
        return every[: np.searchsorted(every, np.uint64(limit - 1), side="right")]


def _blocks(path: Path) -> Iterator[str]:
    """A file's text, some lines at a time."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        if path.suffix == ".txt":
            while block := file.read(_BLOCK_CHARACTERS):
                yield block + file.readline()
            return
        for line in file:
            try:
                yield "\n".join(_strings(json.loads(line)))
            except (ValueError, RecursionError):
                yield line


_NOT_SAID = ("role", "type")
"""Fields of chats whose words stand between what is said, and are none of it."""


def _strings(value: Json) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        if isinstance(value, dict):
            value = [inner for key, inner in value.items() if key not in _NOT_SAID]
        for inner in value:
            yield from _strings(inner)


_MULTIPLIER = 0x9E3779B97F4A7C15
"""Odd, with bits all over: the golden ratio in 64 bits (Knuth)."""


def _runs(blocks: Iterator[str]) -> "Iterator[Hashes]":
    """Hashes of all runs of words, also of those that go on in the next block."""
    import numpy as np

    carried = np.empty(0, np.uint64)
    for block in blocks:
        words = np.concatenate([carried, _word_hashes(block)])
        count = max(0, len(words) - RUN_WORDS + 1)
        hashes = np.zeros(count, np.uint64)
        for place in range(RUN_WORDS if count else 0):
            hashes = hashes * np.uint64(_MULTIPLIER) + words[place : place + count]
        yield hashes ^ (hashes >> np.uint64(32))
        carried = words[max(0, len(words) - RUN_WORDS + 1) :]


def _word_hashes(block: str) -> "Hashes":
    import numpy as np

    words = _WORD.findall(block.casefold())
    known = {
        word: int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest())
        for word in set(words)
    }
    return np.fromiter((known[word] for word in words), np.uint64, len(words))


# --- the guard ---------------------------------------------------------------


@dataclass(frozen=True)
class LeakGuard:
    """Refuses to measure models on what they were calibrated on.

    Attributes:
        store: the models directory, which keeps overlaps.
        manifest_of: gives the manifest of a GGUF, if there is one.
        cache: holds texts by their digests.
        allow: warn instead of refusing.
        progress: who to tell.
    """

    store: Store
    manifest_of: Callable[[Path], RunManifest | None]
    cache: Path
    allow: bool
    progress: Progress

    def check(self, model: Path, text: Text) -> Leak:
        """Look how much of a text a model was calibrated on.

        Raises:
            GgufkitError: if it is :data:`THRESHOLD` or more, and that is not allowed.
        """
        records = calibrations_of(self.store, model, self.manifest_of(model))
        if records is None:
            return Leak(None, (f"what {model.name} was calibrated on is not recorded",))
        shares: list[float] = []
        notes: list[str] = []
        for record in records:
            path = find_calibration(record, self.cache, self.progress)
            if path is None:
                told = record.name or "a text that is not recorded"
                notes.append(
                    f"{model.name} was calibrated ({record.by}) on {told}, which is not to be "
                    f"found: whether it holds {text.name} is not known"
                )
                self.progress.say(notes[-1])
            elif (share := self._share(model, text, path)) is not None:
                shares.append(share)
                if is_leak(share):
                    notes.append(self._complain(model, text, record, share))
        return Leak(max(shares, default=None), tuple(dict.fromkeys(notes)))

    def _complain(self, model: Path, text: Text, record: Calibrated, share: float) -> str:
        told = (
            f"{model.name} was calibrated ({record.by}) on {record.name}, which holds "
            f"{100 * share:.0f} % of {text.name}"
        )
        if not self.allow:
            raise GgufkitError(
                f"{told}: it would look better than it is",
                "Measure on another text, or say --allow-leak",
            )
        self.progress.warn(f"{told}; the figure is too good")
        return told

    def _share(self, model: Path, text: Text, calibration: Path) -> float | None:
        def work(_: Path) -> dict[str, Json]:
            return {"share": overlap(text.path, calibration)}

        digest = self.store.digest(calibration, self.progress).sha256
        artifact = self.store.run(
            "overlap",
            version=_VERSION,
            model=name_in_store(self.store, model),
            inputs={"text": text.digest, "calibration": digest},
            options={"words": RUN_WORDS},
            tool={},
            work=work,
            progress=self.progress,
        )
        share: float | None = artifact.manifest.facts["share"]
        return share
