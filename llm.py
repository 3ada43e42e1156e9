"""Asks a large language model (LLM), has unusable answers repaired, and keeps a transcript.

`LLM.ask` is the loop. After it come the three questions of the paper, the readers of the answers,
the transcript, and who answers. Needs requests, numpy and the texts in prompts/. A backend maps
chat messages to a `Reply`: `Chat` (an OpenAI-compatible service), `Manual` (a person), or a
function of your own:

    from llm import LLM, Reply, read_ranking

    llm = LLM(lambda messages: Reply("RANKING: 2 > 1 = 3"))
    groups = llm.ask("rank", "Which attempt is best?", lambda text: read_ranking(text, 3))
    assert groups == [[2], [1, 3]]
"""

import ast
import html
import itertools
import json
import math
import os
import random
import re
import string
import sys
import textwrap
import time
import unicodedata
from collections import Counter, namedtuple
from email.utils import mktime_tz, parsedate_tz
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import requests
from urllib3.exceptions import HTTPError

# The loop: ask, read, repair.

ATTEMPTS = 4  # the question and three repairs
NO_TEXT = "(no usable text)"  # stands in a conversation for an answer without text
Reply = namedtuple("Reply", "text prompt_tokens completion_tokens", defaults=(0, 0))


class LLMError(RuntimeError):
    """The LLM cannot be reached or gives nothing usable; the message names cause and cure."""


class Busy(RuntimeError):
    """Busy(fault, wait): the service fails for now; ask again after `wait` seconds or more."""


class ReplayError(RuntimeError):
    """A replayed run asks what its transcript does not answer."""


class UnusableReply(ValueError):
    """An answer cannot be used; the message goes back to the LLM."""


class LLM:
    """Asks a backend, has unusable answers repaired, and keeps a transcript.

    transcript: file of one JSON line per exchange, made at the first exchange. Questions that
    it holds are answered from it. replay: the transcript of another run, in the backend's place.
    Raises LLMError for a file that is no transcript.
    """

    def __init__(self, backend, transcript=None, replay=None, sleep=time.sleep):
        self.backend, self.transcript, self.replay, self.sleep = backend, transcript, replay, sleep
        self._asked = Counter()  # how often each conversation took place
        self._held, self._size, self._replayed = {}, 0, {}
        if transcript and Path(transcript).exists():
            self._held, self._size = _read_transcript(transcript, whole_lines=True)
        if replay:
            self._replayed, _ = _read_transcript(replay)

    def ask(self, kind: str, question: str, parse):
        """The parsed answer to `question`.

        parse: maps a text to a value, or raises ValueError, whose message goes back to the LLM.
        Raises LLMError if the service fails or ATTEMPTS answers in a row cannot be used.
        """
        messages = [{"role": "user", "content": question}]
        self._left = getattr(self.backend, "seconds", math.inf)
        for attempt in range(ATTEMPTS):
            reply = NO_TEXT
            try:
                reply = self._exchange(f"{kind}, repair" if attempt else kind, messages)
                return parse(reply)
            except ValueError as error:
                reason = str(error)
            messages += [
                {"role": "assistant", "content": reply},
                {"role": "user", "content": prompt("repair", error=reason)},
            ]
        raise LLMError(f"{ATTEMPTS} answers to '{kind}' cannot be used, the last because: {reason}")

    def _exchange(self, kind, messages) -> str:
        """The reply to a conversation, from a transcript or else from the backend."""
        talk = tuple(message["content"] for message in messages)
        turn = self._asked[talk]
        self._asked[talk] += 1
        held, replayed = self._held.get(talk, [])[turn:], self._replayed.get(talk, [])[turn:]
        if held and "error" in held[0] and not self.replay:
            held = []  # a resumed run asks again what failed
        if held or replayed:
            record = (held or replayed)[0]
        elif self.replay:
            why = "replay needs the same settings, CPU and library versions"
            raise ReplayError(f"{self.replay} does not answer this question ({kind}): {why}")
        else:
            started = time.monotonic()
            record = {"kind": kind, "prompt": talk[-1], **self._ask_backend(messages)}
            record["seconds"] = round(time.monotonic() - started, 3)
        if self.transcript and not held:
            Path(self.transcript).parent.mkdir(parents=True, exist_ok=True)
            with open(self.transcript, "ab") as file:
                file.truncate(self._size)  # a run that was killed may have left half a line
                self._size += file.write(json.dumps(record).encode() + b"\n")
        if "error" in record:
            raise LLMError(record["error"])
        if "unusable" in record:
            raise UnusableReply(record["unusable"])
        return record["reply"]

    def _ask_backend(self, messages) -> dict:
        """The outcome, after as many pauses as the question's time allows: models load slowly."""
        for retry in itertools.count():
            asked = time.monotonic()
            try:
                reply = self.backend(messages)._asdict()
                return {"reply": reply.pop("text"), **reply}
            except UnusableReply as error:
                return {"unusable": str(error)}
            except (LLMError, OSError, UnicodeDecodeError) as error:
                return {"error": str(error) or repr(error)}
            except Busy as busy:
                fault, wait = busy.args
            finally:
                self._left -= time.monotonic() - asked
            pause = max(wait, random.uniform(0.5, 1.0) * 2 ** min(retry, 6))
            self._left -= pause
            if self._left < 0:
                times = f"the LLM service failed {retry + 1} times, the last with {fault}; "
                return {"error": f"{times}a pause of {pause:.0f} s more takes too long"}
            print(f"  {fault}; next try in {pause:.0f} s", flush=True)
            self.sleep(pause)


