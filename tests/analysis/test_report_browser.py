"""Generations in a page: found, filtered, and never taken for a part of it."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from geomjax.analysis.report import Browser, Entry, Report, write_report
from geomjax.analysis.report.browser import script

EVIL = (
    '</pre></details></div><script>alert("1")</script><img src=x onerror=alert(1)>'
    "\x00\x1b\u202e\u200e\u200f\u061c\u2066\ud800 &lt; ' --> ]]>"
)
ENTRIES = [
    Entry("problem 1", ("right", "aime 24"), {"completion": "It is 42.\n<b>"}),
    Entry("problem 2", ("wrong", "aime 24"), {"completion": EVIL, EVIL: "x"}),
    Entry(EVIL, (EVIL,), {"completion": "nothing"}),
]


def page_of(entries, folder):
    report = Report("Evaluation", "Accuracy.")
    report.section("Generations", Browser(entries, "All lie in a file."))
    return write_report(report, folder)


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.shown = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.shown.append(data)


def test_a_generation_is_shown_and_does_nothing(tmp_path):
    text = page_of(ENTRIES, tmp_path).page.read_text(encoding="utf-8")
    page = Tags(text)
    assert page.tags.count("script") == 1
    assert page.tags.count("details") == 3
    assert "img" not in page.tags
    assert not [a for a in page.attributes if a[0].startswith("on") or a[0] == "src"]
    assert 'alert("1")' in "".join(page.shown)
    unfit = (
        "[\x00-\x08\x0b-\x1f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
    )
    assert not re.search(unfit, text)
    assert "\\u0000\\u001b\\u202e\\u200e\\u200f\\u061c\\u2066\\ud800" in text
    assert "It is 42.\n" in "".join(page.shown)


def test_no_script_may_run_but_ours(tmp_path):
    text = page_of(ENTRIES, tmp_path).page.read_text(encoding="utf-8")
    (policy,) = (v for k, v in Tags(text).attributes if k == "content" and "src" in v)
    (ours,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(ours.encode()).digest()).decode()
    assert policy.startswith("default-src 'none';")
    assert policy.endswith(f"script-src 'sha256-{digest}'")
    assert ours == script()
    assert not re.search(r"fetch|XMLHttp|import|eval|innerHTML|https?:", ours)
    plain = Report("Without", "One.")
    without = write_report(plain, tmp_path / "plain").page.read_text()
    assert "script" not in without


def test_markdown_names_them_only(tmp_path):
    text = page_of(ENTRIES, tmp_path).markdown.read_text()
    assert "All lie in a file. (3 in the HTML page.)" in text
    assert "alert" not in text


DOCUMENT = """
const listeners = [];
const element = (extra) => ({
  addEventListener: (kind, call) => listeners.push(call), value: "", ...extra,
});
const entries = %s.map(([labels, textContent]) => ({
  dataset: { labels }, textContent, hidden: false,
}));
const parts = { input: element(), select: element(), output: element() };
const box = {
  querySelector: (name) => parts[name],
  querySelectorAll: () => entries,
};
globalThis.document = { querySelectorAll: () => [box] };
%s
const state = (text, label) => {
  parts.input.value = text;
  parts.select.value = label;
  listeners.forEach((call) => call());
  return [entries.map((e) => !e.hidden), parts.output.value];
};
console.log(JSON.stringify(%s.map(([text, label]) => state(text, label))));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_text_and_label_filter_together():
    entries = [["l0 l1", "It is FORTY-two"], ["l10", "it is 7"], ["l1", "none"]]
    asked = [["", ""], ["it is", ""], ["it is", "l1"], ["", "l1"], ["forty", "l10"]]
    program = DOCUMENT % (json.dumps(entries), script(), json.dumps(asked))
    found = subprocess.run(
        ["node", "-e", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(found.stdout) == [
        [[True, True, True], "3 of 3"],
        [[True, True, False], "2 of 3"],
        [[True, False, False], "1 of 3"],
        [[True, False, True], "2 of 3"],
        [[False, False, False], "0 of 3"],
    ]
