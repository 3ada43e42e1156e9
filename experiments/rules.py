"""Other rules around θ, each one an `update` for `selfalign.train` or a few values of Config.

study.py names them by their keys in METHODS.
"""

from dataclasses import replace
from pathlib import Path
from string import Template

import numpy as np

from llm import LLMError, describe, propose_question, rank_question, read_code, read_ranking
from mh import discordance, pairs_of
from reward import FUNCTIONS, Reward
from run import Change
from selfalign import ANALYSED, choose, pay_note, update_theta
from standin import progress


def again(llm, task, state, c, rng) -> Change | None:
    """Updates at every fourth call; if θ changed there, once more at the next call.

    c.update_every is a quarter of the period, so the second ranking shows what a new θ lacks.
    """
    quarters, changed = state.step // c.update_every, state.changes[-1].step // c.update_every
    if quarters % 4 == 0:
        return update_theta(llm, task, state, replace(c, update_every=4 * c.update_every), rng)
    soon = changed > 0 and changed % 4 == 0 and quarters == changed + 1
    return update_theta(llm, task, state, c, rng) if soon else None


def rewrite(llm, task, state, c, rng) -> Change | None:
    """The LLM writes the reward anew after each ranking; nothing else tunes its numbers.

    Eureka (Ma et al., 2023) and ICPL (Yu et al., 2024) work like this. The stand-in cannot.
    """
    reward = Reward(state.changes[-1].source, task.features)
    T = [state.features[i] for i in choose(reward, state, c, rng)]

    def pairs_in(text):
        return pairs_of([[label - 1 for label in group] for group in read_ranking(text, len(T))])

    def reward_in(text):
        new = Reward(read_code(text), task.features)
        new.check(new.named(np.concatenate(T)))
        return Change(state.step, "rewrite", new.source, new.params, new.params)

    try:
        pairs = llm.ask("rank", rank_question(task, T, progress(llm, task, T)), pairs_in)
        question = rewrite_question(task, reward, state, T, pairs)
        new = llm.ask("rewrite", question, reward_in)
    except LLMError as error:
        print(f"\n  The reward stays as it is: {error}\n", flush=True)
        return None
    return None if new.source in [change.source for change in state.changes] else new


def rewrite_question(task, reward, state, T, pairs) -> str:
    """The prompt of the first reward, then rewrite.txt. pairs: the LLM's preferences in T."""
    wins = np.bincount(pairs[:, 0], minlength=len(T)) - np.bincount(pairs[:, 1], minlength=len(T))
    places = np.unique(np.linspace(0, len(T) - 1, ANALYSED).round().astype(int))
    shown = [T[i] for i in np.argsort(-wins, kind="stable")[places]]
    theta = state.changes[-1].theta
    words = Template(Path(__file__).with_name("rewrite.txt").read_text(encoding="utf-8"))
    return f"{propose_question(task, FUNCTIONS)}\n" + words.substitute(
        reward=reward.source_with(theta).strip(),
        progress=", ".join(f"{r['step']:,}: {r['success']:.0%}" for r in state.evaluations),
        wrong=f"{discordance(reward.returns(T)(theta), pairs):.0%}",
        trajectories=describe(task, shown, [pay_note(reward, theta, tau) for tau in shown]),
    )


# What `train` gets as its update, and values of Config.
METHODS = {
    "selfalign": (update_theta, {}),
    "fixed": (None, {"reward": "fixed"}),
    "sparse": (None, {"reward": "sparse"}),
    "never-left-alone": (update_theta, {"alone": 2.0}),
    "gain-0": (update_theta, {"gain": 0.0}),
    "gain-0.10": (update_theta, {"gain": 0.1}),
    "average-1": (update_theta, {"average": 1.0}),
    "saturation-0": (update_theta, {"saturation": 0.0}),
    "again": (again, {"update_every": 2_500}),
    "rewrite": (rewrite, {}),
}
