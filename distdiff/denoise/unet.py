"""Images: the UNet of CountsDiff's image models (its appendix D.2), through diffusers (extra ``images``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from distdiff.denoise import Denoiser
from distdiff.denoise.embed import Conditioning, Expectation, start
from distdiff.types import Condition, DataSpec, Float, Tensor

WHITEST = 2**24
"""Largest ``brightest``: whole numbers up to it are exact as float32."""


class UNet(Denoiser):
    """``diffusers.UNet2DModel`` over pixels whose intensities are counts; a "gene" is one colour of one pixel.

    The input is ``(x_t - 127.5 p) / 255`` with intensities as molecules, as published (255: ``brightest``); 0 at p = 0.
    Labels, the level of thinning and depth go in as the class embedding.

    Parameters
    ----------
    shape
        Colours, height, width; the genes in that order (colour slowest).
    channels
        Channels of each resolution; height and width are halved from one to the next.
    attention
        Resolutions with self-attention, counted from 0: CIFAR-10 ``[1]``, CelebA-64 ``[2]``.
    layers
        Residual layers a resolution (2 in the paper, whose code recommends 4).
    dropout
        Share of activations dropped in training.
    groups
        Groups of the norms.
    brightest
        Intensity of a white pixel: 255 of a byte, 16 of scikit-learn's digits.
    levels
        Whether p of every pixel is an input beside its intensity: where pixels of an image differ in p, as in masked
        diffusion and where a part of an image is filled in.
    log
        Whether ``x`` is ``log(1 + intensity)``, as processes on counts give it; else it is the intensity itself, with
        noise that an exponential would blow up, and tells nothing of depth.

    Raises
    ------
    ValueError
        ``shape`` does not hold the data's number of genes, or cannot be halved that often; ``brightest`` out of range.
    ImportError
        diffusers is not installed.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.denoise.unet import UNet
    >>> from distdiff.types import DataSpec
    >>> UNet(DataSpec(("A", "B"), {}, np.ones(2, np.float32)), 1, shape=(3, 32, 32))
    Traceback (most recent call last):
        ...
    ValueError: denoiser unet: shape=[3, 32, 32] holds 3072 values, the data 2
    """

    depths = False

    def __init__(
        self, spec: DataSpec, outputs: int, *, shape: Sequence[int] = (3, 32, 32),
        channels: Sequence[int] = (128, 256, 256, 256), attention: Sequence[int] = (1,), layers: int = 2,
        dropout: float = 0.1, groups: int = 32, brightest: float = 255.0, levels: bool = False, log: bool = True,
    ):  # fmt: skip
        super().__init__()
        if len(shape) != 3 or not channels or groups < 1 or any(c % groups for c in channels):
            raise ValueError(
                "denoiser unet: shape must be three numbers and channels multiples of groups, got "
                f"shape={list(shape)}, channels={list(channels)}, groups={groups}"
            )
        if not 1 <= brightest <= WHITEST:
            raise ValueError(f"denoiser unet: brightest must lie between 1 and {WHITEST:,}, got {brightest:g}")
        colours, height, width = shape
        if colours * height * width != spec.n_genes:
            raise ValueError(
                f"denoiser unet: shape={list(shape)} holds {colours * height * width} values, the data {spec.n_genes}"
            )
        if height % 2 ** (len(channels) - 1) or width % 2 ** (len(channels) - 1):
            raise ValueError(
                f"denoiser unet: {height} x {width} cannot be halved {len(channels) - 1} times, as {len(channels)} "
                "channels need"
            )
        try:
            from diffusers import UNet2DModel
        except ImportError:
            raise ImportError("denoiser unet needs diffusers: pip install 'distdiff[images]'") from None
        self.outputs, self.shape = outputs, tuple(shape)
        self.brightest, self.levels, self.log = brightest, levels, log
        self.expectation = Expectation(spec)
        self.condition = Conditioning(spec, 4 * channels[0])
        with_attention = [i in set(attention) for i in range(len(channels))]
        unet: Any = UNet2DModel(
            sample_size=(height, width), in_channels=colours * (1 + levels), out_channels=colours * outputs,
            block_out_channels=tuple(channels), layers_per_block=layers, dropout=dropout, norm_num_groups=groups,
            down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in with_attention],
            up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(with_attention)],
            class_embed_type="identity",
        )  # fmt: skip
        nn.init.zeros_(unet.conv_out.weight)
        with torch.no_grad():
            start(unet.conv_out.bias.view(outputs, colours).T)
        self.unet = unet

    def forward(self, x: Float[Tensor, "b g"], p: Float[Tensor, "b g"], cond: Condition) -> Float[Tensor, "b g k"]:
        """See :class:`~distdiff.denoise.Denoiser`; output 0 is relative to pixel mean x brightness."""
        out, log_depth = self._image(x, p, cond)
        raw = out.float().flatten(1).unflatten(1, (self.outputs, -1)).transpose(1, 2)
        return self.expectation.add_to(raw, log_depth) if self.relative else raw

    def hidden(self, x: Float[Tensor, "b g"], p: Float[Tensor, "b g"], cond: Condition) -> Float[Tensor, "b d"]:
        """The innermost, smallest image, its mean over pixels."""
        found: list[Tensor] = []
        watching = self.unet.mid_block.register_forward_hook(lambda module, given, image: found.append(image))
        try:
            self._image(x, p, cond)
        finally:
            watching.remove()
        return found[0].mean((2, 3))

    def _image(self, x: Tensor, p: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        """What the UNet makes of the pixels, and log brightness."""
        log_depth = self.expectation(x, p)[0] if self.log else torch.zeros_like(x[:, :1])
        light = torch.where(p > 0, (torch.expm1(x) if self.log else x) / self.brightest - p / 2, 0.0)
        image = light.unflatten(1, self.shape)
        if self.levels:
            image = torch.cat((image, p.unflatten(1, self.shape)), 1)
        c = self.condition(log_depth, p, cond)
        return self.unet(image, 1000 * (1 - p.mean(1)), class_labels=c).sample, log_depth
