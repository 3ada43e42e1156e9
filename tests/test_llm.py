"""The client against a socket server on loopback that misbehaves; the readers against what LLMs really write."""

import json
import socket
import struct
import threading
import time

import numpy as np
import pytest

import llm
from llm import (LLM, Chat, LLMError, Manual, Offline, Replay, UnusableReply, describe_attempt, longest_run, prompt,
                 read_analysis, read_code, read_ranking)

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
    assert ask(completion([{"type": "text", "text": "a"}, {"type": "x", "text": None}, {"type": "text", "text": "b"}]))[0] == "ab"


def test_missing_settings_are_named(monkeypatch):
    with pytest.raises(LLMError, match="--model"):
        Chat(None)
    monkeypatch.setenv("OPENAI_API_KEY", "a\nb")
    with pytest.raises(LLMError, match="OPENAI_API_KEY"):
        Chat("m")


@pytest.mark.parametrize("text, code", [
    ("First I think.\n```python\ndef r(a, w=1.0):\n    return {'a': a}\n```\nDone.", "def r(a, w=1.0):\n    return {'a': a}\n"),
    ("```\ndef r(a):\n    pass\n```", "def r(a):\n    pass\n"),
    ("```python\ndef draft(a):\n    pass\n```\nBetter:\n```py\ndef r(a):\n    pass\n```\n```json\n{}\n```", "def r(a):\n    pass\n"),
    ("1. So:\n   ```python\n   def r(a):\n       pass\n   ```", "def r(a):\n    pass\n"),
    ("def r(a,\n      b):\n    c = 1\n\n    return c\nThat is it.", "def r(a,\n      b):\n    c = 1\n\n    return c\n"),
    ("```python\ndef r(a):\n    pass", "def r(a):\n    pass\n")])
def test_code_is_found(text, code):
    assert read_code(text) == code


def test_missing_code_is_said():
    with pytest.raises(UnusableReply, match="code block"):
        read_code("I would reward reaching.")


@pytest.mark.parametrize("text", [
    "RANKING: 3 > 1 = 2 > 4", "Attempt 4 is worst.\n\n**RANKING: 3 > 1 = 2 > 4**", "Ranking:\n3>1=2>4", "RANKING: 3 > 2 = 1 > 4.",
    "RANKING: [3, [1, 2], 4]", "RANKING: [[3], [1, 2], [4]]", '```json\n{"ranking": [[3], [1, 2], [4]]}\n```',
    '{"ranking": [3, [2, 1], 4], "why": "..."}', "So\n`3 > 1 = 2 > 4`", "RANKING: Attempt 3 > Attempt 1 = Attempt 2 > Attempt 4",
    "RANKING: #3 > #1 = #2 > #4", "RANKING: 1 > 2 > 3 > 4. No, wait.\nRANKING: 3 > 1 = 2 > 4", "RANKING: 3 ≻ 1 ≈ 2 ≻ 4",
    "RANKING: 3 > (1 = 2) > 4", "**Final RANKING**: 3 > 1 = 2 > 4\n\nI hope this helps with 4 attempts!"])
def test_rankings_in_many_forms(text):
    assert [sorted(group) for group in read_ranking(text, 4)] == [[3], [1, 2], [4]]


def test_plain_lists_are_strict_rankings():
    for text in ("RANKING: 3, 1, 2, 4", "RANKING: [3, 1, 2, 4]", "RANKING: 3 1 2 4", "3 > 1 > 2 > 4"):
        assert read_ranking(text, 4) == [[3], [1], [2], [4]]
    assert read_ranking("RANKING: 1 = 2 = 3", 3) == [[1, 2, 3]]


