"""The client against a server on loopback that misbehaves; the readers against what LLMs write."""

import base64
import json
import re
import shutil
import socket
import sys
import threading
import time
from contextlib import suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import example, run_alone

import llm
from llm import LLM, Chat, LLMError, ReplayError, Reply, UnusableReply

KEY = "sk-marked/fake+key-000"
CASES = Path(__file__).parent / "cases"
TRIED = Path(__file__).parent.parent / "experiments" / "robustness"


def cases(name):
    """The rows of all files with such cases."""
    rows = []
    for path in sorted([*CASES.glob(f"*{name}.jsonl"), *TRIED.glob(f"{name}.jsonl")]):
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            rows.append(pytest.param(json.loads(line), id=f"{path.parent.name}-{path.stem}-{i}"))
    return rows


# Answers of an LLM.


def check(case, read, *args):
    try:
        assert read(*args) == case["want"]
    except UnusableReply as error:
        assert case["want"] is None or case.get("may_refuse")
        assert case.get("says", "") in str(error) and len(str(error)) > 20


@pytest.mark.parametrize("case", cases("rankings"))
def test_ranking_cases(case):
    check(case, llm.read_ranking, case["text"], case["count"])


@pytest.mark.parametrize("case", cases("analyses"))
def test_analysis_cases(case):
    check(case, lambda: llm.read_analysis(case["text"], case["params"])[1])


@pytest.mark.parametrize("case", cases("code"))
def test_code_cases(case):
    check(case, llm.read_code, case["text"])


def test_blocked_by_is_one_line():
    text = '{"blocked_by": "a\\tlong\n  way", "params": {"w": 2}}'
    assert llm.read_analysis(text, {"w": 1.0}) == ("a long way", {"w": 2.0})


def block(code):
    return f"```python\ndef reward({code}):\n    return 0\n```\n"


def test_broken_file_is_taken_whole():
    broken = f'"""As in\n\n{block("x")}"""\n\ndef reward(x:\n    return 0\n'
    assert llm.read_code(broken) == broken  # not the example: the reward's own error is shown


@pytest.mark.parametrize("words", ["To avoid:", "A bad example:\n", "The old one was", "Or\n"])
def test_asides_are_refused(words):
    code, params = block("x"), '{"params": {"w": 2}}'
    with pytest.raises(UnusableReply, match="several functions"):
        llm.read_code(f"{code}{words}\n{block('y')}")
    assert "def reward(y)" in llm.read_code(f"{code}This is not it. Better:\n{block('y')}")
    with pytest.raises(UnusableReply, match="several objects"):
        llm.read_analysis(params + words + params.replace("2", "9"), {"w": 1.0})


@pytest.mark.parametrize("piece", ["{", "[", "(", "1 > ", "a", "\n", "<a", "```\n", "> 2\n", "\\"])
def test_readers_end_on_long_nonsense(piece):
    text = piece * (100_000 // len(piece))
    for read, *more in ((llm.read_ranking, 48), (llm.read_analysis, {"w": 1.0}), (llm.read_code,)):
        with pytest.raises(UnusableReply):
            read(text, *more)


# Asking, repairing, and the transcript.


def scripted(*texts):
    """A backend that gives these answers, or raises them, and keeps what it was asked."""
    left = list(texts)

    def backend(messages):
        backend.asked.append([message["content"] for message in messages])
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return Reply(answer, 10, 2)

    backend.asked = []
    return backend


def number(text):
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text} is no number") from None


