"""Runs that are cut short and go on, and what their folders may hold."""

import builtins
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import cli
import run as run_module
import selfalign
from envs import TASKS, Feature, PandaEnv, Space, Task
from llm import LLM, Answered, Reply
from mh import Posterior
from reward import Reward
from run import Run
from standin import StandIn
from test_selfalign import small  # noqa: F401  (a fixture)

TASK = Task("reach", "Reach the mark and stay there for 3 consecutive steps.", {"distance": Feature("m", 0, 2, "from the mark"), "speed": Feature("m/s", 0, 2, "of the dot")},
            success=(("distance", "<=", 0.05),), steps=3, robot="a dot", dt=0.1, horizon=20)
REWARD = "def r(distance, speed, scale=5.0, w=3.0):\n    return {'near': np.exp(-distance / scale), 'fast': w * speed}\n"


class Cut(BaseException):
    """Ends a run as a kill would: nothing after it is carried out."""


class Dot:
    """A dot on a line, quick enough for many runs; as an image, a bright column."""

    action_space, observation_space, np_random = Space(-1.0, 1.0, (1,), np.float32), Space(-9.0, 9.0, (2,), np.float32), None
    steps = 0                                                         # of all dots

    def reset(self, seed=None, options=None):
        self.np_random = self.np_random if seed is None else np.random.default_rng(seed)
        self.x, self.v, self.t, self.held = self.np_random.uniform(-1, 1), 0.0, 0, 0
        return self._obs(), {}

    def _obs(self):
        return np.array([self.x, self.v], np.float32)

    def step(self, action):
        Dot.steps += 1
        self.v = 0.2 * float(action[0])
        self.x, self.t = self.x + self.v, self.t + 1
        self.held += abs(self.x) <= 0.05
        info = {"features": {"distance": abs(self.x), "speed": abs(self.v)}, "success": self.held >= 3}
        return self._obs(), float(self.held >= 3), False, self.t == 20, info


class Picture(Dot):
    observation_space = Space(0, 255, (9, 20, 20), np.uint8)

    def _obs(self):
        frame = np.zeros((9, 20, 20), np.uint8)
        frame[:, :, int(np.clip(10 + 5 * self.x, 0, 19))] = 255
        return frame


class Writer(StandIn):
    """Writes another reward each time that it is asked to rewrite one."""

    def __call__(self, messages):
        if "write the better reward function" not in messages[0]["content"]:
            return super().__call__(messages)
        name = f"w{len(messages[0]['content']) % 97}"
        return Reply(REWARD.replace("w=", f"{name}=").replace("w *", f"{name} *"))


@pytest.fixture
def go(small, monkeypatch, tmp_path):  # noqa: F811
    """go(name, method, ...): a run of the dot in the folder `name`, begun or, where there is one, gone on with."""
    monkeypatch.setattr(selfalign, "being_learnt", lambda successes: False)
    (tmp_path / "r.py").write_text(REWARD)
    real_rank = selfalign.rank_attempts

    def rank_attempts(llm, task, T):                                  # asks, and says what the reward does not
        real_rank(llm, task, T)
        return [[int(i)] for i in np.argsort([tau[:, 1].sum() for tau in T])]
    monkeypatch.setattr(selfalign, "rank_attempts", rank_attempts)
    real, runs = Run._lock, []
    monkeypatch.setattr(Run, "_lock", lambda kept: (runs.append(kept), real(kept)))

    def run(name, method="selfalign", env=Dot, steps=700, beside=False):
        folder = tmp_path / name
        try:
            kept = Run(folder, None if folder.exists() else {"task": "reach", "reward": method, "obs": "state", "seed": 5, "steps": steps})
            selfalign.train(env, TASK, LLM(Answered(kept.answered, Writer()), kept.exchange), kept, method, 5, steps,
                            proposal=str(tmp_path / "r.py"), beside=beside)
            kept.close()
        finally:
            for kept in runs:                                         # what the end of a process does
                if kept._held:
                    os.close(kept._held)
            runs.clear()
        return folder
    return run


