"""The command line of selfalign.py: its flags, how a run begins and ends, and watching a policy."""

import argparse
import contextlib
import ctypes
import json
import math
import os
import signal
import socket
import sys
from pathlib import Path

import torch

from drqv2 import DrQV2
from envs import TASKS, PandaEnv
from llm import LLM, Answered, LLMError, Replay, ReplayError, choose_backend
from run import Run

REWARDS, OBSERVATIONS = ("selfalign", "rewrite", "fixed", "sparse"), ("state", "pixels")
PRECISIONS = ("float32", "bfloat16")
DEFAULTS = dict(task="touch", reward="selfalign", obs="state", precision="float32", seed=1, steps=60_000, device="cpu", llm="auto",
                model=os.environ.get("OPENAI_MODEL") or None, proposal=None, out=None, resume=None, play=None, gif=None, frames=None, episodes=5)


def parse_args(description: str) -> argparse.Namespace:
    """Every flag with its value; `given`, those that were named. Exits with one line for what cannot be or does nothing."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS)
    parser.add_argument("--task", choices=list(TASKS), help="default: touch")
    parser.add_argument("--reward", choices=REWARDS,
                        help="selfalign: the whole algorithm (default); rewrite: the LLM writes the reward anew "
                        "where its ranking disagrees or the robot gets no better; fixed: the LLM's first reward; sparse: 1 on success")
    parser.add_argument("--obs", choices=OBSERVATIONS, help="default: state")
    parser.add_argument("--precision", choices=PRECISIONS, help="with --obs pixels: of the convolutions (default: float32); bfloat16 is "
                        "faster where the processor has it")
    parser.add_argument("--seed", type=int, help="default: 1")
    parser.add_argument("--steps", type=int, help="environment steps at most (default: 60000)")
    parser.add_argument("--device", help="torch device, such as cpu (default) or cuda")
    parser.add_argument("--llm", metavar="auto|chat|offline|manual|replay:FILE",
                        help="auto (default): chat where OPENAI_API_KEY or OPENAI_BASE_URL is set, else offline")
    parser.add_argument("--model", help="the LLM's name at the service (default: OPENAI_MODEL of the environment)")
    parser.add_argument("--proposal", metavar="FILE", help="start from the reward in FILE (Python, or Markdown with a code "
                        "block) instead of asking the LLM for one")
    parser.add_argument("--out", help="folder of the run (default: runs/TASK-REWARD-SEED)")
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in a folder from its last checkpoint; beside it only "
                        "--steps, --device, --llm and --model can be given")
    parser.add_argument("--play", metavar="RUN", help="show the policy of a run's folder instead of training")
    parser.add_argument("--gif", metavar="FILE", help="with --play: save one moving picture instead of opening a window")
    parser.add_argument("--frames", metavar="FOLDER", help="with --play: save PNG files instead of opening a window")
    parser.add_argument("--episodes", type=int, help="with --play: how many (default: 5)")
    given = vars(parser.parse_args())
    args = argparse.Namespace(**{**DEFAULTS, **given})
    empty = [name for name in ("out", "resume", "play", "proposal", "gif", "frames", "model") if getattr(args, name) == ""]
    if empty:
        parser.error(f"--{empty[0]} is empty: name something, or leave it out")
    for mode, allowed in (("play", {"gif", "frames", "episodes"}), ("resume", {"steps", "device", "llm", "model"})):
        useless = set(given) - allowed - {mode} if mode in given else set()
        if useless:
            parser.error(f"--{min(useless)} does nothing beside --{mode}, which takes it from the run's folder: leave it out")
    useless = {"gif", "frames", "episodes"} & set(given) if "play" not in given else set()
    if useless:
        parser.error(f"--{min(useless)} does nothing without --play RUN: leave it out")
    if args.reward == "sparse" and {"proposal", "llm", "model"} & set(given):
        parser.error("--reward sparse has no R_θ and asks no LLM: leave --proposal, --llm and --model out")
    if args.gif and not args.gif.endswith(".gif"):
        parser.error(f"--gif {args.gif} must end in .gif")
    if args.obs == "state" and "precision" in given:
        parser.error("--precision is that of convolutions, and --obs state has none: leave it out")
    check(args, parser.error)
    args.given = given
    return args


def check(args, fail) -> None:
    """Calls fail with one line for values, of flags or of a run's settings, that cannot be used."""
    if args.task not in TASKS or args.reward not in REWARDS or args.obs not in OBSERVATIONS:
        fail(f"there is no run of {args.task!r} with {args.reward!r} from {args.obs!r}")
    if args.precision not in PRECISIONS:
        fail(f"there is no precision {args.precision!r}: choose one of {', '.join(PRECISIONS)}")
    texts = [args.llm, args.device, args.model or "", args.proposal or ""]
    if not all(isinstance(text, str) for text in texts):
        fail("the settings hold other kinds of values than a run's")
    if not (0 <= args.seed < 2 ** 63 and 1 <= args.steps <= 10 ** 8 and args.episodes >= 1):
        fail("--seed must be 0 or more and below 2^63, --steps 1 to 100 million, --episodes 1 or more")
    frames = 2 * args.steps * (84 * 84 * 3 if args.obs == "pixels" else 400) / 2 ** 30
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 ** 30 if hasattr(os, "sysconf") else math.inf
    if frames > memory:
        fail(f"--steps {args.steps} needs {frames:.0f} GB of memory for what is lived, and this machine has {memory:.0f}")
    try:
        torch.zeros(1, device=args.device).item()           # of "meta" there is no value
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        fail(f"--device {args.device!r} cannot be used: {str(error).splitlines()[0]}")


