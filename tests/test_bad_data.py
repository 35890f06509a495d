"""Files beside the rows can be wrong too: robot cards, meta/modality.json, encoded windows, and whole videos in another's place.

Whatever is changed, what follows is one of two: a single error that names the file and says what to do, or exactly what was there
before.  What reading cannot tell (an mp4 says nothing of whose it is) is shown to be found by `wam check`.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import lerobot_fixture as fixture
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tiny import tiny_codec, tiny_config

from wam.config import Config, ConfigError, DataConfig, EmbodimentConfig, GroupConfig, from_dict, load_config, to_dict
from wam.data.check.run import check_dataset
from wam.data.dataset import WindowDataset
from wam.data.latents import Cache, LatentError, WindowLatents, cache_of, content_of
from wam.data.lerobot import DatasetError, LeRobotDataset
from wam.data.units import Units
from wam.data.video import VideoDecoder, VideoError
from wam.robots import RobotCard, describe, known_cards, read_card
from wam.training.caches import build_latents

JUNK: list[Any] = [None, -1, 0, 1.5, "x", "", [], {}, True, math.inf, -math.inf, math.nan, 10**20, 2**62, 1e308, 1e-300, [None], ["a", "a"], [[1]], {"a": 1}, "a\0b", "7", "x" * 3000]
DROP = object()
LENGTHS = (14, 12, 13, 11)
Encoded = tuple[WindowDataset, Cache, list[np.ndarray | None]]  # with what its windows are


def tried(times: int) -> settings:
    """The same examples in every run, however slow the machine is."""
    return settings(max_examples=times, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """The path to every value inside a value."""
    yield at
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(part, (*at, key))


def changed(value: Any, at: tuple, new: Any) -> Any:
    """A value with another one, or none (`DROP`), at a path."""
    if not at:
        return {} if new is DROP else new
    copy = value.copy()
    if len(at) == 1 and new is DROP:
        del copy[at[0]]
    else:
        copy[at[0]] = changed(value[at[0]], at[1:], new)
    return copy


def says_what_to_do(error: Exception, path: Path) -> bool:
    """Whether an error is short, names a file and holds a remedy."""
    text = str(error)
    return str(path) in text and bool(text.rpartition(";")[2].strip()) and len(text) < 2500


@contextmanager
def restored(*paths: Path) -> Iterator[None]:
    """Files that are damaged inside and whole again afterwards."""
    contents = [path.read_bytes() for path in paths]
    try:
        yield
    finally:
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)


# ------------------------------------------------------------------------------------------------ robot cards

CARDS = {name: yaml.safe_load(path.read_text(encoding="utf-8")) for name, path in known_cards().items()}
PLACES = [(name, at) for name, tree in CARDS.items() for at in places(tree)]


@pytest.fixture(scope="module")
def card_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cards") / "card.yaml"


@tried(300)
@given(where=st.sampled_from(PLACES), new=st.sampled_from([*JUNK, DROP]))
def test_a_card_with_anything_in_any_place(card_file: Path, where: tuple[str, tuple], new: Any) -> None:
    name, at = where
    card_file.write_text(yaml.safe_dump(changed(CARDS[name], at, new)), encoding="utf-8")
    try:
        card = read_card(str(card_file))
    except ConfigError as error:
        assert says_what_to_do(error, card_file), error
        return
    assert from_dict(RobotCard, to_dict(card)) == card and describe("card", card)
    assert from_dict(DataConfig, card.data()).cameras == card.cameras, "what is taken makes a config"


@tried(60)
@given(where=st.sampled_from([(name, at) for name, at in PLACES if isinstance(functools.reduce(lambda v, k: v[k], at, CARDS[name]), dict)]), key=st.sampled_from(["", "cameraz", "siz", 3, None, True, "x" * 3000]))
def test_a_card_with_an_unknown_key(card_file: Path, where: tuple[str, tuple], key: Any) -> None:
    name, at = where
    section = functools.reduce(lambda value, part: value[part], at, CARDS[name])
    card_file.write_text(yaml.safe_dump(changed(CARDS[name], at, {**section, key: 1})), encoding="utf-8")
    with pytest.raises(ConfigError, match="unknown key") as caught:
        read_card(str(card_file))
    assert says_what_to_do(caught.value, card_file)


GROUPS = "state_groups: [{name: arm, size: 6}, {name: grip, size: 1, start: 6}]\naction_groups: [{name: arm, size: 6, relative_to: arm}, {name: grip, size: 1, start: 6}]\n"
CARD = f"embodiment: mine\ncameras: [observation.images.top]\ncontrol_hz: 10\n{GROUPS}"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("size: 1, start: 6}]\naction", "size: 1, start: 5}]\naction", "state groups 'arm' and 'grip' both take dimension 5 of 'observation.state'; correct the start, size or column"),
        ("size: 1, start: 6}]\n", "size: 1}]\n", "both take dimension 0 of 'observation.state'"),
        ("relative_to: arm}, {name: grip, size: 1, start: 6", "relative_to: arm}, {name: grip, size: 1, start: 3", "action groups 'arm' and 'grip' both take dimension 3 of 'action'"),
        ("relative_to: arm}, {name: grip, size: 1, start: 6", "relative_to: arm}, {name: grip, size: 1, start: 6, executed: done}, {name: toe, size: 1, start: 6, column: toes, executed: done", "both take dimension 6 of 'done'"),
        ("{name: arm, size: 6, relative_to", "{name: arm, size: 5, relative_to", "is relative to 'arm', which has 6 numbers, not 5; name a state group of the same size"),
        ("relative_to: arm", "relative_to: leg", "is relative to 'leg', which is none of its state groups; name one of arm, grip"),
        ("name: grip, size: 1, start: 6}]\n", "name: arm, size: 1, start: 6}]\n", "state_groups of 'mine' are arm, arm; name each once"),
        ("control_hz: 10", "control_hz: 10\nstate_dim: 7", "has state_groups and state_dim 7; leave the size out"),
        ("control_hz: 10", "control_hz: -10", "data.control_hz is -10"),
        ("control_hz: 10", "control_hz: .nan", "control_hz is nan"),
        ("control_hz: 10", "control_hz: 10\nlayout: t", "data.cameras lists 1 cameras, and data.layout is 't'; it takes 3"),
        ("[observation.images.top]", "[a, a]\nlayout: width", r"name each camera once"),
        ("control_hz: 10", "control_hz: 10\ncontrol_hz: 20", "line 4 says 'control_hz' a second time; leave one of them"),
        ("size: 6}", "size: 6, size: 7}", "says 'size' a second time"),
        ("control_hz: 10", "template: Move.", "template of 'mine' is 'Move.'; it must hold {instruction}"),
        ("size: 6}", "size: 99999999999999999999}", "expected a whole number of at most"),
    ],
)
def test_a_card_that_contradicts_itself(card_file: Path, old: str, new: str, message: str) -> None:
    card_file.write_text(CARD)
    assert load_config(None, [f"robot={card_file}"]).model.embodiments[0].raw_action_dim == 7
    assert old in CARD
    card_file.write_text(CARD.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"robot={card_file}"])
    assert message in str(caught.value) and says_what_to_do(caught.value, card_file)


def test_a_card_that_is_no_yaml(card_file: Path) -> None:
    for content in (b"", b"- a\n", b"text", b"\xff\xfe\x00", b"[" * 3000, b"{a: " * 3000, b"embodiment: [x", b"\t- x: [", b"*nowhere", b"!!python/object:os.system x", b"? [a]\n: b", b"2020-99-99", b"a: b: c", CARD.encode()[:40]):
        card_file.write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            read_card(str(card_file))
        assert says_what_to_do(caught.value, card_file), content[:40]
    for name in ("x" * 5000 + ".yaml", "a\0b.yaml", str(card_file.parent), ""):
        with pytest.raises(ConfigError, match="there is no such card; ") as caught:
            read_card(name)
        assert len(str(caught.value)) < 1000


def test_a_card_for_another_dataset(named: Path) -> None:
    """Its columns, cameras and slices are compared with the dataset, by whatever name."""
    source = LeRobotDataset(named)

    def units(*groups: GroupConfig) -> Units:
        return Units.of(EmbodimentConfig("mine", 4, sum(g.size for g in groups), action_groups=groups), DataConfig())

    units(GroupConfig("arm", 3, column="action.whole"), GroupConfig("grip", 1, column="action", start=3)).check(source)
    for groups, message in (
        ((GroupConfig("arm", 3, column="action.whole"), GroupConfig("grip", 1, column="action", start=2)), "action groups 'arm' and 'grip' both take dimension 2 of 'action', by its names in meta/modality.json"),
        ((GroupConfig("arm", 3, column="action.whole", start=2),), r"'action.whole' has 4 dimensions, but action group 'arm' of 'mine' is 2..4 of it"),
        ((GroupConfig("arm", 3, column="action.hole"),), r"has no feature 'action.hole'; did you mean 'action.whole'?"),
        ((GroupConfig("arm", 3, column="video.front"),), r"has shape (64, 64, 3); a state or action is a vector"),
    ):
        with pytest.raises(DatasetError) as caught:
            units(*groups).check(source)
        assert message in str(caught.value) and str(named) in str(caught.value)
    with pytest.raises(DatasetError, match=r"has no feature 'observation.images.tip'; .*corner4"):
        WindowDataset(DataConfig(root=str(named), cameras=("observation.images.tip",)), tiny_config().timeline, "train")


# ------------------------------------------------------------------------------------------------ names beside the data


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fixture.write_dataset(tmp_path_factory.mktemp("plain") / "tiny", LENGTHS, episodes_per_file=2)


@pytest.fixture(scope="module")
def named(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fixture.write_flavour(plain, tmp_path_factory.mktemp("named") / "tiny", "v2.1", modality=True)


def test_modality_with_anything_in_any_place(named: Path) -> None:
    """Refused, or the names that were not touched stand for what they stood for."""
    path, refused = named / "meta/modality.json", 0
    text, before = path.read_text(), names(named)
    content = json.loads(text)
    with restored(path):
        for at, new in product(places(content), [*JUNK, DROP]):
            path.write_text(json.dumps(changed(content, at, new)))
            try:
                found = names(named)
            except DatasetError as error:
                assert says_what_to_do(error, path), error
                refused += 1
                continue
            touched = ".".join(map(str, at[:2]))
            assert all(np.array_equal(rows, before[key]) for key, rows in found.items() if not key.startswith(touched)), (at, new)
    assert refused > 500 and names(named).keys() == before.keys()


def names(root: Path) -> dict[str, np.ndarray]:
    """What every name of meta/modality.json stands for."""
    dataset = LeRobotDataset(root)
    return {key: dataset.read(1, key) for key in dataset.modality.groups} | {key: np.array(camera) for key, camera in dataset.modality.videos.items()}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"start": 0, "end": 3', '"start": -1, "end": 3', "state.position is the slice -1..3 of 'observation.state', which has 4 dimensions; expected 0 <= start < end <= 4"),
        ('"start": 0, "end": 3', '"start": 0, "end": 5', "is the slice 0..5"),
        ('"start": 0, "end": 3', '"start": 3, "end": 0', "is the slice 3..0"),
        ('"start": 0, "end": 3', '"start": 2, "end": 2', "is the slice 2..2"),
        ('"start": 0, "end": 3', '"start": "0", "end": "3"', "is the slice '0'..'3'"),
        ('"start": 0, "end": 3', '"end": 3', "is the slice None..3"),
        ('"start": 0, "end": 3', '"start": 0, "end": 3, "end": 4', "the key 'end' stands in an object twice"),
        ('"original_key": "observation.state", ', '"original_key": "observation.stat", ', "state.gripper stands for 'observation.stat', which meta/info.json does not list; correct its original_key"),
        ('"original_key": "observation.state", ', '"original_key": "", ', "stands for '', which meta/info.json does not list"),
        (f'"front": {{"original_key": "{fixture.CAMERA}"}}', '"front": {}', "video.front stands for 'observation.images.front', which meta/info.json does not list"),
        (f'"original_key": "{fixture.CAMERA}"', '"original_key": "action"', "video.front stands for 'action', which is float32 of shape (4,); expected a camera"),
    ],
)
def test_slices_that_cannot_be(named: Path, old: str, new: str, message: str) -> None:
    path = named / "meta/modality.json"
    text = path.read_text()
    assert old in text
    with restored(path), pytest.raises(DatasetError) as caught:
        path.write_text(text.replace(old, new, 1))
        LeRobotDataset(named)
    assert message in str(caught.value) and says_what_to_do(caught.value, path)


def test_embodiment_of_garbage(named: Path) -> None:
    for file in ("meta/embodiment.json", "meta/modality.json"):
        path = named / file
        doubled, long = b'{"embodiment_tag": "a", "embodiment_tag": "b"}', b'"' + b"x" * 9000 + b'"'
        for content in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b'{"embodiment_tag": ""}', b'{"embodiment_tag": 7}', doubled, long, path.read_bytes()[:-2]):
            with restored(path), pytest.raises(DatasetError) as caught:
                path.write_bytes(content)
                LeRobotDataset(named)
            assert says_what_to_do(caught.value, path), content[:40]
    assert LeRobotDataset(named).embodiment == "tiny_arm"


# ------------------------------------------------------------------------------------------------ videos in another's place


def video(root: Path, episode: int) -> Path:
    return root / f"videos/chunk-000/{fixture.CAMERA}/episode_{episode:06d}.mp4"


def swap(a: Path, b: Path) -> None:
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)


def windows(root: Path, **changes: Any) -> WindowDataset:
    data = DataConfig(root=str(root), executed_action="action.executed", validation_fraction=0, control_hz=None, **changes)
    return WindowDataset(data, replace(tiny_config().timeline, blocks=1), "train")


def found_by_check(root: Path) -> dict[str, str]:
    """What `wam check` says of videos: their path, and how bad it is and what is there instead."""
    _, findings = check_dataset(root, load_config(None, ["data.executed_action=action.executed", "data.control_hz=null"]), episodes=2)
    return {Path(f.where).name: f"{f.level}: {f.found}" for f in findings if f.where.endswith(".mp4") or "file" in f.where}


@pytest.mark.parametrize(
    ("damage", "refused", "message"),
    [
        (lambda root: swap(video(root, 0), video(root, 3)), {0}, r"asked for frame \d+, but the file has 11 frames .*; the video is shorter than the dataset says: copy or record it again"),
        (lambda root: fixture.write_video(video(root, 2), list(range(8))), {2}, "but the file has 8 frames"),
        (lambda root: video(root, 1).write_bytes(b""), {1}, r"there is no index in the file \(0 bytes\)"),
        (lambda root: video(root, 1).unlink(), {1}, "no video file"),
        (lambda root: video(root, 1).write_bytes(b"not a video" * 100), {1}, "truncated or damaged"),
        (lambda root: video(root, 1).write_bytes(video(root, 0).read_bytes()[:-50]), {1}, "truncated or damaged"),
    ],
    ids=["swapped", "fewer frames", "empty", "missing", "garbage", "cut short"],
)
def test_videos_that_cannot_be_the_episodes(named: Path, tmp_path: Path, damage: Callable[[Path], Any], refused: set[int], message: str) -> None:
    """The episode is refused by its file's name, at once or when it is read; where broken ones may be left out, only it is."""
    root = Path(shutil.copytree(named, tmp_path / "copy"))
    damage(root)
    for cache in ("memory", "none"):
        with pytest.raises(VideoError, match=message) as caught:
            dataset = windows(root, cache=cache)
            for index in range(len(dataset)):
                dataset[index]
        assert says_what_to_do(caught.value, video(root, min(refused)))
        kept = windows(root, cache=cache, broken="skip", max_broken=0.5)
        assert set(kept.broken) == refused and set(kept.episodes) == set(range(4)) - refused


