"""The command line: what flags mean, how a run begins and ends, and what is shown of a policy."""

import importlib.util
import json
import re
import signal
import socket
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import cli
from drqv2 import DrQV2, ReplayBuffer
from envs import TASKS, Space
from llm import LLM, LLMError, Reply
from run import Run

SMALL = {"state": dict(hidden_dim=8)}


@pytest.fixture
def parse(monkeypatch):
    """parse(*flags): the arguments that they make, whatever the environment says."""
    monkeypatch.setattr(cli, "DEFAULTS", {**cli.DEFAULTS, "model": None})

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["selfalign.py", *flags])
        return cli.parse_args("What it does.")
    return run


def test_defaults_are_those_that_the_help_names(parse, capsys):
    args = parse()
    assert vars(args) == dict(task="touch", reward="selfalign", obs="state", precision="float32", seed=1, steps=60_000, device="cpu", llm="auto",
                              model=None, proposal=None, out=None, resume=None, play=None, gif=None, frames=None, episodes=5,
                              given={})
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "What it does." in text
    helps = dict(re.findall(r"^  --(\w+) (.*?)(?=^  --|\Z)", text, re.DOTALL | re.MULTILINE))
    helps = {name: " ".join(words.split()) for name, words in helps.items()}
    assert set(helps) == set(vars(args)) - {"given"}
    for name in ("task", "obs", "precision", "seed", "steps", "episodes"):
        assert f"default: {getattr(args, name)}" in helps[name]
    for name, words in (("reward", "the whole algorithm (default)"), ("device", "cpu (default)"), ("llm", "auto (default)")):
        assert words in helps[name]


