"""With the same weights, no actions and everything seeing everything, the network is diffusers' own, in each form that Wan was released in.

    t2v    one noise level a sample                                             Wan2.1 text to video
    ti2v   a level per frame, the first one's zero                              Wan2.2 text and image to video
    i2v    mask and first frame on the channels, 257 image tokens beside 512 of text    Wan2.1 image to video (numbers that diffusers counts on)

Ours is computed as training and sessions compute it: no path of its own for the test.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from tiny import random_window, tiny_config, tiny_model
from tiny_wan import FORMS, transformer, wan_config
from torch import Tensor

from wam.model.backbone import Backbone
from wam.model.conditions import Conditions
from wam.model.wam import Noisy, Window, WorldActionModel
from wam.relations import RelationTable
from wam.timeline import Kind

FRAMES, IMAGE_TOKENS, TEXT_TOKENS = 3, 257, 512
EVERYTHING = RelationTable({(Kind.V, Kind.V): "="})  # noisy video alone: all of it is one block's


def _models(form: str, expert: int | None) -> tuple[WanTransformer3DModel, WorldActionModel]:
    """The same weights in both.  All frames of a clip are one block, so that it is one window."""
    one_block = ("codec.image_size=[64, 96]", "timeline.blocks=1", f"timeline.latents_per_block={FRAMES}", f"timeline.actions_per_block={8 * FRAMES}", "timeline.first_frame=inside", "model.state=none")
    config = wan_config(form, None, *one_block, f"model.expert_width={expert or 'null'}", f"text.max_tokens={TEXT_TOKENS}")
    theirs, ours = transformer(form).eval().requires_grad_(False), tiny_model(config)
    ours.backbone.load_state_dict(theirs.state_dict())
    return theirs, ours


def _levels(form: str, batch: int) -> Tensor:
    """Timesteps (B, F) of the frames."""
    level = 1000 * torch.rand(batch, FRAMES if form == "ti2v" else 1).expand(-1, FRAMES)
    return torch.cat([torch.zeros(batch, 1), level[:, 1:]], dim=1) if form == "ti2v" else level


def _inputs(form: str, ours: WorldActionModel, batch: int) -> tuple[Window, Tensor, Tensor | None, Tensor | None]:
    """A window of noisy video, text (B, T, E), and image embeddings and first frame for i2v."""
    window = replace(random_window(ours, batch, 1), video_t_BF=_levels(form, batch))
    text = torch.randn(batch, TEXT_TOKENS, ours.config.text.width)
    if form != "i2v":
        return window, text, None, None
    return window, text, torch.randn(batch, IMAGE_TOKENS, 32), torch.randn(batch, 8, FRAMES, *ours.latent_size)


def _conditions(ours: WorldActionModel, text: Tensor, image: Tensor | None, first: Tensor | None) -> Conditions:
    conditions = ours.embed_text(text, torch.arange(len(text)))
    if image is None or first is None:
        return conditions
    return ours.with_image(conditions, image).with_first_frame(first)


def _theirs(model: WanTransformer3DModel, form: str, window: Window, text: Tensor, image: Tensor | None, first: Tensor | None) -> Tensor:
    patches = window.noisy_BCFHW[0, 0, 0].numel() // 4
    timestep = window.video_t_BF.repeat_interleave(patches, dim=1) if form == "ti2v" else window.video_t_BF[:, 0]
    latents = window.noisy_BCFHW if first is None else torch.cat([window.noisy_BCFHW, first], dim=1)
    out: Tensor = model(latents, timestep, text, image, return_dict=False)[0]
    return out


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("expert", [None, 32])
@pytest.mark.parametrize("form", FORMS)
def test_parity_with_diffusers(form: str, expert: int | None, batch: int) -> None:
    torch.manual_seed(1)
    theirs, ours = _models(form, expert)
    window, text, image, first = _inputs(form, ours, batch)
    conditions = _conditions(ours, text, image, first)
    expected = _theirs(theirs, form, window, text, image, first)
    assert float(expected.std()) > 0.1

    view = ours.view(ours.new_cache(batch), EVERYTHING, (Kind.V,), [0] * batch)
    for ready in (conditions, ours.prepare(conditions)):  # keys and values of text and image computed in place, or once ahead
        found, _ = ours.denoise(view, Noisy(window.noisy_BCFHW, window.video_t_BF), ready, window.embodiment_B)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("expert", [None, 32])
@pytest.mark.parametrize("form", FORMS)
def test_parity_inside_a_training_window(form: str, expert: int | None, batch: int) -> None:
    """The noisy copy of a window sees itself alone, and comes out as if nothing else were there."""
    torch.manual_seed(2)
    theirs, ours = _models(form, expert)
    window, text, image, first = _inputs(form, ours, batch)
    layout = ours.training_layout(1)
    blind = RelationTable({(kind, kind): "=" for kind in Kind})
    video, _ = ours.forward_train(window, _conditions(ours, text, image, first), blind.dense(layout)[None, None])
    torch.testing.assert_close(video, _theirs(theirs, form, window, text, image, first), rtol=1e-5, atol=1e-5)


def test_a_diffusers_checkpoint_loads_and_saves_under_its_own_names(tmp_path: Path) -> None:
    for form in FORMS:
        theirs = transformer(form)
        theirs.save_pretrained(tmp_path / form)
        ours = Backbone.from_pretrained(tmp_path / form)
        ours.save_pretrained(tmp_path / f"{form}-back")
        again = WanTransformer3DModel.from_pretrained(tmp_path / f"{form}-back")
        before, after = theirs.state_dict(), again.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_the_plain_tiny_model_has_a_backbone_that_diffusers_loads(tmp_path: Path) -> None:
    """A network trained here from scratch is one of diffusers', too."""
    model = tiny_model(tiny_config())
    model.backbone.save_pretrained(tmp_path)
    theirs = WanTransformer3DModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(theirs[k], v) for k, v in model.backbone.state_dict().items())
