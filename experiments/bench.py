"""How fast this is beside what people use. Nothing else should run meanwhile.

    python experiments/bench.py                                  # lists the comparisons
    python experiments/bench.py environment sampler theta
    python experiments/bench.py update --drqv2 ../drqv2          # a clone of the authors' code
    python experiments/bench.py sac --rounds 3                   # hours

The two sides take turns. Printed are medians and ranges; results/bench-NAME.csv gets every value.
"""

import argparse
import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from study import REPLIES, RESULTS, reward_of

import mh
from drqv2 import DrQV2, rollout
from envs import SUBSTEPS, TASKS, PandaEnv, check_env
from reward import RTheta
from run import Change, Run, State
from selfalign import Config, align, train


def rate(call, times):
    started = time.perf_counter()
    for _ in range(times):
        call()
    return times / (time.perf_counter() - started)


def environment(args):
    """Control steps and physics substeps per second, random actions, one thread, panda-gym 3.

    Both: PyBullet. Ours: 12 substeps of 1/240 s in a control step. Theirs: 20 of 1/500 s, and again
    with 12 of 1/500 s. Ours computes some 15 features a step, theirs a goal and its distance.
    """
    import gymnasium
    import panda_gym  # noqa: F401, it registers its environments

    def step(env):
        if any(env.step(rng.uniform(-1, 1, env.action_space.shape).astype(np.float32))[2:4]):
            env.reset()

    for task, name in (("touch", "Reach"), ("push", "Push"), ("grasp", "PickAndPlace")):
        sides = {f"ours, {SUBSTEPS} substeps": (PandaEnv(task), SUBSTEPS)}
        for substeps in (20, SUBSTEPS):
            env = gymnasium.make(f"Panda{name}-v3", disable_env_checker=True)
            env.unwrapped.sim.n_substeps = substeps
            sides[f"panda-gym {name}, {substeps} substeps"] = env, substeps
        for side, (env, substeps) in [*sides.items()] * args.rounds:
            rng = np.random.default_rng(0)
            env.reset(seed=0)
            speed = rate(partial(step, env), 1_000)
            yield f"control steps/s, {task}", side, speed
            yield f"substeps/s, {task}", side, speed * substeps


def update(args):
    """Updates per second from pixels beside the authors' code, on the same threads and device.

    Both: batch 256, 84 x 84, 1,024 hidden units, as published, on one batch in memory. Both return
    their losses. Theirs interpolates the random shift, ours copies whole pixels.
    """
    sys.path.append(args.drqv2)  # for its utils
    spec = importlib.util.spec_from_file_location("authors", Path(args.drqv2) / "drqv2.py")
    authors = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(authors)
    rng, shape = np.random.default_rng(0), (9, 84, 84)
    frames = rng.integers(256, size=(2, 256, *shape), dtype=np.uint8)
    action = rng.uniform(-1, 1, (256, 4)).astype(np.float32)
    reward, discount = rng.random((2, 256, 1)).astype(np.float32)
    batch = frames[0], action, reward, discount, frames[1]
    ours, generator = DrQV2(shape, (4,), args.device), torch.Generator(args.device)
    theirs = authors.DrQV2Agent(
        shape, (4,), args.device, 1e-4, 50, 1024, 0.01, 0, 1, "linear(1.0,0.1,50000)", 0.3, True
    )
    sides = {
        "ours": lambda: ours.update(batch, 0.5, generator),
        "the authors": lambda: theirs.update(iter([batch]), 0),
    }
    for turn, (side, call) in enumerate([*sides.items()] * (1 + args.rounds)):
        speed = rate(call, 2 if args.device == "cpu" else 50)
        if turn > 1:  # the first turns warm up
            yield f"updates/s, {args.device}", side, speed


