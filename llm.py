"""Everything between the loop and a large language model: asking, reading answers, keeping a transcript.

Needs requests and knows no RL. The prompts are the text files in prompts/.

    llm = LLM(Chat(model="..."), record=print)               # any OpenAI-compatible /chat/completions
    groups = llm.ask("rank", prompt("rank", count=4, ...), parse=lambda text: read_ranking(text, 4))

A backend maps a list of chat messages to a `Reply`: `Chat` (HTTP), `Manual` (a person, or any chat window), `Replay` (the
transcript of an earlier run); a scripted stand-in is in standin.py.
"""

import itertools
import json
import os
import random
import re
import string
import textwrap
import threading
import time
from collections import Counter, namedtuple
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import requests

PROMPTS = Path(__file__).parent / "prompts"
ATTEMPTS = 4                      # how often one question is put before its answers are given up
CONNECT_TIMEOUT, READ_TIMEOUT = 10, 600         # s; a model that thinks about 48 attempts is silent for minutes
TOTAL_TIMEOUT = 600               # of one request, so that a reply which only trickles ends too, s
QUESTION_TIMEOUT = 1200           # of a question with all its requests and waits, s
RETRIES, MAX_WAIT = 5, 120        # of one request; the longest wait between two that is accepted, s
MAX_BYTES = 1_000_000             # of one HTTP reply
MAX_CHARS = 100_000               # of one answer
LASTING = (                       # what no retry helps: words of the exception, then the cure
    ("wrong_version_number|record layer failure", "the server does not speak TLS there: write http:// in OPENAI_BASE_URL"),
    ("certificate", "the server's certificate is not trusted: set REQUESTS_CA_BUNDLE to the file of the authority that signed it"),
    ("CA certificate bundle", "the file that REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE names is not there"),
    ("SOCKS", "a SOCKS proxy is set, which needs one more package: pip install pysocks"),
    ("proxy URL|InvalidProxyURL|Proxy URL", "the proxy in HTTPS_PROXY, HTTP_PROXY or ALL_PROXY is not an address"),
    ("InvalidURL|MissingSchema|InvalidSchema|LocationParseError|LocationValueError|UnicodeError",
     "OPENAI_BASE_URL is not an address; one reads http://localhost:11434/v1"))
PASSING = (                       # what may pass
    ("timed out|Timeout", "no complete answer in time"), ("ProxyError", "no connection through the proxy"),
    ("ProtocolError|Chunk|IncompleteRead|ConnectionReset|broken|aborted", "the connection broke off in mid-reply"),
    ("ConnectionError|SSLError|NewConnection|MaxRetry", "no connection (is the server running?)"))

REPLAYS = ("A transcript repeats its run with the settings, the machine and the libraries of that run; elsewhere numbers differ in "
           "their last digits, and soon in the words of a question")

Reply = namedtuple("Reply", "text prompt_tokens completion_tokens", defaults=(0, 0))


class LLMError(RuntimeError):
    """The LLM cannot be reached or gave nothing usable; the message names the cause and the cure."""


class ReplayError(RuntimeError):
    """A replayed run asks what its transcript does not answer: it is another run by now, and ends."""


class UnusableReply(ValueError):
    """One answer cannot be used; the message goes back to the LLM."""


def prompt(name: str, **values) -> str:
    """The text of prompts/NAME.txt with each $placeholder that has a value replaced; any other $ stays."""
    try:
        text = (PROMPTS / f"{name}.txt").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LLMError(f"the prompt {PROMPTS / name}.txt cannot be read: {error}") from None
    return string.Template(text).safe_substitute(values)


