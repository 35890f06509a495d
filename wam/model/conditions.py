"""What a forward pass is conditioned on beside its tokens: instructions, an image, and a first frame joined to the channels.

Everything here changes with an instruction or with the first frame of an episode, never with a solver step; so a session computes it
once (`WorldActionModel.prepare`) and passes it to every call.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wam.model.backbone import Context


@dataclass(frozen=True)
class Conditions:
    """Conditions of a batch.

    Attributes:
        text_UTE: the text encoder's states of U distinct instructions.
        rows_B: which of the U each sample has.
        video: what video tokens cross-attend to.
        action: what an action expert's tokens cross-attend to, in its width; None without an expert.
        first_frame_BCFHW: mask and first frame (B, 4 + C, frames, h, w), for models that take it on the channels (Wan's image-to-video).
    """

    text_UTE: Tensor
    rows_B: Tensor
    video: Context
    action: Context | None = None
    first_frame_BCFHW: Tensor | None = None

    def select(self, rows: Tensor) -> Conditions:
        """The same for some of the samples."""
        first = None if self.first_frame_BCFHW is None else self.first_frame_BCFHW[rows]
        action = None if self.action is None else self.action.select(rows)
        return Conditions(self.text_UTE, self.rows_B[rows], self.video.select(rows), action, first)

    def copied(self, copies: int) -> Conditions:
        """The same for `copies` rows of a batch, side by side, in place of each sample; what they cross-attend to is held once."""
        first = None if self.first_frame_BCFHW is None else self.first_frame_BCFHW.repeat_interleave(copies, 0)
        action = None if self.action is None else replace(self.action, copies=copies)
        return Conditions(self.text_UTE, self.rows_B.repeat_interleave(copies), replace(self.video, copies=copies), action, first)

    def with_first_frame(self, first_frame_BCFHW: Tensor) -> Conditions:
        """The same with another first frame."""
        return replace(self, first_frame_BCFHW=first_frame_BCFHW)

    def first_frame_of(self, frames: list[int]) -> Tensor | None:
        """The first-frame condition of these latent frames, the same ones for every sample; None where the model takes none."""
        return None if self.first_frame_BCFHW is None else self.first_frame_BCFHW[:, :, frames]

    def first_frame_at(self, frames: list[list[int]]) -> Tensor | None:
        """The first-frame condition of each sample's own latent frames, neighbours in order; None where the model takes none.

        Raises:
            ValueError: a frame beyond those the condition was made for.
        """
        if self.first_frame_BCFHW is None:
            return None
        last, length = max(max(f) for f in frames), self.first_frame_BCFHW.shape[2]
        if last >= length:
            raise ValueError(f"latent frame {last} lies beyond the {length} that the first frame conditions; start the session again from the newest frame (timeline.blocks is how long one lasts)")
        return torch.stack([self.first_frame_BCFHW[row, :, chosen[0] : chosen[-1] + 1] for row, chosen in enumerate(frames)])  # a list as an index would be copied to the device at every step
