"""A stand-in for W&B's server on the loopback address: as much of its protocol as the client of wandb 0.31 needs."""

import gzip
import json
from collections import defaultdict
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class Server:
    """What arrived: `rows` of each run, by their line as the server counts, so that a line told again replaces one."""

    def __init__(self):
        self.rows = defaultdict(dict)
        self.summaries = {}
        self.asked = []  # the path of each request
        self.url = ""

    def history(self, run):
        """The rows of a run that hold values, as the dashboard would draw them."""
        return [json.loads(row) for _, row in sorted(self.rows[run].items())]

    def answer(self, path, content):
        self.asked.append(path)
        if path.endswith("/graphql"):
            request = json.loads(content)
            variables = request.get("variables") or {}
            return {"data": getattr(self, f"_{request.get('operationName')}", lambda _: {})(variables)}
        if path.endswith("/file_stream"):
            run, files = path.split("/")[-2], json.loads(content).get("files") or {}
            history = files.get("wandb-history.jsonl", {"offset": 0, "content": []})
            self.rows[run].update(enumerate(history["content"], history["offset"]))
        return {}

    def _bucket(self, run):
        tail = [json.loads(row) for _, row in sorted(self.rows[run].items())][-1:]
        counts = {"historyLineCount": len(self.rows[run]), "logLineCount": 0, "eventsLineCount": 0}
        texts = {"historyTail": json.dumps([json.dumps(row) for row in tail]), "eventsTail": "[]", "config": "{}"}
        about = {"id": run, "name": run, "displayName": run, "tags": [], "notes": "", "sweepName": None}
        where = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
        return about | counts | texts | {"summaryMetrics": "{}", "wandbConfig": '{"t": 1}', "project": where}

    def _RunResumeStatus(self, variables):
        run = variables["name"]
        bucket = self._bucket(run) if self.rows[run] else None
        return {"model": {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}, "bucket": bucket}}

    def _UpsertBucket(self, variables):
        run = variables["name"] or variables["id"]
        return {"upsertBucket": {"bucket": self._bucket(run), "inserted": not self.rows[run]}}

    def _CreateRunFiles(self, variables):
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}

    def _Viewer(self, _):
        return {"viewer": {"id": "u", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}}}


@contextmanager
def wandb_server():
    """Runs a Server; its `url` is for WANDB_BASE_URL."""
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self):
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                content = gzip.decompress(content)
            body = json.dumps(server.answer(self.path, content)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = _any  # noqa: N815 (names of http.server)

        def log_message(self, *_):
            pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *_):
            pass  # the client closes its connections without a word

    with Quiet(("127.0.0.1", 0), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_port}"
        Thread(target=http.serve_forever, daemon=True).start()
        yield server
        http.shutdown()
