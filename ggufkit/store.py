"""The models directory: keyed stages, hashed outputs, atomic publishing.

Layout, below the root::

    <model>/<stage>-<key12>/manifest.json   a published artifact
    <model>/<stage>-<key12>/...             its outputs
    <model>/<stage>-<key12>.partial/        work under way, or what a kill left
    <model>/<file>.gguf                     link to an artifact's file, for people
    .locks/, .logs/, .digests.json           bookkeeping; safe to delete

A stage is a function from values to values. Its key covers all that can change
its output, so an artifact with the right key and outputs that still hash right
is the result, and the work is not done again.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from ggufkit.errors import DiskSpaceError, IntegrityError, UsageError
from ggufkit.progress import SILENT, Progress
from ggufkit.values import Artifact, FileDigest, Json, RunManifest, to_json

MANIFEST = "manifest.json"
_KEY_LENGTH = 12
_HASH_BLOCK = 1 << 20
_GIB = 1 << 30
_LOGS_KEPT = 50


def canonical_json(value: Json) -> str:
    """The one spelling of a JSON value: sorted keys, no spaces, ASCII."""
    return json.dumps(to_json(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def stage_key(
    stage: str,
    version: int,
    inputs: Mapping[str, Json],
    options: Mapping[str, Json],
    tool: Mapping[str, Json],
) -> str:
    """SHA-256 (hex) over everything that can change a stage's output."""
    spelled = canonical_json([stage, version, dict(inputs), dict(options), dict(tool)])
    return hashlib.sha256(spelled.encode()).hexdigest()


def require_space(directory: Path, nbytes: int, what: str) -> None:
    """Check a forecast before work starts.

    Args:
        directory: where the work will write; its nearest existing parent counts.
        nbytes: bytes that the work will need at its peak.
        what: the work, in words, for the message.

    Raises:
        DiskSpaceError: if less is free than needed.
    """
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < nbytes:
        raise DiskSpaceError(
            f"{what} needs {nbytes / _GIB:.2f} GiB in {directory}, but only "
            f"{free / _GIB:.2f} GiB are free",
            "Free some space, or name another place with --models-dir",
        )


def write_atomically(path: Path, text: str) -> None:
    """Write a whole text file or leave the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def read_manifest(path: Path) -> RunManifest:
    """Read a manifest file.

    Raises:
        IntegrityError: if it is not a manifest.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        raw["outputs"] = {name: FileDigest(**d) for name, d in raw["outputs"].items()}
        return RunManifest(**raw)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise IntegrityError(
            f"{path} is not a readable manifest ({error})", f"Remove {path.parent} and run again"
        ) from error


