"""The loop: what it leaves, what it repeats to the byte, what an update of θ does."""

import csv
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REWARD, TASK, Dot, contents

from drqv2 import DrQV2
from envs import TASKS
from llm import LLM, LLMError, Reply
from mh import pairs_of
from reward import Reward
from run import Change, State
from selfalign import Config, align, being_learnt, choose, main, unblock, update_theta

ROOT = Path(__file__).parent.parent


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


class Answers:
    """A backend that gives these answers in turn, and keeps the questions."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def __call__(self, messages):
        self.asked.append(messages[-1]["content"])
        return Reply(self.answers.pop(0))


# The loop


def test_run_leaves_its_folder(whole):
    assert {path.name for path in whole.iterdir()} == {
        "settings.json", "metrics.csv", "theta.csv", "llm.jsonl", "reward.py", "policy.pt",
        "checkpoint.pt", "episodes",
    }  # fmt: skip
    metrics = rows(whole / "metrics.csv")
    assert [int(row["step"]) for row in metrics] == list(range(200, 501, 100))
    assert all(np.isfinite(float(value)) for row in metrics for value in row.values())
    theta = rows(whole / "theta.csv")
    assert list(theta[0].values()) == ["0", "proposal", "scale", "5", "", "", "", ""]
    taken = [row for row in theta if row["cause"] == "posterior"]
    assert taken and all(float(row["low"]) < float(row["high"]) for row in taken)
    last = {row["name"]: float(row["value"]) for row in theta[-2:]}
    written = Reward((whole / "reward.py").read_text(), ["distance", "speed"])
    assert written.params == pytest.approx(last, rel=1e-4)
    assert json.loads((whole / "settings.json").read_text())["seed"] == 5


def test_same_seed_same_bytes_with_and_without_workers(whole, go, tmp_path):
    go("a", workers=True)
    assert contents(tmp_path / "a") == contents(whole)
    go("b", seed=6, steps=20)
    first = "episodes/000000.npz"
    assert contents(tmp_path / "b")[first] != contents(whole)[first]


def test_unchanged_theta_is_the_fixed_run(fixed, go, tmp_path):
    class Agrees:
        def __call__(self, messages):
            if "RANKING" in messages[0]["content"]:
                return Reply("RANKING: " + " = ".join(map(str, range(1, 5))))
            return Reply('{"blocked_by": "nothing", "params": {}}')

    go("a", backend=Agrees(), disagree=0.1)
    assert contents(tmp_path / "a") == contents(fixed)
    assert len((tmp_path / "a" / "llm.jsonl").read_text().splitlines()) == 4


def test_replay_repeats_a_run(whole, go, tmp_path):
    go("a", backend=Answers(), replay=whole / "llm.jsonl")
    assert contents(tmp_path / "a") == contents(whole)
    assert (tmp_path / "a" / "llm.jsonl").read_text() == (whole / "llm.jsonl").read_text()


def test_stops_after_two_perfect_evaluations(go, tmp_path):
    class Easy(Dot):
        def step(self, action):
            *rest, info = super().step(action)
            return *rest, {**info, "success": True}

    assert go("a", make_env=Easy) == 200
    assert [row["step"] for row in rows(tmp_path / "a" / "metrics.csv")] == ["200", "300"]
    before = contents(tmp_path / "a")
    assert go("a", make_env=Easy) == 200  # resumed, there is nothing to do
    assert contents(tmp_path / "a") == before


@pytest.mark.parametrize("length", [7, 150])
def test_periods_count_steps(length, go, tmp_path):
    other, asked = type("Other", (Dot,), {"length": length}), []

    def update(llm, task, state, c, rng):
        asked.append(state.step)

    go("a", make_env=other, update=update)
    steps = [int(row["step"]) for row in rows(tmp_path / "a" / "metrics.csv")]
    assert len(steps) >= 500 // max(length, 100) - 2
    assert all(b // 100 > a // 100 for a, b in zip(steps, steps[1:]))
    assert [step // 200 for step in asked][:2] == [1, 2]
    assert all(step % 200 < length for step in asked)


def test_termination_keeps_an_alive_bonus(go, tmp_path):
    class Falls(Dot):
        def step(self, action):
            obs, reward, _, over, info = super().step(action)
            return obs, reward, self.t == 11, over, info

    proposal, seen = tmp_path / "alive.py", []
    proposal.write_text("def r(speed, w=1.0):\n    return {'alive': w + 0 * speed}\n")

    def update(llm, task, state, c, rng):
        seen.append(len(state.features[-1]))

    go("a", make_env=Falls, proposal=str(proposal), update=update)
    assert seen and set(seen) == {11}
    q = [float(row["q"]) for row in rows(tmp_path / "a" / "metrics.csv")]
    assert q[-1] > 1.0  # centred, every reward would be 0, and so would q


def test_a_service_that_fails_costs_no_training(fixed, go, tmp_path, capsys):
    class Fails:
        def __call__(self, messages):
            raise LLMError("no service: start it")

    go("a", backend=Fails())
    assert contents(tmp_path / "a") == contents(fixed)
    assert "no service: start it" in capsys.readouterr().out


def test_a_file_that_is_no_reward_is_refused_before_anything_is_written(go, tmp_path):
    (tmp_path / "bad.py").write_text("def r(distance):\n    return {'near': open('x')}\n")
    with pytest.raises(LLMError, match="bad.py.*line"):
        go("a", proposal=str(tmp_path / "bad.py"))
    assert not (tmp_path / "a").exists()


# An update of θ


def state_with(trajectories, theta, source=REWARD, ranking=()):
    D = [[len(trajectories), pairs_of(ranking).tolist()]]
    first = Change(0, "proposal", source, theta, theta)
    return State(step=1_000, changes=[first], features=trajectories, D=D if ranking else [])


def dots(distances, speed=0.5, length=10):
    return [np.tile([float(d), speed], (length, 1)) for d in distances]


def test_choose_takes_the_last_period_evenly_by_return():
    trajectories = dots(np.arange(100), speed=0.0)
    state = state_with(trajectories, {"scale": 50.0, "w": 1.0})
    reward = Reward(REWARD, TASK.features)
    c = Config(update_every=300, ranked=4)
    chosen = choose(reward, state, c, np.random.default_rng(0))
    assert sorted(chosen) == [70, 80, 89, 99]
    orders = {tuple(choose(reward, state, c, np.random.default_rng(i))) for i in range(20)}
    assert len(orders) > 5
    c = Config(update_every=5, ranked=4)
    few = choose(reward, state, c, np.random.default_rng(0))
    assert sorted(few) == [98, 99]


def test_align_corrects_a_threshold():
    source = "def r(distance, threshold=1.0, w=2.0):\n"
    source += "    return {'touch': w * np.where(distance > threshold, 1.0, 0.0)}\n"
    trajectories, ranking = dots(np.linspace(0.01, 0.4, 12)), [range(6, 12), range(6)]
    state = state_with(trajectories, {"threshold": 1.0, "w": 2.0}, source, ranking)
    change = align(Reward(source, TASK.features), state, Config(), np.random.default_rng(0))
    assert 0.1 < change.theta["threshold"] < 0.3 and change.cause == "posterior"
    low, high, rhat, ess = change.stats["threshold"]
    assert low < change.theta["threshold"] < high and rhat < 1.1 and ess > 100
    assert change.prior == {"threshold": 1.0, "w": 2.0}


INFINITE = "def r(distance, w=1.0):\n    return {'near': w / distance}\n"


@pytest.mark.parametrize(
    "source, theta, distances",
    [
        (REWARD, {"scale": 5.0, "w": 3.0}, [0.1, 0.2, 0.3]),  # no θ orders more pairs
        (INFINITE, {"w": 1.0}, [0.0, 0.2, 0.3]),
    ],
)
def test_align_takes_nothing(source, theta, distances):
    state = state_with(dots(distances), theta, source, [[0], [1], [2]])
    reward, rng = Reward(source, TASK.features), np.random.default_rng(0)
    assert align(reward, state, Config(), rng) is None


class Prefers(Answers):
    """Ranks attempts by the first reading of a feature, the least first; then gives answers."""

    def __init__(self, feature, *answers):
        super().__init__(*answers)
        self.pattern = rf"^{feature} ([\d.]+)"

    def __call__(self, messages):
        text = messages[0]["content"]
        if "blocked_by" in text:
            return super().__call__(messages)
        first = np.array(re.findall(self.pattern, text, re.MULTILINE), float)
        return Reply("RANKING: " + " > ".join(str(i + 1) for i in np.argsort(first)))


def update(backend, state, **values):
    c = Config(ranked=4, **values)
    return update_theta(LLM(backend), TASK, state, c, np.random.default_rng(0))


def test_all_equal_asks_for_an_analysis():
    state = state_with(dots([0.1, 0.2, 0.3, 0.4]), {"scale": 5.0, "w": 3.0})
    analysis = '{"blocked_by": "w", "params": {"w": 1.0}}'
    backend = Answers("RANKING: 1 = 2 = 3 = 4", analysis)
    assert update(backend, state, disagree=-1.0).cause == "analysis"


def test_disagreement_asks_for_no_analysis():
    trajectories = [np.full((10, 2), speed) for speed in (0.1, 0.2, 0.3, 0.4)]
    state = state_with(trajectories, {"scale": 0.2, "w": 20.0})
    change = update(Prefers("speed"), state)
    assert change.cause == "posterior" and change.theta["w"] < 20.0 and len(state.D) == 1


def test_agreement_asks_what_blocks():
    state = state_with(dots([0.1, 0.2, 0.3, 0.4], speed=0.0), {"scale": 5.0, "w": 3.0})
    backend = Prefers("distance", '{"blocked_by": "scale", "params": {"scale": 0.5}}')
    change = update(backend, state)
    assert change.cause == "analysis" and change.theta == {"scale": 0.5, "w": 3.0}
    assert change.prior == {"scale": 0.5, "w": 3.0}  # the next posterior starts here
    assert "scale=5.0" in backend.asked[0] and "reward per step" in backend.asked[0]
    assert "$" not in backend.asked[0]


def test_an_analysis_that_makes_the_reward_infinite_goes_back():
    source = "def r(distance, power=1.0):\n    return {'near': np.exp(distance * power)}\n"
    state = state_with(dots([1.0, 2.0]), {"power": 1.0}, source)
    values = [{"blocked_by": "x", "params": {"power": power}} for power in (1e6, 2.0)]
    backend = Answers(*map(json.dumps, values))
    reward = Reward(source, TASK.features)
    change = unblock(LLM(backend), TASK, reward, state, state.features, 0.0)
    assert change.theta == {"power": 2.0} and "finite" in backend.asked[1]


@pytest.mark.parametrize(
    "answer",
    [
        '{"blocked_by": "luck", "params": {}}',
        '{"blocked_by": "", "params": {"scale": 5.0001}}',  # as it was shown
        "no JSON",
    ],
)
def test_an_analysis_without_values_changes_nothing(answer):
    state = state_with(dots([0.1, 0.2]), {"scale": 5.0, "w": 3.0})
    reward = Reward(REWARD, TASK.features)
    assert unblock(LLM(Answers(*[answer] * 4)), TASK, reward, state, state.features, 0.0) is None


@pytest.mark.parametrize(
    "successes, left_alone",
    [([], 0), ([1.0, 0.0, 0.5, 0.6], 0), ([0.0, 0.6, 0.7, 0.7], 1), ([0.7], 1)],
)
def test_a_skill_being_learnt_is_left_alone(successes, left_alone):
    assert being_learnt(successes, Config()) == left_alone


# The command line


def command(*flags, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["selfalign.py", *map(str, flags)])
    main()


def test_command_line_trains_and_resumes(tmp_path, monkeypatch, capsys):
    flags = "--task push --llm offline --steps 200 --explore 100 --eval-every 50 --hidden 16 "
    flags += "--eval-episodes 1 --update-every 100 --ranked 2 --batch 16 --alone 2"
    program = [sys.executable, ROOT / "selfalign.py", *flags.split()]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "NOT a language model" in done.stdout and "not learnt within 200" in done.stdout
    run = tmp_path / "runs" / "push-selfalign-1"
    command("--resume", run, "--steps", 250, "--workers", "false", monkeypatch=monkeypatch)
    assert "checkpoint at 200 steps" in capsys.readouterr().out
    assert [row["step"] for row in rows(run / "metrics.csv")] == ["150", "200", "250"]


def test_play(tmp_path, monkeypatch, capsys):
    Image = pytest.importorskip("PIL.Image")
    quick = dict(horizon=6, steps=1, success=(("contact_force", "<=", 99.0),))
    monkeypatch.setitem(TASKS, "quick", replace(TASKS["touch"], **quick))
    words = {"task": "quick", "obs": "state", "hidden": 16}
    (tmp_path / "settings.json").write_text(json.dumps(words))
    torch.save(DrQV2((24,), (4,), hidden_dim=16).greedy.state_dict(), tmp_path / "policy.pt")
    flags = "--play", tmp_path, "--episodes", 2, "--gif", tmp_path / "x.gif"
    command(*flags, monkeypatch=monkeypatch)
    assert "episode 1: success" in capsys.readouterr().out
    assert Image.open(tmp_path / "x.gif").n_frames == 6
    with pytest.raises(SystemExit, match="new file"):
        command(*flags, monkeypatch=monkeypatch)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--task", "fly"], "touch"),
        (["--seed", "-1"], "seed"),
        (["--ranked", "1"], "ranked"),
        (["--llm-options", "[1]"], "JSON object"),
        (["--llm", "nobody"], "auto, chat, offline"),
        (["--llm", "chat", "--model", ""], "--model"),
        (["--llm", "replay:none.jsonl"], "none.jsonl"),
        (["--llm-options", "{"], "JSON"),
        (["--proposal", "none.py"], "none.py"),
        (["--resume", "none"], "settings.json"),
        (["--play", "none"], "none"),
        (["--resume", "none", "--seed", "2"], "--seed"),
        (["--resume", "none", "--play", "none"], "not allowed with"),
        (["--play", "none", "--steps", "9"], "--steps does not go with --play: leave it out"),
        (["--gif", "x.gif"], "--gif goes with --play"),
        (["--llm", "chat:x"], "auto, chat"),
        (["--device", "abacus"], "abacus"),
        (["--out", "full"], "full is not empty"),
    ],
)
def test_wrong_flags_get_one_line(flags, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("all of it")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        command(*flags, monkeypatch=monkeypatch)
    assert words in f"{end.value} {capsys.readouterr().err}"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "thesis.txt"]