class LLM:
    """Puts questions to a backend, and again where an answer cannot be used.

    record: is called with every exchange as it happens, a dict of kind, prompt, reply (or why there is none),
    tokens and seconds; these dicts, a line of JSON each, are the transcript that `Replay` reads.
    """

    def __init__(self, backend: Callable[[list[dict]], Reply], record: Callable[[dict], None]):
        self.backend, self.record = backend, record
        self.exchanges = self.prompt_tokens = self.completion_tokens = 0
        self.seconds = 0.0

    def ask(self, kind: str, question: str, parse: Callable[[str], Any]) -> Any:
        """The parsed answer to `question`.

        parse: maps the reply's text to a value, or raises ValueError, whose message is shown to the LLM in the
        prompt "repair". Raises LLMError when the backend fails or ATTEMPTS answers in a row are unusable.
        """
        messages = [{"role": "user", "content": question}]
        for attempt in range(ATTEMPTS):
            text = "(no usable text)"
            try:
                text = self._exchange(kind if attempt == 0 else f"{kind}, repair", messages)
            except UnusableReply as error:
                reason = str(error)
            else:
                try:
                    if len(text) > MAX_CHARS:
                        raise UnusableReply(f"the answer is longer than {MAX_CHARS:,} characters: be briefer")
                    return parse(text)
                except ValueError as error:
                    reason = str(error)
            messages += [{"role": "assistant", "content": text[:MAX_CHARS]},
                         {"role": "user", "content": prompt("repair", error=reason)}]
        raise LLMError(f"no usable answer to the question '{kind}' in {ATTEMPTS} attempts, the last because: {reason}")

    def _exchange(self, kind, messages):
        started, fault = time.monotonic(), None
        try:
            reply = self.backend(messages)
            outcome = {"reply": reply.text, "prompt_tokens": reply.prompt_tokens,
                       "completion_tokens": reply.completion_tokens}
            self.prompt_tokens += reply.prompt_tokens
            self.completion_tokens += reply.completion_tokens
        except (UnusableReply, LLMError) as error:
            outcome, fault = {"unusable" if isinstance(error, UnusableReply) else "error": str(error)}, error
        seconds = round(time.monotonic() - started, 3)
        self.exchanges += 1
        self.seconds += seconds
        self.record({"kind": kind, "prompt": messages[-1]["content"], **outcome, "seconds": seconds})
        if fault:
            raise fault
        return reply.text


