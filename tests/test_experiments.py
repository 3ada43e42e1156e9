"""Studies, other rules around θ, the held-out check and the benchmark's list."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import REWARD, SMALL, TASK

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import heldout  # noqa: E402
import rules  # noqa: E402
import study  # noqa: E402

from llm import LLM, Reply  # noqa: E402
from reward import Reward  # noqa: E402
from run import Change, State  # noqa: E402
from selfalign import Config  # noqa: E402
from standin import StandIn  # noqa: E402

TINY = dict(
    steps=400, update_every=200, ranked=4, eval_every=100, eval_episodes=1, explore=100,
    batch=16, hidden=16, rising=1.0, disagree=-1.0, gain=-1.0,
)  # fmt: skip
KEPT = {**TINY, "gain": 1.0}  # θ never changes
JOBS = [study.job("touch", method, 1, **TINY) for method in ("selfalign", "fixed", "sparse")]
JOBS += [study.job("touch", method, 1, "", "kept", **KEPT) for method in ("selfalign", "fixed")]


def tables(folder, results):
    study.collect("tiny", JOBS, folder, results)
    return [path.read_bytes() for path in sorted(results.iterdir())]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder and the tables of a study that ran in this process."""
    folder = tmp_path_factory.mktemp("whole")
    for job in JOBS:
        study.execute(job, str(folder))
    return folder, tables(folder, folder / "results")


def test_killed_worker_loses_nothing(whole, tmp_path, capsys):
    distributed = pytest.importorskip("distributed")
    killed = []

    def kill_one(client):
        while not killed:
            for worker, keys in client.processing().items():
                began = [Path(key) for key in keys if (Path(key) / "checkpoint.pt").exists()]
                if began and not (began[0] / study.MARK).exists():
                    os.kill(client.run(os.getpid)[worker], signal.SIGKILL)
                    killed.append(began[0])
                    break
            time.sleep(0.02)

    here = dict(n_workers=2, threads_per_worker=1, memory_limit=0, dashboard_address=None)
    with distributed.Client(**here) as client:
        threading.Thread(target=kill_one, args=[client], daemon=True).start()
        assert study.run_jobs(client, JOBS, tmp_path) == 0
    assert "Continuing from the checkpoint" in Path(f"{killed[0]}.log").read_text()
    assert tables(tmp_path, tmp_path / "results") == whole[1]
    assert f"{len(JOBS)} of {len(JOBS)}" in capsys.readouterr().out


def test_failed_job_stops_no_other(tmp_path):
    distributed = pytest.importorskip("distributed")
    bad = study.job("touch", "selfalign", 1, tmp_path / "none.md", "bad", **TINY)
    short = study.job("touch", "sparse", 1, **{**TINY, "steps": 100})
    with distributed.Client(processes=False, threads_per_worker=1, n_workers=1) as client:
        assert study.run_jobs(client, [bad, short], tmp_path) == 1
    assert study.finished(short, tmp_path) and not study.finished(bad, tmp_path)


def test_study_tables(whole):
    folder, (theta, metrics) = whole[0], [text.decode().splitlines() for text in whole[1]]
    metrics, theta = list(csv.DictReader(metrics)), list(csv.DictReader(theta))
    assert list(metrics[0]) == "study name task method seed step success return".split()
    assert {row["name"] for row in metrics} == {job.name for job in JOBS}
    assert {int(row["step"]) for row in metrics} == {200, 300, 400}
    assert {row["method"] for row in theta} == {"selfalign", "fixed"}
    assert {row["cause"] for row in theta if row["method"] == "fixed"} == {"proposal"}
    changed = {row["name"] for row in theta if row["cause"] == "posterior"}
    assert changed == {"touch-selfalign-1"}
    # Fixed has a run of its own only where θ changed.
    assert (folder / "touch-fixed-1").exists() and not (folder / "touch-kept-fixed-1").exists()
    same = [row["return"] for row in metrics if row["name"].startswith("touch-kept")]
    assert len(same) == 6 and same[:3] == same[3:]
    study.execute(study.job("touch", "fixed", 1, "", "own", **KEPT), str(folder))
    own = study.rows(folder / "touch-own-fixed-1" / "metrics.csv")
    assert [row["return"] for row in own] == same[:3]


def test_finished_and_begun_runs(whole, tmp_path):
    marks = {path: path.stat().st_mtime_ns for path in whole[0].glob("*/*")}
    assert study.execute(JOBS[0], str(whole[0])) == "touch-selfalign-1: not learnt"
    assert marks == {path: path.stat().st_mtime_ns for path in whole[0].glob("*/*")}
    assert not study.finished(study.job("touch", "sparse", 1, **{**TINY, "steps": 500}), whole[0])
    other = study.job("touch", "sparse", 1, **{**TINY, "batch": 17, "steps": 500})
    with pytest.raises(ValueError, match="begun with other settings"):
        study.execute(other, str(whole[0]))


def test_unfinished_runs_are_left_out(whole, tmp_path, capsys):
    more = [*JOBS, study.job("touch", "selfalign", 3, **TINY)]
    study.collect("tiny", more, whole[0], tmp_path)
    assert (tmp_path / "tiny.csv").read_bytes() == whole[1][1]
    assert "1 of 6 runs are not finished" in capsys.readouterr().out