def test_the_environment_may_name_the_model(monkeypatch):
    monkeypatch.setenv("OPENAI_MODEL", "some-model")
    spec = importlib.util.spec_from_file_location("cli_again", cli.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert again.DEFAULTS["model"] == "some-model"


def test_every_flag_arrives_with_its_value_and_is_known_to_be_given(parse):
    flags = dict(task="push", reward="fixed", obs="pixels", precision="bfloat16", seed=7, steps=900, device="cpu", llm="manual", model="m",
                 proposal="p.py", out="x")
    args = parse(*(f"--{name}={value}" for name, value in flags.items()))
    assert args.given == flags and {name: getattr(args, name) for name in flags} == flags
    args = parse("--play", "run", "--gif", "a.gif", "--frames", "f", "--episodes", "2")
    assert (args.play, args.gif, args.frames, args.episodes) == ("run", "a.gif", "f", 2) and args.task == "touch"
    args = parse("--resume", "run", "--steps", "9", "--device", "cpu", "--llm", "offline", "--model", "m")
    assert args.given == dict(resume="run", steps=9, device="cpu", llm="offline", model="m")


def test_flags_that_do_nothing_beside_others_are_refused_in_one_line(parse, capsys):
    values = dict(task="push", reward="fixed", obs="state", precision="float32", seed="1", steps="9", device="cpu", llm="offline", model="m",
                  proposal="p", out="o", resume="r", play="p", gif="g.gif", frames="f", episodes="1")
    for mode, useful in (("play", {"gif", "frames", "episodes"}), ("resume", {"steps", "device", "llm", "model"})):
        for name in set(values) - {mode}:
            flags = f"--{mode}", "run", f"--{name}", values[name]
            if name in useful:
                parse(*flags)
                continue
            with pytest.raises(SystemExit) as stop:
                parse(*flags)
            said = capsys.readouterr().err.splitlines()[-1]
            assert stop.value.code == 2
            assert f"--{name} does nothing beside --{mode}" in said or f"--{mode} does nothing beside --{name}" in said
    for name in ("gif", "frames", "episodes"):
        with pytest.raises(SystemExit):
            parse(f"--{name}", values[name])
        assert f"--{name} does nothing without --play RUN" in capsys.readouterr().err
    for name in ("proposal", "llm", "model"):
        with pytest.raises(SystemExit):
            parse("--reward", "sparse", f"--{name}", values[name])
        assert "--reward sparse has no R_θ and asks no LLM" in capsys.readouterr().err
        parse("--reward", "fixed", f"--{name}", values[name])
    with pytest.raises(SystemExit):
        parse("--precision", "bfloat16")
    assert "--obs state has none" in capsys.readouterr().err


def test_names_that_are_empty_are_refused(parse, capsys):
    for name in ("out", "resume", "play", "proposal", "model", "gif", "frames"):
        with pytest.raises(SystemExit):
            parse(*(["--play", "run"] if name in ("gif", "frames") else []), f"--{name}", "")
        assert f"--{name} is empty" in capsys.readouterr().err


class Refused(Exception):
    pass


def checked(**values):
    """Why cli.check refuses these settings; None if it does not."""
    def fail(reason):
        raise Refused(reason)
    try:
        cli.check(SimpleNamespace(**{**cli.DEFAULTS, "model": None, **values}), fail)
    except Refused as reason:
        return str(reason)


@pytest.mark.parametrize("name, good, bad", [
    ("seed", (0, 2 ** 63 - 1), (-1, 2 ** 63)), ("steps", (1, 10 ** 8), (0, -5, 10 ** 8 + 1)), ("episodes", (1, 1000), (0, -1)),
    ("task", tuple(TASKS), ("fly", "")), ("reward", ("selfalign", "rewrite", "fixed", "sparse"), ("dense",)),
    ("obs", ("state", "pixels"), ("sound",)), ("precision", ("float32", "bfloat16"), ("float16", None)),
    ("llm", ("auto", "replay:x"), (None, 5)), ("model", (None, "", "m"), (5,)), ("proposal", (None, "", "p.py"), (5, ["p"])),
    ("device", ("cpu",), ("abacus", "meta", "cuda:99", "hpu", "cpu\n", 3))])
def test_what_settings_may_be(name, good, bad, monkeypatch):
    monkeypatch.setattr(cli.os, "sysconf", lambda name: 2 ** 40)               # memory without end
    for value in good:
        assert checked(**{name: value}) is None, value
    for value in bad:
        reason = checked(**{name: value})
        assert reason and "\n" not in reason, value
        if name in ("seed", "steps", "episodes", "device") and value != 3:
            assert f"--{name}" in reason
        elif name in ("task", "reward", "obs", "precision"):
            assert f"{value!r}" in reason


@pytest.mark.parametrize("obs, shape, kind, most", [
    ("state", (24,), np.float32, 1_342_177), ("pixels", (9, 84, 84), np.uint8, 25_362)])
def test_steps_that_do_not_fit_into_memory_are_refused(obs, shape, kind, most, monkeypatch):
    memory = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2 ** 18}                  # 1 GB
    monkeypatch.setattr(cli.os, "sysconf", memory.get)
    assert checked(obs=obs, steps=most) is None
    said = f"--steps {most + 1} needs 1 GB of memory for what is lived, and this machine has 1"
    assert checked(obs=obs, steps=most + 1) == said
    assert "needs 3 GB" in checked(obs=obs, steps=3 * most)
    monkeypatch.delattr(cli.os, "sysconf")                                     # where nobody knows, as on Windows
    assert checked(obs=obs, steps=10 ** 8) is None
    # It is what the buffer of so many steps takes, and not much more.
    buffer = ReplayBuffer(2 * 100, shape, (4,), n_features=10, obs_dtype=kind, frame_stack=3 if obs == "pixels" else 1)
    taken = sum(value.nbytes for value in vars(buffer).values() if isinstance(value, np.ndarray)) / 100
    assert taken / 1.05 < 2 ** 30 / most < 2.5 * taken


@pytest.mark.parametrize("settings, precision", [({}, torch.float32), ({"precision": "bfloat16"}, torch.bfloat16)])
def test_a_policy_is_played_in_the_precision_it_has_learnt_in(settings, precision, tmp_path):
    agents = {"pixels": {"hidden_dim": 8}}
    torch.save(DrQV2((9, 84, 84), (4,), **agents["pixels"]).greedy.state_dict(), tmp_path / "policy.pt")
    (tmp_path / "settings.json").write_text(json.dumps({"task": "push", "obs": "pixels", **settings}))
    env, agent = cli.load_policy(tmp_path, agents)
    env.close()
    assert agent.greedy[0].precision == precision


@pytest.fixture
def begin(parse, monkeypatch, tmp_path):
    """begin(*flags): cli.start in an empty folder; returns (run, llm). What it changes in the process is put back."""
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads, runs = torch.get_num_threads(), []

    def run(*flags):
        begun, llm = cli.start(parse(*flags))
        runs.append(begun)
        return begun, llm
    yield run
    for begun in runs:
        begun.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)


