"""Rankings by a language model, beside the stand-in's.

    python experiments/ranked.py runs experiments/transcripts/model/*  # whole runs
    python experiments/ranked.py views                                 # attempts in other words

A run is a folder with settings.json, llm.jsonl, metrics.csv and theta.csv, and with scores.json,
the stand-in's scores of what was ranked; where that is missing, it is made from episodes/. Beside
the folder, NAME.standin.csv and NAME.fixed.csv are the metrics.csv of the same seed and first
reward with the stand-in's rankings, and with the first reward never changed.

transcripts/views/ holds eight questions and a model's answers to five versions of each.
"""

import contextlib
import csv
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
from study import REPLIES, RESULTS, ROOT, rows, steps_to_success

from envs import TASKS
from llm import describe, read_code, read_ranking
from mh import discordance, pairs_of
from reward import Reward
from run import Change, State
from selfalign import Config, align
from standin import EQUAL, rank, score

VIEWS = ROOT / "experiments/transcripts/views"
FIRST = {  # the first reward of each task, and the number in it that is wrong
    "touch": (ROOT / "prompts/offline/touch.txt", "contact_threshold"),
    "push": (REPLIES / "propose-push-9.md", "push_weight"),
    "grasp": (REPLIES / "propose-grasp-6.md", "grip_weight"),
}


def preferences(reply: str, count: int) -> set:
    """The ordered pairs (better, worse) of a ranking."""
    groups = [[label - 1 for label in group] for group in read_ranking(reply, count)]
    return set(map(tuple, pairs_of(groups).tolist()))


def scripted(scores: list) -> set:
    """The stand-in's preferences."""
    lines = "\n\n".join(f"Attempt {i + 1}:\nprogress {x:.3f}" for i, x in enumerate(scores))
    return preferences(rank(lines), len(scores))


def agreement(some: set, others: set) -> float:
    """The share of the pairs ordered by both that both order alike, in percent."""
    both = len(some & others) + len({(b, a) for a, b in some} & others)
    return 100 * len(some & others) / both if both else np.nan


def scores_of(folder: Path, prompts: list) -> list:
    """The stand-in's scores of the attempts in each prompt, from scores.json or else made anew."""
    path = folder / "scores.json"
    if not path.exists():
        task, known = TASKS[json.loads((folder / "settings.json").read_text())["task"]], {}
        for episode in (folder / "episodes").glob("[0-9]*.npz"):
            tau = np.load(episode)["features"]
            known[describe(task, [tau]).partition("\n")[2]] = score(task, tau)
        attempts = r"(?ms)^Attempt \d+:\n(.*?)\n\n"
        scores = [[known[told] for told in re.findall(attempts, prompt)] for prompt in prompts]
        path.write_text(json.dumps(scores))
    return json.loads(path.read_text())


