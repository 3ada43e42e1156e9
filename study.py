"""The studies behind the README's results: many runs of selfalign.py, shared out among processes and machines.

    python study.py                                      # what there is to do, and how long it takes; runs nothing
    python study.py methods parts                        # these studies, one process for each core
    torchrun --nproc-per-node 2 study.py methods         # as many workers, on as many machines, as torchrun starts
    python study.py --collect methods                    # results/study-methods.csv from the finished runs' folders
    python study.py --table results/study-methods.csv    # its tables, in Markdown
    python study.py --figure results/study-methods.csv   # its figures, beside it, as PNG: pip install -e ".[study]"
    python study.py --film RUN [RUN ...]                 # results/film.png: each run's policy in one episode

Each run has a folder of its own under runs/study, which all machines must share. What is finished is skipped and what was
cut short goes on from its checkpoint, so any of this can be stopped and started again. A run is finished when its last
policy has been judged on JUDGED fresh episodes, other than those whose success has stopped it.
"""

import argparse
import contextlib
import csv
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections import namedtuple
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed

import selfalign
from cli import load_policy
from envs import TASKS
from mh import preference_loss

JUDGED = 100
STEPS = 40_000
SPEED = {"state": 120, "pixels": 24}     # environment steps per second on one core, until a run has shown how many there are
OFFLINE = ("--llm", "offline")         # the scripted stand-in, whatever keys there are
RESULTS = Path("results")
REPLIES = Path(__file__).parent / "tests" / "replies"
REPORTED = {"contact_threshold": 0.127, "push_weight": 21.05}          # θ after the paper's last update

# One run: its flags beside --task and --seed, names in selfalign.py that stand for something else in it, and its steps if not STEPS.
Job = namedtuple("Job", "study task variant seed flags names steps", defaults=((), {}, None))


def flipping(share, seed):
    """`selfalign.pairs_of`, after which D holds each preference the other way round with probability `share`.

    Whether a change is undone and whether the robot gets better is still told by the ranking as it was.
    """
    pairs_of = selfalign.pairs_of

    def flipped(ranking):
        pairs, rng = pairs_of(ranking), np.random.default_rng([seed, *sum(ranking, [])])       # the same after --resume
        return np.where(rng.random((len(pairs), 1)) < share, pairs[:, ::-1], pairs)
    return flipped


def no_sampler(*_):
    return None


def no_analysis(llm, task, reward, history, stalled, change, step):
    return change


def unweighted(returns, pairs, weights):
    return preference_loss(returns, pairs)             # each pair a fact of its own, as in the paper


def usual(task, seed, reward="selfalign"):
    return Job("methods", task, reward, seed, ("--reward", reward, *OFFLINE * (reward != "sparse")))


def methods(seeds):
    """The paper's table: a sparse reward, the LLM's first one, and self-alignment."""
    return [usual(task, seed, reward) for task in TASKS for reward in ("sparse", "fixed", "selfalign") for seed in seeds]


def noise(seeds):
    """How much noise in the preferences the update of θ bears."""
    return [usual("touch", seed) if share == 0 else
            Job("noise", "touch", f"{share:.0%} flipped", seed, OFFLINE, {"pairs_of": flipping(share, seed)})
            for share in (0.0, 0.1, 0.2, 0.4) for seed in seeds]


def often(seeds):
    """How often θ is updated. Of the 50 episodes of 2,500 steps, fewer than K = 48 are ranked."""
    return [usual("touch", seed) if every == selfalign.UPDATE_EVERY else
            Job("often", "touch", f"every {every:,} steps", seed, OFFLINE, {"UPDATE_EVERY": every})
            for every in (2_500, 5_000, 10_000) for seed in seeds]


def weak(seeds):
    """Push as the paper tells it: a first reward in which reaching weighs 10 and pushing 2, in three forms."""
    proposals = {form: REPLIES / f"propose-push-{number}.md" for form, number in (("linear", 8), ("exponential", 9), ("stages", 10))}
    return [Job("weak", "push", f"{form}, {reward}", seed, ("--reward", reward, "--proposal", str(path), *OFFLINE))
            for form, path in proposals.items() for reward in ("fixed", "selfalign") for seed in seeds]


