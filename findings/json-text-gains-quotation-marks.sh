#!/usr/bin/env bash
# Finding:  one list in a column of text puts quotation marks around thousands of other rows' text.
# Versions: datasets 5.2.0, pyarrow 26.0.1, pandas 3.1.1
# Expected: load_dataset("json") gives each string as it is in the file, or refuses a file whose column has a list in
#           its last row.
# Seen:     the column's type is taken from the first 10 MiB. When a later block has a row of another type the reader
#           writes that block's column as JSON and reads it as the text that the first block had: every plain string
#           of the block now begins and ends with a quotation mark, and line feeds are \n. No error and no warning.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
python() { "$work/venv/bin/python" -I "$@"; }
python -m pip install --quiet datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1

HF_HUB_OFFLINE=1 HF_HOME="$work/hf" python -W ignore - "$work" <<'EOF'
import json
import sys
from pathlib import Path

from datasets import load_dataset

ROWS = 60_000
text = "a line of an answer\n" * 12
path = Path(sys.argv[1]) / "data.jsonl"


def load(last):
    with path.open("w") as file:
        for content in [*[text] * (ROWS - 1), last]:
            file.write(json.dumps({"content": content}) + "\n")
    return load_dataset("json", data_files=str(path), split="train")["content"]


counts = {}
for last in ("the last answer", ["the last answer"]):
    read = list(load(last))
    altered = [i for i, content in enumerate(read[:-1]) if content != text]
    counts[type(last).__name__] = len(altered)
    print(f"{path.stat().st_size / 2**20:.1f} MiB, last row a {type(last).__name__}: {len(altered):,} others altered")
first = altered[0] if altered else 0
print(f"row {first:,} is {read[first][:12]!r}, not {text[:11]!r}")
quoted = all(read[i] == json.dumps(text) for i in altered)
if counts["str"] == 0 and counts["list"] > 10_000 and first > 30_000 and quoted:
    print("ok: a list in a later block puts the block's text in quotation marks")
else:
    print("changed: what a list in a later block does to text")
    sys.exit(1)
EOF
