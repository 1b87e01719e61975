"""Judges: grades and comparisons, at a server that fails in every way."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from audit import completion

from lightning_jax.errors import UserError
from lightning_jax.rewards import Endpoint, Judge, JudgeError, WeightedSum, compared, graded


class Server:
    """An OpenAI-compatible server that gives the answers it is told, each (status, body)."""

    def __init__(self):
        self.answers, self.requests, server = [], [], self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append((self.path, self.headers["Authorization"], body))
                status, answer = server.answers.pop(0)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(answer.encode())

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def say(self, *texts):
        self.answers = [(200, json.dumps({"choices": [{"message": {"content": text}}]})) for text in texts]

    def endpoint(self, **changes):
        given = {"model": "judge", "api_key": None, "options": {"temperature": 0}, "seconds": 5.0} | changes
        return Endpoint(self.url, **given)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_an_endpoint_is_asked_as_openai_asks(server):
    server.say("Grade: 5")
    chat = [{"role": "user", "content": "?"}]
    assert server.endpoint(api_key="key")(chat) == "Grade: 5"
    path, authorization, body = server.requests[0]
    assert (path, authorization) == ("/v1/chat/completions", "Bearer key")
    assert body == {"model": "judge", "messages": chat, "temperature": 0}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((503, "busy"), "503 Service Unavailable"),
        ((200, "no json"), "Expecting value"),
        ((200, "{}"), r"without choices\[0\]"),
        ((200, '{"choices": [{"message": {"content": null}}]}'), "without text"),
    ],
)
def test_what_a_server_does_wrong_is_a_judge_error(server, answer, message):
    server.answers = [answer]
    with pytest.raises(JudgeError, match=message):
        server.endpoint()([])


def test_a_server_that_is_away_is_an_infra_error():
    away = Endpoint("http://127.0.0.1:9/v1", "judge", None, {}, 2.0)
    (reward,) = Judge(away, graded, threads=1)([completion("a", ground_truth="b")])
    assert reward.infra_error
    assert reward.reason.startswith("judge: http://127.0.0.1:9/v1: ")


def test_infra_errors_of_a_judge_are_tried_again(server):
    server.say("I cannot decide.", "Grade: 4")
    judge = WeightedSum({"judge": (1.0, Judge(server.endpoint(), graded, threads=1))}, attempts=2, pause=0)
    (reward,) = judge([completion("a", ground_truth="b")])
    assert reward.score == 0.75


@pytest.mark.parametrize(
    ("said", "score"),
    [("Grade: 1", 0), ("Well.\n**Grade: 3**", 0.5), ("Grade: 5\nNo:\nGrade: 2", 0.25), ("grade: 5.", 1)],
)
def test_five_grades(said, score):
    (reward,) = Judge(lambda chat: said, graded, threads=1)([completion("a", ground_truth="b")])
    assert reward.score == score


@pytest.mark.parametrize("said", ["", "Grade: 6", "Grade: 10", "the Grade: 5 of it", "Grade: none"])
def test_what_is_no_grade_is_no_zero(said):
    (reward,) = Judge(lambda chat: said, graded, threads=1)([completion("a", ground_truth="b")])
    assert reward.infra_error


def test_a_judge_sees_the_question_the_reference_and_no_thinking():
    asked = []

    def ask(chat):
        asked.append(chat[0]["content"])
        return "Grade: 1"

    Judge(ask, graded, threads=1)([completion("<think>hidden</think>shown\nGrade: 5", ground_truth="forty-two")])
    assert all(each in asked[0] for each in ("user: ?", "forty-two", "shown"))
    assert "hidden" not in asked[0]
    mark = asked[0].split("between marks ")[1].split(":")[0]
    assert asked[0].count(mark) == 3


def better(name):
    """A judge that likes the response with this text."""

    def ask(chat):
        first = chat[0]["content"].partition("Response B")[0]
        return "Better: A" if name in first else "Better: B"

    return ask


@pytest.mark.parametrize(
    ("ask", "score"),
    [
        (better("mine"), 1),
        (better("other"), -1),
        (lambda chat: "Better: A", 0),  # likes a place
        (lambda chat: "Better: neither", 0),
    ],
)
def test_pairwise_verdicts_count_where_both_orders_agree(ask, score):
    (reward,) = Judge(ask, compared, threads=2)([completion("mine", reference="other")])
    assert reward.score == score


def test_a_record_without_reference_is_said_in_one_line():
    with pytest.raises(UserError, match="a record without reference"):
        Judge(lambda chat: "", compared, threads=1)([completion("a", ground_truth="b")])
