"""How the readers of a checkout do on the cases of tests/cases and of this folder.

python experiments/robustness/count.py .          # this checkout, or a path to another one
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])

import llm  # noqa: E402

HERE = Path(__file__).resolve().parent
READERS = {
    "rankings": lambda case: llm.read_ranking(case["text"], case["count"]),
    "analyses": lambda case: llm.read_analysis(case["text"], case["params"])[1],
    "code": lambda case: llm.read_code(case["text"]),
}


def outcome(case: dict, read) -> str:
    try:
        return "read rightly" if read(case) == case["want"] else "misread"
    except ValueError:
        allowed = case["want"] is None or case.get("may_refuse")
        return "refused rightly" if allowed else "refused though readable"


for kind, read in READERS.items():
    paths = [*(HERE.parents[1] / "tests/cases").glob(f"*{kind}.jsonl"), HERE / f"{kind}.jsonl"]
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    outcomes = [outcome(json.loads(line), read) for line in lines]
    print(kind, len(lines), {name: outcomes.count(name) for name in sorted(set(outcomes))})