def parts(seeds):
    """What each part of an update is worth, for two first rewards that need one: the stand-in's of touch, the exponential one of push."""
    variants = {"no analysis": {"unblock": no_analysis}, "no sampler": {"align": no_sampler},
                "pairs of weight 1": {"preference_loss": unweighted}, "K = 12": {"RANKED": 12}, "K = 24": {"RANKED": 24}}
    whole = [[usual("touch", seed) for seed in seeds], [job for job in weak(seeds) if job.variant == "exponential, selfalign"]]
    return [job._replace(study="parts", variant=job.variant.replace("selfalign", variant), names=variants[variant]) if variant else job
            for jobs in whole for variant in ("", *variants) for job in jobs]


def pixels(seeds):
    """Each task from images. A run takes as many threads as there are cores: OMP_NUM_THREADS=1, or --processes 1."""
    return [Job("pixels", task, "selfalign", seed, ("--obs", "pixels", "--precision", "bfloat16", *OFFLINE), steps=60_000)
            for seed in seeds for task in TASKS]


STUDIES = {study.__name__: study for study in (methods, weak, noise, parts, often, pixels)}


def folder(job):
    words = "".join(c if c.isalnum() else "-" for c in job.variant)
    return Path("runs") / "study" / job.study / f"{job.task}-{words}-{job.seed}"


def evaluations(where):
    """[(step, success)] of a run so far."""
    with open(where / "metrics.csv", newline="") as file:
        return [(int(row["step"]), float(row["success"])) for row in csv.DictReader(file)]


def steps_to_success(evaluations):
    """The first of two evaluations running in which every episode succeeds; infinity where there are none."""
    return next((step for (step, now), (_, then) in zip(evaluations, evaluations[1:]) if now == then == 1.0), np.inf)


def most_steps(job):
    return job.steps or STEPS


def ended(job):
    """Whether a run has learnt its skill or had its steps."""
    rows = evaluations(folder(job))
    return steps_to_success(rows) < np.inf or bool(rows) and rows[-1][0] >= most_steps(job)


def execute(job):
    """Trains the run of a job, or goes on with it, and judges its last policy. False if it was told to stop before its end."""
    where, began = folder(job), time.monotonic()
    if not (where / "settings.json").exists():         # begun by a process that was killed before it was
        shutil.rmtree(where, ignore_errors=True)
    argv = ["--steps", str(most_steps(job)), *(["--resume", str(where)] if where.exists() else
                                               ["--task", job.task, "--seed", str(job.seed), "--out", str(where), *job.flags])]
    where.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        # Other runs are at work on the other cores, so evaluations get no process of their own.
        for name, value in {**job.names, "second_core": lambda device: False, "sys.argv": ["selfalign.py", *argv]}.items():
            stack.enter_context(mock.patch(f"selfalign.{name}", value))
        log = stack.enter_context(open(f"{where}.log", "a", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(log))
        stack.enter_context(contextlib.redirect_stderr(log))
        try:
            selfalign.main()
        except SystemExit as end:                      # of a run that only has to be judged, without a code
            if end.code:
                raise RuntimeError(f"selfalign.py ended with {end.code!r}") from None
    if not ended(job):
        return False
    trained = time.monotonic() - began
    torch.set_num_threads(1)                           # frames come one at a time
    env, agent = load_policy(where, selfalign.AGENT)
    env.reset(seed=2_000_000 + job.seed)
    success, *_ = selfalign.evaluate(agent, env, None, JUDGED)
    part = where / "judged.json.part"
    part.write_text(json.dumps({"success": success, "seconds": time.monotonic() - began, "trained": trained}))
    os.replace(part, where / "judged.json")
    return True


def judged(job):
    """What `execute` has left of a finished run, None for another, such as one that had fewer steps."""
    path = folder(job) / "judged.json"
    return json.loads(path.read_text()) if path.exists() and ended(job) else None


def left(jobs, workers):
    """How many are left and about how long they take, in words: each variant as long as its finished runs."""
    known, todo = {}, [job for job in jobs if not judged(job)]
    for job in jobs:
        if judged(job):
            known.setdefault((job.study, job.task, job.variant), []).append(judged(job)["seconds"])
    seconds = sum(np.mean(known.get((job.study, job.task, job.variant),
                                    most_steps(job) / SPEED["pixels" if "pixels" in job.flags else "state"])) for job in todo) / workers
    return f"{len(todo)} of {len(jobs)} runs left, about {seconds / 60:.0f} min"


def work(jobs, claim, workers):
    """Runs those jobs whose numbers `claim` gives, until none is left. Returns how many have failed; exits where one is stopped."""
    failed = 0
    while (number := claim()) < len(jobs):
        job = jobs[number]
        if judged(job):
            continue
        threads = torch.get_num_threads()
        try:
            done = execute(job)
        except (Exception, SystemExit) as error:       # one run that fails takes no other with it
            failed += 1
            print(f"{folder(job)}: {error}; see {folder(job)}.log", flush=True)
            continue
        finally:
            torch.set_num_threads(threads)             # runs from states and judging take one, the next may be one from images
        if not done:
            sys.exit(f"{folder(job)}: stopped; the same command goes on with it")
        steps = steps_to_success(evaluations(folder(job)))
        said = f"100 % at {steps:,} steps" if steps < np.inf else "not learnt"
        print(f"{folder(job)}: {said}, then {judged(job)['success']:.0%} of {JUDGED} episodes. {left(jobs, workers)}", flush=True)
    return failed


def list_jobs(names, seeds):
    return [job for name in names for job in STUDIES[name](range(1, seeds + 1))]


def torchrun_worker(jobs):
    """One of the workers that torchrun has started: the launcher's store hands out the jobs' numbers."""
    store, _, workers = next(torch.distributed.rendezvous("env://"))
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]                       # the store outlives a restart of its workers
    failed = work(jobs, lambda: store.add(f"next job {attempt}", 1) - 1, workers)
    # The launcher takes the store with it when its own workers are done, and all others when one of them fails.
    store.add(f"done {attempt}", 1)
    while store.add(f"done {attempt}", 0) < workers:
        time.sleep(1)
    sys.exit(min(1, failed))


