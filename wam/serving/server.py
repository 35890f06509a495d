"""The policy server: websockets on one event loop, one worker thread for the model.

    client --- frame ---> rate, size --- decode (large: a thread) ---> entry, its lock --- job ---> worker
           <-- reply ---------------------------------------------------------------------- future

The loop computes nothing that takes more than a millisecond, so pings and /healthz are answered while the model works.  A connection is answered message by message, in
order; a client that reads slowly holds up itself alone.  A client that goes away while its plan waits takes the plan out of the queue.
Clients that come before the model is warm are let in, and get the metadata they wait for when it is.
"""

from __future__ import annotations

import asyncio
import http
import json
import logging
import threading
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response

from wam.inference.session import Session
from wam.serving.contract import Contract
from wam.serving.errors import ServingError
from wam.serving.events import Ended, Refused, observed
from wam.serving.job import Job, internal
from wam.serving.live import Live
from wam.serving.logs import event
from wam.serving.messages import Dialect, Request, done_reply, error_reply, hear, plan_reply
from wam.serving.options import ServeOptions
from wam.serving.page import respond_live, respond_page
from wam.serving.recorder import Recorder
from wam.serving.reload import Loaded, Reloader
from wam.serving.sessions import Entry, SessionStore
from wam.serving.wire import pack
from wam.serving.worker import Worker

log = logging.getLogger(__name__)

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
SWEEP_S = 5.0
AT_ONCE = 1 << 20  # bytes of a message that the loop reads itself: within a millisecond, less than handing it to a thread and back takes on a busy machine
RECORD_S = 60.0  # longest that a stopping server writes what it recorded


@dataclass
class Bucket:
    """Requests that a connection may still make: refilled at `rate`, up to `burst`."""

    rate: float
    burst: int
    left: float
    at: float

    def take(self, now: float) -> bool:
        """Whether one more may come now."""
        self.left = min(float(self.burst), self.left + (now - self.at) * self.rate)
        self.at = now
        if self.left < 1:
            return False
        self.left -= 1
        return True


@dataclass
class Client:
    """One connection.

    Attributes:
        gone: set when it has ended, so that nothing is planned for it any more.
        own: entries that end with it: those without a session_id.
    """

    socket: ServerConnection
    key: str
    bucket: Bucket
    last_total_ms: float | None = None
    gone: threading.Event = field(default_factory=threading.Event)
    own: set[str] = field(default_factory=set)


