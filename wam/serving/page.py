"""The page at `/` and what it asks for, `/live`: one HTML file that holds its style and script, and asks only its own server.

    GET /       the page, the same for everybody: it holds nothing of the server, so it needs no key
    GET /live   what is new, as JSON (`wam.serving.live`); the key, where there is one, in a header, as of every other client

The `Content-Security-Policy` allows the script and the style by their hashes, pictures out of the page itself, and questions to where it
came from: all else, a browser refuses.  Pages from elsewhere can neither read the answers nor ask: a question needs a header that makes a
browser ask first, which is never answered, and without a key only names of this machine are answered, so that a name which was pointed at
it does not help.
"""

from __future__ import annotations

import base64
import hashlib
import http
import time
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from wam.serving.errors import ServingError
from wam.serving.options import is_loopback

if TYPE_CHECKING:
    from wam.serving.server import PolicyServer

ASKS = "X-Wam-Live"  # a header that a page from elsewhere cannot send without being allowed to
MOST_NAME = 200


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def page() -> tuple[bytes, str]:
    """The page, and the policy that it is served under."""
    folder = files("wam.serving") / "static"
    html, style, script = ((folder / f"watch.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    whole = html.replace("/*STYLE*/", style).replace("/*SCRIPT*/", script)
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return whole.encode(), policy


def respond_page() -> Response:
    """The page."""
    body, policy = page()
    return _response(http.HTTPStatus.OK, body, "text/html; charset=utf-8", {"Content-Security-Policy": policy})


async def respond_live(server: PolicyServer, request: Request) -> Response:
    """What is new, for one who may know; waits for it."""
    refused = _refused(server, request.headers)
    if refused is not None:
        return refused
    assert server.live is not None
    given = {name: values[-1] for name, values in parse_qs(request.path.partition("?")[2]).items()}
    watcher, robot, run, after = (given.get(name, "") for name in ("watcher", "robot", "run", "after"))
    if not watcher or any(len(text) > MOST_NAME for text in (watcher, robot, run)) or not (after or "0").isdecimal() or len(after) > 15:
        return _text(http.HTTPStatus.BAD_REQUEST, "ask /live?watcher=NAME&robot=KEY&after=NUMBER&run=NAME\n")
    try:
        server.live.attend(watcher, robot)
        server.hear()
        body = await server.live.poll(watcher, robot, int(after or 0), run, lambda: state(server))
    except ServingError as error:
        return _text(http.HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n")
    return _response(http.HTTPStatus.OK, body, "application/json")


def _refused(server: PolicyServer, headers: Headers) -> Response | None:
    """Why a question is not answered, if so."""
    key = headers.get_all("Authorization")
    if not server.options.admits(key[0] if len(key) == 1 else None):
        return _text(http.HTTPStatus.UNAUTHORIZED, "unauthorized: send the header Authorization: Api-Key KEY\n")
    if headers.get_all(ASKS) != ["1"] or headers.get_all("Origin") or any(site != "same-origin" for site in headers.get_all("Sec-Fetch-Site")):
        return _text(http.HTTPStatus.FORBIDDEN, f"only this server's own page may ask, with the header {ASKS}: 1\n")
    hosts = headers.get_all("Host")
    if server.options.api_key is None and not (len(hosts) == 1 and is_loopback(_name_of(hosts[0]))):
        return _text(http.HTTPStatus.FORBIDDEN, "without a key, only localhost and 127.0.0.1 are answered\n")
    return None


def _name_of(host: str) -> str:
    """A Host header without its port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.rpartition(":")[0] or host


def _text(status: http.HTTPStatus, text: str) -> Response:
    return _response(status, text.encode(), "text/plain; charset=utf-8")


def _response(status: http.HTTPStatus, body: bytes, kind: str, more: Mapping[str, str] | None = None) -> Response:
    fixed = {
        "Content-Type": kind,
        "Content-Length": str(len(body)),
        "Connection": "close",
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
    }
    return Response(status.value, status.phrase, Headers({**fixed, **(more or {})}), body)


# ------------------------------------------------------------------------------------------------ state


def state(server: PolicyServer) -> dict[str, Any]:
    """What the server is and does, in numbers: read off what it keeps anyway."""
    worker, contract, metrics, now = server.worker, server.contract, server.metrics, time.monotonic()
    robots = [
        {
            "key": entry.key,
            "prompt": entry.prompt,
            "plans": entry.plans,
            "step": entry.memory.now,
            "blocks": None if entry.session is None else max(0, entry.session.block),
            "idle_s": round(now - entry.used, 1),
            "stopped": entry.stopped,
        }
        for entry in reversed(server.store.entries.values())
    ]
    told = contract.metadata()
    return {
        "time": round(time.time(), 3),
        "server": {name: told[name] for name in ("server", "embodiment", "cameras", "control_hz", "frame_stride", "block_actions")}
        | {"mode": worker.options.mode, "names": _names(told), "about": dict(contract.about), "checked": worker.surprises is not None},
        "robots": robots,
        "counts": {
            "sessions": len(robots),
            "connections": _by_label(metrics.connections, "").get("", 0),
            "waiting": worker.waiting,
            "missed": _by_label(metrics.missed).get("", 0),
            "errors": _by_label(metrics.errors),
            "gate": _by_label(metrics.gate),
            "ended": _by_label(metrics.evicted),
            "batch": _by_label(metrics.batch, "_bucket"),
        },
    }


def _names(told: Mapping[str, Any]) -> list[str]:
    """A name for each number of an action."""
    groups = told["action_groups"] or {"action": told["action_dim"]}
    return [f"{name} {i}" if size > 1 else name for name, size in groups.items() for i in range(size)]


def _by_label(metric: Any, suffix: str = "_total") -> dict[str, float]:
    """The samples of a counter, a gauge or a histogram by their one label (or none), those that are not 0."""
    samples = [sample for family in metric.collect() for sample in family.samples if sample.name.endswith(suffix)]
    return {next(iter(sample.labels.values()), ""): sample.value for sample in samples if sample.value}
