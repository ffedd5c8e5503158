"""An S3-compatible server on loopback that fails on demand: moto behind a door that throttles,
tears, hangs, refuses or loses.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

BUCKET = "bucket"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}
_ERRORS = {
    "throttle": ("503 Slow Down", "SlowDown"),
    "error": ("500 Internal Server Error", "InternalError"),
}
KINDS = ("throttle", "error", "hang", "torn", "lost")


class FaultyS3:
    """A server on a port of its own, with one bucket.

    Faults: `throttle` and `error` answer so; `hang` answers nothing for `hang_s`; `torn` reads half
    of the request and cuts the connection; `lost` does what is asked and cuts the connection before
    the answer. `down` refuses connections.

    Attributes:
        served: requests by method. injected: faults by kind.
    """

    def __init__(self, hang_s: float = 30.0):
        from moto.server import DomainDispatcherApplication, create_backend_app

        self._app = DomainDispatcherApplication(create_backend_app)
        self._hang_s = hang_s
        self._planned: list[tuple[str, Callable[[dict[str, Any]], bool]]] = []
        self._lock = threading.Lock()
        self.served: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._server: Any = None
        self._listen()
        import boto3

        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        client.create_bucket(Bucket=BUCKET)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to find it."""
        return {**CREDENTIALS, "AWS_ENDPOINT_URL": self.endpoint}

    def plan(self, kind: str, times: int = 1, method: str | None = None, path: str = "") -> None:
        """The next requests (of this method, with `path` in their path) fail like this."""

        def fits(environ: dict[str, Any]) -> bool:
            return (method is None or environ["REQUEST_METHOD"] == method) and path in environ[
                "PATH_INFO"
            ]

        with self._lock:
            self._planned += [(kind, fits)] * times

    @property
    def waiting(self) -> int:
        """Planned faults that no request has met yet."""
        return len(self._planned)

    def forget(self) -> None:
        """No planned fault is left."""
        with self._lock:
            self._planned.clear()

    @contextlib.contextmanager
    def down(self) -> Iterator[None]:
        """Nobody listens for the time of the block."""
        self._close()
        try:
            yield
        finally:
            self._listen()

    def stop(self) -> None:
        self._close()

    def _listen(self) -> None:
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            protocol_version = "HTTP/1.1"

            def log(self, *_: Any) -> None:
                pass

        for _ in range(50):
            try:
                self._server = make_server(
                    "127.0.0.1", self.port, self._serve, threaded=True, request_handler=Quiet
                )
                break
            except (OSError, SystemExit):
                time.sleep(0.1)
        self._server.daemon_threads, self._server.block_on_close = True, False
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()

    def _close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _due(self, environ: dict[str, Any]) -> str | None:
        with self._lock:
            for index, (kind, fits) in enumerate(self._planned):
                if fits(environ):
                    del self._planned[index]
                    self.injected[kind] += 1
                    return kind
        return None

    def _serve(self, environ: dict[str, Any], start_response: Callable) -> Iterable[bytes]:
        self.served[environ["REQUEST_METHOD"]] += 1
        kind = self._due(environ)
        if kind in _ERRORS:
            status, code = _ERRORS[kind]
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            fields = f"<Code>{code}</Code><Message>{kind}</Message>"
            body = f'<?xml version="1.0"?><Error>{fields}</Error>'.encode()
            start_response(
                status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
            )
            return [body]
        if kind == "hang":
            time.sleep(self._hang_s)
        elif kind == "torn":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0) // 2)
        elif kind == "lost":
            list(self._app(environ, lambda *_: None))
        if kind is not None:
            raise _cut(environ)
        # A connection a request: one that is kept alive would be served on while the server is
        # down.
        return self._app(
            environ,
            lambda status, headers, *rest: start_response(
                status, [*headers, ("Connection", "close")], *rest
            ),
        )


def _cut(environ: dict[str, Any]) -> Exception:
    """Ends the connection under the request."""
    with contextlib.suppress(OSError):
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    return ConnectionAbortedError("cut on purpose")
