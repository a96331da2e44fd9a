"""An S3-compatible store on loopback: moto's server in a thread, behind a door that can be shut as outages shut it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import BaseWSGIServer, make_server
from werkzeug.wrappers import Response

from analysis.tracking import environment
from study.storage.places import LOCAL, Address

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
KEY, SECRET = "AKIDofthetests", "nobodymayreadthis"
REFUSALS = {
    503: "<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>",
    403: "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>",
}
WRITES = ("PUT", "POST", "DELETE")


class Store:
    """A server with one bucket.

    Attributes:
        refuses: status that writes are answered with instead of being done; None: they are done.
        writes_left: writes that are done before the rest is refused by 503; None: all.
        conditional: whether it heeds that an object may only be written if it is not there.
        requests: methods and paths of what was asked, in order.
    """

    def __init__(self) -> None:
        self.bucket = f"bucket-{uuid4().hex[:12]}"
        self.refuses: int | None = None
        self.writes_left: int | None = None
        self.conditional = True
        self.requests: list[tuple[str, str]] = []
        self._behind: Application = DomainDispatcherApplication(create_backend_app)
        self._server: BaseWSGIServer | None = None
        self.port = 0
        self.start()
        self.client.create_bucket(Bucket=self.bucket)

    def start(self) -> None:
        """Serve, at the port of before if it was stopped; what was kept is still there."""
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
        self._server = make_server("127.0.0.1", self.port, self._answer, threaded=True)
        self.port = self._server.port
        threading.Thread(target=self._server.serve_forever, name="object store", daemon=True).start()

    def stop(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    @property
    def endpoint(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def uri(self) -> str:
        """Of a prefix in its bucket."""
        return f"s3://{self.bucket}/spft/outputs"

    def environment(self, local: Path) -> dict[str, str]:
        """What a machine that may use it has set; `local`: where it keeps its own part."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            LOCAL: str(local),
        }

    @property
    def client(self) -> Any:
        """The reference client, for looking behind the project's back."""
        return boto3.client(
            "s3", "us-east-1", endpoint_url=self.endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET
        )

    def objects(self, below: str = "") -> dict[str, bytes]:
        """Name below the prefix → contents."""
        listed = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=f"spft/outputs/{below}"
        )
        keys = [found["Key"] for page in listed for found in page.get("Contents", [])]
        read = {key: self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read() for key in keys}
        return {key.removeprefix("spft/outputs/"): data for key, data in read.items()}

    def write(self, name: str, data: bytes) -> None:
        """Put an object behind the project's back."""
        self.client.put_object(Bucket=self.bucket, Key=f"spft/outputs/{name}", Body=data)

    def delete(self, name: str) -> None:
        """Remove an object behind the project's back."""
        self.client.delete_object(Bucket=self.bucket, Key=f"spft/outputs/{name}")

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        refused = self.refuses if method in WRITES else None
        if refused is None and method in WRITES and self.writes_left is not None:
            refused = None if self.writes_left > 0 else 503
            self.writes_left -= 1
        if refused is not None:
            return Response(REFUSALS[refused], status=refused, mimetype="application/xml")(environ, start)
        if not self.conditional:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        return self._behind(environ, start)


@contextmanager
def object_store(local: Path) -> Iterator[Store]:
    """A store that this process and those that it starts may use."""
    store = Store()
    try:
        with environment(**store.environment(local)):
            yield store
    finally:
        store.stop()


def address_of(store: Store) -> Address:
    """As `--storage` would name it."""
    return Address.at(store.uri)