class PolicyServer:
    """See the module's docstring."""

    def __init__(self, worker: Worker, options: ServeOptions, recorder: Recorder | None = None, load: Callable[[], Loaded] | None = None):
        """Nothing runs yet; see `start`.

        Args:
            recorder: keeps what comes and goes.
            load: loads the checkpoint anew; None: there is no reload.
        """
        self.worker, self.options, self.recorder = worker, options, recorder
        self.metrics = worker.metrics
        self.reloader = None if load is None else Reloader(worker, load)
        if recorder is not None:
            worker.watchers.append(recorder)
        self.store = SessionStore(self.contract, options.times, options.max_sessions, options.idle_s, options.spare_s)
        self.live = self._live() if options.page else None
        self.server: Server | None = None
        self._warm = asyncio.Event()
        self._failed: Exception | None = None
        self._stopping = False
        self._in_flight = 0
        self._connections = 0
        self._sweeper: asyncio.Task[None] | None = None

    # ------------------------------------------------------------------------------------------ life

    async def start(self) -> None:
        """Listen, and warm the model up."""
        loop = asyncio.get_running_loop()
        o = self.options
        self.server = await serve(
            self._talk,
            o.host,
            o.port,
            ssl=o.tls(),
            process_request=self._http,
            origins=[None],  # no browsers: a page from elsewhere must not reach a server on loopback
            compression=None,
            max_size=o.limits.message_bytes,
            max_queue=2,
            open_timeout=30,
            ping_interval=20,
            ping_timeout=20,
            close_timeout=2,
            server_header=None,
        )

        def warmed(error: Exception | None) -> None:
            loop.call_soon_threadsafe(self._warmed, error)

        self.worker.start(warmed)
        self._sweeper = asyncio.create_task(self._sweep())
        event(log, "listening", host=o.host, port=self.port, tls=o.certificate is not None, key=o.api_key is not None)

    @property
    def contract(self) -> Contract:
        """What clients send and get; another checkpoint has the same sizes."""
        return self.worker.contract

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self.server is not None
        return int(next(iter(self.server.sockets)).getsockname()[1])

    async def ready(self) -> None:
        """Wait until the model is warm.

        Raises:
            RuntimeError: it cannot plan.
        """
        await self._warm.wait()
        if self._failed is not None:
            raise RuntimeError(f"the model could not be warmed up: {self._failed}") from self._failed

    async def stop(self) -> None:
        """Refuse what comes, let finish what is in flight (for `grace_s`), and close."""
        self._stopping = True
        if self.live is not None:
            self.live.close()
        self.metrics.ready.set(0)
        until = time.monotonic() + self.options.grace_s
        while self._in_flight and time.monotonic() < until:
            await asyncio.sleep(0.01)
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self.server is not None:
            self.server.close()
            await self.server.wait_closed()
        await asyncio.to_thread(self.worker.stop, max(0.1, until - time.monotonic()))
        if self.live is not None:
            await asyncio.to_thread(self.live.join, 2.0)
        if self.recorder is not None and not await asyncio.to_thread(self.recorder.close, RECORD_S):
            log.error("what was recorded last could not be written within %g s, and is lost", RECORD_S)
        event(log, "stopped")

    def _live(self) -> Live:
        """What the page is told by.

        Raises:
            ValueError: the page is to show what follows from plans, and the policy does not foresee it.
        """

        def session_of(key: str) -> Session | None:
            entry = self.store.entries.get(key)
            return None if entry is None else entry.session

        live = Live(lambda: self.worker.policy, lambda: self.worker.busy, session_of if self.options.watch_imagined else None)
        self.worker.after.append(live.sent)
        return live

    def hear(self) -> None:
        """Have the page told what happens while somebody watches it, and not else; on the event loop."""
        others = [watcher for watcher in self.worker.watchers if watcher is not self.live]
        self.worker.watchers = [*others, self.live] if self.live is not None and self.live.watched else others

    def _warmed(self, error: Exception | None) -> None:
        self._failed = error
        self._warm.set()
        self.metrics.ready.set(0 if error else 1)
        event(log, "not ready" if error else "ready")

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self.hear()
            self._ended("idle", self.store.expire(time.monotonic()))

    def _ended(self, why: str, keys: list[str]) -> None:
        for key in keys:
            self.worker.tell(Ended(key, why))
            self.metrics.evicted.labels(why).inc()
            event(log, "session ended", session=key, why=why)
        self.metrics.sessions.set(len(self.store.entries))

    # ------------------------------------------------------------------------------------------ HTTP

    def _http(self, connection: ServerConnection, request: HttpRequest) -> Response | Awaitable[Response] | None:
        """Plain requests, and whether a client may connect."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if path == "/readyz":
            fine = self._warm.is_set() and self._failed is None and not self._stopping
            return connection.respond(http.HTTPStatus.OK if fine else http.HTTPStatus.SERVICE_UNAVAILABLE, ("ready, and loading another checkpoint\n" if self.reloader is not None and self.reloader.state == "loading" else "ready\n") if fine else "not ready\n")
        if self.live is not None and path == "/" and "Upgrade" not in request.headers:
            return respond_page()
        if self.live is not None and path == "/live":
            return respond_live(self, request)
        headers = request.headers.get_all("Authorization")
        if not self.options.admits(headers[0] if len(headers) == 1 else None):
            event(log, "unauthorized", logging.WARNING, peer=str(connection.remote_address))
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "unauthorized: send the header Authorization: Api-Key KEY\n")
        if path == "/reload":
            return self._reload(connection, request)
        if path == "/metrics":
            response = connection.respond(http.HTTPStatus.OK, self.metrics.text().decode())
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = PROMETHEUS
            return response
        if self._stopping or self._connections >= self.options.max_connections:
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "stopping\n" if self._stopping else f"all {self.options.max_connections} connections are in use\n")
        return None

    def _reload(self, connection: ServerConnection, request: HttpRequest) -> Response:
        """POST: load the checkpoint anew; GET: how that went."""
        if request.headers.get_all("Origin"):
            return connection.respond(http.HTTPStatus.FORBIDDEN, "not for browsers\n")
        if self.reloader is None or not self._warm.is_set() or self._stopping:
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "there is nothing to reload now\n")
        if getattr(request, "method", "GET") == "POST" and not self.reloader.begin():
            return connection.respond(http.HTTPStatus.CONFLICT, "a checkpoint is being loaded already\n")
        status = http.HTTPStatus.ACCEPTED if self.reloader.state == "loading" else http.HTTPStatus.OK
        return connection.respond(status, json.dumps(self.reloader.told()) + "\n")

    # ------------------------------------------------------------------------------------------ talking

    async def _talk(self, socket: ServerConnection) -> None:
        """One connection, message by message."""
        key = f"connection {uuid.uuid4().hex[:12]}"
        client = Client(socket, key, Bucket(self.options.rate, self.options.burst, float(self.options.burst), time.monotonic()))
        self._connections += 1
        self.metrics.connections.set(self._connections)
        event(log, "connected", client=key, peer=str(socket.remote_address))
        closed = asyncio.ensure_future(socket.wait_closed())
        closed.add_done_callback(lambda _: client.gone.set())
        try:
            await self._warm.wait()
            if self._failed is not None:
                await socket.close(1011, "the model could not be warmed up")
                return
            await socket.send(pack(self.contract.metadata()))
            async for data in socket:
                self._in_flight += 1
                try:
                    reply = await self._answer(client, data)
                    self.metrics.sent.inc(len(reply))
                    await socket.send(reply)
                finally:
                    self._in_flight -= 1
        except ConnectionClosed:
            pass  # it is gone, which is its right
        finally:
            closed.cancel()
            self._connections -= 1
            self.metrics.connections.set(self._connections)
            for own in client.own:
                self.store.drop(own)
                self.worker.tell(Ended(own, "disconnected"))
            self.metrics.sessions.set(len(self.store.entries))
            event(log, "disconnected", client=key, code=socket.close_code)

    async def _answer(self, client: Client, data: str | bytes) -> str | bytes:
        """The reply to one message, whatever it is."""
        dialect: Dialect = "openpi"
        request_id = None
        arrival = time.monotonic()
        self.metrics.received.inc(len(data))
        try:
            if not client.bucket.take(arrival):  # before the message is read, which costs the most
                raise ServingError("rate_limited", f"more than {self.options.rate:g} requests a second", "ask more rarely")
            if isinstance(data, str):
                raise ServingError("bad_message", "the message is text", "send binary frames of msgpack")
            parts = (data, self.options.limits, self.contract)
            heard = hear(*parts) if len(data) <= AT_ONCE else await asyncio.to_thread(hear, *parts)
            dialect, request_id = heard.dialect, heard.request_id
            if self._stopping:
                raise ServingError("shutting_down", "the server is stopping", "hold, and connect again later")
            if isinstance(heard.said, ServingError):
                raise heard.said
            self.metrics.requests.labels(dialect, heard.said.kind).inc()
            return await self._do(client, heard.said, arrival)
        except ServingError as error:
            self.metrics.errors.labels(error.code).inc()
            event(log, "refused", client=client.key, code=error.code, why=error.message)
            return error_reply(dialect, error, request_id)
        except ConnectionClosed:
            raise
        except Exception as error:
            self.metrics.errors.labels("internal_error").inc()
            return error_reply(dialect, internal(error), request_id)

    async def _do(self, client: Client, request: Request, arrival: float) -> str | bytes:
        """What a request asks for, one at a time of each robot."""
        key = f"session {request.session_id}" if request.session_id is not None else client.key
        entry, gone = self.store.get(key, arrival)
        if request.session_id is None:
            client.own.add(key)
        self._ended("room", gone)
        async with entry.lock:
            entry.used = time.monotonic()
            named = {"session_id": request.session_id, "request_id": request.request_id}
            extra = {name: value for name, value in named.items() if value is not None}
            if request.kind == "reset":
                entry.reset()
                self.worker.tell(Ended(key, "reset", request.outcome))
                return done_reply(request.dialect, {"status": "reset", **extra})
            if request.kind == "observe":
                seen = entry.memory.see(request, arrival)
                entry.prompt = entry.prompt if request.prompt is None or entry.session is not None else request.prompt
                if self.worker.watchers:
                    self.worker.tell(observed(key, entry.memory, request, seen, entry.prompt))
                return done_reply(request.dialect, {"status": "observed", "step": seen.step, "frames": len(entry.memory.frames), **extra})
            try:
                reply = await self._plan(client, entry, request, arrival)
            except ServingError as error:
                self.worker.tell(Refused(key, error.code, error.message))
                raise
            if client.last_total_ms is not None:
                reply["server_timing"]["prev_total_ms"] = client.last_total_ms
            client.last_total_ms = (time.monotonic() - arrival) * 1e3
            event(log, "plan", client=client.key, session=key, ms=round(client.last_total_ms, 1), batch=reply["server_timing"]["batch"], cut=reply["plan"]["cut"] is not None)
            return plan_reply(request.dialect, reply | extra)

    async def _plan(self, client: Client, entry: Entry, request: Request, arrival: float) -> dict[str, Any]:
        if self.worker.waiting >= self.options.max_waiting:
            raise ServingError("rate_limited", f"{self.options.max_waiting} requests wait for the model already", "hold; ask again later")
        loop = asyncio.get_running_loop()
        job = Job(entry, request, arrival, time.monotonic() - arrival, loop, loop.create_future(), client.gone)
        self.worker.submit(job)
        return await job.future  # also where the client is gone: the worker may be at it, and the entry is not to be touched before it is done


async def run_server(server: PolicyServer, stop: asyncio.Event, told: Callable[[PolicyServer], None] = lambda _: None) -> None:
    """Serve until `stop` is set; `told` is called once it is ready.

    Raises:
        RuntimeError: the model could not be warmed up.
    """
    await server.start()
    try:
        await server.ready()
        told(server)
        await stop.wait()
    finally:
        await server.stop()
