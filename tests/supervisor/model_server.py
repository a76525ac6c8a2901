"""A stand-in for an engine's OpenAI server, strict, of the standard library: it answers, and remembers what it saw.

It has what an engine has beside its API: paths that load weights, put it to sleep, run code. Each answers 200.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

MODEL = "tiny"
LENGTH = 2048
PROMPT_TOKENS = 11
PIECES = ("Hel", "lo", " you")
ADMIN = (
    *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/update_weights", "/collective_rpc", "/sleep", "/wake_up"),
    *("/tokenize", "/detokenize", "/invocations", "/pause", "/abort_requests", "/v1/embeddings", "/v1/messages"),
)
LOOKS = ("/health", "/metrics", "/load", "/version", "/server_info", "/docs", "/openapi.json", "/v1/responses/resp_1")


class Seen(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    body: Any


class ModelServer:
    """On loopback. ``seen``: every request, in order; ``cancelled``: answers whose client went away."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self.seen: list[Seen] = []
        self.cancelled = 0
        self.produced = 0
        owner = self

        class Handler(_Handler):
            server_of = owner

        class Server(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        self._server = Server((host, port), Handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def paths(self) -> list[str]:
        """What was asked for, but for what the relay itself wants to know."""
        return [f"{each.method} {each.path}" for each in self.seen if each.path != "/v1/models"]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: ModelServer

    def log_message(self, *_arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self._saw(None)
        if self.path == "/v1/models":
            self._json({"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": LENGTH}]})
        else:
            self._json({"done": self.path}, 200 if self.path in LOOKS else 404)

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            body = json.loads(raw)
        except ValueError:
            body = raw.decode("latin-1")
        self._saw(body)
        if self.path.startswith("/v1/") and not isinstance(body, dict):
            self._json({"error": {"message": "no JSON object", "code": 400}}, 400)
        elif self.path == "/v1/completions":
            self._complete(body, "text_completion")
        elif self.path == "/v1/chat/completions":
            self._complete(body, "chat.completion")
        elif self.path == "/v1/responses":
            self._respond(body)
        else:
            self._json({"done": self.path}, 200 if self.path in ADMIN else 404)

    def _saw(self, body: Any) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server_of.seen.append(Seen(self.command, self.path, headers, body))

    def _json(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    @staticmethod
    def _text(body: Any) -> str:
        return json.dumps(body.get("messages") or body.get("prompt") or body.get("input"))

    def _complete(self, body: Any, kind: str) -> None:
        text = self._text(body)
        if "reject" in text:
            self._json({"error": {"message": "no", "type": "BadRequestError", "code": 400}}, 400)
            return
        if "break" in text and not body.get("stream"):
            self.close_connection = True
            self.server_of.produced += 5
            return
        asked = body.get("max_completion_tokens") or body.get("max_tokens") or 1 << 20
        count = min(asked, 1000 if "long" in text else len(PIECES))
        if body.get("stream"):
            self._stream(body, kind, count, slow="slow" in text, wide=1000 if "wide" in text else 1)
            return
        self.server_of.produced += count
        choices = [
            {"index": at, "finish_reason": "stop", "message": {"role": "assistant", "content": "".join(PIECES)}}
            for at in range(body.get("n", 1))
        ]
        self._json({"id": "c-1", "object": kind, "model": MODEL, "choices": choices,
                    "usage": _usage(count * body.get("n", 1))})  # fmt: skip

    def _stream(self, body: Any, kind: str, count: int, *, slow: bool, wide: int) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        options = body.get("stream_options") or {}
        try:
            for at in range(count):
                piece = {"content": PIECES[at % len(PIECES)] * wide}
                choice = {"index": 0, "delta": piece, "finish_reason": "stop" if at == count - 1 else None}
                event: dict[str, Any] = {"id": "c-2", "object": kind + ".chunk", "model": MODEL, "choices": [choice]}
                if options.get("continuous_usage_stats"):
                    event["usage"] = _usage(at + 1)
                self._event(event)
                self.server_of.produced += 1
                if slow:
                    time.sleep(0.02)
            if options.get("include_usage"):
                self._event(
                    {"id": "c-2", "object": kind + ".chunk", "model": MODEL, "choices": [], "usage": _usage(count)}
                )
            self._chunk(b"data: [DONE]\n\n")
            self._chunk(b"")
        except OSError:
            self.server_of.cancelled += 1
            self.close_connection = True

    def _respond(self, body: Any) -> None:
        count = min(body.get("max_output_tokens", 1 << 20), len(PIECES))
        usage = {"input_tokens": PROMPT_TOKENS, "output_tokens": count, "input_tokens_details": {"cached_tokens": 4}}
        content = [{"type": "output_text", "text": "".join(PIECES), "annotations": []}]
        output = [{"type": "message", "role": "assistant", "id": "m-1", "status": "completed", "content": content}]
        about = {"id": "r-1", "object": "response", "created_at": 1, "status": "completed", "model": MODEL}
        more = {"parallel_tool_calls": True, "tool_choice": "auto", "tools": []}
        answer = {**about, **more, "output": output, "usage": usage}
        if not body.get("stream"):
            self._json(answer)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._event({"type": "response.created", "response": {**answer, "usage": None, "status": "in_progress"}})
        for piece in PIECES[:count]:
            self._event({"type": "response.output_text.delta", "delta": piece, "item_id": "m-1"})
        self._event({"type": "response.completed", "response": answer})
        self._chunk(b"")

    def _event(self, event: dict[str, Any]) -> None:
        named = f"event: {event['type']}\n" if "type" in event else ""
        self._chunk(f"{named}data: {json.dumps(event)}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.flush()


def _usage(output: int) -> dict[str, Any]:
    details = {"cached_tokens": 8}
    return {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": output, "total_tokens": PROMPT_TOKENS + output,
            "prompt_tokens_details": details}  # fmt: skip
