"""The whole loop at small size, and what a run leaves behind."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import selfalign
from envs import TASKS
from llm import LLM, Offline, Reply
from mh import preference_loss
from reward import Reward

ROOT = Path(__file__).parent.parent


@pytest.fixture
def small(monkeypatch, tmp_path):
    """small(*flags): a run of 700 steps with two updates of θ; returns its folder."""
    monkeypatch.setattr(selfalign, "UPDATE_EVERY", 300)
    monkeypatch.setattr(selfalign, "EVAL_EVERY", 200)
    monkeypatch.setattr(selfalign, "EVAL_EPISODES", 2)
    monkeypatch.setattr(selfalign, "EXPLORE_STEPS", 100)
    monkeypatch.setattr(selfalign, "RANKED", 3)
    monkeypatch.setattr(selfalign, "BATCH", {"state": 16, "pixels": 8})
    monkeypatch.setattr(selfalign, "AGENT", {"state": dict(hidden_dim=16, lr=1e-3, std=(1.0, 0.5, 500)),
                                             "pixels": dict(hidden_dim=16, std=(1.0, 0.5, 500))})
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)

    def run(*flags, steps=700):
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        monkeypatch.setattr(sys, "argv", ["selfalign.py", "--steps", str(steps), "--out", str(folder), *flags])
        selfalign.main()
        return folder
    return run


def rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("task", list(TASKS))
def test_loop_end_to_end_and_what_it_leaves(task, small, capsys):
    folder = small("--task", task)
    screen = capsys.readouterr().out
    for words in ("NOT a language model", "def reward(", "steps/s", "LLM     ", "reward  ", "Not learnt"):
        assert words in screen
    assert [int(row["step"]) for row in rows(folder / "metrics.csv")] == [200, 400, 600]
    assert json.loads((folder / "settings.json").read_text())["task"] == task
    kinds = [json.loads(line)["kind"] for line in (folder / "llm.jsonl").read_text().splitlines()]
    assert kinds[0] == "propose" and kinds.count("rank") in (1, 2)      # no update while all evaluations succeed
    theta = rows(folder / "theta.csv")
    steps = sorted({int(row["step"]) for row in theta})
    assert steps == [0, 300, 600][:1 + kinds.count("rank")]
    # The reward's file works anywhere numpy is, with the last θ as its defaults.
    namespace = {}
    exec((folder / "reward.py").read_text(), namespace)
    reward = Reward((folder / "reward.py").read_text().split("\n\n\n", 1)[1], TASKS[task].features)
    last = {row["name"]: row["value"] for row in theta if int(row["step"]) == steps[-1]}
    assert {name: f"{value:.6g}" for name, value in reward.params.items()} == last
    terms = namespace["reward"](**{name: np.array([0.1, 0.2]) for name in reward.features})
    np.testing.assert_array_equal(sum(terms.values()), reward.total({n: np.array([0.1, 0.2]) for n in reward.features}))
    state = torch.load(folder / "policy.pt", weights_only=True)
    assert set(state) == {"encoder", "actor", "critic"}


def test_same_seed_twice_gives_identical_metrics_and_another_seed_does_not(small):
    first, second, other = small("--seed", "3"), small("--seed", "3"), small("--seed", "4")
    for name in ("metrics.csv", "theta.csv", "reward.py"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert (first / "metrics.csv").read_bytes() != (other / "metrics.csv").read_bytes()


def test_replay_repeats_a_run_byte_for_byte(small, capsys):
    first = small("--task", "push")
    again = small("--task", "push", "--llm", f"replay:{first}/llm.jsonl")
    assert (first / "metrics.csv").read_bytes() == (again / "metrics.csv").read_bytes()
    assert (first / "theta.csv").read_bytes() == (again / "theta.csv").read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit, match="departed"):
        small("--task", "grasp", "--llm", f"replay:{first}/llm.jsonl")
    small("--task", "push", "--seed", "2", "--llm", f"replay:{first}/llm.jsonl")      # departs at the first ranking
    assert "departed" in capsys.readouterr().out


@pytest.mark.parametrize("reward", ["fixed", "sparse"])
def test_baselines_never_change_the_reward(reward, small):
    folder = small("--reward", reward)
    exchanges = (folder / "llm.jsonl").read_text().splitlines()
    assert len(exchanges) == (1 if reward == "fixed" else 0)
    assert {row["step"] for row in rows(folder / "theta.csv")} <= {"0"}
    assert (folder / "reward.py").exists() == (reward == "fixed")


def test_pixels_run_and_stay_finite(small):
    folder = small("--obs", "pixels", steps=300)
    for row in rows(folder / "metrics.csv"):
        assert all(np.isfinite(float(value)) and abs(float(value)) < 1e3 for name, value in row.items() if name != "step")


class Recorder:
    """What `train` does at each update of θ, seen from outside."""

    def __init__(self, monkeypatch, answer):
        self.asked, self.aligned, self.buffers = [], [], []
        real_align, real_relabel = selfalign.align, selfalign.ReplayBuffer.relabel

        def align(reward, prior, trajectories, preferences, names, rng):
            self.aligned.append((dict(prior), len(trajectories), list(preferences)))
            return real_align(reward, prior, trajectories, preferences, names, rng)

        def relabel(buffer, reward_fn):
            real_relabel(buffer, reward_fn)
            rows = np.flatnonzero(buffer.acted)
            self.buffers.append((buffer.reward[rows].copy(), buffer.features[rows].copy()))

        def ranked(llm, task, trajectories):
            self.asked.append(answer(trajectories))
            return self.asked[-1]
        monkeypatch.setattr(selfalign, "rank_attempts", ranked)
        monkeypatch.setattr(selfalign, "align", align)
        monkeypatch.setattr(selfalign.ReplayBuffer, "relabel", relabel)


def by_reward(trajectories, sign):
    """The stand-in's own reward for touch as a ranking, best first (sign 1) or worst first (sign -1)."""
    names = TASKS["touch"].features
    reward = Reward(selfalign.read_code((ROOT / "prompts" / "offline" / "touch.txt").read_text()), names)
    returns = selfalign.returns_of(reward, {}, *selfalign.columns(trajectories, names))
    return [[int(i)] for i in np.argsort(-sign * returns)]


