"""Runs a ComfyUI server with this pack in a folder of its own, and talks to it as a browser does."""

import http.client
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import websocket
from PIL import Image

from .hosts import REPOSITORY, Host

ADDRESS = "127.0.0.1"
BOOT_TIMEOUT_S = 180
HTTP_TIMEOUT_S = 60
STOP_TIMEOUT_S = 10
POLL_INTERVAL_S = 0.1
PREVIEW_IMAGE = 1  # ComfyUI protocol.py, BinaryEventTypes
OFFLINE = {
    "PYTHONPATH": str(REPOSITORY / "tests" / "offline"),  # refuses what tries, and the test fails; see its sitecustomize.py
    # What is no Python is sent to a port where nothing listens, and fails at once instead of reaching the network.
    "HTTP_PROXY": f"http://{ADDRESS}:9",
    "HTTPS_PROXY": f"http://{ADDRESS}:9",
    "ALL_PROXY": f"http://{ADDRESS}:9",
    "NO_PROXY": f"{ADDRESS},localhost",
}

Graph = dict[str, dict[str, Any]]  # a workflow in API format: node id -> {"class_type": ..., "inputs": {...}}
Event = dict[str, Any]  # a websocket message: {"type": ..., "data": {...}}


class ServerError(RuntimeError):
    """The server did not start, died or answered with an error; the message ends with its log."""


class NoAnswer(ServerError):
    """The server is not there: not yet, or no longer."""


class PromptRejected(ServerError):
    """The server found the graph invalid before running it."""

    def __init__(self, error: dict[str, Any], node_errors: dict[str, dict[str, Any]]) -> None:
        super().__init__(f"graph rejected: {json.dumps(error)}\n{json.dumps(node_errors, indent=2)}")
        self.error = error
        self.node_errors = node_errors  # node id -> {"class_type": ..., "errors": [{"type": ..., "details": ...}]}


@dataclass
class Result:
    """What one run of a graph gave. previews are encoded images (JPEG or PNG), in the order they came.

    error is the last execution_error, which names node and exception. It may be set on success as well: a node that
    returns an ExecutionBlocker with a message reports one while the rest of the graph goes on.
    """

    prompt_id: str
    status: Literal["success", "error", "interrupted"] | None = None  # None only while it runs
    events: list[Event] = field(default_factory=list)
    previews: list[bytes] = field(default_factory=list)
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)  # node id -> what its preview area shows
    error: dict[str, Any] | None = None


