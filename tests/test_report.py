"""A report shows the numbers of a run, names what is missing, asks for nothing from outside, and escapes what it is given."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from wam.config import Config, to_dict
from wam.evaluation.page import tag
from wam.evaluation.report import write_report
from wam.evaluation.run_files import choose_media, read_run

VOID = {"img", "meta", "source", "br", "path", "use", "rect", "circle"}


class Reader(HTMLParser):
    """Checks that elements are closed in order, and collects text, attributes and addresses."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: list[str] = []
        self.text: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.names.append(name)
        self.addresses += [value or "" for key, value in attributes if key in ("src", "href", "xlink:href", "poster", "srcset", "action", "data")]
        self.ids += [value or "" for key, value in attributes if key == "id"]
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(name, attributes)
        if name not in VOID:
            self.open.pop()

    def handle_endtag(self, name: str) -> None:
        if name not in VOID:
            assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def results() -> dict[str, Any]:
    mode = {
        "wilson_low": 0.79,
        "wilson_high": 0.96,
        "latency_ms_p50": 31.2,
        "latency_ms_p95": 40.4,
        "mean_length": 101.25,
        "latency_ms": {"encode": {"p50": 3.14, "p95": 4.0}},
    }
    imagined = {"psnr_db": 24.31, "static_psnr_db": 18.12, "gain_db": 6.19, "ssim": 0.812, "static_ssim": 0.644, "clips": 16, "blocks": 4}
    return {
        "task": "drawer-open-v3",
        "wall_seconds": {"collect": 75.0, "train": 600.0, "total": 892.0},
        "peak_memory_gb": 3.42,
        "modes": {"skip": {**mode, "successes": 45, "episodes": 50}, "imagine": {**mode, "successes": 47, "episodes": 50}},
        "baselines": {
            "expert": {"successes": 50, "episodes": 50, "wilson_low": 0.93, "wilson_high": 1.0},
            "hold_still": {"successes": 0, "episodes": 50, "wilson_low": 0.0, "wilson_high": 0.07},
        },
        "imagination": {"forward": imagined},
        "versions": {"torch": "2.9.0+cpu"},
        "machine": {"cores": 2},
        "config": to_dict(Config()),
        "commands": ["wam demo --task drawer-open-v3"],
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A whole run in small, to change."""
    return whole_run(tmp_path / "run")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a run as it is."""
    run = whole_run(tmp_path_factory.mktemp("whole") / "run")
    path = write_report(run)
    assert path == run / "report.html"
    return path.read_text()


def whole_run(root: Path) -> Path:
    """Everything `wam demo` leaves behind."""
    for folder in ("train", "rollout/videos", "imagine"):
        (root / folder).mkdir(parents=True)
    write(root / "results.json", results())
    (root / "train/log.jsonl").write_text(
        "".join(json.dumps({"step": s, "train/video": 1 / s, "train/action": 1 / s, "val/skip/action": 1 / s}) + "\n" for s in (1, 2))
    )
    episodes = [{"seed": 20000, "success": True, "length": 84, "chunks": 11}, {"seed": 20001, "success": False, "length": 500, "chunks": 63}]
    write(root / "rollout/rollout.json", {"modes": {mode: {"episodes": 2, "episode_results": episodes} for mode in ("skip", "imagine")}})
    curve = [{"seconds": 0.1 * i, "psnr_db": 24.0 - i, "static_psnr_db": 18.0 - i, "moving_ssim": 0.8} for i in (1, 2)]
    follows = {"ratio": 1.75, "nearer": 12, "clips": 16, "nearer_low": 0.51, "nearer_high": 0.9, "actions_differ": 0.8}
    write(
        root / "imagine/imagine.json",
        {"mask": "pixels that change by more than 8 of 255", "modes": {"forward": {"horizon": curve}}, "action_following": follows, "left_out": {"lpips": "no such package"}},
    )
    (root / "imagine/horizon.png").write_bytes(b"drawn by the page itself")
    for name in ("rollout/videos/skip_20000.mp4", "rollout/videos/skip_20000.png", "imagine/episode0003_0040_real_forward_imagine.mp4"):
        (root / name).write_bytes(b"not really a video")
    return root


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def test_the_page_holds_the_numbers(page: str) -> None:
    reader = Reader(page)
    for text in (
        "drawer-open-v3",
        "imagine 47/50",
        "skip 45/50",
        "79\u201396%",
        "50/50",
        "31 / 40",
        "101.2",
        "3.1 / 4.0",
        "14 min 52 s",
        "3.4 GB",
        "24.31",
        "18.12",
        "0.812",
        "16 \u00d7 4",
    ):
        assert text in reader.words, text
    for text in (
        "pixels that change by more than 8 of 255",
        "Seeds that fail in every mode: 20001",
        "imagine p = 1.",
        "Seed 20000: success after 84 steps, 11 plans",
        "Episode 3 from step 40: real | forward | imagine",
        "is 1.75 times as far from what happened as given the true ones",
        "Left out, lpips: no such package.",
        "2.9.0+cpu",
        "wam demo --task",
        "actions_per_block: 8",
    ):
        assert text in reader.words, text
    assert reader.names.count("video") == 2 and reader.names.count("caption") >= 3
    assert 'aria-label="error by how far ahead"' in page and "Stills. horizon" not in page, "drawn by the page, not shown as a clip"
    assert 'class="absent"' not in page


def test_the_page_asks_for_nothing(page: str) -> None:
    reader = Reader(page)
    assert reader.addresses and all(address.startswith(("data:", "#")) for address in reader.addresses)
    assert not re.search(r"https?:|//cdn|url\((?!#)|@import|<script|<link", page)
    assert len(set(reader.ids)) == len(reader.ids), "figures share the page, so their ids must differ"
    assert {a[1:] for a in reader.addresses if a.startswith("#")} <= set(reader.ids)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    write(tmp_path / "results.json", {"task": "t"})
    words = Reader(write_report(tmp_path).read_text()).words
    for text in (
        "no modes",
        "train/log.jsonl is not there",
        "No closed-loop videos",
        "rollout/rollout.json is not there",
        "No imagination was measured",
        "No imagined clips",
        "no wall_seconds",
        "no commands",
        "no machine",
        "No config",
    ):
        assert text in words, text


def test_a_damaged_piece_is_named(run: Path) -> None:
    (run / "rollout/rollout.json").write_text('{"modes": {')
    (run / "train/log.jsonl").write_text("not json}\n")
    write(run / "results.json", {**results(), "config": {"timeline": {"blocks": 0}}, "modes": {"teleport": {"successes": 1, "episodes": 2}}})
    words = Reader(write_report(run).read_text()).words
    for text in ("rollout.json is not JSON", "No learning curves", "timeline.blocks is 0", "no mode 'teleport'", "teleport 1/2"):
        assert text in words, text


def test_without_matplotlib_the_numbers_stay(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = Reader(write_report(run).read_text()).words
    assert "imagine 47/50" in words and "pip install 'wam[train]'" in words


def test_text_is_escaped(run: Path) -> None:
    evil = '<script>alert("x")</script>'
    rollout = {"modes": {evil: {"episodes": [{"seed": evil, "success": True}]}}}
    write(run / "results.json", {**results(), "task": evil, "commands": [evil], "machine": {evil: evil}, "baselines": {evil: {"successes": 1, "episodes": 2}}})
    write(run / "rollout/rollout.json", rollout)
    write(run / "imagine/imagine.json", {"mask": evil})
    page = write_report(run).read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert evil in Reader(page).words
    assert tag("p", "<b>", tag("i", "&"), title='"') == '<p title="&quot;">&lt;b&gt;<i>&amp;</i></p>'


def test_results_are_needed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"results\.json; `wam demo --output .*make demo"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"holds a list; expected the object that `wam demo` writes"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_videos_that_do_not_fit_are_counted(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # figures take seconds, and have no part in it
    (run / "rollout/videos/skip_20001.mp4").write_bytes(b"0" * 9_000_000)
    reader = Reader(write_report(run).read_text())
    assert "1 of 2 videos were left out" in reader.words and "rollout/videos/" in reader.words
    assert (run / "report.html").stat().st_size < 12_000_000
    assert read_run(run, budget=0).embedded == frozenset()


def test_every_mode_gets_a_video_before_any_gets_two(tmp_path: Path) -> None:
    for name in ("skip_1.mp4", "skip_2.mp4", "joint_1.mp4", "skip_1.png"):
        (tmp_path / name).write_bytes(b"0" * 300)  # 400 bytes as base64
    groups = [[tmp_path / "skip_1", tmp_path / "skip_2"], [tmp_path / "joint_1"]]
    chosen = {budget: {path.name for path in choose_media(groups, budget)} for budget in (399, 800, 1600)}
    assert chosen == {399: set(), 800: {"skip_1.mp4", "joint_1.mp4"}, 1600: {"skip_1.mp4", "joint_1.mp4", "skip_2.mp4", "skip_1.png"}}