def test_disagreement_samples_theta_from_all_rounds_and_relabels_the_buffer(small, monkeypatch):
    seen = Recorder(monkeypatch, lambda trajectories: by_reward(trajectories, -1))
    monkeypatch.setattr(selfalign, "evaluate", lambda *args: (0.0, 0.0))
    folder = small()
    causes = {row["step"]: row["cause"] for row in rows(folder / "theta.csv")}
    assert causes["0"] == "proposal" and causes["300"] == "posterior"
    prior, count, pairs = seen.aligned[0]
    assert prior["contact_threshold"] == 1.0 and count == 3 and len(pairs) == 3
    again, count, pairs = seen.aligned[1]                            # D keeps every round, the prior its centre
    assert again == prior and count == 6 and len(pairs) == 6 and max(max(pair) for pair in pairs) >= 3
    # Every stored reward is that of the new θ, shifted and scaled so that over the last half period the mean and the
    # spread stay what they were; at first random behaviour earns 0.
    names = TASKS["touch"].features
    reward = Reward(selfalign.read_code((ROOT / "prompts" / "offline" / "touch.txt").read_text()), names)
    mean, spread = -reward.total(selfalign.random_features("touch")).mean(), 1.0
    thetas = [{row["name"]: float(row["value"]) for row in rows(folder / "theta.csv") if row["step"] == step}
              for step in ("0", "300", "600")]
    for before, after, (stored, features) in zip(thetas, thetas[1:], seen.buffers):
        new, last = reward.total(dict(zip(names, features.T)), after), slice(-150, None)
        was = mean + spread * reward.total(dict(zip(names, features[last].T)), before)
        assert stored[last].mean() == pytest.approx(was.mean(), abs=1e-3)
        assert stored[last].std() == pytest.approx(was.std(), rel=1e-3)
        spread, mean = np.polyfit(new, stored, 1)
        assert spread > 0
        np.testing.assert_allclose(stored, mean + spread * new, rtol=1e-3, atol=1e-3)
    assert len(seen.buffers) == 2