class _DigestCache:
    """SHA-256 by path, valid while size, inode and time of change stay the same.

    Hashing a 7B checkpoint takes half a minute; this makes asking again free.
    A file that changed in any way has another time and is hashed anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, list[Json]] = {}
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(known, dict):
                self._known = known

    def digest(self, path: Path, progress: Progress) -> FileDigest:
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        if self.knows(path):
            return FileDigest(self._known[str(path.absolute())][3], stat.st_size)
        sha256 = _sha256(path, stat.st_size, progress)
        self._known[str(path.absolute())] = [*stamp, sha256]
        return FileDigest(sha256, stat.st_size)

    def knows(self, path: Path) -> bool:
        stat = path.stat()
        known = self._known.get(str(path.absolute()))
        return bool(known and known[:3] == [stat.st_size, stat.st_mtime_ns, stat.st_ino])

    def moved(self, old: Path, new: Path) -> None:
        prefix = f"{old.absolute()}{os.sep}"
        for name in [n for n in self._known if n.startswith(prefix)]:
            self._known[f"{new.absolute()}{os.sep}{name[len(prefix) :]}"] = self._known.pop(name)

    def save(self) -> None:
        alive = {name: known for name, known in self._known.items() if os.path.exists(name)}
        # A cache that cannot be written costs time, not correctness.
        with contextlib.suppress(OSError):
            write_atomically(self._path, json.dumps(alive, indent=0))


def _sha256(path: Path, nbytes: int, progress: Progress) -> str:
    summer = hashlib.sha256()
    big = nbytes > 2 * _GIB
    task = progress.task(f"hashing {path.name}", nbytes, "bytes") if big else None
    with path.open("rb") as file, task or contextlib.nullcontext() as bar:
        done = 0
        while block := file.read(_HASH_BLOCK):
            summer.update(block)
            done += len(block)
            if bar and done % (64 * _HASH_BLOCK) == 0:
                bar.update(done)
    return summer.hexdigest()


class Store:
    """The models directory.

    Args:
        root: the directory; made when the first artifact is.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._digests = _DigestCache(root / ".digests.json")

    def digest(self, path: Path, progress: Progress = SILENT) -> FileDigest:
        """SHA-256 and size of a file, remembered between runs."""
        found = self._digests.digest(path, progress)
        if self.root.exists():
            self._digests.save()
        return found

    def knows(self, paths: Iterable[Path]) -> bool:
        """Whether asking for the digests of files costs no reading."""
        return all(self._digests.knows(path) for path in paths)

    @contextlib.contextmanager
    def hashing(self, output: Path) -> Iterator[None]:
        """Hash an output that is written to its end while it is being looked at otherwise."""
        with ThreadPoolExecutor(1) as pool:
            hashed = pool.submit(self._digests.digest, output, SILENT)
            yield
            hashed.result()

    def run(
        self,
        stage: str,
        *,
        version: int,
        model: str,
        inputs: Mapping[str, Json],
        options: Mapping[str, Json],
        tool: Mapping[str, Json],
        work: Callable[[Path], dict[str, Json]],
        resume: bool = False,
        progress: Progress = SILENT,
    ) -> Artifact:
        """Do the work of a stage, unless its result is there.

        Args:
            stage: its name, such as ``quantize``.
            version: raised whenever the same inputs would give another output.
            model: name of the model, a single path component.
            inputs: digests of what goes in, by role.
            options: every option that can change the output.
            tool: identity of tools and libraries.
            work: called with the partial directory; writes the outputs there
                and returns facts for the manifest. Names that begin with a dot
                are scratch and are not published.
            resume: keep what a killed run left in the partial directory.
            progress: told about reuse, waiting and changed artifacts.

        Returns:
            The published artifact.
        """
        key = stage_key(stage, version, inputs, options, tool)
        final = self._artifact_dir(model, stage, key)
        partial = final.with_name(final.name + ".partial")
        with self._lock(final, progress):
            if found := self._reusable(final, progress):
                return found
            if partial.exists() and not resume:
                shutil.rmtree(partial)
            partial.mkdir(parents=True, exist_ok=True)
            started = time.monotonic()
            try:
                facts = work(partial)
            except BaseException as error:
                if not resume:
                    shutil.rmtree(partial, ignore_errors=True)
                if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                    raise DiskSpaceError(
                        f"the disk of {self.root} filled up during {stage}",
                        "Free some space, or name another place with --models-dir",
                    ) from error
                raise
            manifest = RunManifest(
                stage=stage,
                version=version,
                key=key,
                model=model,
                inputs=to_json(dict(inputs)),
                options=to_json(dict(options)),
                tool=to_json(dict(tool)),
                outputs=self._hash_outputs(partial, progress),
                facts=to_json(facts),
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                seconds=round(time.monotonic() - started, 3),
            )
            write_atomically(partial / MANIFEST, json.dumps(to_json(manifest), indent=1) + "\n")
            os.replace(partial, final)
            self._digests.moved(partial, final)
            self._digests.save()
            return Artifact(final, manifest, reused=False)

    def find(
        self,
        stage: str,
        *,
        version: int,
        model: str,
        inputs: Mapping[str, Json],
        options: Mapping[str, Json],
        tool: Mapping[str, Json],
        progress: Progress = SILENT,
    ) -> Artifact | None:
        """The published result of a stage, if it is there and whole; see :meth:`run`."""
        key = stage_key(stage, version, inputs, options, tool)
        return self._reusable(self._artifact_dir(model, stage, key), progress)

    def _artifact_dir(self, model: str, stage: str, key: str) -> Path:
        if not model or model.startswith(".") or Path(model).name != model:
            raise UsageError(f"'{model}' cannot be the name of a model")
        return self.root / model / f"{stage}-{key[:_KEY_LENGTH]}"

    @contextlib.contextmanager
    def _lock(self, final: Path, progress: Progress) -> Iterator[None]:
        place = self.root / ".locks"
        place.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place / f"{final.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            progress.say(f"another process is at work on {final.name}; waiting for it")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _reusable(self, final: Path, progress: Progress) -> Artifact | None:
        if not final.exists():
            return None
        try:
            manifest = read_manifest(final / MANIFEST)
            for name, digest in manifest.outputs.items():
                if self.digest(final / name, progress) != digest:
                    raise IntegrityError(f"{final / name} has changed")
        except (OSError, IntegrityError) as error:
            # Somebody may have edited it on purpose: keep it, out of the way.
            aside = final.with_name(final.name + ".changed")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(final, aside)
            progress.warn(f"{error}; kept as {aside.name} and made again")
            return None
        return Artifact(final, manifest, reused=True)

    def _hash_outputs(self, partial: Path, progress: Progress) -> dict[str, FileDigest]:
        outputs = {}
        for path in sorted(partial.iterdir()):
            if path.name.startswith("."):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in sorted(p for p in partial.rglob("*") if p.is_file()):
            outputs[path.relative_to(partial).as_posix()] = self._digests.digest(path, progress)
        return outputs

    def artifacts(self, stage: str | None = None) -> Iterator[Artifact]:
        """All published artifacts, without checking their digests."""
        for path in sorted(self.root.glob(f"*/{stage or '*'}-*/{MANIFEST}")):
            if path.parent.suffix in (".partial", ".changed"):
                continue
            with contextlib.suppress(IntegrityError):
                yield Artifact(path.parent, read_manifest(path), reused=True)

    def link(self, file: Path) -> Path:
        """Give an artifact's file a name for people, one floor up.

        The link is relative, so the models directory can be moved. Where the
        system has no links, the artifact's own path is the answer.
        """
        name = file.parent.parent / file.name
        target = Path(file.parent.name) / file.name
        scratch = name.with_name(f".{name.name}.{os.getpid()}.tmp")
        if name.exists() and not name.is_symlink():
            return file  # a file that the user put there is not ours to replace
        try:
            scratch.symlink_to(target)
            os.replace(scratch, name)
        except OSError:
            scratch.unlink(missing_ok=True)
            return file
        return name

    def export(self, artifact: Artifact, file: Path, directory: Path) -> Path:
        """Put an artifact's file, with its manifest, where the user wants it.

        A hard link where the disk allows it, else a copy; either way the file
        appears whole under its name, and the manifest after it.
        """
        directory.mkdir(parents=True, exist_ok=True)
        target = directory / file.name
        if not (target.exists() and target.samefile(file)):
            scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
            try:
                try:
                    os.link(file, scratch)
                except OSError:
                    require_space(directory, file.stat().st_size, f"a copy of {file.name}")
                    shutil.copyfile(file, scratch)
                os.replace(scratch, target)
            finally:
                scratch.unlink(missing_ok=True)
        own = dataclasses.replace(
            artifact.manifest,
            outputs={file.name: artifact.manifest.outputs[file.name]},
        )
        write_atomically(
            directory / f"{file.name}.{MANIFEST}", json.dumps(to_json(own), indent=1) + "\n"
        )
        return target

    def log(self, name: str) -> Path:
        """A file for a tool's output, outside of artifacts so that failures keep it."""
        place = self.root / ".logs"
        place.mkdir(parents=True, exist_ok=True)
        for old in sorted(place.iterdir(), key=lambda p: p.stat().st_mtime)[:-_LOGS_KEPT]:
            old.unlink(missing_ok=True)
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        return place / f"{name}-{stamp}-{os.getpid()}.log"

    def remove(self, artifact: Artifact) -> None:
        """Delete an artifact and what it holds."""
        shutil.rmtree(artifact.path)
