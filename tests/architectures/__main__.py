"""Try the recipes: make each, convert it as a user would, load and compare what comes out."""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

# Threads that wait by spinning take the cores from those that compute.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from ggufkit.llamacpp import toolchain
from tests.architectures import running
from tests.architectures.recipes import RECIPES
from tests.architectures.running import Result

COLUMNS = ("recipe", "as expected", "verdict", "expected", "KL", "most", "warnings", "seconds")


def main() -> int:
    """Exit status: 1 if any verdict is not the expected one."""
    options = _options()
    build = toolchain.find_build()
    running.import_all(build)
    names = options.only or list(RECIPES)
    started = time.monotonic()
    rows, wrong = [COLUMNS], []
    with tempfile.TemporaryDirectory() as scratch:
        place = options.keep or Path(scratch)
        for result in running.results(names, place, jobs=options.jobs):
            row = _fields(result)
            rows.append(row)
            print(f"{len(rows) - 1:3}/{len(names)}", *(field for field in row if field), sep="  ")
            if row[1] != "yes":
                wrong.append(result.name)
    if options.out:
        options.out.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    seconds = time.monotonic() - started
    print(f"{len(names) - len(wrong)} of {len(names)} as expected, {seconds:.0f} s")
    if wrong:
        print("not as expected:", *wrong)
    return int(bool(wrong))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=sorted(RECIPES))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="recipes at a time")
    parser.add_argument("--out", type=Path, metavar="TABLE.tsv", help="where to write the table")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where to leave all files")
    return parser.parse_args()


def _fields(result: Result) -> tuple[str, ...]:
    expected = RECIPES[result.name].expected
    return (
        result.name,
        "yes" if expected.met_by(result.verdict) else "NO",
        str(result.verdict),
        str(expected),
        *(
            f"{result.figures[key]:.1e}" if key in result.figures else ""
            for key in ("kl_mean", "kl_max")
        ),
        " ".join(result.warnings),
        f"{result.seconds:.1f}",
    )


if __name__ == "__main__":
    sys.exit(main())
