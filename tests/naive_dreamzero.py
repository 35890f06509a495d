"""DreamZero as its cases describe it, in the plainest way: every token has a level, an angle and a row of one mask; nothing is shared.

It knows nothing of our network: what both compute the same way, both got from the description.  Only the tables of levels and the solver
are ours, which are held against the released ones elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, silu

from wam.flow import bump_weight_of_nearest, level_table, unipc_grid
from wam.solvers import evaluated_steps, make_solver

Weights = dict[str, Tensor]
Token = tuple[str, int]  # kind c(lean), n(oisy), a(ction), s(tate), and block; the first frame's block is -1


@dataclass(frozen=True)
class Size:
    """A case's axes; `window` is `local_attn_size`."""

    batch: int = 2
    blocks: int = 2
    frames: int = 2
    actions: int = 4
    states: int = 1
    layers: int = 2
    heads: int = 2
    head_dim: int = 32
    height: int = 4
    width: int = 6
    channels: int = 4
    i2v: bool = True
    window: int = -1
    eps: float = 1e-6
    ffn: int = 40
    freq: int = 12
    text: int = 10
    action_dim: int = 5
    state_dim: int = 6
    hidden: int = 14
    clip: int = 8

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def patches(self) -> int:
        return self.height // 2 * (self.width // 2)


def shapes(s: Size) -> dict[str, tuple[int, ...]]:
    """Every weight of the released network."""
    d, out = s.dim, {"head.modulation": (1, 2, s.dim), "patch_embedding.weight": (s.dim, 2 * s.channels + 4 if s.i2v else s.channels, 1, 2, 2), "patch_embedding.bias": (s.dim,)}
    layers = {"text_embedding.0": (s.text, d), "text_embedding.2": (d, d), "time_embedding.0": (s.freq, d), "time_embedding.2": (d, d), "time_projection.1": (d, 6 * d)}
    layers |= {"head.head": (d, 4 * s.channels), "img_emb.proj.1": (s.clip, s.clip), "img_emb.proj.3": (s.clip, d)}
    norms = {"img_emb.proj.0": s.clip, "img_emb.proj.4": d}
    for n in range(s.layers):
        block = f"blocks.{n}"
        layers |= {f"{block}.{part}.{x}": (d, d) for part in ("self_attn", "cross_attn") for x in "qkvo"} | {f"{block}.cross_attn.{x}_img": (d, d) for x in "kv"}
        layers |= {f"{block}.ffn.0": (d, s.ffn), f"{block}.ffn.2": (s.ffn, d)}
        norms |= {f"{block}.norm3": d}
        out |= {f"{block}.modulation": (1, 6, d), f"{block}.cross_attn.norm_k_img.weight": (d,)}
        out |= {f"{block}.{part}.norm_{x}.weight": (d,) for part in ("self_attn", "cross_attn") for x in "qk"}
    for name, (a, b) in layers.items():
        out |= {f"{name}.weight": (b, a), f"{name}.bias": (b,)}
    out |= {f"{name}.{p}": (width,) for name, width in norms.items() for p in ("weight", "bias")}
    robot = {"state_encoder.layer1": (s.state_dim, s.hidden), "state_encoder.layer2": (s.hidden, d), "action_decoder.layer1": (d, s.hidden), "action_decoder.layer2": (s.hidden, s.action_dim)}
    robot |= {"action_encoder.W1": (s.action_dim, d), "action_encoder.W2": (2 * d, d), "action_encoder.W3": (d, d)}
    for name, (a, b) in robot.items():
        out |= {f"{name}.W": (1, a, b), f"{name}.b": (1, b)}
    return out


