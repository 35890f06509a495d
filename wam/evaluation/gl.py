"""Which OpenGL MuJoCo renders with, decided by trying.

MuJoCo reads MUJOCO_GL once, when it is imported, and its default opens a window: on a server that fails late and obscurely.  So the
choice is made first, by a short subprocess that really draws a sphere: the user's MUJOCO_GL if set, else EGL, else OSMesa.  The answer
is written to the environment, where MuJoCo, and every worker process started afterwards, finds it without asking again (a worker is
started by a process that has asked).
"""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import os
import platform
import subprocess
import sys

_PROBE = """
import mujoco
model = mujoco.MjModel.from_xml_string('<mujoco><worldbody><light pos="0 0 3"/><geom size=".5" rgba="1 0 0 1"/></worldbody></mujoco>')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 16, 16)
renderer.update_scene(data)
assert renderer.render().max() > 0, "the image is black"
print("drawn")
"""
REMEDY = "install Mesa's software renderer: `apt-get install libegl1 libgl1-mesa-dri` (EGL) or `apt-get install libosmesa6` (OSMesa)"


class RenderError(RuntimeError):
    """No way to render offscreen on this machine; the message names the packages to install."""


def use_offscreen_backend() -> str:
    """Choose MuJoCo's offscreen backend for this process and its children; call before `import mujoco`.

    Raises:
        RenderError: nothing draws, or MuJoCo was imported before, when its choice was still open.
    """
    if "mujoco" in sys.modules and platform.system() == "Linux" and not os.environ.get("MUJOCO_GL"):
        raise RenderError("mujoco was imported before wam chose how to render; import wam.evaluation.metaworld first, or set MUJOCO_GL=egl")
    backend = choose_backend()
    if backend:
        os.environ["MUJOCO_GL"] = backend
    return backend


@functools.cache
def choose_backend() -> str:
    """The value of MUJOCO_GL to use: the user's own if set, else "egl" or "osmesa", the first that draws.

    On macOS and Windows MuJoCo's own default is right, and is written as the empty string.

    Raises:
        ImportError: MuJoCo is not installed; names the extra to install.
        RenderError: the user's choice, or neither, draws.
    """
    require_modules("mujoco")
    chosen = os.environ.get("MUJOCO_GL", "").lower().strip()
    if platform.system() != "Linux" or (chosen and multiprocessing.parent_process() is not None):
        return chosen
    require_modules("OpenGL")
    failures = {}
    for backend in (chosen,) if chosen else ("egl", "osmesa"):
        failure = probe(backend)
        if failure is None:
            return backend
        failures[backend] = failure
    tried = "; ".join(f"{backend}: {failure}" for backend, failure in failures.items())
    choice = "or unset MUJOCO_GL to have one chosen" if chosen else "or set MUJOCO_GL yourself"
    raise RenderError(f"MuJoCo cannot render offscreen here ({'MUJOCO_GL=' if chosen else ''}{tried}); {REMEDY}, {choice}")


def require_modules(*names: str) -> None:
    """Check that parts of the simulator are installed, without importing them.

    Raises:
        ImportError: names what is missing, and the extra to install.
    """
    missing = [name for name in names if not _is_installed(name)]
    if missing:
        raise ImportError(f"the simulator's {', '.join(missing)} cannot be imported; pip install 'wam[sim]'")


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a broken import hook, or a module put out of action
        return False


def probe(backend: str, timeout: float = 60.0) -> str | None:
    """Draw one image with a backend in a subprocess; return None if it worked, else the last line of what went wrong."""
    environment = {**os.environ, "MUJOCO_GL": backend} | ({"PYOPENGL_PLATFORM": backend} if backend in ("egl", "osmesa") else {})
    try:
        result = subprocess.run([sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"no image within {timeout:.0f} s"
    if "drawn" in result.stdout:  # PyOpenGL may complain while the process ends; the image was drawn all the same
        return None
    if "object has no attribute 'glGetError'" in result.stderr:  # what PyOpenGL says where it found nothing to load
        return "its library is not installed"
    errors = [line for line in result.stderr.splitlines() if line and not line.startswith(" ")]
    return next((line for line in errors if "Error" in line), errors[-1] if errors else f"exit code {result.returncode}")
