"""Runs in which a language model ranked, beside the stand-in and the fixed reward.

    python experiments/ranked.py experiments/transcripts/model/*   # prints the table of RESULTS.md

A run is a folder with llm.jsonl, metrics.csv and theta.csv. Beside it, NAME.standin.csv and
NAME.fixed.csv are the metrics.csv of the same seed and first reward with the stand-in's rankings,
and with the first reward never changed.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from study import rows, steps_to_success  # noqa: E402

from llm import read_ranking  # noqa: E402
from mh import pairs_of  # noqa: E402
from standin import StandIn  # noqa: E402


def preferences(prompt: str, reply: str) -> set:
    """The ordered pairs (better, worse) of an answer to a ranking's prompt."""
    count = max(int(label) for label in re.findall(r"^Attempt (\d+):", prompt, re.MULTILINE))
    return set(map(tuple, pairs_of(read_ranking(reply, count)).tolist()))


def rankings(folder: Path) -> list[dict]:
    """Of each ranking: pairs ordered, agreement with the stand-in's, tokens, seconds."""
    found = []
    for line in (folder / "llm.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] != "rank" or not record.get("reply"):
            continue
        mine = preferences(record["prompt"], record["reply"])
        scripted = StandIn()([{"role": "user", "content": record["prompt"]}]).text
        theirs = preferences(record["prompt"], scripted)
        both = len(mine & theirs) + len({(b, a) for a, b in mine} & theirs)
        agreement = len(mine & theirs) / both if both else np.nan
        found.append({"pairs": len(mine), "agreement": agreement, "seconds": record["seconds"]})
    return found


def evaluations(path: Path) -> dict[int, float]:
    return {int(row["step"]): float(row["success"]) for row in rows(path)} if path.exists() else {}


def learnt(path: Path) -> str:
    """The step of the first of two perfect evaluations in a row, as text."""
    success = evaluations(path)
    step = steps_to_success(list(success.items()))
    return f"{step:,}" if np.isfinite(step) else f">{max(success):,}" if success else "not run"


def row(folder: Path) -> list[str]:
    """A row of the table."""
    success, theta = evaluations(folder / "metrics.csv"), rows(folder / "theta.csv")
    changes = {int(line["step"]): line["cause"] for line in theta if line["step"] != "0"}
    told = []
    for step, cause in changes.items():
        start = step // 1_000 * 1_000
        shares = [success.get(start + after, np.nan) for after in (0, 1_000, 3_000)]
        told.append(f"{start:,} ({cause}): " + " → ".join(f"{share:.0%}" for share in shares))
    asked = rankings(folder)
    agreement = ", ".join(f"{100 * ranking['agreement']:.1f}" for ranking in asked)
    beside = [folder.with_name(f"{folder.name}.{other}.csv") for other in ("standin", "fixed")]
    steps = [learnt(path) for path in (folder / "metrics.csv", *beside)]
    return [folder.name, *steps, "; ".join(told).replace("nan%", "–") or "none", agreement]


def main():
    print("| run | model ranks | stand-in ranks | fixed ", end="")
    print("| θ changed at: success then → after 1,000 → after 3,000 | agreement, % |")
    print("| --- " * 6 + "|")
    for name in sys.argv[1:]:
        if Path(name).is_dir():
            print(f"| {' | '.join(row(Path(name)))} |")


if __name__ == "__main__":
    main()
