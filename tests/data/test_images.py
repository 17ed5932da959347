"""Images become counts and a UNet learns on them: the whole way on made pictures."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from distdiff import config, experiment
from distdiff.data import images
from distdiff.data.ingest.shard import shard
from distdiff.model import Model
from distdiff.types import Condition


def pictures(folder, n=24, size=12):
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(n):
        name = ("dark", "bright")[i % 2]
        (folder / name).mkdir(parents=True, exist_ok=True)
        values = rng.integers(0, 60, (size, size + 4, 3)) + 180 * (i % 2)
        Image.fromarray(values.astype(np.uint8)).save(folder / name / f"{i:02}.png")
    return folder


def test_cifar_files(tmp_path):
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (7, 3073), dtype=np.uint8)
    raw[:, 0] = [0, 9, 1, 1, 2, 3, 4]
    raw[:4].tofile(tmp_path / "data_batch_1.bin")
    raw[4:].tofile(tmp_path / "data_batch_2.bin")
    data = images.cifar10(tmp_path)
    assert data.shape == (7, 3072)
    assert np.array_equal(data.X, raw[:, 1:])
    assert list(data.obs["label"][:2]) == ["airplane", "truck"]
    assert data.obs_names[4] == "data_batch_2-0"
    assert data.var_names[32 * 32 + 32 + 1] == "c1y1x1"
    raw[:1].tofile(tmp_path / "data_batch_3.bin")
    (tmp_path / "data_batch_3.bin").write_bytes(raw.tobytes()[:-1])
    with pytest.raises(ValueError, match=r"data_batch_3.bin is no CIFAR-10 binary file"):
        images.cifar10(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"cifar-10-binary.tar.gz"):
        images.cifar10(tmp_path / "nowhere")


def test_a_folder_of_pictures(tmp_path):
    from PIL import Image

    data = images.folder(pictures(tmp_path / "p"), 4, crop=8)
    assert data.shape == (24, 48)
    assert data.obs["label"].value_counts().to_dict() == {"bright": 12, "dark": 12}
    bright = data[data.obs["label"] == "bright"].X
    assert bright.min() >= 180
    with Image.open(tmp_path / "p" / "dark" / "00.png") as opened:
        want = np.asarray(opened.crop((4, 2, 12, 10)))  # the middle 8 x 8 of 16 x 12
    whole = images.folder(tmp_path / "p", 8, crop=8)
    assert np.array_equal(whole["dark/00.png"].X.reshape(3, 8, 8), want.transpose(2, 0, 1))
    with pytest.raises(ValueError, match="16 x 12 pixels, fewer than crop=13"):
        images.folder(tmp_path / "p", 4, crop=13)
    (tmp_path / "p" / "x.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"x.png cannot be read as an image"):
        images.folder(tmp_path / "p", 4)
    with pytest.raises(FileNotFoundError, match="holds no image"):
        images.folder(tmp_path / "nowhere", 4)


def test_parts_are_the_whole(tmp_path):
    root = pictures(tmp_path / "p")
    whole, some = images.folder(root, 4), list(images.parts(root, 4, images_a_part=10))
    assert [part.n_obs for part in some] == [10, 10, 4]
    assert np.array_equal(np.concatenate([part.X for part in some]), whole.X)
    assert [label for part in some for label in part.obs["label"]] == whole.obs["label"].tolist()
    known = pd.DataFrame({"Male": "no"}, index=[f"{i:02}.png" for i in range(23)])
    with pytest.raises(ValueError, match=r"23.png is not among the 23 images"):
        next(images.parts(root, 4, known=known))


def test_what_is_no_image_has_no_shape():
    with pytest.raises(ValueError, match="no pixels of images"):
        images.shape_of(["CD3E", "LYZ"])
    with pytest.raises(ValueError, match="no pixels of images"):
        images.shape_of(images.pixels(1, 2, 2)[1:])


def network(**options):
    pytest.importorskip("diffusers", reason="the UNet needs the extra 'images'")
    from distdiff.denoise.unet import UNet
    from distdiff.types import DataSpec

    torch.manual_seed(0)
    spec = DataSpec(tuple(images.pixels(1, 4, 4)), {}, np.full(16, 4.0, np.float32))
    unet = UNet(spec, 1, shape=(1, 4, 4), channels=(8, 8), attention=(), layers=1, dropout=0, groups=4, **options)
    for parameter in unet.parameters():  # leave the zero start, where it ignores its input
        torch.nn.init.normal_(parameter, std=0.1)
    return unet.eval()


def test_a_brightness_is_a_unit():
    """Half as bright images of half as bright pixels are the same to the network, up to what it knows of depth."""
    x, p = torch.arange(16.0).expand(2, -1), torch.full((2, 16), 0.5)
    seen = []
    for brightest in (16.0, 32.0):
        unet = network(brightest=brightest)
        unet.unet.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        unet(torch.log1p(x * brightest / 16), p, Condition({}))
    assert torch.allclose(*seen, atol=1e-5)
    assert seen[0].min() >= -0.5
    with pytest.raises(ValueError, match="brightest must lie between 1 and 16,777,216, got 0"):
        network(brightest=0)


def test_levels_tell_a_hidden_pixel_from_a_grey_one():
    grey, p = torch.full((2, 16), 8.0), torch.ones(2, 16)
    p[1, 5] = 0.0
    for levels, told in ((False, False), (True, True)):
        unet = network(brightest=16, levels=levels)
        seen = []
        unet.unet.register_forward_pre_hook(lambda module, given, seen=seen: seen.append(given[0]))
        unet(torch.log1p(grey), p, Condition({}))
        assert bool((seen[0][0] != seen[0][1]).any()) == told


def test_a_state_with_noise_is_not_exponentiated():
    unet, x, p = network(brightest=16, log=False), torch.full((1, 16), 60.0), torch.full((1, 16), 0.5)
    assert unet(x, p, Condition({})).isfinite().all()
    assert not network(brightest=16)(x, p, Condition({})).isfinite().all()  # e^60 molecules


def test_a_unet_learns_bright_from_dark(tmp_path):
    pytest.importorskip("diffusers", reason="the UNet needs the extra 'images'")
    images.write(images.folder(pictures(tmp_path / "p", n=60), 4), tmp_path / "p.h5ad")
    shard([tmp_path / "p.h5ad"], tmp_path / "p.zarr", labels=("label",), workers=0, progress=False)
    settings = {
        "data": {"store": str(tmp_path / "p.zarr"), "labels": ["label"]},
        "process": {"kind": "counts", "head": "mean", "schedule": "fisher"},
        "denoiser": {"kind": "unet", "shape": [3, 4, 4], "channels": [16, 16], "layers": 1, "groups": 4},
        "survival": {"hidden": 0.0, "two_level": 0.0, "uniform": 1.0},
        "optim": {"lr": 3e-3, "warmup_cells": 100, "ema": 0.9},
        "train": {"out": str(tmp_path / "run"), "cells": 4800, "batch": 32, "eval_cells": 1600},
        "evaluate": {"enabled": False}, "tracking": {"enabled": False},
    }  # fmt: skip
    model = Model.load(experiment.train(config.parse(settings)).model)
    light = {
        name: np.asarray(model.generate(8, {"label": name}, steps=8, seed=1).X.mean()) for name in ("dark", "bright")
    }
    assert light["bright"] > light["dark"] + 60  # 210 and 30 in truth
