"""A judge on loopback, well-behaved or not, and answers for it to judge."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[str, int], str]
"""The judge's text, from the question and the number of the request (from 0)."""
Fault = Callable[[str, int], str | None]
"""The name of a fault below, or None to answer."""

PARTS = re.compile(r"\[(Request|Answer 1|Answer 2)\]\n(.*?)\n\[End", re.DOTALL)


def parts(question: str) -> tuple[str, str, str]:
    """Request, first and second answer as they stand in the question."""
    found = dict(PARTS.findall(question))
    return found["Request"], found["Answer 1"], found["Answer 2"]


def by_length(question: str, number: int = 0) -> str:
    """A judge that scores an answer by its length, and says so."""
    _, first, second = parts(question)
    return f"{1 + len(first) % 10} {1 + len(second) % 10}\nI counted letters."


class JudgeServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, reply: Reply, fault: Fault, delay: float, usage: bool):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply, self.fault, self.delay, self.usage = reply, fault, delay, usage
        self.model = "judge-of-tests"
        self.questions: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        self.busy = self.busiest = 0
        self.guard = threading.Lock()
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is none of a test's business."""


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        with server.guard:
            number = len(server.questions)
            server.questions.append(question)
            server.bodies.append(body)
            server.keys.append(self.headers["Authorization"])
            server.times.append(time.monotonic())
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
        try:
            time.sleep(server.delay)
            fault = server.fault(question, number)
            if fault is None:
                self.answer(question, number)
            else:
                self.misbehave(fault)
        finally:
            with server.guard:
                server.busy -= 1

    def answer(self, question: str, number: int) -> None:
        choice = {"message": {"role": "assistant", "content": self.server.reply(question, number)}}
        body: dict[str, Any] = {"model": self.server.model, "choices": [choice | {"finish_reason": "stop"}]}
        if self.server.usage:
            body["usage"] = {"prompt_tokens": len(question), "completion_tokens": 7}
        self.send(200, json.dumps(body))

    def misbehave(self, fault: str) -> None:
        echo = json.dumps({"error": {"message": f"You sent {self.headers['Authorization']}", "code": "no"}})
        echo = echo.replace("/", r"\/")  # as some servers write it
        if fault == "429":
            self.send(429, echo, retry_after="0.3")
        elif fault == "tomorrow":
            self.send(429, echo, retry_after="86400")
        elif fault.isdigit():
            self.send(int(fault), echo)
        elif fault == "garbage":
            self.send(200, '{"choices": [{"mess')
        elif fault == "page":
            self.send(200, "<html>Welcome to the Wi-Fi", kind="text/html")
        elif fault == "another shape":
            self.send(200, '{"choices": []}')
        elif fault == "cut body":
            self.send(200, '{"choices"', length=4000)
            self.close_connection = True
        elif fault == "cut stream":
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b'5\r\n{"cho\r\n')
            self.close_connection = True
        elif fault == "closed":
            self.close_connection = True
        elif fault == "silence":
            self.server.over.wait(20)
        elif fault == "trickle":
            self.send(200, "", length=1000)
            while not self.server.over.wait(0.05):
                self.wfile.write(b" ")
        elif fault == "redirection":
            self.send_response(307)
            self.send_header("Location", "http://127.0.0.1:9/v1/chat/completions")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            raise AssertionError(fault)

    def send(
        self,
        status: int,
        text: str,
        *,
        kind: str = "application/json",
        length: int | None = None,
        retry_after: str | None = None,
    ) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        if retry_after is not None:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def judge_server(
    reply: Reply = by_length, fault: Fault = lambda question, number: None, *, delay: float = 0.0, usage: bool = True
) -> Iterator[JudgeServer]:
    server = JudgeServer(reply, fault, delay, usage)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()


def answer_rows(count: int, *, form: str = "response", letter: str = "a") -> list[dict[str, Any]]:
    """Lines as `promptkd evaluate` ("response") or `promptkd generate` ("completion") writes them."""
    further = {"rouge_l": 1.0, "exact_match": 0.0} if form == "response" else {"tokens": 3}
    return [
        {"row": row, "prompt": f"Say {row}.", form: letter * (row + 1), "references": ["r" * (2 * row + 3)]}
        | further
        | {"ended": True}
        for row in range(count)
    ]
