"""Configs: what is read back is what was written, and what does not fit is refused with the remedy."""

from pathlib import Path

import pytest

from wam.config import CodecConfig, Config, ConfigError, LevelsConfig, NoiseConfig, TimelineConfig, TrainingConfig, from_dict, load_config, save_config, to_dict
from wam.evaluation.compare.settings import load_compare

ROOT = Path(__file__).resolve().parents[1]


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    return str(caught.value)


def test_overrides_are_typed_and_later_ones_win(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("training: {steps: 10, batch_size: 3}\noutput: runs/a\n")
    config = load_config(
        path,
        [
            "training.steps=200",
            "training.steps=300",
            "training.learning_rate=1e-3",  # text in YAML 1.1
            "training.max_minutes=2",  # an int where a float is expected
            "training.modes={skip: 1}",
            "collect.tasks=[drawer-open-v3, door-open-v3]",
            "model.embodiments=[{name: arm, state_dim: 7, action_dim: 7}]",
            "data.embodiment=arm",
            "rollout.replan=null",
        ],
    )
    assert config.training.steps == 300 and config.training.batch_size == 3 and config.output == "runs/a"
    assert config.training.learning_rate == 1e-3 and type(config.training.learning_rate) is float
    assert config.training.max_minutes == 2 and type(config.training.max_minutes) is float
    assert config.training.modes == {"skip": 1.0} and config.rollout.replan is None
    assert config.collect.tasks == ("drawer-open-v3", "door-open-v3") and config.model.embodiments[0].state_dim == 7
    assert load_config(None) == Config()


def test_unknown_keys_come_with_the_nearest_name() -> None:
    assert refused("training.step=5") == "unknown key 'training.step'; did you mean 'training.steps'?"
    assert refused("trainin.steps=5") == "unknown key 'trainin'; did you mean 'training'?"
    assert "text has the keys cache, dtype, heads, kind, layers, max_tokens, pretrained, template, width" in refused("text.zzz=1")
    assert "unknown key 'model.embodiments[0].state_dims'" in refused("model.embodiments=[{state_dims: 4}]")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps=many", "training.steps is 'many' (str); expected int"),
        ("training.steps=1.5", "training.steps is 1.5 (float); expected int"),
        ("training.steps=true", "training.steps is True (bool); expected int"),
        ("training.learning_rate=fast", "training.learning_rate is 'fast' (str); expected float"),
        ("training.learning_rate=true", "training.learning_rate is True (bool); expected float"),
        ("training.precision=fp23", "expected one of 'auto', 'fp32', 'bf16'; did you mean 'fp32'?"),
        ("collect.tasks=drawer-open-v3", "collect.tasks is 'drawer-open-v3'; expected a list, e.g. ['drawer-open-v3']"),
        ("codec.image_size=[64]", "codec.image_size has 1 entries; expected 2"),
        ("training.modes=[skip]", "training.modes is ['skip']; expected a mapping"),
        ("training.modes={skip: often}", "training.modes.skip is 'often'"),
        ("training=5", "training is 5; expected a section with keys"),
        ("output.name=x", "unknown key|expected str"),
        ("training.steps", "has no '='"),
        ("training.steps=[1", "not valid YAML"),
    ],
)
def test_wrong_values_are_named(override: str, message: str) -> None:
    text = refused(override)
    assert any(part in text for part in message.split("|")), text


def test_sizes_that_do_not_fit_are_spelled_out() -> None:
    text = refused("timeline.frame_stride=3")
    assert "1 x temporal_stride 4 = 4 frames a block, x frame_stride 3 = 12 control steps, but actions_per_block is 8" in text
    assert "timeline.actions_per_block=12" in text
    assert load_config(None, ["timeline.frame_stride=3", "timeline.actions_per_block=12"]).timeline.frames == 13

    text = refused("codec.image_size=[64, 60]")
    assert "width 60 is not a multiple of codec.patch 8 (60 = 7 x 8 + 4)" in text and "use 56 or 64" in text
    text = refused("codec.image_size=[72, 64]")
    assert "a latent frame is 9 high (image height 72 / codec.patch 8)" in text and "a multiple of 16" in text
    assert "a plan holds timeline.actions_per_block = 8 control steps; use 1..8" in refused("rollout.replan=9")


def test_sections_check_themselves() -> None:
    for build in (
        lambda: TimelineConfig(blocks=0),
        lambda: CodecConfig(channels=193),
        lambda: NoiseConfig(coupled=1.1),
        lambda: LevelsConfig(shift=0),
        lambda: TrainingConfig(modes={"skip": 0.0}),
        lambda: TrainingConfig(ema_decay=1.0),
    ):
        with pytest.raises(ConfigError, match=";"):  # problem; remedy
            build()


def test_timeline_arithmetic() -> None:
    timeline = TimelineConfig(blocks=3, latents_per_block=2, frame_stride=2, actions_per_block=16)
    assert (timeline.frames_per_block, timeline.frames, timeline.latents) == (8, 25, 7)


def test_round_trip_through_yaml(tmp_path: Path) -> None:
    overrides = ["training.max_minutes=1.5", "rollout.replan=4", "codec.image_size=[32, 64]", "training.modes={skip: 1, joint: 2}", "output='123'"]
    config = load_config(None, overrides)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config != Config()
    assert from_dict(Config, to_dict(config)) == config


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text("training: [")
    with pytest.raises(FileNotFoundError, match=r"no config file .*tinny\.yaml; configs in .*tiny\.yaml"):
        load_config(tmp_path / "tinny.yaml")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "tiny.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "empty.yaml").write_text("# defaults\n")
    assert load_config(tmp_path / "empty.yaml") == Config()


def test_every_config_in_the_repository_loads() -> None:
    paths = sorted((ROOT / "configs").glob("*.yaml"))
    assert paths, "configs/ holds no YAML file"
    for path in paths:
        if path.name.startswith("compare"):  # a comparison of several runs: their shared config, and what differs
            settings, overrides = load_compare(path)
            assert load_config(path.parent / settings.config, overrides).output.startswith("runs/")
            continue
        assert load_config(path).output.startswith("runs/"), f"{path} writes outside runs/, which git ignores"