def settings_of(folder):
    return json.loads((folder / "settings.json").read_text())


def test_a_run_says_what_it_is_and_keeps_its_settings(begin, capsys):
    run, llm = begin("--task", "grasp", "--seed", "3", "--steps", "900")
    assert capsys.readouterr().out == (
        f"Task: grasp. {TASKS['grasp'].goal}\n"
        "Reward: selfalign, observations: state, seed 3. Everything is kept in runs/grasp-selfalign-3.\n"
        "LLM: offline stand-in (OPENAI_API_KEY and OPENAI_BASE_URL are not set): scripted answers, NOT a language model\n")
    assert settings_of(run.folder) == dict(task="grasp", reward="selfalign", obs="state", precision="float32", seed=3, steps=900, device="cpu",
                                           llm="offline", model=None, proposal=None, out=None)
    # What is asked is answered and recorded.
    question = "Task: grasp\nRANKING:"
    answer = llm.ask("rank", question, str)
    recorded = json.loads((run.folder / "llm.jsonl").read_text())
    assert answer.startswith("Scripted preferences") and (recorded["prompt"], recorded["reply"]) == (question, answer)


def test_folders_are_numbered_where_there_is_one_already(begin):
    flags = "--reward", "fixed", "--seed", "4"
    folders = [str(begin(*flags)[0].folder) for _ in range(3)]
    assert folders == ["runs/touch-fixed-4", "runs/touch-fixed-4-2", "runs/touch-fixed-4-3"]
    assert str(begin("--out", "a/b", *flags)[0].folder) == "a/b"
    with pytest.raises(SystemExit, match="a/b is not empty"):
        begin("--out", "a/b", *flags)


@pytest.mark.parametrize("flags, who, kept", [
    (["--reward", "sparse"], "none is asked", "auto"), (["--reward", "fixed", "--proposal", "p"], "none is asked", "auto"),
    (["--reward", "fixed"], "offline stand-in", "offline"), (["--proposal", "p"], "offline stand-in", "offline"),
    (["--llm", "manual", "--reward", "rewrite"], "you: paste", "manual"), (["--llm", "chat", "--model", "m"], "m at http://127.0.0.1:9/v1", "chat"),
    (["--model", "m"], "m at http://127.0.0.1:9/v1", "chat")])
def test_who_is_asked_is_said_and_kept(flags, who, kept, begin, monkeypatch, capsys):
    if "--model" in flags:
        monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    run, _ = begin(*flags)
    assert capsys.readouterr().out.splitlines()[2].startswith(f"LLM: {who}") and settings_of(run.folder)["llm"] == kept


def test_an_llm_that_cannot_be_used_is_said_before_there_is_a_folder(begin, tmp_path):
    for kind, words in (("oracle", "selfalign: unknown --llm oracle"), ("chat", "selfalign: .*--model")):
        with pytest.raises(SystemExit, match=words):
            begin("--llm", kind)
    with pytest.raises(SystemExit, match="--reward rewrite needs a language model.*OPENAI_API_KEY"):
        begin("--reward", "rewrite")
    assert not list(tmp_path.iterdir())


def test_a_run_goes_on_with_its_settings_and_those_that_are_given(begin, capsys):
    first, _ = begin("--task", "push", "--seed", "5", "--steps", "700", "--llm", "manual", "--reward", "fixed")
    first.close()
    settings = settings_of(first.folder)
    assert settings["llm"] == "manual"
    capsys.readouterr()
    run, _ = begin("--resume", str(first.folder), "--steps", "800")
    said = capsys.readouterr().out
    assert "Task: push." in said and "Reward: fixed, observations: state, seed 5." in said and "LLM: you" in said
    assert run.folder == first.folder and run.steps == 800 and settings_of(run.folder) == {**settings, "steps": 800}
    run.close()
    begin("--resume", str(first.folder), "--llm", "offline")[0].close()
    assert settings_of(run.folder)["llm"] == "offline" and settings_of(run.folder)["steps"] == 800
    (run.folder / "settings.json").write_text(json.dumps({**settings_of(run.folder), "device": "abacus"}))
    with pytest.raises(SystemExit, match=f"{first.folder} cannot go on: --device 'abacus' cannot be used"):
        begin("--resume", str(first.folder))


