"""The loop of the field: observe, infer, act, predict, check, replan; for one robot or for many side by side.

    now ->                      t                 t + delay
    queue (decided actions)     a a a a a a a a | . . .
    plan asked for at t         [ ------- delay ------- ] taken up through the gate: replaces, or joins, what is left of the queue
    what it foresaw             z1 ....... z2 .......     compared with the frames of that time as they come: a surprise asks for a plan at once

Time is counted in control steps.  Whoever moves the robots (a simulator's driver, a server) calls three functions in turn:

    decide(robots)      take up what is ready, plan for all that are due, in shared forward passes
    stretch(robot)      what it does until the next moment at which something is to be decided
    saw(robot, ...)     what came of it

Nothing is made up: where a robot has no decided action it does what its `hold` says (stand still, or repeat its last command), and that is
counted.  A plan that the gate refuses leaves the queue as it was.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from wam.config import SamplingConfig
from wam.inference.adapt import Adaptive, asks_for_motion, why_stalled
from wam.inference.batch import Call, Commit, Go, Think, run
from wam.inference.check import Checker, Surprise, SurpriseScale
from wam.inference.compute import check_flops, plan_flops
from wam.inference.foreseen import Foreseen
from wam.inference.gate import MAX_HISTORY, Gate, GateRefusal
from wam.inference.guided import plan_guided
from wam.inference.memory import PolicySpan, StepMemory
from wam.inference.planner import Planner, Simulate, search_flops
from wam.inference.robot import Loop, Made, Pending, Robot, Way, held
from wam.inference.session import Plan, Session, memory_lasts
from wam.model.conditions import Conditions
from wam.pretrained import Policy

LATENCIES = 10  # newest measured delays, whose largest is what the next plan is expected to take


class Executor:
    """See the module's docstring.

    Args:
        gate: stands between plans and robots.
        scale: what surprise is measured in; needed for a check.
        watch: told of every plan when it is made.
        simulate: runs the robots' world ahead, for a planner that is to know what would come.
    """

    def __init__(self, policy: Policy, loop: Loop, gate: Gate, scale: SurpriseScale | None = None, watch: Callable[[Made], None] = lambda made: None, simulate: Simulate | None = None):
        """Check that loop and policy fit.

        Raises:
            ValueError: a replan interval or a delay that a plan does not cover, or a check without a calibration.
        """
        self.policy, self.loop, self.gate, self.watch = policy, loop, gate, watch
        t = policy.config.timeline
        self.span, self.stride, self.horizon = PolicySpan.of(policy), t.stride, t.actions_per_block
        check_times(policy, loop)
        self.planner = Planner(policy, loop.planner, simulate) if loop.planner.kind != "none" else None
        self.checker = self._new_checker(scale)
        self._texts: dict[str, Conditions] = {}
        self._flops: dict[Way, float] = {}
        self._took: deque[int] = deque(maxlen=LATENCIES)

    def _new_checker(self, scale: SurpriseScale | None) -> Checker | None:
        if self.loop.check.source == "none":
            return None
        if scale is None:
            raise ValueError("check.source asks for surprise, which is measured in errors of validation, and none are given; run `wam calibrate --checkpoint DIR`")
        checker = Checker(self.policy, self.loop.check, scale)
        for mode, steps in {(self.loop.mode, self.loop.sampling.steps), (self.loop.check.escalate or self.loop.mode, self.loop.check.escalated_steps or self.loop.sampling.steps)}:
            checker.require(*self._imagines_as(Way(mode, self.loop.sampling.with_steps(steps), self.planner is not None)))
        return checker

    def _imagines_as(self, way: Way) -> tuple[str, int]:
        """The mode and solver steps that imagined a plan's own video."""
        if way.searches and self.planner is not None and self.planner.imagines:
            return "forward", self.loop.planner.forward_steps
        return way.mode, way.sampling.steps

    # ------------------------------------------------------------------------------------------ the three functions

    def begin(
        self,
        instruction: str,
        seed: int,
        frame: np.ndarray,
        state: np.ndarray | None,
        hold: np.ndarray,
        rest: np.ndarray | None = None,
        goal: np.ndarray | None = None,
        target: np.ndarray | None = None,
        extra_delay: Callable[[int], int] = lambda step: 0,
    ) -> Robot:
        """A robot that has just been looked at.

        Args:
            frame, state: uint8 (H, W, 3) and (d,).
            hold: (d',) what it is sent without a decided action; NaN: the last command again.
            rest: (d',) the command that keeps it where it is now; None or NaN where there is none.
            goal: a goal image (H, W, 3) that the policy is given.
            target: one that planning alone aims at.
            extra_delay: control steps that a plan asked for at a step takes longer.
        """
        goals, targets = (None if picture is None else picture[None] for picture in (goal, target))
        session = Session(self.policy, [instruction], self.policy.config.data.embodiment, [seed], goals, self._texts.get(instruction), targets)
        self._texts.setdefault(instruction, session.instructions)
        memory = StepMemory(self.span)
        memory.begin(frame, state)
        adaptive = Adaptive(self.loop.check)
        adaptive.begin(self.loop.mode)
        rest = np.full_like(hold, np.nan) if rest is None else rest
        return Robot(session, memory, hold, rest, adaptive, extra_delay, np.zeros((0, session.dims.raw_action_dim), np.float32))

    def decide(self, robots: Sequence[Robot]) -> None:
        """Take up the plans that are ready, and ask for those that are due.

        Raises:
            ValueError: a plan that is not finite, or one that the gate refuses where it is told to raise.
        """
        active = [robot for robot in robots if robot.stopped is None]
        for robot in active:
            self._take_up(robot)
        due = [robot for robot in active if self._due(robot)]
        if due:
            self._ask(due)
            for robot in due:
                self._take_up(robot)

    def stretch(self, robot: Robot) -> np.ndarray:
        """Actions (n, d) until something is to be decided, n a multiple of the frame stride."""
        events = [self.horizon]
        if robot.pending is not None:
            events.append(robot.pending.ready - robot.now)
        else:
            events.append(robot.next_plan - robot.now)
        if len(robot.queue):
            events.append(len(robot.queue))
        if robot.foreseen is not None:
            events.append(robot.foreseen.next_steps(self.policy, self.stride).stop - robot.now)
        steps = max(self.stride, min(n for n in events if n > 0) // self.stride * self.stride)
        decided = robot.queue[:steps]
        if len(decided) == steps:
            return decided
        robot.tally.held += steps - len(decided)
        last = decided[-1] if len(decided) else robot.sent[-1] if robot.sent else robot.rest
        return np.concatenate([decided, np.repeat(held(robot.hold, last)[None], steps - len(decided), axis=0)])

    def saw(self, robot: Robot, frames: np.ndarray, states: np.ndarray, executed: np.ndarray) -> None:
        """What came of a stretch: frames (n // stride, H, W, 3), states after each step (n, d), and what was sent (n, d)."""
        robot.memory.ran(frames, states, executed)
        robot.queue = robot.queue[len(executed) :]
        robot.sent.extend(executed[-MAX_HISTORY:])
        if robot.foreseen is not None and self.checker is not None:
            self._check(robot, robot.foreseen)

    # ------------------------------------------------------------------------------------------ asking for plans

    def _due(self, robot: Robot) -> bool:
        if self.loop.execution.time == "ahead" and 0 < len(robot.queue) < self._shortest(robot):
            return False  # the gate cut what is decided: nothing can be planned behind its end, so it is executed, and then begun as at first
        return robot.pending is None and (robot.startled or robot.now >= robot.next_plan or not len(robot.queue))

    def _ask(self, robots: list[Robot]) -> None:
        """Plan for robots that are due, together."""
        start = time.perf_counter()
        ways = [self._way(robot) for robot in robots]
        for robot in robots:
            robot.session.back()  # from what was imagined, if it went ahead
        calls = [robot.memory.calls(robot.session)[0] for robot in robots]
        for robot in robots:
            robot.memory.head = robot.now
        if self.loop.execution.time == "ahead":
            calls = self._go_ahead(robots, calls)
        thoughts = [self._think(robot, way) for robot, way in zip(robots, ways, strict=True)]
        plans = run([robot.session for robot in robots], [[*own, thought] for own, thought in zip(calls, thoughts, strict=True)])
        elapsed = (time.perf_counter() - start) * 1e3
        foreseen = self._foresee(robots, plans) if self.checker is not None else [None] * len(robots)
        for robot, way, thought, plan, imagined in zip(robots, ways, thoughts, plans, foreseen, strict=True):
            assert plan is not None and plan.actions is not None, f"mode {way.mode} plans no actions"
            if thought.committed is not None:
                plan.actions[:, : thought.committed.shape[1]] = thought.committed  # as they were decided: the network's copy is rounded, and clipped to its range
            self._note(robot, way, elapsed)
            robot.pending = pending = self._pending(robot, way, plan, imagined, elapsed)
            self.watch(Made(robot, plan, elapsed, pending.ready if pending.origin is None else pending.origin))

    def _way(self, robot: Robot) -> Way:
        """How a robot's next plan is made, which counts as made from here on."""
        surprised, sampling = robot.adaptive.escalated, robot.adaptive.sampling(self.loop.sampling)
        searches = self.planner is not None and (surprised or self.loop.planner.when == "always")
        return Way(robot.adaptive.next(), sampling, searches)

    def _think(self, robot: Robot, way: Way) -> Think:
        """What the plan is asked for with: what is decided already, and what was promised after it."""
        mode, how, execution = way.mode, way.sampling, self.loop.execution
        with_planner = self._with_planner if way.searches else None
        overlaps = execution.time in ("asynchronous", "guided")
        count = min(self.expected_delay(robot), len(robot.queue), self._shortest(robot) - 1) if overlaps else 0
        committed = robot.queue[None, :count] if count else None
        if execution.time == "guided" and count:
            promised = robot.queue[None, : self._shortest(robot)]
            return Think(mode, how, committed, promised, plan_with=self._with_guidance)
        return Think(mode, how, committed, plan_with=with_planner)

    def _with_planner(self, session: Session, mode: str, sampling: SamplingConfig, committed: np.ndarray | None, promised: np.ndarray | None) -> Plan:
        assert self.planner is not None
        return self.planner.plan(session, mode, sampling, committed)

    def _with_guidance(self, session: Session, mode: str, sampling: SamplingConfig, committed: np.ndarray | None, promised: np.ndarray | None) -> Plan:
        assert promised is not None
        return plan_guided(session, mode, sampling, committed, promised, self.loop.execution.guidance, self.loop.execution.gradient)

    def _go_ahead(self, robots: list[Robot], calls: list[list[Call]]) -> list[list[Call]]:
        """Bring sessions to the end of what is decided: its actions are committed, its frames imagined or left out, until the real ones are there."""
        ready = [robot for robot in robots if len(robot.queue) >= self._shortest(robot)]
        imagined: dict[int, Tensor | None] = {}
        forward = self.loop.execution.missing_frames == "forward"
        if ready and forward:
            how = replace(self.loop.sampling, steps=self.loop.execution.forward_steps)
            asked = [[*own, Think("forward", how, actions=self._decided(robot), seeds=(self._seed(robot),))] for robot, own in zip(robots, calls, strict=True) if len(robot.queue) >= self._shortest(robot)]
            plans = run([robot.session for robot in ready], asked)
            imagined = {id(robot): plan.imagined for robot, plan in zip(ready, plans, strict=True) if plan is not None}
        out: list[list[Call]] = []
        for robot, own in zip(robots, calls, strict=True):
            if robot not in ready:
                out.append(own)
                continue
            begun = [] if forward else own
            out.append([*begun, Commit(self._decided(robot)), Go(imagined.get(id(robot)))])
        return out

    def _decided(self, robot: Robot) -> np.ndarray:
        return robot.queue[None, : self._shortest(robot)]

    def _shortest(self, robot: Robot) -> int:
        """Actions of the block that a robot's session stands before."""
        return self.horizon - (self.span.lead if robot.session.block <= 0 else 0) or self.horizon

    def _note(self, robot: Robot, way: Way, elapsed: float) -> None:
        robot.tally.plans += 1
        robot.tally.modes[f"{self.loop.planner.kind} of {way.mode}" if way.searches else way.mode] += 1
        robot.tally.latency_ms.append(elapsed)
        robot.tally.replans += robot.startled
        robot.tally.flops += self._cost(way)
        robot.startled = False

    def _cost(self, way: Way) -> float:
        """FLOPs of one robot's plan, with what is imagined to choose and to check it."""
        if way not in self._flops:
            own = plan_flops(self.policy, way.mode, way.sampling)
            if way.searches:
                assert self.planner is not None
                imagines = self.planner.imagines
                follow = plan_flops(self.policy, "forward", replace(way.sampling, steps=self.loop.planner.forward_steps)) if imagines else 0.0
                own = search_flops(self.loop.planner, imagines, own, follow)
            self._flops[way] = own + check_flops(self.policy, self.loop.check)
        return self._flops[way]

    def _pending(self, robot: Robot, way: Way, plan: Plan, imagined: Tensor | None, elapsed: float) -> Pending:
        execution = self.loop.execution
        steps = math.ceil(elapsed / 1e3 * self.gate.control_hz) if execution.realtime else execution.delay
        delay = math.ceil((steps + robot.extra_delay(robot.now)) / self.stride) * self.stride
        if not robot.sent and np.isnan(np.where(np.isnan(robot.hold), robot.rest, robot.hold)).any():
            delay = 0  # nothing says how this robot stands still before its first command: its time begins with its first plan
        self._took.append(delay)
        if execution.time == "synchronous" and delay:
            robot.queue = robot.queue[:0]  # it stands still while it thinks
        overlaps = execution.time != "synchronous" and len(robot.queue) > 0
        origin = None if not overlaps or execution.time == "unaligned" else robot.now + len(robot.queue) if execution.time == "ahead" else robot.now
        foreseen = None if imagined is None else Foreseen.of(robot.session, robot.memory, imagined, robot.now, self._imagines_as(way))
        return Pending(plan, robot.now, robot.now + delay, robot.tally.held, origin, overlaps, foreseen)

    def expected_delay(self, robot: Robot) -> int:
        """Control steps that the next plan is expected to take: the largest of late."""
        if self.loop.execution.realtime:
            return max(self._took, default=0)
        return math.ceil((self.loop.execution.delay + robot.extra_delay(robot.now)) / self.stride) * self.stride

    # ------------------------------------------------------------------------------------------ taking plans up

    def _take_up(self, robot: Robot) -> None:
        """Put a plan that is ready into the queue, as far as the gate lets it through."""
        pending = robot.pending
        if pending is None or pending.ready > robot.now:
            return
        robot.pending = None
        assert pending.plan.actions is not None
        actions, ahead = pending.plan.actions[0], self.loop.execution.time == "ahead"
        origin = robot.now if pending.origin is None else max(pending.origin, robot.now) if ahead else pending.origin
        robot.tally.late += pending.overlaps and robot.tally.held > pending.held
        kept = robot.queue if ahead else robot.queue[:0]
        fresh, promised = actions[max(0, robot.now - origin) :], None if ahead else robot.queue
        before = [*robot.sent, *kept[-MAX_HISTORY:]][-MAX_HISTORY:]
        passed = self._through_the_gate(robot, fresh, np.stack(before) if before else None, promised, (robot.now - pending.start) / self.gate.control_hz)
        robot.next_plan = self._next(robot, pending, origin)
        if passed is None:
            return
        if before and len(passed):
            robot.tally.jumps.append(np.abs(passed[0] - before[-1]))
        robot.queue = np.concatenate([kept, passed])
        if pending.foreseen is not None:
            robot.foreseen = replace(pending.foreseen, origin=origin)

    def _through_the_gate(self, robot: Robot, actions: np.ndarray, before: np.ndarray | None, promised: np.ndarray | None, age: float) -> np.ndarray | None:
        try:
            passed = self.gate(actions, before, promised, age)
        except GateRefusal as refusal:
            if refusal.cut.reason == "not_finite" or self.gate.config.otherwise == "raise":
                raise ValueError(f"at control step {robot.now}: {refusal}") from refusal
            robot.tally.gate[refusal.cut.reason] += len(actions)
            robot.tally.refused += 1
            if refusal.stops:
                robot.stopped = str(refusal)
            return None
        robot.tally.gate.update(passed.interventions)
        return passed.actions

    def _next(self, robot: Robot, pending: Pending, origin: int) -> int:
        """When the plan after this one is to be asked for."""
        execution = self.loop.execution
        if execution.time == "ahead":
            return origin
        if execution.time == "synchronous":
            return robot.now + self.loop.replan
        period = max(self.stride, min(self.loop.replan, self.horizon - self.expected_delay(robot)) // self.stride * self.stride)
        return max(robot.now, (pending.start if pending.overlaps else robot.now) + period)

    # ------------------------------------------------------------------------------------------ predict and check

    def _foresee(self, robots: list[Robot], plans: Sequence[Plan | None]) -> list[Tensor | None]:
        """What is to be compared with what comes, (C, k, h, w) each: the plans' own imagination, or what `forward` makes of their actions."""
        own = [None if plan is None or plan.imagined is None else plan.imagined[0] for plan in plans]
        if self.loop.check.source == "plan":
            return own
        how = replace(self.loop.sampling, steps=self.loop.check.steps)
        thoughts: list[list[Call]] = [[Think("forward", how, actions=plan.actions, seeds=(self._seed(robot),))] for robot, plan in zip(robots, plans, strict=True) if plan is not None]
        return [None if plan is None or plan.imagined is None else plan.imagined[0] for plan in run([robot.session for robot in robots], thoughts)]

    def _seed(self, robot: Robot) -> int:
        """Of what is imagined aside at this step, so that it costs the robot's own generator nothing."""
        entropy = (self.loop.noise_seed, int(robot.session.generators[0].initial_seed()), robot.now)
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)

    def _check(self, robot: Robot, foreseen: Foreseen) -> None:
        """Compare what has come with what was foreseen, as far as it has come."""
        assert self.checker is not None
        while (steps := foreseen.take(self.policy, robot.memory)) is not None:
            surprise = self.checker.compare(foreseen.imagined, foreseen.observed, foreseen.before, *foreseen.way)
            done = [robot.memory.executed.get(step) for step in steps]
            self._heed(robot, surprise, np.stack([action for action in done if action is not None]))
        if foreseen.over:
            robot.foreseen = None

    def _heed(self, robot: Robot, surprise: Surprise, done: np.ndarray) -> None:
        """Let a comparison have its consequences; `done` (n, d) was executed meanwhile."""
        robot.tally.checks.append(surprise)
        before = robot.adaptive.surprises
        answer = robot.adaptive.saw(surprise, bool(asks_for_motion(robot.session, done[None])[0]))
        robot.tally.surprises += robot.adaptive.surprises - before
        if answer == "replan":
            robot.startled = True
        elif answer == "stop":
            robot.stopped = f"surprised: {surprise.why if surprise.surprised else why_stalled(self.loop.check.stalled or 0)}"


def check_times(policy: Policy, loop: Loop) -> None:
    """Check that plans, delays and frames of a loop fit a policy's clock.

    Raises:
        ValueError: what does not fit, and what does.
    """
    t, execution = policy.config.timeline, loop.execution
    if not 1 <= loop.replan <= t.actions_per_block or loop.replan % t.stride:
        allowed = ", ".join(str(n) for n in range(t.stride, t.actions_per_block + 1, t.stride))
        raise ValueError(f"rollout.replan is {loop.replan}, but frames come every {t.stride} control steps and a plan of this checkpoint holds {t.actions_per_block}; use one of {allowed}")
    if execution.time == "ahead" and loop.replan != t.actions_per_block:
        raise ValueError(f"execution.time is 'ahead', which plans whole blocks of {t.actions_per_block} control steps, but replan is {loop.replan}; leave rollout.replan out")
    if execution.time in ("asynchronous", "guided", "naive", "unaligned") and execution.delay >= t.actions_per_block:
        raise ValueError(f"execution.delay is {execution.delay}, and a plan holds {t.actions_per_block} control steps: it would be over before it comes; use less, or a checkpoint with longer blocks")
    if execution.time == "unaligned" and loop.check.source != "none":
        raise ValueError("execution.time is 'unaligned', whose plans are executed later than they were made for, so nothing comes as it was imagined; use asynchronous, or check.source=none")
    if execution.time == "ahead" and loop.check.source != "none":
        raise ValueError("execution.time is 'ahead', whose plans begin at a moment that was not seen when they were made, so check.source has nothing to compare with; use asynchronous, or check.source=none")
    if execution.time == "guided" and loop.planner.kind != "none":
        raise ValueError(f"execution.time is 'guided' and planner.kind is {loop.planner.kind!r}: a search has no velocities to guide; use asynchronous, whose candidates all begin with what is decided")
    if loop.planner.kind != "none" and loop.planner.outcomes == "simulated" and (execution.time != "synchronous" or execution.realtime or execution.delay):
        raise ValueError("planner.outcomes is 'simulated', which runs the simulator ahead from where it stands, so plans must begin there; use execution.time=synchronous without a delay")
    if execution.time == "ahead" and memory_lasts(policy) is not None:
        raise ValueError("execution.time is 'ahead', but this model's memory begins anew from a frame that has not come by then; use asynchronous")
    if loop.check.source == "forward" and policy.config.training.modes.get("forward", 0) == 0:
        raise ValueError("check.source is 'forward', which this checkpoint was not trained for; use check.source=plan with a mode that imagines, or train with training.modes.forward")
