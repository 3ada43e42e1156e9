"""Studies: many runs of `selfalign.train`, shared out among processes or machines by Dask.

    python experiments/study.py                        # lists the studies
    python experiments/study.py methods --workers 2    # runs one on this machine
    python experiments/study.py methods --cluster tcp://HOST:8786
    python experiments/study.py methods --collect      # only the tables

The run of a job is in runs/STUDY/NAME, what it prints in runs/STUDY/NAME.log. A run that exists is
resumed and a finished one is left as it is, so a study can be stopped at any time and started
again. Machines of a cluster share that folder.
"""

import argparse
import csv
import json
import re
import sys
from collections import namedtuple
from contextlib import redirect_stdout
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rules import METHODS  # noqa: E402

from envs import TASKS, PandaEnv  # noqa: E402
from llm import read_code  # noqa: E402
from reward import Reward  # noqa: E402
from run import THETA, Run  # noqa: E402
from selfalign import PIXELS, Config, choose_llm, train  # noqa: E402

RESULTS, REPLIES = ROOT / "experiments/results", ROOT / "experiments/replies"
LATER = 3_000  # steps by which a run counts as later than another
MARK = "finished.json"  # in a run's folder: {"steps": the most it could take, "learnt": or null}


def reward_of(task: str, number: int) -> Reward:
    """The reward in replies/propose-TASK-NUMBER.md."""
    text = (REPLIES / f"propose-{task}-{number}.md").read_text(encoding="utf-8")
    return Reward(read_code(text), TASKS[task].features)


# One run. name: its folder. method: of rules.METHODS. values: of Config. equals: the name of the
# selfalign run that stands in for this fixed one if its θ never changes.
Job = namedtuple("Job", "name task method seed values equals")


def job(task, method, seed, proposal="", label="", **values) -> Job:
    """The job TASK[-LABEL]-METHOD-SEED. proposal: the number of a reply, or a path."""
    if isinstance(proposal, int):
        label, proposal = str(proposal), REPLIES / f"propose-{task}-{proposal}.md"
    first, values = f"{task}-{label}" if label else task, {**values, "proposal": str(proposal)}
    equals = f"{first}-selfalign-{seed}" if method == "fixed" else ""
    return Job(f"{first}-{method}-{seed}", task, method, seed, values, equals)


RULES = [method for method in METHODS if method not in ("fixed", "sparse")]
# Methods; first rewards, "" is the stand-in's; seeds; values of Config. For each of the tasks.
STUDIES = {
    "methods": (("selfalign", "fixed", "sparse"), [""], "1-10", {"steps": 40_000}),
    "proposals": (("selfalign", "fixed"), (1, 2, 4, 5, 6, 7), "1-3", {"steps": 40_000}),
    "rules": (RULES, ("", 6, 7), "11-13", {"steps": 40_000}),
    "wrong": (("selfalign", "fixed"), (4, 7), "1-1", {"steps": 30_000}),
    "pixels": (["selfalign"], [""], "1-3", {"steps": 60_000, "obs": "pixels", **PIXELS}),
}


def jobs_of(study: str, seeds: range) -> list[Job]:
    """The jobs of a study. Of methods, fixed and sparse get the first five seeds."""
    methods, rewards, _, values = STUDIES[study]
    jobs = []
    for task, number, seed, method in product(TASKS, rewards, seeds, methods):
        proposals = wrong_proposals(task, number) if study == "wrong" else {"": number}
        if method == "selfalign" or study != "methods" or seed in seeds[:5]:
            for label, proposal in proposals.items():
                jobs.append(job(task, method, seed, proposal, label, **values))
    return jobs