def test_a_run_that_goes_on_asks_nothing_twice(begin, tmp_path):
    first, llm = begin("--llm", "offline")
    llm.ask("rank", "Task: touch\nRANKING:", str)
    first.close()
    lines = (first.folder / "llm.jsonl").read_text()
    (first.folder / "llm.jsonl").write_text(lines.replace("Scripted", "Remembered"))
    run, llm = begin("--resume", str(first.folder))
    assert llm.ask("rank", "Task: touch\nRANKING:", str).startswith("Remembered preferences")
    # A transcript is its own memory, and is read from where the run stands.
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"prompt": text, "reply": f"to {text}"}) + "\n" for text in "abc"))
    first, llm = begin("--llm", f"replay:{tmp_path}/t.jsonl", "--out", "replayed")
    assert [llm.ask("rank", text, str) for text in "ab"] == ["to a", "to b"]
    first.close()
    run, llm = begin("--resume", "replayed")
    assert [llm.ask("rank", text, str) for text in "abc"] == ["to a", "to b", "to c"]


def test_a_run_that_is_finished_is_left_as_it_is(begin, monkeypatch, capsys):
    first, _ = begin("--steps", "700")
    first.close()
    monkeypatch.setattr(Run, "finished", lambda run, steps: None if steps > 700 else f"it has had its {steps} steps")
    begin("--resume", str(first.folder), "--steps", "701")[0].close()
    (first.folder / "episodes.npz").touch()
    before = {path.name: path.read_bytes() for path in first.folder.iterdir()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        begin("--resume", str(first.folder), "--steps", "700")
    assert not stop.value.code and capsys.readouterr().out == f"{first.folder} is finished: it has had its 700 steps\n"
    assert {path.name: path.read_bytes() for path in first.folder.iterdir()} == before

    (first.folder / "episodes.npz").unlink()               # `train` writes it, and asks nobody
    monkeypatch.setattr(Run, "finished", lambda run, steps: "the skill was learnt")
    monkeypatch.setattr(cli, "choose_backend", None)
    run, llm = begin("--resume", str(first.folder))
    assert run.folder == first.folder and llm.exchanges == 0
    run.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_to_stop_and_the_second_stops(number, begin, capsys):
    run, _ = begin("--reward", "sparse")
    assert not run.stopping
    capsys.readouterr()
    signal.raise_signal(number)
    assert run.stopping
    said = "\nStopping at the end of this episode. Once more stops at once, back at the last checkpoint.\n"
    assert capsys.readouterr().out == said
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)


@pytest.mark.parametrize("obs, threads", [("state", 1), ("pixels", 2)])
def test_small_networks_take_one_thread(obs, threads, begin):
    torch.set_num_threads(2)
    begin("--obs", obs, "--reward", "sparse", "--steps", "9")
    assert torch.get_num_threads() == threads


def answered(count, tokens=(0, 0)):
    """An LLM that has been asked `count` questions."""
    llm = LLM(lambda messages: Reply("yes", *tokens), lambda exchange: None)
    for _ in range(count):
        llm.ask("rank", "which?", str)
    llm.seconds = 3.4
    return llm


@pytest.mark.parametrize("count, tokens, line", [
    (0, (0, 0), ""), (1, (0, 0), "LLM: 1 exchange.\n"), (2, (0, 0), "LLM: 2 exchanges.\n"),
    (2, (1000, 20), "LLM: 2 exchanges, 2,000 + 40 tokens, 3 s.\n")])
def test_a_run_ends_with_what_was_asked_and_how_to_watch_it(count, tokens, line, begin, capsys):
    run, _ = begin("--out", "mine")
    capsys.readouterr()
    with cli.ending(run, answered(count, tokens)):
        pass
    assert capsys.readouterr().out == line
    again, _ = begin("--resume", "mine")                              # another process may have the folder now
    (again.folder / "policy.pt").write_bytes(b"")
    capsys.readouterr()
    with cli.ending(again, answered(0)):
        pass
    assert capsys.readouterr().out == "Watch it:  python selfalign.py --play mine\n"


