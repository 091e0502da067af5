"""Where a file came from, and what makes it again, read off manifests and metadata."""

import shlex
from collections.abc import Mapping
from dataclasses import replace

from ggufkit.evaluate.report.values import ModelFile, Provenance
from ggufkit.values import Calibration, GGUFFile, Json, RunManifest, verification_in_words

Makers = Mapping[str, RunManifest]
"""Digest of a file to the manifest of the stage that wrote it."""


def provenance_of(digest: str, file: ModelFile | None, makers: Makers) -> Provenance:
    """What is known of a file; a file without a manifest has its metadata only."""
    manifest = makers.get(digest) or (file.manifest if file else None)
    known = Provenance(
        sha256=digest,
        source=_source(file.header) if file and file.header else "",
        calibrated=file.calibrated if file else None,
    )
    if manifest is None:
        return known
    return replace(
        known,
        origin=_origin(manifest, makers),
        llama_cpp=str(manifest.tool.get("llama.cpp", "")),
        created=manifest.created,
        command=_command(manifest, makers),
        verified=verification_in_words(manifest.facts),
    )


def _source(header: GGUFFile) -> str:
    keys = header.metadata
    told = [keys.get("general.name"), keys.get("general.size_label"), keys.get("general.license")]
    return ", ".join(str(value) for value in told if value)


def _origin(manifest: RunManifest, makers: Makers) -> str:
    """The origin; of a file made of another one here, that one's origin too."""
    told = str(manifest.facts.get("origin") or manifest.inputs.get("repository") or "")
    before = makers.get(str(manifest.inputs.get("gguf") or ""))
    if before and before is not manifest and (further := _origin(before, makers)):
        return f"{told}, made of {further}" if told else further
    return told


_RECIPE_OPTIONS = {"recipe", "stem", "allow_requantize", "verify", "allow_difference"}
_ROUNDING_OPTIONS = {"rounding", "calibration", "samples", "length", "seed"}
_SEARCH_OPTIONS = {
    *("samples", "length", "seed", "plan", "imatrix", "exact", "stored", "clip", "sensitivity"),
    "backend",
}
"""What is known to come from which option; with others a command would be a guess."""


def _command(manifest: RunManifest, makers: Makers) -> str:
    """What to type; empty if the manifest does not hold all of it."""
    recipe = manifest.options.get("recipe") or {}
    origin = str(manifest.facts.get("origin") or "")
    known = _RECIPE_OPTIONS | (_ROUNDING_OPTIONS if "rounding" in manifest.options else set())
    strange = manifest.options.keys() - known or recipe.get("tensor_types")
    if manifest.stage != "quantize" or not origin or strange:
        return ""
    type = ["--type", str(recipe["type"]).lower()]
    if "gguf" in manifest.inputs:
        if recipe.get("imatrix"):
            return ""  # the matrix was a file whose name was not kept
        again = ["--allow-requantize"] if manifest.options.get("allow_requantize") else []
        return shlex.join(["ggufkit", "quantize", origin, *type, *again])
    ways = _ways(manifest, str(recipe.get("imatrix") or ""), makers)
    if ways is None:
        return ""
    source = "demo" if origin.startswith("demo ") else origin
    ways += [] if manifest.options.get("verify", True) else ["--no-verify"]
    for name in manifest.options.get("allow_difference") or ():
        ways += ["--allow-difference", str(name)]
    return shlex.join(["ggufkit", "convert", source, *type, *ways])


def _ways(manifest: RunManifest, imatrix: str, makers: Makers) -> list[str] | None:
    """The options of AWQ, matrix, rounding and calibration; None if they are not known."""
    words: list[str] = []
    sources = []
    if digest := str(manifest.inputs.get("scales") or ""):
        scales = makers.get(digest)
        if scales is None or not _is_plain_search(scales):
            return None
        sources.append(scales)
        words += ["--awq", *_search_options(scales.options)]
    if imatrix:
        made = makers.get(imatrix)
        source = makers.get(str(made.inputs.get("importance"))) if made else None
        if source is None:
            return None
        sources.append(source)
        words += ["--imatrix", "auto"]
    if rounding := manifest.options.get("rounding"):
        if rounding.keys() - {"method", "refine"}:
            return None
        sources.append(manifest)
        words += ["--rounding", str(rounding["method"])]
        words += ["--refine"] if rounding.get("refine") else []
    return words + (_calibration_options(sources[0]) if sources else [])


def _is_plain_search(scales: RunManifest) -> bool:
    told = scales.options
    known = not told.keys() - _SEARCH_OPTIONS
    return known and told.get("backend") != "file" and not told.get("exact")


def _search_options(options: Mapping[str, Json]) -> list[str]:
    words = ["--sensitivity"] if options.get("sensitivity") else []
    words += ["--clip"] if options.get("clip") else []
    if options.get("backend"):
        words += ["--awq-backend", str(options["backend"])]
    return words


def _calibration_options(maker: RunManifest) -> list[str]:
    """The options of the calibration that are not the default ones."""
    default = Calibration()
    text = maker.facts.get("calibration") or maker.options.get("calibration")
    given = {
        "--calibration": (text, default.text),
        "--calibration-samples": (maker.options.get("samples"), default.samples),
        "--calibration-length": (maker.options.get("length"), default.length),
        "--seed": (maker.options.get("seed"), default.seed),
    }
    words: list[str] = []
    for option, (value, usual) in given.items():
        if value is not None and value != usual:
            words += [option, str(value)]
    return words