def test_a_new_theta_keeps_the_level_of_rewards():
    rng = np.random.default_rng(0)
    old, new = rng.normal(5, 2, 1000), rng.normal(-300, 40, 1000)
    centre, scale = selfalign.keep_level(old, new, 4.0, 0.5)
    assert ((new - centre) / scale).mean() == pytest.approx(((old - 4) / 0.5).mean())
    assert ((new - centre) / scale).std() == pytest.approx((old / 0.5).std())
    holes = np.where(np.arange(1000) % 7 == 0, -np.inf, new)
    centre, scale = selfalign.keep_level(old, holes, 4.0, 0.5)
    assert ((new - centre) / scale)[np.isfinite(holes)].mean() == pytest.approx(((old - 4) / 0.5).mean())
    # As good as constant, before or after: only the mean can be kept. Nothing finite: nothing changes.
    flat = np.full(1000, 0.1 * 3) + 1e-15 * rng.standard_normal(1000)
    for before, after in ((old, flat), (flat, new)):
        centre, scale = selfalign.keep_level(before, after, 4.0, 0.5)
        assert scale == 0.5 and (after - centre).mean() == pytest.approx((before - 4).mean())
    assert selfalign.keep_level(old, np.full(1000, np.nan), 4.0, 0.5) == (4.0, 0.5)


def test_no_new_theta_leaves_the_buffer_alone(small, monkeypatch):
    seen = Recorder(monkeypatch, lambda trajectories: by_reward(trajectories, -1))
    monkeypatch.setattr(selfalign, "evaluate", lambda *args: (0.0, 0.0))

    def fails(*args, **kwargs):
        raise selfalign.SamplerError("nothing found")
    monkeypatch.setattr(selfalign, "sample_posterior", fails)
    assert {row["step"] for row in rows(small() / "theta.csv")} == {"0"} and not seen.buffers


def test_the_critic_sees_rewards_of_which_random_behaviour_earns_none(small, monkeypatch):
    seen = []
    real = selfalign.ReplayBuffer.add
    monkeypatch.setattr(selfalign.ReplayBuffer, "add", lambda buffer, *args: (seen.append(args), real(buffer, *args)))
    proposal = "```python\ndef reward(hand_to_block, w=1.0):\n    return {'near': 100 - w * hand_to_block}\n```"
    monkeypatch.setattr(Offline, "__call__", lambda self, messages: Reply(proposal))
    small("--reward", "fixed", steps=100)
    usual = (100 - selfalign.random_features("touch")["hand_to_block"]).mean()
    for _, _, reward, _, _, features in seen:
        assert reward == pytest.approx(100 - features[0] - usual)
    seen.clear()
    small("--reward", "sparse", steps=100)
    assert {args[2] for args in seen} <= {0.0, 1.0}


def test_agreement_asks_what_blocks_and_moves_the_prior(small, monkeypatch):
    answers = iter([1, -1])
    monkeypatch.setattr(selfalign, "evaluate", lambda *args: (0.0, 0.0))
    seen = Recorder(monkeypatch, lambda trajectories: by_reward(trajectories, next(answers)))
    monkeypatch.setattr(selfalign, "analyse_failure", lambda *args: ("too weak", {"contact_threshold": 0.25}))
    folder = small()
    theta = [(row["step"], row["cause"], row["value"]) for row in rows(folder / "theta.csv") if row["name"] == "contact_threshold"]
    assert theta[:2] == [("0", "proposal", "1"), ("300", "analysis", "0.25")] and theta[2][:2] == ("600", "posterior")
    assert seen.aligned[0][0]["contact_threshold"] == 0.25           # the prior's centre has moved


@pytest.mark.parametrize("task, feature, seen, changed", [
    ("touch", "contact_force", 0.2, {"contact_threshold": 0.06}), ("touch", "contact_force", 1.5, {"contact_weight": 4.0}),
    ("grasp", "grip_force", 0.5, {"firm_grip": 0.15}), ("grasp", "grip_force", 0.0, {"grip_weight": 2.0}),
    ("grasp", "grip_force", 3.0, {"lift_weight": 4.0}), ("push", "contact_force", 0.2, {"push_weight": 6.0})])