class Chat:
    """An OpenAI-compatible server: POST {base_url}/chat/completions.

    The address comes from OPENAI_BASE_URL (default: OpenAI's), the key from OPENAI_API_KEY (none is fine for a local
    server) and appears nowhere else. Only `model` and `messages` are sent: other fields are not accepted everywhere.
    """

    def __init__(self, model: str | None):
        if not model:
            raise LLMError("no model is named: add --model NAME (with Ollama, one that `ollama list` shows)")
        self.model, self.key = model, os.environ.get("OPENAI_API_KEY", "").strip()
        base = os.environ.get("OPENAI_BASE_URL", "").strip() or "https://api.openai.com/v1"
        self.url = base.rstrip("/") + "/chat/completions"
        if not self.url.startswith(("http://", "https://")):
            raise LLMError("OPENAI_BASE_URL must start with http:// or https://, for example http://localhost:11434/v1")
        self.shown_url = re.sub(r"//.*@", "//", self.url).partition("?")[0]      # without secrets that an address may hold
        self.question, self.deadline = None, 0.0
        if not self.key.isascii() or not self.key.isprintable():
            raise LLMError("OPENAI_API_KEY holds characters that no key has: set it again")

    def __call__(self, messages: list[dict]) -> Reply:
        if messages[0] != self.question:             # otherwise another attempt at the same
            self.question, self.deadline = messages[0], time.monotonic() + QUESTION_TIMEOUT
        print(f"  Waiting for {self.model} at {self.shown_url}, {QUESTION_TIMEOUT // 60} minutes at most ...", flush=True)
        wait = None
        for retry in range(RETRIES + 1):
            try:
                status, headers, body = self._post({"model": self.model, "messages": messages})
            except LLMError:
                raise
            except Exception as error:               # whatever a request ends with is a failed request
                fault, wait = _fault(error), None
            else:
                if status == 200:
                    return self._read(body)
                fault, wait = f"HTTP {status}: {_error_message(body, self._clean)}", _retry_after(headers.get("Retry-After"))
                cure = {400: "check --model and that the server speaks the chat completions API",
                        401: "set OPENAI_API_KEY to a valid key",
                        403: "set OPENAI_API_KEY to a key with access to --model",
                        404: "check --model and that OPENAI_BASE_URL ends where /chat/completions follows, often in /v1"}
                if status in cure:
                    raise LLMError(f"the LLM service refused: {fault}; {cure[status]}")
                if status not in (408, 409, 425, 429) and status < 500:
                    raise LLMError(f"the LLM service answered {fault}; check OPENAI_BASE_URL")
            # Back-off with full jitter, unless the server names the time.
            pause = wait if wait is not None else random.uniform(0.5, 1.0) * 2 ** retry
            if pause > MAX_WAIT or time.monotonic() + pause > self.deadline or retry == RETRIES:
                break
            time.sleep(pause)
        waits = f", which asks to wait {wait:.0f} s" if wait is not None and wait > MAX_WAIT else ""
        raise LLMError(f"the LLM service failed {retry + 1} times, the last with {fault}{waits}; check that "
                       f"{self.shown_url} can be reached, or go on later")

    def _post(self, payload):
        """(status, headers, body) of one request, bounded in time; raises what `_request` raises."""
        outcome, given_up = [], threading.Event()

        def request():
            try:
                outcome.append(self._request(payload, given_up))
            except Exception as error:
                outcome.append(error)

        # requests' time-outs start afresh with each byte; only from outside can a reply be ended that trickles.
        thread = threading.Thread(target=request, daemon=True)
        thread.start()
        thread.join(max(0.0, min(TOTAL_TIMEOUT, self.deadline - time.monotonic())))
        given_up.set()
        if not outcome:
            raise requests.exceptions.ReadTimeout()
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    def _request(self, payload, given_up):
        def authorise(request):          # as `auth`, so that a .netrc file cannot put another key in its place
            if self.key:
                request.headers["Authorization"] = f"Bearer {self.key}"
            return request

        body = bytearray()
        # Nothing is compressed, so that what is read is what is kept; a redirect is not followed, nor is its body read.
        with _Session() as session, session.post(
                self.url, json=payload, auth=authorise, stream=True, headers={"Accept-Encoding": "identity"},
                timeout=(CONNECT_TIMEOUT, READ_TIMEOUT)) as response:
            for chunk in response.raw.stream(65536, decode_content=False):
                body += chunk
                if len(body) > MAX_BYTES:
                    raise LLMError(f"the LLM service sent a reply larger than {MAX_BYTES:,} bytes; "
                                   "check OPENAI_BASE_URL")
                if given_up.is_set():
                    break
            return response.status_code, response.headers, bytes(body)

    def _read(self, body):
        """The Reply in the JSON of a successful answer."""
        try:
            answer = json.loads(body)
            choice = answer["choices"][0]
            text = choice["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise UnusableReply(f"the service sent no chat completion but: {_error_message(body, self._clean)!r}") from None
        if choice.get("finish_reason") == "length":
            raise UnusableReply("the answer was cut off because it was too long: be briefer")
        if choice.get("finish_reason") == "content_filter":
            raise UnusableReply("the answer was withheld by the service's content filter: word it differently")
        if isinstance(text, list):       # some servers send parts
            text = "".join(str(part.get("text") or "") for part in text if isinstance(part, dict))
        text = text.rpartition("</think>")[2].strip() if isinstance(text, str) else ""     # after a model's thoughts
        if not text:
            raise UnusableReply("the answer was empty")
        usage = answer.get("usage") if isinstance(answer.get("usage"), dict) else {}
        tokens = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        return Reply(self._clean(text), *(n if isinstance(n, int) else 0 for n in tokens))

    def _clean(self, text):
        # A local server's placeholder, such as "x" or "ollama", is no secret, and part of ordinary text.
        return text.replace(self.key, "[key]") if len(self.key) >= 12 else text


class _Session(requests.Session):
    """Without redirects, whose Location requests would read even where it is told not to follow."""

    def get_redirect_target(self, response):
        return None


def _fault(error):
    """What to call an exception of a request; raises LLMError for one that no retry helps."""
    kinds = " ".join(kind.__name__ for kind in type(error).__mro__)
    for words, cure in LASTING:
        if re.search(words, f"{kinds} {error}", re.IGNORECASE):
            raise LLMError(f"the LLM service cannot be reached: {cure}") from None
    return next((fault for words, fault in PASSING if re.search(words, f"{kinds} {error}", re.IGNORECASE)),
                f"a reply that breaks HTTP's rules ({type(error).__name__})")


def _error_message(body, clean):
    """What an error reply says, in one short line, without the key, which JSON may have escaped."""
    text = body[:10_000].decode(errors="replace")
    try:
        answer = json.loads(text)
        error = answer["error"] if isinstance(answer, dict) and "error" in answer else answer
        text = error if isinstance(error, str) else str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, RecursionError):
        text = re.sub(r"<[^<>]*>", " ", text)                # an HTML page
    return " ".join(clean(text).split())[:200] or "(empty)"


def _retry_after(value):
    """Seconds to wait by a Retry-After header, in either of its forms; None without one."""
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError, IndexError, AttributeError):
            return None
    return max(0.0, seconds) if seconds == seconds else None


