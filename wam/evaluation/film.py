"""Driven episodes as films: real frames, and beside each what the model had imagined for that moment.

    control steps   0 ........ at ......................... at' .......       a plan made for `at` has frames for the steps behind it,
    real            f1 f2 f3 ...                                              until a newer plan begins
    imagined           by the plan in use, or by forward dynamics from its actions, aside
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from wam.evaluation.environments import Floats, Frames, StepResult
from wam.evaluation.episodes import Driver, Episode, Watcher, generator_seed
from wam.inference.outcome import outcome
from wam.inference.session import Plan, Session
from wam.pictures import beside, enlarge, strip, write_mp4, write_png

WATCHABLE_FPS = 20


class Film(Watcher):
    """Real frames of some rows of a wave, and beside each what the model imagined for that moment when it planned.

    The first frame is left out: it was given.  Modes that plan actions alone are asked, aside, what they expect to follow from them, if
    the checkpoint was trained to answer; this costs nothing of the time that is measured and draws from no generator of the session.
    """

    def __init__(self, driver: Driver, seeds: Sequence[int], rows: Sequence[int], control_hz: float) -> None:
        self._driver, self._seeds = driver, seeds
        self._forward = driver.imagines_aside
        self._rate = control_hz / driver.stride  # frames a second, in the robot's time
        self._stride = driver.stride
        self._real: dict[int, list[Frames]] = {row: [] for row in rows}
        self._steps: dict[int, int] = dict.fromkeys(rows, 0)  # control steps seen
        self._at: dict[int, list[tuple[int, Frames]]] = {row: [] for row in rows}  # what was imagined, from which control step on
        self._expected: Frames | None = None

    def planned(self, session: Session, rows: Sequence[int], plan: Plan, sent: Floats, milliseconds: float) -> None:
        self._expected = None
        if rows[0] not in self._real:
            return
        latents = plan.imagined
        if latents is None and self._forward:
            noise = [generator_seed(self._driver.noise_seed, self._seeds[rows[0]], self._steps[rows[0]])]
            latents = outcome(session, [0], sent, self._driver.solver, noise)
        if latents is not None:
            self._expected = self._driver.policy.codec.decode(latents, first=False).cpu().numpy()[0]

    def placed(self, row: int, at: int) -> None:
        if self._expected is not None:
            self._at[row].append((at, self._expected))

    def ran(self, rows: Sequence[int], results: Sequence[StepResult]) -> None:
        for row, result in zip(rows, results, strict=True):
            if row in self._real:
                self._real[row].append(result.frames)
                self._steps[row] += len(result.states)

    def clips(self, row: int) -> dict[str, Frames]:
        """`real` (F, H, W, 3), and `imagined` of the same moments by the plan that was in use; the real frame where none was."""
        real = np.concatenate(self._real[row])
        imagined = [self._imagined(row, (i + 1) * self._stride) for i in range(len(real))]
        known = [frame for frame in imagined if frame is not None]
        return {"real": real, "imagined": np.stack([f if f is not None else real[i] for i, f in enumerate(imagined)])} if known else {"real": real}

    def _imagined(self, row: int, step: int) -> Frames | None:
        """The frame that the newest plan begun before a step had for it."""
        for at, frames in reversed(self._at[row]):
            if at < step:
                index = (step - at) // self._stride - 1
                return frames[index] if 0 <= index < len(frames) else None
        return None

    def save(self, directory: Path, episodes: Sequence[Episode], strip_of: int) -> None:
        """Write `<mode>_<seed>.mp4` for each recorded row, and a still of the episode whose seed is `strip_of`."""
        mode = self._driver.mode
        for row in self._real:
            clips = self.clips(row)
            if len(clips["real"]) == 0:  # the episode ended before a frame was due
                continue
            episode, fps = episodes[row], max(1, round(min(WATCHABLE_FPS, self._rate)))
            title = f"{mode}   seed {episode.seed}   {fps / self._rate:.2g}x speed"
            write_mp4(titled(clips, title, episode.success, hold=fps), directory / f"{mode}_{episode.seed}.mp4", fps)
            if episode.seed == strip_of:
                write_png(strip(list(clips.values())), directory / f"{mode}_{episode.seed}.png")


_BAR, _BORDER, _GREEN, _RED = 22, 4, (40, 160, 70), (200, 60, 50)


def titled(clips: dict[str, Frames], title: str, success: bool, hold: int, factor: int = 4) -> Frames:
    """Clips (F, H, W, 3) enlarged side by side, names above and title below; the last frame stays for `hold` frames, marked with how it ended."""
    videos = beside([enlarge(clip, factor) for clip in clips.values()], _BORDER)
    width = videos.shape[2]
    names, below = (Image.new("RGB", (width, _BAR), "white") for _ in range(2))
    pen, font = ImageDraw.Draw(names), ImageFont.load_default(14)
    each = (width + _BORDER) // len(clips)
    for i, name in enumerate(clips):
        pen.text((i * each + each // 2, _BAR // 2), name, fill="black", font=font, anchor="mm")
    ImageDraw.Draw(below).text((6, _BAR // 2), title, fill="black", font=font, anchor="lm")
    ended = below.copy()
    colour, word = (_GREEN, "success") if success else (_RED, "failed")
    ImageDraw.Draw(ended).text((width - 6, _BAR // 2), word, fill=colour, font=font, anchor="rm")

    def framed(frames: Frames, bar: Image.Image) -> Frames:
        top, bottom = (np.broadcast_to(np.asarray(part), (len(frames), _BAR, width, 3)) for part in (names, bar))
        return np.concatenate([top, frames, bottom], axis=1)

    last = videos[-1:].copy()
    for edge in (np.s_[:, :_BORDER], np.s_[:, -_BORDER:], np.s_[:, :, :_BORDER], np.s_[:, :, -_BORDER:]):
        last[edge] = colour
    return np.concatenate([framed(videos, below), framed(last.repeat(hold, axis=0), ended)])
