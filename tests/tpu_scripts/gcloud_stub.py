"""A gcloud that records its calls and answers from a list; the tests put it on PATH.

`$STUB/answers.json` maps what a call contains to answers `[status, output]`, one for
each call, of which the last repeats. Each call is a line of `$STUB/calls.jsonl`.
"""

import json
import os
import sys
from pathlib import Path

folder = Path(os.environ["STUB"])
arguments = sys.argv[1:]
with open(folder / "calls.jsonl", "a") as file:
    file.write(json.dumps(arguments) + "\n")
answers = json.loads((folder / "answers.json").read_text())
for part, of_part in answers.items():
    if part in " ".join(arguments):
        status, output = of_part[0]
        if len(of_part) > 1:
            del of_part[0]
        (folder / "answers.json").write_text(json.dumps(answers))
        print(output, file=sys.stderr if status else sys.stdout)
        sys.exit(status)