class Manual:
    """A person at the terminal, or any chat window: prints the prompt and reads the pasted answer."""

    def __call__(self, messages: list[dict]) -> Reply:
        print(f"\n{'=' * 30} prompt {'=' * 30}\n{messages[-1]['content']}\n{'=' * 68}")
        print("Paste the answer, then a line that holds only END:", flush=True)
        lines = []
        while True:
            try:
                line = input()
            except EOFError:
                if not lines:
                    raise LLMError("no answer: the input has ended; --llm manual needs a terminal") from None
                break
            if line.strip() == "END":
                break
            lines.append(line)
        return Reply("\n".join(lines))


class Replay:
    """Answers from the transcript of an earlier run, as long as the same questions are asked in the same order.

    Raises ReplayError once they are others, LLMError where the transcript has one.
    """

    def __init__(self, path: str | Path):
        self.records, self.path, self.position = [], path, 0
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, ValueError) as error:
            raise LLMError(f"{path} cannot be replayed: {error}") from None
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError):
                record = {}
            outcomes = [record.get(kind) for kind in ("reply", "unusable", "error")] if isinstance(record, dict) else []
            if record is not None and not (any(isinstance(outcome, str) for outcome in outcomes) and isinstance(record.get("prompt"), str)):
                raise LLMError(f"{path} cannot be replayed: line {number} holds no question with its outcome")
            self.records += [record] if record else []

    def __call__(self, messages: list[dict]) -> Reply:
        asked = messages[-1]["content"]
        if self.position >= len(self.records):
            raise ReplayError(f"the replay no longer follows {self.path}: that ends after {self.position} exchanges. {REPLAYS}")
        record, self.position = self.records[self.position], self.position + 1
        if asked != record["prompt"]:
            pairs = zip((asked + "\n").splitlines(), (record["prompt"] + "\n").splitlines())
            now, then = next((pair for pair in pairs if pair[0] != pair[1]), ("(another length)", "(another length)"))
            raise ReplayError(f"the replay no longer follows {self.path} in exchange {self.position}: the question reads "
                              f"{now.strip()[:80]!r}, in the transcript {then.strip()[:80]!r}. {REPLAYS}")
        if isinstance(record.get("reply"), str):
            return _reply(record)
        if isinstance(record.get("unusable"), str):
            raise UnusableReply(record["unusable"])
        raise LLMError(record["error"])


def _reply(record):
    """The Reply that a line of a transcript holds."""
    tokens = [record.get(name) for name in ("prompt_tokens", "completion_tokens")]
    return Reply(record["reply"], *(n if type(n) is int else 0 for n in tokens))


class Answered:
    """A backend in front of another: what a run cut short was answered after its last checkpoint is not asked again."""

    def __init__(self, lines: list[str], backend: Callable[[list[dict]], Reply]):
        self.records, self.backend = [], backend
        for line in lines:
            try:
                self.records.append(json.loads(line))
            except (ValueError, RecursionError):     # the line at which the run was cut short
                break

    def __call__(self, messages: list[dict]) -> Reply:
        record = self.records.pop(0) if self.records else None
        if isinstance(record, dict) and record.get("prompt") == messages[-1]["content"] and isinstance(record.get("reply"), str):
            return _reply(record)
        self.records = []
        return self.backend(messages)


def choose_backend(kind: str, model: str | None) -> tuple[Callable, str]:
    """(the backend behind --llm, the words that name it on the screen). Raises LLMError for one that cannot be used."""
    chosen = kind
    if kind == "auto":
        chosen = "chat" if os.environ.get("OPENAI_API_KEY") or os.environ.get("OPENAI_BASE_URL") else "offline"
    if chosen == "chat":
        backend = Chat(model)
        return backend, f"{backend.model} at {backend.shown_url}"
    if chosen == "offline":
        from standin import StandIn             # which is built on this module
        why = "" if kind == "offline" else " (OPENAI_API_KEY and OPENAI_BASE_URL are not set)"
        return StandIn(), f"offline stand-in{why}: scripted answers, NOT a language model"
    if chosen == "manual":
        return Manual(), "you: paste the answers at the prompt"
    if chosen.startswith("replay:"):
        path = chosen[len("replay:"):]
        return Replay(path), f"none: answers are replayed from {path}"
    raise LLMError(f"unknown --llm {kind}: choose auto, chat, offline, manual or replay:FILE")


