"""What a client is told when there is no plan for it: a code that programs read, a sentence, and a remedy.

A server that cannot answer says so and sends no action; a client that gets no action holds.  Nothing of the server's insides (paths,
tracebacks) is in an error: an unexpected one is logged there under a number, and the client gets the number.
"""

from __future__ import annotations

from typing import Any, Literal

Code = Literal[
    "bad_message",
    "too_large",
    "missing_key",
    "wrong_type",
    "wrong_shape",
    "not_finite",
    "unknown_endpoint",
    "unknown_embodiment",
    "unknown_mode",
    "bad_value",
    "stale_observation",
    "deadline_expired",
    "gate_refused",
    "stopped",
    "rate_limited",
    "too_many_sessions",
    "shutting_down",
    "internal_error",
]

# What each code means to a client: whether the same request may succeed later without a change by a person.
CODES: dict[Code, tuple[bool, str]] = {
    "bad_message": (False, "the bytes are no message of this protocol"),
    "too_large": (False, "a message, an array or a count is above the server's limits"),
    "missing_key": (False, "the message lacks something that the policy needs"),
    "wrong_type": (False, "a value has another type than the policy takes"),
    "wrong_shape": (False, "an array has another shape than the policy takes"),
    "not_finite": (False, "a number is NaN or infinite"),
    "unknown_endpoint": (False, "there is no such endpoint"),
    "unknown_embodiment": (False, "the policy was not trained for this robot"),
    "unknown_mode": (False, "there is no such mode, or it plans no actions"),
    "bad_value": (False, "a value is out of its range"),
    "stale_observation": (True, "the observation is older than one that this session has already seen"),
    "deadline_expired": (True, "the plan would have come too late, and was not sent"),
    "gate_refused": (True, "the action gate let nothing of the plan through"),
    "stopped": (False, "the action gate stopped this session; only a reset goes on"),
    "rate_limited": (True, "too many requests a second"),
    "too_many_sessions": (True, "all of the server's sessions are in use"),
    "shutting_down": (True, "the server is stopping"),
    "internal_error": (True, "something is wrong with the server; its log says what, under the number in the message"),
}


class ServingError(Exception):
    """A refusal that a client is told about."""

    def __init__(self, code: Code, message: str, remedy: str):
        super().__init__(f"{message}; {remedy}")
        assert code in CODES, code
        self.code, self.message, self.remedy = code, message, remedy

    def to_dict(self) -> dict[str, Any]:
        """As it goes over the wire."""
        return {"code": self.code, "message": self.message, "remedy": self.remedy, "retry": CODES[self.code][0]}