def test_the_stand_in_analyses_failures_of_its_own_rewards(task, feature, seen, changed):
    names = TASKS[task].features
    reward = Reward(selfalign.read_code((ROOT / "prompts" / "offline" / f"{task}.txt").read_text()), names)
    taus = [np.full((50, len(names)), 0.02) for _ in range(3)]
    for tau in taus:
        tau[:, names.index(feature)] = seen
    _, changes = selfalign.analyse_failure(LLM(Offline(), lambda exchange: None), task, reward, reward.params, taus,
                                           np.zeros(3), 0.0)
    assert changes == changed


def test_a_fist_on_the_block_is_no_grip_for_the_stand_in_and_its_reward():
    names = TASKS["grasp"].features
    reward = Reward(selfalign.read_code((ROOT / "prompts" / "offline" / "grasp.txt").read_text()), names)
    grip, fist, idle = (np.tile([{"hand_to_block": distance, "hand_height": 0.03, "gripper_opening": opening,
                                  "grip_force": force}.get(name, 0.0) for name in names], (50, 1))
                        for distance, opening, force in ((0.005, 0.042, 2.0), (0.032, 0.038, 2.0), (0.032, 0.08, 0.0)))
    assert reward.terms(dict(zip(names, fist.T)))["grip"].sum() == 0 < reward.terms(dict(zip(names, grip.T)))["grip"].sum()
    assert selfalign.rank_attempts(LLM(Offline(), lambda exchange: None), "grasp", [fist, grip, idle]) == [[1], [0, 2]]


def test_trajectories_are_shown_shuffled(small, monkeypatch):
    orders = set()
    for seed in "12345":
        seen = Recorder(monkeypatch, lambda trajectories: by_reward(trajectories, 1))
        monkeypatch.setattr(selfalign, "analyse_failure", lambda *args: ("", {"contact_weight": 2.0}))
        small("--seed", seed, steps=301)
        orders.add(str(seen.asked[0]))
    assert len(orders) > 2


def test_all_equal_is_no_disagreement(small, monkeypatch):
    Recorder(monkeypatch, lambda trajectories: [[0, 1, 2]])
    monkeypatch.setattr(selfalign, "analyse_failure", lambda *args: ("none gets on", {"contact_weight": 9.0}))
    assert {row["cause"] for row in rows(small() / "theta.csv")} == {"proposal", "analysis"}


def test_stops_at_the_first_of_two_perfect_evaluations_running(small, monkeypatch, capsys):
    results = iter([0.5, 1.0, 0.5, 1.0, 1.0, 0.0])
    monkeypatch.setattr(selfalign, "evaluate", lambda *args: (next(results), 0.0))
    folder = small(steps=1200)
    assert [row["step"] for row in rows(folder / "metrics.csv")] == ["200", "400", "600", "800", "1000"]
    assert "reached 2 of 2 at 800 environment steps, and again 200 steps later" in capsys.readouterr().out


def test_evaluation_counts_fresh_successful_episodes(monkeypatch):
    class Env:
        """Succeeds for one step in the middle of every second episode."""
        feature_names, episode = ("x",), -1

        def reset(self):
            self.episode, self.t = self.episode + 1, 0
            return np.zeros(1), {}

        def step(self, action):
            self.t += 1
            success = self.t == 3 and self.episode % 2 == 0
            return np.zeros(1), float(success), False, self.t == 5, {"success": success, "features": {"x": 2.0}}

    class Agent:
        def act(self, obs, step, explore):
            assert not explore
            return np.zeros(4)
    assert selfalign.evaluate(Agent(), Env(), None, {}) == (0.5, 0.5)
    reward = Reward("def r(x, w=1.0):\n    return {'a': w * x}", ["x"])
    assert selfalign.evaluate(Agent(), Env(), reward, {"w": 3.0}) == (0.5, 30.0)