@pytest.mark.parametrize("error, count, message", [
    (LLMError("it is down"), 0, "it is down"), (LLMError("it is down"), 1, "it is down\nEvery exchange is in mine/llm.jsonl."),
    (FloatingPointError("no longer numbers"), 1, "no longer numbers. The last checkpoint, from before, is kept. "
     "A reward of smaller numbers is the cure: --proposal FILE.")])
def test_a_run_that_fails_exits_with_the_reason(error, count, message, begin):
    run, _ = begin("--out", "mine")
    with pytest.raises(SystemExit) as stop, cli.ending(run, answered(count)):
        raise error
    assert stop.value.code == f"\nselfalign: {message}"
    Run("mine", None).close()


def test_a_run_that_is_stopped_says_how_to_go_on_and_errors_of_the_program_are_not_hidden(begin, capsys):
    run, _ = begin("--out", "mine")
    capsys.readouterr()
    with cli.ending(run, answered(1)):
        raise KeyboardInterrupt
    assert capsys.readouterr().out == "\nStopped. Go on:  python selfalign.py --resume mine\nLLM: 1 exchange.\n"
    run, _ = begin("--resume", "mine")
    with pytest.raises(ZeroDivisionError), cli.ending(run, answered(0)):
        1 / 0


def test_signals_do_after_a_run_what_they_do_without_one(begin):
    run, _ = begin()
    ours = signal.getsignal(signal.SIGINT)
    with cli.ending(run, answered(0)):
        assert signal.getsignal(signal.SIGTERM) == ours != signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("display, address", [
    (":0", "/tmp/.X11-unix/X0"), (":3.1", "/tmp/.X11-unix/X3"), ("unix:12", "/tmp/.X11-unix/X12"),
    ("127.0.0.1:2.0", ("127.0.0.1", 6002)), ("host:0", ("host", 6000))])
@pytest.mark.parametrize("there", [True, False])
def test_the_display_that_is_named_is_asked_whether_it_is_there(display, address, there, monkeypatch):
    asked = []

    class Socket:
        def __init__(self, family, kind):
            asked.append((family, kind))

        def settimeout(self, seconds):
            assert 0 < seconds < 10                                   # one that hangs is not waited for

        def connect(self, where):
            asked.append(where)
            if not there:
                raise ConnectionRefusedError

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass
    monkeypatch.setattr(cli.socket, "socket", Socket)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("DISPLAY", display)
    assert cli.display_answers() is there
    assert asked == [(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET, socket.SOCK_STREAM), address]
    monkeypatch.setattr(sys, "platform", "darwin")                    # there is a window without X
    assert cli.display_answers() is True and len(asked) == 2


