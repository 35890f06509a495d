"""How a server listens, whom it lets in, and how much it takes on.

Loopback needs no key.  Any other address does, and the key comes from a file, so that it stands in no list of processes; it is compared
in constant time and never logged.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import math
import ssl
from dataclasses import dataclass
from pathlib import Path

from wam.serving.memory import TimeRules
from wam.serving.wire import DEFAULT_LIMITS, Limits

LEAST_KEY = 16  # characters


@dataclass(frozen=True)
class ServeOptions:
    """Settings of a server; `wam serve --help` explains them.

    Attributes:
        idle_s: a session unused for longer than this is forgotten.
        spare_s: one unused for longer than this may make room for another.
        rate: requests a second of a connection, on average; `burst` at once.
        grace_s: how long a stopping server lets plans finish.
        page: whether there is a page to watch it.
        watch_imagined: whether the page, while it is open, has the outcome of plans imagined that imagine nothing themselves.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    certificate: Path | None = None
    private_key: Path | None = None
    max_connections: int = 64
    max_sessions: int = 32
    idle_s: float = 600.0
    spare_s: float = 30.0
    rate: float = 100.0
    burst: int = 50
    grace_s: float = 10.0
    max_waiting: int = 64
    limits: Limits = DEFAULT_LIMITS
    times: TimeRules = TimeRules()
    page: bool = True
    watch_imagined: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"the port is {self.port}; expected 0 (any that is free) to 65535")
        for name in ("max_connections", "max_sessions", "burst", "max_waiting"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("idle_s", "rate"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} is {getattr(self, name)}; expected a number above 0")
        for name in ("spare_s", "grace_s"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} is {getattr(self, name)}; expected seconds, 0 or more")
        if self.api_key is None and not is_loopback(self.host):
            raise ValueError(f"the server would listen on {self.host}, where anyone could move the robot; give it an API key (--api-key-file), or listen on 127.0.0.1")
        if self.api_key is not None and len(self.api_key) < LEAST_KEY:
            raise ValueError(f"the API key has {len(self.api_key)} characters; use at least {LEAST_KEY}, such as those of: openssl rand -hex 24")
        if self.watch_imagined and not self.page:
            raise ValueError("what plans lead to is imagined for the page, and there is to be none; leave one of --watch-imagined and --no-page out")
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("a certificate and its private key go together; give both (--cert, --key), or neither")

    def __repr__(self) -> str:
        return f"ServeOptions({self.host}:{self.port}, key {'set' if self.api_key else 'not set'}, TLS {'on' if self.certificate else 'off'})"

    def tls(self) -> ssl.SSLContext | None:
        """The context of the certificate, where there is one.

        Raises:
            ValueError: the files hold no certificate and its key.
        """
        if self.certificate is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.certificate, self.private_key)
        except (ssl.SSLError, OSError) as error:
            raise ValueError(f"{self.certificate} and {self.private_key} are no certificate and private key ({type(error).__name__}); give two PEM files that belong together") from None
        return context

    def admits(self, authorization: str | None) -> bool:
        """Whether a request with this header may speak: `Api-Key KEY` (as openpi's clients send it) or `Bearer KEY`."""
        if self.api_key is None:
            return True
        scheme, _, given = (authorization or "").partition(" ")
        digests = [hashlib.sha256(key.encode("utf-8", "replace")).digest() for key in (given.strip(), self.api_key)]  # of one length, whatever was given
        return hmac.compare_digest(*digests) and scheme.lower() in ("api-key", "bearer")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_key(path: Path) -> str:
    """The API key in a file.

    Raises:
        ValueError: the file is empty, or others may read it.
    """
    if path.stat().st_mode & 0o077:
        raise ValueError(f"{path} can be read by others; chmod 600 {path}")
    key = path.read_text().strip()
    if not key:
        raise ValueError(f"{path} is empty; write a key into it, such as that of: openssl rand -hex 24")
    return key
