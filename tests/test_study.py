"""The studies' runs: shared out once each, cut short and gone on with, collected as they are."""

import csv
import json
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import selfalign
import study
from mh import sample_posterior


def test_every_job_has_a_folder_of_its_own_and_changes_what_there_is():
    jobs = study.list_jobs(list(study.STUDIES), 3)
    folders = {}
    for job in jobs:                                                  # the usual run stands in several studies, once on disk
        assert folders.setdefault(study.folder(job), job)[:5] == job[:5]
    assert len(folders) == 3 * (3 * 3 + 6 + 3 + 2 * 5 + 2 + 3)
    assert all(hasattr(selfalign, name) for job in jobs for name in job.names)
    assert len(study.list_jobs(["methods"], 5)) == 3 * 3 * 5


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Jobs of 800 steps with two updates of θ, judged on 3 episodes, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in dict(UPDATE_EVERY=300, RESET_EVERY=300, EVAL_EVERY=200, EVAL_EPISODES=2, EXPLORE_STEPS=100, RANKED=4, BATCH={"state": 16},
                            AGENT={"state": dict(hidden_dim=16, lr=1e-3, std=(1.0, 0.5, 500))},
                            sample_posterior=partial(sample_posterior, steps=(50,))).items():
        monkeypatch.setattr(selfalign, name, value)
    monkeypatch.setattr(study, "STEPS", 800)
    monkeypatch.setattr(study, "JUDGED", 3)


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def test_a_run_is_trained_judged_and_collected(small, capsys):
    jobs = [job for job in study.list_jobs(["methods"], 1) if job.task == "push"]
    before = dict(vars(selfalign))
    assert study.work(jobs, iter(range(9)).__next__, 1) == 0
    assert {name: value for name, value in vars(selfalign).items() if name not in before or value is not before[name]} == {}
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and "not learnt" in said[0] and "2 of 3 runs left" in said[0] and "0 of 3 runs left" in said[2]
    folder = study.folder(jobs[2])
    assert {"metrics.csv", "policy.pt", "judged.json"} <= names_in(folder) and "judged.json.part" not in names_in(folder)
    assert json.loads((folder / "settings.json").read_text())["seed"] == 1
    assert "Not learnt within 800" in Path(f"{folder}.log").read_text()
    study.collect("methods", jobs)
    runs = study.read("results/study-methods.csv")
    assert list(runs) == [("push", "sparse"), ("push", "fixed"), ("push", "selfalign")]
    assert list(runs["push", "sparse"][1]) == ["success", "success of 3", "seconds"]
    assert runs["push", "sparse"][1]["seconds"] == [(800, round(study.judged(jobs[0])["trained"]))]
    measures = runs["push", "selfalign"][1]
    assert [step for step, _ in measures["success"]] == [200, 400, 600, 800]
    assert measures["success of 3"] == [(800, study.judged(jobs[2])["success"])]
    with open(folder / "theta.csv") as file:
        assert {f"θ {row['name']}" for row in csv.DictReader(file)} == {name for name in measures if name.startswith("θ ")}
    # Judging takes episodes that no evaluation has seen, the same ones each time.
    before = (folder / "judged.json").read_text()
    (folder / "judged.json").unlink()
    assert study.execute(jobs[2]) and "is finished" in Path(f"{folder}.log").read_text()
    assert json.loads((folder / "judged.json").read_text())["success"] == json.loads(before)["success"]


@pytest.mark.parametrize("evaluation", [1, 2, 4])
def test_a_run_that_was_stopped_goes_on_and_ends_as_if_it_had_not_been(evaluation, small, monkeypatch):
    whole, cut = (study.Job("parts", "push", variant, 1) for variant in ("whole", "cut"))
    assert study.execute(whole)
    real, evaluated = selfalign.evaluate, []

    def interrupted(*args):
        evaluated.append(args)
        if len(evaluated) == evaluation:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(selfalign, "evaluate", interrupted)
    other = study.Job("parts", "push", "other", 1)
    with pytest.raises(SystemExit, match="push-cut-1: stopped; the same command goes on with it"):
        study.work([cut, other], iter(range(9)).__next__, 1)
    assert not study.folder(other).exists() and study.judged(cut) is None
    monkeypatch.setattr(selfalign, "evaluate", real)
    assert study.work([cut], iter(range(9)).__next__, 1) == 0
    for name in ("metrics.csv", "theta.csv"):
        assert (study.folder(cut) / name).read_bytes() == (study.folder(whole) / name).read_bytes()
    assert study.judged(cut)["success"] == study.judged(whole)["success"]


