"""A Hub on 127.0.0.1, and a process that runs train_dpo.py against it with the real clients.

As a script it is that process: it imports the libraries once and forks for each line of its
standard input, a command line as JSON, for their endpoint and cache are fixed at import.
"""

import contextlib
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Hub:
    """Serves repositories in the few requests that huggingface_hub and datasets make.

    repos    "models/org/name" or "datasets/org/name" -> {revision: {path: bytes}}
    faults   repository, repository and path, or "/" -> "hang", "cut", or (status, X-Error-Code)
    port     stays the same, however often it is stopped and started
    """

    def __init__(self):
        self.repos = {}
        self.faults = {}
        self.port = 0
        self.start()

    def add(self, repo, files, revision="main", fault=None):
        """Put files, {path: bytes}, under a revision of a repository; returns its commit."""
        self.repos.setdefault(repo, {})[revision] = files
        if fault:
            self.faults[repo] = fault
        return commit_of(files)

    def start(self):
        self.hanging = threading.Event()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.server.daemon_threads = True
        self.server.hub = self
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self):
        """Let go of what hangs, and answer nobody any more."""
        self.hanging.set()
        self.server.shutdown()
        self.server.server_close()


def commit_of(files):
    digest = hashlib.sha1()
    for path in sorted(files):
        digest.update(path.encode() + files[path])
    return digest.hexdigest()


def folder_files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.hub = self.server.hub
        length = int(self.headers.get("Content-Length", 0))
        body = urllib.parse.parse_qs(self.rfile.read(length).decode())
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        request = re.fullmatch(
            r"/(?P<api>api/)?(?P<kind>models/|datasets/)?(?P<name>[^/]+/[^/]+)"
            r"(/(?P<what>resolve|revision|tree|paths-info)/(?P<revision>[^/]+)(/(?P<file>.*))?)?",
            path,
        )
        if request is None:
            self._fault(self.hub.faults.get("/")) or self._send(b"the Hub")
            return
        repo = f"{request['kind'] or 'models/'}{request['name']}"
        self._answer(repo, request, body)

    do_HEAD = do_POST = do_GET

    def _answer(self, repo, request, body):
        file = request["file"]
        if self._fault(self.hub.faults.get(repo) or self.hub.faults.get(f"{repo}/{file}")):
            return
        if repo not in self.hub.repos:
            self._refuse(401, "RepoNotFound")  # as the Hub does to whom it does not know
            return
        files = self._files(repo, request["revision"] or "main")
        if files is None:
            self._refuse(404, "RevisionNotFound")
        elif request["what"] == "resolve":
            self._send_file(repo, files, file)
        elif request["what"] == "tree":
            self._send_json([entry(path, files[path]) for path in files])
        elif request["what"] == "paths-info":
            self._send_json([entry(path, files[path]) for path in body["paths"] if path in files])
        else:
            siblings = [{"rfilename": path} for path in files]
            facts = {"id": request["name"], "sha": commit_of(files), "siblings": siblings}
            self._send_json({**facts, "tags": [], "private": False, "downloads": 0, "likes": 0})

    def _files(self, repo, revision):
        """The files of a branch, a tag or a commit; None if there is no such revision."""
        revisions = self.hub.repos[repo]
        for name, files in revisions.items():
            if revision in (name, commit_of(files)):
                return files
        return None

    def _send_file(self, repo, files, path):
        if path not in files:
            self._refuse(404, "EntryNotFound")
            return
        content = files[path]
        headers = {"X-Repo-Commit": commit_of(files), "ETag": f'"{sha(content)}"'}
        cut = self.hub.faults.get(f"{repo}/{path}") == "cut"
        self._send(content, headers, cut and self.command == "GET")

    def _fault(self, fault):
        """Do what is to go wrong with this request, if anything; whether it is then done with."""
        if fault == "hang" and (self.command == "GET" or self.path == "/"):
            self.hub.hanging.wait(60)
            self.close_connection = True
        elif fault == "hang":
            return False
        elif isinstance(fault, tuple):
            self._refuse(*fault)
        return fault not in (None, "cut")

    def _refuse(self, status, code=None):
        self._send(b"", {"X-Error-Code": code, "X-Error-Message": code}, status=status)

    def _send_json(self, value):
        self._send(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, content, headers=(), cut=False, status=200):
        start = 0
        if self.headers.get("Range") and status == 200:
            start = int(re.search(r"\d+", self.headers["Range"])[0])
            status = 206
        content = content[start:]
        self.send_response(status)
        for name, value in dict(headers).items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if cut:  # one piece of the file, and never more
            content = b"" if start else content[: len(content) // 2]
            self.close_connection = True
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):
                self.wfile.write(content)

    def log_message(self, *args):
        pass


def sha(content):
    return hashlib.sha1(content).hexdigest()


def entry(path, content):
    return {"type": "file", "path": path, "size": len(content), "oid": sha(content)}


class Client:
    """The process that runs train_dpo.py; its Hub is at a port, and its caches are in a folder."""

    def __init__(self, port, home):
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        own = {
            "HF_ENDPOINT": f"http://127.0.0.1:{port}",
            "HF_HOME": str(home),
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(ROOT),
        }
        self.home = Path(home)
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env={**kept, **own},
            cwd=home,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(self, *arguments):
        """main() with these arguments: its exit code, and all that it printed."""
        print(json.dumps(arguments), file=self.process.stdin, flush=True)
        code, printed = json.loads(self.process.stdout.readline())
        return code, printed

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def serve_commands():
    from huggingface_hub import constants

    import train_dpo
    from support.sources import revisions_used

    # the clients' patience: with a silent server, and between two tries
    constants.HF_HUB_ETAG_TIMEOUT = constants.HF_HUB_DOWNLOAD_TIMEOUT = 0.2
    pause = time.sleep
    time.sleep = lambda seconds: pause(min(seconds, 0.01))
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as printed:
            child = os.fork()
            if child == 0:
                os.dup2(printed.fileno(), 1)
                os.dup2(printed.fileno(), 2)
                code = 99  # an exception that nobody caught: its traceback is printed
                try:
                    code = train_dpo.main(json.loads(line))
                    print("commits read:", json.dumps(revisions_used))
                finally:
                    sys.stdout.flush()
                    if code == 99:
                        sys.excepthook(*sys.exc_info())
                    sys.stderr.flush()
                    os._exit(code)
            _, status = os.waitpid(child, 0)
            printed.seek(0)
            answer = [os.waitstatus_to_exitcode(status), printed.read()]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve_commands()
