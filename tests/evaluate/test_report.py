"""The report: what goes together, which file is recommended, what is written where."""

import errno
import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggufkit import pipeline
from ggufkit.errors import DiskSpaceError, SourceError, UsageError
from ggufkit.evaluate.report import html, markdown, words
from ggufkit.evaluate.report.front import pareto_front
from ggufkit.evaluate.report.provenance import provenance_of
from ggufkit.evaluate.report.typemap import type_map
from ggufkit.evaluate.report.values import Report, Study
from ggufkit.evaluate.results import read_results
from ggufkit.llamacpp.gguf import read_gguf
from ggufkit.store import Store
from ggufkit.texts.load import load_text
from ggufkit.values import BenchOptions, Comparison, RunManifest
from tests.evaluate.reporting import (
    DIVERGENCES,
    SPEEDS,
    TYPES,
    Bench,
    comparison,
    keep,
    make_files,
    make_gguf,
    make_measured,
    perplexity,
    speed,
    task,
)

Run = Callable[..., tuple[int, str, str]]
HOSTILE = '<script>alert(1)</script>"&|`$x_'


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_measured(tmp_path_factory.mktemp("measured"))


@pytest.fixture(scope="module")
def page(measured: Bench, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "page.html"
    pipeline.report(out=out, models_dir=measured.store.root)
    return out.read_text(encoding="utf-8")


def report_on(bench: Bench, *values: object, models: tuple[Path, ...] = (), **options: float):
    """Store results and make a report of them."""
    for value in values:
        keep(bench.store, value)
    return pipeline.gather_report(models, models_dir=bench.store.root, **options)


def only_study(report: Report) -> Study:
    (study,) = report.studies
    return study


def labels(study: Study) -> list[str]:
    return [entry.label for entry in study.entries]


# --- reading back


def test_results_come_back_as_they_were_stored(measured: Bench) -> None:
    results = read_results(measured.store)
    assert not results.unreadable
    file = measured.files["Q6_K"]
    told = [s.value for s in results.comparisons if s.value.model == file]
    stored = comparison(file, measured.reference, divergence=DIVERGENCES["Q6_K"])
    assert replace(stored, reused=True) in told
    assert {s.value.tokens_per_second for s in results.speeds if s.value.work == "generation"} == {
        *SPEEDS.values(),
        20.0,
    }
    assert len(results.tasks) == len(TYPES)
    digest = measured.store.digest(file).sha256
    assert {s.model for s in results.perplexities if s.value.model == file} == {digest}


def test_a_result_of_another_shape_is_told(tmp_path: Path) -> None:
    bench = make_measured(tmp_path)
    bench.store.run(
        *("compare",),
        version=99,
        model="tiny",
        inputs={"model": "x", "reference": "y", "text": "z"},
        options={},
        tool={},
        work=lambda _: {"something": "else"},
    )
    report = report_on(bench)
    assert any("written otherwise" in line for line in report.left_out)
    assert labels(only_study(report)) == ["Q2_K", "Q4_0", "Q4_K_M", "Q6_K", "Q8_0"]


# --- what goes together


def test_only_what_is_comparable_goes_together(tmp_path: Path) -> None:
    bench = make_files(tmp_path)
    q2, q4, q6, q8 = (bench.files[n] for n in ("Q2_K", "Q4_0", "Q6_K", "Q8_0"))
    report = report_on(
        bench,
        comparison(q4, bench.reference, divergence=0.1),
        comparison(q6, bench.reference, divergence=0.01),
        comparison(q2, bench.reference, divergence=0.5, chunks=8),
        comparison(q6, q8, divergence=0.01),
        speed(q4, 80),
        speed(q6, 60),
        speed(bench.reference, 20, threads=9),
        perplexity(q8, 20),
    )
    study = only_study(report)
    assert labels(study) == ["Q4_0", "Q6_K"]
    assert (study.context, study.chunks, study.text) == (512, 40, "prose.txt")
    assert study.reference
    assert study.reference.label == "F32"
    assert study.reference.generation is None
    told = "\n".join(report.left_out)
    assert "Tiny-Q2_K on prose.txt, 8 chunks of 512 tokens" in told
    assert "Tiny-Q6_K beside Tiny-Q8_0: shown beside another reference" in told
    assert "Speeds (generation) of Tiny-F32: measured in another setting" in told
    assert "Tiny-Q8_0: only a perplexity is stored" in told
    assert "ggufkit compare Tiny-F32 Tiny-Q8_0" in told


def test_models_of_other_kinds_get_studies_of_their_own(tmp_path: Path) -> None:
    bench = make_files(tmp_path)
    others = [
        make_gguf(tmp_path / "big" / f"Big-{n}.gguf", t, blocks=5, name="Big")
        for n, t in TYPES.items()
    ]
    report = report_on(
        bench,
        comparison(bench.files["Q6_K"], bench.reference, divergence=0.01),
        *(perplexity(file, 20 - n) for n, file in enumerate(others)),
    )
    compared, alone = report.studies
    assert (compared.measure, compared.title) == ("divergence", "Tiny")
    assert (alone.measure, alone.title) == ("perplexity", "Big")
    assert len(alone.entries) == len(others)
    assert alone.recommendation.commands[0].startswith("ggufkit compare Big-Q8_0 ")
    page = html.render(report)
    assert page.count("data-recommended>") == 2


def test_models_named_are_the_only_ones_shown(measured: Bench) -> None:
    wanted = [measured.files["Q6_K"], measured.files["Q8_0"]]
    study = only_study(pipeline.gather_report(wanted, models_dir=measured.store.root))
    assert labels(study) == ["Q6_K", "Q8_0"]
    assert study.reference
    assert study.reference.file == "Tiny-F32.gguf"


def test_a_file_that_has_gone_keeps_its_results(tmp_path: Path) -> None:
    bench = make_measured(tmp_path)
    bench.files["Q6_K"].unlink()
    study = only_study(report_on(bench))
    (gone,) = [entry for entry in study.entries if entry.name == "Tiny-Q6_K"]
    assert gone.types is None
    assert gone.bits_per_weight is None
    assert gone.nbytes > 0
    assert gone.comparison


def test_further_texts_stand_beside_the_main_one(measured: Bench) -> None:
    study = only_study(pipeline.gather_report(models_dir=measured.store.root))
    first = study.entries[0]
    assert {study.text, *first.texts} == {"prose.txt", "code.py"}
    other = first.texts[next(iter(first.texts))]
    assert isinstance(other, Comparison)
    assert {other.divergence, first.cost} == {0.6, 0.6 * 1.5}


def test_commands_make_and_measure_again(measured: Bench) -> None:
    command = only_study(pipeline.gather_report(models_dir=measured.store.root)).command
    assert command.startswith("ggufkit compare Tiny-F32 Tiny-Q2_K ")
    assert command.endswith("--text prose.txt --context 512 --chunks 40")


def test_what_real_tools_measured_is_shown(
    tiny_types: dict[str, Path], tmp_path: Path, run_cli: Run
) -> None:
    models = tmp_path / "models"
    text = tmp_path / "text.txt"
    text.write_bytes(load_text("pydoc", cache=tmp_path / "cache").path.read_bytes()[:20_000])
    reference, *others = tiny_types.values()
    pipeline.compare(reference, others, texts=[str(text)], context=64, chunks=12, models_dir=models)
    pipeline.ppl([str(text)], [reference, *others], context=64, chunks=12, models_dir=models)
    options = BenchOptions(prompt=(16,), generation=(4,), repetitions=1)
    pipeline.bench([reference, *others], options=options, models_dir=models)
    study = only_study(pipeline.gather_report(models_dir=models))
    assert [e.file for e in study.entries] == [p.name for p in reversed(others)]
    assert study.text == "text.txt"
    assert study.reference
    for entry in (*study.entries, study.reference):
        assert entry.perplexity
        assert entry.generation
        assert entry.prompt
        assert entry.types
        assert entry.provenance.calibrated == ()
    # The commands that the report gives do what it says.
    (made,) = (e for e in study.entries if e.label == "Q8_0")
    words = shlex.split(made.provenance.command)
    assert words[:2] == ["ggufkit", "convert"]
    code, out, err = run_cli("--models-dir", tmp_path / "again", *words[1:], "--json")
    assert code == 0, err
    again = Path(json.loads(out)[0]["path"])
    assert Store(models).digest(again).sha256 == made.provenance.sha256
    words = shlex.split(study.command)
    code, out, err = run_cli("--models-dir", models, *words[1:], "--json")
    assert code == 0, err
    assert all(row["reused"] for row in json.loads(out)["comparisons"])


def manifest(stage: str, **told: dict[str, object]) -> RunManifest:
    empty: dict[str, Any] = {"inputs": {}, "options": {}, "tool": {}, "outputs": {}, "facts": {}}
    return RunManifest(
        stage, 1, "key", "tiny", **(empty | told), created="2025-01-01T00:00:00", seconds=1
    )


@pytest.mark.parametrize(
    ("scales", "imatrix", "more", "command"),
    [
        ({}, "", {}, "ggufkit convert hf:a/b@1 --type q4_0"),
        (
            {"samples": 16, "length": 256, "seed": None, "clip": True},
            "",
            {},
            "ggufkit convert hf:a/b@1 --type q4_0 --awq --clip --calibration book.txt "
            "--calibration-length 256",
        ),
        (
            {"samples": 8, "length": 512, "seed": 7},
            "matrix",
            {},
            "ggufkit convert hf:a/b@1 --type q4_0 --awq --imatrix auto --calibration book.txt "
            "--calibration-samples 8 --seed 7",
        ),
        (
            {},
            "",
            {"rounding": {"method": "gptq", "refine": True}, "calibration": "book.txt", "seed": 7},
            "ggufkit convert hf:a/b@1 --type q4_0 --rounding gptq --refine "
            "--calibration book.txt --seed 7",
        ),
        ({}, "", {"rounding": {"method": "gptq", "a later option": 1}}, ""),
        ({}, "", {"a later option": 1}, ""),
        ({"samples": 16, "backend": "file"}, "", {}, ""),
        ({"samples": 16, "a later option": 1}, "", {}, ""),
        ({}, "a file", {}, ""),
    ],
)
def test_the_command_is_told_if_it_is_known(
    scales: dict[str, object], imatrix: str, more: dict[str, object], command: str
) -> None:
    recipe = {"type": "Q4_0", "tensor_types": {}, "imatrix": imatrix}
    makers = {
        "file": manifest(
            "quantize",
            inputs={"checkpoint": "c", "scales": "scales" if scales else ""},
            options={"recipe": recipe, "stem": "x", "allow_requantize": False, **more},
            facts={"origin": "hf:a/b@1"},
        ),
        "scales": manifest("awq", options=scales, facts={"calibration": "book.txt"}),
        "matrix": manifest("imatrix", inputs={"importance": "scales"}),
    }
    assert provenance_of("file", None, makers).command == command


# --- which file


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_nothing_beats_the_front_and_something_beats_the_rest(
    points: list[tuple[int, int]],
) -> None:
    front = pareto_front(points)
    for point, on_front in zip(points, front, strict=True):
        beaten = [o for o in points if o != point and o[0] <= point[0] and o[1] <= point[1]]
        assert on_front == (not beaten)


def test_the_smallest_file_within_the_tolerance_is_recommended(tmp_path: Path) -> None:
    study = only_study(report_on(make_measured(tmp_path)))
    pick = study.recommendation
    assert (pick.file, pick.certainty) == ("Tiny-Q4_K_M.gguf", "shown")
    assert [(a.wish, a.file) for a in pick.alternatives] == [
        ("Smaller", "Tiny-Q2_K.gguf"),
        ("Closer", "Tiny-Q6_K.gguf"),
    ]
    assert "+3.0 %" in pick.reasons[0]
    assert "more than chance" in pick.reasons[0]
    assert "4 times as many" in pick.reasons[1]
    fronts = {e.label: (e.on_size_front, e.on_speed_front) for e in study.entries}
    assert fronts["Q4_0"] == (False, True)
    assert fronts["Q2_K"] == (True, True)


def test_a_faster_file_is_an_alternative(tmp_path: Path) -> None:
    bench = make_files(tmp_path)
    q4, q6, q8 = (bench.files[n] for n in ("Q4_0", "Q6_K", "Q8_0"))
    report = report_on(
        bench,
        comparison(q4, bench.reference, divergence=0.4),
        comparison(q6, bench.reference, divergence=0.01),
        comparison(q8, bench.reference, divergence=0.02),
        speed(q6, 50),
        speed(q8, 75),
    )
    pick = only_study(report).recommendation
    assert pick.file == "Tiny-Q6_K.gguf"
    told = {a.wish: (a.file, a.why) for a in pick.alternatives}
    assert told["Faster"][0] == "Tiny-Q8_0.gguf"
    assert told["Faster"][1].endswith("1.5 times the speed")
    assert told["Smaller"][0] == "Tiny-Q4_0.gguf"
    assert "Closer" not in told


@pytest.mark.parametrize(
    ("tolerance", "file", "certainty"),
    [
        (0.01, "Tiny-Q6_K.gguf", "shown"),
        (1.0, "Tiny-Q2_K.gguf", "shown"),
        (0.0001, "Tiny-Q8_0.gguf", "closest"),
    ],
)
def test_the_tolerance_decides(
    measured: Bench, tolerance: float, file: str, certainty: str
) -> None:
    report = pipeline.gather_report(tolerance=tolerance, models_dir=measured.store.root)
    pick = only_study(report).recommendation
    assert (pick.file, pick.certainty) == (file, certainty)


def test_a_wide_interval_makes_an_estimate(tmp_path: Path) -> None:
    bench = make_files(tmp_path)
    q4, q6 = bench.files["Q4_0"], bench.files["Q6_K"]
    noisy = {"reach": 0.2, "verdict": "indistinguishable"}
    report = report_on(
        bench,
        comparison(q4, bench.reference, divergence=0.3, reach=0.2),
        comparison(q6, bench.reference, divergence=0.02, **noisy),
    )
    pick = only_study(report).recommendation
    assert (pick.file, pick.certainty) == ("Tiny-Q6_K.gguf", "estimated")
    assert "too few to be sure" in pick.headline
    assert "cannot be told from no change" in pick.reasons[0]
    assert any("about 900 chunks" in caution for caution in pick.cautions)


def test_a_smaller_file_that_may_do_is_told(tmp_path: Path) -> None:
    bench = make_files(tmp_path)
    q4, q6 = bench.files["Q4_0"], bench.files["Q6_K"]
    report = report_on(
        bench,
        comparison(q4, bench.reference, divergence=0.03, reach=0.2),
        comparison(q6, bench.reference, divergence=0.02),
    )
    pick = only_study(report).recommendation
    assert (pick.file, pick.certainty) == ("Tiny-Q6_K.gguf", "shown")
    assert any(c.startswith("Tiny-Q4_0.gguf may be within 5 %") for c in pick.cautions)


def test_few_chunks_show_nothing(tmp_path: Path) -> None:
    bench = make_files(tmp_path)
    one = comparison(bench.files["Q8_0"], bench.reference, divergence=0.0001, chunks=3)
    pick = only_study(report_on(bench, one)).recommendation
    assert (pick.file, pick.certainty) == ("Tiny-Q8_0.gguf", "estimated")
    told = " ".join(pick.cautions)
    assert "Only 3 chunks were read" in told
    assert "nothing to choose from" in told


def test_a_perplexity_that_fell_does_not_hide_a_divergence(tmp_path: Path) -> None:
    bench = make_files(tmp_path)
    report = report_on(
        bench,
        comparison(bench.files["Q2_K"], bench.reference, divergence=0.4, delta=-0.05),
        comparison(bench.files["Q8_0"], bench.reference, divergence=0.001),
    )
    assert only_study(report).recommendation.file == "Tiny-Q8_0.gguf"


def test_a_text_that_costs_more_is_a_caution(tmp_path: Path) -> None:
    bench = make_files(tmp_path)
    file = bench.files["Q6_K"]
    report = report_on(
        bench,
        comparison(file, bench.reference, divergence=0.01, text="books/prose.txt"),
        comparison(file, bench.reference, divergence=0.2, text="code.py", chunks=30),
    )
    (caution, _) = only_study(report).recommendation.cautions
    assert caution.startswith("On code.py it costs more: 0.200 nats per token")


def test_a_leak_is_a_caution(tmp_path: Path) -> None:
    bench = make_files(tmp_path)
    leaking = comparison(bench.files["Q6_K"], bench.reference, divergence=0.01)
    report = report_on(bench, replace(leaking, overlap=0.4))
    first = only_study(report).recommendation.cautions[0]
    assert "calibrated on text that holds 40 % of the text" in first


def test_perplexities_alone_are_an_estimate(tmp_path: Path) -> None:
    bench = make_files(tmp_path)
    values = {"Q2_K": 30, "Q4_K_M": 20.5, "Q6_K": 20.1, "Q8_0": 20}
    study = only_study(
        report_on(bench, *(perplexity(bench.files[n], v) for n, v in values.items()))
    )
    pick = study.recommendation
    assert (pick.file, pick.certainty) == ("Tiny-Q4_K_M.gguf", "estimated")
    assert "+2.5 % beside 20.000" in pick.reasons[0]
    assert any("Perplexities alone" in caution for caution in pick.cautions)
    assert any(c.startswith("ggufkit bench Tiny-Q2_K") for c in pick.commands)


def test_one_perplexity_recommends_nothing(tmp_path: Path) -> None:
    bench = make_files(tmp_path)
    report = report_on(bench, perplexity(bench.files["Q6_K"], 20))
    pick = only_study(report).recommendation
    assert (pick.file, pick.certainty) == ("", "none")
    assert _Page(html.render(report)).recommended == []


# --- types


def test_the_map_of_types(tmp_path: Path) -> None:
    file = make_gguf(tmp_path / "m.gguf", ["Q4_K", "Q6_K"], blocks=2)
    found = type_map(read_gguf(file))
    assert found.blocks == (0, 1)
    assert {row.role: row.types for row in found.rows} == {
        "attn_q": ("Q4_K", "Q6_K"),
        "attn_v": ("Q6_K", "Q4_K"),
        "ffn_down": ("Q4_K", "Q6_K"),
    }
    assert found.others == {"token_embd": "Q4_K"}
    assert found.vectors == 3
    assert [(part.type, part.tensors) for part in found.parts] == [
        ("Q4_K", 4),
        ("Q6_K", 3),
        ("F32", 3),
    ]
    assert found.parts[0].bits == 4.5


# --- words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.01, "0.0100"),
        (0.00081234, "0.000812"),
        (12.345, "12.3"),
        (1234.5, "1234"),
        (3.3e-5, "3.3e-05"),
        (100, "100"),
    ],
)
def test_figures(value: float, text: str) -> None:
    assert words.figures(value) == text


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [(0.021, 0.00063, "0.0210 ± 0.0006"), (27.4174, 1.00234, "27.4 ± 1.0"), (98, 0, "98.0 ± 0")],
)
def test_figures_with_errors(value: float, error: float, text: str) -> None:
    assert words.with_error(value, error) == text


