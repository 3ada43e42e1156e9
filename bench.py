"""How fast this is beside what people use: the README's table, and its rows as results/speed.csv.

    pip install -e ".[bench]"
    python bench.py environment sampler learning                         # panda-gym, emcee, Stable-Baselines3
    python bench.py theta                                                # what an update of θ costs, beside its period
    python bench.py profile                                              # where the time of updates and control steps goes
    python bench.py update sampler --drqv2 ../drqv2 --aprel ../aprel     # clones of the authors' code and of APReL
    python bench.py --table results/speed.csv                            # the table of rows measured before

Ours and the peer take turns; a row is one turn of each. Nothing else should run meanwhile.
"""

import argparse
import contextlib
import cProfile
import csv
import importlib.util
import io
import pstats
import sys
import tempfile
import time
import types
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import selfalign
from cli import keep_memory, second_core
from drqv2 import DrQV2
from envs import TASKS, PandaEnv
from llm import LLM, read_code
from mh import MAX_RHAT, MIN_ESS, PRIOR_STD, effective_sample_size, preference_loss, sample_posterior, split_rhat
from questions import rank_attempts
from reward import Reward, RTheta
from run import Run
from standin import StandIn

UPDATE_OF_THETA = "update of θ"          # of what is not beside a peer, but beside the training it interrupts
REPLIES = Path(__file__).parent / "tests" / "replies"


def environment(args):
    """Control steps per second with random actions; each task beside the one of panda-gym that is most like it.

    The physics in one differs: 12 substeps of 4.2 ms in ours, 20 of 2 ms in panda-gym's.
    """
    import gymnasium
    import panda_gym  # noqa: F401, it registers its environments

    def speed(env, steps=1000):
        rng = np.random.default_rng(0)
        env.reset(seed=0)
        started = time.perf_counter()
        for _ in range(steps):
            _, _, terminated, truncated, _ = env.step(rng.uniform(-1, 1, env.action_space.shape).astype(np.float32))
            if terminated or truncated:
                env.reset()
        return steps / (time.perf_counter() - started)

    for task, name in (("touch", "PandaReach-v3"), ("push", "PandaPush-v3"), ("grasp", "PandaPickAndPlace-v3")):
        ours, theirs = PandaEnv(task), gymnasium.make(name, disable_env_checker=True)
        for _ in range(args.rounds):
            yield f"control steps/s, {task}", f"panda-gym, {name}", speed(ours), speed(theirs)


def update(args):
    """Updates per second from pixels, DrQ-v2 as published (batch 256, 1024 hidden units), beside the authors' code."""
    sys.path.append(args.drqv2)                            # for its own utils
    spec = importlib.util.spec_from_file_location("authors", Path(args.drqv2) / "drqv2.py")
    authors = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(authors)
    rng, images = np.random.default_rng(0), (256, 9, 84, 84)
    batch = (rng.integers(256, size=images, dtype=np.uint8), rng.uniform(-1, 1, (256, 4)).astype(np.float32),
             rng.standard_normal((256, 1)).astype(np.float32), np.full((256, 1), 0.97, np.float32),
             rng.integers(256, size=images, dtype=np.uint8))
    ours = DrQV2(images[1:], (4,), args.device)
    theirs = authors.DrQV2Agent(
        images[1:], (4,), args.device, lr=1e-4, feature_dim=50, hidden_dim=1024, critic_target_tau=0.01, num_expl_steps=0,
        update_every_steps=1, stddev_schedule="linear(1.0,0.1,50000)", stddev_clip=0.3, use_tb=False)
    flat = batch[0], batch[1], batch[2][:, 0], batch[3][:, 0], batch[4]

    def speed(step, times=2 if args.device == "cpu" else 20):
        started = time.perf_counter()
        for _ in range(times):
            step()
        if args.device != "cpu":                           # theirs does not wait for the GPU
            torch.cuda.synchronize()
        return times / (time.perf_counter() - started)

    for turn in range(1 + args.rounds):                    # the first one warms up
        speeds = speed(lambda: ours.update(flat, 0)), speed(lambda: theirs.update(iter([batch]), 0))
        if turn:
            yield f"pixel updates/s, {args.device}", "the authors' drqv2", *speeds