def local_worker(names, seeds, counter, workers):
    def claim():
        with counter.get_lock():
            counter.value += 1
            return counter.value - 1
    sys.exit(min(1, work(list_jobs(names, seeds), claim, workers)))


def local_workers(names, seeds, processes):
    """As many processes of our own; returns how many of them had a run that failed or was stopped."""
    context = multiprocessing.get_context("spawn")
    counter = context.Value("i", 0)
    workers = [context.Process(target=local_worker, args=(names, seeds, counter, processes)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    signal.signal(signal.SIGTERM, lambda *_: [worker.terminate() for worker in workers])
    signal.signal(signal.SIGINT, lambda *_: None)      # Ctrl-C reaches the workers too, which stop at the end of an episode
    for worker in workers:
        worker.join()
    return sum(worker.exitcode != 0 for worker in workers)


def collect(study, jobs):
    """results/study-NAME.csv: every evaluation, every θ and the judgement of every finished run."""
    finished = [job for job in jobs if judged(job)]
    if len(finished) < len(jobs):
        print(f"{len(jobs) - len(finished)} of {len(jobs)} runs are not finished, and missing: those that learn early finish first")
    if not finished:
        raise ValueError(f"no run of {study} is finished under {Path('runs/study').resolve()}")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"study-{study}.csv"
    with open(f"{path}.part", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["task", "variant", "seed", "step", "measure", "value"])
        for job in finished:
            run, rows = (job.task, job.variant, job.seed), evaluations(folder(job))
            writer.writerows([*run, step, "success", success] for step, success in rows)
            writer.writerow([*run, rows[-1][0], f"success of {JUDGED}", judged(job)["success"]])
            if "trained" in judged(job):               # of a run that was cut short, since it went on
                writer.writerow([*run, rows[-1][0], "seconds", f"{judged(job)['trained']:.0f}"])
            with open(folder(job) / "theta.csv", newline="", encoding="utf-8") as thetas:
                writer.writerows([*run, row["step"], f"{bound}θ {row['name']}", f"{float(row[column]):.4g}"] for row in csv.DictReader(thetas)
                                 for bound, column in (("", "value"), ("low ", "low"), ("high ", "high")) if row[column])
    os.replace(f"{path}.part", path)


def read(path):
    """{(task, variant): {seed: {measure: [(step, value), ...]}}} of a file that `collect` has written."""
    runs = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            measures = runs.setdefault((row["task"], row["variant"]), {}).setdefault(int(row["seed"]), {})
            measures.setdefault(row["measure"], []).append((int(row["step"]), float(row["value"])))
    return runs


def table(runs):
    """Lines of Markdown. Quartiles are steps of single runs; –: not learnt."""
    def cell(steps):
        return f"{steps:,.0f}" if steps < np.inf else "–"

    yield f"| task | | learnt | steps to 100 %: median (quartiles) | final policy, {JUDGED} episodes: mean (worst) |"
    yield "| --- | --- | --- | --- | --- |"
    for (task, variant), seeds in runs.items():
        steps = np.array([steps_to_success(run["success"]) for run in seeds.values()], dtype=float)
        low, high = np.quantile(steps, [0.25, 0.75], method="inverted_cdf")       # between two, infinity has no middle
        final = [run[f"success of {JUDGED}"][0][1] for run in seeds.values()]
        yield (f"| {task} | {variant} | {np.isfinite(steps).sum()} of {len(steps)} | {cell(np.median(steps))} ({cell(low)} to {cell(high)}) "
               f"| {np.mean(final):.1%} ({min(final):.0%}) |")


def theta_table(runs):
    """Lines of Markdown: the parameters that changed in at least half of the seeds, before and after the last update."""
    yield "| task | | θ | first | last: median (lowest to highest) | changed |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for (task, variant), seeds in runs.items():
        for measure in dict.fromkeys(measure for run in seeds.values() for measure in run if measure.startswith("θ ")):
            course = [run[measure] for run in seeds.values()]
            first, last = (np.array([values[i][1] for values in course]) for i in (0, -1))
            changed = sum(len({value for _, value in values}) > 1 for values in course)
            if changed >= len(seeds) / 2:
                yield (f"| {task} | {variant} | {measure[2:]} | {np.median(first):.3g} | {np.median(last):.3g} ({last.min():.3g} to "
                       f"{last.max():.3g}) | {changed} of {len(seeds)} |")


def interquartile_mean(x):
    """Mean of the middle half of x, (N, ...), over its first axis (Agarwal et al., 2021)."""
    cut = len(x) // 4
    return np.sort(x, axis=0)[cut:len(x) - cut].mean(axis=0)


def in_thousands(axis):
    axis.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:g}k")
    axis.set_xlabel("environment steps")
    axis.grid(alpha=0.3)


def figure(runs, path):
    """Success over steps: every seed, the interquartile mean and its 95 % interval by bootstrap over the seeds.

    Of few seeds such an interval is too narrow: of five it holds the truth in less than 90 % of cases.
    """
    import matplotlib.pyplot as plt

    panels = {}                                        # of a variant "form, method", form has a panel of its own
    for (task, variant), seeds in runs.items():
        *form, method = variant.split(", ")
        panels.setdefault(", ".join([task, *form]), {})[method] = seeds
    methods = list(dict.fromkeys(method for panel in panels.values() for method in panel))
    drawing, axes = plt.subplots(1, len(panels), figsize=(1 + 3.2 * len(panels), 2.8), sharey=True, squeeze=False)
    end = max(step for seeds in runs.values() for run in seeds.values() for step, _ in run["success"])
    steps, rng = np.arange(2_000, end + 1, 1_000), np.random.default_rng(0)
    for axis, (title, panel) in zip(axes[0], panels.items()):
        for colour, method in enumerate(methods):
            curves = []
            for run in panel.get(method, {}).values():
                success = dict(run["success"])         # ends with the second 100 %, which is what then counts as kept
                curves.append([success.get(step, success[max(success)] if step > max(success) else 0.0) for step in steps])
            if not curves:
                continue
            curves = np.array(curves)
            draws = [interquartile_mean(curves[rng.integers(len(curves), size=len(curves))]) for _ in range(2_000)]
            low, high = np.quantile(draws, [0.025, 0.975], axis=0)
            axis.plot(steps, curves.T, color=f"C{colour}", alpha=0.2, linewidth=0.6)
            axis.fill_between(steps, low, high, color=f"C{colour}", alpha=0.2, linewidth=0)
            line = (0, (2, 1)) if 0 < colour == len(methods) - 1 else "-"              # what lies under the last one is seen
            axis.plot(steps, interquartile_mean(curves), color=f"C{colour}", linewidth=2, linestyle=line, label=method)
        axis.set_title(title, fontsize=10)
        axis.set_ylim(-0.03, 1.03)
        axis.set_xticks(range(0, end + 1, 10_000))
        in_thousands(axis)
    axes[0, 0].set_ylabel("success of 20 episodes")
    axes[0, -1].legend(fontsize=8, loc="lower right")
    drawing.tight_layout()
    drawing.savefig(path, dpi=120)


def theta_figure(runs, path):
    """The numbers that the paper reports, over steps: θ of every seed, its 90 % intervals, the paper's last value.

    Draws nothing where none of them changed.
    """
    import matplotlib.pyplot as plt

    panels = [(task, variant, name) for (task, variant), seeds in runs.items() for name in REPORTED
              if any(len({value for _, value in run.get(f"θ {name}", [])}) > 1 for run in seeds.values())]
    if not panels:
        return
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    drawing, axes = plt.subplots(rows, columns, figsize=(1 + 3.2 * columns, 2.9 * rows), squeeze=False)
    for axis in axes.flat[len(panels):]:
        axis.remove()
    for axis, (task, variant, name) in zip(axes.flat, panels):
        for colour, run in enumerate(runs[task, variant].values()):
            steps, values = np.array(run[f"θ {name}"]).T
            end = run["success"][-1][0]
            axis.step([*steps, end], [*values, values[-1]], where="post", color=f"C{colour}", linewidth=1.2)
            low, high = (dict(run.get(f"{bound} θ {name}", [])) for bound in ("low", "high"))
            for step in low:                           # side by side
                axis.plot([step + 150 * colour] * 2, [low[step], high[step]], color=f"C{colour}", alpha=0.5, linewidth=2)
        axis.axhline(REPORTED[name], color="black", linestyle=":", linewidth=1)
        axis.set_yscale("log")
        axis.set_title(f"{task}, {variant}\n{name}", fontsize=9)
        in_thousands(axis)
    for axis in axes[:, 0]:
        axis.set_ylabel("θ; dotted: the paper's")
    drawing.tight_layout()
    drawing.savefig(path, dpi=120)


def film(folders, path, pictures=6):
    """A strip of pictures from one episode of each run's policy, one row each, at even distances in time."""
    from PIL import Image

    rows = []
    for run in folders:
        env, agent = load_policy(run, selfalign.AGENT)
        obs, _ = env.reset(seed=0)
        frames, over = [env.render()], False
        while not over:
            obs, _, _, over, _ = env.step(agent.act(obs, 0, explore=False))
            frames.append(env.render())
        rows.append(np.hstack([frames[i] for i in np.linspace(0, len(frames) - 1, pictures).astype(int)]))
        env.close()
    strip = Image.fromarray(np.vstack(rows))
    strip.resize((1200, 1200 * strip.height // strip.width)).quantize(128).save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="study", help=", ".join(STUDIES))
    parser.add_argument("--seeds", type=int, default=5, help="1 to this (default: 5)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="without torchrun (default: one for each core)")
    for name in ("collect", "table", "figure"):
        parser.add_argument(f"--{name}", metavar="STUDY" if name == "collect" else "FILE", help="see above")
    parser.add_argument("--film", metavar="RUN", nargs="+", help="see above")
    args = parser.parse_args()
    unknown = {*args.studies, *filter(None, [args.collect])} - set(STUDIES)
    if unknown or args.seeds < 1 or args.processes < 1:
        parser.error(f"studies are {', '.join(STUDIES)}; --seeds and --processes are 1 or more")
    if args.studies and (args.collect or args.table or args.figure or args.film):
        parser.error(f"--collect, --table, --figure and --film run nothing: leave {' '.join(args.studies)} out")
    if args.studies:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            return torchrun_worker(list_jobs(args.studies, args.seeds))
        failed = local_workers(args.studies, args.seeds, args.processes)
        sys.exit(f"{failed} of {args.processes} processes had runs that failed or were stopped" if failed else 0)
    try:
        if args.collect:
            collect(args.collect, list_jobs([args.collect], args.seeds))
        if args.table:
            runs = read(args.table)
            print("\n".join([*table(runs), "", *theta_table(runs)]))
        if args.figure:
            runs, path = read(args.figure), Path(args.figure).with_suffix(".png")
            figure(runs, path)
            theta_figure(runs, path.with_stem(f"{path.stem}-theta"))
        if args.film:
            film(args.film, RESULTS / "film.png")
    except (OSError, LookupError, ValueError) as error:
        sys.exit(f"study.py: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f'study.py: {error}; pictures need matplotlib and Pillow: pip install -e ".[study]"')
    if not (args.collect or args.table or args.figure or args.film):
        for name, study in STUDIES.items():
            print(f"{name:8} {study.__doc__} {left(list_jobs([name], args.seeds), args.processes)} on {args.processes} cores.")


if __name__ == "__main__":
    main()