def test_videos_that_only_the_check_can_tell(named: Path, tmp_path: Path) -> None:
    """A longer video gives a frame for every row, and a file of another rate as well: reading cannot tell, `wam check` does."""
    assert found_by_check(named) == {}
    root = Path(shutil.copytree(named, tmp_path / "copy"))
    swap(video(root, 0), video(root, 3))
    assert found_by_check(root)["episode_000003.mp4"] == "warning: 14 frames"
    swap(video(root, 0), video(root, 3))
    numbers = [fixture.read_stamp(frame) for frame in VideoDecoder().read_frames(video(root, 2), range(13))]
    fixture.write_video(video(root, 2), numbers, fps=30)
    before, after = windows(named), windows(root)
    for index in range(len(before)):
        shown = [[fixture.read_stamp(frame) for frame in data[index]["frames"]] for data in (before, after)]
        assert shown[0] == shown[1], "a row is shown by the frame of its number, whatever the file's clock says"
    assert found_by_check(root) == {"episode_000002.mp4": "error: 30 frames a second"}


# ------------------------------------------------------------------------------------------------ encoded windows


@pytest.fixture(scope="module")
def encoded(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    """A dataset, its cache of windows, and what is in it."""
    directory, c = tmp_path_factory.mktemp("latents"), config(plain)
    dataset = WindowDataset(c.data, c.timeline, "train", None, c.codec.image_size)
    build_latents([dataset], c, tiny_codec(c.codec), directory, 0)
    cache = cache_of(dataset, directory, c.codec, tiny_codec(c.codec))
    return dataset, cache, read_all(dataset, cache)


def config(root: Path) -> Config:
    return tiny_config(f"data.root={root}", "data.executed_action=action.executed", "data.validation_fraction=0", "data.cache=none")


def read_all(dataset: WindowDataset, cache: Cache, refused: Callable[[LatentError], bool] | None = None) -> list[np.ndarray | None]:
    """Every window, opened anew; None for those that are refused as they should be."""
    reader, out = WindowLatents(cache, dataset.table, dataset.episodes), []  # type: WindowLatents, list[np.ndarray | None]
    for index in range(len(dataset)):
        try:
            out.append(reader.read(index, dataset.rows(index).frames).copy())
        except LatentError as error:
            assert refused is not None and refused(error), error
            out.append(None)
    return out


def header_as(content: bytes, old: bytes, new: bytes) -> bytes:
    """A file of tensors that says something else about them, in as many bytes."""
    size = 8 + int.from_bytes(content[:8], "little")
    assert len(old) == len(new)
    return content[:size].replace(old, new, 1) + content[size:]


@tried(250)
@given(data=st.data())
def test_shards_damaged_anywhere(encoded: Encoded, data: st.DataObject) -> None:
    """Every window is what was written, or is refused by the name of its file: never another."""
    dataset, cache, clean = encoded
    files = sorted(cache.folder.glob("*.safetensors"))
    path, other = data.draw(st.permutations(files))[:2]
    content = path.read_bytes()
    at, size = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(1, 64))
    at = data.draw(st.sampled_from([at, at % (8 + int.from_bytes(content[:8], "little")), len(content) - 1 - at % 200]))  # its header is where most can go wrong
    kinds: dict[str, Callable[[], bytes]] = {
        "cut": lambda: content[:at],
        "bit": lambda: content[:at] + bytes([content[at] ^ 1 << size % 8]) + content[at + 1 :],
        "zeros": lambda: content[:at] + bytes(len(content[at : at + size])) + content[at + size :],
        "turned": lambda: content[:at] + content[at : at + size][::-1] + content[at + size :],
        "longer": lambda: content + bytes(size),
        "another's": other.read_bytes,
        "whole numbers": lambda: header_as(content, b'"F32"', b'"I32"'),
        "other sides": lambda: header_as(content, b"6,5,4,6]", b"6,5,6,4]"),
    }
    with restored(path):
        path.write_bytes(kinds[data.draw(st.sampled_from(sorted(kinds)))]())
        found = read_all(dataset, cache, lambda error: says_what_to_do(error, path) and "wam cache" in str(error))
    for window, (there, wanted) in enumerate(zip(found, clean, strict=True)):
        assert there is None or (wanted is not None and there.dtype == np.float32 and np.array_equal(there, wanted)), window


