"""What README and RESULTS.md show is what the repository does and holds."""

import re
import sys

from conftest import ROOT, SMALL
from ranked import FIRST, evaluations, row, views_table
from study import rows, table

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert len(links) > 15
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_an_environment_of_ones_own(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    example = next(block for block in blocks if "class PointMass" in block)
    assert 'Config(task="brake", steps=20_000,' in example
    small = {**SMALL, "steps": 400, "update_every": 200}
    example = example.replace("steps=20_000,", f"**{small},")
    monkeypatch.chdir(tmp_path)
    exec(example, {"__name__": "__main__"})
    left = {path.name for path in (tmp_path / "runs" / "brake").iterdir()}
    assert left >= {"metrics.csv", "theta.csv", "policy.pt", "reward.py", "llm.jsonl"}


def test_copied_names_exist():
    for module, names in re.findall(r"^from (\w+) import ([\w, ]+?) +#", README, re.MULTILINE):
        __import__(module)
        missing = [name for name in names.split(", ") if not hasattr(sys.modules[module], name)]
        assert missing == []


def test_tables_come_from_their_csv():
    methods = table(ROOT / "experiments" / "results" / "methods.csv")
    assert methods in (ROOT / "experiments" / "RESULTS.md").read_text(encoding="utf-8")
    for cells in re.findall(r"\| (\w+) \| selfalign \| (.*?) \| (.*?) \|", methods):
        assert re.search(r"^\| {} .*\| {}: {} \|".format(*map(re.escape, cells)), README, re.M)


def test_views_come_from_their_csv():
    views = views_table()
    assert views in (ROOT / "experiments" / "RESULTS.md").read_text(encoding="utf-8")
    alike = re.findall(r"\| readings \| (\w+) \| .*? \| .*? \| (.*?) \|", views)
    assert len(alike) == 3 and all(f"{share} % ({task})" in README for task, share in alike)


def test_runs_a_model_ranked_are_told_as_they_went():
    folders = sorted((ROOT / "experiments" / "transcripts" / "model").glob("*/"))
    runs = [row(folder) for folder in folders if folder.is_dir()]
    results = (ROOT / "experiments" / "RESULTS.md").read_text(encoding="utf-8")
    assert len(runs) == 9 and all(f"| {' | '.join(run)} |" in results for run in runs)
    for task in ("touch", "push", "grasp"):
        learnt = ", ".join(run[1] for run in runs if run[0].startswith(task))
        courses = [evaluations(f / "metrics.csv") for f in folders if f.name.startswith(task)]
        shares = (", ".join(f"{x[step]:.0%}"[:-1] for x in courses) for step in (10_000, 13_000))
        told = " \\| ".join(f"{share} %" for share in shares)
        thetas = [rows(f / "theta.csv") for f in folders if f.name.startswith(task)]
        values = ", ".join(f"{last(theta, task):.2g}" for theta in thetas)
        row_of = rf"^\| {task}: .* \| {told} \| {learnt} \| .* → {values}"
        assert re.search(row_of, README, re.MULTILINE)
    alike = [float(share) for run in runs for share in run[-1].split(", ")]
    assert f"agree on {min(alike):g} to {max(alike):g} %" in README


def last(theta, task):
    """The last value of the number that was wrong in a task's first reward."""
    final = {row["name"]: float(row["value"]) for row in theta}
    return final[FIRST[task][1]] / (final["reach_weight"] if task == "push" else 1.0)
