"""The pinned llama.cpp: which archive, which commit, and the recipe to build it."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from ggufkit.errors import IntegrityError

COMMIT_LENGTH = 9
"""Characters of a commit that the tools are told, and print."""

_PACKAGE = Path(__file__).resolve().parent.parent
_RECIPE_FILES = ("CMakeLists.txt", "flush_log.cpp", "CMakePresets.json")


@dataclass(frozen=True)
class Pin:
    """The source archive that the native tools and the binding come from.

    Attributes:
        package: the Python package whose source archive carries llama.cpp.
        version: its version.
        sdist: file name of the archive.
        sha256: of the archive, hex.
        llama_cpp_commit: full hash of the llama.cpp commit inside.
    """

    package: str
    version: str
    sdist: str
    sha256: str
    llama_cpp_commit: str

    @property
    def commit(self) -> str:
        """The commit as the tools print it: shortened."""
        return self.llama_cpp_commit[:COMMIT_LENGTH]

    @property
    def requirement(self) -> str:
        """The archive as pip names it."""
        return f"{self.package}=={self.version}"


def native_dir() -> Path:
    """The directory with the pin and the build files.

    In a wheel it lies inside the package, in a work tree beside it.

    Raises:
        IntegrityError: if the installation has neither.
    """
    places = (_PACKAGE / "native", _PACKAGE.parent / "native")
    for place in places:
        if (place / "pin.json").is_file():
            return place
    raise IntegrityError(
        f"the build files of llama.cpp are missing; looked in {places[0]} and {places[1]}",
        "Install ggufkit again",
    )


def read_pin(directory: Path | None = None) -> Pin:
    """Read ``pin.json``.

    Args:
        directory: where it lies; :func:`native_dir` if None.

    Raises:
        IntegrityError: if it does not hold exactly the fields of :class:`Pin`.
    """
    path = (directory or native_dir()) / "pin.json"
    try:
        return Pin(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise IntegrityError(f"{path} is not a readable pin: {error}") from error


def recipe_digest(directory: Path | None = None) -> str:
    """SHA-256 (hex) over the build files: another recipe makes another build."""
    summer = hashlib.sha256()
    for name in _RECIPE_FILES:
        summer.update(((directory or native_dir()) / name).read_bytes())
    return summer.hexdigest()


def backends(directory: Path | None = None) -> tuple[str, ...]:
    """The backends that ``CMakePresets.json`` can build."""
    text = ((directory or native_dir()) / "CMakePresets.json").read_text(encoding="utf-8")
    presets = json.loads(text)["configurePresets"]
    return tuple(p["name"] for p in presets if not p.get("hidden"))
