"""A server that speaks the part of vLLM's protocol that TRL's client uses; no vLLM, no NCCL."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
import trl.generation.vllm_client
import trl.generation.vllm_generation

from helpers.tiny import END_ID


def answer(prompt: list[int]) -> list[int]:
    """Tells which prompt it answers, by its first token and its length."""
    return [prompt[0], *[7] * (len(prompt) % 4), END_ID]


class Server(ThreadingHTTPServer):
    """Speaks the part of vLLM's protocol that TRL's client uses, and keeps what it was sent."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict] = []
        self.calls: list[str] = []
        self.announced: list[dict] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def reply(self, path: str, body: dict) -> dict:
        self.calls.append(path)
        if path == "/update_weights":
            self.announced.append(body["update_info"])
        if path != "/v1/completions":
            return {
                "/v1/models": {"data": [{"id": "student"}]},
                "/server_info": {"vllm_config": {"weight_transfer_config": {"backend": "nccl"}}},
                "/get_world_size": {"world_size": 1},
            }.get(path, {"success": True})
        self.asked.append(body)
        return {
            "choices": [{"prompt_token_ids": ids, "token_ids": answer(ids), "logprobs": None} for ids in body["prompt"]]
        }


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.do_POST()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        text = json.dumps(self.server.reply(self.path.partition("?")[0], body)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@contextmanager
def serving():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def connect(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    """Let TRL's client speak to the server, and weights reach it without NCCL."""
    client = trl.generation.vllm_client
    for module in (client, trl.generation.vllm_generation):
        monkeypatch.setattr(module, "is_vllm_available", lambda *_, **__: True)

    def broadcast(*, iterator, group, src, post_iter_func):
        server.weights.append({name: weight.clone() for name, weight in iterator})

    monkeypatch.setattr(client, "_HAS_STATEFUL_TRAINER_ENGINE", True)
    monkeypatch.setattr(client, "_HAS_RESET_PREFIX_CACHE_SUCCESS", True)
    monkeypatch.setattr(client, "get_ip", lambda: "127.0.0.1", raising=False)
    monkeypatch.setattr(client, "open_trainer_endpoint", lambda _: SimpleNamespace(group=SimpleNamespace()), False)
    monkeypatch.setattr(client, "packed_nccl_broadcast_producer", broadcast, False)
    join = client.VLLMClient.init_communicator
    monkeypatch.setattr(client.VLLMClient, "init_communicator", lambda self, device: join(self, torch.device("cuda")))
