"""Runs that are stopped anywhere and continue to the same bytes; folders that are refused."""

import pytest
import torch
from conftest import Dot, Killed, Picture, contents

from run import Change, Run, RunError, free_folder


@pytest.mark.parametrize("make_env", [Dot, Picture])
@pytest.mark.parametrize("fuse", [45, 301])
def test_a_killed_run_resumes_to_the_same_bytes(fuse, make_env, go, tmp_path):
    steps = 300 if make_env is Picture else 500
    go("whole", make_env=make_env, steps=steps)
    kills = 0
    while True:
        Dot.fuse = fuse
        try:
            go("cut", make_env=make_env, steps=steps)
            break
        except Killed:
            kills += 1
            if kills > 20:  # a fuse too short to reach a checkpoint: let it go through
                fuse *= 2
        finally:
            Dot.fuse = None
    assert kills and contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_sparse_resumes(go, tmp_path):
    go("whole", reward="sparse", proposal="", update=None)
    Dot.fuse = 400
    try:
        with pytest.raises(Killed):
            go("cut", reward="sparse", proposal="", update=None)
    finally:
        Dot.fuse = None
    go("cut", update=None)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_more_steps(go, tmp_path):
    go("whole", update=None)
    go("more", update=None, steps=300)
    go("more", update=None, steps=500)
    assert contents(tmp_path / "more") == contents(tmp_path / "whole")


def test_answers_are_not_asked_for_twice(go, tmp_path):
    from standin import StandIn

    class Counts(StandIn):
        asked = 0

        def __call__(self, messages):
            Counts.asked += 1
            return super().__call__(messages)

    go("whole", backend=Counts())
    once, Counts.asked = Counts.asked, 0
    Dot.fuse = 450
    try:
        with pytest.raises(Killed):
            go("cut", backend=Counts())
    finally:
        Dot.fuse = None
    go("cut", backend=Counts())
    assert Counts.asked == once


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match="is not empty: choose another --out"):
        Run(tmp_path)


def test_resuming_without_a_checkpoint_empties_nothing(go, tmp_path):
    go("a", steps=300)
    (tmp_path / "a" / "checkpoint.pt").unlink()
    before = contents(tmp_path / "a")
    with pytest.raises(ValueError, match="checkpoint.pt is gone"):
        Run(tmp_path / "a", resume=True)
    assert contents(tmp_path / "a") == before


@pytest.mark.parametrize("name", ["settings.json", "checkpoint.pt"])
@pytest.mark.parametrize("content", [b"", b"no such thing", b"\x80\x02K\x01."])
def test_damaged_files_are_named(name, content, go, tmp_path):
    go("a", steps=300)
    (tmp_path / "a" / name).write_bytes(content)
    with pytest.raises(ValueError, match="holds no run to resume"):
        Run(tmp_path / "a", resume=True)


def test_a_checkpoint_runs_no_code(tmp_path):
    (tmp_path / "settings.json").write_text("{}")

    class Evil:
        def __reduce__(self):
            return (print, ("code runs",))

    torch.save(Evil(), tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="holds no run"):
        Run(tmp_path, resume=True)


def test_nothing_is_written_before_begin(tmp_path):
    Run(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_free_folder(tmp_path):
    assert free_folder(str(tmp_path / "a")) == tmp_path / "a"
    (tmp_path / "a").mkdir()
    (tmp_path / "a-2").mkdir()
    assert free_folder(str(tmp_path / "a")) == tmp_path / "a-3"


def test_the_last_policy_survives_a_kill(go, tmp_path, monkeypatch):
    go("a", steps=300)
    (tmp_path / "a" / "policy.pt").unlink()
    written = []
    real = Run._write

    def write(self, name, how):
        written.append(name)
        real(self, name, how)

    monkeypatch.setattr(Run, "_write", write)
    go("a", steps=500)
    # Were checkpoint.pt first, a kill in between would leave the run without its policy.
    assert written.index("policy.pt") < written.index("checkpoint.pt")


def test_two_runs_started_together_do_not_share_a_folder(tmp_path):
    first, second = Run(tmp_path / "a"), Run(tmp_path / "a")
    first.begin({"seed": 1}, None, None)
    with pytest.raises(FileExistsError):
        second.begin({"seed": 2}, None, None)
    assert "1" in (tmp_path / "a" / "settings.json").read_text()


def test_play_says_whether_the_task_succeeds(tmp_path, monkeypatch, capsys):
    import json

    import run as run_module
    from drqv2 import DrQV2
    from envs import PandaEnv

    pytest.importorskip("PIL")
    (tmp_path / "settings.json").write_text(
        json.dumps({"task": "touch", "obs": "state", "hidden": 16})
    )
    agent = DrQV2((24,), (4,), hidden_dim=16)
    torch.save(agent.greedy.state_dict(), tmp_path / "policy.pt")
    monkeypatch.setattr(PandaEnv, "_judge", lambda self: (1.0, True))
    run_module.play(str(tmp_path), str(tmp_path / "x.gif"), 1)
    assert "episode 0: success" in capsys.readouterr().out
    with pytest.raises(ValueError, match="new file"):
        run_module.play(str(tmp_path), str(tmp_path / "x.gif"), 1)


def test_a_damaged_episode_is_named_and_nothing_is_written(go, tmp_path):
    go("a", steps=300)
    (tmp_path / "a" / "episodes" / "000003.npz").write_bytes(b"PK half")
    before = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    with pytest.raises(RunError, match="cannot resume"):
        go("a", steps=500)
    assert before == {path: path.read_bytes() for path in before}


def test_an_update_may_give_numpy_numbers(go, tmp_path):
    import numpy as np

    def update(llm, task, state, c, rng):
        now = state.changes[-1]
        theta = {name: np.float64(2 * value) for name, value in now.theta.items()}
        return Change(state.step, "doubled", now.source, theta, theta)

    go("a", steps=300, update=update)
    assert Run(tmp_path / "a", resume=True).saved