def rankings(folder: Path) -> list[dict]:
    """The prompt of each ranking of a run, and the last answer to it, which could be used."""
    found = []
    for line in (folder / "llm.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] == "rank":
            found.append(record)
        elif record["kind"] == "rank, repair":
            found[-1]["reply"] = record.get("reply")
    return [record for record in found if record.get("reply")]


def evaluations(path: Path) -> dict[int, float]:
    return {int(row["step"]): float(row["success"]) for row in rows(path)} if path.exists() else {}


def learnt(path: Path) -> str:
    """The step of the first of two perfect evaluations in a row, as text."""
    success = evaluations(path)
    step = steps_to_success(list(success.items()))
    return f"{step:,}" if np.isfinite(step) else f">{max(success):,}" if success else "not run"


def row(folder: Path) -> list[str]:
    """A run's row of the table."""
    ranks = rankings(folder)
    scores = scores_of(folder, [r["prompt"] for r in ranks])
    alike = [agreement(preferences(r["reply"], len(s)), scripted(s)) for r, s in zip(ranks, scores)]
    success, theta = evaluations(folder / "metrics.csv"), rows(folder / "theta.csv")
    changes = {int(line["step"]): line["cause"] for line in theta if line["step"] != "0"}
    told = []
    for step, cause in changes.items():
        start = step // 1_000 * 1_000
        shares = [success.get(start + after, np.nan) for after in (0, 1_000, 3_000)]
        told.append(f"{start:,} ({cause}): " + " → ".join(f"{share:.0%}" for share in shares))
    number = FIRST[folder.name.partition("-")[0]][1]
    values = [f"{float(line['value']):.3g}" for line in theta if line["name"] == number]
    beside = [folder.with_name(f"{folder.name}.{other}.csv") for other in ("standin", "fixed")]
    steps = [learnt(path) for path in (folder / "metrics.csv", *beside)]
    return [
        folder.name,
        *steps,
        "; ".join(told).replace("nan%", "–") or "none",
        f"{number}: {' → '.join(values)}",
        ", ".join(f"{a:.1f}" for a in alike),
    ]


def runs(folders: list[Path]) -> None:
    print(
        "| run | model ranks | stand-in ranks | fixed | θ changed at: success then → 1,000 ", end=""
    )
    print("→ 3,000 steps later | θ | agreement, % |\n" + "| --- " * 7 + "|")
    for folder in folders:
        if folder.is_dir():
            print(f"| {' | '.join(row(folder))} |")


def fitted(task, reward: Reward, T: list, wins: set) -> dict:
    """θ after one ranking of T, as the loop fits it; the first θ if that is no better."""
    first = Change(0, "proposal", reward.source, reward.params, reward.params)
    state = State(changes=[first], features=T, D=[[len(T), sorted(wins)]])
    with contextlib.redirect_stdout(io.StringIO()):
        change = align(reward, state, Config(task=task.name), np.random.default_rng(0))
    return (change or first).theta


def views() -> None:
    """Writes views.csv, a row for each answer, and prints its table."""
    features = {name: [*x] for name, x in np.load(VIEWS / "features.npz").items()}
    answers = {
        path.stem: {r["ranking"]: r for r in map(json.loads, path.read_text().splitlines())}
        for path in VIEWS.glob("*.jsonl")
    }
    lines = []
    for name, T in features.items():
        task = TASKS[name.partition("-")[0]]
        path, number = FIRST[task.name]
        reward = Reward(read_code(path.read_text(encoding="utf-8")), task.features)
        alike = [x for other, x in features.items() if other != name and task.name in other]
        others = [tau for x in alike for tau in x]
        progress = np.array([score(task, tau) for tau in others])
        held = np.argwhere(progress[:, None] > progress + EQUAL)
        script = scripted([score(task, tau) for tau in T])
        said = {view: preferences(told[name]["reply"], len(T)) for view, told in answers.items()}
        for view, wins in {**said, "stand-in": script, "first reward": set()}.items():
            theta = fitted(task, reward, T, wins) if wins else reward.params
            kept = 100 * (1 - discordance(reward.returns(others)(theta), held))
            size = len(answers[view][name]["prompt"]) if view in answers else 0
            numbers = agreement(wins, said["full"]), agreement(wins, script), theta[number], kept
            lines.append([view, name, size, len(wins), *(f"{x:.4g}" for x in numbers)])
    with open(RESULTS / "views.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow("view ranking characters pairs full standin theta held".split())
        writer.writerows(lines)
    print(views_table())


def views_table() -> str:
    """views.csv as Markdown: means over a task's rankings, and the values of θ."""
    head = "| view | task | characters | pairs | as full, % | as stand-in, % | θ | held-out, % |"
    groups, lines = {}, [head, "| --- " * 8 + "|"]
    for line in rows(RESULTS / "views.csv"):
        groups.setdefault((line["view"], line["ranking"].partition("-")[0]), []).append(line)
    for (view, task), group in sorted(groups.items()):
        columns = "characters", "pairs", "full", "standin", "held"
        size, pairs, *shares = (np.mean([float(line[c]) for line in group]) for c in columns)
        full, script, held = (f"{share:.1f}" for share in shares)
        theta = f"{FIRST[task][1]} {', '.join(line['theta'] for line in group)}"
        cells = view, task, f"{size:,.0f}", f"{pairs:,.0f}", full, script, theta, held
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines).replace("nan", "–")


if __name__ == "__main__":
    if sys.argv[1:2] == ["views"]:
        views()
    elif sys.argv[1:2] == ["runs"]:
        runs([Path(name) for name in sys.argv[2:]])
    else:
        sys.exit(__doc__)
