"""Success over steps of the runs in metrics.csv, one panel for each task: results/success.png.

    pip install -e ".[plot]" && python results/plot.py
"""

import csv
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
TASKS, STEPS = ("touch", "grasp", "push"), np.arange(2_000, 41_000, 1_000)


def curves():
    """{(proposal, task, reward): {seed: {step: success}}}"""
    runs = defaultdict(lambda: defaultdict(dict))
    with open(HERE / "metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            runs[row["proposal"], row["task"], row["reward"]][row["seed"]][int(row["step"])] = float(row["success"])
    return runs


def main():
    runs = curves()
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.8), sharey=True)
    for axis, task in zip(axes, TASKS):
        seeds = runs["stand-in", task, "selfalign"]
        filled = []
        for success in seeds.values():
            # A run ends once it has reached 100 % twice; there the skill counts as learnt.
            last = max(success)
            filled.append([success.get(step, success[last] if step > last else 0.0) for step in STEPS])
            axis.plot([step for step in STEPS if step <= last], [success[step] for step in STEPS if step <= last],
                      color="tab:blue", alpha=0.25, linewidth=0.8)
        axis.plot(STEPS, np.median(filled, axis=0), color="tab:blue", linewidth=2)
        axis.set_title(f"{task}, {len(seeds)} seeds and their median", fontsize=10)
        axis.set_xlabel("environment steps")
        axis.set_xticks([0, 10_000, 20_000, 30_000, 40_000], ["0", "10k", "20k", "30k", "40k"])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("success of 20 episodes")
    figure.tight_layout()
    figure.savefig(HERE / "success.png", dpi=120)


if __name__ == "__main__":
    main()
