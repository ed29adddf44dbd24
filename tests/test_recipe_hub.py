"""Push and load through the real Hub client, against a server that holds what it was sent."""

import base64
import json
import os
import re
import subprocess
import sys
import threading
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from steerlens.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "c" * 40
PUSH = "import sys; import steerlens; print(steerlens.load_recipe(sys.argv[1]).push_to_hub(sys.argv[2], private=True))"
LOAD = "import sys, json; from steerlens import load_recipe; print(json.dumps(load_recipe(sys.argv[1]).to_dict()))"


class Hub(BaseHTTPRequestHandler):
    """The few endpoints of the Hub that creating a repository, committing a file and reading it take."""

    files: dict[str, bytes]
    created: list[dict]

    def do_HEAD(self):
        self._file(body=False)

    def do_GET(self):
        self._file(body=True)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer hf_test":
            return self._json({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            name = self.created[-1]["name"]
            return self._json({"url": f"http://{self.headers['Host']}/me/{name}", "name": f"me/{name}", "id": "1"})
        if self.path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        if self.path.endswith("/commit/main"):
            repo = self.path.removeprefix("/api/models/").removesuffix("/commit/main")
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[f"{repo}/{line['value']['path']}"] = base64.b64decode(line["value"]["content"])
            return self._json(
                {"commitUrl": f"http://{self.headers['Host']}/{repo}/commit/{COMMIT}", "commitOid": COMMIT}
            )
        return self._json({"error": "not here"}, 404)

    def _file(self, *, body):
        repo, resolve, file = self.path.lstrip("/").partition("/resolve/main/")
        content = self.files.get(f"{repo}/{file}") if resolve else b""
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
        else:
            self.send_response(200)
            self.send_header("ETag", f'"{sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", sha1(content).hexdigest())
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if body and content:
            self.wfile.write(content)

    def _json(self, data, status=200):
        content = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    handler = type("Handler", (Hub,), {"files": {}, "created": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(hub, tmp_path):
    def call(code, *arguments, token="hf_test"):
        environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        environment |= {
            "HF_ENDPOINT": hub[1],
            "HF_HOME": str(tmp_path / "hf"),
            "HF_TOKEN": token,
            "HF_HUB_OFFLINE": "0",
        }
        environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)

    return call


def test_what_is_pushed_is_what_is_loaded(hub, run):
    handler, url = hub
    pushed = run(PUSH, "pasta-llama-7b-53heads", "me/mine")
    assert (pushed.returncode, pushed.stdout.strip()) == (0, f"{url}/me/mine/commit/{COMMIT}"), pushed.stderr
    asked = handler.created[0]
    assert asked["name"] == "mine" and (asked.get("visibility") == "private" or asked.get("private") is True)
    assert list(handler.files) == ["me/mine/steerlens.yaml"]
    loaded = run(LOAD, "me/mine")
    assert loaded.returncode == 0, loaded.stderr
    assert Recipe.from_dict(json.loads(loaded.stdout)) == load_recipe("pasta-llama-7b-53heads")


def test_what_the_hub_holds_is_checked_like_a_file(hub, run, tmp_path):
    handler, _ = hub
    good = load_recipe("pasta-tiny").save(tmp_path / "good.yaml").read_text()
    (tmp_path / "own.json").write_text('{"1": [2]}')
    for text, message in (
        (good.replace("alpha", "alhpa"), "me/bad/steerlens.yaml:5: methods[0]: pasta has no parameter 'alhpa'"),
        (re.sub(r"heads:\n( {4}\d.*\n)+", "heads: own.json\n", good), "'own.json' is a file on this machine"),
        (good + "x: !!python/object/apply:os.system [exit]\n", "the tag "),
    ):
        handler.files["me/bad/steerlens.yaml"] = text.encode()
        found = run(LOAD, "me/bad")
        assert found.returncode == 1 and message in found.stderr.splitlines()[-1], found.stderr


def test_a_refusal_of_the_hub_is_told(run):
    missing, refused = run(LOAD, "me/none"), run(PUSH, "pasta-tiny", "me/mine", token="hf_wrong")
    assert "RecipeFetchError: recipe 'me/none' is no file here and cannot be fetched" in missing.stderr
    assert "RecipeFetchError: cannot upload recipe 'pasta-tiny' to 'me/mine': " in refused.stderr
