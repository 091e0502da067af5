"""What lies in the models directory, and how people name it."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ggufkit.errors import IntegrityError, SourceError
from ggufkit.llamacpp.gguf import read_gguf
from ggufkit.store import MANIFEST, Store, read_manifest
from ggufkit.values import GGUFFile, RunManifest, label_of, rounding_of

_GGUF_STAGES = ("quantize", "convert", "fetch")


@dataclass(frozen=True)
class ModelEntry:
    """One GGUF of the models directory.

    Attributes:
        name: what people type: the file's name without its ending.
        path: where they find it.
        type: quantization type asked for, or the stage that made it.
        bits_per_weight: over all its tensors.
        nbytes: size of the file.
        awq: whether AWQ scales are folded in; None if that is not known.
        imatrix: whether an importance matrix was used; None likewise.
        rounding: as :class:`~ggufkit.values.QuantizeResult` has it; empty if not known.
        origin: where the model came from; empty if that is not known.
        created: UTC time, ISO 8601; of the file if it has no manifest.
        known: whether a manifest says how it was made.
        problem: what is wrong with the file; empty if nothing is seen.
    """

    name: str
    path: Path
    type: str
    bits_per_weight: float
    nbytes: int
    awq: bool | None
    imatrix: bool | None
    rounding: str
    origin: str
    created: str
    known: bool
    problem: str = ""

    @property
    def label(self) -> str:
        """Type and ways in words; ``no manifest`` if they are not known."""
        if not self.known:
            return "no manifest"
        return label_of(
            self.type, awq=bool(self.awq), rounding=self.rounding, imatrix=bool(self.imatrix)
        )


def list_models(store: Store) -> tuple[ModelEntry, ...]:
    """All GGUFs of a models directory, the newest first."""
    seen = (entry for entry in (*_foreign(store), *_made_here(store)) if entry)
    entries = {entry.path.resolve(): entry for entry in seen}
    return tuple(sorted(entries.values(), key=lambda e: (e.created, e.name), reverse=True))


def _made_here(store: Store) -> Iterator[ModelEntry | None]:
    for artifact in store.artifacts():
        if artifact.manifest.stage not in _GGUF_STAGES:
            continue
        for name in artifact.manifest.outputs:
            file = artifact.path / name
            if file.suffix == ".gguf" and file.is_file():
                link = file.parent.parent / file.name
                shown = link if link.exists() and link.samefile(file) else file
                yield _entry(shown, artifact.manifest)


def _foreign(store: Store) -> Iterator[ModelEntry | None]:
    published = {artifact.path.resolve() for artifact in store.artifacts()}
    for path in sorted(store.root.rglob("*.gguf")):
        inside = path.relative_to(store.root).parts
        hidden = any(part.startswith(".") for part in inside)
        unfinished = any(part.endswith((".partial", ".changed")) for part in inside)
        ours = path.resolve().parent in published
        if hidden or unfinished or ours or not path.is_file():  # a link may lead nowhere
            continue
        yield _entry(path, manifest_of(path))


def _is_model(header: GGUFFile) -> bool:
    """Whether a GGUF can be talked to: importance matrices and later parts are GGUFs too."""
    keys = header.metadata
    kind = keys.get("general.type", "model")
    return bool(header.tensors) and kind == "model" and not keys.get("split.no")


def _entry(path: Path, manifest: RunManifest | None) -> ModelEntry | None:
    from datetime import UTC, datetime

    bits, problem = 0.0, ""
    try:
        header = read_gguf(path, arrays=False)
        if not _is_model(header):
            return None
        bits = header.bits_per_weight
    except (IntegrityError, SourceError) as error:
        problem = error.message
    stat = path.stat()
    changed = datetime.fromtimestamp(stat.st_mtime, UTC)
    facts = manifest.options if manifest else {}
    recipe = facts.get("recipe") or {}
    return ModelEntry(
        name=path.stem,
        path=path,
        type=str(recipe.get("type") or facts.get("outtype", "")).upper() or "as published",
        bits_per_weight=bits,
        nbytes=stat.st_size,
        awq=bool(manifest.inputs.get("scales")) if manifest else None,
        imatrix=bool(recipe.get("imatrix")) if manifest else None,
        rounding=rounding_of(manifest.facts) if manifest else "",
        origin=_origin(manifest) if manifest else "",
        created=manifest.created if manifest else changed.isoformat(timespec="seconds"),
        known=manifest is not None,
        problem=problem,
    )


def _origin(manifest: RunManifest) -> str:
    told = manifest.facts.get("origin") or manifest.inputs.get("repository") or ""
    return str(told)


def find_model(spec: str | None, models_dir: Path) -> Path:
    """The GGUF that somebody means.

    Args:
        spec: a path; or a name as ``ggufkit models`` lists it, in any case, or
            the beginning of one; None for the newest.
        models_dir: the models directory.

    Raises:
        SourceError: if there is none, or more than one that fits.
    """
    if spec is not None and (Path(spec).is_file() or spec.endswith(".gguf")):
        if not Path(spec).is_file():
            raise SourceError(f"there is no {spec}", "See what is there: ggufkit models")
        return Path(spec)
    entries = list_models(Store(models_dir))
    if not entries:
        raise SourceError(
            f"there is no model in {models_dir}", "Make one: ggufkit convert demo --type q4_0"
        )
    if spec is None:
        made = [e for e in entries if e.type != "as published" and not e.problem]
        return (made or list(entries))[0].path
    exact = [e for e in entries if e.name.lower() == spec.lower()]
    fits = exact or [e for e in entries if e.name.lower().startswith(spec.lower())]
    if not fits:
        names = ", ".join(e.name for e in entries[:8])
        raise SourceError(f"no model in {models_dir} is called '{spec}'", f"There are: {names}")
    if len(fits) > 1 and not exact:
        names = ", ".join(e.name for e in fits[:8])
        raise SourceError(f"'{spec}' fits several models", f"Which of: {names}")
    return fits[0].path  # the newest of several artifacts with one name


def manifest_of(path: Path) -> RunManifest | None:
    """The manifest that says how a file was made, if there is one.

    Other programs have files called ``manifest.json`` too, so one that cannot
    be read, or does not speak of this file, is as good as none.
    """
    real = path.resolve()
    for place in (path.with_name(f"{path.name}.{MANIFEST}"), real.parent / MANIFEST):
        with suppress(OSError, IntegrityError):
            manifest = read_manifest(place)
            if {path.name, real.name} & set(manifest.outputs):
                return manifest
    return None


def generation_config(store: Store, path: Path) -> Path | None:
    """The ``generation_config.json`` that belongs to a GGUF, if it is known."""
    manifest = manifest_of(path)
    places = [path.parent / "generation_config.json"]
    if manifest:
        places += [
            artifact.path / "generation_config.json"
            for artifact in (*store.artifacts("fetch"), *store.artifacts("rebuild"))
            if artifact.manifest.model == manifest.model
        ]
    return next((place for place in places if place.is_file()), None)
