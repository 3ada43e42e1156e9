"""Runs that are stopped anywhere and continue to the same bytes; folders that are refused."""

import shutil

import numpy as np
import pytest
import torch
from conftest import Killed, Picture, contents

from run import Change, Run, RunError, free_folder


@pytest.mark.parametrize(
    "fuses, values",
    [
        # In check_env, between an update of θ and its checkpoint, then after one checkpoint more.
        ((30, 280, 330, 260, 220), {}),
        ((330, 130), {"make_env": Picture, "steps": 300}),
        ((330,), {"reward": "sparse", "proposal": "", "update": None, "steps": 300}),
    ],
    ids=["state", "pixels", "sparse"],
)
def test_killed_run_resumes_to_the_same_bytes(fuses, values, go, tmp_path):
    go("whole", **values)
    for fuse in fuses:
        with pytest.raises(Killed):
            go("cut", fuse=fuse, **values)
    go("cut", **values)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    cut, whole = (tmp_path / name / "llm.jsonl" for name in ("cut", "whole"))
    if "reward" in values:
        assert not whole.exists()  # nobody is asked
    else:  # no question is asked twice
        assert len(cut.read_text().splitlines()) == len(whole.read_text().splitlines())


def test_more_steps(fixed, go, tmp_path):
    go("more", update=None, steps=300)
    go("more", update=None, steps=500)
    assert contents(tmp_path / "more") == contents(fixed)


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match="is not empty: choose another --out"):
        Run(tmp_path)


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "a")


def test_resuming_without_a_checkpoint_empties_nothing(copy):
    (copy / "checkpoint.pt").unlink()
    before = contents(copy)
    with pytest.raises(ValueError, match="checkpoint.pt is gone"):
        Run(copy, resume=True)
    assert contents(copy) == before


@pytest.mark.parametrize("name", ["settings.json", "checkpoint.pt"])
@pytest.mark.parametrize("content", [b"", b"no such thing", b"\x80\x02K\x01."])
def test_damaged_files_are_named(name, content, copy):
    (copy / name).write_bytes(content)
    with pytest.raises(ValueError, match="holds no run to resume"):
        Run(copy, resume=True)


def test_a_damaged_episode_is_named_and_nothing_is_written(copy, go):
    (copy / "episodes" / "000003.npz").write_bytes(b"PK half")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match="cannot resume"):
        go("a", steps=600)
    assert before == {path: path.read_bytes() for path in before}


def test_a_checkpoint_runs_no_code(tmp_path):
    (tmp_path / "settings.json").write_text("{}")

    class Evil:
        def __reduce__(self):
            return (print, ("code runs",))

    torch.save(Evil(), tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="holds no run"):
        Run(tmp_path, resume=True)


def test_free_folder(tmp_path):
    assert free_folder(str(tmp_path / "a")) == tmp_path / "a"
    (tmp_path / "a").mkdir()
    (tmp_path / "a-2").mkdir()
    assert free_folder(str(tmp_path / "a")) == tmp_path / "a-3"


def test_the_last_policy_survives_a_kill(copy, go):
    # Were checkpoint.pt first, a kill in between would leave the run without its policy.
    before = (copy / "checkpoint.pt").read_bytes()
    (copy / "policy.pt").unlink()
    (copy / "policy.pt").mkdir()  # cannot be overwritten
    with pytest.raises(OSError):
        go("a", steps=600)
    assert (copy / "checkpoint.pt").read_bytes() == before


def test_two_runs_started_together_do_not_share_a_folder(tmp_path):
    first, second = Run(tmp_path / "a"), Run(tmp_path / "a")
    assert not (tmp_path / "a").exists()  # nothing is written before `begin`
    (tmp_path / ".a" / "episodes").mkdir(parents=True)  # a run that was killed as it began
    first.begin({"seed": 1}, None, None)
    assert (tmp_path / "a" / "episodes").exists() and not (tmp_path / ".a").exists()
    with pytest.raises(RunError, match="cannot be made"):
        second.begin({"seed": 2}, None, None)
    assert "1" in (tmp_path / "a" / "settings.json").read_text()


def test_an_update_may_give_numpy_numbers(go, tmp_path):
    def update(llm, task, state, c, rng):
        now = state.changes[-1]
        theta = {name: np.float64(2 * value) for name, value in now.theta.items()}
        return Change(state.step, "doubled", now.source, theta, theta)

    go("a", steps=300, update=update)
    assert Run(tmp_path / "a", resume=True).saved