# The paper's three questions: propose a reward, rank attempts, analyse what blocks the skill.

PROMPTS = Path(__file__).parent / "prompts"


def prompt(name: str, **values) -> str:
    """The text of prompts/NAME.txt, with each $placeholder that has a value replaced."""
    text = (PROMPTS / f"{name}.txt").read_text(encoding="utf-8")
    return string.Template(text).safe_substitute(values)


def propose_question(task, functions) -> str:
    """The prompt that asks for a reward. functions: names in numpy that it may use."""
    rules = prompt("rules", functions=", ".join(f"np.{name}" for name in functions))
    return prompt("propose", **_words(task), rules=rules)


def rank_question(task, trajectories, notes=None) -> str:
    """The prompt that asks to rank trajectories, (T, F) arrays, with a note on each."""
    shown = describe(task, trajectories, notes)
    return prompt("rank", **_words(task), count=len(trajectories), trajectories=shown)


def analyse_question(task, source, history, trajectories, notes, wrong, evaluations) -> str:
    """The prompt that asks what blocks the skill.

    source: of the reward, with its present θ. history: (step, cause, θ) of every change of θ.
    notes: a line on each trajectory. wrong: share of the LLM's pairs that R_θ orders otherwise.
    evaluations: (step, success rate).
    """
    changes = []
    for step, cause, theta in history:
        values = ", ".join(f"{name}={value:.3g}" for name, value in theta.items())
        changes.append(f"- {step:,} steps, {cause}: {values}")
    progress = ", ".join(f"{step:,}: {success:.0%}" for step, success in evaluations)
    shown = describe(task, trajectories, notes)
    facts = {"reward": source.strip(), "history": "\n".join(changes), "wrong": f"{wrong:.0%}"}
    return prompt("analyse", **_words(task), **facts, progress=progress, trajectories=shown)


def _words(task) -> dict:
    """What the prompts say of a task (see envs.py): the values of their placeholders."""
    features = []
    for name, feature in task.features.items():
        usual = f"[{feature.unit or 'no unit'}, mostly {feature.low:g} to {feature.high:g}]"
        features.append(f"- {name} {usual}: {feature.text}")
    words = {name: getattr(task, name) for name in ("goal", "robot", "details", "discount")}
    words.update(task=task.name, features="\n".join(features), rate=f"{1 / task.dt:g}")
    words["readings"] = prompt("readings").strip()
    words["horizon"] = f"{task.horizon} steps ({task.horizon * task.dt:g} s)"
    return words