@pytest.mark.parametrize("variant", ["20% flipped", "no analysis", "no sampler", "pairs of weight 1", "K = 12", "every 2,500 steps"])
def test_what_a_variant_changes_happens_in_its_run(variant, small, monkeypatch, capsys):
    job = next(job for job in study.list_jobs(["noise", "parts", "often"], 1) if job.variant == variant)
    called = []
    name = next(iter(job.names))
    if callable(job.names[name]):
        job = job._replace(names={name: lambda *args: (called.append(args), study_value(*args))[1]})
        study_value = dict(next(j for j in study.list_jobs(["noise", "parts"], 1) if j.variant == variant).names)[name]
    monkeypatch.setattr(selfalign, "DISCORDANT", -1.0)                # every ranking disagrees
    monkeypatch.setattr(study, "STEPS", 3_000 if "every" in variant else 800)
    assert study.execute(job), Path(f"{study.folder(job)}.log").read_text()
    asked = [json.loads(line) for line in (study.folder(job) / "llm.jsonl").read_text().splitlines()]
    ranked = [exchange["prompt"].count("\nAttempt ") for exchange in asked if exchange["kind"] == "rank"]
    assert len(ranked) == (1 if "every" in variant else 2)
    assert (ranked[0] > 4) == (variant == "K = 12")
    assert called or not callable(job.names[name])


def test_a_run_killed_before_it_had_begun_begins_anew(small):
    job = study.Job("parts", "push", "early", 1)
    study.folder(job).mkdir(parents=True)
    (study.folder(job) / "settings.json.part").write_text("{")
    assert study.execute(job) and study.judged(job)


def test_a_run_that_fails_is_told_and_takes_no_other_with_it(small, monkeypatch, capsys):
    jobs = [study.Job("parts", "push", variant, 1, flags) for variant, flags in (("bad", ("--proposal", "nowhere.py")), ("good", ()))]
    assert study.work(jobs, iter(range(9)).__next__, 1) == 1
    assert "nowhere.py" in capsys.readouterr().out and study.judged(jobs[0]) is None and study.judged(jobs[1])


