"""What README and RESULTS.md show is what the repository does and holds."""

import re
import sys

from conftest import ROOT, SMALL

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
    from study import table

    methods = table(ROOT / "experiments" / "results" / "methods.csv")
    assert methods in (ROOT / "experiments" / "RESULTS.md").read_text(encoding="utf-8")
    for row in re.findall(r"\| (\w+) \| selfalign \| (.*?) \| (.*?) \|", methods):
        assert re.search(r"^\| {} .*\| {}: {} \|".format(*map(re.escape, row)), README, re.M)


def test_views_come_from_their_csv():
    from ranked import views_table

    assert views_table() in (ROOT / "experiments" / "RESULTS.md").read_text(encoding="utf-8")


def test_runs_a_model_ranked_are_told_as_they_went():
    from ranked import evaluations, row

    folders = sorted((ROOT / "experiments" / "transcripts" / "model").glob("*/"))
    runs = [row(folder) for folder in folders if folder.is_dir()]
    results = (ROOT / "experiments" / "RESULTS.md").read_text(encoding="utf-8")
    assert len(runs) == 9 and all(f"| {' | '.join(run)} |" in results for run in runs)
    for task in ("touch", "push", "grasp"):
        learnt = ", ".join(run[1] for run in runs if run[0].startswith(task))
        courses = [evaluations(f / "metrics.csv") for f in folders if f.name.startswith(task)]
        shares = (", ".join(f"{x[step]:.0%}"[:-1] for x in courses) for step in (10_000, 13_000))
        told = " \\| ".join(f"{share} %" for share in shares)
        assert re.search(rf"^\| {task}: .* \| {told} \| {learnt} \|", README, re.MULTILINE)