def profile(args):
    """Milliseconds of one update and of one control step, on one thread, and where they go; no peer, and no rows."""
    torch.set_num_threads(1)                               # as our command line from states
    keep_memory()
    rng = np.random.default_rng(0)

    def timed(name, step, times, parts):
        for _ in range(3):
            step()
        started = time.perf_counter()
        for _ in range(times):
            step()
        milliseconds, parts = 1000 * (time.perf_counter() - started) / times, parts(step)
        total = sum(parts.values())
        most = sorted(parts, key=parts.get, reverse=True)[:6]
        print(f"    {name}: {milliseconds:.2f} ms: " + ", ".join(f"{part} {parts[part] / total:.0%}" for part in most), flush=True)

    def operations(step):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            for _ in range(5):
                step()
        return {event.key.removeprefix("aten::"): event.self_cpu_time_total for event in profiler.key_averages()}

    def functions(step):
        with cProfile.Profile() as profiler:
            for _ in range(400):
                step()
        seconds = Counter()
        for (_, _, name), (_, _, own, *_) in pstats.Stats(profiler).stats.items():
            seconds[name] += own
        return seconds

    for obs, shape, usual in (("state", (24,), selfalign.BATCH["state"]), ("pixels", (9, 84, 84), selfalign.BATCH["pixels"]),
                              ("pixels", (9, 84, 84), 256)):
        images = rng.integers(256, size=(2, usual, *shape), dtype=np.uint8)
        seen, then = images if obs == "pixels" else images.astype(np.float32) / 256
        batch = (seen, rng.uniform(-1, 1, (usual, 4)).astype(np.float32), rng.standard_normal(usual), np.full(usual, 0.97), then)
        agent = DrQV2(shape, (4,), **(selfalign.AGENT[obs] if usual == selfalign.BATCH[obs] else {}))
        timed(f"update, {obs}, batch {usual}, {agent.actor.policy[0].out_features} hidden units", lambda: agent.update(batch, 0),
              200 if obs == "state" else 5, operations)
    for obs in ("state", "pixels"):
        env = PandaEnv("push", obs)
        env.reset(seed=0)

        def step():
            if env.step(rng.uniform(-1, 1, 4))[3]:
                env.reset()
        timed(f"control step, push, {obs}", step, 600, functions)
    yield from ()


def touch_reward(number):
    return Reward(read_code((REPLIES / f"propose-touch-{number}.md").read_text(encoding="utf-8")), TASKS["touch"].features)


def rankings(reward, count):
    """D: so many rankings of K attempts at touch, from random to straight towards the block, by other numbers than the reward's."""
    env, rng, attempts = PandaEnv("touch"), np.random.default_rng(0), []
    for number in range(count * selfalign.RANKED):
        obs, info = env.reset(seed=number)
        rows, over = [], False
        while not over:
            aim = np.clip(2 * obs[3:6], -1, 1) * (number % selfalign.RANKED) / selfalign.RANKED
            obs, _, _, over, info = env.step(np.append(aim, 0.0) + 0.5 * rng.standard_normal(4))
            rows.append(list(info["features"].values()))
        attempts.append(np.array(rows))
    truth = np.array(list(reward.params.values())) * np.exp(rng.standard_normal(len(reward.params)))
    R = reward.returns(attempts)(dict(zip(reward.params, truth))).reshape(count, -1)
    return [(attempts[i * selfalign.RANKED:(i + 1) * selfalign.RANKED], selfalign.pairs_of([[j] for j in np.argsort(-R[i])]))
            for i in range(count)]