def cut_at(patch, count, owner, name):
    """Makes the call number `count` of owner.name the last thing that happens."""
    real, calls = getattr(owner, name), [0]

    def call(*args, **kwargs):
        calls[0] += 1
        if calls[0] == count:
            raise Cut
        return real(*args, **kwargs)
    patch.setattr(owner, name, call)


def files(folder):
    """What two equal runs have in common."""
    with np.load(folder / "episodes.npz") as episodes:
        lived = [episodes[name].tolist() for name in episodes.files]
    asked = [{**json.loads(line), "seconds": 0} for line in (folder / "llm.jsonl").read_text().splitlines()]
    policy = torch.load(folder / "policy.pt", weights_only=True)
    return ([(folder / name).read_bytes() for name in ("metrics.csv", "theta.csv")], asked, lived,
            {name: value.tolist() for name, value in policy.items()})


class Peculiar(Exception):
    """Pickled, it cannot be made again: that takes one argument."""

    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")


WHOLE = {}                                                            # what runs that nothing cuts short leave


@pytest.mark.parametrize("method, env, owner, name, count", [
    ("selfalign", Dot, Dot, "step", 90), ("selfalign", Dot, Dot, "step", 600), ("selfalign", Dot, Dot, "reset", 40),
    ("selfalign", Dot, run_module.os, "replace", 1), ("selfalign", Dot, run_module.os, "replace", 9),
    ("selfalign", Dot, run_module.os, "fsync", 1), ("selfalign", Dot, run_module.os, "fsync", 4), ("selfalign", Dot, run_module.torch, "save", 5),
    ("selfalign", Dot, selfalign, "sample_posterior", 1), ("selfalign", Dot, selfalign, "rank_attempts", 2),
    ("selfalign", Dot, selfalign, "evaluate", 3), ("fixed", Dot, Dot, "step", 800), ("sparse", Dot, Dot, "step", 800),
    ("rewrite", Dot, Dot, "step", 600), ("rewrite", Dot, selfalign, "rank_attempts", 2), ("fixed", Picture, Dot, "step", 450)])
def test_a_run_that_is_cut_anywhere_goes_on_as_if_nothing_had_happened(method, env, owner, name, count, go, monkeypatch):
    steps = 500 if env is Picture else 700
    if (method, env) not in WHOLE:
        WHOLE[method, env] = files(go("whole", method, env, steps))
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_at(patch, count, owner, name)
        go("cut", method, env, steps)
    if (name, count) == ("replace", 1):                               # there were no settings yet
        with pytest.raises(SystemExit, match="No such file"):
            go("cut", method, env, steps)
    else:
        assert files(go("cut", method, env, steps)) == WHOLE[method, env]


needs_fork = pytest.mark.skipif(not cli.second_core("cpu"), reason="evaluations have a process of their own on Linux with two cores only")


@needs_fork
@pytest.mark.parametrize("method, env", [("selfalign", Dot), ("sparse", Dot), ("rewrite", Dot), ("fixed", Picture)])
def test_evaluations_in_a_process_of_their_own_change_nothing(method, env, go, monkeypatch):
    steps = 500 if env is Picture else 700
    here, evaluated, real = go("here", method, env, steps), [], selfalign.evaluate
    monkeypatch.setattr(selfalign, "evaluate", lambda *args: (evaluated.append(1), real(*args))[1])
    assert files(go("beside", method, env, steps, beside=True)) == files(here) and not evaluated


@needs_fork
@pytest.mark.parametrize("owner, name, count", [(run_module.os, "fsync", 4), (selfalign, "rank_attempts", 2), (selfalign.ReplayBuffer, "sample", 150)])
def test_with_them_a_run_that_is_cut_goes_on_as_well(owner, name, count, go, monkeypatch):
    whole = files(go("whole"))
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_at(patch, count, owner, name)
        go("cut", beside=True)
    assert files(go("cut", beside=True)) == whole