@pytest.mark.parametrize("display", ["", "no display", "127.0.0.1:", "127.0.0.1:99999999", "127.0.0.1:-7000", "\udcff:1", ":0/" + 200 * "x"])
def test_what_names_no_display_is_none(display, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("DISPLAY", display)
    assert cli.display_answers() is False


class Stage:
    """Looks like a PandaEnv whose episodes last 5 steps; those of even seeds succeed."""

    observation_space, action_space = Space(-10.0, 10.0, (24,), np.float32), Space(-1.0, 1.0, (4,), np.float32)
    made = []

    def __init__(self, task, obs, render_mode):
        self.what, self.seeds, self.actions, self.closed, self.t = (task, obs, render_mode), [], [], False, 0
        self.task, self.obs = task, obs
        Stage.made.append(self)

    def reset(self, seed):
        self.t = 0
        self.seeds.append(seed)
        return np.full(24, 0.1, np.float32), {}

    def step(self, action):
        self.t += 1
        self.actions.append(action.tolist())
        # Observations repeat, so that a policy without exploration repeats itself; success is that of the last step.
        return np.full(24, 0.1, np.float32), 0.0, False, self.t == 5, {"success": self.t == 5 and self.seeds[-1] % 2 == 0}

    def render(self):
        return np.full((480, 480, 3), 40 * self.t + 10 * self.seeds[-1], np.uint8)

    def close(self):
        self.closed = True


@pytest.fixture
def stage(monkeypatch, tmp_path):
    """A folder with a small policy, which cli.play shows on a Stage."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps({"task": "push", "obs": "state"}))
    torch.manual_seed(0)
    agent = DrQV2((24,), (4,), **SMALL["state"])
    torch.save(agent.greedy.state_dict(), folder / "policy.pt")
    monkeypatch.setattr(cli, "PandaEnv", Stage)
    monkeypatch.setattr(Stage, "made", [])
    return str(folder)


def test_a_policy_is_watched_in_a_window_without_exploration(stage, monkeypatch, capsys):
    monkeypatch.setattr(cli, "display_answers", lambda: True)
    cli.play(stage, SMALL, 3)
    assert capsys.readouterr().out == "episode 0: success\nepisode 1: no success\nepisode 2: success\n"
    *others, window = Stage.made
    assert window.what == ("push", "state", "human") and window.seeds == [0, 1, 2] and len(window.actions) == 15
    assert all(env.closed for env in Stage.made) and not any(env.seeds for env in others)
    assert all(action == window.actions[0] for action in window.actions)
    agent = DrQV2((24,), (4,), **SMALL["state"])
    agent.greedy.load_state_dict(torch.load(f"{stage}/policy.pt", weights_only=True))
    assert window.actions[0] == agent.act(np.full(24, 0.1, np.float32), 0, explore=False).tolist()


def test_without_a_display_pictures_are_offered(stage, monkeypatch):
    monkeypatch.setattr(cli, "display_answers", lambda: False)
    with pytest.raises(SystemExit, match="no display to open a window on: add --gif FILE or --frames FOLDER"):
        cli.play(stage, SMALL, 1)


def test_pictures_are_those_of_every_step_and_a_gif_of_every_second(stage, tmp_path, monkeypatch):
    Image = pytest.importorskip("PIL.Image")
    monkeypatch.setattr(cli, "display_answers", lambda: pytest.fail("pictures need no display"))
    cli.play(stage, SMALL, 2, str(tmp_path / "new" / "frames"), str(tmp_path / "a.gif"))
    assert [env.what[2] for env in Stage.made] == ["rgb_array"] and Stage.made[0].closed
    names = [f"episode{episode}-0{t}.png" for episode in range(2) for t in range(5)]
    assert sorted(path.name for path in (tmp_path / "new" / "frames").iterdir()) == names
    for episode, t in ((0, 0), (0, 4), (1, 2)):                       # each as it is before the step
        with Image.open(tmp_path / "new" / "frames" / f"episode{episode}-0{t}.png") as picture:
            assert picture.size == (480, 480) and picture.convert("RGB").getpixel((7, 7)) == (40 * t + 10 * episode,) * 3
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 5 and gif.size == (240, 240) and gif.info["loop"] == 0
        for frame, brightness in enumerate((0, 80, 160, 50, 130)):
            gif.seek(frame)
            assert gif.info["duration"] == 100                        # ms: two steps
            assert abs(gif.convert("RGB").getpixel((7, 7))[0] - brightness) < 5
    cli.play(stage, SMALL, 1, gif=str(tmp_path / "folder" / "b.gif"))             # alone, and into a new folder
    cli.play(stage, SMALL, 1, frames=str(tmp_path / "folder"))                    # and into one that is there
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["b.gif", *names[:5]]


def test_a_gif_that_is_stopped_shows_what_there_was(stage, tmp_path, monkeypatch, capsys):
    Image = pytest.importorskip("PIL.Image")
    real = Stage.step

    def step(env, action):
        if env.seeds == [0, 1] and env.t == 3:
            raise KeyboardInterrupt
        return real(env, action)
    monkeypatch.setattr(Stage, "step", step)
    cli.play(stage, SMALL, 9, gif=str(tmp_path / "a.gif"))
    assert capsys.readouterr().out == "episode 0: success\nStopped.\n" and Stage.made[0].closed
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 5                                      # nine pictures, every second of them


def test_what_keeps_pictures_from_being_saved_is_said(stage, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "PIL", None)
        with pytest.raises(SystemExit, match=r'saving pictures needs Pillow: pip install "\.\[study\]"'):
            cli.play(stage, SMALL, 1, gif=str(tmp_path / "a.gif"))
    pytest.importorskip("PIL")
    (tmp_path / "b.gif").mkdir()
    with pytest.raises(SystemExit, match="cannot write .*b.gif: Is a directory; choose another place"):
        cli.play(stage, SMALL, 1, gif=str(tmp_path / "b.gif"))