class ComfyServer:
    """A context manager: the server answers inside the with block and is gone after it.

    Args:
        host: the ComfyUI to run.
        base_directory: a folder for models, input, output, user data and the log; made if it is missing.
        folder: the name under custom_nodes by which the pack is installed.
        pack: the root of the pack.
        models: path under models -> file or folder, which is linked there: {"blip3o/tiny": checkpoint}.
        extra_args: more arguments for ComfyUI's main.py.
        environment: environment variables to add to the server's, over the ones that keep it offline.
    """

    def __init__(
        self,
        host: Host,
        base_directory: Path,
        *,
        folder: str = "ComfyUI-BLIP3o",
        pack: Path = REPOSITORY,
        models: Mapping[str, Path] | None = None,
        extra_args: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.host = host
        self.base_directory = base_directory.resolve()
        self.folder = folder
        self.pack = pack
        self.models = dict(models or {})
        self.extra_args = list(extra_args)
        self.environment = dict(environment or {})
        self.port = 0  # chosen at start
        self._process: subprocess.Popen[bytes] | None = None
        self._http = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach this machine

    def __enter__(self) -> "ComfyServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the process and returns when it answers. Raises ServerError with the end of its log if it doesn't."""
        links = {f"custom_nodes/{self.folder}": self.pack, **{f"models/{path}": target for path, target in self.models.items()}}
        for path, target in links.items():
            if not (self.base_directory / path).is_symlink():  # there already when it is started again
                link(self.base_directory / path, target)
        self.port = free_port()
        with self._log_file.open("wb") as log_file:
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.host.tree,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # its own process group: stop() takes its children along
            )
        try:
            self._wait_until_it_answers(time.monotonic() + BOOT_TIMEOUT_S)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends the server and its children; does nothing if it has ended already."""
        if self._process is None:
            return
        for sig in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, sig)
                self._process.wait(STOP_TIMEOUT_S)
            except ProcessLookupError:
                break  # no process of the group is left
            except subprocess.TimeoutExpired:
                continue
        self._process.wait()

    def log(self) -> str:
        """Everything the server has printed so far, without colour codes."""
        return re.sub(r"\x1b\[[0-9;]*m", "", self._log_file.read_text(errors="replace"))

    def is_alive(self) -> bool:
        """Whether the process runs and answers."""
        if self._process is None or self._process.poll() is not None:
            return False
        try:
            self.get("/system_stats")
        except ServerError:
            return False
        return True

    @property
    def pid(self) -> int:
        """Of the server process."""
        return self._running().pid

    def kill(self) -> None:
        """As the system does when memory is gone: no clean-up, no warning."""
        os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def rss_bytes(self) -> int:
        """Resident memory of the server process (Linux)."""
        pages = Path(f"/proc/{self._running().pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def get(self, path: str, *, timeout_s: float = HTTP_TIMEOUT_S) -> Any:
        """The JSON answer to a GET."""
        return json.loads(self._request(path, timeout_s=timeout_s))

    def post(self, path: str, body: Any, *, timeout_s: float = HTTP_TIMEOUT_S) -> Any:
        """The JSON answer to a POST of a JSON body; None where the server answers with nothing, as /interrupt does."""
        answer = self._request(path, json.dumps(body).encode(), timeout_s=timeout_s)
        return json.loads(answer) if answer else None

    def object_info(self) -> dict[str, dict[str, Any]]:
        """Node id -> its inputs, outputs, category and module."""
        return self.get("/object_info")

    def queue(self, graph: Graph, *, client_id: str | None = None, extra_data: dict[str, Any] | None = None) -> str:
        """Queues the graph and returns its prompt id. Raises PromptRejected if the server finds it invalid.

        The server also accepts a graph with invalid output nodes as long as another output is valid; see its log then.
        """
        body: dict[str, Any] = {"prompt": graph}
        if client_id is not None:
            body["client_id"] = client_id
        if extra_data is not None:
            body["extra_data"] = extra_data
        return self.post("/prompt", body)["prompt_id"]

    def run(
        self,
        graph: Graph,
        *,
        extra_data: dict[str, Any] | None = None,
        timeout_s: float = 300,
        on_event: Callable[[Event], None] | None = None,
    ) -> Result:
        """Queues the graph and waits until the server is done with it, however that ends.

        on_event sees every JSON event as it comes and may call the server, for example to interrupt.
        Raises PromptRejected if the graph is invalid, NoAnswer if the server dies, and ServerError if the graph takes
        longer than timeout_s; it is interrupted then, so that the server can serve the next test.
        """
        client_id = uuid.uuid4().hex
        deadline = time.monotonic() + timeout_s
        with self._listen(client_id) as connection:  # before queueing, or the first events are lost
            result = Result(self.queue(graph, client_id=client_id, extra_data=extra_data))
            while not self._is_last_event(event := self._next_event(connection, result, deadline), result.prompt_id):
                if on_event is not None:
                    on_event(event)
        result.outputs = self.get(f"/history/{result.prompt_id}")[result.prompt_id]["outputs"]
        return result

    def interrupt(self) -> None:
        """Asks the server to stop the graph that runs now; its run() then ends with status 'interrupted'."""
        self.post("/interrupt", {})

    def images(self, result: Result, node_id: str | None = None) -> list[Image.Image]:
        """The images a run has saved or previewed, of one node or of all."""
        nodes = result.outputs.values() if node_id is None else [result.outputs[node_id]]
        found = [image for node in nodes for image in node.get("images", [])]  # {"filename", "subfolder", "type"}
        return [Image.open(io.BytesIO(self._request(f"/view?{urllib.parse.urlencode(image)}"))) for image in found]

    @property
    def _log_file(self) -> Path:
        return self.base_directory / "server.log"

    def _command(self) -> list[str]:
        return [
            str(self.host.python), "main.py", "--cpu", "--listen", ADDRESS, "--port", str(self.port),
            "--base-directory", str(self.base_directory),
            "--database-url", f"sqlite:///{self.base_directory / 'comfyui.db'}",  # else a locked file inside the tree
            "--disable-api-nodes", "--disable-all-custom-nodes", "--whitelist-custom-nodes", self.folder,
            "--preview-method", "auto", *self.extra_args,
        ]

    def _environment(self) -> dict[str, str]:
        """This process's environment without its Python settings and proxies; Hugging Face caches start empty."""
        ours = {name: value for name, value in os.environ.items()
                if not name.startswith("PYTHON") and not name.lower().endswith("_proxy")}
        homes = {"HF_HOME": str(self.base_directory / "huggingface")}
        return ours | OFFLINE | homes | {"PYTHONUNBUFFERED": "1", "PYTHONNOUSERSITE": "1"} | self.environment

    def _running(self) -> "subprocess.Popen[bytes]":
        """The server's process. Raises ServerError with the end of the log if it has ended."""
        if self._process is None:
            raise ServerError("the server has not been started: use `with ComfyServer(...) as server`")
        if self._process.poll() is not None:
            raise ServerError(f"the server has ended with exit status {self._process.returncode}.{self._end_of_log()}")
        return self._process

    def _end_of_log(self) -> str:
        return f" End of {self._log_file}:\n{self.log()[-4000:]}"

    def _wait_until_it_answers(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            self._running()
            try:
                self.get("/system_stats", timeout_s=5)
            except NoAnswer:
                time.sleep(POLL_INTERVAL_S)
            else:
                self._running()  # it was ours that answered, not another server that took the port
                return
        raise ServerError(f"the server did not answer within {BOOT_TIMEOUT_S} s.{self._end_of_log()}")

    def _request(self, path: str, body: bytes | None = None, *, timeout_s: float = HTTP_TIMEOUT_S) -> bytes:
        """The body of the answer. Raises PromptRejected, NoAnswer, or ServerError for another error status."""
        headers = {"Content-Type": "application/json"} if body is not None else {}
        request = urllib.request.Request(f"http://{ADDRESS}:{self.port}{path}", data=body, headers=headers)
        try:
            with self._http.open(request, timeout=timeout_s) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            answer = error.read().decode(errors="replace")
            if path == "/prompt" and error.code == 400:
                rejection = json.loads(answer)
                raise PromptRejected(rejection["error"], rejection["node_errors"]) from error
            message = f"{request.get_method()} {path} gave {error.code}: {answer}"
            raise ServerError(f"{message}\n{self._end_of_log()}") from error
        except (OSError, http.client.HTTPException) as error:
            raise NoAnswer(f"{request.get_method()} {path}: {error}.{self._end_of_log()}") from error

    @contextmanager
    def _listen(self, client_id: str) -> Iterator[websocket.WebSocket]:
        address = f"ws://{ADDRESS}:{self.port}/ws?clientId={client_id}"
        try:
            connection = websocket.create_connection(address, timeout=HTTP_TIMEOUT_S, http_no_proxy=[ADDRESS])
        except OSError as error:
            raise NoAnswer(f"{address}: {error}.{self._end_of_log()}") from error
        try:
            yield connection
        finally:
            connection.close()

    def _next_event(self, connection: websocket.WebSocket, result: Result, deadline: float) -> Event:
        """Waits for the next JSON event and notes in the result what it and the binary messages before it say."""
        while True:
            message = self._receive(connection, result, deadline)
            if isinstance(message, str):
                break
            kind, _encoding = struct.unpack_from(">II", message)
            if kind == PREVIEW_IMAGE:
                result.previews.append(message[8:])
        event = json.loads(message)
        result.events.append(event)
        if event["data"].get("prompt_id") == result.prompt_id:
            match event["type"]:
                case "execution_success":
                    result.status = "success"
                case "execution_interrupted":
                    result.status = "interrupted"
                case "execution_error":
                    result.status, result.error = "error", event["data"]
        return event

    def _receive(self, connection: websocket.WebSocket, result: Result, deadline: float) -> str | bytes:
        try:
            # Asked before each message: a graph that keeps on sending progress would never let recv() time out.
            if (time_left_s := deadline - time.monotonic()) <= 0:
                raise websocket.WebSocketTimeoutException
            connection.settimeout(time_left_s)
            return connection.recv()
        except websocket.WebSocketTimeoutException as error:
            self.interrupt()
            raise ServerError(f"graph {result.prompt_id} was not done in time; the last events were "
                              f"{result.events[-5:]}.{self._end_of_log()}") from error
        except (websocket.WebSocketConnectionClosedException, ConnectionError) as error:
            raise NoAnswer(f"the connection was closed during graph {result.prompt_id}.{self._end_of_log()}") from error

    @staticmethod
    def _is_last_event(event: Event, prompt_id: str) -> bool:
        """Whether the graph is done and in /history.

        execution_success and the like are sent before the history is written, and execution_error is not always the end
        (see Result); this one comes last in every case.
        """
        data = event["data"]
        return event["type"] == "executing" and data["node"] is None and data.get("prompt_id") == prompt_id


def link(path: Path, target: Path) -> None:
    """Makes `path` a symbolic link to an existing file or folder, and the folders above it."""
    if not target.exists():
        raise FileNotFoundError(f"{target} does not exist, so it cannot be linked as {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target.resolve(), target_is_directory=target.is_dir())


def free_port() -> int:
    """A TCP port that was free a moment ago; if another process takes it first, start() raises."""
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        return probe.getsockname()[1]
