"""Other rules around θ, each one an `update` for `selfalign.train` or a few values of Config.

study.py and heldout.py name them by their keys in METHODS.
"""

from dataclasses import replace
from pathlib import Path
from string import Template

import numpy as np

from llm import LLMError, describe, propose_question, rank_question, read_code, read_ranking
from mh import discordance, pairs_of
from reward import FUNCTIONS, Reward
from run import Change
from selfalign import ANALYSED, choose, pay_note, unblock, update_theta


def again(llm, task, state, c, rng) -> Change | None:
    """Every fourth call is an update, and so is the call that follows a change made there.

    With a quarter of the period for c.update_every, θ is asked about once more soon after it
    changed, by the episodes lived since.
    """
    quarters, changed = state.step // c.update_every, state.changes[-1].step // c.update_every
    if quarters % 4 == 0:
        return update_theta(llm, task, state, replace(c, update_every=4 * c.update_every), rng)
    soon = changed > 0 and changed % 4 == 0 and quarters == changed + 1
    return update_theta(llm, task, state, c, rng) if soon else None


def beside(llm, task, state, c, rng) -> Change | None:
    """Also asks what blocks the skill where θ has changed but nothing succeeded for a period."""
    change = update_theta(llm, task, state, c, rng)
    lately = state.successes[-(c.update_every // c.eval_every) :]
    if change is None or change.cause != "posterior" or any(lately):
        return change
    numbers, pairs = state.D[-1]
    T, reward = [state.features[i] for i in numbers], Reward(change.source, task.features)
    wrong = float(discordance(reward.returns(T)(change.theta), np.array(pairs)))
    after = replace(state, changes=[*state.changes, change])
    return unblock(llm, task, reward, after, T, wrong) or change


def rewrite(llm, task, state, c, rng) -> Change | None:
    """The LLM writes the reward anew after each ranking; nothing else tunes its numbers.

    Eureka (Ma et al., 2023) and ICPL (Yu et al., 2024) work like this. The stand-in cannot.
    """
    now = state.changes[-1]
    reward = Reward(now.source, task.features)
    numbers = choose(reward, state, c, rng)
    T = [state.features[i] for i in numbers]

    def pairs_in(text):
        return pairs_of([[label - 1 for label in group] for group in read_ranking(text, len(T))])

    def reward_in(text):
        new = Reward(read_code(text), task.features)
        new.check(new.named(np.concatenate(T)))
        return Change(state.step, "rewrite", new.source, new.params, new.params)

    try:
        pairs = llm.ask("rank", rank_question(task, T), pairs_in)
    except LLMError as error:
        print(f"\n  The LLM ranks nothing: {error}\n", flush=True)
        return None
    state.D.append([numbers, pairs.tolist()])
    wins = np.bincount(pairs[:, 0], minlength=len(T)) - np.bincount(pairs[:, 1], minlength=len(T))
    places = np.unique(np.linspace(0, len(T) - 1, ANALYSED).round().astype(int))
    shown = [T[i] for i in np.argsort(-wins, kind="stable")[places]]
    notes = [pay_note(reward, now.theta, tau) for tau in shown]
    facts = {
        "reward": reward.source_with(now.theta).strip(),
        "progress": ", ".join(f"{r['step']:,}: {r['success']:.0%}" for r in state.evaluations),
        "wrong": f"{discordance(reward.returns(T)(now.theta), pairs):.0%}",
        "trajectories": describe(task, shown, notes),
    }
    words = Path(__file__).with_name("rewrite.txt").read_text(encoding="utf-8")
    question = propose_question(task, FUNCTIONS) + "\n" + Template(words).substitute(facts)
    try:
        new = llm.ask("rewrite", question, reward_in)
    except LLMError as error:
        print(f"\n  No new reward: {error}\n", flush=True)
        return None
    same = [change.source == new.source for change in state.changes]
    return None if any(same) else new


# What `train` gets as its update, and values of Config.
METHODS = {
    "selfalign": (update_theta, {}),
    "fixed": (None, {"reward": "fixed"}),
    "sparse": (None, {"reward": "sparse"}),
    "never-left-alone": (update_theta, {"rising": 2.0}),
    "gain-0": (update_theta, {"gain": 0.0}),
    "gain-0.10": (update_theta, {"gain": 0.1}),
    "average-1": (update_theta, {"average": 1.0}),
    "saturation-0": (update_theta, {"saturation": 0.0}),
    "again": (again, {"update_every": 2_500}),
    "beside": (beside, {}),
    "rewrite": (rewrite, {}),
}
