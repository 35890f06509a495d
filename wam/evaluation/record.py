"""Recording driven episodes: what failed today is training data tomorrow.

    environment  --began-->  EpisodeBuffer  <--acted, ran--  Driver          one buffer a row of a wave
    wave over    --save--->  Recording      with seed, environment, mode, policy's hash and how it ended

Successes and failures alike become episodes of a LeRobot dataset (`wam.data.recording`): frames and states as the policy saw them, the
actions that it was let to send, and what came of it.  An episode that is there already (same policy, mode, environment, seed) stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from wam.data.recording import EpisodeBuffer, Recording, RecordingFormat
from wam.evaluation.environments import Floats, Frames, StepResult
from wam.evaluation.episodes import Episode, Watcher
from wam.evaluation.metaworld_tasks import ACTION_NAMES, STATE_NAMES
from wam.evaluation.vector import VectorEnv
from wam.pretrained import Policy

CANVAS = "observation.images.canvas"  # of several cameras on one picture
HASH = 12  # letters of a policy's hash in the names of episodes


def open_recording(root: Path, policy: Policy, env: VectorEnv) -> Recording:
    """The recording at `root` of what a policy sees of an environment, begun or gone on with.

    Raises:
        FileExistsError, ValueError: as `Recording`.
    """
    data, size = policy.config.data, policy.config.codec.image_size
    camera = data.cameras[0] if len(data.cameras) == 1 else CANVAS
    names = (STATE_NAMES, ACTION_NAMES) if env.name.startswith("metaworld/") else (_numbered("state", env.state_dim), _numbered("action", env.action_dim))
    return Recording(Path(root), RecordingFormat(int(env.control_hz), {camera: (size[0], size[1])}, *names, data.embodiment, policy.config.timeline.stride))


def _numbered(what: str, count: int) -> tuple[str, ...]:
    return tuple(f"{what}_{i}" for i in range(count))


class Record(Watcher):
    """Sees a wave and keeps its episodes; one for every call of `Driver.drive`.

    Attributes:
        kept: how many episodes were new.
    """

    def __init__(self, recording: Recording, seeds: Sequence[int], environment: str, mode: str, policy_sha256: str):
        self.recording, self.seeds, self.kept = recording, list(seeds), 0
        self._facts = {"environment": environment, "mode": mode, "policy": policy_sha256}
        self._buffers: dict[int, EpisodeBuffer] = {}
        self._sent: dict[int, Floats] = {}
        (self._camera,) = recording.form.cameras

    def began(self, row: int, instruction: str, frame: Frames, state: Floats) -> None:
        """A row's episode began: what is asked, and what is seen first, (H, W, 3) and (Ds,)."""
        buffer = EpisodeBuffer(self.recording.form, instruction)
        buffer.begin({self._camera: frame}, state)
        self._buffers[row] = buffer

    def acted(self, row: int, actions: Floats) -> None:
        """What a row was sent for the stretch that `ran` is told of next, (n, Da)."""
        self._sent[row] = actions

    def ran(self, rows: Sequence[int], results: Sequence[StepResult]) -> None:
        """Stretches were executed."""
        every = self.recording.form.frame_every
        for row, result in zip(rows, results, strict=True):
            buffer, sent = self._buffers[row], self._sent.pop(row)
            assert len(buffer) % every == 0, "stretches are whole numbers of frames"
            for step, (state, success) in enumerate(zip(result.states, result.success, strict=True)):
                due = (step + 1) % every == 0
                buffer.add(sent[step], state, {self._camera: result.frames[step // every]} if due else None, success=bool(success))

    def save(self, episodes: Sequence[Episode]) -> None:
        """Keep the wave's episodes, in the order of its seeds.

        Raises:
            ValueError, OSError: as `Recording.add`; episodes before are kept.
        """
        for row, buffer in sorted(self._buffers.items()):
            episode = episodes[row]
            assert episode.outcome is not None, "the wave is over"
            name = re.sub(r"[^\w-]+", "-", f"{self._facts['policy'][:HASH]}-{self._facts['environment']}-{self._facts['mode']}-{episode.seed:06d}")
            self.kept += self.recording.add(name, buffer, episode.outcome, {**self._facts, "seed": episode.seed})
        self._buffers = {}