def rankings(count, K=48):
    """Features of `count` x K attempts at touch, from random to straight, and pairs by ranking."""
    env, rng, attempts = PandaEnv("touch"), np.random.default_rng(0), []
    reward = reward_of("touch", 1)
    for number in range(count * K):

        def act(obs, skill=number % K / K):
            aim = np.append(2 * obs[3:6], 0.0) * skill
            return np.clip(aim + 0.5 * rng.standard_normal(4), -1, 1)

        attempts.append(rollout(env, act, number, tuple(TASKS["touch"].features)).features)
    truth = {name: v * np.exp(rng.standard_normal()) for name, v in reward.params.items()}
    R = reward.returns(attempts)(truth).reshape(count, K)
    return attempts, [mh.pairs_of([[i] for i in np.argsort(-row)]) for row in R]


def sampler(args):
    """Effective samples per second to a mixed posterior of 9 parameters, 48 ranked trajectories.

    Both: the same density and one call for all chains, until R-hat and effective size (mh.py) pass
    the same bounds. Ours: Metropolis-Hastings from prior draws. emcee: 32 walkers, stretch moves,
    from prior draws, in rounds that double, the first half of all draws left out.
    """
    import emcee

    reward, (T, (pairs,)) = reward_of("touch", 2), rankings(1)
    R, centre = reward.returns(T), np.array([*reward.params.values()])

    def log_likelihood(theta):
        returns = R({name: theta[:, [i]] for i, name in enumerate(reward.params)})
        return -mh.preference_loss(returns, pairs, 2 / len(T))

    def density(z):
        return log_likelihood(centre * np.exp(mh.PRIOR_STD * z)) - 0.5 * (z**2).sum(axis=-1)

    def ours(seed):
        return np.log(mh.sample_posterior(log_likelihood, centre, rng=seed).samples)

    def peer(seed, walkers=32):
        np.random.seed(seed)
        chain = emcee.EnsembleSampler(walkers, len(centre), density, vectorize=True)
        at, done = np.random.standard_normal((walkers, len(centre))), False
        while not done and chain.iteration < 32_000:
            at = chain.run_mcmc(at, max(250, chain.iteration))
            z = chain.get_chain(discard=chain.iteration // 2).transpose(1, 0, 2)
            rhat, ess = mh.rhat_ess(z)
            done = rhat.max() < mh.MAX_RHAT and ess.min() > mh.MIN_ESS
        return z

    for seed in range(args.rounds):
        for side, sample in (("ours", ours), ("emcee", peer)):
            started = time.perf_counter()
            z = sample(seed)
            seconds, (rhat, ess) = time.perf_counter() - started, mh.rhat_ess(z)
            yield "seconds", side, seconds
            yield "effective samples/s", side, ess.min() / seconds
            yield "R-hat", side, rhat.max()


def theta(args):
    """Seconds of one update of θ, by parameters and by rankings of 48 in D, one thread."""
    T, pairs = rankings(4)
    for number, count, seed in product((7, 2, 1), (1, 2, 4), range(args.rounds)):
        reward, rng = reward_of("touch", number), np.random.default_rng(seed)
        first = Change(0, "proposal", reward.source, reward.params, reward.params)
        D = [[48, (pairs[i] + 48 * i).tolist()] for i in range(count)]
        state = State(changes=[first], D=D, features=T)
        with contextlib.redirect_stdout(None):
            speed = rate(lambda: align(reward, state, Config(), rng), 1)
        yield f"seconds, {len(reward.params)} parameters", f"{count} rankings", 1 / speed


def sac(args):
    """Steps and seconds to 100 % by the same fixed reward, from states, evaluations included.

    Ours: as on the command line: an update for two steps, batch 128, 256 x 256, worker processes.
    SAC and TD3 of Stable-Baselines3, all cores: with their defaults (an update for each step, batch
    256), and with our ratio, batch and network. All: 20 episodes are evaluated every 1,000 steps.
    """
    import gymnasium
    from stable_baselines3 import SAC, TD3

    class Env(gymnasium.Env):
        def __init__(self, task):
            self.env, reward = PandaEnv(task), reward_of(task, 1)
            random_features = check_env(self.env, TASKS[task])
            self.r_theta = RTheta(reward, dict(reward.params), random_features)
            self.observation_space = gymnasium.spaces.Box(*self.env.observation_space)
            self.action_space = gymnasium.spaces.Box(*self.env.action_space)

        def reset(self, seed=None, options=None):
            return self.env.reset(seed=seed)

        def step(self, action):
            obs, _, *ends, info = self.env.step(action)
            features = np.array([[info["features"][name] for name in self.r_theta.reward.inputs]])
            return obs, float(self.r_theta(features)[0]), *ends, {}

    def theirs(algorithm, settings, task, seed):
        env, successes = PandaEnv(task), []
        how = {"gamma": TASKS[task].discount, "learning_starts": 1_000, "device": "cpu"}
        model = algorithm("MlpPolicy", Env(task), seed=seed, **how, **settings)
        while successes[-2:] != [1.0, 1.0] and model.num_timesteps < args.steps:
            model.learn(1_000, reset_num_timesteps=False)
            act = partial(model.predict, deterministic=True)
            names = tuple(TASKS[task].features)
            lived = [rollout(env, lambda obs: act(obs)[0], 10**6 + i, names) for i in range(20)]
            successes.append(np.mean([episode.success for episode in lived]))
        return model.num_timesteps - 1_000 if successes[-2:] == [1.0, 1.0] else None

    def ours(task, seed):
        path = str(REPLIES / f"propose-{task}-1.md")
        c = Config(task=task, reward="fixed", seed=seed, steps=args.steps, proposal=path)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
            return train(partial(PandaEnv, task), TASKS[task], None, Run(folder), c)

    same = {"train_freq": 2, "gradient_steps": 1, "batch_size": 128}
    same["policy_kwargs"] = {"net_arch": [256, 256]}
    sides = {"ours": (ours, 1)}
    for peer in (SAC, TD3):
        sides[f"{peer.__name__}, defaults"] = partial(theirs, peer, {}), os.cpu_count()
        sides[f"{peer.__name__}, our ratio"] = partial(theirs, peer, same), os.cpu_count()
    for task, seed, side in product(TASKS, range(1, args.rounds + 1), sides):
        learn, threads = sides[side]
        torch.set_num_threads(threads)
        started = time.perf_counter()
        steps = learn(task, seed)
        yield f"steps, {task}", side, steps or np.inf
        yield f"seconds, {task}", side, time.perf_counter() - started if steps else np.inf


COMPARISONS = {f.__name__: f for f in (environment, update, sampler, theta, sac)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("comparisons", nargs="*", metavar="NAME", help=", ".join(COMPARISONS))
    parser.add_argument("--rounds", type=int, default=5, help="or seeds (default: 5)")
    parser.add_argument("--steps", type=int, default=40_000, help="of sac (default: 40000)")
    parser.add_argument("--device", default="cpu", help="of update (default: cpu)")
    parser.add_argument("--drqv2", default="drqv2", help="a clone of facebookresearch/drqv2")
    args = parser.parse_args()
    if set(args.comparisons) - set(COMPARISONS):
        parser.error(f"there are {', '.join(COMPARISONS)}")
    for name, compare in COMPARISONS.items():
        if name in args.comparisons or not args.comparisons:
            print(f"\n{name}: {compare.__doc__}")
    for name in args.comparisons:
        torch.set_num_threads(1)
        values = {}
        with open(RESULTS / f"bench-{name}.csv", "w", encoding="utf-8") as file:
            file.write("measure,side,value\n")
            for measure, side, value in COMPARISONS[name](args):
                values.setdefault((measure, side), []).append(value)
                file.write(f'"{measure}","{side}",{value:.6g}\n')
                file.flush()
        print(subprocess.getoutput("lscpu | grep -E '^CPU.s.:|Model name'"), "\n")
        print("| measure | side | median (range) |\n| --- | --- | --- |")
        for (measure, side), x in values.items():
            median, low, high = (f"{number:.4g}" for number in (np.median(x), min(x), max(x)))
            print(f"| {measure} | {side} | {median} ({low} to {high}) |")


if __name__ == "__main__":
    main()
