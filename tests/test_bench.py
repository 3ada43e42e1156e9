"""The table of speeds; the measures themselves need the peers, and are no tests."""

import csv

import pytest

import bench

THETA = [("update of θ, 6 parameters, 48 trajectories", "period", 2.0, 50.0),
         ("update of θ, 6 parameters, 48 trajectories", "period", 4.0, 40.0)]
ROWS = [("control steps/s, touch", "panda-gym", 1500.0, 1000.0), ("control steps/s, touch", "panda-gym", 1800.0, 1000.0),
        ("control steps/s, touch", "panda-gym", 1600.0, 800.0), ("s to 100 %, touch", "SAC", 30.0, 120.0),
        ("s to 100 %, touch", "TD3", 30.0, float("inf"))]


def test_the_table_has_medians_ranges_and_what_is_faster(tmp_path):
    file = tmp_path / "speed.csv"
    with open(file, "w", newline="") as opened:
        csv.writer(opened).writerows(ROWS)
    assert bench.read(file) == ROWS
    assert list(bench.table(ROWS))[2:] == [
        "| control steps/s, touch | 1600 (1500 to 1800) | panda-gym | 1000 (800 to 1000) | 1.60 |",
        "| s to 100 %, touch | 30 | SAC | 120 | 4.00 |",                        # seconds: the fewer the faster
        "| s to 100 %, touch | 30 | TD3 | not reached | – |"]


def test_updates_of_theta_have_a_table_of_their_own():
    of_theta = ["| | s | s of its period of training | share |", "| --- | --- | --- | --- |",
                "| update of θ, 6 parameters, 48 trajectories | 3 (2 to 4) | 45 (40 to 50) | 7.0% |"]
    assert list(bench.table(THETA)) == of_theta
    assert list(bench.table([*ROWS, *THETA])) == [*bench.table(ROWS), "", *of_theta]


@pytest.mark.parametrize("flags, reason", [([], "name what to measure"), (["speed"], "name what to measure"),
                                           (["update"], "update needs --drqv2"), (["update", "--table", "x"], "name what")])
def test_what_cannot_be_measured_is_named(flags, reason, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench.py", *flags])
    with pytest.raises(SystemExit):
        bench.main()
    assert reason in capsys.readouterr().err


def test_what_fails_is_named_and_what_was_measured_is_not_lost(monkeypatch, capsys, tmp_path):
    def broken(args):
        """Breaks."""
        yield ROWS[0]
        raise ModuleNotFoundError("No module named 'panda_gym'")
    monkeypatch.setitem(bench.MEASURES, "environment", broken)
    monkeypatch.setattr("sys.argv", ["bench.py", "environment", "--out", str(tmp_path / "speed.csv")])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    printed = capsys.readouterr()
    assert stop.value.code == 1 and "environment stops: No module named 'panda_gym'" in printed.err
    assert "| control steps/s, touch | 1500 | panda-gym | 1000 | 1.50 |" in printed.out and bench.read(tmp_path / "speed.csv") == ROWS[:1]
    monkeypatch.setattr("sys.argv", ["bench.py", "--table", str(tmp_path / "none.csv")])
    with pytest.raises(SystemExit, match="none.csv holds no rows of a former run"):
        bench.main()