def wrong_proposals(task: str, number: int) -> dict[str, Path]:
    """Files with a reply's reward, each of its numbers × 10 and ÷ 10, by label."""
    folder, reward, paths = ROOT / "runs" / "wrong" / "proposals", reward_of(task, number), {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, factor in product(reward.params, (10, 0.1)):
        label = f"{number}-{name}-x{factor}"
        text = reward.source_with({name: reward.params[name] * factor})
        paths[label] = folder / f"{task}-{label}.py"
        paths[label].write_text(text, encoding="utf-8")
    return paths


def rows(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def config(job: Job) -> Config:
    values = {"llm": "offline", "workers": False, **METHODS[job.method][1], **job.values}
    return Config(task=job.task, seed=job.seed, **values)


def finished(job: Job, folder: Path) -> Path | None:
    """The folder of a job's finished run, or of the finished run that it equals."""

    def done(where):
        mark = json.loads((where / MARK).read_text()) if (where / MARK).exists() else {"steps": 0}
        return mark.get("learnt") or mark["steps"] >= config(job).steps

    own, other = folder / job.name, folder / job.equals
    if job.equals and done(other):
        if {row["cause"] for row in rows(other / "theta.csv")} == {"proposal"}:
            return other
    return own if done(own) else None


def execute(job: Job, folder: str, after=None) -> str:
    """Begins or resumes the run of a job. Returns a line on how it ended.

    after: what this returned for the run that this one may equal, so that Dask waits for it.
    """
    where = finished(job, Path(folder))
    if not where:
        where = Path(folder) / job.name
        begun = where.exists()
        run, c = Run(where, resume=begun), config(job)
        if begun and {**run.settings, "steps": c.steps, "proposal": c.proposal} != asdict(c):
            raise ValueError(f"{where} was begun with other settings: remove it")
        torch.set_num_threads(1)
        where.parent.mkdir(parents=True, exist_ok=True)
        make_env, update = partial(PandaEnv, c.task, c.obs), METHODS[job.method][0]
        with open(f"{where}.log", "a", encoding="utf-8") as log, redirect_stdout(log):
            learnt = train(make_env, TASKS[c.task], choose_llm(c, run), run, c, update)
        (where / f".{MARK}").write_text(json.dumps({"steps": c.steps, "learnt": learnt}))
        (where / f".{MARK}").replace(where / MARK)
    learnt = json.loads((where / MARK).read_text())["learnt"]
    return f"{where.name}: {f'100 % at {learnt:,} steps' if learnt else 'not learnt'}"


def run_jobs(client, jobs: list[Job], folder: Path) -> int:
    """Runs jobs on a Dask cluster; a job whose worker dies goes to another. Returns how many fail.

    Raises ValueError for workers of several threads, because a run seeds its whole process.
    """
    from distributed import as_completed

    if set(client.nthreads().values()) - {1}:
        raise ValueError("a worker has several threads: start workers with --nthreads 1")
    futures, failed = {}, 0
    for job in jobs:
        key, after = f"{folder}/{job.name}", futures.get(job.equals)
        futures[job.name] = client.submit(execute, job, str(folder), after, key=key)
    for number, future in enumerate(as_completed(futures.values()), 1):
        error = future.exception()
        failed += error is not None
        said = f"{future.key} failed: {error!r}" if error else future.result()
        print(f"{number} of {len(jobs)}: {said}", flush=True)
    return failed


def collect(study: str, jobs: list[Job], folder: Path, results: Path) -> None:
    """Writes STUDY.csv and STUDY-theta.csv of the finished runs."""
    homes = {job.name: finished(job, folder) for job in jobs}
    missing = list(homes.values()).count(None)
    print(f"{missing} of {len(jobs)} runs are unfinished, likely slow ones, and left out.")
    if missing == len(jobs):  # keep the tables of others
        return
    results.mkdir(parents=True, exist_ok=True)
    metrics, theta = ["step", "success", "return"], THETA.split()[:6]
    for table, end, columns in (("metrics", "", metrics), ("theta", "-theta", theta)):
        with open(results / f"{study}{end}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            head = ["parameter" if column == "name" else column for column in columns]
            writer.writerow(["study", "name", "task", "method", "seed", *head])
            for job in jobs:
                run = [study, job.name, job.task, job.method, job.seed]
                for row in rows(homes[job.name] / f"{table}.csv") if homes[job.name] else []:
                    writer.writerow(run + [row[column] for column in columns])


def steps_to_success(evaluations: list) -> float:
    """The first of two evaluations in a row in which every episode succeeds; else infinity."""
    for (step, success), (_, following) in zip(evaluations, evaluations[1:]):
        if success == following == 1.0:
            return step
    return np.inf


def table(path: Path) -> str:
    """Steps to 100 % in a STUDY.csv, as Markdown. Not learnt counts as later than any step."""
    runs, steps = {}, {}
    for row in rows(path):
        key, name = (row["task"], row["method"]), row["name"].replace(f"-{row['method']}-", "-")
        evaluation = int(row["step"]), float(row["success"])
        runs.setdefault(key, {}).setdefault(name, []).append(evaluation)
    for key, group in runs.items():
        steps[key] = {name: steps_to_success(evaluations) for name, evaluations in group.items()}
    base = "fixed" if "fixed" in {method for _, method in runs} else "selfalign"
    lines = [
        f"| task | method | learnt | steps: median (range) | over {LATER:,} later than {base} |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (task, method), group in steps.items():
        values = np.array(list(group.values()))
        most = max(evaluations[-1][0] for evaluations in runs[task, method].values())
        numbers = [np.median(values), values.min(), values.max()]
        median, low, high = (f"{n:,.0f}" if np.isfinite(n) else f">{most:,}" for n in numbers)
        peers = steps.get((task, base), {})
        common = [name for name in group if name in peers and method != base]
        later = sum(group[name] > peers[name] + LATER for name in common)
        compared = f"{later} of {len(common)}" if common else ""
        learnt = f"{np.isfinite(values).sum()} of {len(values)}"
        lines.append(f"| {task} | {method} | {learnt} | {median} ({low} to {high}) | {compared} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", nargs="?", choices=STUDIES)
    parser.add_argument("--workers", type=int, default=2, help="on this machine (default: 2)")
    parser.add_argument("--cluster", help="address of a Dask scheduler, in place of --workers")
    parser.add_argument("--seeds", help="FIRST-LAST, in place of the study's own")
    parser.add_argument("--steps", type=int, help="of each run, in place of the study's own")
    parser.add_argument("--only", default="", metavar="REGEX", help="runs with such a name alone")
    parser.add_argument("--llm", default="offline", help="see selfalign.py (default: offline)")
    parser.add_argument("--model", default="", help="see selfalign.py")
    parser.add_argument("--collect", action="store_true", help="run nothing, write the tables")
    args = parser.parse_args()
    if not args.study:
        for name, (methods, rewards, seeds, values) in STUDIES.items():
            print(f"{name}: {', '.join(methods)}; first rewards {rewards}; seeds {seeds}; {values}")
        return
    first, _, last = (args.seeds or STUDIES[args.study][2]).partition("-")
    given = {"llm": args.llm, "model": args.model, **({"steps": args.steps} if args.steps else {})}
    jobs = jobs_of(args.study, range(int(first), int(last or first) + 1))
    jobs = [job._replace(values={**job.values, **given}) for job in jobs]
    jobs = [job for job in jobs if re.search(args.only, job.name)]
    if args.llm == "offline":  # the stand-in writes no code
        jobs = [job for job in jobs if job.method != "rewrite"]
    folder, failed = ROOT / "runs" / args.study, 0
    if not args.collect:
        from distributed import Client  # an optional extra

        here = dict(n_workers=args.workers, threads_per_worker=1, memory_limit=0)
        how = {"address": args.cluster} if args.cluster else {**here, "dashboard_address": None}
        with Client(**how) as client:
            failed = run_jobs(client, jobs, folder)
    collect(args.study, jobs, folder, RESULTS)
    if (RESULTS / f"{args.study}.csv").exists():
        print(table(RESULTS / f"{args.study}.csv"))
    sys.exit(f"{failed} runs failed; the same command tries them again" if failed else 0)


if __name__ == "__main__":
    main()
