"""Runs in which a language model ranked, beside the stand-in and the fixed reward.

    python experiments/ranked.py experiments/transcripts/model/*   # prints the table of RESULTS.md
    python experiments/ranked.py experiments/transcripts/blind     # the same rankings, shown less

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


def agreement(some: set, others: set) -> float:
    """The share of the pairs ordered by both that both order alike, in percent."""
    both = len(some & others) + len({(b, a) for a, b in some} & others)
    return 100 * len(some & others) / both if both else np.nan


def rankings(folder: Path) -> list[tuple[str, set]]:
    """The prompts of a run's answered rankings, and the preferences in the answers."""
    lines = (folder / "llm.jsonl").read_text(encoding="utf-8").splitlines()
    ranks = [r for r in map(json.loads, lines) if r["kind"] == "rank" and r.get("reply")]
    return [(rank["prompt"], preferences(rank["prompt"], rank["reply"])) for rank in ranks]


def stand_in(prompt: str) -> set:
    return preferences(prompt, StandIn()([{"role": "user", "content": prompt}]).text)


def blind(folder: Path) -> None:
    """Prints how far rankings of bare readings agree with those of full descriptions."""
    for path in sorted(folder.glob("*.prompt.txt")):
        task = path.name.partition(".")[0]
        prompt, answer = path.read_text(), (folder / f"{task}.answer.md").read_text()
        _, full = rankings(folder.parent / f"{task}-71")[-1]
        print(f"{task}: {agreement(preferences(prompt, answer), full):.1f} % of the pairs")


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
    alike = [agreement(ranked, stand_in(prompt)) for prompt, ranked in rankings(folder)]
    beside = [folder.with_name(f"{folder.name}.{other}.csv") for other in ("standin", "fixed")]
    steps = [learnt(path) for path in (folder / "metrics.csv", *beside)]
    return [
        folder.name,
        *steps,
        "; ".join(told).replace("nan%", "–") or "none",
        ", ".join(f"{a:.1f}" for a in alike),
    ]


def main():
    if sys.argv[1:] and Path(sys.argv[1]).name == "blind":
        return blind(Path(sys.argv[1]))
    print("| run | model ranks | stand-in ranks | fixed ", end="")
    print("| θ changed at: success then → after 1,000 → after 3,000 | agreement, % |")
    print("| --- " * 6 + "|")
    for name in sys.argv[1:]:
        if Path(name).is_dir():
            print(f"| {' | '.join(row(Path(name)))} |")


if __name__ == "__main__":
    main()