def trajectories(rng, count=6):
    return [rng.uniform(0, 0.5, (50, len(TASKS["touch"].features))) for _ in range(count)]


def test_returns_agree_with_adding_up_steps():
    rng, names = np.random.default_rng(0), TASKS["touch"].features
    reward = Reward("def r(hand_to_block, contact_force, w=2.0):\n    return {'a': w * contact_force, 'b': -hand_to_block}",
                    names)
    taus = [tau[:length] for tau, length in zip(trajectories(rng, 3), (50, 7, 1))]
    expected = [sum(3 * f[names.index("contact_force")] - f[names.index("hand_to_block")] for f in tau) for tau in taus]
    np.testing.assert_allclose(selfalign.returns_of(reward, {"w": 3.0}, *selfalign.columns(taus, names)), expected)
    chains = selfalign.returns_of(reward, {"w": np.array([[3.0], [0.0]])}, *selfalign.columns(taus, names))
    np.testing.assert_allclose(chains[0], expected)
    assert chains.shape == (2, 3)


def test_align_corrects_the_threshold_that_the_paper_corrects():
    # Preferences for contact as it really is, 0.05 to 0.15 N, against a reward that asks for 1 N.
    rng, names = np.random.default_rng(0), TASKS["touch"].features
    reward = Reward("def r(hand_to_block, contact_force, reach=1.0, contact=2.0, threshold=1.0):\n"
                    "    return {'a': -reach * hand_to_block, 'b': contact * (contact_force > threshold)}", names)
    taus, force = trajectories(rng), names.index("contact_force")
    for i, tau in enumerate(taus):
        tau[:, force] = np.where(np.arange(50) < 9 * i, rng.uniform(0.05, 0.15, 50), 0.0)
    pairs = [(i, j) for i in range(6) for j in range(i)]
    posterior = selfalign.align(reward, reward.params, taus, pairs, names, np.random.default_rng(0))
    theta = dict(zip(reward.params, posterior.medoid))
    assert theta["threshold"] < 0.15
    columns = selfalign.columns(taus, names)
    before = preference_loss(selfalign.returns_of(reward, reward.params, *columns), pairs)
    after = preference_loss(selfalign.returns_of(reward, theta, *columns), pairs)
    assert after < 1 < before


def test_proposals_that_do_not_compile_run_or_stay_finite_go_back():
    bad = ["I would reward touching.", "```python\nimport os\n```",
           "```python\ndef reward(contact_force, w=1.0):\n    return {'log': w * np.log(contact_force)}\n```"]
    good = "```python\ndef reward(contact_force, w=1.0):\n    return {'touch': w * contact_force}\n```"
    asked, answers = [], iter([*bad, good])

    def backend(messages):
        asked.append(messages[-1]["content"])
        return Reply(next(answers))
    reward = selfalign.propose_reward(LLM(backend, lambda exchange: None), "touch", selfalign.random_features("touch"))
    assert reward.params == {"w": 1.0}
    assert "no function" in asked[1] and "function" in asked[2] and "term log" in asked[3]


def test_a_failing_llm_costs_no_training(small, monkeypatch, capsys):
    def fails_after_the_proposal(self, messages):
        if "RANKING:" in messages[0]["content"]:
            raise selfalign.LLMError("it is down; try later")
        return Reply((ROOT / "prompts" / "offline" / "touch.txt").read_text())
    monkeypatch.setattr(Offline, "__call__", fails_after_the_proposal)
    folder = small()
    assert "it is down; try later" in capsys.readouterr().out
    assert len(rows(folder / "metrics.csv")) == 3 and (folder / "policy.pt").exists()


def test_no_usable_proposal_ends_with_the_reason_and_the_transcript(small, monkeypatch):
    monkeypatch.setattr(Offline, "__call__", lambda self, messages: Reply("no"))
    with pytest.raises(SystemExit, match=r"(?s)no function in the answer.*llm\.jsonl"):
        small()