def sampler(args):
    """Effective samples per second, from the start to a mixed posterior of 9 parameters, given 48 ranked trajectories."""
    import emcee
    reward = touch_reward(2)
    (T, pairs), = rankings(reward, 1)
    R, centre = reward.returns(T), np.array(list(reward.params.values()))

    def log_likelihood(theta):
        return -preference_loss(R({name: theta[:, i:i + 1] for i, name in enumerate(reward.params)}), pairs, 2 / len(T))

    def density(z):
        return log_likelihood(centre * np.exp(PRIOR_STD * z)) - 0.5 * (z ** 2).sum(axis=-1)

    def mixed(z):
        return split_rhat(z).max() < MAX_RHAT and effective_sample_size(z).min() > MIN_ESS

    def ours(seed):
        return np.log(sample_posterior(log_likelihood, centre, rng=np.random.default_rng(seed)).samples / centre) / PRIOR_STD

    def with_emcee(seed, walkers=32, steps=1_000):
        np.random.seed(seed)
        chain = emcee.EnsembleSampler(walkers, len(centre), density, vectorize=True)
        z, at = None, np.random.standard_normal((walkers, len(centre)))
        while z is None or not mixed(z) and chain.iteration < 16_000:
            at = chain.run_mcmc(at, max(steps, chain.iteration))
            z = chain.get_chain(discard=chain.iteration // 2).transpose(1, 0, 2)
        return z

    def with_aprel(seed, chains=4, steps=1_000):
        import aprel.learning.belief_models as belief
        np.random.seed(seed)
        user = types.SimpleNamespace(loglikelihood_dataset=lambda _: density(user.params["z"][None])[0], copy=lambda: user)
        z = np.random.standard_normal((chains, 1, len(centre)))
        while z.shape[1] < steps or not mixed(z[:, z.shape[1] // 2:]) and z.shape[1] < 32_000:
            more = [belief.SamplingBasedBelief(user, [], {"z": chain[-1]}, logprior=lambda _: 0.0, burnin=0, thin=1,
                                               num_samples=max(steps, z.shape[1])).samples for chain in z]
            z = np.concatenate([z, [[draw["z"] for draw in chain] for chain in more]], axis=1)
        return z[:, z.shape[1] // 2:]

    peers = {"emcee, 32 walkers": with_emcee}
    if args.aprel:
        sys.path.append(args.aprel)
        for name in ("gym", "moviepy", "moviepy.editor"):  # for its environments and videos, which no sampler needs
            sys.modules[name] = types.ModuleType(name)
        sys.modules["gym"].Env = object
        sys.modules["moviepy.editor"].VideoFileClip = sys.modules["moviepy.editor"].ImageSequenceClip = object
        peers["APReL"] = with_aprel

    def speed(sample, seed):
        started = time.perf_counter()
        z = sample(seed)
        seconds, ess = time.perf_counter() - started, effective_sample_size(z).min()
        print(f"    {sample.__name__}: {ess:.0f} effective of {z[..., 0].size:,} draws in {seconds:.1f} s, R-hat up to "
              f"{split_rhat(z).max():.3f}", flush=True)
        return ess / seconds

    for seed in range(args.rounds):
        mine = speed(ours, seed)
        for name, sample in peers.items():
            yield "effective samples/s", name, mine, speed(sample, seed)


def proposal(task):
    return REPLIES / f"propose-{task}-1.md"


def train_ours(task, seed, steps):
    """(seconds, steps to 100 % or None) of a run with a fixed reward."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run = Run(folder, dict(task=task, reward="fixed", obs="state", seed=seed, steps=steps))
        started = time.perf_counter()
        learnt = selfalign.train(lambda: PandaEnv(task), TASKS[task], LLM(None, run.exchange), run, "fixed", seed, steps,
                                 proposal=str(proposal(task)), beside=second_core("cpu"))      # as our command line
        seconds = time.perf_counter() - started
        run.close()
    return seconds, learnt


def theta(args):
    """Seconds of one update of θ, by parameters and by the stand-in's rankings of 48 in D, beside those of its 10,000 steps."""
    torch.set_num_threads(1)                               # as our command line
    llm, rewards = LLM(StandIn(), lambda exchange: None), [touch_reward(number) for number in (7, 2, 1)]
    D = [(T, selfalign.pairs_of(rank_attempts(llm, TASKS["touch"], T))) for T, _ in rankings(rewards[0], 4)]
    cases = [(reward, D[:count]) for reward in rewards for count in (1, 2, 4)]
    for seed in range(1, args.rounds + 1):
        explored, trained = (train_ours("touch", seed, steps)[0] for steps in (selfalign.EXPLORE_STEPS, 3_000))
        period = (trained - explored) * selfalign.UPDATE_EVERY / (3_000 - selfalign.EXPLORE_STEPS)
        for reward, D in cases:
            now = selfalign.Change(0, "proposal", reward.params, reward.params)
            started = time.perf_counter()
            posterior = selfalign.sample_theta(reward, now.prior, D, np.random.default_rng(seed))
            selfalign.estimate(posterior, reward, now, D)
            seconds, size = time.perf_counter() - started, f"{len(reward.params)} parameters, {len(D) * selfalign.RANKED} trajectories"
            yield f"{UPDATE_OF_THETA}, {size}", "period", seconds, period


def learning(args):
    """Seconds to 100 % success, twice running, from the state and the same fixed reward, evaluations included."""
    import gymnasium
    from stable_baselines3 import SAC, TD3
    from stable_baselines3.common.callbacks import BaseCallback

    def ours(task, seed):
        return train_ours(task, seed, args.steps)

    class Env(gymnasium.Env):
        """PandaEnv for Stable-Baselines3, with r_θ for its reward."""

        def __init__(self, task):
            self.env = PandaEnv(task)
            reward = Reward(read_code(proposal(task).read_text(encoding="utf-8")), TASKS[task].features)
            self.r_theta = RTheta(reward, selfalign.random_features(self.env, TASKS[task]))
            self.observation_space = gymnasium.spaces.Box(*self.env.observation_space)
            self.action_space = gymnasium.spaces.Box(*self.env.action_space)

        def reset(self, seed=None, options=None):
            return self.env.reset(seed=seed)

        def step(self, action):
            obs, _, terminated, truncated, info = self.env.step(action)
            return obs, float(self.r_theta(np.array(list(info["features"].values())))), terminated, truncated, {}

    class Evaluate(BaseCallback):
        """Stops as `selfalign.train` does, by the same evaluations."""

        def __init__(self, task, seed):
            super().__init__()
            self.env, self.successes = PandaEnv(task), []
            self.env.reset(seed=1_000_000 + seed)

        def _on_step(self):
            if self.num_timesteps % selfalign.EVAL_EVERY == 0 and self.num_timesteps > selfalign.EXPLORE_STEPS:
                agent = types.SimpleNamespace(act=lambda obs, step, explore: self.model.predict(obs, deterministic=True)[0])
                self.successes.append(selfalign.evaluate(agent, self.env, None, selfalign.EVAL_EPISODES)[0])
            return self.successes[-2:] != [1.0, 1.0]

    def theirs(algorithm, task, seed):
        stop, started = Evaluate(task, seed), time.perf_counter()
        model = algorithm("MlpPolicy", Env(task), gamma=TASKS[task].discount, seed=seed, device="cpu",
                          learning_starts=selfalign.EXPLORE_STEPS)
        model.learn(args.steps, callback=stop)
        learnt = stop.successes[-2:] == [1.0, 1.0]
        return time.perf_counter() - started, stop.num_timesteps - selfalign.EVAL_EVERY if learnt else None

    def timed(name, threads, train, *which):
        torch.set_num_threads(threads)
        seconds, steps = train(*which)
        reached = f"{steps:,} steps" if steps else "not learnt"
        print(f"    {name}, {which[-2]}, seed {which[-1]}: {reached}, {seconds:.0f} s", flush=True)
        return seconds, steps

    cores = torch.get_num_threads()
    for task in TASKS:
        for seed in range(1, args.seeds + 1):
            seconds, steps = timed("ours", 1, ours, task, seed)        # one thread, as our command line
            for algorithm in (peer for peer in (SAC, TD3) if peer.__name__ in args.peers):
                peer_seconds, peer_steps = timed(algorithm.__name__, cores, theirs, algorithm, task, seed)
                yield (f"s to 100 %, {task}", f"Stable-Baselines3, {algorithm.__name__}", seconds if steps else np.inf,
                       peer_seconds if peer_steps else np.inf)


MEASURES = {measure.__name__: measure for measure in (environment, update, sampler, theta, learning, profile)}


def read(path):
    """Rows (measure, peer, ours, theirs) of a file that a former run has written."""
    with open(path, newline="", encoding="utf-8") as file:
        return [(measure, peer, float(ours), float(theirs)) for measure, peer, ours, theirs in csv.reader(file)]


def table(rows):
    """Lines of Markdown from rows of (measure, peer, ours, theirs): medians, ranges, and how many times faster we are.

    Updates of θ have a table of their own, after the others.
    """
    theta, rows = ([row for row in rows if row[0].startswith(UPDATE_OF_THETA) == of_theta] for of_theta in (True, False))
    if rows:
        yield "| measure | ours | peer | theirs | ours is faster by |"
        yield "| --- | --- | --- | --- | --- |"
    for key in dict.fromkeys((measure, peer) for measure, peer, *_ in rows):
        both = np.array([row[2:] for row in rows if tuple(row[:2]) == key], dtype=float).T
        ours, theirs = np.median(both, axis=1)
        ratio = (theirs, ours) if key[0].startswith("s to") else (ours, theirs)
        faster = f"{ratio[0] / ratio[1]:.2f}" if np.isfinite(ratio).all() else "–"
        cells = [_cell(x) for x in both]
        yield f"| {key[0]} | {cells[0]} | {key[1]} | {cells[1]} | {faster} |"
    if theta:
        yield from [""] * bool(rows)
        yield "| | s | s of its period of training | share |"
        yield "| --- | --- | --- | --- |"
    for measure in dict.fromkeys(row[0] for row in theta):
        seconds, period = np.array([row[2:] for row in theta if row[0] == measure], dtype=float).T
        yield f"| {measure} | {_cell(seconds)} | {_cell(period)} | {np.median(seconds / period):.1%} |"


def _cell(x):
    """Median and range of x, (N,); infinity where a goal was not reached."""
    numbers = ["not reached" if np.isinf(n) else f"{n:.0f}" if n >= 100 else f"{n:.3g}"
               for n in (np.median(x), x.min(), x.max())]
    return numbers[0] if len(set(numbers)) == 1 else f"{numbers[0]} ({numbers[1]} to {numbers[2]})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measures", nargs="*", metavar="measure", help=", ".join(MEASURES))
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: 5)")
    parser.add_argument("--seeds", type=int, default=3, help="of learning (default: 3)")
    parser.add_argument("--steps", type=int, default=40_000, help="of learning, at most (default: 40000)")
    parser.add_argument("--peers", nargs="+", choices=("SAC", "TD3"), default=("SAC", "TD3"), help="of learning (default: both)")
    parser.add_argument("--device", default="cpu", help="of update (default: cpu)")
    parser.add_argument("--drqv2", help="a clone of github.com/facebookresearch/drqv2")
    parser.add_argument("--aprel", help="a clone of github.com/Stanford-ILIAD/APReL")
    parser.add_argument("--out", default="speed.csv", help="rows are appended to it (default: speed.csv)")
    parser.add_argument("--table", metavar="FILE", help="measure nothing, print the table of a file's rows")
    args = parser.parse_args()
    unknown = set(args.measures) - set(MEASURES)
    if unknown or bool(args.measures) == bool(args.table):
        parser.error(f"name what to measure, of {', '.join(MEASURES)}, or --table FILE")
    if "update" in args.measures and not args.drqv2:
        parser.error("update needs --drqv2 PATH, a clone of github.com/facebookresearch/drqv2")
    if args.table:
        try:
            return print("\n".join(table(read(args.table))))
        except (OSError, ValueError) as error:
            sys.exit(f"bench.py: {args.table} holds no rows of a former run: {error}")
    rows, failed, threads = [], False, torch.get_num_threads()
    for name in args.measures:
        torch.set_num_threads(threads)                     # some measures take fewer
        print(f"{name}: {MEASURES[name].__doc__}", flush=True)
        try:
            for row in MEASURES[name](args):
                rows.append(row)
                with open(args.out, "a", newline="") as file:
                    cells = (f"{cell:.5g}" if isinstance(cell, float) else cell for cell in row)
                    csv.writer(file, lineterminator="\n").writerow(cells)
        except (ModuleNotFoundError, OSError) as error:        # what has been measured is not lost
            failed = True
            print(f'bench.py: {name} stops: {error}. Its peers: pip install -e ".[bench]", and clones by --drqv2 and --aprel',
                  file=sys.stderr)
    print("\n".join(table(rows)))
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
