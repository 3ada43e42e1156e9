"""The client against a socket server on loopback that misbehaves; the readers against what LLMs really write."""

import gzip
import itertools
import json
import re
import socket
import struct
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

import llm
from envs import EPISODE_STEPS, FEATURES, TASKS, Feature, PandaEnv
from llm import (LLM, Chat, LLMError, Manual, Replay, ReplayError, UnusableReply, prompt, read_analysis,
                 read_code, read_ranking)
from questions import describe_attempt, longest_run
from reward import Reward
from standin import EQUAL, StandIn, attempt_of, attempts_of, score, scores_of

KEY = "sk-marked-fake-key-000"


class Server:
    """Answers each connection with the next of `answers`: bytes, or a function of the connected socket."""

    def __init__(self, *answers):
        self.answers, self.requests = list(answers), []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection):
        data = b""
        while b"\r\n\r\n" not in data:
            data += connection.recv(65536)
        head, body = data.split(b"\r\n\r\n", 1)
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        while len(body) < length:
            body += connection.recv(65536)
        self.requests.append((head.decode(), json.loads(body)))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        try:
            answer(connection) if callable(answer) else connection.sendall(answer)
        except OSError:
            pass
        connection.close()


def http(body, status="200 OK", *headers, type="application/json"):
    body = body if isinstance(body, bytes) else body.encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {type}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def completion(text, finish_reason="stop"):
    return http(json.dumps({"choices": [{"message": {"role": "assistant", "content": text},
                                         "finish_reason": finish_reason}],
                            "usage": {"prompt_tokens": 11, "completion_tokens": 7}}))


def reset_in_mid_body(connection):
    connection.sendall(completion("x" * 5000)[:600])
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def silence(connection):
    time.sleep(1.5)


