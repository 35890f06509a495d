"""`wam bench planner`: what N candidates cost beside one, drawn and imagined on one memory.

    one          actions of one candidate, and what follows from them; as two plans of a session, `skip` and `forward`
    eight        eight candidates and what follows from each, scored by a goal image: the planner
    eight, few   the same, of which only those most unlike each other are imagined (`planner.imagined`)
    copies       eight sessions, each with a memory of its own, for the same work

Nothing is shared between a candidate and another but what they see: so eight cost eight times the arithmetic of one, and less than eight
times as long where one leaves the machine idle (small products wait for weights and for calls).  What holds everywhere is asked of the
planner that imagines few: at most three times one.  Bytes of the past are counted, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from wam.config import PlannerConfig, SamplingConfig
from wam.evaluation.bench.compare import INSTRUCTION, drive, make_policy
from wam.evaluation.bench.report import Output, Report, deliver, facts
from wam.evaluation.bench.rows import Comparison, Count, Row
from wam.evaluation.bench.subject import build_model, size_config
from wam.evaluation.bench.timing import alternate
from wam.inference.candidates import Candidates, imagining
from wam.inference.planner import Planner
from wam.inference.session import Session
from wam.model.shared import SharedCache
from wam.pretrained import Policy, from_pretrained

CANDIDATES, FEW = 8, 3
PAST = 2  # blocks that are remembered
LIMIT, ONE_BY_ONE, AS_COPIES = 3.0, 8.0, 1.15  # times one; times one, without any sharing; times as many sessions
BOTH = "training.modes={skip: 1, forward: 1}"
EXPERT_FROM = 1024  # the width from which actions have an expert of a third, as released systems have


@dataclass(frozen=True)
class PlannerOptions(Output):
    """As the command line says.

    Attributes:
        checkpoint: a policy that is measured too.
        sizes: widths of models with random weights; empty: 256, 512, 1024.
        repeats: rounds of all sides in turns.
        steps, forward_steps: solver steps of drawing, and of imagining.
        quick: two rounds of the smallest, to see that all runs.
    """

    checkpoint: Path | None = None
    sizes: tuple[str, ...] = ()
    repeats: int = 5
    steps: int = 4
    forward_steps: int = 1
    quick: bool = False


def bench_planner(options: PlannerOptions) -> Report:
    """Measure, print, and write what is asked for.

    Raises:
        ValueError: an unknown size, before anything is measured.
        BenchError: with `check`, a limit that does not hold; after everything was printed and written.
    """
    sizes = options.sizes or (("256",) if options.quick else ("256", "512", "1024"))
    configs = {size: size_config(size, BOTH, *_expert(size)) for size in sizes}
    if options.repeats < 1 or options.threads < 1:
        raise ValueError(f"--repeats is {options.repeats} and --threads is {options.threads}; each must be at least 1")
    options = replace(options, repeats=min(2, options.repeats)) if options.quick else options
    device, before, rows = torch.device("cpu"), torch.get_num_threads(), list[Row]()
    torch.set_num_threads(options.threads)
    try:
        if options.checkpoint is not None:
            rows += compare_candidates(from_pretrained(options.checkpoint), "the checkpoint", options)
        for size, config in configs.items():
            rows += compare_candidates(make_policy(build_model(config, device, torch.float32)), size + (f", expert of {config.model.expert_width}" if config.model.expert_width else ""), options)
        report = Report(tuple(rows), facts(options.command, device, torch.float32, options.repeats))
    finally:
        torch.set_num_threads(before)
    deliver(report, options)
    return report


def _expert(size: str) -> tuple[str, ...]:
    return (f"model.expert_width={-(-int(size) // 24) * 8}",) if size.isdigit() and int(size) >= EXPERT_FROM else ()


def compare_candidates(policy: Policy, name: str, options: PlannerOptions) -> list[Row]:
    """Eight candidates against one, and against eight copies of a memory; and the bytes of the past for two and for eight."""
    how, few = SamplingConfig(steps=options.steps), imagining(SamplingConfig(), options.forward_steps)
    config = PlannerConfig("best_of_n", CANDIDATES, "goal", forward_steps=options.forward_steps)
    planners = {"eight": Planner(policy, config), "few": Planner(policy, replace(config, imagined=FEW))}
    session = _remember(policy)

    def plain(of: Session) -> Callable[[], object]:
        def call() -> object:
            return of.plan("forward", few, actions=of.plan("skip", how).actions)

        return call

    copies = session.fork()
    copies.select([0] * CANDIDATES)
    copies.generators = [torch.Generator().manual_seed(seed) for seed in range(CANDIDATES)]
    calls = {"one": plain(session), "copies": plain(copies), **{side: (lambda p=planner: p.plan(session, "skip", how)) for side, planner in planners.items()}}  # type: ignore[misc]
    times = alternate(calls, options.repeats, torch.device("cpu"))
    m = policy.config.model
    at = f"{name}: {m.layers} layers, {options.steps} steps of {policy.config.timeline.actions_per_block} actions, {options.forward_steps} of {policy.config.timeline.latents_per_block} x {policy.model.clock.patches} patches"
    return [
        Comparison(f"best of {CANDIDATES}", at, f"{CANDIDATES} drawn, {CANDIDATES} imagined", "1 drawn and imagined", times["eight"], times["one"], ONE_BY_ONE),
        Comparison(f"best of {CANDIDATES}, few imagined", at, f"{CANDIDATES} drawn, {FEW} imagined", "1 drawn and imagined", times["few"], times["one"], LIMIT),
        Comparison("one memory", at, f"{CANDIDATES} candidates of one session", f"{CANDIDATES} sessions", times["eight"], times["copies"], AS_COPIES),
        Count("bytes of the past", f"{name}, {CANDIDATES} candidates to 1, per mille", round(1000 * _bytes(session, CANDIDATES, how) / _bytes(session, 1, how)), 1000),
    ]


def _remember(policy: Policy) -> Session:
    """A session of one robot that remembers a few blocks of noise, and aims at a picture of it."""
    generator, config = np.random.default_rng(0), policy.config
    target = generator.integers(0, 256, (1, *config.codec.image_size, 3), dtype=np.uint8)
    session = Session(policy, [INSTRUCTION], config.data.embodiment, [0], targets=target)
    for _ in range(PAST):
        drive(session, "skip", SamplingConfig(steps=1), generator)
    frames = generator.integers(0, 256, (1, session.frames_due, *config.codec.image_size, 3), dtype=np.uint8)
    session.observe(frames, generator.normal(size=(1, session.dims.raw_state_dim)).astype(np.float32))
    return session


def _bytes(session: Session, count: int, how: SamplingConfig) -> int:
    """Keys and values that drawing `count` candidates holds beside the session's own memory."""
    candidates = Candidates.open(session, count, session._held(None))
    candidates.draw("skip", how)
    assert isinstance(candidates.at.cache, SharedCache)
    return candidates.at.cache.bytes_held()