def test_labels_lose_what_all_names_begin_with() -> None:
    assert words.labels(["A-1B-Q4_0", "A-1B-Q4_K_M"]) == ["Q4_0", "Q4_K_M"]
    assert words.labels(["A-1B-Q4_0", "A-1B-awq-Q4_0"]) == ["Q4_0", "awq-Q4_0"]
    assert words.labels(["one", "two"]) == ["one", "two"]
    assert words.labels(["A-1B-Q4_0"]) == ["Q4_0"]
    assert words.labels(["A", "A-Q8_0"]) == ["A", "A-Q8_0"]


# --- the page


class _Page(HTMLParser):
    """What a page would fetch, run, or mark twice."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.recommended: list[str] = []
        self._in_pick = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("href", "src", "srcset", "action", "data", "xlink:href", "poster"):
                self.addresses.append(value or "")
            elif name.startswith("on"):
                self.handlers.append(name)
            elif name == "data-recommended":
                self._in_pick = True
        if tag == "use":
            assert dict(attrs)["href"], "a mark without its shape"

    def handle_data(self, data: str) -> None:
        if self._in_pick:
            self.recommended.append(data)
            self._in_pick = False


def test_the_page_loads_and_runs_nothing(page: str) -> None:
    found = _Page(page)
    assert not found.tags & {"script", "link", "img", "iframe", "object", "embed", "form", "base"}
    assert all(address.startswith("#") for address in found.addresses)
    assert not found.handlers
    assert "@import" not in page
    assert set(re.findall(r"url\((.)", page)) <= {"#"}
    # What is left of addresses names the vocabulary of SVG; nobody fetches it.
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in page
    assert found.recommended == ["Tiny-Q4_K_M.gguf"]


def test_ids_are_unique_and_all_references_lead_somewhere(page: str) -> None:
    found = _Page(page)
    assert len(found.ids) == len(set(found.ids))
    used = {a.removeprefix("#") for a in found.addresses} | set(
        re.findall(r"url\(#([^)]+)\)", page)
    )
    assert used
    assert used <= set(found.ids)


def test_plots_follow_the_page(page: str) -> None:
    plots = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert {re.search(r'class="(\w+)"', plot)[1] for plot in plots} == {"wide", "narrow"}
    assert len(plots) == 2 * 5  # size, speed, percentiles, texts, one task
    for plot in plots:
        colours = set(re.findall(r"#[0-9a-f]{6}\b", plot))
        assert not colours, "a colour that does not follow the scheme"
        assert "var(--ink)" in plot or "var(--muted)" in plot
        assert "aria-label" in plot
        assert "<metadata" not in plot
        assert "<style" not in plot


def test_names_cannot_become_markup(tmp_path: Path) -> None:
    stem = HOSTILE.replace("/", "\u2215")
    bench = make_measured(tmp_path, stem=stem, text=f"{HOSTILE}.txt")
    evil = make_gguf(tmp_path / "tiny" / f"{stem}-Q5_0.gguf", ["Q5_0"], name=HOSTILE)
    report = report_on(bench, comparison(evil, bench.reference, divergence=0.02))
    found = _Page(html.render(report))
    assert "script" not in found.tags
    assert not found.handlers
    assert found.recommended == [only_study(report).recommendation.file]
    assert found.recommended[0].startswith(stem)
    text = markdown.render(report)
    outside_of_code = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    assert "<script" not in outside_of_code
    for line in outside_of_code.splitlines():
        assert "`" not in line.replace("\\`", "")


def test_every_row_of_a_markdown_table_has_its_columns(measured: Bench) -> None:
    text = markdown.render(pipeline.gather_report(models_dir=measured.store.root))
    assert "**Recommended: Tiny-Q4\\_K\\_M.gguf**" in text
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) >= 6
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table


@pytest.mark.parametrize("name", ["模型", "a$b$c", "tab\tin\x07name"])
def test_odd_letters_are_drawn(tmp_path: Path, name: str) -> None:
    report = report_on(make_measured(tmp_path, stem=name))
    (told,) = _Page(html.render(report)).recommended
    assert told == only_study(report).recommendation.file
    assert told.isprintable()


def test_equal_files_have_a_place_on_the_axis(tmp_path: Path) -> None:
    bench = make_files(tmp_path)
    report = report_on(
        bench,
        comparison(bench.files["Q8_0"], bench.reference, divergence=0.0, reach=0.0),
        comparison(bench.files["Q2_K"], bench.reference, divergence=0.5),
    )
    assert only_study(report).recommendation.file == "Tiny-Q8_0.gguf"
    assert "Q8_0" in html.render(report)


def test_colours_can_be_read() -> None:
    """Contrast by WCAG 2: 4.5 for text, 3 for marks, in both schemes."""
    css = (Path(words.__file__).parent / "page.css").read_text(encoding="utf-8")
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL)[:2]
    )
    assert light.keys() == dark.keys()
    for scheme in (light, dark):
        for ink in ("ink", "muted", "accent", "good", "warn"):
            for ground in ("card", "paper"):
                assert _contrast(scheme[ink], scheme[ground]) >= 4.5, (ink, ground)
        for ink, ground in (("good", "good-tint"), ("warn", "warn-tint"), ("ink", "code")):
            assert _contrast(scheme[ink], scheme[ground]) >= 4.5, (ink, ground)
        for mark in ("faint", *(f"series-{n}" for n in range(1, 7))):
            assert _contrast(scheme[mark], scheme["card"]) >= 3, mark


def _contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


# --- on disk


def test_another_s_file_is_not_replaced(measured: Bench, tmp_path: Path) -> None:
    for name in ("r.html", "r.md"):
        (tmp_path / name).write_text("my own", encoding="utf-8")
        with pytest.raises(UsageError, match=re.escape(f"{name} exists and is not a report")):
            pipeline.report(out=tmp_path / "r.html", models_dir=measured.store.root)
        assert not (tmp_path / "r.html").exists() or name == "r.html"
        (tmp_path / name).unlink()
    (tmp_path / "r.html").write_text("my own", encoding="utf-8")
    for force in (True, False):  # the second time it is a report already
        pipeline.report(out=tmp_path / "r.html", force=force, models_dir=measured.store.root)
    assert {p.name for p in tmp_path.iterdir()} == {"r.html", "r.md"}


def test_a_full_disk_leaves_the_old_report(
    measured: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "r.html"
    pipeline.report(out=out, tolerance=0.01, models_dir=measured.store.root)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    written = Path.write_text

    def full(path: Path, text: str, **options: str) -> int:
        if ".r.md" in path.name:
            written(path, text[:100], **options)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written(path, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(DiskSpaceError, match="is full: the report was not written"):
        pipeline.report(out=out, models_dir=measured.store.root)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_place_that_cannot_be_written_to(measured: Bench, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written"):
        pipeline.report(out=tmp_path / "file" / "r.html", models_dir=measured.store.root)
    with pytest.raises(UsageError, match=r"does not end with \.html"):
        pipeline.report(out=tmp_path / "r.md", models_dir=measured.store.root)
    (tmp_path / "r.html").mkdir()
    with pytest.raises(UsageError, match="is a directory"):
        pipeline.report(out=tmp_path / "r.html", models_dir=measured.store.root)


# --- the verb


def test_the_verb(measured: Bench, tmp_path: Path, run_cli: Run) -> None:
    root = measured.store.root
    code, out, err = run_cli("--models-dir", root, "report", "-o", tmp_path / "r.html")
    assert code == 0, err
    assert "Tiny-Q4_K_M.gguf" in out
    assert str(tmp_path / "r.html") in out
    code, out, err = run_cli(
        *("--models-dir", root, "report", "-o", tmp_path / "r.html", "--json"),
        *("--tolerance", "1", "Tiny-Q6_K", "Tiny-Q8_0"),
    )
    assert code == 0, err
    told = json.loads(out)
    (study,) = told["report"]["studies"]
    assert study["recommendation"]["file"] == "Tiny-Q6_K.gguf"
    assert [e["label"] for e in study["entries"]] == ["Q6_K", "Q8_0"]
    assert Path(told["page"]).is_file()
    assert Path(told["markdown"]).is_file()


def test_without_results_the_next_commands_are_told(tmp_path: Path, run_cli: Run) -> None:
    code, out, err = run_cli("--models-dir", tmp_path / "none", "report")
    assert (code, out) == (1, "")
    assert "no stored results" in err
    assert "ggufkit compare REFERENCE MODEL... --text" in err
    assert not (tmp_path / "none").exists()
    bench = make_files(tmp_path / "models")
    keep(bench.store, task(bench.files["Q4_0"], 0.3))
    with pytest.raises(SourceError, match="no stored results on the quality"):
        pipeline.report(models_dir=bench.store.root)


def test_without_matplotlib_the_extra_is_named(
    measured: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: Run
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run_cli("--models-dir", measured.store.root, "report", "-o", tmp_path / "r.html")
    assert code == 2
    assert "pip install 'ggufkit[report]'" in err
    assert not list(tmp_path.iterdir())