def start(args: argparse.Namespace) -> tuple[Run, LLM]:
    """The run that `args` ask for, begun or gone on with, and its LLM; `args` take a resumed run's settings.

    Exits with one line where there is no such run, no such LLM or nothing left to do.
    """
    run = finished = None
    if args.resume:
        run = Run(args.resume, None)
        vars(args).update({**run.settings, **args.given})
        check(args, lambda reason: sys.exit(f"{args.resume} cannot go on: {reason}"))
        finished = run.finished(args.steps)
        # One that was killed before it had written its episodes goes to `train`, which finds nothing to do, and so to their writing.
        if finished and ("steps" in args.given or (run.folder / "episodes.npz").exists()):
            print(f"{args.resume} is finished: {finished}")
            run.close()
            sys.exit()
    asks = not finished and (args.reward in ("selfalign", "rewrite") or args.reward == "fixed" and not args.proposal)
    try:
        backend, who = choose_backend(args.llm, args.model) if asks else (None, "none is asked")
    except LLMError as error:
        sys.exit(f"selfalign: {error}")
    if args.reward == "rewrite" and type(backend).__name__ == "StandIn":
        sys.exit("selfalign: --reward rewrite needs a language model, and the offline stand-in writes no code: set OPENAI_API_KEY or "
                 "OPENAI_BASE_URL, or take --llm manual")
    # What "auto" has chosen stays, so that a run goes on with the LLM that it began with, or says that it cannot.
    args.llm = {"Chat": "chat", "StandIn": "offline"}.get(type(backend).__name__, args.llm)
    settings = {name: getattr(args, name) for name in DEFAULTS if name not in ("resume", "play", "gif", "frames", "episodes")}
    if run:
        run.go_on(settings)
        if isinstance(backend, Replay):
            backend.position, run.answered = run.exchanges, []
    else:
        names = (f"runs/{args.task}-{args.reward}-{args.seed}{suffix}" for suffix in ["", *(f"-{i}" for i in range(2, 10_000))])
        run = Run(args.out or next(name for name in names if not Path(name).exists()), settings)
    task = TASKS[args.task]
    print(f"Task: {task.name}. {task.goal}\nReward: {args.reward}, observations: {args.obs}, seed {args.seed}. "
          f"Everything is kept in {run.folder}.\nLLM: {who}", flush=True)

    def stop(number, frame):
        if run.stopping:
            raise KeyboardInterrupt
        run.stopping = True
        print("\nStopping at the end of this episode. Once more stops at once, back at the last checkpoint.", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    if args.obs == "state":
        torch.set_num_threads(1)      # networks this small lose time to a second thread
    else:
        keep_memory()
    return run, LLM(Answered(run.answered, backend), run.exchange)


def second_core(device: str) -> bool:
    """Whether evaluations from states can have a process of their own: a copy of this one, which neither a GPU nor other systems allow.

    Images keep two threads of a CPU busy as it is.
    """
    return sys.platform == "linux" and torch.device(device).type == "cpu" and len(os.sched_getaffinity(0)) > 1


def keep_memory() -> None:
    """Lets glibc keep large blocks that are freed, where it is what allocates them.

    It hands them back to the system otherwise and gets them anew, page by page, which takes a fifth of an update from pixels.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2 ** 31 - 1)      # M_TRIM_THRESHOLD: never, as good as
        mallopt(-4, 0)                # M_MMAP_MAX: no block outside the heap


@contextlib.contextmanager
def ending(run: Run, llm: LLM):
    """What a run ends with, however it ends: its folder complete, and a word on what to do with it."""
    failure = None
    try:
        yield
    except (LLMError, ReplayError) as error:
        failure = f"{error}" + (f"\nEvery exchange is in {run.folder}/llm.jsonl." if llm.exchanges else "")
    except ChildProcessError as error:
        failure = f"{error} (by lack of memory?). Go on:  python selfalign.py --resume {run.folder}"
    except FloatingPointError as error:
        failure = f"{error}. The last checkpoint, from before, is kept. A reward of smaller numbers is the cure: --proposal FILE."
    except KeyboardInterrupt:
        print(f"\nStopped. Go on:  python selfalign.py --resume {run.folder}")
    finally:                                             # of an error that nobody foresaw as well
        folder = run.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if failure:
        sys.exit(f"\nselfalign: {failure}")
    if llm.exchanges:
        tokens = f", {llm.prompt_tokens:,} + {llm.completion_tokens:,} tokens, {llm.seconds:.0f} s" if llm.prompt_tokens else ""
        print(f"LLM: {llm.exchanges} exchange{'s' * (llm.exchanges > 1)}{tokens}.")
    if (folder / "policy.pt").exists():
        print(f"Watch it:  python selfalign.py --play {folder}")


def display_answers() -> bool:
    """Whether a window can be opened. On Linux PyBullet waits for ever for an X server that is gone, so ask it first."""
    host, _, number = os.environ.get("DISPLAY", "").rpartition(":")
    if sys.platform != "linux":
        return True
    number = number.partition(".")[0]
    local = host in ("", "unix")
    try:
        with socket.socket(socket.AF_UNIX if local else socket.AF_INET, socket.SOCK_STREAM) as server:
            server.settimeout(2)
            server.connect(f"/tmp/.X11-unix/X{number}" if local else (host, 6000 + int(number)))
        return True
    except (OSError, ValueError, OverflowError, TypeError):      # of names that are no display's
        return False


def load_policy(folder: str | Path, agent_settings: dict) -> tuple[PandaEnv, DrQV2]:
    """The environment and the policy of a run's folder. agent_settings: arguments of DrQV2 by kind of observation.

    Exits with one line where there is no policy to play.
    """
    try:
        settings = json.loads((Path(folder) / "settings.json").read_text())
        task, obs = settings["task"], settings["obs"]
        state = torch.load(Path(folder) / "policy.pt", map_location="cpu", weights_only=True)
        if task not in TASKS or obs not in agent_settings:
            raise ValueError(f"there is no task {task!r} with observations {obs!r}")
        env = PandaEnv(task, obs, render_mode="rgb_array")
        agent = DrQV2(env.observation_space.shape, env.action_space.shape,
                      precision=getattr(torch, settings.get("precision", "float32")), **agent_settings[obs])
        agent.greedy.load_state_dict(state)
        if not all(torch.isfinite(p).all() for p in agent.greedy.parameters()):
            raise ValueError("the policy holds numbers that are not finite")
    except Exception as error:                       # a damaged file makes json and torch raise almost anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        sys.exit(f"{folder} holds no policy to play ({reason}); name the folder of a run, such as one under runs/")
    return env, agent


def play(folder: str, agent_settings: dict, episodes: int, frames: str | None = None, gif: str | None = None) -> None:
    """Shows the policy in a run's folder in a window, or saves pictures: PNG files in the folder `frames`, or one moving GIF.

    agent_settings: arguments of DrQV2 by kind of observation. Exits with one line where there is nothing to play or no
    way to show it.
    """
    env, agent = load_policy(folder, agent_settings)
    if frames or gif:
        try:
            from PIL import Image
            Path(frames or gif).parent.mkdir(parents=True, exist_ok=True)
            if frames:
                Path(frames).mkdir(exist_ok=True)
        except ImportError:
            sys.exit('saving pictures needs Pillow: pip install ".[study]"')
        except OSError as error:
            sys.exit(f"cannot save pictures at {frames or gif}: {error.strerror}; choose another place")
    else:
        if not display_answers():
            sys.exit("there is no display to open a window on: add --gif FILE or --frames FOLDER to save pictures instead")
        env.close()
        env = PandaEnv(env.task, env.obs, render_mode="human")
    pictures = []
    try:
        for episode in range(episodes):
            obs, info = env.reset(seed=episode)
            truncated = False
            while not truncated:
                if frames or gif:
                    pictures.append(Image.fromarray(env.render()))
                if frames:
                    pictures[-1].save(Path(frames) / f"episode{episode}-{env.t:02d}.png")
                obs, _, _, truncated, info = env.step(agent.act(obs, 0, explore=False))
            print(f"episode {episode}: {'success' if info['success'] else 'no success'}", flush=True)
    except KeyboardInterrupt:
        print("Stopped.")
    env.close()
    if gif and pictures:
        pictures = [picture.resize((240, 240)).quantize(64) for picture in pictures[::2]]       # a few hundred kilobytes
        try:
            pictures[0].save(gif, save_all=True, append_images=pictures[1:], duration=100, loop=0)
        except OSError as error:
            sys.exit(f"cannot write {gif}: {error.strerror or error}; choose another place")
