"""Servers on this machine that stand in for W&B's: one that works as far as a run needs it to, and several that do not."""

import http.server
import json
import socket
import threading
from typing import Any, ClassVar


class Works(http.server.BaseHTTPRequestHandler):
    """Answers what a run asks while it starts, logs and ends; `rows` and `summaries` collect what is logged."""

    protocol_version = "HTTP/1.1"
    rows: ClassVar[list[dict[str, Any]]] = []
    runs: ClassVar[list[dict[str, Any]]] = []
    summaries: ClassVar[list[dict[str, Any]]] = []
    stalled = threading.Event()

    def do_GET(self):
        self.answer({})

    def do_PUT(self):
        self.body()
        self.answer({})

    def do_POST(self):
        body = self.body()
        while self.stalled.is_set():
            threading.Event().wait(0.1)
        self.answer(self.graphql(**json.loads(body)) if self.path == "/graphql" else self.file_stream(json.loads(body)))

    def graphql(self, query, variables=None, **_):
        if "upsertBucket" in query:
            self.runs.append(variables)
            project = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "somebody"}}
            bucket = {"id": "b", "name": variables["name"], "displayName": variables["displayName"], "config": "{}", "project": project}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"http://{self.headers['host']}/upload/{name}"} for name in variables["files"]]
            return {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
        if "createArtifact(" in query:  # a table's: known already, so that nothing of it has to be uploaded
            artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"id": "s", "latestArtifact": None}}
            return {"data": {"createArtifact": {"artifact": artifact}}}
        return {"data": {}}

    def file_stream(self, body):
        lines = (body.get("files") or {}).get("wandb-history.jsonl", {}).get("content", [])
        self.rows.extend(json.loads(line) for line in lines)
        summaries = (body.get("files") or {}).get("wandb-summary.json", {}).get("content", [])
        self.summaries.extend(json.loads(text) for text in summaries)
        return {"exitcode": None, "limits": {}}

    def body(self):
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def answer(self, content, code=200):
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


class Refuses(Works):
    """Knows no key."""

    def do_POST(self):
        self.body()
        self.answer({}, 401)


class Fails(Works):
    """Is broken."""

    def do_POST(self):
        self.body()
        self.answer({}, 500)


class Nonsense(Works):
    """Answers everything, as a hotel's login page does, but is not W&B."""

    def graphql(self, **_):
        return {}


class Half(Works):
    """Answers the first question and then no more."""

    def do_POST(self):
        threading.Event().wait()


class Quiet(http.server.ThreadingHTTPServer):
    """Prints nothing about clients that hang up."""

    daemon_threads = True

    def handle_error(self, request, client_address):
        pass


def serve(handler):
    """The address of a server with this handler, running in a thread until the process ends."""
    server = Quiet(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"


def hung():
    """The address of a listener that accepts every connection and never says a word."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(50)
    held = []

    def accept():
        while True:
            held.append(listener.accept())

    threading.Thread(target=accept, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"
