"""Reports: self-contained pages, faithful Markdown, whole files, equal bytes."""

import html.parser
import math
import os
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from geomjax.analysis.plots import Curve, Reference, learning_curves, style
from geomjax.analysis.report import (
    Claim,
    Claims,
    Code,
    Column,
    Estimate,
    Facts,
    Links,
    Plot,
    Report,
    Table,
    write_report,
)
from geomjax.analysis.report.markdown import escape_markdown, render_markdown
from geomjax.analysis.report.page import render_page
from geomjax.analysis.report.vector import THEME_VARIABLES

EVIL = """</title><script src="http://evil.example/x.js">alert('1')</script>"""
EVIL += """<img onerror=alert(1) src=x> "quoted" --> | `x` </svg> &lt;"""
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(html.parser.HTMLParser):
    """Parses a page strictly: every element closed in turn, every id used once."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.text = [], [], [], [], []
        self.attributes = []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs, closed=False):
        self.tags.append(tag)
        for key, value in attrs:
            self.attributes.append((key, value))
            if key == "id":
                self.ids.append(value)
            if key in ("href", "src", "xlink:href", "srcset", "action"):
                self.links.append(value)
        if tag not in VOID and not closed:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs, closed=True)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def curves(name="adamw"):
    x = np.arange(3.0)
    return learning_curves(
        {name: Curve(x, np.stack([x, x + 1]))},
        y_label="accuracy",
        references=[Reference("teacher", 3.0)],
    )


def make_report(name="adamw"):
    report = Report(f"Ablation of {name}", f"What {name} does.")
    section = report.section(f"Arms {name}", f"Every arm, {name} among them.")
    section.add(
        Table(
            [Column("arm", "left"), Column("accuracy", spec=".1%", best="max")],
            [
                [name, Estimate(0.9, 0.02)],
                ["sgd", Estimate(0.6, 0.05)],
                ["mask", None],
            ],
            caption=f"Arms of {name}",
        ),
        Claims(
            [
                Claim(f"{name} above sgd", True, f"0.9 against 0.6, {name}"),
                Claim("mask below", False, "0.9 against 0.8"),
                Claim("tie", None, "intervals meet"),
            ]
        ),
    )
    report.section(
        "Figures",
        Plot("curves", curves(name), f"Curves of {name}."),
        Plot("more-curves", curves("other"), "More."),
    )
    report.section(
        "Setup",
        Code(f"python -m run --name={name}"),
        Facts("Config", {"train": {"steps": 3, "name": name}, "mask": None}),
        Facts("Versions", {name: "1.0"}, collapsed=True),
    )
    return report


def test_page_is_well_formed_and_asks_for_nothing(tmp_path):
    page = Page(write_report(make_report(), tmp_path).page.read_text())
    assert len(page.ids) == len(set(page.ids))
    assert page.links
    for link in page.links:
        assert link.startswith("#"), link
        assert link[1:] in page.ids, link
    text = (tmp_path / "report.html").read_text()
    assert "http:" not in text
    assert "https:" not in text
    assert not re.search(r"@import|url\((?!#)", text)
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    assert (
        "content",
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:",
    ) in (page.attributes)
    assert page.tags.count("svg") == 2
    assert page.tags.count("h1") == page.tags.count("title") == 1


def test_every_part_of_a_report_is_on_the_page(tmp_path):
    page = Page(write_report(make_report(), tmp_path).page.read_text())
    text = re.sub(r"\s+", " ", " ".join(page.text))
    for part in (
        "Ablation of adamw",
        "What adamw does.",
        "Every arm, adamw among them.",
        "90.0 ± 2.0%",
        "–",
        "✓ holds",
        "✗ does not hold",
        "? undecided",
        "0.9 against 0.6, adamw",
        "Curves of adamw.",
        "Figure 2.",
        "python -m run --name=adamw",
        "train.steps",
        "null",
    ):
        assert part in text, part
    assert [page.tags.count(tag) for tag in ("details", "section")] == [1, 3]


def test_names_from_checkpoints_cannot_inject(tmp_path):
    files = write_report(make_report(EVIL), tmp_path)
    text = files.page.read_text()
    page = Page(text)
    plain = Page(write_report(make_report(), tmp_path / "plain").page.read_text())
    structure = [t for t in page.tags if t not in ("path", "use")]  # glyphs differ
    assert structure == [t for t in plain.tags if t not in ("path", "use")]
    assert "alert" not in "".join(
        f"{k}={v}" for k, v in page.attributes if k != "aria-label"
    )
    assert all(link.startswith("#") for link in page.links)
    assert EVIL in "".join(page.text)  # shown as it is
    markdown = re.sub(r"```.*?```", "", files.markdown.read_text(), flags=re.DOTALL)
    assert "<" not in markdown


def test_figures_follow_the_theme_of_the_page(tmp_path):
    files = write_report(make_report(), tmp_path)
    page = files.page.read_text()
    body = page[page.index("<body>") :]
    for color, variable in THEME_VARIABLES.items():
        assert color not in body
        light = re.search(rf"{variable}: (#\w+);", page)
        assert light.group(1) == color, variable  # the light theme is the SVG's own
        assert len(re.findall(rf"{variable}: #", page)) == 2, "a dark value as well"
    assert f"var({THEME_VARIABLES[style.INK]})" in body
    assert style.INK in (tmp_path / "figures/curves.svg").read_text()


def test_markdown_links_resolve_and_tables_are_whole(tmp_path):
    files = write_report(make_report(EVIL), tmp_path)
    text = files.markdown.read_text()
    links = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert links == ["figures/curves.png", "figures/more-curves.png"]
    for link in links:
        assert (tmp_path / link).read_bytes().startswith(b"\x89PNG")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}
    assert "**90.0 ± 2.0%**" in text
    assert "- **✗ does not hold** mask below" in text


def test_files_are_written_as_png_and_svg(tmp_path):
    files = write_report(make_report(), tmp_path / "new" / "folder")
    names = [
        path.relative_to(tmp_path / "new/folder").as_posix() for path in files.figures
    ]
    assert names == [
        f"figures/{stem}{end}"
        for stem in ("curves", "more-curves")
        for end in (".png", ".svg")
    ]
    found = {p.name for p in (tmp_path / "new/folder").rglob("*") if p.is_file()}
    assert found == {p.name for p in (*files.figures, files.page, files.markdown)}


def test_equal_reports_give_equal_bytes(tmp_path):
    first = write_report(make_report(), tmp_path / "a")
    second = write_report(make_report(), tmp_path / "b")
    for a, b in zip(
        (first.page, first.markdown, *first.figures),
        (second.page, second.markdown, *second.figures),
        strict=True,
    ):
        assert a.read_bytes() == b.read_bytes(), a.name


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_report_and_no_draft(tmp_path, monkeypatch, step):
    before = write_report(make_report("old"), tmp_path)
    old = before.markdown.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space"):
        write_report(make_report("new"), tmp_path)
    assert before.markdown.read_bytes() == old
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".tmp")]


def test_nothing_is_written_when_rendering_fails(tmp_path):
    report = make_report()
    report.section("again", Plot("Curves", curves(), "The same name but for case."))
    with pytest.raises(ValueError, match=r"\['curves'\] more than once"):
        write_report(report, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a b", ".hidden", 'a"b', "a.svg"])
def test_plot_names_are_file_names(name):
    with pytest.raises(ValueError, match="becomes a file name"):
        Plot(name, Figure(), "caption")


def test_a_report_without_sections_is_a_page():
    report = Report("Empty", "Nothing yet.")
    Page(render_page(report, {}))
    assert render_markdown(report) == "# Empty\n\nNothing yet.\n"


@pytest.mark.parametrize(
    ("cell", "spec", "text"),
    [
        (None, ".3f", "–"),
        (math.nan, ".3f", "–"),
        (np.float32(0.5), ".3f", "0.500"),
        (np.int64(7), ".4g", "7"),
        (7, ".1%", "700.0%"),
        (123456, ".4g", "123456"),
        (True, ".3f", "yes"),
        (np.bool_(False), ".3f", "no"),
        (math.inf, ".3f", "inf"),
        ("name", ".3f", "name"),
        (Estimate(0.5, 0.012), ".1%", "50.0 ± 1.2%"),
        (Estimate(0.5, 0.012), ".2f", "0.50 ± 0.01"),
        (Estimate(0.5, None), ".2f", "0.50"),
        (Estimate(math.nan, None), ".2f", "–"),
    ],
)
def test_cells_are_formatted_by_their_column(cell, spec, text):
    assert Column("x", spec=spec).format(cell) == text


def test_estimates_from_samples():
    estimate = Estimate.from_samples([1.0, None, 2.0, 3.0, math.nan])
    assert estimate.mean == 2.0
    assert estimate.half_width == pytest.approx(4.302653 / math.sqrt(3))
    assert Estimate.from_samples([4.0]) == (4.0, None)
    assert math.isnan(Estimate.from_samples([]).mean)


@pytest.mark.parametrize(
    ("cells", "best", "rows"),
    [
        ([1.0, 3.0, 2.0], "max", {1}),
        ([1.0, 3.0, 1.0], "min", {0, 2}),
        ([None, 3.0, math.nan], "max", set()),  # nothing to compare with
        (["a", 3.0, 4], "max", {2}),
        ([np.float32(1.0), 0.5, True], "max", {0}),
        # 0.85 + 0.06 meets 0.90 - 0.01; 0.80 + 0.05 does not
        (
            [Estimate(0.9, 0.01), Estimate(0.85, 0.06), Estimate(0.8, 0.05)],
            "max",
            {0, 1},
        ),
    ],
)
def test_the_best_cells_are_highlighted(cells, best, rows):
    table = Table([Column("x", best=best)], [[cell] for cell in cells])
    assert {row for row, _ in table.highlighted()} == rows


def test_ragged_tables_are_refused():
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        Table([Column("a"), Column("b")], [[1, 2], [1]])
    with pytest.raises(ValueError, match="no columns"):
        Table([], [])


def test_facts_are_flattened():
    facts = Facts("Config", {"a": {"b": {"c": 1}, "d": "x"}, "e": [1, 2], "f": {}})
    assert facts.flat() == [("a.b.c", "1"), ("a.d", "x"), ("e", "[1, 2]"), ("f", "{}")]


def test_code_fences_outlast_their_content():
    report = Report("t", "s")
    report.section("code", Code("```\nnot the end\n````"))
    assert "`````text\n```\nnot the end\n````\n`````" in render_markdown(report)


@settings(max_examples=200)
@given(st.text())
def test_markdown_escapes_are_one_line_without_markup(text):
    escaped = escape_markdown(text)
    assert len(escaped.splitlines()) <= 1
    assert "<" not in escaped
    bare = re.sub(r"\\.", "", escaped)
    assert not set("`*_|[]$#") & set(bare)
    assert not re.match(r"\s*([-+=]|\d+[.)]\s)", bare) or escaped.startswith("\\")


@settings(max_examples=200)
@given(st.text())
def test_any_text_is_shown_as_it_is(text):
    report = Report("t", "s")
    report.section("a section", text)
    page = Page(render_page(report, {}))
    assert page.tags.count("p") == 2


def test_links_lead_to_files_below_the_report(tmp_path):
    report = Report("Pairs", "All of them.")
    report.section("Reports", Links({"a <b>": "pairs/a b:1/report.html"}))
    files = write_report(report, tmp_path)
    assert Page(files.page.read_text()).links[-1] == "./pairs/a%20b%3A1/report.html"
    line = r"- [a &lt;b&gt;](./pairs/a%20b%3A1/report.html)"
    assert line in files.markdown.read_text()
    for path in ("/etc/passwd", "../outside.html"):
        with pytest.raises(ValueError, match="below the folder"):
            Links({"x": path})