@needs_fork
def test_a_skill_that_is_learnt_beside_the_training_was_learnt_at_the_same_step(go, monkeypatch):
    results = dict.fromkeys(range(100, 800, 100), 0.5) | {300: 1.0, 400: 1.0}

    class Here(selfalign.Evaluations):                                # says what the results are, by the step
        def end(self):
            step, _, *rest = super().end()
            return step, results[step], *rest
    monkeypatch.setattr(selfalign, "Evaluations", Here)
    monkeypatch.setattr(selfalign, "EVAL_EVERY", 100)
    here, beside = go("here", "fixed"), go("beside", "fixed", beside=True)
    for folder in (here, beside):
        assert [line.split(",")[:2] for line in (folder / "metrics.csv").read_text().splitlines()[1:]] == [
            ["200", "0.5"], ["300", "1"], ["400", "1"]]
        assert Run(folder, None).finished(700) == "the skill was learnt at 300 steps"
    for name in ("metrics.csv", "policy.pt"):
        assert (here / name).read_bytes() == (beside / name).read_bytes()
    with np.load(here / "episodes.npz") as before, np.load(beside / "episodes.npz") as after:
        assert len(before.files) == 20 and len(after.files) == 21      # a quarter of EVAL_EVERY ahead
        assert all(np.array_equal(before[name], after[name]) for name in before.files)


@needs_fork
def test_errors_of_an_evaluation_reach_the_training(go, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("of its own")

    def peculiar(*_):
        raise Peculiar(1, 2)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError, match="of its own") as raised:
        patch.setattr(selfalign, "evaluate", broken)
        go("broken", beside=True)
    assert ", in broken\n" in str(raised.value.__cause__)             # where it was raised
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="Peculiar: 1 and 2"):
        patch.setattr(selfalign, "evaluate", peculiar)
        go("peculiar", beside=True)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="not a policy"):
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *_: (_ for _ in ()).throw(RuntimeError("not a policy")))
        go("unloaded", beside=True)
    training = os.getpid()
    monkeypatch.setattr(selfalign, "evaluate", lambda *_: os.kill(os.getpid(), signal.SIGKILL) if os.getpid() != training else None)
    with pytest.raises(ChildProcessError, match="was killed"):
        go("killed", beside=True)


@needs_fork
def test_a_process_that_evaluates_keeps_nobody_out_of_a_folder(go, monkeypatch, tmp_path):
    monkeypatch.setattr(selfalign, "evaluate", lambda *_: time.sleep(60))
    others = {*multiprocessing.active_children()}                     # of tests before
    with pytest.raises(Cut) as cut, monkeypatch.context() as patch:
        cut_at(patch, 60, selfalign.ReplayBuffer, "sample")           # while it evaluates
        go("cut", beside=True)
    child, = {*multiprocessing.active_children()} - others
    assert Run(tmp_path / "cut", None).saved is None and child.is_alive() and cut
    child.kill()


