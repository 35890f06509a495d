"""Agreement: what it is on known cases, which frames belong to which plan, and what it says of success; watching changes nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_robot import SIDE, FakeVector, fake_policy

from wam.config import SamplingConfig
from wam.evaluation.agreement import Agreement, compare, summarize_agreement, why_not
from wam.evaluation.environments import StepResult
from wam.evaluation.episodes import Driver
from wam.inference.session import Plan
from wam.pretrained import Policy

STRIDE, FOLDED = 2, 4


@pytest.fixture(scope="module")
def policy() -> Policy:
    return fake_policy()


def test_agreement_is_of_changes_not_of_scenes() -> None:
    torch.manual_seed(0)
    before = 10 * torch.randn(4, 2, 3)
    change = torch.zeros(4, 2, 2, 3)
    change[:, :, 0, 1] = 2
    came = before.unsqueeze(1) + change
    still = before.unsqueeze(1).expand(-1, 2, -1, -1)
    assert compare(came, came, before) == pytest.approx(1, abs=1e-5) and compare(still, came, before) == pytest.approx(0, abs=1e-5)
    assert compare(came, still, before) == pytest.approx(0, abs=1e-5), "a change that did not come counts as much"
    assert compare(before.unsqueeze(1) - change, came, before) == pytest.approx(-1, abs=1e-5)
    assert compare(still + 0.01, still, before) is None, "nothing moves: a scene that is easy to predict is no merit"


def result(frames: np.ndarray, done: bool = False) -> StepResult:
    n = len(frames) * STRIDE
    return StepResult(frames, np.zeros((n, 4), np.float32), np.zeros(n, np.float32), np.zeros(n, np.bool_), done)


def test_a_plan_is_compared_with_what_came_until_the_next_took_over(policy: Policy) -> None:
    """Blocks of two latents, 16 control steps: the first plan runs whole, the second is replaced after one latent, the third before any, the last is cut off."""
    policy = fake_policy("timeline.latents_per_block=2", "timeline.actions_per_block=16")
    rng = np.random.default_rng(0)
    video = rng.integers(0, 255, (40, SIDE, SIDE, 3), dtype=np.uint8)  # the frame of control step 2 i

    def latents(at: int, count: int = 2) -> torch.Tensor:
        frames = torch.from_numpy(video[at // STRIDE : at // STRIDE + 1 + count * FOLDED])
        return policy.codec.encode(frames[None])[:, :, 1:]

    watch = Agreement(SimpleNamespace(policy=policy, mode="joint", solver=None, noise_seed=0), [5])  # type: ignore[arg-type]
    session: Any = None  # not asked: the plans hold what they imagined
    now = 0
    wrong = latents(16).clone()
    wrong[:, :, 1:] = torch.randn_like(wrong[:, :, 1:])
    for at, imagined, until in ((0, latents(0), 16), (16, wrong, 24), (24, latents(24), 28), (28, torch.randn_like(wrong), 40), (40, latents(40), 52)):
        watch.planned(session, [0], Plan(np.zeros((1, 16, 4), np.float32), imagined, {}), np.zeros((1, 16, 4), np.float32), 1.0)
        watch.placed(0, at)
        for begin in range(now, until, 4):
            watch.ran([0], [result(video[begin // STRIDE + 1 : begin // STRIDE + 3])])
        now = until
    [episode] = watch.episodes()
    scores = [plan["agreement"] for plan in episode["by_plan"]]
    assert [plan["at"] for plan in episode["by_plan"]] == [0, 16, 24, 28, 40] and episode["seed"] == 5 and episode["plans"] == 5
    assert scores[0] == pytest.approx(1, abs=1e-5), "the frame before the first action is not told; the next stands in for it"
    assert scores[1] == pytest.approx(1, abs=1e-5), "its second latent, which is wrong, is no longer about what was executed"
    assert scores[2] is None and scores[3] < 0.6 and scores[4] == pytest.approx(1, abs=1e-5)
    assert watch.sources == {"plan": 5}


@pytest.mark.parametrize(("mode", "source"), [("joint", "plan"), ("skip", "forward")])
def test_watching_changes_nothing_and_every_plan_is_scored(policy: Policy, mode: str, source: str) -> None:
    driver, seeds = Driver(policy, mode, SamplingConfig(steps=1), 8, 7), [20000, 20001]
    watch = Agreement(driver, seeds)
    episodes = driver.drive(FakeVector("fake", 2), seeds, [watch])
    assert episodes == driver.drive(FakeVector("fake", 2), seeds)
    seen = watch.episodes()
    assert [e["seed"] for e in seen] == seeds and [e["plans"] for e in seen] == [e.chunks for e in episodes] and watch.sources == {source: sum(e.chunks for e in episodes)}
    assert [plan["at"] for plan in seen[1]["by_plan"]] == [0, 8, 16, 24, 32]
    scores = [plan["agreement"] for plan in seen[1]["by_plan"]]
    assert any(s is not None for s in scores) and all(s is None or -1 <= s <= 1 for s in scores)


def test_what_cannot_be_compared_is_said(policy: Policy) -> None:
    assert why_not(policy, "skip") is None and why_not(policy, "imagine") is None
    untrained = fake_policy("training.modes={skip: 1}")
    assert "mode 'skip' imagines nothing by itself" in (why_not(untrained, "skip") or "") and "mode 'forward'" in (why_not(untrained, "skip") or "")
    with pytest.raises(ValueError, match="imagines nothing by itself"):
        Agreement(Driver(untrained, "skip", SamplingConfig(steps=1), 8, 0), [1])


def episode(seed: int, *scores: float | None) -> dict[str, Any]:
    return {"seed": seed, "plans": len(scores), "by_plan": [{"at": 8 * i, "agreement": s} for i, s in enumerate(scores)]}


def test_auroc_is_also_of_what_was_known_early() -> None:
    """Failures are alike at first and lose their way late: the mean tells them apart, the early plans do not."""
    episodes = [*(episode(i, 0.5 + 0.01 * i, 0.8, None) for i in range(6)), *(episode(i, 0.5 + 0.01 * i, 0.8, -0.5, -0.5) for i in range(6, 10)), episode(10, 0.1)]
    results = [{"seed": i, "success": i < 6, "length": 16 if i < 6 else 500} for i in range(10)]
    crashed = {"seed": 10, "success": False, "length": 1, "outcome": "crashed"}
    found = summarize_agreement(episodes, [*results, crashed])
    assert found["early_steps"] == 16 and len(found["episodes"]) == 10, "a crash is no failure of the policy"
    assert found["auroc"]["mean"]["value"] == found["auroc"]["lowest"]["value"] == 1 and found["auroc"]["mean"]["low"] < 1
    assert found["auroc"]["early"]["value"] == 0, "later seeds began a little better, and failed"
    assert found["episodes"][0]["early"] == pytest.approx(0.65) and found["episodes"][9]["lowest"] == -0.5
    assert found["mean_of_successes"] > found["mean_of_failures"]

    all_won = summarize_agreement(episodes[:6], results[:6])
    assert all_won["auroc"] == {} and all_won["notes"]["mean"] == "6 successes and 0 failures with a score; AUROC needs both" and all_won["mean_of_failures"] is None
    with pytest.raises(ValueError, match=r"seeds \[9\] have agreements but no results"):
        summarize_agreement(episodes[:10], results[:9])