@pytest.mark.parametrize("text, reason", [
    ("RANKING: 3 > 1 > 2", "missing: 4"), ("RANKING: 3 > 1 > 2 > 4 > 5", "unknown: 5"), ("RANKING: 3 > 1 > 2 > 4 > 3", "more than once: 3"),
    ("RANKING: A > B > C > D", "not the number"), ("RANKING: 3 > 1 ? 2 > 4", "not the number"), ("RANKING:", "not the number"),
    ("they are all good", "no ranking found"), ("RANKING: 3 > 1 < 2 > 4", "not the number"), ("RANKING: 0 > 1 > 2 > 3 > 4", "unknown: 0"),
    ("RANKING: 1e3 > 2", "not the number"), ("RANKING: " + "9" * 5000, "not the number"), ("RANKING: ]] > [[", "not the number"),
    ("RANKING: [3, 1, 2", "cannot be read"), ("RANKING: [" + "[" * 100000, "cannot be read")])
def test_broken_rankings_get_the_reason(text, reason):
    with pytest.raises(UnusableReply, match=reason):
        read_ranking(text, 4)


THETA = {"push_weight": 2.0, "bias": -1.0}


def test_analysis_takes_the_last_json_object():
    text = 'Like {"params": {}} but:\n```json\n{"blocked_by": "too\\n little", "params": {"push_weight": 6}}\n```\nbye {'
    assert read_analysis(text, THETA) == ("too little", {"push_weight": 6.0})
    assert read_analysis('{"params": {"bias": -3.5}}', THETA) == ("", {"bias": -3.5})
    assert read_analysis('{"blocked_by": "\\ud83d \\u001b[31mred", "params": {"bias": -1}}', THETA)[0] == "[31mred"


@pytest.mark.parametrize("params, reason", [
    ('{"pull_weight": 1}', "pull_weight is not a parameter"), ('{"push_weight": "big"}', "must be a number"),
    ('{"push_weight": true}', "must be a number"), ('{"push_weight": null}', "must be a number"),
    ('{"push_weight": NaN}', "must be a number"), ('{"push_weight": 1e999}', "must be a number"),
    ('{"push_weight": -2}', "positive"), ('{"push_weight": 0}', "positive"), ("{}", "at least one"), ("[1]", "at least one")])
def test_broken_analyses_get_the_reason(params, reason):
    with pytest.raises(UnusableReply, match=reason):
        read_analysis(f'{{"blocked_by": "x", "params": {params}}}', THETA)
    with pytest.raises(UnusableReply, match="no JSON object"):
        read_analysis("raise the push weight to 6 " + "{" * 10000, THETA)


def test_descriptions_hold_extremes_runs_and_units():
    force = np.zeros(50)
    force[[10, 11, 12, 20]] = 0.127, 1.9994, 0.3, 0.5
    text = describe_attempt(3, {"force": force, "cosine": np.linspace(-1, 1, 50)}, {"force": "N", "cosine": ""}, 0.05,
                            [("force", ">", 0.01), ("cosine", ">=", 0.9)])
    assert text.startswith("Attempt 3:") and "force [N]" in text
    assert "1.999 (0.60)" in text and "0 (0.05)" in text
    assert "force > 0.01: in 4 of 50 steps, longest unbroken run 3 steps (0.55 to 0.65 s)" in text
    assert "-1 (0.05)" in text and "-0 " not in text
    assert len(text) < 1600                                          # about 500 tokens at most
    assert longest_run([False]) == (0, -1) and longest_run([True, True, False, True]) == (2, 1)


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
    with pytest.raises(LLMError, match="ends after 2 exchanges"):
        again.ask("analyse", "what blocks?", str)
    with pytest.raises(LLMError, match="departed .* exchange 1: the question reads 'rank those'"):
        LLM(Replay(path), lambda exchange: None).ask("rank", "rank those", str)
    path.write_text("not json")
    with pytest.raises(LLMError, match="not a transcript"):
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


def test_offline_stand_in_says_what_it_is_and_what_it_cannot():
    reply = Offline()([{"role": "user", "content": prompt("propose", task="push", goal="", features="", functions="")}])
    assert "not an LLM's" in reply.text and "push_weight=2.0" in reply.text
    with pytest.raises(LLMError, match="OPENAI_API_KEY"):
        Offline()([{"role": "user", "content": "Task: juggle"}])