@needs_fork
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_of_a_run_stops_it_in_order(number, tmp_path):
    evaluating = tmp_path / "evaluating"
    code = ("import sys, time, pathlib, selfalign; selfalign.EVAL_EVERY, selfalign.EXPLORE_STEPS, selfalign.EVAL_EPISODES = 200, 100, 2; "
            f"real = selfalign.evaluate; selfalign.evaluate = lambda *a: (pathlib.Path({str(evaluating)!r}).touch(), time.sleep(1), real(*a))[2]; "
            f"sys.argv = ['selfalign.py', '--reward', 'sparse', '--out', {str(tmp_path / 'run')!r}]; selfalign.main()")
    run = subprocess.Popen([sys.executable, "-c", code], cwd=Path(selfalign.__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           text=True, start_new_session=True)
    until = time.monotonic() + 60
    while time.monotonic() < until and not evaluating.exists():
        time.sleep(0.05)
    os.killpg(run.pid, number)
    said, complained = run.communicate(timeout=60)
    assert "Stopped. Go on" in said and run.returncode == 0 and "Traceback" not in complained
    assert (tmp_path / "run" / "episodes.npz").exists()


def test_more_steps_go_on_as_if_they_had_been_asked_for_at_first(go):
    whole, short = go("whole", steps=700), go("short", steps=400)
    assert files(go("short", steps=700)) == files(whole) != files(go("other", steps=400))
    assert Run(short, None).finished(700) == "it has had its 700 steps; give it more with --steps"


def test_more_steps_are_written_down_and_tables_have_their_heads(go):
    folder = go("run", "fixed", steps=400)
    run = Run(folder, None)
    run.go_on({**run.settings, "steps": 700})
    run.close()
    assert json.loads((folder / "settings.json").read_text())["steps"] == 700 and not list(folder.glob("*.part"))
    assert (folder / "metrics.csv").read_text().splitlines()[0] == "step,success,sparse,return,critic_loss,actor_loss,q"
    assert (folder / "theta.csv").read_text().splitlines()[0] == "step,cause,name,value,low,high,rhat,ess"


def test_answers_given_after_the_last_checkpoint_are_not_asked_for_again(go, monkeypatch):
    real, asked = StandIn.__call__, []
    monkeypatch.setattr(StandIn, "__call__", lambda self, messages: (asked.append(1), real(self, messages))[1])
    whole = go("whole")
    count = len(asked)
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_at(patch, 1, selfalign, "sample_posterior")
        go("cut")
    assert files(go("cut")) == files(whole) and len(asked) == 2 * count > 2


@pytest.mark.parametrize("name", ["checkpoint.pt", "buffer.bin", "metrics.csv"])
def test_a_full_disk_keeps_the_last_checkpoint_and_goes_on_with_space(name, go, monkeypatch, capsys):
    whole, real, calls = go("whole", "fixed"), builtins.open, [0]

    class Full:
        """A file that takes a hundred bytes more."""

        def __init__(self, file):
            self.file = file

        def write(self, data):
            self.file.write(bytes(data)[:100])
            raise OSError(28, "No space left on device")

        def __getattr__(self, attribute):
            return getattr(self.file, attribute)

        def __enter__(self):
            return self

        def __exit__(self, *args):
            self.file.close()

    def open_(path, mode="r", *args, **kwargs):
        file = real(path, mode, *args, **kwargs)
        calls[0] += name in str(path) and mode != "rb"
        return Full(file) if name in str(path) and mode != "rb" and calls[0] in (2, 3) else file
    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(builtins, "open", open_)
        cut_at(patch, 830, Dot, "step")                               # evaluations take steps, too
        go("cut", "fixed")
    errors = capsys.readouterr().err
    assert 1 <= errors.count("No space left") <= 2 and calls[0] >= 2
    assert files(go("cut", "fixed")) == files(whole)


def resume(folder, monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["selfalign.py", "--resume", str(folder), *flags])
    selfalign.main()


def test_a_replayed_run_goes_on_with_the_answers_that_are_left(small, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setattr(selfalign, "being_learnt", lambda successes: False)
    original = small("--task", "push")
    transcript = tmp_path / "t.jsonl"
    transcript.write_bytes((original / "llm.jsonl").read_bytes())
    flags = ["--task", "push", "--llm", f"replay:{transcript}", "--out", str(tmp_path / "cut")]
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_at(patch, 2, selfalign, "rank_attempts")
        small(*flags)
    resume(tmp_path / "cut", monkeypatch)
    assert files(tmp_path / "cut") == files(original)


@pytest.mark.parametrize("name, value, words", [("device", "abacus", "--device"), ("llm", 5, "other kinds"), ("seed", -1, "--seed"),
                                                ("task", "fly", "no run of"), ("proposal", 3, "other kinds"), ("steps", 10 ** 9, "--steps")])
def test_settings_that_are_no_runs_are_refused_in_one_line(name, value, words, tmp_path, monkeypatch):
    settings = {"task": "touch", "reward": "selfalign", "obs": "state", "seed": 1, "steps": 500, "device": "cpu", "llm": "offline",
                "model": None, "proposal": None, "out": None}
    (tmp_path / "settings.json").write_text(json.dumps({**settings, name: value}))
    with pytest.raises(SystemExit) as stop:
        resume(tmp_path, monkeypatch)
    assert words in str(stop.value) and "\n" not in str(stop.value)


def test_a_run_keeps_the_llm_that_auto_has_chosen(small, monkeypatch):  # noqa: F811
    folder = small(steps=300)
    assert json.loads((folder / "settings.json").read_text())["llm"] == "offline"


def test_a_second_process_on_a_folder_is_refused(go):
    folder = go("run", "fixed")
    first = Run(folder, None)
    with pytest.raises(SystemExit, match="another process is at work"):
        Run(folder, None)
    first.close()
    Run(folder, None).close()


class Foreign:
    def __reduce__(self):
        return os.system, ("touch foreign-code-ran",)


def test_a_checkpoint_that_is_not_its_own_is_refused_in_one_line(go, tmp_path, monkeypatch):
    folder = go("run", "fixed", steps=600)
    good = {name: (folder / name).read_bytes() for name in ("checkpoint.pt", "settings.json", "buffer.bin")}
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    monkeypatch.chdir(tmp_path)

    def refused(words):
        with pytest.raises(SystemExit) as stop:
            go("run", "fixed", steps=900)
        assert words in str(stop.value) and "\n" not in str(stop.value), stop.value
        for name, content in good.items():
            (folder / name).write_bytes(content)
    for cut in (0, 1, 100, len(good["checkpoint.pt"]) // 2, len(good["checkpoint.pt"]) - 1):
        (folder / "checkpoint.pt").write_bytes(good["checkpoint.pt"][:cut])
        refused("holds no run that can go on")
    torch.save(Foreign(), folder / "checkpoint.pt")
    refused("holds no run that can go on")
    assert not (tmp_path / "foreign-code-ran").exists()
    for content, words in (({**saved, "version": 0}, "version 0"), ([1, 2], "holds no run"), ({**saved, "agent": {}}, "damaged"),
                           ({name: saved[name] for name in saved if name != "step"}, "holds no run"),
                           ({**saved, "pieces": [[0, 10 ** 9, ["obs"]]]}, "damaged"), ({**saved, "generators": [1]}, "damaged"), ({**saved, "r_theta": {"source": "x"}}, "damaged"), ({**saved, "r_theta": 3}, "damaged")):
        torch.save(content, folder / "checkpoint.pt")
        refused(words)
    (folder / "settings.json").write_bytes(good["settings.json"].replace(b'"seed": 5', b'"seed": 2'))
    refused("other settings")
    for settings in (b"{", b"[]", b"{}", b"\xff", b"null", good["settings.json"].replace(b"600", b'"600"')):
        (folder / "settings.json").write_bytes(settings)
        refused("holds no run that can go on")
    for cut in (0, 10, len(good["buffer.bin"]) - 10):
        (folder / "buffer.bin").write_bytes(good["buffer.bin"][:cut])
        refused("damaged")
    go("run", "fixed", steps=900)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_at_the_end_of_the_episode_and_the_command_line_goes_on(number, small, monkeypatch, capsys):  # noqa: F811
    whole = small("--reward", "fixed")
    with monkeypatch.context() as patch:
        real, calls = PandaEnv.step, [0]

        def step(env, action):
            calls[0] += 1
            if calls[0] == 400:
                os.kill(os.getpid(), number)
            return real(env, action)
        patch.setattr(PandaEnv, "step", step)
        stopped = small("--reward", "fixed")
    said = capsys.readouterr().out
    assert "Stopping at the end of this episode" in said and f"--resume {stopped}" in said
    assert torch.load(stopped / "checkpoint.pt", weights_only=True)["step"] % 50 == 0
    monkeypatch.setattr("sys.argv", ["selfalign.py", "--resume", str(stopped)])
    selfalign.main()
    assert re.search(r"Going on from the checkpoint at \d+ steps", capsys.readouterr().out)
    assert files(stopped) == files(whole)
    with pytest.raises(SystemExit):
        selfalign.main()
    assert "is finished" in capsys.readouterr().out

    (stopped / "episodes.npz").unlink()                    # as SIGKILL leaves it after the last checkpoint
    before = {path.name: path.read_bytes() for path in stopped.iterdir()}
    monkeypatch.setattr("sys.argv", ["selfalign.py", "--resume", str(stopped), "--steps", "300"])
    with pytest.raises(SystemExit):
        selfalign.main()
    assert {path.name: path.read_bytes() for path in stopped.iterdir()} == before
    monkeypatch.setattr("sys.argv", ["selfalign.py", "--resume", str(stopped)])
    selfalign.main()
    assert files(stopped) == files(whole)


def test_train_goes_no_further_than_it_has_been_told(small):  # noqa: F811
    """A run that has learnt, or has had its steps, ends at once, whoever calls `train`, and its folder stays as it is."""
    folder = small("--reward", "fixed")
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    for learnt, steps in ((True, 10_000), (False, saved["step"]), (False, saved["step"] - 100)):
        torch.save({**saved, "learnt": learnt}, folder / "checkpoint.pt")
        before = files(folder)
        run = Run(folder, None)
        task = TASKS[run.settings["task"]]
        result = selfalign.train(lambda: PandaEnv(task), task, LLM(None, run.exchange), run, "fixed", run.settings["seed"], steps)
        run.close()
        assert result == (saved["history"]["evaluations"][-2][0] if learnt else None) and files(folder) == before


def test_a_damaged_checkpoint_costs_nothing_that_the_folder_holds(small, monkeypatch):  # noqa: F811
    folder = small("--reward", "fixed")
    before = (folder / "episodes.npz").read_bytes()
    (folder / "buffer.bin").write_bytes(b"")
    monkeypatch.setattr("sys.argv", ["selfalign.py", "--resume", str(folder), "--steps", "2000"])
    with pytest.raises(SystemExit, match="damaged"):
        selfalign.main()
    assert (folder / "episodes.npz").read_bytes() == before


def test_an_error_that_nobody_foresaw_leaves_the_folder_whole(small, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setattr(selfalign, "evaluate", lambda *_: 1 / 0)
    monkeypatch.setattr("sys.argv", ["selfalign.py", "--reward", "fixed", "--out", str(tmp_path / "broken")])
    with pytest.raises(ZeroDivisionError):
        selfalign.main()
    with np.load(tmp_path / "broken" / "episodes.npz") as archive:
        assert len(archive.files) > 1


def test_what_is_printed_cannot_steer_a_terminal_and_a_closed_pipe_ends_nothing(capsys):
    screen = run_module.Screen(sys.stdout)
    print("a\x1b[2Jb\x07c\u202ed\re\n\tθ █", file=screen)
    assert capsys.readouterr().out == "a?[2Jb?c?d?e\n\tθ █\n"
    read, write = os.pipe()
    os.close(read)
    broken = run_module.Screen(open(write, "w"))
    for _ in range(3):
        print("x" * 100_000, file=broken, flush=True)
    with open("/dev/full", "w") as full, pytest.raises(OSError):
        print("x" * 100_000, file=run_module.Screen(full), flush=True)
        full.close()                                                  # nothing before has raised


def test_a_reward_cannot_steer_a_terminal_and_its_file_is_as_clean():
    source = 'def r(distance, w=1.0):  # \x1b[31mred\u202e\r\n    """\x07"""\n    return {"a": w * distance}'
    reward = run_module.Reward(source, TASK.features)
    assert reward.source == run_module.printable(reward.source) and "\x1b" not in reward.python({"w": 2.0})
    assert reward.params == {"w": 1.0} and reward.total({"distance": 2.0}) == 2.0


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """A folder with a policy that --play takes."""
    folder = tmp_path_factory.mktemp("played")
    (folder / "settings.json").write_text(json.dumps({"task": "touch", "obs": "state", "seed": 1}))
    agent = selfalign.DrQV2((24,), (4,), **selfalign.AGENT["state"])
    torch.save(agent.greedy.state_dict(), folder / "policy.pt")
    return folder


@pytest.mark.parametrize("name, content", [
    ("settings.json", None), ("settings.json", b""), ("settings.json", b"[]"), ("settings.json", b"\xff"),
    ("settings.json", b'{"task": "touch"}'), ("settings.json", b'{"task": ["touch"], "obs": "state"}'),
    ("settings.json", b'{"task": "fly", "obs": "state"}'), ("settings.json", b'{"task": "touch", "obs": 5}'),
    ("settings.json", b'{"task": "touch", "obs": "pixels"}'), ("settings.json", "a folder"),
    ("policy.pt", None), ("policy.pt", b""), ("policy.pt", b"PK\x03\x04"), ("policy.pt", "cut"), ("policy.pt", Foreign()),
    ("policy.pt", [1]), ("policy.pt", {}), ("policy.pt", {"1.trunk.0.weight": 3}), ("policy.pt", {3: torch.zeros(1)}),
    ("policy.pt", "nan"), ("policy.pt", "another shape")])
def test_a_damaged_folder_is_not_played_and_says_why_in_one_line(name, content, played, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("settings.json", "policy.pt"):
        (tmp_path / file).write_bytes((played / file).read_bytes())
    path = tmp_path / name
    if content is None:
        path.unlink()
    elif content == "a folder":
        path.unlink()
        path.mkdir()
    elif content == "cut":
        path.write_bytes(path.read_bytes()[:-50])
    elif content == "nan":
        state = torch.load(path, weights_only=True)
        next(iter(state.values())).fill_(float("nan"))
        torch.save(state, path)
    elif content == "another shape":
        state = torch.load(path, weights_only=True)
        torch.save({**state, "1.trunk.0.weight": torch.zeros(1)}, path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(SystemExit) as stop:
        cli.play(str(tmp_path), selfalign.AGENT, 1)
    assert "holds no policy to play" in str(stop.value) and "\n" not in str(stop.value)
    assert not (tmp_path / "foreign-code-ran").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="asks for an X server")
@pytest.mark.parametrize("display", ["", ":987", "nonsense", "127.0.0.1:987"])
def test_a_display_that_is_gone_is_not_waited_for(display, played, monkeypatch):
    monkeypatch.setenv("DISPLAY", display)
    with pytest.raises(SystemExit, match="no display"):
        cli.play(str(played), selfalign.AGENT, 1)


def test_pictures_go_where_they_can(played, tmp_path):
    pytest.importorskip("PIL")
    (tmp_path / "file").write_text("")
    for where in ({"frames": str(tmp_path / "file")}, {"frames": str(tmp_path / "file" / "x")}, {"gif": str(tmp_path / "file" / "x.gif")}):
        with pytest.raises(SystemExit, match="choose another place"):
            cli.play(str(played), selfalign.AGENT, 1, **where)


def test_a_run_that_ends_between_evaluations_can_go_on_from_its_end(go):
    folder = go("short", "fixed", steps=660)
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 660


def test_where_a_checkpoint_does_not_fit_the_last_one_stays(go, monkeypatch, capsys):
    real, calls = os.fsync, [0]

    def fsync(number):
        calls[0] += 1
        if calls[0] > 3:                                              # two for each checkpoint: the second is cut in its middle
            raise OSError(28, "No space left on device")
        real(number)
    monkeypatch.setattr(run_module.os, "fsync", fsync)
    folder = go("full", "fixed")
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert 200 <= saved["step"] < 300 and not list(folder.glob("*.part"))
    told = capsys.readouterr().err
    assert told.count("Cannot write") == 1 and f"Cannot write {folder / 'checkpoint.pt'}: No space left on device" in told
    assert "from which --resume goes on" in told and "temporary folder" not in told and "could not be written" not in told
    monkeypatch.setattr(run_module.os, "fsync", real)
    whole = go("whole", "fixed")
    go("full", "fixed")                                               # goes on from it
    assert (folder / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()


def test_a_terminal_that_knows_no_greek_shows_question_marks():
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="\n")
    print("R_θ █ 5", file=run_module.Screen(terminal), flush=True)
    assert terminal.buffer.getvalue() == b"R_? ? 5\n"


def test_an_evaluation_tells_how_fast_it_goes_and_how_long_it_may_take(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(run_module.time, "monotonic", lambda: 100.0)
    kept = Run(tmp_path / "timed", {"task": "t", "steps": 10_000})
    monkeypatch.setattr(run_module.time, "monotonic", lambda: 110.0)
    kept.evaluated(2_000, 0.25, 1.5, 3.25, {"critic_loss": 1.0, "actor_loss": 2.0, "q": 3.0}, b"policy")
    assert (kept.folder / "policy.pt").read_bytes() == b"policy"
    assert capsys.readouterr().out == ("   2,000 steps | success  25% █████··············· | sparse return     3.25 |  200 steps/s | "
                                       "at most 00:00:40 left\n")
    kept.steps = 2_000 + 200 * 100_000
    kept.evaluated(2_000, 0.25, 1.5, 3.25, {"critic_loss": 1.0, "actor_loss": 2.0, "q": 3.0}, b"policy")
    assert capsys.readouterr().out.endswith("at most 27:46:40 left\n")
    kept.close()


def test_what_the_screen_tells_of_an_update(capsys):
    run_module.print_ranking([[2], [0, 1]], np.array([1.0, 5.0, 3.0]), np.array([0.0, 1.0]), np.array([[2, 0], [2, 1]]))
    assert capsys.readouterr().out == ("\n  Ranking 3 trajectories, best first\n    LLM  3 > 1 = 2\n    R_θ  2 > 3 > 1\n"
                                       "  The LLM orders 2 pairs, and R_θ orders 50% of them otherwise.\n")
    run_module.print_ranking([[0, 1]], np.zeros(2), np.zeros(0), np.zeros((0, 2), int))         # all the same to the LLM
    assert "orders 0 pairs, and R_θ orders 0% of them" in capsys.readouterr().out
    samples = np.exp(np.linspace(0, 1, 1001)[None, :, None] * np.ones((2, 1, 1)))
    posterior = Posterior(samples, np.array([2.0]), 0.25, np.array([1.0123]), np.array([345.6]))
    for gain, refused, word, last in ((0.113, None, "after", "11.3 % points more agree with it.\n"),
                                      (-0.02, "that is no better", "refused", "2.0 % points fewer agree with it; not taken: that is no better.\n")):
        run_module.print_posterior(posterior, {"weight": 1.0}, {"weight": 2.0}, gain, refused)
        assert capsys.readouterr().out == (
            "\n  Metropolis-Hastings, 2 chains of 1,001 draws: acceptance 0.25, R-hat up to 1.012, effective sample size from 346\n"
            f"    θ                        before {word:>10}   90 % interval\n"
            f"    weight                        1          2   1.05 to 2.59\n  Of all pairs ranked so far, {last}")
    run_module.print_analysis("the price", {"a": 1.0, "b": 2.0}, {"b": 0.5})
    assert capsys.readouterr().out == ("\n  Asked what blocks the skill, the LLM says: the price\n"
                                       "    b                             2        0.5\n")
    run_module.print_analysis("nothing", {"a": 1.0}, {})
    assert capsys.readouterr().out.endswith("says: nothing\n  It changes nothing.\n")


def test_a_proposal_is_shown_whole_and_its_theta_is_a_row_each(capsys, tmp_path):
    reward = Reward("\ndef r(x, a=1.0, b=0.25):\n    return {'t': a * x + b}\n", ["x"])
    kept = Run(tmp_path / "new", {"task": "t", "steps": 10})
    kept.proposed(reward, selfalign.Change(0, "proposal", reward.params, reward.params))
    assert "\n\n    def r(x, a=1.0, b=0.25):\n        return {'t': a * x + b}\n\n" in capsys.readouterr().out
    posterior = Posterior(np.full((2, 4, 2), [1.5, 0.5]), np.array([1.5, 0.5]), 0.3, np.array([1.01, 1.02]), np.array([300.0, 400.0]))
    kept.theta(reward, selfalign.Change(20, "posterior", {"a": 1.5, "b": 0.5}, reward.params, posterior))
    assert (tmp_path / "new" / "theta.csv").read_text().splitlines()[1:] == [
        "0,proposal,a,1,,,,", "0,proposal,b,0.25,,,,", "20,posterior,a,1.5,1.5,1.5,1.01,300", "20,posterior,b,0.5,0.5,0.5,1.02,400"]
    kept.close()
