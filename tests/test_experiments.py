"""Studies, other updates of θ, the held-out check, the benchmark's list."""

import json
import os
import signal
import sys
import threading
import time

import bench
import heldout
import numpy as np
import pytest
import rules
import study
from conftest import ROOT, SMALL, TASK

from envs import check_env
from llm import Reply
from standin import StandIn

EXPERIMENTS = ROOT / "experiments"

TINY = dict(steps=200, update_every=150, ranked=3, eval_every=50, eval_episodes=1, explore=100)
TINY.update(batch=16, hidden=16, alone=2.0, disagree=-1.0, gain=-1.0)
KEPT = {**TINY, "gain": 1.0}  # θ never changes
JOBS = [study.job("touch", method, 1, **TINY) for method in ("selfalign", "sparse", "fixed")]
JOBS += [study.job("touch", method, 1, "", "kept", **KEPT) for method in ("selfalign", "fixed")]
CLUSTER = dict(threads_per_worker=1, dashboard_address=None)


def tables(folder, jobs):
    study.collect("tiny", jobs, folder, folder / "results")
    return [(folder / f"results/tiny{end}.csv").read_bytes() for end in ("", "-theta")]


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    for job in JOBS:
        study.execute(job, str(folder))
    return folder


def test_killed_worker_loses_nothing(studied, tmp_path):
    distributed = pytest.importorskip("distributed")
    job, begun = JOBS[0], tmp_path / JOBS[0].name / "checkpoint.pt"

    def kill(client):
        while not begun.exists():
            time.sleep(0.01)
        busy = [worker for worker, keys in client.processing().items() if keys]
        os.kill(client.run(os.getpid)[busy[0]], signal.SIGKILL)

    with distributed.Client(n_workers=2, **CLUSTER) as client:
        threading.Thread(target=kill, args=[client], daemon=True).start()
        assert study.run_jobs(client, [job], tmp_path) == 0
    assert "Continuing from the checkpoint" in (tmp_path / f"{job.name}.log").read_text()
    assert tables(tmp_path, [job]) == tables(studied, [job])


def test_failed_job_stops_no_other(studied, tmp_path):
    distributed = pytest.importorskip("distributed")
    bad = study.job("touch", "selfalign", 1, studied / "none.md", "bad", **TINY)
    with distributed.Client(n_workers=1, processes=False, **CLUSTER) as client:
        assert study.run_jobs(client, [bad, JOBS[1]], studied) == 1


def test_tables_and_runs_of_fixed(studied):
    tables(studied, JOBS)
    metrics, theta = (study.rows(studied / f"results/tiny{end}.csv") for end in ("", "-theta"))
    assert list(metrics[0]) == "study name task method seed step success return".split()
    assert list(theta[0])[5:] == "step cause parameter value low high".split()
    assert [row["name"] for row in metrics] == [job.name for job in JOBS for _ in range(2)]
    assert {row["name"] for row in theta if row["cause"] == "posterior"} == {"touch-selfalign-1"}
    assert (studied / "touch-fixed-1").exists() and not (studied / "touch-kept-fixed-1").exists()


def test_finished_begun_and_missing_runs(studied, capsys):
    log = (studied / "touch-selfalign-1.log").read_text()
    assert study.execute(JOBS[0], str(studied)) == "touch-selfalign-1: not learnt"
    assert (studied / "touch-selfalign-1.log").read_text() == log  # it is not run again
    assert not study.finished(study.job("touch", "sparse", 1, **{**TINY, "steps": 300}), studied)
    other = study.job("touch", "sparse", 1, **{**TINY, "batch": 17, "steps": 300})
    with pytest.raises(ValueError, match="begun with other settings"):
        study.execute(other, str(studied))
    missing = study.job("touch", "selfalign", 3, **TINY)
    assert tables(studied, [*JOBS, missing]) == tables(studied, JOBS)
    assert "1 of 6 runs" in capsys.readouterr().out


def test_summary(tmp_path):
    lines = ["study,name,task,method,seed,step,success,return"]
    runs = {"selfalign": ("011", "1011", "1010"), "fixed": ("0000011", "011", "11")}
    for method, successes in runs.items():
        for seed, course in enumerate(successes):
            for i, success in enumerate(course, 1):
                lines.append(f"x,a-{method}-{seed},push,{method},{seed},{i * 1_000},{success},0")
    (tmp_path / "x.csv").write_text("\n".join(lines))
    rows = study.table(tmp_path / "x.csv").splitlines()[2:]
    assert rows[0] == "| push | selfalign | 2 of 3 | 3,000 (2,000 to >4,000) | 1 of 3 |"
    assert rows[1] == "| push | fixed | 3 of 3 | 2,000 (1,000 to 6,000) |  |"


class Writer(StandIn):
    """Ranks like the stand-in, and writes rewards with ever smaller numbers."""

    width = 2.0

    def __call__(self, messages):
        if "The present reward function" not in messages[0]["content"]:
            return super().__call__(messages)
        self.width /= 2
        head = f"def r(distance, width={self.width}):\n"
        return Reply(head + "    return {'near': distance / width}")


def test_rewrite_changes_the_reward(go, tmp_path):
    go("a", backend=Writer(), update=rules.rewrite, steps=700)
    changes = [tuple(row.values())[:4] for row in study.rows(tmp_path / "a" / "theta.csv")]
    steps = ("200", "1"), ("400", "0.5"), ("600", "0.25")
    assert changes[2:] == [(step, "rewrite", "width", width) for step, width in steps]
    lines = (tmp_path / "a" / "llm.jsonl").read_text().splitlines()
    asked = [json.loads(line)["prompt"] for line in lines if "rewrite" in line[:20]]
    assert "def r(distance, speed, scale=5.0" in asked[0] and "width=1.0" in asked[1]
    assert "\nAttempt 4:\n" in asked[1] and "reward per step" in asked[1] and "$" not in asked[1]


def test_again_asks_soon_after_a_change(go, tmp_path):
    go("a", update=rules.again, steps=700, update_every=100)
    steps = {int(row["step"]) for row in study.rows(tmp_path / "a" / "theta.csv")}
    assert steps == {0, 400, 500}  # of 100, 200, ...


def test_heldout(whole):
    features = heldout.read_features(whole)
    assert sum(map(len, features)) >= 500 and features[0].shape == (20, 2)
    for sign, right in (("-", True), ("", False)):
        source = f"def r(distance, w=1.0):\n    return {{'near': {sign}w * distance}}\n"
        reward = heldout.Reward(source, TASK.features)
        result = heldout.judge(TASK, reward, features, study.Config(**SMALL))
        assert (result["held_before"] > 0.6) == right and (result["late_before"] > 0.6) == right
    with pytest.raises(ValueError, match="less than a period"):
        heldout.judge(TASK, reward, features[:9], study.Config(**SMALL))


def test_bench_lists_comparisons(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py"])
    bench.main()
    assert "environment:" in capsys.readouterr().out


def test_environments_of_others():
    pytest.importorskip("panda_gym")
    pytest.importorskip("mujoco")
    from others import OTHERS, Other

    for name, (_, task, *_) in OTHERS.items():
        features = check_env(Other(name), task)
        assert features.shape == (2 * task.horizon, len(task.features))
        assert np.ptp(features, axis=0).max() > 0.1