def describe(task, trajectories, notes=None) -> str:
    """Trajectories, (T, F) arrays, as text, numbered from 1, each followed by its note.

    These are readings alone: nothing says whether an attempt succeeds or how far it gets.
    """
    texts = []
    for i, trajectory in enumerate(trajectories):
        lines = [f"Attempt {i + 1}:"]
        for (name, feature), x in zip(task.features.items(), trajectory.T, strict=True):
            span = max(1e-9, feature.high - feature.low)
            digits = max(3, 1 - math.floor(math.log10(span)))  # finer where readings are small
            lines.append(f"{name} {describe_readings(np.round(x, digits) + 0.0)}")
        texts.append("\n".join(lines + notes[i : i + 1] if notes else lines))
    return "\n\n".join(texts)


def describe_readings(x: np.ndarray) -> str:
    """The first reading of x (T,), the lowest and highest, the last, and when x is not 0.

    prompts/readings.txt explains the notation. It saves tokens: numbers cost one a character.
    """
    shown, last = {0: x[0]}, len(x) - 1
    for extreme in (x.min(), x.max()):
        near = np.abs(x - extreme) <= 0.1 * np.ptp(x)
        shown.setdefault(int(near.argmax()), extreme)
    shown[last], words = x[last], []
    for step, value in sorted(shown.items()):
        word = re.sub(r"^(-?)0\.", r"\1.", f"{value:.3g}")
        if not words or word != words[-1].partition("@")[0]:
            words.append(word if step in (0, last) else f"{word}@{step + 1}")
    on = np.flatnonzero(x) + 1
    if 0 < len(on) <= last:
        run = in_a_row(x != 0)
        end = int(run.argmax()) + 1
        words[-1] += ","
        words.append(f"on {on[0]}-{on[-1]}")
        if run.max() < len(on):
            words.append(f"for {len(on)}, longest {end - run.max() + 1}-{end}")
    return " ".join(words)


def in_a_row(held) -> np.ndarray:
    """For how many steps in a row `held`, (T,), has been true at each step."""
    steps = np.arange(1, len(held) + 1)
    return steps - np.maximum.accumulate(np.where(held, 0, steps))


# The three answers. What cannot be read with certainty is refused, and the LLM told why.

ODD = {0xFEFF: None, 0x200B: None, 0x0D: None, 0xA0: " ", 0x202F: " "}  # marks, hard spaces
# Words right before code or an object that is not the answer.
ASIDE = (
    r"(?i)\b(avoid|bad|wrong|not|never|don.t|previous|former|earlier|old|original|current|example"
    r"|alternative\w*|option|if)\b[^.!?;]{0,40}$|\bor\W*(\w+\s*)?$|\([^()]*$"
)