def test_a_full_disk_costs_nothing_that_was_learnt(small, monkeypatch, capsys):
    real = Path.write_bytes

    def full(self, data):
        if self.parent.name.startswith("run") and self.parent.parent != Path("/") and not self.parent.name.startswith("run0-"):
            raise OSError(28, "No space left on device")
        return real(self, data)
    monkeypatch.setattr(Path, "write_bytes", full)
    small()
    errors = capsys.readouterr().err
    assert errors.count("No space left on device") <= 7 and "free some space" in errors
    rescue = Path(errors.strip().splitlines()[-1].split(" is in ")[1].rstrip("."))
    assert len(rows(rescue / "metrics.csv")) == 3 and (rescue / "policy.pt").exists()


def test_play_repeats_a_policy_and_saves_frames(small, monkeypatch, tmp_path, capsys):
    folder = small("--reward", "fixed", steps=200)
    monkeypatch.setattr(sys, "argv", ["selfalign.py", "--play", str(folder), "--episodes", "1", "--frames",
                                      str(tmp_path / "frames")])
    try:
        import PIL  # noqa: F401
    except ImportError:
        with pytest.raises(SystemExit, match="pip install"):
            selfalign.main()
    else:
        selfalign.main()
        assert len(list((tmp_path / "frames").iterdir())) == 50
    monkeypatch.setattr(sys, "argv", ["selfalign.py", "--play", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match="no finished run"):
        selfalign.main()


@pytest.mark.parametrize("flags, words", [
    (["--task", "fly"], "touch"), (["--steps", "0"], "--steps"), (["--seed", "-1"], "--seed"), (["--device", "abacus"], "--device"),
    (["--llm", "oracle"], "replay:FILE"), (["--llm", "chat"], "--model"), (["--llm", "replay:none.jsonl"], "none.jsonl"),
    (["--out", "/proc/nowhere"], "--out"), (["--out", str(ROOT)], "not empty")])
def test_wrong_flags_get_one_clear_error(flags, words, small, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["selfalign.py", *(["--out", str(tmp_path / "x")] if "--out" not in flags else []), *flags])
    with pytest.raises(SystemExit) as stop:
        selfalign.main()
    assert words in (str(stop.value) + capsys.readouterr().err)


@pytest.mark.parametrize("module, use", [
    ("mh", "p = sample_posterior(lambda t: -t[:, 0], [1.0], burn_in=50, steps=50); assert p.medoid.shape == (1,)"),
    ("drqv2", "a = DrQV2((3,), (1,), hidden_dim=8); b = ReplayBuffer(9, (3,), (1,)); b.begin([0, 0, 0]); "
              "b.add([0], [0, 0, 0], 1.0, False, True); a.update(b.sample(4), 0)"),
    ("envs", "e = PandaEnv('touch'); e.reset(seed=0); e.step([0, 0, 0, 0]); e.close()"),
    ("reward", "Reward('def r(x, w=1.0): return {\"a\": w * x}', ['x']).total({'x': 1.0})")])
def test_modules_work_alone_in_an_empty_folder(module, use, tmp_path):
    (tmp_path / f"{module}.py").write_text((ROOT / f"{module}.py").read_text())
    done = subprocess.run([sys.executable, "-c", f"from {module} import *; {use}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_key_is_nowhere(small, monkeypatch, capsys):
    from test_llm import KEY, Server, completion, http
    proposal = (ROOT / "prompts" / "offline" / "touch.txt").read_text()
    refused = http(json.dumps({"error": {"message": f"{'x' * 175} {KEY} is not valid"}}), "401 Unauthorized")
    server = Server(completion(f"{KEY}\n{proposal}"), completion(f"RANKING: {KEY}"), http(f"<html>{KEY}</html>"), refused)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url.replace("//", "//user:secret-password@"))
    folder = small("--model", "some-model")
    printed = capsys.readouterr()
    assert len(server.requests) >= 4 and "[key]" in (folder / "llm.jsonl").read_text() and "[key]" in printed.out
    for secret in (KEY, KEY[:12], "secret-password"):
        assert secret not in printed.out + printed.err
        assert all(secret.encode() not in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert len(rows(folder / "metrics.csv")) == 3                    # and nothing was lost