def test_each_run_is_done_once_whoever_takes_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    done, lock, counter = [], threading.Lock(), iter(range(1000))

    def execute(job):
        done.append(job)
        folder = study.folder(job)
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text("step,success\n2000,1.0\n3000,1.0\n")
        (folder / "part").write_text('{"success": 1.0, "seconds": 60}')
        (folder / "part").rename(folder / "judged.json")
        return True

    def claim():
        with lock:
            return next(counter)
    monkeypatch.setattr(study, "execute", execute)
    jobs = study.list_jobs(["noise"], 3)
    execute(jobs[4])                                                  # by a former worker
    workers = [threading.Thread(target=study.work, args=(jobs, claim, 3)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(map(jobs.index, done)) == list(range(len(jobs)))
    assert study.left(jobs, 3) == f"0 of {len(jobs)} runs left, about 0 min"


def test_time_left_goes_by_runs_of_the_same_kind(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    jobs, seconds = study.list_jobs(["often"], 2), study.STEPS / study.SPEED["state"]      # 3 variants, 2 seeds
    assert study.left(jobs, 2) == f"6 of 6 runs left, about {6 * seconds / 60 / 2:.0f} min"
    study.folder(jobs[0]).mkdir(parents=True)
    (study.folder(jobs[0]) / "judged.json").write_text('{"success": 1.0, "seconds": 1200}')
    (study.folder(jobs[0]) / "metrics.csv").write_text("step,success\n2000,1\n3000,1\n")
    assert study.left(jobs, 1) == f"5 of 6 runs left, about {20 + 4 * seconds / 60:.0f} min"
    pixels = study.list_jobs(["pixels"], 1)
    assert study.left(pixels, 1) == f"3 of 3 runs left, about {3 * 60_000 / study.SPEED['pixels'] / 60:.0f} min"


def test_a_run_of_fewer_steps_is_not_finished_and_gets_the_others(small, monkeypatch):
    short, more = (study.Job("parts", "push", "whole", 1, steps=steps) for steps in (400, 800))
    assert study.execute(short) and study.judged(short) and study.judged(more) is None
    assert study.execute(more) and [step for step, _ in study.evaluations(study.folder(more))] == [200, 400, 600, 800]
    assert study.judged(more)


def test_a_run_leaves_the_number_of_threads_to_the_next(small, monkeypatch):
    threads = torch.get_num_threads()
    jobs, real, found = [study.Job("parts", "push", name, 1) for name in ("broken", "whole", "last")], selfalign.main, []

    def main():
        found.append(torch.get_num_threads())
        if len(found) == 1:
            sys.exit("broken")
        return real()
    monkeypatch.setattr(selfalign, "main", main)
    try:
        torch.set_num_threads(threads + 1)
        assert study.work(jobs, iter(range(9)).__next__, 1) == 1
        assert found == [threads + 1] * 3 and torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_noise_turns_that_share_of_the_pairs_round(share):
    ranking = [[i] for i in range(48)]
    pairs, flipped = selfalign.pairs_of(ranking), study.flipping(share, 1)(ranking)
    turned = (flipped == pairs[:, ::-1]).all(axis=1)
    assert ((flipped == pairs).all(axis=1) | turned).all() and abs(turned.mean() - share) < 0.05
    used = study.flipping(share, 1)
    used(ranking[::-1])                                               # as a run that is resumed has not
    np.testing.assert_array_equal(used(ranking), flipped)
    assert not np.array_equal(flipped, study.flipping(share, 2)(ranking))


def test_what_is_not_finished_is_missed_and_nothing_is_overwritten_by_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    jobs = study.list_jobs(["noise"], 1)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "study-noise.csv").write_text("kept")
    monkeypatch.setattr(study.sys, "argv", ["study.py", "--collect", "noise", "--seeds", "1"])
    with pytest.raises(SystemExit, match="no run of noise is finished"):
        study.main()
    assert (tmp_path / "results" / "study-noise.csv").read_text() == "kept"
    folder = study.folder(jobs[2])
    folder.mkdir(parents=True)
    for name, text in (("judged.json", '{"success": 0.5, "seconds": 1}'), ("metrics.csv", "step,success\n2000,0.25\n40000,0.5\n"),
                       ("theta.csv", "step,cause,name,value,low,high\n0,proposal,w,2,,\n10000,posterior,w,0.123456,0.1,0.2\n")):
        (folder / name).write_text(text)
    capsys.readouterr()
    study.main()
    assert "3 of 4 runs are not finished" in capsys.readouterr().out
    assert study.read("results/study-noise.csv") == {("touch", "20% flipped"): {1: {
        "success": [(2000, 0.25), (40_000, 0.5)], "success of 100": [(40_000, 0.5)], "θ w": [(0, 2.0), (10_000, 0.1235)],
        "low θ w": [(10_000, 0.1)], "high θ w": [(10_000, 0.2)]}}}


def test_steps_and_table_of_runs_written_by_hand():
    rising = [(2000, 0.5), (3000, 1.0), (4000, 0.95), (5000, 1.0), (6000, 1.0)]
    assert study.steps_to_success(rising) == 5000 and study.steps_to_success(rising[:3]) == np.inf
    seeds = {seed: {"success": [(step, 1.0), (step + 1000, 1.0)], "success of 100": [(step + 1000, success)]}
             for seed, step, success in ((1, 8000, 1.0), (2, 4000, 0.96), (3, 6000, 0.98))}
    seeds[4] = seeds[5] = {"success": [(40_000, 0.1)], "success of 100": [(40_000, 0.08)]}
    assert list(study.table({("push", "fixed"): seeds}))[2:] == ["| push | fixed | 3 of 5 | 8,000 (6,000 to –) | 62.0% (8%) |"]


def test_the_table_of_theta_leaves_out_what_hardly_ever_changed():
    seeds = {seed: {"θ a": [(0, 1.0), (10_000, 5.0), (20_000, last)], "θ b": [(0, 3.0), (10_000, 3.0 + (seed == 1))], "θ c": [(0, 7.0)]}
             for seed, last in ((1, 0.5), (2, 0.0625), (3, 1.0))}
    assert list(study.theta_table({("touch", "selfalign"): seeds}))[2:] == [
        "| touch | selfalign | a | 1 | 0.5 (0.0625 to 1) | 3 of 3 |"]              # back where it began: changed, and undone


def share_of(colour, picture):
    """The share of a picture's pixels, (H, W, 4), that have matplotlib's default colour of that number, or nearly."""
    wanted = {0: (0x1f, 0x77, 0xb4), 1: (0xff, 0x7f, 0x0e)}[colour]
    return (np.abs(picture[:, :, :3] * 255 - wanted).max(axis=-1) < 60).mean()


def test_figures_of_a_study(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    rng = np.random.default_rng(0)
    runs = {("touch", variant): {seed: {
        "success": [(step, rng.uniform()) for step in range(2_000, 9_000, 1_000)], "θ contact_threshold": [(0, 1.0), (4_000, last ** seed)],
        "low θ contact_threshold": [(4_000, last ** seed / 2)], "high θ contact_threshold": [(4_000, last ** seed * 2)]} for seed in (1, 2)}
        for variant, last in (("fixed", 1.0), ("selfalign", 0.25))}
    study.figure(runs, tmp_path / "success.png")
    study.theta_figure(runs, tmp_path / "theta.png")
    for name in ("success", "theta"):
        picture = image.imread(tmp_path / f"{name}.png")
        assert share_of(0, picture) > 0.002 and share_of(1, picture) > 0.002
    study.figure({key: runs[key] for key in runs if key[1] == "fixed"}, tmp_path / "one.png")
    assert share_of(1, image.imread(tmp_path / "one.png")) == 0
    study.theta_figure({key: runs[key] for key in runs if key[1] == "fixed"}, tmp_path / "none.png")      # nothing has changed
    assert not (tmp_path / "none.png").exists()


def test_a_film_has_a_row_for_each_run_and_moves(small, tmp_path, monkeypatch):
    pytest.importorskip("PIL")
    monkeypatch.setattr(study, "STEPS", 400)
    jobs = [job for job in study.list_jobs(["methods"], 1) if job.variant == "sparse"][:2]
    study.work(jobs, iter(range(9)).__next__, 1)
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(study.sys, "argv", ["study.py", "--film", *(str(study.folder(job)) for job in jobs)])
    study.main()
    from PIL import Image
    strip = np.asarray(Image.open(tmp_path / "results" / "film.png").convert("RGB"), dtype=float)
    assert strip.shape == (400, 1200, 3)
    pictures = strip.reshape(2, 200, 6, 200, 3).swapaxes(1, 2)
    assert (np.abs(pictures[:, 0] - pictures[:, 5]).max(axis=(1, 2, 3)) > 50).all()


@pytest.mark.parametrize("flag", ["--collect", "--table", "--figure", "--film"])
def test_what_runs_nothing_is_refused_beside_studies(flag, monkeypatch, capsys):
    monkeypatch.setattr(study, "local_workers", None)
    monkeypatch.setattr(study.sys, "argv", ["study.py", "weak", flag, "noise"])
    with pytest.raises(SystemExit) as stop:
        study.main()
    assert stop.value.code == 2 and "run nothing: leave weak out" in capsys.readouterr().err


def test_the_interquartile_mean_leaves_out_a_quarter_at_each_end():
    assert study.interquartile_mean(np.array([0.0, 9.0, 1.0, 2.0, 100.0])) == 4.0
    np.testing.assert_array_equal(study.interquartile_mean(np.array([[1.0, 4.0], [3.0, 0.0]])), [2.0, 2.0])
