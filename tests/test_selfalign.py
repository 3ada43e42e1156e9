"""The loop: what it leaves, what it repeats to the byte, what an update of θ does."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REWARD, SMALL, TASK, Dot, Picture, contents

from llm import LLM, Reply
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


def test_run_leaves_its_folder(go, tmp_path):
    go("a", gain=-1.0, disagree=-1.0)  # whatever the LLM prefers, θ changes
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {
        "settings.json", "metrics.csv", "theta.csv", "llm.jsonl", "reward.py", "policy.pt",
        "checkpoint.pt", "episodes",
    }  # fmt: skip
    metrics = rows(tmp_path / "a" / "metrics.csv")
    assert [int(row["step"]) for row in metrics] == list(range(200, 501, 100))
    assert all(np.isfinite(float(value)) for row in metrics for value in row.values())
    theta = rows(tmp_path / "a" / "theta.csv")
    assert theta[0] == dict(
        step="0", cause="proposal", name="scale", value="5", low="", high="", rhat="", ess=""
    )
    taken = [row for row in theta if row["cause"] == "posterior"]
    assert taken and all(float(row["low"]) < float(row["high"]) for row in taken)
    last = {row["name"]: float(row["value"]) for row in theta[-2:]}
    written = Reward((tmp_path / "a" / "reward.py").read_text(), ["distance", "speed"])
    assert written.params == pytest.approx(last, rel=1e-4)
    assert json.loads((tmp_path / "a" / "settings.json").read_text())["seed"] == 5


def test_same_seed_same_bytes(go, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        go(name, seed=seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_workers_change_no_byte(go, tmp_path):
    for name, workers in (("a", False), ("b", True)):
        go(name, workers=workers)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_worker_errors_arrive(go):
    class Breaks(Dot):
        def reset(self, seed=None, options=None):
            if seed and seed > 1_000:  # not in check_env
                raise RuntimeError("the simulator broke")
            return super().reset(seed, options)

    with pytest.raises(RuntimeError, match="the simulator broke"):
        go("a", make_env=Breaks, workers=True)


def test_unchanged_theta_is_the_fixed_run(go, tmp_path):
    class Agrees:
        def __call__(self, messages):
            if "RANKING" in messages[0]["content"]:
                return Reply("RANKING: " + " = ".join(map(str, range(1, 5))))
            return Reply('{"blocked_by": "nothing", "params": {}}')

    go("a", backend=Agrees())
    go("b", update=None)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len((tmp_path / "a" / "llm.jsonl").read_text().splitlines()) == 4


def test_replay_repeats_a_run(go, tmp_path):
    go("a")
    go("b", backend=Answers(), replay=tmp_path / "a" / "llm.jsonl")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert (tmp_path / "a" / "llm.jsonl").read_text() == (tmp_path / "b" / "llm.jsonl").read_text()


def test_sparse_asks_nobody(go, tmp_path):
    go("a", reward="sparse", proposal="", update=None, backend=Answers())
    assert not (tmp_path / "a" / "llm.jsonl").exists()
    metrics = rows(tmp_path / "a" / "metrics.csv")
    assert all(row["sparse"] == row["return"] for row in metrics)


def test_pixels(go, tmp_path):
    go("a", make_env=Picture, steps=300)
    assert len(rows(tmp_path / "a" / "metrics.csv")) == 2


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


@pytest.mark.parametrize("length", [7, 33, 150])
def test_periods_count_steps(length, go, tmp_path):
    class Other(Dot):
        pass

    Other.length = length
    asked = []

    def update(llm, task, state, c, rng):
        asked.append(state.step)

    go("a", make_env=Other, update=update)
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

    (tmp_path / "alive.py").write_text(
        "def r(speed, w=1.0):\n    return {'alive': w + 0 * speed}\n"
    )
    seen = []

    def update(llm, task, state, c, rng):
        seen.append(len(state.features[-1]))

    go("a", make_env=Falls, proposal=str(tmp_path / "alive.py"), update=update)
    assert seen and set(seen) == {11}
    q = [float(row["q"]) for row in rows(tmp_path / "a" / "metrics.csv")]
    assert q[-1] > 1.0  # centred, every reward would be 0, and so would q


def test_a_service_that_fails_costs_no_training(go, tmp_path, capsys):
    from llm import LLMError

    class Fails:
        def __call__(self, messages):
            raise LLMError("no service: start it")

    go("a", backend=Fails())
    go("b", update=None)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert "no service: start it" in capsys.readouterr().out


def test_a_file_that_is_no_reward_is_refused_before_anything_is_written(go, tmp_path):
    from llm import LLMError

    (tmp_path / "bad.py").write_text("def r(distance):\n    return {'near': open('x')}\n")
    with pytest.raises(LLMError, match="bad.py.*line"):
        go("a", proposal=str(tmp_path / "bad.py"))
    assert not (tmp_path / "a").exists()


# An update of θ


def state_with(trajectories, theta, source=REWARD, cause="proposal"):
    return State(
        step=1_000, changes=[Change(0, cause, source, theta, theta)], features=trajectories
    )


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
    few = choose(reward, state, Config(update_every=5, ranked=4), np.random.default_rng(0))
    assert sorted(few) == [98, 99]


def ranked(state, ranking, numbers):
    state.D.append([len(numbers), np.take(numbers, pairs_of(ranking)).tolist()])


def test_align_corrects_a_threshold():
    source = (
        "def r(distance, speed, threshold=1.0, w=2.0):\n"
        "    return {'touch': w * np.where(distance > threshold, 1.0, 0.0), 'slow': -speed}\n"
    )
    trajectories = dots(np.linspace(0.01, 0.4, 12))
    state = state_with(trajectories, {"threshold": 1.0, "w": 2.0}, source)
    ranked(state, [list(range(6, 12)), list(range(6))], list(range(12)))
    change = align(Reward(source, TASK.features), state, Config(), np.random.default_rng(0))
    assert 0.1 < change.theta["threshold"] < 0.3 and change.cause == "posterior"
    low, high, rhat, ess = change.stats["threshold"]
    assert low < change.theta["threshold"] < high and rhat < 1.1 and ess > 100
    assert change.prior == {"threshold": 1.0, "w": 2.0}


def test_align_without_gain_takes_nothing():
    trajectories = dots([0.1, 0.2, 0.3, 0.4])
    state = state_with(trajectories, {"scale": 5.0, "w": 3.0})
    ranked(state, [[0], [1], [2], [3]], [0, 1, 2, 3])
    reward, rng = Reward(REWARD, TASK.features), np.random.default_rng(0)
    assert align(reward, state, Config(), rng) is None


def test_align_with_infinite_returns_takes_nothing(capsys):
    source = "def r(distance, scale=1.0):\n    return {'near': scale / distance}\n"
    state = state_with(dots([0.0, 0.2, 0.3]), {"scale": 1.0}, source)
    ranked(state, [[0], [1], [2]], [0, 1, 2])
    reward, rng = Reward(source, TASK.features), np.random.default_rng(0)
    assert align(reward, state, Config(), rng) is None


def update(backend, state, **values):
    c = Config(**{**SMALL, "update_every": 10_000, **values})
    return update_theta(LLM(backend), TASK, state, c, np.random.default_rng(0))


def test_disagreement_asks_for_no_analysis():
    state = state_with(dots([0.1, 0.2, 0.3, 0.4], speed=0.0), {"scale": 0.2, "w": 1.0})
    state.features = [np.column_stack([tau[:, 0], tau[:, 0]]) for tau in state.features]

    class Prefers:
        """Likes slow dots."""

        asked = 0

        def __call__(self, messages):
            self.asked += 1
            text = messages[0]["content"]
            assert "RANKING" in text
            fast = [
                float(line.split()[-1]) for line in text.splitlines() if line.startswith("  speed ")
            ]
            return Reply("RANKING: " + " > ".join(str(i + 1) for i in np.argsort(fast)))

    state.changes[0].theta["w"] = state.changes[0].prior["w"] = 20.0
    backend = Prefers()
    change = update(backend, state)
    assert backend.asked == 1 and change.cause == "posterior"
    assert change.theta["w"] < 20.0 and len(state.D) == 1


def test_agreement_asks_what_blocks():
    state = state_with(dots([0.1, 0.2, 0.3, 0.4], speed=0.0), {"scale": 5.0, "w": 3.0})
    analysis = '{"blocked_by": "scale", "params": {"scale": 0.5}}'

    class Agrees(Answers):
        def __call__(self, messages):
            text = messages[0]["content"]
            if "blocked_by" in text:
                return super().__call__(messages)
            near = [
                float(line.split()[-1])
                for line in text.splitlines()
                if line.startswith("  distance ") and "|" in line
            ]
            return Reply("RANKING: " + " > ".join(str(i + 1) for i in np.argsort(near)))

    backend = Agrees(analysis)
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
        '{"blocked_by": "as it was shown", "params": {"scale": 5.0001}}',
        "no JSON",
    ],
)
def test_an_analysis_without_values_changes_nothing(answer):
    state = state_with(dots([0.1, 0.2]), {"scale": 5.0, "w": 3.0})
    reward = Reward(REWARD, TASK.features)
    assert unblock(LLM(Answers(*[answer] * 4)), TASK, reward, state, state.features, 0.0) is None


# The command line


def command(*flags, cwd):
    """Runs selfalign.py at a small size; returns the finished process."""
    small = "--explore 100 --eval-every 100 --eval-episodes 2 --update-every 200 --ranked 4 "
    small += "--hidden 16 --batch 16 --alone 2"
    flags = [*map(str, flags), *(small.split() if "--task" in flags else [])]
    program = [sys.executable, str(ROOT / "selfalign.py"), *flags]
    return subprocess.run(program, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_command_line_trains_resumes_and_plays(tmp_path):
    done = command("--task", "push", "--steps", 300, "--llm", "offline", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "NOT a language model" in done.stdout and "not learnt within 300" in done.stdout
    run = tmp_path / "runs" / "push-selfalign-1"
    more = command("--resume", run, "--steps", 400, cwd=tmp_path)
    assert "checkpoint at 300 steps" in more.stdout
    assert [row["step"] for row in rows(run / "metrics.csv")] == ["200", "300", "400"]
    pytest.importorskip("PIL")
    film = command("--play", run, "--gif", "x.gif", "--episodes", 1, cwd=tmp_path)
    assert "episode 0" in film.stdout and (tmp_path / "x.gif").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--task", "fly"], "touch"),
        (["--seed", "-1"], "seed"),
        (["--steps", "0"], "steps"),
        (["--ranked", "1"], "ranked"),
        (["--llm-options", "[1]"], "JSON object"),
        (["--llm", "nobody"], "auto, chat, offline"),
        (["--llm", "chat"], "--model"),
        (["--llm", "replay:none.jsonl"], "none.jsonl"),
        (["--llm-options", "{"], "JSON"),
        (["--proposal", "none.py"], "none.py"),
        (["--resume", "none"], "settings.json"),
        (["--play", "none"], "none"),
        (["--resume", "none", "--seed", "2"], "--seed"),
        (["--device", "abacus"], "abacus"),
        (["--out", "full"], "full is not empty"),
    ],
)
def test_wrong_flags_get_one_line(flags, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("all of it")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["selfalign.py", *flags])
    monkeypatch.delenv("OPENAI_MODEL", raising=False)
    with pytest.raises(SystemExit) as end:
        main()
    assert words in f"{end.value} {capsys.readouterr().err}"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "thesis.txt"]


# Being learnt


@pytest.mark.parametrize(
    ("successes", "left_alone"),
    [
        ([], False),
        ([1.0, 0.0, 0.5, 0.6], False),
        ([0.0, 0.6, 0.7, 0.7], True),
        ([0.7], True),
    ],
)
def test_a_skill_being_learnt_is_left_alone(successes, left_alone):
    assert being_learnt(successes, Config()) == left_alone
