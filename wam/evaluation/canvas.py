"""Small images of MuJoCo worlds, fast: one OpenGL context for a process, one set of uploaded meshes and textures for a world.

MuJoCo's own renderer belongs to one environment: twenty-five environments would upload twenty-five copies of the same robot.  A canvas
belongs to (world file, image size) and draws any environment made from that file.  Multisampling, shadows and reflections are off: on
a software renderer they cost ten times the rest (about 7 ms against 100 ms an image), for pixels nobody misses at these sizes.
"""

from __future__ import annotations

import atexit
import functools
import os
import weakref
from typing import Any

import mujoco
import numpy as np

from wam.evaluation.environments import Frames
from wam.evaluation.gl import REMEDY, RenderError


class Canvas:
    """Draws environments made from one world file at one size."""

    def __init__(self, model: mujoco.MjModel, image_size: int) -> None:
        """Upload a world's meshes and textures; `model` is any instance made from the file."""
        self._context = _gl_context()
        self._context.make_current()
        model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = model.vis.global_.offheight = image_size
        self._renderer = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._renderer)
        self._scene = mujoco.MjvScene(model, maxgeom=1000)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW.value] = 0
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION.value] = 0
        self._options = mujoco.MjvOption()
        self._area = mujoco.MjrRect(0, 0, image_size, image_size)
        self._size = image_size
        self._freed = False

    def free(self) -> None:
        """Give back meshes, textures and buffers; also done when the last environment that draws here is gone."""
        if not self._freed:
            self._freed = True
            self._context.make_current()
            self._renderer.free()

    def __del__(self) -> None:
        if not getattr(self, "_freed", True):  # construction may have failed
            self.free()

    def draw(self, model: mujoco.MjModel, data: mujoco.MjData, camera: int) -> Frames:
        """Draw a world from one of its cameras, turned so that up is up: (H, W, 3)."""
        self._context.make_current()
        view = mujoco.MjvCamera()
        view.type, view.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, camera
        mujoco.mjv_updateScene(model, data, self._options, None, view, mujoco.mjtCatBit.mjCAT_ALL.value, self._scene)
        mujoco.mjr_render(self._area, self._scene, self._renderer)
        image = np.empty((self._size, self._size, 3), np.uint8)
        mujoco.mjr_readPixels(image, None, self._area, self._renderer)  # rows come from the bottom up
        upside_down = model.cam_mat0[camera].reshape(3, 3)[2, 1] < 0  # the camera's own "up" points down
        return np.ascontiguousarray(image[:, ::-1] if upside_down else image[::-1])


_CANVASES: weakref.WeakValueDictionary[tuple[str, int], Canvas] = weakref.WeakValueDictionary()  # an OpenGL context belongs to a process, so this does too


def shared_canvas(path: str, model: mujoco.MjModel, image_size: int) -> Canvas:
    """The process's canvas for a world file and a size: made on first use, kept while an environment draws on it."""
    canvas = _CANVASES.get((path, image_size))
    if canvas is None:
        canvas = _CANVASES[path, image_size] = Canvas(model, image_size)
    return canvas


@functools.cache
def _gl_context() -> Any:
    """The process's OpenGL context.  It and its canvases are freed before PyOpenGL takes the library down, which otherwise complains at exit."""
    try:
        context = mujoco.GLContext(64, 64)  # canvases bring their own buffers, of their own size
        context.make_current()
    except Exception as error:  # each backend raises its own kind
        raise RenderError(f"MuJoCo cannot render offscreen here ({type(error).__name__}: {error}); {REMEDY}") from error

    def free() -> None:
        for canvas in list(_CANVASES.values()):
            canvas.free()
        context.free()

    atexit.register(free)
    return context


def describe_renderer() -> dict[str, str]:
    """What draws: MuJoCo's backend, and the name OpenGL gives its implementation.  Pixels differ between implementations."""
    from OpenGL import GL

    _gl_context().make_current()
    return {"backend": os.environ.get("MUJOCO_GL", ""), "opengl": GL.glGetString(GL.GL_RENDERER).decode(), "version": GL.glGetString(GL.GL_VERSION).decode()}