class Naive:
    """The network with its weights; `inputs` are a case's."""

    def __init__(self, size: Size, weights: Weights, inputs: dict[str, Tensor]):
        self.s, self.w, self.given = size, weights, inputs

    # ------------------------------------------------------------------------------------------ pieces

    def lin(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def robot(self, name: str, x: Tensor) -> Tensor:
        return x @ self.w[f"{name}.W"][0] + self.w[f"{name}.b"][0]

    def rms(self, name: str, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.s.eps).rsqrt() * self.w[f"{name}.weight"]

    def norm(self, x: Tensor, name: str = "", eps: float | None = None) -> Tensor:
        affine = (self.w[f"{name}.weight"], self.w[f"{name}.bias"]) if name else (None, None)
        return layer_norm(x, x.shape[-1:], *affine, eps=eps or self.s.eps)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.s.heads, self.s.head_dim))

    def patch(self, latents: Tensor, frames: list[int]) -> Tensor:
        """Tokens of latent frames, row-major."""
        x = torch.cat([latents, self.given["y"][:, :, frames]], dim=1) if self.s.i2v else latents
        return torch.nn.functional.conv3d(x, self.w["patch_embedding.weight"], self.w["patch_embedding.bias"], stride=(1, 2, 2)).flatten(2).transpose(1, 2)

    def actions(self, x: Tensor, t: Tensor) -> Tensor:
        half = self.s.dim // 2
        angle = t[..., None] * torch.exp(-torch.arange(half) * (torch.log(torch.tensor(10000.0)) / half))
        joined = torch.cat([self.robot("action_encoder.W1", x), angle.sin(), angle.cos()], dim=-1)
        return self.robot("action_encoder.W3", silu(self.robot("action_encoder.W2", joined)))

    def states(self, x: Tensor) -> Tensor:
        return self.robot("state_encoder.layer2", self.robot("state_encoder.layer1", x).relu())

    def angles(self, dim: int, position: Tensor) -> Tensor:
        return position.double()[:, None] / 10000.0 ** (torch.arange(0, dim, 2).double() / dim)

    def video_angles(self, frames: list[int]) -> Tensor:
        d, side = self.s.head_dim, 2 * (self.s.head_dim // 6)
        f, h, w = torch.cartesian_prod(torch.tensor(frames), torch.arange(self.s.height // 2), torch.arange(self.s.width // 2)).T
        return torch.cat([self.angles(d - 2 * side, f), self.angles(side, h), self.angles(side, w)], dim=1)

    def context(self, text: str) -> tuple[Tensor, Tensor]:
        x = self.norm(self.given["clip_feature"], "img_emb.proj.0", 1e-5)
        clip = self.norm(self.lin("img_emb.proj.3", gelu(self.lin("img_emb.proj.1", x))), "img_emb.proj.4", 1e-5)
        return self.lin("text_embedding.2", gelu(self.lin("text_embedding.0", self.given[text]), approximate="tanh")), clip

    # ------------------------------------------------------------------------------------------ the network

    def run(self, x: Tensor, t: Tensor, angle: Tensor, mask: Tensor, text: str, past: list[tuple[Tensor, Tensor]] | None = None) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Tokens (B, L, D) at levels (B, L); `mask` is (L, past + L).  Returns tokens, embedded levels, and each layer's own keys and values."""
        half = self.s.freq // 2
        phase = t.double()[..., None] * 10000.0 ** (-torch.arange(half).double() / half)
        e = self.lin("time_embedding.2", silu(self.lin("time_embedding.0", torch.cat([phase.cos(), phase.sin()], -1).float())))
        levels = self.lin("time_projection.1", silu(e)).unflatten(-1, (6, -1))
        words, clip = self.context(text)
        own = []

        def rotate(y: Tensor) -> Tensor:
            pairs = torch.view_as_complex(y.double().unflatten(-1, (-1, 2)).contiguous())
            return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)[:, None]).flatten(-2).to(y.dtype)

        for n in range(self.s.layers):
            a, c = f"blocks.{n}.self_attn", f"blocks.{n}.cross_attn"
            m = (self.w[f"blocks.{n}.modulation"][None] + levels).unbind(2)
            h = self.norm(x) * (1 + m[1]) + m[0]
            q, k, v = (self.split(y) for y in (self.rms(f"{a}.norm_q", self.lin(f"{a}.q", h)), self.rms(f"{a}.norm_k", self.lin(f"{a}.k", h)), self.lin(f"{a}.v", h)))
            q, k = rotate(q), rotate(k)
            own.append((k, v))
            keys, values = (k, v) if past is None else (torch.cat([past[n][0], k], 1), torch.cat([past[n][1], v], 1))
            x = x + m[2] * self.lin(f"{a}.o", attend(q, keys, values, mask))
            q = self.split(self.rms(f"{c}.norm_q", self.lin(f"{c}.q", self.norm(x, f"blocks.{n}.norm3"))))
            h = attend(q, self.split(self.rms(f"{c}.norm_k", self.lin(f"{c}.k", words))), self.split(self.lin(f"{c}.v", words)))
            h = h + attend(q, self.split(self.rms(f"{c}.norm_k_img", self.lin(f"{c}.k_img", clip))), self.split(self.lin(f"{c}.v_img", clip)))
            x = x + self.lin(f"{c}.o", h)
            h = self.norm(x) * (1 + m[4]) + m[3]
            x = x + m[5] * self.lin(f"blocks.{n}.ffn.2", gelu(self.lin(f"blocks.{n}.ffn.0", h), approximate="tanh"))
        return x, e, own

    def video_out(self, x: Tensor, e: Tensor) -> Tensor:
        shift, scale = (self.w["head.modulation"][None] + e.unsqueeze(2)).unbind(2)
        out = self.lin("head.head", self.norm(x) * (1 + scale) + shift)
        out = out.unflatten(1, (-1, self.s.height // 2, self.s.width // 2)).unflatten(-1, (2, 2, -1))  # b f h w p q c
        return out.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    def actions_out(self, x: Tensor) -> Tensor:
        return self.robot("action_decoder.layer2", self.robot("action_decoder.layer1", x).relu())

    # ------------------------------------------------------------------------------------------ training

    def train(self, noisy: Tensor, noisy_actions: Tensor, t_frame: Tensor, t_action: Tensor) -> tuple[Tensor, Tensor]:
        s, P, frames = self.s, self.s.patches, list(range(1 + self.s.blocks * self.s.frames))
        clean, state = self.given["clean_latents"], self.given["state"]
        owner = [(f - 1) // s.frames for f in frames for _ in range(P)]
        labels = [*(("c", b) for b in owner), *(("n", b) for b in owner)]
        labels += [("a", b) for b in range(s.blocks) for _ in range(s.actions)] + [("s", b) for b in range(s.blocks) for _ in range(s.states)]
        mask = torch.tensor([[sees(q, k) for k in labels] for q in labels])
        t_video = t_frame.repeat_interleave(P, 1)
        t = torch.cat([torch.zeros_like(t_video), t_video, t_action, t_action[:, :: s.actions // s.states]], 1)
        x = torch.cat([self.patch(clean, frames), self.patch(noisy, frames), self.actions(noisy_actions, t_action), self.states(state)], 1)
        video = self.video_angles(frames)
        line = [self.angles(s.head_dim, torch.arange(n)) for n in (s.blocks * s.actions, s.blocks * s.states)]
        x, e, _ = self.run(x, t, torch.cat([video, video, *line]), mask, "text_context")
        n, L = len(video), noisy_actions.shape[1]
        return self.video_out(x[:, n : 2 * n], e[:, n : 2 * n]), self.actions_out(x[:, 2 * n : 2 * n + L])

    # ------------------------------------------------------------------------------------------ inference

    def seen(self, past: list[tuple[Tensor, Tensor]], own: int) -> list[tuple[Tensor, Tensor]]:
        """Of the cache, what a call with `own` video tokens sees: the window's last frames, those of the call counted in."""
        keep = 10**9 if self.s.window < 0 else max(self.s.window * self.s.patches - own, 0)
        return [(k[:, max(k.shape[1] - keep, 0) :], v[:, max(v.shape[1] - keep, 0) :]) for k, v in past]

    def prefill(self, past: list[tuple[Tensor, Tensor]] | None, frames: list[int], text: str) -> list[tuple[Tensor, Tensor]]:
        x = self.patch(self.given["clean_latents"][:, :, frames], frames)
        before = None if past is None else self.seen(past, x.shape[1])
        mask = torch.ones(x.shape[1], x.shape[1] + (0 if before is None else before[0][0].shape[1]), dtype=torch.bool)
        own = self.run(x, torch.zeros(x.shape[:2]), self.video_angles(frames), mask, text, before)[2]
        return own if before is None else [(torch.cat([k, a], 1), torch.cat([v, b], 1)) for (k, v), (a, b) in zip(before, own, strict=True)]

    def denoise(self, past: list[tuple[Tensor, Tensor]], block: int, video: Tensor, actions: Tensor, t_video: Tensor, t_action: Tensor, released: bool, text: str) -> tuple[Tensor, Tensor]:
        s, frames = self.s, self.of(block)
        v = self.patch(video, frames)
        state_t = t_action[:, :: s.actions // s.states]
        x = torch.cat([v, self.actions(actions, t_action), self.states(self.given["state"][:, block * s.states : (block + 1) * s.states])], 1)
        line = [self.angles(s.head_dim, torch.arange(n) + block * n) for n in (s.actions, s.states)]
        before = self.seen(past, v.shape[1])
        mask = torch.ones(x.shape[1], before[0][0].shape[1] + x.shape[1], dtype=torch.bool)
        if not released:
            mask[-s.states :, : -s.states] = False
        t = torch.cat([t_video.repeat_interleave(s.patches, 1), t_action, state_t], 1)
        x, e, _ = self.run(x, t, torch.cat([self.video_angles(frames), *line]), mask, text, before)
        n = v.shape[1]
        return self.video_out(x[:, :n], e[:, :n]), self.actions_out(x[:, n : n + s.actions])

    def of(self, block: int) -> list[int]:
        return list(range(1 + block * self.s.frames, 1 + (block + 1) * self.s.frames))

    def cache(self, block: int, text: str) -> list[tuple[Tensor, Tensor]]:
        """Before a block is denoised: the first frame and the clean blocks before it."""
        past = self.prefill(None, [0], text)
        for b in range(block):
            past = self.prefill(past, self.of(b), text)
        return past

    def plan(self, chunk: int, released: bool, steps: int, evaluated: tuple[int, ...]) -> dict[str, Tensor]:
        """One chunk's trajectory."""
        grid, video, action = unipc_grid(steps, 5.0), self.given["sample_noise_video"], self.given["sample_noise_action"]
        solvers, caches = [make_solver("unipc", grid) for _ in range(2)], {text: self.cache(chunk, text) for text in ("text_context", "text_context_neg")}
        out, taken = {}, []
        for i, t in enumerate(grid.timesteps):
            if i in evaluated:
                levels = [t.expand(len(video), n) for n in (self.s.frames, self.s.actions)]
                (v, a), (v_neg, _) = (self.denoise(caches[text], chunk, video, action, *levels, released, text) for text in caches)
                v = v_neg + 5 * (v - v_neg)
            out |= {f"video_velocity_step{i}": v, f"action_velocity_step{i}": a}
            video, action = solvers[0].step(v, i, video), solvers[1].step(a, i, action)
            taken.append((video, action))
        return out | {"video": video, "action": action, "video_steps": torch.stack([x for x, _ in taken]), "action_steps": torch.stack([x for _, x in taken])}


def sees(q: Token, k: Token) -> bool:
    """The training mask."""
    (kind, block), (other, b) = q, k
    if kind == "c":
        return other == "c" and b <= block
    if kind == "s" or block == -1:
        return other == kind and b == block
    return (other == "c" and b < block) or (other != "c" and b == block)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) / q.shape[-1] ** 0.5
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v).flatten(2)


def objective(naive: Naive) -> dict[str, Tensor]:
    """Levels by the drawn places in the table, losses, and the gradient's norm for each weight in the order of their names."""
    s, given = naive.s, naive.given
    table = 1000 * level_table(5.0)
    weights = bump_weight_of_nearest(table, 5.0)
    place = given["timestep_id_raw"].long()
    of_block = place[:, 1 :: s.frames]
    frame, action = torch.cat([place[:, :1], of_block.repeat_interleave(s.frames, 1)], 1), of_block.repeat_interleave(s.actions, 1)
    sigma_v, sigma_a = (table[frame] / 1000)[:, None, :, None, None], (table[action] / 1000)[..., None]
    noisy = (1 - sigma_v) * given["clean_latents"] + sigma_v * given["noise_video"]
    noisy_actions = (1 - sigma_a) * given["actions"] + sigma_a * given["noise_action"]
    names = sorted(naive.w)
    naive = Naive(s, {name: naive.w[name].clone().requires_grad_() for name in names}, given)
    video, actions = naive.train(noisy, noisy_actions, table[frame], table[action])
    error_v = (video - (given["noise_video"] - given["clean_latents"])).square().mean((1, 3, 4))
    error_a = ((actions - (given["noise_action"] - given["actions"])).square() * given["action_mask"] * given["has_real_action"].view(-1, 1, 1)).mean(2)
    losses = (weights[frame] * error_v).mean(), (weights[action] * error_a).mean()
    gradients = torch.autograd.grad(sum(losses), [naive.w[name] for name in names], allow_unused=True)
    norms = torch.stack([torch.zeros(()) if g is None else g.norm() for g in gradients])
    out = {"timestep_frame": table[frame], "timestep_action": table[action], "noisy_latents": noisy, "noisy_actions": noisy_actions, "video_velocity": video, "action_velocity": actions}
    return out | {"loss": sum(losses).reshape(1), "dynamics_loss": losses[0].reshape(1), "action_loss": losses[1].reshape(1), "grad_l2": norms}


def outputs(naive: Naive, plans: tuple[tuple[str, int], ...], chunks: int, steps: int = 16) -> dict[str, Tensor]:
    """All that a case stores, but for the image branch at another width."""
    s, given = naive.s, naive.given
    out = {f"objective/{name}": x.detach() for name, x in objective(naive).items()}
    with torch.no_grad():
        video, action = naive.train(given["noisy_latents"], given["noisy_actions"], given["t_frame"], given["t_action"])
        out |= {"train/video_velocity": video, "train/action_velocity": action, "img_emb/clip_tokens": naive.context("text_context")[1]}
        past = naive.cache(s.blocks - 1, "text_context")
        out |= {f"infer/kv_cache_{name}_layer": torch.stack(past[layer]) for name, layer in (("first", 0), ("last", -1))}
        out["sample/timesteps"] = unipc_grid(steps, 5.0).timesteps
        for mask in ("released", "trainmask"):
            parts = []
            for b in range(s.blocks):
                frames, rows = naive.of(b), slice(b * s.actions, (b + 1) * s.actions)
                noisy = given["noisy_latents"][:, :, frames], given["noisy_actions"][:, rows], given["t_frame"][:, frames], given["t_action"][:, rows]
                parts.append(naive.denoise(naive.cache(b, "text_context"), b, *noisy, mask == "released", "text_context"))
            out |= {f"infer_{mask}/video_velocity": torch.cat([v for v, _ in parts], 2), f"infer_{mask}/action_velocity": torch.cat([a for _, a in parts], 1)}
            for kind, n in plans:
                evaluated = tuple(range(n)) if kind == "full" else evaluated_steps(steps, n)
                for chunk in range(chunks):
                    plan = naive.plan(chunk, mask == "released", n if kind == "full" else steps, evaluated)
                    out |= {f"sample/{mask}_{kind}{n}/chunk{chunk}/{name}": x for name, x in plan.items()}
    return out
