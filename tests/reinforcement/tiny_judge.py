"""A judge behind an OpenAI-compatible endpoint of this process, whose grades a function gives."""

import contextlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def serving(grade: Callable[[str], int], *, key: str = "") -> Iterator[dict[str, object]]:
    """The section `judge` of a config; the key is asked for, and to be found in JUDGE_KEY."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            assert self.path == "/v1/chat/completions"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            _, mark, shown = body["messages"][0]["content"].partition("Response, between marks ")
            assert mark
            mark, _, shown = shown.partition(":\n")
            response = shown.split(mark)[1].strip()
            self.send_response(200 if not key or self.headers["Authorization"] == f"Bearer {key}" else 401)
            self.end_headers()
            said = f"I think so.\nGrade: {grade(response)}"
            self.wfile.write(json.dumps({"choices": [{"message": {"content": said}}]}).encode())

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {
            "url": f"http://127.0.0.1:{server.server_port}/v1",
            "model": "judge",
            "api_key_variable": "JUDGE_KEY" if key else "",
            "temperature": 0.0,
            "max_tokens": 64,
            "seconds": 30.0,
            "threads": 2,
        }
        server.shutdown()
