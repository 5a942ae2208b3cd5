"""Emulators of buckets on loopback, and a network before them that can be slow, refuse or stall."""

import contextlib
import http.server
import io
import os
import re
import select
import socket
import threading
from collections.abc import Iterator

import pytest
import requests


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def refusal(status: str, kind: str, body: str) -> bytes:
    """An HTTP response."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/{kind}\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


class Network:
    """Hands on connections to `port`.

    Attributes:
      port: where it listens.
      answer: None, or the response to every request from now on; b"" is none, for ever.
      pause: seconds before the bytes of an upload go on.
      uploads: how many objects of checkpoints were sent.
    """

    def __init__(self, to: int):
        self._to, self._socket = to, socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.answer: bytes | None = None
        self.pause, self.uploads = 0.0, 0
        self._never = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def close(self) -> None:
        self._never.set()
        self._socket.close()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.suppress(OSError))  # also after the emulator's end
            stack.enter_context(client)
            server = stack.enter_context(socket.create_connection(("127.0.0.1", self._to)))
            while not self._never.is_set():
                for ready in select.select([client, server], [], [], 0.2)[0]:
                    if not (data := ready.recv(1 << 20)):
                        return
                    if ready is server:
                        client.sendall(data)
                    elif self.answer is None:
                        self._hand_on(data, server)
                    elif self.answer:
                        client.sendall(self.answer)
                        client.shutdown(socket.SHUT_WR)
                        return

    def _hand_on(self, data: bytes, server: socket.socket) -> None:
        upload = re.match(rb"PUT \S*/checkpoints/|POST /upload/.*checkpoints/", data, re.DOTALL)
        self.uploads += bool(upload)
        if upload and self.pause:
            self._never.wait(self.pause)
        server.sendall(data)


@contextlib.contextmanager
def google() -> Iterator[tuple[Network, dict[str, str]]]:
    """gs://bucket, and the environment in which gcsfs finds it.

    Here the emulator gets what it lacks. It does not know the condition ifGenerationMatch=0. It takes
    the last byte off an object that ends in a carriage return, one of 256. It serves one client after
    another: one that is stopped in the middle of a request would stop all others, and one that is
    killed would leave half of an object.
    """
    # As remote.py, before gcsfs is imported: else it asks Google for the type of the bucket, and waits.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    pytest.importorskip("gcsfs")
    server = pytest.importorskip("gcp_storage_emulator.server")
    objects = pytest.importorskip("gcp_storage_emulator.handlers.objects")
    intact, handle = objects._multipart_upload, server.Router.handle
    one_at_a_time = threading.Lock()

    def upload(request, response, storage):
        there = storage.objects.get(request.params["bucket_name"], {})
        if (
            request.query.get("ifGenerationMatch") == ["0"]
            and request.data["meta"]["name"] in there
        ):
            response.status = http.HTTPStatus.PRECONDITION_FAILED
        else:
            sent = request._request_handler.rfile.getvalue()
            request.data["content"] = sent[: sent.rindex(b"\n--")].split(b"\n\n", 2)[2]
            intact(request, response, storage)

    def handle_whole(router, method):
        connection = router._request_handler
        length = int(connection.headers.get("Content-Length") or 0)
        body = connection.rfile.read(length)
        if len(body) == length:
            connection.rfile = io.BytesIO(body)
            with one_at_a_time:
                handle(router, method)

    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http.server, "HTTPServer", http.server.ThreadingHTTPServer)
        patch.setattr(server.Router, "handle", handle_whole)
        patch.setattr(objects, "_multipart_upload", upload)
        running = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
        running.start()
        network = Network(port)
        try:
            url = f"http://127.0.0.1:{network.port}"
            yield network, {"STORAGE_EMULATOR_HOST": url, "FSSPEC_GS_TOKEN": "anon"}
        finally:
            network.close()
            running.stop()


@contextlib.contextmanager
def amazon() -> Iterator[tuple[Network, dict[str, str]]]:
    """s3://bucket, and the environment in which s3fs finds it."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server")
    import boto3

    running = server.ThreadedMotoServer("127.0.0.1", port := free_port(), verbose=False)
    running.start()
    network = Network(port)
    try:
        keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        url = f"http://127.0.0.1:{network.port}"
        # What is stored belongs to the process, so an earlier test's bucket would be there again.
        requests.post(f"{url}/moto-api/reset", timeout=60)
        names = {name.lower(): value for name, value in keys.items()}
        client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", **names)
        client.create_bucket(Bucket="bucket")
        yield network, keys | {"AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1"}
    finally:
        network.close()
        running.stop()


KINDS = {"gs": google, "s3": amazon}