def read_code(text: str) -> str:
    """The code of an answer: all of it if it is Python, else its last block with a function."""
    text = text.translate(ODD)
    try:
        whole = any(isinstance(node, ast.FunctionDef) for node in ast.parse(text).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        whole = re.match(r"\s*(import |from \w+ import |\"\"\"|''')", text)  # a file with an error
    if whole:
        return textwrap.dedent(text).strip() + "\n"
    blocks = list(re.finditer(r"(?s)(?:(?:```+|~~~+)[^\n`]*\n)+(.*?)(?:```|~~~|\Z)", text))
    codes = [block for block in blocks if re.search(r"(?m)^[ \t]*def ", block[1])]
    bare = re.search(r"(?ms)^(def .*?)(?=^[^\s)\]}#d]|\Z)", text)
    if bare and (not codes or bare.start() < blocks[0].start()):
        codes = [bare]
    if not codes:
        raise UnusableReply("there is no function in the answer: write it in a ```python block")
    if len(codes) > 1 and re.search(ASIDE, text[codes[-2].end() : codes[-1].start(1)]):
        raise UnusableReply("there are several functions: give one")
    return textwrap.dedent(codes[-1][1]).strip() + "\n"


REVERSE = r"(?<![a-z])(worst|lowest|least|poorest|weakest|bad|bottom)[\W_]+(to|first|best|highest"
REVERSE += r"|most|strongest|top|on the left)(?![a-z])|(ascending|increasing|reversed?)(?![a-z])"
ATTEMPT = (
    r"\b(attempts?|trajector(y|ies)|episodes?|no\.?|number|[a-zτ](?=_?\d))[ _#*]*(?=[\[({]*\d)"
)
# What rankings are written with and surrounded by, in lower case, and how it is read.
NOTATION = (
    (REVERSE, "⇅"),
    (  # JSON groups, such as [[3], [], [1, 2]]
        r"(?<=ranking)\W{1,9}(\[\s*\[[\d\s,\"'[\]]*\]\s*\])",
        lambda groups: ": " + re.sub(r"\]\s*,\s*\[", ">", groups[1]).replace(",", "="),
    ),
    (r"\\l?not(?![a-z])", "!"),
    (r"\\(succ|gt)(?![a-z])|[≻≫]|>>+", ">"),
    (r"\\(sim|approx|equiv|simeq)(?![a-z])|[~∼≈≃≅≡]|==+", "="),
    (r"\\[a-z]+|\\.", " "),  # other LaTeX
    (r"([^\d\s])\s*\n[ \t]*>", r"\1\n"),  # a quotation
    (r"<[a-z/|!][^<>\n]{0,80}>", " "),  # a tag or stop token
    (ATTEMPT, " "),
    (r"\((?=[^()⇅]*[^\W\d_])[^()⇅]*\)", " "),  # a remark
    (r"\[(?=[^][⇅]*[^\W\d_])[^][⇅]*\]", " "),
)
MARKUP = (r"[][(){}*_`$\\\"'#&|\u200b\ufe0f\u20e3]", " ")
LABEL = r"(?m)^[^\w\n]*((final|my|the|overall|corrected) +)*ranking( +is)?(?=\s*[:=>⇅\d-]|\s*$)"
CHAIN = re.compile(r"(?<![^\s<>=:])[^\s<>=:]+(?:\s*[<>=]+\s*[^\s<>=:]+)+")
NUMBER = r"(?<![\w.-])([0-9]{1,6})(?!\w|\.[0-9])"


def read_ranking(text: str, count: int) -> list[list[int]]:
    """The ranking of 1 to `count` in an answer: groups of equals, best first: [[3], [1, 2], [4]].

    It is the last chain such as `3 > 1 = 2 > 4` that holds each number once, after the last line
    that begins with RANKING if there is one. Raises UnusableReply, also if another chain after that
    line contradicts it.
    """
    text = unicodedata.normalize("NFKC", html.unescape(text)).lower()
    for pattern, plain in (*NOTATION, *NOTATION, MARKUP):  # twice: remarks may be nested
        text = re.sub(pattern, plain, text)
    begin = max((label.end() for label in re.finditer(LABEL, text)), default=0)
    everyone = [str(label) for label in range(1, count + 1)]
    numbers, chosen = [], None
    for chain in CHAIN.finditer(text, begin):
        numbers = [number.strip(".,;!?。") for number in re.split(r"[<>=\s]+", chain[0])]
        if sorted(numbers) == sorted(everyone):
            chosen = chain
    if not chosen:
        missing = ", ".join(Counter(everyone) - Counter(numbers)) or "none"
        odd = ", ".join(Counter(numbers) - Counter(everyone))[:99] or "none"
        raise UnusableReply(
            'end with a line such as "RANKING: 2 > 4 = 1 > 3" that holds each number from 1 to '
            f"{count} once; missing: {missing}; unknown or repeated: {odd}"
        )
    start = chosen.start()
    near = text[max(0, (begin or start) - 120) : start] + text[start:].split("\n")[0]
    if "⇅" in near or set(re.findall("[<>=]+", chosen[0])) - {">", "="}:
        raise UnusableReply("rank from best to worst, with > for better and = for equal alone")
    groups = [re.findall("[0-9]+", group) for group in chosen[0].split(">")]
    place = {number: i for i, group in enumerate(groups) for number in group}
    for one, sign, other in re.findall(rf"{NUMBER}\s*([<>=]+)\s*(?={NUMBER})", text[begin:]):
        known = one in place and other in place
        if known and "=><"[np.sign(place[other] - place[one])] not in sign:
            raise UnusableReply(f"{one} {sign} {other} contradicts the rest: give one RANKING")
    return [[int(number) for number in group] for group in groups]


def read_analysis(text: str, params: dict) -> tuple[str, dict]:
    """(what blocks the skill, new values by name) from the last JSON object with "params".

    params: the present values. A positive one stays positive. Raises UnusableReply.
    """
    text, found, end = text.translate(ODD), [], 0
    decoder = json.JSONDecoder(strict=False, object_pairs_hook=_each_once)
    while (start := text.find("{", end)) >= 0:
        before, depth = text[end:start], 0
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            at = getattr(error, "pos", start)
            value = f"{error}, after {text[max(0, at - 40) : at]!r}"
            for bracket in re.finditer("[{}]|$", text[start:]):  # skip what is inside
                depth += {"{": 1, "}": -1}.get(bracket[0], 0)
                end = start + bracket.end()
                if depth == 0:
                    break
        if "params" in text[start:end]:
            found.append((before, value, end))
    before, answer, end = found[-1] if found else ("", {}, 0)
    if isinstance(answer, str):
        raise UnusableReply(f"the last JSON object cannot be read: {answer}")
    changes = answer.get("params")
    if not isinstance(changes, dict) or re.search(r"params\W{0,4}[:=]", text[end:]):
        raise UnusableReply('end with one JSON object with "params": {"name": number}')
    aside = not changes or not before.strip(" \n,") or re.search(ASIDE, before)
    if aside and any(draft != answer for _, draft, _ in found):
        raise UnusableReply('there are several objects with "params": give one')
    for name, value in changes.items():
        if name not in params:
            raise UnusableReply(f"{name} is not a parameter; there are {', '.join(params)}")
        if type(value) not in (int, float) or not abs(value) < 1e9:
            raise UnusableReply(f"{name} must be a number below 1e9, not {value!r:.40}")
        if params[name] > 0 and value <= 0:
            raise UnusableReply(f"{name} is a positive parameter: it cannot become {value:g}")
    blocked_by = re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", str(answer.get("blocked_by", "")))
    return blocked_by.strip(), {name: float(value) for name, value in changes.items()}


def _each_once(pairs) -> dict:
    """A JSON object's names and values as a dict. Raises ValueError for a name that comes twice."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"a name comes twice in {', '.join(name for name, _ in pairs)}")
    return dict(pairs)


# The transcript: a cache of exchanges.


def _read_transcript(path, whole_lines=False) -> tuple[dict, int]:
    """({texts of a conversation: its records in order}, size of the file's whole lines)."""
    found, talk, answer = {}, (), ""
    try:
        data = Path(path).read_bytes()
        size = data.rfind(b"\n") + 1
        lines = data[: size if whole_lines else None].decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise LLMError(f"the transcript {path} cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            outcome = record.get("reply", record.get("unusable", record.get("error")))
            "".join([record["kind"], record["prompt"], outcome])  # three texts
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            if number == len(lines):  # the end, or half a line of a run that was killed
                break
            raise LLMError(f"{path}, line {number}, is no exchange with an LLM") from None
        talk = (*talk, answer) if record["kind"].endswith(", repair") else ()
        talk, answer = (*talk, record["prompt"]), record.get("reply", NO_TEXT)
        records = found.setdefault(talk, [])
        if records and "error" in records[-1]:  # the run was resumed, and asked again
            records.pop()
        records.append(record)
    return found, size


# Who answers: a person or a service.


class Manual:
    """A person, or any chat window: shows the prompt and reads the pasted answer."""

    words = "you: paste the answers at the prompt"

    def __call__(self, messages: list[dict]) -> Reply:
        print(f"\n{'=' * 30} prompt {'=' * 30}\n{messages[-1]['content']}\n{'=' * 68}")
        print("Paste the answer, then a line that holds only END:", flush=True)
        lines = []
        for line in sys.stdin:
            if line.strip() == "END":
                break
            lines.append(line)
        else:
            if not lines:
                raise LLMError("the input has ended: --llm manual needs a terminal")
        return Reply("".join(lines).rstrip("\n"))


def service_is_set() -> bool:
    """Whether the environment names a service or a key: --llm auto then takes `Chat`."""
    return bool(os.environ.get("OPENAI_API_KEY") or os.environ.get("OPENAI_BASE_URL"))


REQUEST_SECONDS = 600  # a model that thinks about 48 attempts is silent for minutes
MAX_BYTES = 1_000_000  # of one HTTP reply
# A character of a key as it is, or as JSON, HTML and URLs spell it.
SPELT = r"(?:\\{0,8}%s|(?:\\{1,8}(?:u00|x)|%%)%02x|(?:&|\\{1,8}u0026)#(?:x0{0,2}%02x|0{0,2}%d);?)"


class Chat:
    """An OpenAI-compatible service: a call is one POST to OPENAI_BASE_URL/chat/completions.

    options: more fields of every request, such as {"max_tokens": 4096}. seconds: the time for one
    question with its repairs and pauses. The key, OPENAI_API_KEY, stands in the header alone.
    """

    def __init__(self, model: str | None, options: dict | None = None, seconds: float = 1200):
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        base = os.environ.get("OPENAI_BASE_URL", "").strip() or "https://api.openai.com/v1"
        if not model:
            raise LLMError("no model is named: add --model NAME, or --llm offline for the stand-in")
        if not service_is_set():
            raise LLMError("no service is named: set OPENAI_API_KEY or OPENAI_BASE_URL")
        if not key.isascii() or not key.isprintable():
            raise LLMError("OPENAI_API_KEY holds characters that no key has: set it again")
        if not base.startswith(("http://", "https://")):
            raise LLMError("OPENAI_BASE_URL is no address such as http://localhost:11434/v1")
        self.fields, self.seconds = {**(options or {}), "model": model}, seconds
        url = urlsplit(base)
        path = url.path.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        host = url.netloc.rpartition("@")[2]
        self.url = url._replace(netloc=host, path=path, fragment="").geturl()
        self.words = f"{model} at {url.scheme}://{host}{path}"
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        if key and "api-version=" in url.query:  # Azure's classic addresses
            self.headers["api-key"] = key
        user, password = requests.utils.get_auth_from_url(base)
        self.auth = (user, password) if user else lambda request: request  # no key from a .netrc
        spelt = []
        for secret in (key, password):
            if len(secret) > 6:  # a shorter one is a placeholder, such as "ollama"
                spelt.append("".join(SPELT % (re.escape(c), *[ord(c)] * 3) for c in secret))
        self.secret = re.compile("(?i)" + ("|".join(spelt) or "(?!)"))

    def __call__(self, messages: list[dict]) -> Reply:
        print(f"  Waiting for {self.words} ...", flush=True)
        body, end = b"", time.monotonic() + REQUEST_SECONDS
        how = {"stream": True, "timeout": (10, REQUEST_SECONDS), "allow_redirects": False}
        how |= {"json": {**self.fields, "messages": messages}, "auth": self.auth}
        try:
            with requests.post(self.url, headers=self.headers, **how) as response:
                for chunk in response.iter_content(512):
                    body += chunk
                    if len(body) > MAX_BYTES or time.monotonic() > end:
                        raise TimeoutError("the answer does not end")
        except (OSError, ValueError, HTTPError) as error:
            words = self.secret.sub("[key]", str(error)).rpartition(": ")[2].strip("'\")> ")[:300]
            fault = f"{type(error).__name__} at {self.words}: {words}"
            wrong = re.search("(?i)certificate|wrong.version|record.layer", str(error))
            if wrong or isinstance(error, ValueError):
                raise LLMError(f"{fault}; check OPENAI_BASE_URL and the proxies") from None
            raise Busy(f"{fault} (is it running?)", 0) from None
        text = self.secret.sub("[key]", body.decode(errors="replace"))
        return _read_reply(response.status_code, response.headers.get("Retry-After", ""), text)


# The marks that end a model's thoughts, and how an answer may end (finish_reason).
THOUGHT = r"</think(?:ing)?>|</thought>|\[/THINK\]|◁/think▷|<\|channel\|>final<\|message\|>"
NORMAL = "|stop|eos|eos_token|end|end_turn|stop_sequence|completed?|tool_calls|function_call"


def _read_reply(status: int, header: str, text: str) -> Reply:
    """The Reply in what a service sent. Raises UnusableReply, Busy or LLMError."""
    body = _object(text)
    choice = _object(body.get("choices"))
    error = body.get("error") or choice.get("error")
    if status != 200 or error or "choices" not in body:
        raise _fault(status, header, error if "choices" in body else body or text, error)
    message, usage = _object(choice.get("message")), _object(body.get("usage"))
    content = message.get("content") or ""
    if isinstance(content, list):
        parts = [_object(part) for part in content]  # of other types: thoughts
        texts = [p.get("text") for p in parts if p.get("type", "text") in ("text", "output_text")]
        content = "".join(str(text or "") for text in texts)
    answer = re.split(THOUGHT, str(content))[-1].strip()
    end = str(choice.get("finish_reason") or "").lower()
    if re.search("length|max|limit|incomplete", end):
        raise UnusableReply("the answer was cut off, because it is too long: be briefer")
    if re.search("filter|safety|sensitive|block|prohibit|recitation|refus|guard", end):
        raise UnusableReply("the service's content filter withheld the answer")
    if not re.fullmatch(NORMAL, end):
        raise Busy(f"the service ended its answer with {end!r}", 0)
    if not answer or answer.startswith("<think>"):
        raise UnusableReply("the answer was empty but for thoughts or a refusal: write it out")
    return Reply(answer, usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0))


# Words of services: the prompt is too long, the money is spent, a pause is asked for.
TOO_LONG = r"""(?ix) ^413 | context.{0,12}(length|size|window) | too\ many\ (input\ )?tokens
    | reduce\ the\ length
    | (prompt|request|input|content|messages?) [_ ] ((is|are)[_ ])? too [_ ] (long|large)"""
CURES = {
    401: "set OPENAI_API_KEY to a valid key",
    403: "set OPENAI_API_KEY to a key with access to --model",
    404: "check --model, and OPENAI_BASE_URL, which often ends in /v1",
}
SPENT = r"(?i)insufficient|billing|current.?quota|balance|credit|payment|spend|arrear|欠费|余额"


def _fault(status: int, header: str, said, error) -> Exception:
    """The LLMError or Busy for what a service says, in JSON or a page, instead of an answer."""
    code = str(_object(error).get("code"))
    if status == 200 and re.fullmatch("[45][0-9]{2}", code):
        status = int(code)
    words = re.sub("<[^<>]*>", " ", json.dumps(said, ensure_ascii=False))
    fault = f"HTTP {status}, {' '.join(words.split())[:300]}"
    wait = _named_wait(header, words)
    page = isinstance(said, str) and said.strip()[:1] not in ("", "{")
    cure = CURES.get(status, "check --model, --llm-options and OPENAI_BASE_URL")
    if re.search(TOO_LONG, f"{status} {words}"):
        cure = "the prompt is too long: take a larger context, or fewer ranked (--ranked)"
    elif status == 402 or (status in (200, 429) and re.search(SPENT, words) and not wait):
        cure = "the quota is used up: the account has to be paid for"
    elif status == 200 and page:
        cure = """check OPENAI_BASE_URL, or add --llm-options '{"stream": false}'"""
    elif status in (200, 408, 409, 425, 429, 498) or status >= 500:
        return Busy(fault, wait)
    return LLMError(f"the LLM service refused: {fault}; {cure}")


WAIT = r"""(?ix)
    (retry.?(delay|after|in)? | again\ (in|after) | wait(\ for)? | estimated_time) (_seconds)?
    ["':=\s]{0,5} (?P<wait> (\d+(\.\d+)? \s{0,3} (ms|[hms])? [a-z]{0,8} \s{0,3}){1,4})"""


def _named_wait(header: str, text: str) -> float:
    """Seconds that a service asks to wait, in its Retry-After or in its words; 0 if it does not."""
    date = parsedate_tz(header)
    waits = [mktime_tz(date) - time.time() if date else 0.0]
    scale = {"ms": 0.001, "mi": 60, "m": 60, "h": 3600}
    for named in re.finditer(WAIT, f"retry {header}; {text}"):
        parts = re.findall(r"(\d+(?:\.\d+)?)\s*(ms|mi|h|m)?", named["wait"])
        waits.append(sum(float(number) * scale.get(unit, 1) for number, unit in parts))
    return max(0.0, *waits)


def _object(value) -> dict:
    """The JSON object that `value` is, or is the text of, or begins with; else {}."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        pass
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, dict) else {}