def read_code(text: str) -> str:
    """The code of an answer: its last fenced block with a function in it, else what starts with `def`."""
    blocks = [block for block in re.findall(r"```[^\n`]*\n(.*?)(?:```|\Z)", text, flags=re.DOTALL) if "def " in block]
    if blocks:
        return textwrap.dedent(blocks[-1]).strip() + "\n"
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("def ")), None)
    if start is None:
        raise UnusableReply("there is no function in the answer: put it into a code block that starts with ```python")
    end = next((i for i in range(start + 1, len(lines)) if lines[i] and not lines[i].startswith((" ", "\t", ")", "}"))),
               len(lines))
    return "\n".join(lines[start:end]).strip() + "\n"


def read_ranking(text: str, count: int) -> list[list[int]]:
    """A ranking of the labels 1..count, best first: list of groups of equals, such as [[3], [1, 2], [4]].

    Takes what follows the last "RANKING:" (or the last line that looks like a ranking): a chain such as
    `3 > 1 = 2 > 4`, a plain list, or JSON. Raises UnusableReply for missing, repeated or unknown labels.
    """
    marked = re.split(r"ranking\W{0,4}:", text, flags=re.IGNORECASE)
    lines = [line for line in text.splitlines() if re.fullmatch(r"[\W_]*\d+([\W_]+\d+)+[\W_]*", line)]
    if len(marked) == 1 and not lines:
        raise UnusableReply('no ranking found: end with a line such as "RANKING: 2 > 4 = 1 > 3"')
    body = (marked[-1] if len(marked) > 1 else lines[-1]).strip(" \n\t*`")
    if body.startswith("["):
        try:
            items, _ = json.JSONDecoder().raw_decode(body)
        except (ValueError, RecursionError):
            raise UnusableReply("the list after RANKING cannot be read") from None
        groups = [item if isinstance(item, list) else [item] for item in items]
    else:
        chain = re.sub(r"(?i)\b(attempts?|trajectory|number|no\.)|#", " ", body.split("\n")[0]).strip()
        parts = re.split(r"[>≻]", chain) if re.search("[>≻=]", chain) else re.split(r"[,\s]+", chain)
        groups = [re.split(r"[=~≈]", part) for part in parts]
    groups = [[str(label).strip(" \t.;,*`(){}\"'") for label in group] for group in groups]
    for label in itertools.chain(*groups):
        if not re.fullmatch(r"[0-9]{1,4}", label):
            raise UnusableReply(f"{label[:40]!r} in the ranking is not the number of an attempt")
    groups = [[int(label) for label in group] for group in groups]
    named, known = Counter(itertools.chain(*groups)), set(range(1, count + 1))
    wrong = {"missing": known - set(named), "unknown": set(named) - known,
             "named more than once": {label for label in named if named[label] > 1}}
    if any(wrong.values()):
        raise UnusableReply(f"the ranking must hold each number from 1 to {count} once; " + "; ".join(
            f"{what}: {', '.join(map(str, sorted(labels)))}" for what, labels in wrong.items() if labels))
    return groups


def read_analysis(text: str, params: dict[str, float]) -> tuple[str, dict[str, float]]:
    """(what blocks the skill, new values by name) from the last JSON object with "params" in an answer.

    params: dict of the present values. Raises UnusableReply for unknown names, non-numbers, and signs that a
    positive parameter cannot have.
    """
    found = None
    for match in list(re.finditer(r"\{", text))[-200:]:
        try:
            value, _ = json.JSONDecoder().raw_decode(text, match.start())
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and "params" in value:
            found = value
    if found is None:
        raise UnusableReply('no JSON object of the form {"blocked_by": "...", "params": {"name": number}} found')
    changes = found["params"]
    if not isinstance(changes, dict):
        raise UnusableReply('"params" must be an object with the new values by name; {} changes none')
    for name, value in changes.items():
        if name not in params:
            raise UnusableReply(f"{name} is not a parameter; there are {', '.join(params)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e9:
            raise UnusableReply(f"the new value of {name} must be a number below 1e9, not {value!r:.40}")
        if params[name] > 0 and value <= 0:
            raise UnusableReply(f"{name} is a positive parameter: its new value cannot be {value:g}")
    blocked_by = "".join(c if c.isprintable() else " " for c in str(found.get("blocked_by", "")))
    return " ".join(blocked_by.split()), {name: float(value) for name, value in changes.items()}