def trickle(connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    for _ in range(100):
        connection.sendall(b" ")
        time.sleep(0.05)


def hundred_megabytes(connection, header=b"Content-Length: 100000000"):
    connection.sendall(b"HTTP/1.1 200 OK\r\n" + header + b"\r\n\r\n")
    for _ in range(100):
        connection.sendall(b"x" * 1_000_000)


def hundred_megabytes_unannounced(connection):
    hundred_megabytes(connection, b"Connection: close")


@pytest.fixture
def ask(monkeypatch):
    """ask(*answers): puts a question to a server that answers so; returns (value or error, server, waits, exchanges)."""
    waits = []
    real_sleep = time.sleep
    monkeypatch.setattr(llm.time, "sleep", lambda s: waits.append(s) if threading.current_thread() is
                        threading.main_thread() else real_sleep(s))
    monkeypatch.setattr(llm, "READ_TIMEOUT", 0.3)
    monkeypatch.setattr(llm, "TOTAL_TIMEOUT", 0.8)

    def run(*answers, parse=lambda text: text, url=None, key=KEY):
        server, exchanges = Server(*answers), []
        monkeypatch.setenv("OPENAI_API_KEY", key)
        monkeypatch.setenv("OPENAI_BASE_URL", url or server.url)
        asked = LLM(Chat("some-model"), exchanges.append)
        try:
            result = asked.ask("rank", "which is best?", parse)
        except LLMError as error:
            result = error
        server.socket.close()
        assert KEY not in str(result) and KEY not in json.dumps(exchanges)
        assert asked.exchanges == len(exchanges)
        return result, server, waits, exchanges
    return run


def test_request_and_answer(ask):
    result, server, waits, exchanges = ask(completion("RANKING: 1"))
    assert result == "RANKING: 1" and not waits
    head, body = server.requests[0]
    assert head.startswith("POST /v1/chat/completions ") and f"Authorization: Bearer {KEY}" in head
    assert body == {"model": "some-model", "messages": [{"role": "user", "content": "which is best?"}]}
    assert {"kind": "rank", "prompt": "which is best?", "reply": "RANKING: 1", "prompt_tokens": 11,
            "completion_tokens": 7}.items() <= exchanges[0].items()


@pytest.mark.parametrize("fault", [
    reset_in_mid_body, silence, trickle, http("busy", "500 Internal Server Error"), http("", "503 Service Unavailable"),
    http("slow down", "429 Too Many Requests")])
def test_passing_faults_are_retried_with_growing_waits(ask, fault):
    result, server, waits, exchanges = ask(fault, fault, completion("fine"))
    assert result == "fine" and len(server.requests) == 3 and len(exchanges) == 1
    assert 0.5 <= waits[0] <= 1 <= waits[1] <= 2


def test_retry_after_is_honoured(ask):
    from email.utils import formatdate
    in_half_a_minute = formatdate(time.time() + 30, usegmt=True)
    result, _, waits, _ = ask(http("", "429 Too Many Requests", "Retry-After: 7"),
                              http("", "503 Unavailable", f"Retry-After: {in_half_a_minute}"), completion("fine"))
    assert result == "fine" and waits[0] == 7 and 25 < waits[1] <= 30


def test_a_wait_that_is_too_long_is_said_and_not_waited(ask):
    result, server, waits, _ = ask(http("", "429 Too Many Requests", "Retry-After: 3600"))
    assert "asks to wait 3600 s" in str(result) and not waits and len(server.requests) == 1


@pytest.mark.parametrize("status, cure", [("400 Bad Request", "--model"), ("401 Unauthorized", "OPENAI_API_KEY"),
                                          ("403 Forbidden", "OPENAI_API_KEY"), ("404 Not Found", "OPENAI_BASE_URL"),
                                          ("302 Found", "OPENAI_BASE_URL"), ("413 Too Large", "OPENAI_BASE_URL")])
def test_lasting_faults_fail_at_once_and_name_the_cure(ask, status, cure):
    body = json.dumps({"error": {"message": f"no: {KEY}"}})          # some services repeat the key
    result, server, waits, _ = ask(http(body, status))
    assert isinstance(result, LLMError) and cure in str(result) and "\n" not in str(result)
    assert len(server.requests) == 1 and not waits and "[key]" in str(result)


@pytest.mark.parametrize("body, words", [
    (b"\xff\xfe broken", "broken"), ('{"error": {"message": "no such model"}}', "400: no such model"),
    ('{"error": "no such model"}', "400: no such model"), ('{"error": {"code": 5}}', "'code': 5"), ("[]", "400: []"), ("", "(empty)")])
def test_what_an_error_page_says_is_quoted(ask, body, words):
    result, *_ = ask(http(body, "400 Bad Request"))
    assert isinstance(result, LLMError) and words in str(result)


def test_tokens_that_are_no_numbers_count_as_none(ask):
    reply = {"choices": [{"message": {"content": "RANKING: 1"}}], "usage": {"prompt_tokens": "many", "completion_tokens": 7}}
    assert ask(http(json.dumps(reply)))[3][0]["prompt_tokens"] == 0
    assert ask(http(json.dumps({**reply, "usage": None})))[3][0]["completion_tokens"] == 0


def raw(head, body=b""):
    return head.replace("\n", "\r\n").encode("latin-1") + b"\r\n\r\n" + body


@pytest.mark.parametrize("answer, words", [
    (raw("HTTP/1.1 302 Found\nLocation: http://[::1\nContent-Length: 0"), "302"),
    (raw("HTTP/1.1 302 Found\nLocation: \xff\xfe\x80\nContent-Length: 0"), "302"),
    (raw("HTTP/1.1 301 Moved\nLocation: //:x@@:99999999/\nContent-Length: 0"), "301"),
    (raw("HTTP/1.1 307 Temporary\nLocation: http://exa mple\nContent-Length: 0"), "307"),
    (raw("HTTP/1.1 308 Permanent\nLocation: gopher://x\nContent-Length: 0"), "308")])
def test_a_redirect_is_not_followed_wherever_it_leads(ask, answer, words):
    result, server, *_ = ask(answer)
    assert isinstance(result, LLMError) and words in str(result) and len(server.requests) == 1


@pytest.mark.parametrize("answer", [
    raw("HTTP/1.1 200 OK\nTransfer-Encoding: chunked", b"-5\r\nhello\r\n0\r\n\r\n"), raw("HTTP/1.1 200 OK\nTransfer-Encoding: chunked", b"zz\r\n"),
    raw("HTTP/1.1 200 OK\nContent-Length: -7", b"{}"), raw("HTTP/1.1 200 OK\nContent-Length: 99", b"{}"), b"\x00\x01\x02\r\n\r\n", b"",
    raw("HTTP/9.9 200 OK\nContent-Length: 2", b"{}")])
def test_a_reply_that_breaks_the_rules_is_asked_for_again(ask, answer):
    result, server, *_ = ask(answer, completion("fine"))
    assert result == "fine" and len(server.requests) == 2


@pytest.mark.parametrize("value", ["Mon, 01 Jan 99999999 00:00:00 GMT", "1e999", "nan", "-5", "Mon, 01 Jan 0000 00:00:00 -9999", "soon", "9" * 400])
def test_any_retry_after_is_understood_or_ignored(ask, value):
    result, server, waits, _ = ask(http("busy", "429 Too Many Requests", f"Retry-After: {value}"), completion("fine"))
    assert result == "fine" and max(waits) <= 2 or "asks to wait" in str(result)


def test_what_is_compressed_is_not_unpacked(ask):
    bomb = gzip.compress(gzip.compress(b"x" * 50_000_000))
    result, server, *_ = ask(http(bomb, "200 OK", "Content-Encoding: gzip, gzip"), completion("fine"))
    assert result == "fine" and "Accept-Encoding: identity" in server.requests[0][0]


def test_the_body_of_a_redirect_is_bounded_too(ask, monkeypatch):
    monkeypatch.setattr(llm, "MAX_BYTES", 50_000)
    result, *_ = ask(raw("HTTP/1.1 302 Found\nLocation: /\nContent-Length: 3000000", b"x" * 3_000_000))
    assert "larger than" in str(result)


def test_a_question_is_bounded_as_a_whole_and_the_screen_shows_who_is_waited_for(ask, monkeypatch, capsys):
    monkeypatch.setattr(llm, "QUESTION_TIMEOUT", 1.0)
    result, server, waits, _ = ask(silence)
    assert isinstance(result, LLMError) and len(server.requests) + len(waits) <= 5
    assert "Waiting for some-model at http://127.0.0.1" in capsys.readouterr().out


@pytest.mark.parametrize("escaped", [KEY.replace("s", "\\u0073", 1), KEY.replace("-", "\\u002d"), "".join(f"\\u{ord(c):04x}" for c in KEY)])
def test_a_key_that_json_escapes_is_cleaned_too(ask, escaped, capsys):
    for answer in (http('{"error": {"message": "bad key %s"}}' % escaped, "401 Unauthorized"), http('{"odd": "%s"}' % escaped),
                   http('{"choices": [{"message": {"content": "%s"}}]}' % escaped)):
        result, _, _, exchanges = ask(answer, completion("fine"))
        kept = str(result) + json.dumps(exchanges) + capsys.readouterr().out
        assert KEY not in kept and escaped not in kept and "[key]" in kept


@pytest.mark.parametrize("url, variable, value, words", [
    ("https", None, None, "write http://"), ("http://.example.com/v1", None, None, "is not an address"),
    ("http://a..b/v1", None, None, "is not an address"), ("http://[::1/v1", None, None, "is not an address"),
    ("https://127.0.0.1:9/v1", "REQUESTS_CA_BUNDLE", "/nowhere/bundle.pem", "REQUESTS_CA_BUNDLE"),
    ("http://example.invalid/v1", "ALL_PROXY", "http://", "proxy"), ("http://example.invalid/v1", "HTTP_PROXY", "http://", "proxy")])
def test_lasting_causes_are_named_rightly(url, variable, value, words, ask, monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, value)
    if url == "https":
        plain = Server(b"")
        plain._answer = lambda connection: (connection.recv(100), connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"), connection.close())
        url = plain.url.replace("http://", "https://")
    result, *_ = ask(completion("x"), url=url)
    assert isinstance(result, LLMError) and words in str(result), result


@pytest.mark.parametrize("text", [
    "<" * 200_000, "RANKING: " + " > ".join(map(str, range(1, 20_001))), "{" * 300_000, '{"a":' * 60_000, "[" * 300_000,
    "RANKING: [" + "[" * 99_000, "1 " * 40_000, "```" * 30_000, "def " * 20_000], ids=range(9))
def test_nothing_that_is_sent_takes_long(ask, text):
    started = time.process_time()
    ask(http(text, "400 Bad Request"))
    for read in (lambda t: read_ranking(t, 48), lambda t: read_analysis(t, {"w": 1.0}), read_code):
        ask(completion(text), parse=read)
    assert time.process_time() - started < 20                         # it was minutes


@pytest.mark.parametrize("content, words", [
    ('{"prompt": "a", "reply": "b"}\n\n', None), ('\ufeff{"prompt": "a", "reply": "b"}', None),
    ('{"prompt": "a", "reply": "b", "prompt_tokens": "many"}', None), ('{"prompt": "a", "reply": "b"}\n{"prompt": 5, "reply": "c"}', "line 2"),
    ('{"prompt": "a", "reply": 7}', "line 1"), ('{"prompt": "a", "reply": "b"}\n[]\n', "line 2"), ("5", "line 1"), ('\n\n{"prompt": ', "line 3"),
    ('{"prompt": "a"}', "line 1"), ("[" * 100_000, "line 1")], ids=range(10))
def test_transcripts_are_read_or_the_line_is_named(content, words, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(content, encoding="utf-8")
    if words is None:
        assert Replay(path)([{"content": "a"}]).text == "b"
    else:
        with pytest.raises(LLMError, match=words):
            Replay(path)


def test_refused_connection_and_a_wrong_address(ask):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    result, _, waits, _ = ask(b"", url=f"http://127.0.0.1:{port}/v1")
    assert isinstance(result, LLMError) and len(waits) == llm.RETRIES
    assert "no connection (is the server running?)" in str(result) and "can be reached" in str(result)
    with pytest.raises(LLMError, match="must start with http"):
        ask(b"", url="localhost:11434")


def test_html_error_page_is_quoted_as_text(ask):
    result, *_ = ask(http("<html><body><h1>Bad gateway</h1></body></html>", "502 Bad Gateway", type="text/html"))
    assert "Bad gateway" in str(result) and "<" not in str(result)


@pytest.mark.parametrize("body", [hundred_megabytes, hundred_megabytes_unannounced])
def test_body_of_100_megabytes_is_not_read(ask, monkeypatch, body):
    monkeypatch.setattr(llm, "TOTAL_TIMEOUT", 60)
    result, server, waits, _ = ask(body)
    assert isinstance(result, LLMError) and "larger than 1,000,000 bytes" in str(result)
    assert len(server.requests) == 1 and not waits


@pytest.mark.parametrize("answer, reason", [
    (http("<html>hello</html>", type="text/html"), "no chat completion"), (http("[]"), "no chat completion"),
    (http('{"choices": []}'), "no chat completion"), (http('{"choices": [{"message": {}}]}'), "no chat completion"),
    (http("{" * 5000), "no chat completion"), (http("[" * 100000), "no chat completion"), (http(b"\xff\xfe"), "no chat"),
    (completion(""), "empty"), (completion(None), "empty"), (completion("<think>hm</think>"), "empty"),
    (completion("RANKING: 1 >", "length"), "too long"), (completion("", "content_filter"), "content filter")])
def test_unusable_answers_are_asked_again_with_the_reason(ask, answer, reason):
    result, server, _, exchanges = ask(answer, completion("better"))
    assert result == "better"
    assert reason in server.requests[1][1]["messages"][-1]["content"] and reason in exchanges[0]["unusable"]
    assert exchanges[1]["kind"] == "rank, repair"


def test_garbage_is_given_up_after_a_few_attempts(ask):
    result, server, _, exchanges = ask(completion("no idea"), parse=lambda text: read_ranking(text, 4))
    assert isinstance(result, LLMError) and "4 attempts" in str(result) and "no ranking found" in str(result)
    assert len(server.requests) == len(exchanges) == llm.ATTEMPTS


def test_the_key_is_cleaned_from_answers(ask):
    result, *_ = ask(completion(f"your key is {KEY}"))
    assert result == "your key is [key]"


def test_a_placeholder_for_a_key_is_no_secret(ask, monkeypatch):
    result, server, *_ = ask(completion("RANKING: 1 > 2, ollama"), key="ollama")
    assert result == "RANKING: 1 > 2, ollama" and "Bearer ollama" in server.requests[0][0]


def test_headers_that_trickle_end_too(ask):
    def trickle_headers(connection):
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        for i in range(100):
            connection.sendall(b"X-%d: y\r\n" % i)
            time.sleep(0.05)
    result, server, waits, _ = ask(trickle_headers, completion("fine"))
    assert result == "fine" and len(waits) == 1


def test_thoughts_and_parts_are_understood(ask):
    assert ask(completion("<think>2 > 1?</think>\nRANKING: 1 > 2"))[0] == "RANKING: 1 > 2"
    parts = [{"type": "text", "text": "a"}, {"type": "x", "text": None}, {"type": "text", "text": "b"}]
    assert ask(completion(parts))[0] == "ab"


def test_missing_settings_are_named(monkeypatch):
    with pytest.raises(LLMError, match="--model"):
        Chat(None)
    monkeypatch.setenv("OPENAI_API_KEY", "a\nb")
    with pytest.raises(LLMError, match="OPENAI_API_KEY"):
        Chat("m")


@pytest.mark.parametrize("text, code", [
    ("First I think.\n```python\ndef r(a, w=1.0):\n    return {'a': a}\n```\nDone.",
     "def r(a, w=1.0):\n    return {'a': a}\n"),
    ("```\ndef r(a):\n    pass\n```", "def r(a):\n    pass\n"),
    ("```python\ndef draft(a):\n    pass\n```\nBetter:\n```py\ndef r(a):\n    pass\n```\n```json\n{}\n```",
     "def r(a):\n    pass\n"),
    ("1. So:\n   ```python\n   def r(a):\n       pass\n   ```", "def r(a):\n    pass\n"),
    ("def r(a,\n      b):\n    c = 1\n\n    return c\nThat is it.", "def r(a,\n      b):\n    c = 1\n\n    return c\n"),
    ("```python\ndef r(a):\n    pass", "def r(a):\n    pass\n")])
def test_code_is_found(text, code):
    assert read_code(text) == code


def test_missing_code_is_said():
    with pytest.raises(UnusableReply, match="code block"):
        read_code("I would reward reaching.")


@pytest.mark.parametrize("text", [
    "RANKING: 3 > 1 = 2 > 4", "Attempt 4 is worst.\n\n**RANKING: 3 > 1 = 2 > 4**", "Ranking:\n3>1=2>4",
    "RANKING: 3 > 2 = 1 > 4.",
    "RANKING: [3, [1, 2], 4]", "RANKING: [[3], [1, 2], [4]]", '```json\n{"ranking": [[3], [1, 2], [4]]}\n```',
    '{"ranking": [3, [2, 1], 4], "why": "..."}', "So\n`3 > 1 = 2 > 4`",
    "RANKING: Attempt 3 > Attempt 1 = Attempt 2 > Attempt 4",
    "RANKING: #3 > #1 = #2 > #4", "RANKING: 1 > 2 > 3 > 4. No, wait.\nRANKING: 3 > 1 = 2 > 4", "RANKING: 3 ≻ 1 ≈ 2 ≻ 4",
    "RANKING: 3 > (1 = 2) > 4", "**Final RANKING**: 3 > 1 = 2 > 4\n\nI hope this helps with 4 attempts!"])
def test_rankings_in_many_forms(text):
    assert [sorted(group) for group in read_ranking(text, 4)] == [[3], [1, 2], [4]]


def test_plain_lists_are_strict_rankings():
    for text in ("RANKING: 3, 1, 2, 4", "RANKING: [3, 1, 2, 4]", "RANKING: 3 1 2 4", "3 > 1 > 2 > 4"):
        assert read_ranking(text, 4) == [[3], [1], [2], [4]]
    assert read_ranking("RANKING: 1 = 2 = 3", 3) == [[1, 2, 3]]


@pytest.mark.parametrize("text, reason", [
    ("RANKING: 3 > 1 > 2", "missing: 4"), ("RANKING: 3 > 1 > 2 > 4 > 5", "unknown: 5"),
    ("RANKING: 3 > 1 > 2 > 4 > 3", "more than once: 3"),
    ("RANKING: A > B > C > D", "not the number"), ("RANKING: 3 > 1 ? 2 > 4", "not the number"),
    ("RANKING:", "not the number"),
    ("they are all good", "no ranking found"), ("RANKING: 3 > 1 < 2 > 4", "not the number"),
    ("RANKING: 0 > 1 > 2 > 3 > 4", "unknown: 0"),
    ("RANKING: 1e3 > 2", "not the number"), ("RANKING: " + "9" * 5000, "not the number"),
    ("RANKING: ]] > [[", "not the number"),
    ("RANKING: [3, 1, 2", "cannot be read"), ("RANKING: [" + "[" * 100000, "cannot be read")])
def test_broken_rankings_get_the_reason(text, reason):
    with pytest.raises(UnusableReply, match=reason):
        read_ranking(text, 4)


THETA = {"push_weight": 2.0, "bias": -1.0}


def test_analysis_takes_the_last_json_object():
    text = 'Like {"params": {}} but:\n```json\n{"blocked_by": "too\\n little", "params": {"push_weight": 6}}\n```\nbye {'
    assert read_analysis(text, THETA) == ("too little", {"push_weight": 6.0})
    assert read_analysis('{"params": {"bias": -3.5}}', THETA) == ("", {"bias": -3.5})
    assert read_analysis('{"blocked_by": "nothing", "params": {}}', THETA) == ("nothing", {})     # no parameter is to blame
    assert read_analysis('{"blocked_by": "\\ud83d \\u001b[31mred", "params": {"bias": -1}}', THETA)[0] == "[31mred"


@pytest.mark.parametrize("params, reason", [
    ('{"pull_weight": 1}', "pull_weight is not a parameter"), ('{"push_weight": "big"}', "must be a number"),
    ('{"push_weight": true}', "must be a number"), ('{"push_weight": null}', "must be a number"),
    ('{"push_weight": NaN}', "must be a number"), ('{"push_weight": 1e999}', "must be a number"),
    ('{"push_weight": -2}', "positive"), ('{"push_weight": 0}', "positive"), ("[1]", "must be an object"),
    ('"push_weight"', "must be an object")])
def test_broken_analyses_get_the_reason(params, reason):
    with pytest.raises(UnusableReply, match=reason):
        read_analysis(f'{{"blocked_by": "x", "params": {params}}}', THETA)
    with pytest.raises(UnusableReply, match="no JSON object"):
        read_analysis("raise the push weight to 6 " + "{" * 10000, THETA)


# A task of every kind of condition: near, then hold and lift for three steps, never with more than 2 N or 0.05 m away.
CARRY = SimpleNamespace(stages=(("near", "<=", 0.05),), success=(("force", ">", 0.0), ("height", ">=", 0.1)), steps=3, dt=0.05,
                        limits=(("force", ">", 2.0), ("away", ">", 0.05)),
                        features={name: Feature("", 0.0, 1.0, "") for name in ("near", "force", "height", "away", "tilt")})
NEAR = [0.2, 0.12, 0.05, 0.04, 0.04, 0.04, 0.04, 0.06, 0.1, 0.2]
DONE = dict(near=NEAR, force=[0, 0, 0, 1, 1.2344, 1, 2, 1, 0, 0], height=[0, 0, 0, 0, 0.1, 0.2, 0.15, 0.0996, 0.2, 0],
            away=[0] * 10, tilt=[-0.5, 0, 0, -0.0004, 0, 0, 26.66, 0, 0, 1])


def described(**series):
    return describe_attempt(7, {name: np.array(values, float) for name, values in series.items()}, CARRY)


def test_an_attempt_that_fulfils_the_task_in_every_word():
    assert described(**DONE) == """Attempt 7: fulfils the task (done at 0.35 s)
  limit force <= 2: kept
  limit away <= 0.05: kept
  near <= 0.05: 5 of 10 steps, first at 0.15 s, longest run 5 from 0.15 s
  force > 0 and height >= 0.1: 3 of 10 steps, first at 0.25 s, longest run 3 from 0.25 s
  time 0.05 0.20 0.35 0.50 | lowest highest
  near 0.2 0.04 0.04 0.2 | 0.04 0.2
  force 0 1 2 0 | 0 2
  height 0 0 0.15 0 | 0 0.2
  away 0 0 0 0 | 0 0
  tilt -0.5 0 26.7 1 | -0.5 26.7"""


def test_an_attempt_that_is_too_short_does_not_fulfil_the_task():
    text = described(**{**DONE, "force": [0, 1, 0, 0, 1, 1, 0, 1, 1, 0], "height": [0.2] * 10})
    assert text.startswith("Attempt 7: does not fulfil the task\n  limit force <= 2: kept\n")
    assert "\n  force > 0 and height >= 0.1: 5 of 10 steps, first at 0.10 s, longest run 2 from 0.25 s\n" in text
    text = described(**{**DONE, "near": [0.06] * 10})
    assert "\n  near <= 0.05: 0 of 10 steps\n  force" in text and text.startswith("Attempt 7: fulfils")


def test_a_broken_limit_is_told_with_its_time_its_length_and_its_most():
    # After it was done: the limits hold for the whole attempt. The earlier of the two counts for runs before.
    text = described(**{**DONE, "away": [0] * 7 + [0.051, 0.05, 0.0712], "force": [*DONE["force"][:8], 3.5, 0]})
    assert text.startswith("""Attempt 7: does not fulfil the task (done but for the limits at 0.35 s)
  limit force <= 2: broken first at 0.45 s, in 1 steps, highest reading 3.5
  limit away <= 0.05: broken first at 0.40 s, in 2 steps, highest reading 0.0712
  near <= 0.05: 5 of 10 steps, first at 0.15 s, longest run 5 from 0.15 s, 5 before a limit broke
  force > 0 and height >= 0.1: 4 of 10 steps, first at 0.25 s, longest run 3 from 0.25 s, 3 before a limit broke
""")
    # Before, and never done: only what led up to it counts.
    text = described(**{**DONE, "away": [0] * 5 + [0.3] * 5, "height": [0] * 10})
    assert text.startswith("""Attempt 7: does not fulfil the task
  limit force <= 2: kept
  limit away <= 0.05: broken first at 0.30 s, in 5 steps, highest reading 0.3
  near <= 0.05: 5 of 10 steps, first at 0.15 s, longest run 5 from 0.15 s, 3 before a limit broke
  force > 0 and height >= 0.1: 0 of 10 steps
""")
    assert ", 0 before a limit broke" in described(**{**DONE, "away": [1] * 10})
    assert longest_run([False]) == (0, -1) and longest_run([True, True, False, True]) == (2, 1)


@pytest.mark.parametrize("sign, kept, values, line", [
    ("<=", ">", [0.3, 0.1, 0.02, 0.04], "0.05: broken first at 0.15 s, in 2 steps, lowest reading 0.02"),
    (">=", "<", [0.03, 0.05, 0.09, 0.04], "0.05: broken first at 0.10 s, in 2 steps, highest reading 0.09"),
    ("<=", ">", [0.3, 0.1, 0.06, 0.08], "0.05: kept")])
def test_what_a_limit_forbids_decides_how_it_is_told(sign, kept, values, line):
    task = SimpleNamespace(stages=(), success=(("height", ">", 9.0),), steps=1, dt=0.05, limits=(("height", sign, 0.05),),
                           features={"height": Feature("m", 0.0, 0.3, "")})
    assert describe_attempt(1, {"height": np.array(values)}, task).splitlines()[1] == f"  limit height {kept} {line}"


@pytest.mark.parametrize("high, values, told", [
    (0.3, [0.0004, 0.0006, 0.1234, 0.2], "0 0.001 0.123 0.2 | 0 0.2"),              # half a millimetre is noise
    (0.0005, [0.0004, 0.0002, 0.000123, 0.00009], "0.0004 0.0002 0.00012 9e-05 | 9e-05 0.0004"),
    (2000.0, [1499.6, 900, 20, 3.21], "1.5e+03 900 20 3.21 | 3.21 1.5e+03")])
def test_readings_are_as_fine_as_what_their_feature_spans_and_the_stand_in_reads_them(high, values, told):
    task = SimpleNamespace(stages=(), success=(("away", "<=", high / 1000),), steps=1, dt=0.05, limits=(),
                           features={"away": Feature("m", 0.0, high, "")})
    text = describe_attempt(1, {"away": np.array(values)}, task)
    assert text.splitlines()[-1] == f"  away {told}"
    first, _, _, last, lowest, highest = map(float, told.replace("|", "").split())
    assert attempt_of(text.partition(":")[2])["readings"] == {"away": (first, last, lowest, highest)}


def tokens(text):
    """A pessimistic count: no tokenizer needs more."""
    return len(re.findall(r"\d{1,3}|_?[A-Za-z]+| (?=\d)|[^\w\s]|\n", text))


@pytest.mark.parametrize("task", TASKS)
def test_descriptions_of_random_episodes_are_short(task):
    env, rng = PandaEnv(task), np.random.default_rng(0)
    for seed in range(8):
        env.reset(seed=seed)
        rows = [env.step(rng.uniform(-1, 1, 4) - (0, 0, 0.3, 0))[-1]["features"] for _ in range(EPISODE_STEPS)]
        series = {name: np.array([row[name] for row in rows]) for name in list(env.task.features)}
        assert 200 < tokens(describe_attempt(16, series, TASKS[task])) < 400
    env.close()


@pytest.mark.parametrize("task", TASKS)
def test_descriptions_are_short_even_where_there_is_much_to_tell(task):
    # All limits broken late, every condition met for a while, and three digits wherever the first step leaves any.
    ramp, late = np.linspace(0, 1, EPISODE_STEPS), np.arange(EPISODE_STEPS) >= 38
    series = {name: FEATURES[name].low + 0.123 * (0.987 + ramp) * (FEATURES[name].high - FEATURES[name].low)
              for name in TASKS[task].features}
    for name, sign, value in (*TASKS[task].stages, *TASKS[task].success):
        met, unmet = (value - 0.0013, value + 0.1234) if sign == "<=" else (value + 0.1234, max(0, value - 0.0123))
        series[name] = np.where((ramp > 0.3) & (ramp < 0.9) | late, met, unmet) + 0.0001 * ramp
    for name, sign, value in TASKS[task].limits:
        series[name] = np.where(late, value + 0.1234, series[name])
    for name in ("contact_force", "grip_force", "block_height", "block_displacement", "block_speed"):
        if name in series:
            series[name][0] = 0
    text = describe_attempt(16, series, TASKS[task])
    assert text.count("broken first") == len(TASKS[task].limits)
    assert tokens(text) < 410                      # the worst that can be made up, by a count that is too high


def test_prompts_can_be_edited(tmp_path, monkeypatch):
    assert "$" not in prompt("repair", error="x")
    monkeypatch.setattr(llm, "PROMPTS", tmp_path)
    (tmp_path / "repair.txt").write_text("It costs $5: $error ü", encoding="utf-8")
    assert prompt("repair", error="a $b") == "It costs $5: a $b ü"
    with pytest.raises(LLMError, match="nothing.txt cannot be read"):
        prompt("nothing")


def test_replay_gives_the_same_answers_and_says_where_it_departs(tmp_path):
    backend = iter(["garbage", "RANKING: 2 > 1", "{}"])
    path = tmp_path / "llm.jsonl"

    def record(exchange):
        with open(path, "a") as file:
            file.write(json.dumps(exchange) + "\n")

    first = LLM(lambda messages: llm.Reply(next(backend)), record)
    ranking = first.ask("rank", "rank these", lambda text: read_ranking(text, 2))
    again = LLM(Replay(path), lambda exchange: None)
    assert again.ask("rank", "rank these", lambda text: read_ranking(text, 2)) == ranking == [[2], [1]]
    with pytest.raises(ReplayError, match="ends after 2 exchanges"):
        again.ask("analyse", "what blocks?", str)
    with pytest.raises(ReplayError, match="no longer follows .* exchange 1: the question reads 'rank those'"):
        LLM(Replay(path), lambda exchange: None).ask("rank", "rank those", str)
    path.write_text("not json")
    with pytest.raises(LLMError, match="line 1 holds no question"):
        Replay(path)


def test_an_interrupted_question_is_not_in_the_transcript():
    def interrupted(messages):
        raise KeyboardInterrupt
    exchanges = []
    with pytest.raises(KeyboardInterrupt):
        LLM(interrupted, exchanges.append).ask("rank", "q", str)
    assert not exchanges


def test_replay_repeats_failures_too(tmp_path):
    path = tmp_path / "llm.jsonl"
    path.write_text(json.dumps({"kind": "rank", "prompt": "q", "unusable": "empty"}) + "\n"
                    + json.dumps({"kind": "rank, repair", "prompt": prompt("repair", error="empty"), "error": "it is down"}))
    with pytest.raises(LLMError, match="it is down"):
        LLM(Replay(path), lambda exchange: None).ask("rank", "q", str)


def test_manual_prints_the_prompt_and_reads_to_end(monkeypatch, capsys):
    lines = iter(["first", "second", "END"])
    monkeypatch.setattr("builtins.input", lambda: next(lines))
    assert Manual()([{"role": "user", "content": "What now?"}]).text == "first\nsecond"
    assert "What now?" in capsys.readouterr().out

    def closed():
        raise EOFError
    monkeypatch.setattr("builtins.input", closed)
    with pytest.raises(LLMError, match="needs a terminal"):
        Manual()([{"role": "user", "content": "?"}])


def test_the_stand_in_says_what_it_is_and_what_it_cannot():
    reply = StandIn()([{"role": "user", "content": prompt("propose", task="push", goal="", features="", functions="")}])
    assert "not an LLM's" in reply.text and "push_weight=2.0" in reply.text
    with pytest.raises(LLMError, match="OPENAI_API_KEY"):
        StandIn()([{"role": "user", "content": "Task: juggle"}])
    assert read_analysis(StandIn()([{"role": "user", "content": 'Task: juggle "blocked_by"'}]).text, {})[1] == {}
    with pytest.raises(LLMError, match="OPENAI_API_KEY"):                # it would only repeat itself
        StandIn()([{"role": "user", "content": "Task: push"}, {"role": "assistant", "content": ""}])


def imagined(task, near=0.05, **series):
    """An attempt as a dict of (50,) arrays: the hand comes to `near` metres of the block and stays; the rest as given."""
    nothing = {name: np.zeros(50) for name in TASKS[task].features}
    start = {"hand_to_block": np.maximum(np.linspace(0.15, -0.15, 50), near)}
    if "block_to_goal" in nothing:
        start["block_to_goal"] = np.full(50, 0.13)
    return {**nothing, **start, **{name: np.array(values, float) for name, values in series.items()}}


def from_step(step, value, until=50):
    """`value` from a step on, until another; 0 before and after."""
    return np.where((np.arange(50) >= step) & (np.arange(50) < until), value, 0.0)


def any_attempt(task, rng):
    """One that reaches some stages and not others, for a while or for good."""
    t, held = np.arange(50), np.repeat(rng.random(17) < 0.7, 3)[:50] & (np.arange(50) > rng.integers(5, 45))
    slide = np.cumsum(held * rng.uniform(0, 0.008))
    height = np.where(held & (t > 20), rng.uniform(0.03, 0.12), 0.0)
    series = dict(contact_force=held * rng.choice([0.1, 1.2, 5.7]), grip_force=held * rng.choice([0.0, 2.9]),
                  block_height=height, block_displacement=slide, block_to_goal=np.abs(0.13 - slide),
                  hand_above_block=rng.uniform(-0.02, 0.03, 50))
    return imagined(task, rng.choice([0.008, 0.033, 0.08]),
                    **{name: values for name, values in series.items() if name in TASKS[task].features})


def progress(task, series):
    """What score() promises, from the numbers themselves: (progress, whether the attempt fulfils the task)."""
    def longest(met):
        return max((len(list(group)) for true, group in itertools.groupby(met) if true), default=0)

    def way(name, goal):
        first = series[name][0]
        best = series[name].min() if goal < first else series[name].max()
        return min(max((best - first) / (goal - first), 0), 1) if goal != first else 0

    excess, before = 1.0, 50
    if task == "touch":
        excess = max(series["contact_force"].max() / 2, series["block_displacement"].max() / 0.05, 1)
        broken = (series["contact_force"] > 2) | (series["block_displacement"] > 0.05)
        before = int(broken.argmax()) if broken.any() else 50
    near, touched = way("hand_to_block", 0.02 if task == "grasp" else 0.05), series["contact_force"][:before] > 0.01
    value = {"touch": lambda: [near, 1 if touched.any() else way("contact_force", 0.01)],
             "grasp": lambda: [near, (series["grip_force"] > 0).any(),
                               1 if ((series["grip_force"] > 0) & (series["block_height"] >= 0.08)).any() else
                               ((series["grip_force"] > 0).any() + way("block_height", 0.08)) / 2],
             "push": lambda: [1 if touched.any() else way("contact_force", 0.01), way("block_to_goal", 0.03)]}[task]()
    goal = {"touch": lambda: series["contact_force"] > 0.01, "push": lambda: series["block_to_goal"] <= 0.03,
            "grasp": lambda: (series["grip_force"] > 0) & (series["block_height"] >= 0.08)}[task]()
    steps = {"touch": 10, "grasp": 5, "push": 3}[task]
    fulfils = before == 50 and longest(goal) >= steps
    reached = len(value) if fulfils else next((k + 1 for k, share in enumerate(value) if share < 1), len(value))
    total = (len(value) if fulfils else sum(value[:reached])) + min(longest(goal[:before]) / steps, 1)
    if excess > 1:
        total = 0.5 * way("hand_to_block", 0.05) / excess
    return total + fulfils * (2 + 0.5 * goal.sum() / 50), fulfils


def read(task, series):
    """The stand-in's view of an attempt."""
    return attempt_of(describe_attempt(1, series, TASKS[task]).partition(":")[2])


def scored(task, series):
    return score(read(task, series), TASKS[task].steps)


@pytest.mark.parametrize("task", TASKS)
def test_scores_read_off_descriptions_are_those_of_the_numbers(task):
    rng = np.random.default_rng(0)
    attempts = [any_attempt(task, rng) for _ in range(60)]
    expected = [progress(task, series) for series in attempts]
    texts = [describe_attempt(i + 1, series, TASKS[task]) for i, series in enumerate(attempts)]
    text = "The attempts:\n\n" + "\n  reward per step 1.5 = 1.5 (a)\n\n".join(texts) + "\n\nRank them."
    found = attempts_of(text)
    assert list(found) == list(range(1, 61))
    assert [attempt["fulfils"] for attempt in found.values()] == [fulfils for _, fulfils in expected]
    assert 3 < sum(fulfils for _, fulfils in expected) < 57
    # Descriptions are rounded: half a millimetre is 0.01 of the way.
    scores = list(scores_of(f"{TASKS[task].goal}\n\n{text}").values())
    np.testing.assert_allclose(scores, [value for value, _ in expected], atol=0.03)
    assert np.ptp([value for value, _ in expected]) > 1
    for series, attempt in zip(attempts, found.values()):
        for name, (first, last, low, high) in attempt["readings"].items():
            values = series[name][0], series[name][-1], series[name].min(), series[name].max()
            np.testing.assert_allclose((first, last, low, high), values, atol=6e-4)
        assert list(attempt["readings"]) == list(TASKS[task].features)


@pytest.mark.parametrize("task", TASKS)
def test_the_stand_in_ranks_by_score_and_calls_close_ones_equal(task):
    rng = np.random.default_rng(1)
    attempts = [any_attempt(task, rng) for _ in range(24)]
    scores = [scored(task, series) for series in attempts]
    text = "\n\n".join(describe_attempt(i + 1, series, TASKS[task]) for i, series in enumerate(attempts))
    question = prompt("rank", count=24, task=task, goal=TASKS[task].goal, features="", trajectories=text)
    groups = [[scores[i - 1] for i in group]
              for group in read_ranking(StandIn()([{"role": "user", "content": question}]).text, 24)]
    assert 1 < len(groups) < 24
    for better, worse in zip(groups, groups[1:]):
        assert min(better) > max(worse) and max(better) - max(worse) >= EQUAL
    assert all(max(group) - min(group) < EQUAL for group in groups)


# The least of all successes and the best of all failures.
LEAST = {
    "touch": imagined("touch", contact_force=from_step(25, 0.05, until=35), block_displacement=from_step(25, 0.05)),
    "grasp": imagined("grasp", 0.025, grip_force=from_step(25, 1, until=30), block_height=from_step(25, 0.08, until=30)),
    "push": imagined("push", block_to_goal=np.r_[np.linspace(0.13, 0.03, 25), [0.01] * 3, np.linspace(0.03, 0.1, 22)])}
MOST = {
    "touch": [imagined("touch", 0.03, contact_force=1.9 * (np.arange(50) % 10 > 0)),
              imagined("touch", 0.03, contact_force=from_step(10, 0.1), block_displacement=from_step(49, 0.051))],
    "grasp": [imagined("grasp", 0.002, grip_force=from_step(10, 3), block_height=from_step(10, 0.079)),
              imagined("grasp", 0.002, grip_force=from_step(10, 3), block_height=from_step(20, 0.3, until=24)),
              imagined("grasp", 0.002, grip_force=from_step(10, 3, until=25), block_height=from_step(25, 0.3))],
    "push": [imagined("push", 0.03, block_to_goal=np.linspace(0.13, 0.031, 50)),
             imagined("push", 0.03, block_to_goal=np.r_[np.linspace(0.13, 0.031, 48), 0.02, 0.02])]}


@pytest.mark.parametrize("task", TASKS)
def test_the_least_success_beats_the_best_failure(task):
    assert read(task, LEAST[task])["fulfils"] and not any(read(task, series)["fulfils"] for series in MOST[task])
    assert scored(task, LEAST[task]) > max(scored(task, series) for series in MOST[task]) + EQUAL


def test_a_success_that_is_kept_up_longer_is_better():
    for task, name, values in (("touch", "contact_force", (0.1, 0.0)), ("push", "block_to_goal", (0.02, 0.13))):
        def kept_up(until):
            return scored(task, imagined(task, **{name: np.where(from_step(10, 1, until) > 0, *values)}))
        assert kept_up(45) > kept_up(25) + EQUAL


def test_a_fist_on_the_block_is_no_grip():
    pressing = from_step(20, 3)
    fist = scored("grasp", imagined("grasp", 0.035, grip_force=pressing, contact_force=2 * pressing))
    idle = scored("grasp", imagined("grasp", 0.035))
    grip = scored("grasp", imagined("grasp", 0.019, grip_force=pressing, contact_force=2 * pressing))
    assert fist == idle and grip > fist + 0.9


def test_breaking_a_limit_costs_the_more_the_further():
    def touch(force=0.1, moved=0.0, at=45):
        contact = from_step(20, 0.1)
        contact[at] = force
        series = imagined("touch", contact_force=contact, block_displacement=from_step(at, moved))
        return scored("touch", series)

    kept = touch()
    for broken in (touch(force=2.2), touch(moved=0.055)):
        assert broken < kept - 0.4
    assert touch(force=2.2) > touch(force=3) > touch(force=5)
    assert touch(moved=0.055) > touch(moved=0.08) > touch(moved=0.14)
    assert touch(force=1.9) == pytest.approx(kept)
    # Rough contact is worse than none, and better than not even coming near.
    hover, away = (scored("touch", imagined("touch", near)) for near in (0.05, 0.149))
    assert hover > touch(moved=0.055) > away


def test_breaking_a_limit_by_little_costs_too():
    contact = from_step(20, 0.1)
    broken = imagined("touch", contact_force=contact,
                      block_displacement=from_step(45, 0.05001))
    kept = imagined("touch", contact_force=from_step(20, 0.1, until=29))             # too short to fulfil the task
    assert not read("touch", broken)["fulfils"] and not read("touch", kept)["fulfils"]
    assert scored("touch", broken) < scored("touch", kept)


def analysed(task, code, *attempts):
    """The stand-in's answer to a failure analysis: (what blocks, changes)."""
    text = "\n\n".join(describe_attempt(i + 1, series, TASKS[task]) + "\n  reward per step 0.5 = 0.5 (a)"
                       for i, series in enumerate(attempts))
    question = prompt("analyse", task=task, goal=TASKS[task].goal, features="", reward=code, trajectories=text)
    return read_analysis(StandIn()([{"role": "user", "content": question}]).text, Reward(code, TASKS[task].features).params)


PUSH = """def shove(hand_to_block, block_to_goal, hopes=1.0, range=0.1):
    return {"a": np.exp(-hand_to_block / 0.1), "b": hopes * np.exp(-block_to_goal / range)}"""
GRASP = """def r(hand_to_block, grip_force, block_height, come=3.0, hold=2.0, up=4.0):
    gripped = np.minimum(grip_force, 1.0)
    return {"a": come * np.exp(-hand_to_block / 0.05), "b": hold * gripped, "c": up * gripped * block_height / 0.08}"""
TOUCH = """def r(contact_force, hand_to_block, pay=3.0, least=1.0):
    return {"a": 1.0 * (0.2 - hand_to_block), "b": pay * np.where(contact_force > least, 1.0, 0.0)}"""


def test_an_analysis_raises_what_makes_the_next_stage_pay_too_little():
    touching = imagined("push", 0.032, contact_force=from_step(20, 0.25))
    why, changes = analysed("push", PUSH.replace("hopes=1.0", "hopes=0.05"), touching)
    assert list(changes) == ["hopes"] and changes["hopes"] in (0.15, 0.5) and "stage 2" in why and "too little" in why
    # A threshold that no real contact crosses.
    why, changes = analysed("touch", TOUCH, imagined("touch"))
    assert changes == {"least": 0.1} and "stage 2" in why


def test_an_analysis_looks_at_the_first_stage_that_fewer_than_half_of_the_attempts_reach():
    far, near = imagined("grasp", 0.1), imagined("grasp", 0.01)
    gripped = imagined("grasp", 0.01, grip_force=from_step(30, 3))
    lifted = imagined("grasp", 0.01, grip_force=from_step(30, 3), block_height=from_step(40, 0.09))
    for attempts, stage, written, name in (
            ([far, near], 2, "hold=2.0", "hold"),
            ([near, near, gripped], 2, "hold=2.0", "hold"), ([far, gripped, gripped], 3, "up=4.0", "up"),
            ([lifted] * 3, 3, "up=4.0", "up")):
        why, changes = analysed("grasp", GRASP.replace(written, f"{name}=0.1"), *attempts)
        assert f"stage {stage} " in why
        assert list(changes) == [name] and changes[name] > 0.1
    for attempts in ([], [far, far, near]):       # whatever coming near pays, it is all that there is to gain up to there
        assert analysed("grasp", GRASP, *attempts)[1] == {}


def test_an_analysis_changes_nothing_where_going_on_pays():
    for task, code, attempts in (("push", PUSH.replace("hopes=1.0", "hopes=5.0"), [imagined("push", 0.032, contact_force=from_step(20, 0.25))]),
                                 ("grasp", GRASP, [imagined("grasp", 0.01)]), ("grasp", GRASP, []),
                                 ("touch", TOUCH.replace("least=1.0", "least=0.05"), [imagined("touch")])):
        why, changes = analysed(task, code, *attempts)
        assert changes == {} and "no parameter is to blame" in why
    # Nor where nothing that can be changed would help.
    useless = """def r(hand_to_block, lean=1.0):
    return {"a": -hand_to_block, "b": 0 * lean}"""
    why, changes = analysed("push", useless, imagined("push", 0.032, contact_force=from_step(20, 1)))
    assert changes == {} and "too little" in why
    with pytest.raises(LLMError, match="cannot read the reward"):
        StandIn()([{"role": "user", "content": prompt("analyse", task="push", reward="def r(x): pass")}])


def test_a_lasting_fault_is_given_six_requests(ask):
    result, server, waits, _ = ask(http("busy", "503 Service Unavailable"))
    assert "failed 6 times" in str(result) and len(server.requests) == 6 == len(waits) + 1 == llm.RETRIES + 1


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 599])
def test_passing_statuses_are_retried(ask, status):
    assert ask(http("later", f"{status} Later"), completion("fine"))[0] == "fine"


@pytest.mark.parametrize("key, url, kind, backend, words", [
    (None, None, "auto", StandIn, "are not set"), ("sk-1", None, "auto", Chat, "m at https://api.openai.com"),
    (None, "http://localhost:1/v1", "auto", Chat, "m at http://localhost:1/v1"), ("sk-1", None, "offline", StandIn, "NOT a language model"),
    ("sk-1", None, "manual", Manual, "paste"), (None, None, "chat", Chat, "m at"), (None, None, "replay", Replay, "replayed from")])
def test_the_backend_follows_the_flag_and_the_environment(key, url, kind, backend, words, monkeypatch, tmp_path):
    for name, value in (("OPENAI_API_KEY", key), ("OPENAI_BASE_URL", url)):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    (tmp_path / "t.jsonl").write_text('{"prompt": "a", "reply": "b"}')
    chosen, who = llm.choose_backend(f"replay:{tmp_path}/t.jsonl" if kind == "replay" else kind, "m")
    assert isinstance(chosen, backend) and words in who
    with pytest.raises(LLMError, match="unknown --llm"):
        llm.choose_backend("oracle", "m")


def test_what_was_answered_before_is_not_asked_again_as_long_as_it_fits():
    asked = []

    def backend(messages):
        asked.append(messages[-1]["content"])
        return llm.Reply(f"new {messages[-1]['content']}")
    lines = ['{"prompt": "a", "reply": "old a", "prompt_tokens": 3}', '{"prompt": "b", "error": "it was down"}', '{"prompt": "c", "reply": "old c"}', '{"prom']
    known = llm.Answered(lines, backend)
    assert known([{"content": "a"}]) == ("old a", 3, 0)
    assert [known([{"content": text}]).text for text in "bc"] == ["new b", "new c"] and asked == ["b", "c"]     # nothing after a gap
