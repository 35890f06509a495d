"""What the server counts, in Prometheus' words: one registry a server, so that tests and several servers never mix.

Labels are few and fixed (stages, codes of errors, dialects, reasons), so that nothing a client sends can make series.
"""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from wam.inference.gate import BLENDED, CLIPPED, CUTS

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
STAGES = ("decode", "queue", "text", "encode", "first frame", "commit", "prefill", "denoise", "post", "gate", "total")


class Metrics:
    """A server's counters."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.stage = Histogram("wam_stage_seconds", "time that a plan spends in a stage", ["stage"], registry=r, buckets=SECONDS)
        self.batch = Histogram("wam_batch_size", "plans in a forward pass", registry=r, buckets=(1, 2, 4, 8, 16, 32, 64))
        self.requests = Counter("wam_requests_total", "messages answered", ["dialect", "kind"], registry=r)
        self.errors = Counter("wam_errors_total", "refusals", ["code"], registry=r)
        self.gate = Counter("wam_gate_actions_total", "actions that the gate changed or cut off", ["reason"], registry=r)
        self.missed = Counter("wam_deadline_misses_total", "plans that came too late and were not sent", registry=r)
        self.evicted = Counter("wam_sessions_ended_total", "sessions that were ended by the server", ["why"], registry=r)
        self.restarts = Counter("wam_memory_told_total", "how a session was brought up to date", ["how"], registry=r)
        self.sessions = Gauge("wam_sessions", "robots that are remembered", registry=r)
        self.connections = Gauge("wam_connections", "clients that are connected", registry=r)
        self.queue = Gauge("wam_queue_length", "requests that wait for the model", registry=r)
        self.ready = Gauge("wam_ready", "1 once the model is warm", registry=r)
        self.surprise = Histogram("wam_surprise", "what came beside what was imagined; 1: as far off as 1 in 20 held-out frames", registry=r, buckets=(0.25, 0.5, 0.75, 0.85, 1, 1.25, 1.5, 2, 3, 5))
        self.surprises = Counter("wam_surprises_total", "comparisons of plans with what came", ["what"], registry=r)
        self.reloads = Counter("wam_reloads_total", "checkpoints that were to be taken up", ["result"], registry=r)
        self.reloading = Gauge("wam_reloading", "1 while another checkpoint is loaded and warmed up", registry=r)
        self.recorded = Counter("wam_recording_episodes_total", "episodes that were recorded", registry=r)
        self.unrecorded = Counter("wam_recording_dropped_total", "what was not recorded: events for which there was no room, episodes that could not be written or had no instruction or state", ["what"], registry=r)
        self.recording_queue = Gauge("wam_recording_queue_bytes", "pictures that wait to be recorded", registry=r)
        self.received = Counter("wam_received_bytes_total", "bytes of messages received", registry=r)
        self.sent = Counter("wam_sent_bytes_total", "bytes of messages sent", registry=r)
        self._stages = {name: self.stage.labels(name.replace(" ", "_")) for name in STAGES}
        for reason in (*CUTS, CLIPPED, BLENDED):
            self.gate.labels(reason)
        for what in ("surprised", "expected", "still"):
            self.surprises.labels(what)
        for result in ("loaded", "refused", "failed"):
            self.reloads.labels(result)
        for what in ("event", "episode"):
            self.unrecorded.labels(what)

    def stages(self, milliseconds: Mapping[str, float]) -> None:
        """Note a plan's stages."""
        for name, spent in milliseconds.items():
            if name in self._stages:
                self._stages[name].observe(spent / 1e3)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)