def test_shards_that_change_places_or_names(encoded: Encoded) -> None:
    dataset, cache, clean = encoded
    files = sorted(cache.folder.glob("*.safetensors"))
    assert all(a is not None and b is not None and np.array_equal(a, b) for a, b in zip(read_all(dataset, cache), clean, strict=True))
    with safe_open(files[0], framework="numpy") as shard:
        assert shard.metadata()["shard"] == files[0].name
    with restored(*files[:2]):
        swap(*files[:2])
        assert sum(window is None for window in read_all(dataset, cache, lambda error: "its shard does not fit" in str(error))) == 6 + 4
    away = files[0].rename(files[0].with_name("episode-000009-000.safetensors"))
    assert read_all(dataset, cache, lambda error: f"{files[0]} is missing; run `wam cache` again" in str(error))[0] is None
    away.rename(files[0])


def test_manifests_with_anything_in_any_place(encoded: Encoded) -> None:
    """Refused by name, or of no consequence; seen from a config of other settings as well."""
    _, cache, _ = encoded
    path, refused = cache.folder / "manifest.json", 0
    text = path.read_text()
    content, elsewhere = json.loads(text), replace(cache, folder=cache.folder.with_name("tiny-other"), settings={**cache.settings, "content": "other"})
    with restored(path):
        for at, new in product(places(content), [*JUNK, DROP]):
            path.write_text(json.dumps(changed(content, at, new)))
            refused += refuses(cache, path)
            with pytest.raises(LatentError) as caught:
                elsewhere.check()
            assert str(path.parent.name) in str(caught.value) and "wam cache" in str(caught.value)
        for broken in ("[" * 100_000, *(text[:size] for size in range(0, len(text) - 2, 7))):
            path.write_text(broken)
            assert refuses(cache, path)
    assert not refuses(cache, path) and refused > 300


def refuses(cache: Cache, path: Path) -> bool:
    try:
        cache.check()
    except LatentError as error:
        assert (str(path) in str(error) or str(path.parent) in str(error)) and "wam cache" in str(error) and len(str(error)) < 4000, error
        return True
    return False


def test_notes_of_hashes_with_anything_in_any_place(encoded: Encoded) -> None:
    """files.json: a note that is none is not believed, and one of another hash leads to no cache at all."""
    dataset, cache, _ = encoded
    path, cameras = cache.folder.parent / "files.json", dataset.data.cameras
    text, right = path.read_text(), content_of(dataset.lerobot, dataset.data.cameras, cache.folder.parent)
    content = json.loads(text)
    with restored(path):
        for at, new in product(places(content), [*JUNK, DROP]):
            path.write_text(json.dumps(changed(content, at, new)))
            try:
                found = content_of(dataset.lerobot, cameras, path.parent)
            except LatentError as error:
                assert says_what_to_do(error, path)
                continue
            assert found == right or (isinstance(new, str) and at[1:] == (2,)), (at, new)
