"""Lists the experiments: `python -m experiments`."""

import ast
from pathlib import Path

FOLDER = Path(__file__).parent


def summaries(folder: Path) -> dict[str, str]:
    """First docstring line of every module of `folder` that can be run, by name.

    Modules are parsed, not imported, so that the list does not wait for JAX. Packages
    and modules whose name begins with an underscore are helpers.

    Raises:
        ValueError: Modules that have no docstring, all of them named.
    """
    found, undocumented = {}, []
    for path in sorted(folder.glob("[!_]*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if doc:
            found[path.stem] = doc.splitlines()[0]
        else:
            undocumented.append(path.name)
    if undocumented:
        raise ValueError(
            f"{folder} holds modules without a docstring: {', '.join(undocumented)}; "
            "its first line is what `python -m experiments` prints, so write one"
        )
    return found


def main() -> None:
    """Prints a line for each experiment."""
    lines = summaries(FOLDER)
    width = max(map(len, lines))
    print("Run one with `python -m experiments.NAME`; --help lists its options.\n")
    for name, summary in lines.items():
        print(f"  {name:<{width}}  {summary}")


if __name__ == "__main__":
    main()
