"""The README cannot drift: its commands, links and examples are checked here.

A Python block after the comment `<!-- example -->` is run, in an empty folder.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(
    r"(?:^<!-- (?P<mark>[\w: -]+?) -->\n+)?^```(?P<language>\w*)\n(?P<body>.*?)^```$",
    re.M | re.S,
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")
EXAMPLE_MARK = "example"


def blocks(text: str) -> list[tuple[str | None, str, str]]:
    """Mark, language and body of every fenced block."""
    return [match.group("mark", "language", "body") for match in FENCE.finditer(text)]


def marked(text: str, mark: str) -> list[str]:
    """Bodies of the blocks that follow the comment `mark`."""
    return [body for found, _, body in blocks(text) if found == mark]


def slug(heading: str) -> str:
    """The anchor that a heading gets in rendered Markdown."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def faults(text: str, root: Path) -> list[str]:
    """What `text` names and `root` does not have: modules, configs, variants, links."""
    found = []
    for module in re.findall(
        r"python -m ((?:experiments|geomjax)(?:\.[a-z]\w*)*)", text
    ):
        path = root.joinpath(*module.split("."))
        if not (path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()):
            found.append(f"no module {module}")
    for file, variant in re.findall(
        r"--config[= ](configs/[\w/]+\.py)(?::(\w+))?", text
    ):
        path = root / file
        if not path.is_file():
            found.append(f"no config {file}")
        elif variant and variant not in words(path):
            found.append(f"no variant {variant} in {file}")
    prose = re.sub(r"`[^`\n]+`", "", FENCE.sub("", text))
    anchors = {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.M)}
    for link in (a or b for a, b in LINK.findall(prose)):
        if re.match(r"(https?|mailto):", link):
            continue
        file, _, anchor = link.partition("#")
        if file and not (root / file).exists():
            found.append(f"no file {file}")
        elif not file and anchor not in anchors:
            found.append(f"no heading #{anchor}")
    return found


def words(path: Path) -> set[str]:
    """Strings of a Python file, which name the variants of a config among others."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def test_commands_and_links_lead_somewhere():
    assert not faults(README, ROOT)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("`python -m experiments.tiny_word`", "no module experiments.tiny_word"),
        ("python -m experiments --config=configs/none.py", "no config configs/none.py"),
        ("--config=configs/optimizer_ablation.py:smokey", "no variant smokey"),
        ("`python -m experiments.NAME` or python -m geomjax.", "no module geomjax"),
        ("see [it](docs/none.md#x)", "no file docs/none.md"),
        ('<img src="none.png">', "no file none.png"),
        ("# One thing\n[it](#another-thing)", "no heading #another-thing"),
    ],
)
def test_a_fault_is_found(text, expected):
    assert expected in faults(text, ROOT)[0]


def test_what_exists_is_no_fault():
    text = (
        "# One `odd` thing!\n[a](#one-odd-thing) [b](LICENSE) [c](https://jax.dev)\n"
        "python -m experiments, python -m experiments.optimizer_ablation "
        "--config=configs/optimizer_ablation.py:smoke"
    )
    assert not faults(text, ROOT)


@pytest.mark.parametrize(
    ("mark", "end"),
    [
        ("ci: run", "install -e . && python -m experiments.optimizer_ablation"),
        ("ci: test", 'install -e ".[test]" && python -m pytest'),
    ],
)
def test_setting_up_is_one_line_in_one_environment(mark, end):
    (body,) = marked(README, mark)
    start = "python3 -m venv .venv && . .venv/bin/activate && python -m pip "
    assert body == f"{start}{end}\n"


def test_ci_runs_the_line_of_the_readme(tmp_path):
    """The shell function of .ci/run finds the line that this file finds."""
    script = (ROOT / ".ci" / "run").read_text()
    function = re.search(r"^readme_line\(\) \{.*?^\}$", script, re.M | re.S)[0]
    (tmp_path / "README.md").write_text(
        f"```bash\nno\n```\n{README}\n<!-- ci: test -->\n```\nno\n```\n"
    )
    done = subprocess.run(
        ["bash", "-c", f"{function}\nreadme_line test"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == marked(README, "ci: test")[0]
    assert "readme_line test" in script.replace(function, "")


@pytest.mark.parametrize("code", marked(README, EXAMPLE_MARK))
def test_an_example_runs(code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_python_blocks_parse():
    for _, language, body in blocks(README):
        if language == "python":
            ast.parse(body)


def test_marks_are_known():
    """A misspelt mark would leave its block unchecked."""
    marks = {mark for mark, _, _ in blocks(README)} - {None}
    assert marks <= {"ci: run", "ci: test", EXAMPLE_MARK}
    assert {"ci: run", "ci: test"} <= marks


def test_blocks_are_found_with_their_marks():
    text = "```\na\n```\n\n<!-- example -->\n```python\nb\nc\n```\n<!-- other -->\nd\n"
    assert blocks(text) == [(None, "", "a\n"), ("example", "python", "b\nc\n")]