def test_summary(tmp_path):
    lines = ["study,name,task,method,seed,step,success,return"]
    for method, seed, successes in (
        ("selfalign", 1, "0 1 1"), ("selfalign", 2, "1 0 1 1"), ("selfalign", 3, "1 0 1 0"),
        ("fixed", 1, "0 0 0 0 0 1 1"), ("fixed", 2, "0 0 0 0 1 1"), ("fixed", 3, "1 1"),
    ):  # fmt: skip
        for i, success in enumerate(successes.split(), 1):
            name = f"push-{method}-{seed}"
            lines.append(f"x,{name},push,{method},{seed},{i * 1_000},{success},0")
    path = tmp_path / "x.csv"
    path.write_text("\n".join(lines))
    rows = study.table(path).splitlines()[2:]
    assert rows[0] == "| push | selfalign | 2 of 3 | 3,000 (2,000 to >4,000) | 1 of 3 |"
    assert rows[1] == "| push | fixed | 3 of 3 | 5,000 (1,000 to 6,000) |  |"


def test_studies_name_each_run_once():
    for make, seeds, _ in study.STUDIES.values():
        if make is not study.wrong:  # writes files
            jobs = list(make(range(1, 1 + int(seeds.split("-")[1]))))
            assert len({job.name for job in jobs}) == len(jobs)
            assert all(study.config(job).task == job.task for job in jobs)


class Writer(StandIn):
    """Ranks like the stand-in and writes rewards with ever smaller numbers."""

    written = 0

    def __call__(self, messages):
        if "The present reward function" not in messages[0]["content"]:
            return super().__call__(messages)
        self.written += 1
        body = f"def r(distance, width={1 / self.written}):\n"
        return Reply(f"```python\n{body}    return {{'near': -distance / width}}\n```")


def test_rewrite_changes_the_reward(go, tmp_path):
    go("a", backend=Writer(), update=rules.rewrite, steps=700)
    theta = study.rows(tmp_path / "a" / "theta.csv")
    changes = [(row["step"], row["cause"], row["name"], float(row["value"])) for row in theta]
    assert changes[2:] == [("300", "rewrite", "width", 1.0), ("600", "rewrite", "width", 0.5)]
    lines = (tmp_path / "a" / "llm.jsonl").read_text().splitlines()
    asked = [json.loads(line) for line in lines]
    asked = [exchange["prompt"] for exchange in asked if exchange["kind"] == "rewrite"]
    assert "def r(distance, speed, scale=5.0" in asked[0] and "width=1.0" in asked[1]
    assert "\nAttempt 4: " in asked[1] and "reward per step" in asked[1] and "$" not in asked[1]


@pytest.mark.parametrize(
    "method, steps, kinds",
    [
        ("again", 1_700, ["rank", "rank"]),  # at 1,200 and, since θ changed, at 1,500
        ("beside", 400, ["rank", "analyse"]),
    ],
)
def test_other_updates_ask(method, steps, kinds, go, tmp_path):
    go("a", update=rules.METHODS[method][0], steps=steps, disagree=-1.0, gain=-1.0)
    lines = (tmp_path / "a" / "llm.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == kinds
    assert study.rows(tmp_path / "a" / "theta.csv")[-1]["cause"] == "posterior"


def test_undone_takes_back():
    def lived(*nearest):  # 15 episodes each
        courses = [np.linspace(1.0, distance, 20) for distance in nearest for _ in range(15)]
        return [np.stack([course, 0 * course], axis=1) for course in courses]

    first = Change(0, "proposal", REWARD, {"scale": 5.0, "w": 3.0}, {"scale": 5.0, "w": 3.0})
    second = replace(first, step=300, cause="posterior", theta={"scale": 1.0, "w": 1.0})
    for features, undone in ((lived(0.2, 0.9), True), (lived(0.9, 0.2), False)):
        state = State(step=600, changes=[first, second], features=features)
        args = LLM(StandIn()), TASK, state, Config(**SMALL), np.random.default_rng(0)
        change = rules.undone(*args)
        assert (change is not None and change.cause == "undone") == undone
        if undone:
            assert change.theta == first.theta and change.step == 600


def test_heldout(go, tmp_path):
    go("a", steps=700, gain=1.0)
    features = heldout.read_features(tmp_path / "a")
    assert sum(map(len, features)) >= 700 and features[0].shape == (20, 2)
    good = Reward("def r(distance, w=1.0):\n    return {'near': -w * distance}\n", TASK.features)
    bad = Reward(good.source.replace("-w", "w"), TASK.features)
    c = Config(**{**SMALL, "gain": 0.0})
    for reward in (good, bad):
        result = heldout.judge(TASK, reward, reward.params, features, c)
        right = reward is good
        assert (result["held_before"] > 0.6) == right and (result["late_before"] > 0.6) == right
    with pytest.raises(ValueError, match="less than a period"):
        heldout.judge(TASK, good, good.params, features[:10], c)


def test_scripts_list_what_there_is():
    for name, words in (("bench.py", "environment"), ("study.py", "proposals")):
        done = subprocess.run([sys.executable, EXPERIMENTS / name], capture_output=True, text=True)
        assert done.returncode == 0 and words in done.stdout