def records(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_reasons_go_back(tmp_path):
    backend = scripted("one", UnusableReply("cut off"), "3")
    asked = LLM(backend, tmp_path / "run" / "llm.jsonl")
    assert not (tmp_path / "run").exists()
    assert asked.ask("count", "How many?", number) == 3
    question, first, second, third, last = backend.asked[2]
    assert (question, first, third) == ("How many?", "one", "(no usable text)")
    assert "one is no number" in second and "cut off" in last
    lines = records(tmp_path / "run" / "llm.jsonl")
    assert [line["kind"] for line in lines] == ["count", "count, repair", "count, repair"]
    assert [line["prompt"] for line in lines] == [question, second, last]
    assert lines[0]["reply"] == "one" and lines[1]["unusable"] == "cut off"
    assert lines[2]["prompt_tokens"] == 10 and lines[2]["completion_tokens"] == 2


def test_four_attempts_at_most():
    backend = scripted("a", "b", "c", "d", "5")
    with pytest.raises(LLMError, match="4 answers to 'count'.*d is no number"):
        LLM(backend).ask("count", "How many?", number)
    assert len(backend.asked) == 4


def test_resumed_run_asks_nothing_twice(tmp_path):
    path = tmp_path / "llm.jsonl"
    first = LLM(scripted("x", "3", LLMError("away"), "4", "7"), path)
    assert first.ask("count", "How many?", number) == 3
    with pytest.raises(LLMError, match="away"):
        first.ask("count", "How many more?", number)
    assert [first.ask("count", "And now?", number) for _ in range(2)] == [4, 7]
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "count", "prompt": "How many mo')
    backend = scripted("5")
    again = LLM(backend, path)
    assert path.read_bytes() != whole  # nothing is written before the first exchange
    assert again.ask("count", "How many?", number) == 3
    assert [again.ask("count", "And now?", number) for _ in range(2)] == [4, 7]
    assert not backend.asked
    assert again.ask("count", "How many more?", number) == 5  # what failed is asked again
    assert path.read_bytes().startswith(whole) and len(records(path)) == 6
    assert LLM(None, replay=path).ask("count", "How many more?", number) == 5
    path.write_bytes(whole[:-1])  # a line without its end is asked again
    again = LLM(scripted("8"), path)
    assert [again.ask("count", "And now?", number) for _ in range(2)] == [4, 8]
    assert [line["reply"] for line in records(path)[3:]] == ["4", "8"]


def test_replay_repeats_answers_and_errors(tmp_path):
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"

    def story(asked):
        results = []
        for question in ("How many?", "How many?", "And now?"):
            try:
                results.append(asked.ask("count", question, number))
            except LLMError as error:
                results.append(str(error))
        return results

    told = story(LLM(scripted("x", UnusableReply("cut"), "3", LLMError("away"), "4"), old))
    assert told == [3, "away", 4]
    assert story(LLM(None, new, replay=old)) == told
    assert new.read_bytes() == old.read_bytes()
    new.write_bytes(b"\n".join(new.read_bytes().split(b"\n")[:4]) + b"\n")  # killed, then resumed
    resumed = LLM(None, new, replay=old)
    assert story(resumed) == told and new.read_bytes() == old.read_bytes()
    with pytest.raises(ReplayError, match="same settings, CPU and library versions"):
        resumed.ask("count", "How many?", number)
    with pytest.raises(ReplayError):
        LLM(None, replay=old).ask("count", "Another?", number)
    with pytest.raises(ReplayError):  # the answer of another conversation
        LLM(None, replay=old).ask("count", "And now?", lambda text: number("no"))


@pytest.mark.parametrize(
    "content, words",
    [
        (b'{"kind": "a", "prompt": "b", "reply": "c"}\n[]\n', "line 2"),
        (b'{"kind": "a", "prompt": "b"}\n', "line 1"),
        (b'{"kind": "a", "prompt": 5, "reply": "c"}\n', "line 1"),
        (b'{"kind"\n{"kind": "a", "prompt": "b", "reply": "c"}\n', "line 1"),
        (b"[" * 100_000 + b"\n", "line 1"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_what_is_no_transcript_is_refused(content, words, tmp_path):
    path = tmp_path / "llm.jsonl"
    with pytest.raises(LLMError, match="cannot be read"):
        LLM(None, replay=path)
    path.write_bytes(content)
    with pytest.raises(LLMError, match=words):
        LLM(None, replay=path)


def test_edited_transcripts_are_read(tmp_path):
    path = tmp_path / "llm.jsonl"
    path.write_text('\ufeff{"kind": "count", "prompt": "?", "reply": "3"}', encoding="utf-8")
    assert LLM(None, replay=path).ask("count", "?", number) == 3


# The service.


def choice(content, **more):
    return {"choices": [{"message": {"content": content}, "finish_reason": "stop", **more}]}


FINE = (200, {}, {**choice("RANKING: 1 > 2"), "usage": {"prompt_tokens": 11}})


@pytest.fixture
def serve(monkeypatch):
    """serve(*answers): a service that gives these in turn: (status, headers, body) or functions."""
    servers = []

    def start(*answers, path="/v1", key=KEY):
        left = list(answers)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                server.requests.append((self.path, dict(self.headers), json.loads(body)))
                answer = left.pop(0) if len(left) > 1 else left[0]
                if callable(answer):
                    return answer(self)
                status, headers, body = answer
                body = body if isinstance(body, str) else json.dumps(body)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": len(body.encode())}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.requests, server.url = [], f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        monkeypatch.setenv("OPENAI_BASE_URL", server.url + path)
        monkeypatch.setenv("OPENAI_API_KEY", key)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(transcript=None, parse=str, **more):
    """(answer or LLMError, pauses) of one question to the service."""
    pauses = []
    asked = LLM(Chat("some-model", **more), transcript, sleep=pauses.append)
    try:
        return asked.ask("rank", "Which is best?", parse), pauses
    except LLMError as error:
        return error, pauses


@pytest.mark.parametrize("case", cases("replies"))
def test_reply_cases(case, serve):
    server = serve((case["status"], case["headers"], case["body"]), FINE)
    answer, pauses = ask()
    told = server.requests[-1][2]["messages"][1:]
    if case["want"] == "stop":
        assert isinstance(answer, LLMError) and len(server.requests) == 1
        assert case["says"] in str(answer)
    elif case["want"] == "answer":
        assert answer == case["text"] and len(server.requests) == 1 and not pauses
    elif case["want"] == "again":
        assert answer == "RANKING: 1 > 2" and len(server.requests) == 2 and not pauses
        assert case.get("says", "") in told[1]["content"]
    else:
        assert answer == "RANKING: 1 > 2" and len(pauses) == 1 and not told
        assert case.get("pause_at_least", 0.3) <= pauses[0] <= case.get("pause_at_most", 1e9)


def test_request(serve):
    server = serve(FINE)
    assert ask(options={"max_tokens": 9}) == ("RANKING: 1 > 2", [])
    path, headers, body = server.requests[0]
    messages = [{"role": "user", "content": "Which is best?"}]
    assert body == {"max_tokens": 9, "model": "some-model", "messages": messages}
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert "api-key" not in headers


@pytest.mark.parametrize(
    "address, path",
    [
        ("/d/x?api-version=2024-06-01", "/d/x/chat/completions?api-version=2024-06-01"),
        ("/v1/", "/v1/chat/completions"),
        ("/v1/chat/completions", "/v1/chat/completions"),
    ],
)
def test_addresses(address, path, serve):
    server = serve(FINE, path=address)
    ask()
    assert server.requests[0][0] == path
    assert ("api-key" in server.requests[0][1]) == ("api-version" in address)


def test_no_other_key_is_sent(serve, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server = serve(FINE, key="")
    ask()
    assert "Authorization" not in server.requests[0][1]


def test_credentials_in_the_address(serve, monkeypatch):
    server = serve((401, {}, "no s3cret%2dpass"))
    monkeypatch.setenv("OPENAI_BASE_URL", server.url.replace("://", "://me:s3cret%2Dpass@"))
    answer, _ = ask()
    basic = base64.b64encode(b"me:s3cret-pass").decode()
    assert server.requests[0][1]["Authorization"] == f"Basic {basic}"
    assert "no [key]" in str(answer) and "me:" not in str(answer)


def test_redirects_are_not_followed(serve):
    other = serve(FINE)
    first = serve((307, {"Location": other.url + "/v1/chat/completions"}, ""))
    answer, _ = ask()
    assert "OPENAI_BASE_URL" in str(answer) and len(first.requests) == 1 and not other.requests


SPELT = {
    "plain": KEY,
    "json": KEY.replace("/", "\\/"),
    "unicode": "".join(f"\\u{ord(c):04x}" for c in KEY),
    "twice": "".join(f"\\\\u{ord(c):04X}" for c in KEY),
    "html": KEY.replace("+", "&#43;").replace("/", "&#x2F;"),
    "html in json": KEY.replace("+", "\\u0026#43;").replace("/", "\\u0026#x2f;"),
    "url": KEY.replace("+", "%2B").replace("/", "%2f"),
}


@pytest.mark.parametrize("status", [200, 401, 503])
@pytest.mark.parametrize("spelling", SPELT)
def test_key_is_never_shown(spelling, status, serve, tmp_path, capsys):
    echo = SPELT[spelling]
    bodies = [f'{{"error": {{"message": "bad key {echo}"}}}}', f"x{{ <b>bad key {echo}</b>"]
    bodies.append('{"error": "' + "x" * 270 + f' {echo}"}}')  # where a message is cut
    for i, body in enumerate(bodies + [json.dumps(choice(f"your key is {echo}"))]):
        serve((status, {}, body), FINE)
        answer, _ = ask(tmp_path / str(i))
        shown = f"{answer}\n{capsys.readouterr()}\n{(tmp_path / str(i)).read_text()}"
        shown = re.sub(r"\\+u0026", "&", shown)
        plain = re.sub(r"\\+u00(..)|%(..)|&#x(..);", lambda m: chr(int(m[m.lastindex], 16)), shown)
        plain = plain.replace("&#43;", "+").replace("\\", "")
        assert KEY not in plain and KEY[:12] not in plain and KEY[-12:] not in plain


def test_placeholder_keys_do_not_spoil_words(serve):
    serve((200, {}, choice("exact")), key="x")
    assert ask()[0] == "exact"


def in_seconds(seconds):
    return formatdate(time.time() + seconds, usegmt=True)


@pytest.mark.parametrize(
    "header, text, least, most",
    [
        (in_seconds(900), "", 600, 900),
        (in_seconds(-900), "", 0.5, 1),
        ("", "<html><body><h1>503 Service Unavailable</h1></body></html>", 0.5, 1),
        ("7", "<h1>503 Service Unavailable</h1>", 7, 7),
        ("2", "try again in 9 seconds", 9, 9),
    ],
)
def test_waits_that_a_service_names(header, text, least, most, serve):
    serve((503, {"Retry-After": header}, text), FINE)
    answer, pauses = ask()
    assert answer == "RANKING: 1 > 2" and least <= pauses[0] <= most


def test_pauses_grow_until_the_time_is_up(serve):
    server = serve((503, {}, {"error": {"message": "loading model"}}))
    answer, pauses = ask(seconds=600)
    assert "loading model" in str(answer) and f"failed {len(server.requests)} times" in str(answer)
    assert 500 < sum(pauses) <= 600 and max(pauses) <= 64
    assert all(0.5 * 2**i <= pause <= 2**i for i, pause in enumerate(pauses[:6]))
    serve((429, {"Retry-After": "3600"}, {"error": "daily limit"}))
    answer, pauses = ask(seconds=300)
    assert "3600 s" in str(answer) and not pauses


def test_time_belongs_to_the_question(serve):
    busy, cut = (503, {"Retry-After": "40"}, ""), (200, {}, choice("1 >", finish_reason="length"))
    serve(busy, cut, busy, busy, busy, FINE)
    pauses = []
    asked = LLM(Chat("some-model", seconds=100), sleep=pauses.append)
    with pytest.raises(LLMError):  # 40 s before the repair, 80 s after it
        asked.ask("rank", "Which is best?", str)
    assert asked.ask("rank", "Which is best?", str) == "RANKING: 1 > 2" and pauses == [40] * 3


def test_requests_take_time_too():
    def slow(messages):
        time.sleep(0.1)
        raise llm.Busy("away", 10)

    slow.seconds, pauses = 20.1, []
    with pytest.raises(LLMError, match="failed 2 times.*away"):
        LLM(slow, sleep=pauses.append).ask("rank", "?", str)
    assert pauses == [10]


def endless(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
    with suppress(OSError):
        while True:
            handler.wfile.write(b"x" * 65536)


CUT_OFF = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"


@pytest.mark.parametrize(
    "fault", [endless, lambda h: h.wfile.write(CUT_OFF), lambda h: h.wfile.write(b"what?\r\n\r\n")]
)
def test_broken_replies_are_asked_again(fault, serve):
    serve(fault, FINE)
    answer, pauses = ask()
    assert answer == "RANKING: 1 > 2" and len(pauses) == 1


def test_no_server(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    answer, pauses = ask(seconds=30)
    assert "is it running?" in str(answer) and url in str(answer) and len(pauses) > 2


@pytest.mark.parametrize(
    "name, value",
    [
        ("OPENAI_API_KEY", "sk-\nx" + KEY),
        *[("OPENAI_BASE_URL", base) for base in ("localhost:80", KEY, "http://", "http://a b/v1")],
    ],
)
def test_settings_that_cannot_work(name, value, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    monkeypatch.setenv(name, value)
    with pytest.raises(LLMError, match=name) as raised:
        LLM(Chat("some-model")).ask("rank", "?", str)
    assert KEY not in str(raised.value)


def test_a_model_has_to_be_named():
    with pytest.raises(LLMError, match="--model"):
        Chat(None)


def test_service_without_tls(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", serve(FINE).url.replace("http:", "https:"))
    answer, pauses = ask()
    assert "OPENAI_BASE_URL" in str(answer) and not pauses


# Questions.

CARRY = SimpleNamespace(
    name="carry",
    goal="Carry it for 3 consecutive steps.",
    robot="a robot",
    details=".",
    features={
        name: SimpleNamespace(unit=unit, low=0.0, high=high, text=f"what {name} is")
        for name, unit, high in (("near", "m", 0.2), ("force", "N", 20), ("tilt", "", 0.0005))
    },
    dt=0.05,
    horizon=8,
    discount=0.97,
)
NEAR = [0.3, 0.1, 0.0414, 0.04, 0.04, 0.2, 0.04, 0.3]
FORCE = [-0.0001, 0, 1, 2, 1.2345, 0, 1, 0]
TILT = [0.0004, 0, 0, 0.0002, 0.000123, 0, 0, 1e-5]
TOLD = """Attempt 1:
near .3 .04@3 .3
force 0 2@4 0, on 3-7 for 4, longest 3-5
tilt .0004 0@2 1e-05, on 1-8 for 4, longest 4-5
earns 3"""


def test_attempts_in_words():
    T = [np.array([NEAR, FORCE, TILT]).T, np.ones((8, 3))]
    first, second = llm.describe(CARRY, T, ["earns 3", "earns 1"]).split("\n\n")
    assert first == TOLD
    assert second == "Attempt 2:\nnear 1\nforce 1\ntilt 1\nearns 1"
    assert llm.describe(CARRY, T).split("\n\n")[1] == "Attempt 2:\nnear 1\nforce 1\ntilt 1"


@pytest.mark.parametrize(
    "readings, words",
    [
        ([0, 0, 0], "0"),
        ([0, 0, 5], "0 5, on 3-3"),
        ([3, 2, 1], "3 1"),
        ([-0.5, 0.5, 0.46, -0.5], "-.5 .5@2 -.5"),
        ([1, 0.52, 0.5, 0.54], "1 .5@2 .54"),  # nearly reached at step 2
        ([1, 1, 0, 0], "1 0@3, on 1-2"),  # the last reading is the one before it
        ([7], "7"),
        ([12345.678, 0.000123], "1.23e+04 .000123"),
    ],
)
def test_readings_in_words(readings, words):
    assert llm.describe_readings(np.array(readings, float)) == words


def test_questions():
    T = [np.array([NEAR, FORCE, TILT]).T] * 2
    propose = llm.propose_question(CARRY, ["exp", "where"])
    rank = llm.rank_question(CARRY, T)
    history = [(0, "proposal", {"w": 1.0}), (20_000, "posterior", {"w": 1.23456})]
    source, evaluations = "\ndef reward(near):\n    ...\n", [(1000, 0.05), (2000, 1.0)]
    analyse = llm.analyse_question(CARRY, source, history, T, ["earns 3", ""], 0.25, evaluations)
    for question in (propose, rank, analyse):
        assert "\nTask: carry\nCarry it for 3 consecutive steps.\n" in question
        assert "- near [m, mostly 0 to 0.2]: what near is\n- force [N, mostly" in question
        assert "- tilt [no unit, mostly" in question and not re.search(r"\$\w", question)
    assert "np.exp, np.where" in propose and "8 steps (0.4 s)" in propose
    assert "Below are 2 attempts" in rank and "acts 20 times" in rank and "RANKING: " in rank
    assert "Attempt 2:" in rank and "longest 16-25" in rank and "longest 16-25" in analyse
    assert '"blocked_by"' in analyse
    assert "```python\ndef reward(near):\n    ...\n```" in analyse and TOLD in analyse
    assert "- 20,000 steps, posterior: w=1.23\n" in analyse and "25%" in analyse
    assert re.search(r"\nSuccess in the evaluations.*:\n1,000: 5%, 2,000: 100%\n", analyse)


def test_prompt_keeps_other_dollars():
    assert "It costs $5 and $x" in llm.prompt("repair", error="It costs $5 and $x")


def test_manual(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", StringIO("first\nsecond\n END \nrest\nlast\n"))
    assert llm.Manual()([{"content": "What now?"}]).text == "first\nsecond"
    assert "What now?" in capsys.readouterr().out
    assert llm.Manual()([{"content": "And now?"}]).text == "rest\nlast"
    with pytest.raises(LLMError, match="needs a terminal"):
        llm.Manual()([{"content": "And now?"}])


def test_service_is_set(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
        assert not llm.service_is_set()
        monkeypatch.setenv(name, "x")
        assert llm.service_is_set()


def test_example_alone(tmp_path):
    shutil.copytree(llm.PROMPTS, tmp_path / "prompts")
    program = f"{example(llm)}\nprint(groups)"
    assert run_alone(llm, program, tmp_path) == "[[2], [1, 3]]\n"
