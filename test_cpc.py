"""What the paper claims and what the README promises, each as a test that can fail.

    pytest test_cpc.py        # two CPU cores, under three minutes

Sections follow the pipeline: encoder, patches and data, objective, probe, few labels, detection, whole commands.
"""

import contextlib
import copy
import io
import json
import math
import operator
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from array import array
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Subset
from torchvision import models
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from tqdm import tqdm

import cpc
import data
import detect
import eval as evaluation
import resnet

HERE = Path(__file__).parent
CPU = torch.device("cpu")


@pytest.fixture(scope="session", autouse=True)
def process_group():
    data.start_process()  # a world of one


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- Encoder ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch, norm, millions", [
    ("resnet161", "none", 303.4), ("resnet161", "layer", 303.6), ("resnet161", "batch", 303.6),
    ("resnet92", "none", 27.49), ("resnet92", "layer", 27.53),
    ("resnet161-deep", "none", 53.2), ("resnet161-wide", "none", 152.6)])
def test_parameter_counts(arch, norm, millions):
    """Sec. 4.1 and Fig. 4, against counts made independently of this code."""
    with torch.device("meta"):
        encoder = resnet.Encoder(arch, norm)
    count = sum(p.numel() for p in encoder.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.06 if millions > 50 else 0.006)


def test_context_network_parameters():
    with torch.device("meta"):
        count = sum(p.numel() for p in cpc.PixelCNN(4096).parameters())
    assert count / 1e6 == pytest.approx(12.15, abs=0.005)  # A.2 at D = 4096


@pytest.mark.parametrize("stem, patch, side", [("7x7", 80, 5), ("7x7", 64, 4), ("3x3", 8, 2), ("3x3", 16, 4)])
def test_two_views_of_the_encoder(stem, patch, side):
    """`features` has the stride it states, on any size; `forward` is its mean-pool."""
    encoder = resnet.Encoder("tiny", "layer", stem)
    patches = torch.randn(2, 3, patch, patch)
    features = encoder.features(patches)
    assert features.shape == (2, encoder.out_channels, side, side) and features.min() >= 0
    assert torch.allclose(encoder(patches), features.mean((2, 3)), atol=1e-6)
    H, W = 5 * patch + 3, 4 * patch + 1  # rounded up
    assert encoder.features(torch.randn(1, 3, H, W)).shape[2:] == (
        math.ceil(H / encoder.stride), math.ceil(W / encoder.stride))


def test_grid_keeps_every_patch_in_its_place():
    encoder = resnet.Encoder("tiny").eval()
    patches = torch.randn(2, 3, 3, 3, 8, 8)
    latents = encoder.grid(patches)
    assert latents.shape == (2, encoder.out_channels, 3, 3)
    for b, i, j in [(0, 0, 1), (1, 2, 0), (1, 1, 2)]:
        assert torch.allclose(latents[b, :, i, j], encoder(patches[b, i, j][None])[0], atol=1e-5)


@pytest.mark.parametrize("norm, independent", [("layer", True), ("none", True), ("batch", False)])
def test_patches_cannot_see_each_other(norm, independent):
    """Sec. 4.1: batch norm "introduces a dependency between patches"; the others do not."""
    torch.manual_seed(0)
    encoder = resnet.Encoder("tiny", norm).train()
    patches = torch.randn(2, 3, 3, 3, 8, 8)
    before = encoder.grid(patches)[0, :, 1, 1]
    patches[0, 0, 2] = torch.randn(3, 8, 8)  # one other patch of the same image
    after = encoder.grid(patches)[0, :, 1, 1]
    assert torch.allclose(before, after, atol=1e-6) == independent


def test_layer_norm_on_a_gpu_is_the_same():
    """Another way to the same numbers and gradients; under autocast bfloat16 stays bfloat16."""
    norm, x = resnet.LayerNorm(1, 8), 3 * torch.randn(2, 8, 3, 3, generator=generator()) + 1
    norm.weight.data.uniform_(0.5, 2, generator=generator())
    norm.bias.data.normal_(generator=generator())
    assert torch.allclose(norm.channels_last(x), norm(x), atol=1e-5)
    gradients = [torch.autograd.grad(y.square().sum(), norm.parameters()) for y in (norm.channels_last(x), norm(x))]
    assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(*gradients))
    with torch.autocast("cpu", torch.bfloat16):
        y = norm.channels_last(x.bfloat16())
    assert y.dtype == torch.bfloat16 and torch.allclose(y.float(), norm(x), atol=0.1)


def test_no_norm_stays_finite_at_full_depth():
    """53 blocks without normalisation: the latents keep the order of the input."""
    torch.manual_seed(0)
    encoder = resnet.Encoder("resnet161-deep", "none")
    with torch.no_grad():
        latents = encoder(torch.randn(2, 3, 64, 64))
    assert 0.05 < latents.std() < 20


def test_checkpointing_changes_no_gradient(monkeypatch):
    """Each of the three blocks is recomputed, and that is all."""
    patches, gradients, calls, checkpoint = torch.randn(4, 3, 8, 8), [], [], resnet.checkpoint
    monkeypatch.setattr(resnet, "checkpoint", lambda *args, **rest: calls.append(args) or checkpoint(*args, **rest))
    for on in (False, True):
        torch.manual_seed(0)
        encoder = resnet.Encoder("tiny", checkpointing=on)
        encoder(patches).square().sum().backward()
        gradients.append(encoder.conv1.weight.grad)
    assert torch.equal(*gradients) and len(calls) == 3


def test_encoder_file(tmp_path):
    """encoder.pt rebuilds the network it holds; what is not one is refused in one line."""
    encoder = resnet.Encoder("tiny", "batch").eval()
    path = tmp_path / "encoder.pt"
    resnet.save_encoder(path, encoder, dict(crop=32, patch=8, stride=6, mean=data.MEAN, std=data.STD),
                        dict(data="shapes"))
    loaded, file = resnet.load_encoder(path)
    patches = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded(patches), encoder(patches)) and not loaded.training
    assert (file["crop"], file["patch"], file["stride"], file["trained"]) == (32, 8, 6, dict(data="shapes"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SystemExit, match="damaged"):
        resnet.load_encoder(path)
    for name, message in (("none.pt", "no encoder at"), ("", "cannot read .*: Is a directory")):
        with pytest.raises(SystemExit, match=message):
            resnet.load_encoder(tmp_path / name)
    for content, message in (({"state": {}}, "is not our encoder file"), ([], "is not our encoder file"),
                             ({"kind": "encoder", "format": 2}, "has format 2, this code reads 1: update it"),
                             ({"kind": "encoder", "format": 1, "arch": "resnet162"}, "holds a resnet162, which"),
                             ({"kind": "encoder", "format": 1, "arch": "tiny"}, "does not hold the weights of the tiny")):
        torch.save(content, path)
        with pytest.raises(SystemExit, match=message):
            resnet.load_encoder(path)


class Malice:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_pickle_is_executed(tmp_path):
    """Whatever file is read: an encoder, a checkpoint, a detector, torchvision's weights."""
    torch.save({"kind": "encoder", "format": 1, "state": Malice(tmp_path / "made")}, tmp_path / "checkpoint.pt")
    shutil.copy(tmp_path / "checkpoint.pt", tmp_path / "model.pt")
    (tmp_path / "log.jsonl").write_text("{}\n")
    readers = (lambda: resnet.load_encoder(tmp_path / "model.pt"),
               lambda: resnet.Run(SimpleNamespace(out=tmp_path, resume=True)).start(),
               lambda: detect.detect_one(SimpleNamespace(out=tmp_path, detect="photo.jpg")),
               lambda: resnet.TorchvisionGrid("resnet18", str(tmp_path / "model.pt")))
    for read in readers:
        with pytest.raises(SystemExit, match="damaged or not ours|does not hold torchvision's weights"):
            read()
    assert not (tmp_path / "made").exists()
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert (tmp_path / "made").exists()  # it would have


# ---- Patches and data ---------------------------------------------------------------------------


@pytest.mark.parametrize("crop, patch, stride, G", [(240, 80, 32, 6), (256, 64, 32, 7), (32, 8, 6, 5)])
def test_patches_equal_naive_slicing(crop, patch, stride, G):
    images = torch.randint(0, 256, (2, 3, crop, crop), dtype=torch.uint8, generator=generator())
    patches = data.extract_patches(images, patch, stride)
    assert patches.shape == (2, G, G, 3, patch, patch)
    for b in range(2):
        for i in range(G):
            for j in range(G):
                y, x = i * stride, j * stride
                assert torch.equal(patches[b, i, j], images[b, :, y:y + patch, x:x + patch])
    assert data.to_patches(images, CPU, patch, stride).is_contiguous()  # no pixel shared with a neighbour
    seen = [data.to_patches(x, CPU, patch, stride, 0, color_drop=0.5, jitter=True)
            for x in (images, images.contiguous(memory_format=torch.channels_last))]
    assert torch.equal(*seen)  # in whichever layout images come


def same_patches(n, P=16):
    """One random patch, n*3*3 times in the same memory, as overlapping patches share theirs: any difference
    afterwards is augmentation's."""
    patch = torch.randint(0, 256, (3, P, P), dtype=torch.uint8, generator=generator())
    return data.normalise(patch).expand(n, 3, 3, 3, P, P)


def test_color_dropping():
    """Sec. 4.1: two of three channels dropped, independently for each patch; Doersch et al. 2015:
    noise of 1/100 of the remaining channel's deviation in their place."""
    patches = same_patches(100)
    plain = patches.flatten(0, 2)
    out = data.augment_patches(patches, generator(), color_drop=0.4).flatten(0, 2)
    kept = (out == plain).all((2, 3))  # [900, 3]
    assert set(kept.sum(1).tolist()) == {1, 3}
    dropped = kept.sum(1) == 1
    assert dropped.float().mean() == pytest.approx(0.4, abs=0.05)
    shares = kept[dropped].float().mean(0)
    assert torch.allclose(shares, torch.full((3,), 1 / 3), atol=0.08)  # any channel may stay
    for one in dropped.nonzero()[:20, 0]:
        deviation = plain[one][kept[one]].std(correction=0).item()
        noise = out[one][~kept[one]]
        assert noise.std().item() == pytest.approx(0.01 * deviation, rel=0.2) and noise.mean().abs() < 0.01
    grid = dropped.view(100, 9).float()  # whether one patch is dropped says nothing of its neighbour
    assert torch.corrcoef(grid.T).fill_diagonal_(0).abs().max() < 0.4


def test_jitter_shifts_each_patch_on_its_own():
    patches = same_patches(20)
    out = data.augment_patches(patches, generator(), jitter=True).flatten(0, 2)
    plain, side = patches[0, 0, 0], 15  # 60/64 of 16
    shifts = []
    for patch in out:
        found = [(y, x) for y in range(2) for x in range(2)
                 if torch.equal(patch[:, :side, :side], plain[:, y:y + side, x:x + side])]
        assert len(found) == 1  # and the border repeats its last row and column
        assert torch.equal(patch[:, side], patch[:, side - 1]) and torch.equal(patch[:, :, side], patch[:, :, side - 1])
        shifts += found
    assert len(set(shifts)) == 4 and max(map(shifts.count, set(shifts))) < 0.4 * len(shifts)


def test_flips_each_patch_on_its_own():
    patches = same_patches(100)
    plain = patches.flatten(0, 2)
    out = data.augment_patches(patches, generator(), flip=0.3).flatten(0, 2)
    flipped = (out == plain.flip(-1)).all(3).all(2).all(1)
    assert ((out == plain).all(3).all(2).all(1) | flipped).all()
    assert flipped.float().mean() == pytest.approx(0.3, abs=0.05)


def epoch_of(workers, seed=0, start=0):
    batches = data.TrainBatches(40, 8, seed, start, 10)  # two epochs of 5 steps
    loader = data.load_batches(data.Shapes("train"), data.image_transform("inception", 32), batches, CPU, workers)
    return [images for images, _ in loader]


def test_batches_do_not_depend_on_workers_but_on_the_epoch_and_the_seed():
    alone = epoch_of(0)
    assert all(torch.equal(a, b) for a, b in zip(alone, epoch_of(3), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(alone[7:], epoch_of(0, start=7), strict=True))  # resumed
    assert not any(torch.equal(a, b) for a, b in zip(alone[:5], alone[5:]))
    assert not torch.equal(alone[0], epoch_of(0, seed=1)[0])


def test_every_image_once_an_epoch():
    batches = list(data.TrainBatches(40, 8, 0, 0, 10))
    first, second = ([key for batch in half for key in batch] for half in (batches[:5], batches[5:]))
    for epoch in (first, second):
        assert sorted(i for i, _ in epoch) == list(range(40))
    assert [i for i, _ in first] != [i for i, _ in second]
    assert len({seed for _, seed in first + second}) == 80  # no two images augmented alike, ever
    assert [i for batch in data.TestBatches(10, 4) for i, _ in batch] == list(range(10))


def test_shapes_is_a_function_of_seed_and_index():
    a, b = data.Shapes("train"), data.Shapes("train")
    assert torch.equal(a[17][0], b.__getitems__([3, 17])[1][0])
    assert not torch.equal(a[17][0], data.Shapes("test")[17][0])
    assert not torch.equal(a[17][0], data.Shapes("train", seed=1)[17][0])


@pytest.mark.parametrize("size", [32, 96])
def test_shapes_boxes(size):
    """Two to four boxes in an image, inside it, apart from each other, tight around what differs
    from the background."""
    shapes = data.Shapes("train", size)
    counts = set()
    for index in range(60):
        boxes = shapes.boxes(index)
        counts.add(len(boxes))
        assert (boxes >= 0).all() and (boxes <= size).all()
        sides = boxes[:, 2:] - boxes[:, :2]
        assert (sides >= 0.25 * size).all() and (sides <= 0.63 * size).all()
        masks = shapes._outlines([index])[1][0].any(0)
        inside = torch.zeros(size, size, dtype=torch.bool)
        for x1, y1, x2, y2 in boxes.int().tolist():
            inside[y1:y2, x1:x2] = True
            assert masks[y1:y2, x1].any() and masks[y1:y2, x2 - 1].any()
            assert masks[y1, x1:x2].any() and masks[y2 - 1, x1:x2].any()
        assert not (masks & ~inside).any()
    assert counts == {2, 3, 4}


def test_shapes_class_cannot_be_read_from_pixels():
    """A linear model on raw pixels, or on colours, stays near chance (10 %). No pixel's mean
    depends on the class; what little is left lies in the variance of the model's scores."""
    def load(split, n):
        items = data.Shapes(split).__getitems__(list(range(n)))
        return torch.stack([x for x, _ in items]).float() / 255, torch.tensor([y for _, y in items])
    (x, y), (test_x, test_y) = load("train", 4000), load("test", 2000)
    features = {
        "pixels": lambda x: x.flatten(1),
        "colours": lambda x: torch.cat((x.mean((2, 3)), x.std((2, 3)), x.mean((1, 2, 3))[:, None]), 1)}
    for name, feature in features.items():
        a, b = feature(x), feature(test_x)
        mean, std = a.mean(0), a.std(0)
        a, b = (a - mean) / std, (b - mean) / std
        # ridge regression to one-hot labels, in closed form
        weights = torch.linalg.solve(a.T @ a + 100 * torch.eye(a.shape[1]), a.T @ (F.one_hot(y) - 0.1))
        accuracy = ((b @ weights).argmax(1) == test_y).float().mean()
        assert accuracy < 0.22, name


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """train/ and test/ with class folders, in the sizes and colour modes that folders have."""
    root = tmp_path_factory.mktemp("photos")
    for split, n in (("train", 40), ("test", 11)):
        shapes = data.Shapes(split)
        for i in range(n):
            place = root / split / f"class {i % 2}"
            place.mkdir(parents=True, exist_ok=True)
            image = to_pil_image(shapes[i][0]).resize((40 + i, 36))
            image.convert("L" if i == 3 else "RGB").save(place / f"{i}.{'jpg' if i % 3 else 'png'}")
    if sys.platform == "linux":  # where a name may be any bytes
        (root / "train" / "class 1" / "5.jpg").rename(root / "train" / "class 1" / os.fsdecode(b"5\xff.jpg"))
    return root


def test_folders(folder, tmp_path, monkeypatch):
    assert len(data.load_dataset(str(folder), "pretrain", 32)) == 40  # of train/ only
    train, test = (data.load_dataset(str(folder), split, 32) for split in ("train", "test"))
    assert train.classes == test.classes == ["class 0", "class 1"] and len(test) == 11
    assert len(data.load_dataset(str(folder / "train" / "class 0"), "pretrain", 32)) == 20  # unlabelled
    transform = data.image_transform("test", 32)
    for image, _ in test:
        assert transform(image).shape == (3, 32, 32) and transform(image).dtype == torch.uint8
    for data_flag, split, message in [("nowhere", "pretrain", "no folder nowhere"),
                                      (str(tmp_path), "pretrain", "no image files"),
                                      (str(tmp_path), "train", "no train/ under")]:
        with pytest.raises(SystemExit, match=message):
            data.load_dataset(data_flag, split, 32)
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "train" / "none").mkdir()
    with pytest.raises(SystemExit, match="labels are needed here.* no valid file for the classes none"):
        data.load_dataset(str(broken), "train", 32)
    (broken / "train" / "none").rmdir()
    for name in ("again", "and again"):  # 2**40 ways
        (broken / "train" / "class 0" / name).symlink_to(broken / "train", target_is_directory=True)
    for split in ("pretrain", "train"):
        with pytest.raises(SystemExit, match="symbolic links under .*broken.* lead to a folder twice, or in a circle"):
            data.load_dataset(str(broken), split, 32)
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("class 0"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", closed)
        with pytest.raises(SystemExit, match="cannot read .*class 0: Permission denied"):
            data.load_dataset(str(folder), "pretrain", 32)
    for name in ("again", "and again"):
        (broken / "train" / "class 0" / name).unlink()
    for split in ("train", "test"):
        shutil.rmtree(broken / split / "class 1")
    with pytest.raises(SystemExit, match="holds one class"):
        evaluation.main(*evaluation.parse_args(["--tiny", "--supervised", "--data", str(broken)]))


def test_images_are_the_same_wherever_they_lie(folder, tmp_path):
    """What a resumed run asks: their number, names and classes."""
    shutil.copytree(folder, tmp_path / "copy")
    digests = lambda root: [data.fingerprint(data.load_dataset(str(root), split, 32)) for split in ("pretrain", "train", "test")]
    before = digests(folder)
    assert digests(f"{tmp_path / 'copy'}/") == before and len(set(before)) == 3
    (tmp_path / "copy" / "train" / "class 0" / "2.jpg").rename(tmp_path / "copy" / "train" / "class 1" / "2.jpg")
    assert [a == b for a, b in zip(before, digests(tmp_path / "copy"))] == [False, False, True]
    (tmp_path / "copy" / "test" / "class 1").rename(tmp_path / "copy" / "test" / "class 2")
    assert digests(tmp_path / "copy")[2] != before[2]
    assert data.fingerprint(data.Shapes("train"), data.Shapes("test")) != data.fingerprint(data.Shapes("train"))


def test_any_image_file_becomes_rgb(tmp_path, monkeypatch):
    """Whatever folders hold: 16 bits keep their upper 8, an animation its first picture; a bomb is refused."""
    ramp = torch.linspace(0, 1, 64).view(8, 8)
    for mode, suffix in (("CMYK", "jpg"), ("P", "png"), ("LA", "png"), ("1", "bmp"), ("RGBA", "webp")):
        to_pil_image(ramp.expand(3, 8, 8)).convert(mode).save(tmp_path / f"{mode}.{suffix}")
    Image.frombytes("I;16", (8, 8), array("H", (65535 * ramp.flatten()).int().tolist()).tobytes()).save(tmp_path / "16.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "one pixel.png")
    Image.new("RGB", (12_000, 3)).save(tmp_path / "\u957f.png")
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    red.save(tmp_path / "animated.webp", save_all=True, append_images=[blue], lossless=True)
    files = data.ImageFiles(tmp_path)
    assert len(files) == 9
    transforms = [data.image_transform(kind, 32, distort=True) for kind in ("inception", "v1", "test")]
    for i in range(9):
        image, _ = files[i]
        assert image.mode == "RGB" and all(t(image).shape == (3, 32, 32) for t in transforms)
    read = lambda name: pil_to_tensor(data.read_image(tmp_path / name)).float()
    assert read("16.png").mean() == pytest.approx(127, abs=1) and read("animated.webp")[0].mean() > 250
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 31)
    with pytest.raises(data.Unreadable, match="16.png cannot be read: .*decompression bomb"):
        read("16.png")


def test_unreadable_images_are_named_and_skipped_while_they_are_few(tmp_path, capfd):
    (tmp_path / "train").mkdir()
    for i in range(120):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "train" / f"{i:03d}.png")
    images, transform = data.load_dataset(str(tmp_path), "pretrain", 8), data.image_transform("test", 8)
    load = lambda batches, workers=1: torch.cat([x for x, _ in data.load_batches(images, transform, batches, CPU, workers)])
    reds = lambda x: sorted(x[:, 0, 0, 0].tolist())
    (tmp_path / "train" / "007.png").write_bytes((tmp_path / "train" / "006.png").read_bytes()[:45])  # truncated
    assert reds(load(data.TrainBatches(120, 40, 0, 0, 6))) == sorted(2 * [8 if i == 7 else i for i in range(120)])
    skipped = capfd.readouterr().err.splitlines()
    assert len(skipped) == 1 and "007.png cannot be read" in skipped[0] and "(1 of 120 images)" in skipped[0]
    for workers in (0, 1):
        with pytest.raises(SystemExit, match="^/.*007.png cannot be read: [^\n]*$"):  # never left out of a test set
            load(data.TestBatches(120, 40), workers)
    (tmp_path / "train" / "090.png").write_bytes(b"")
    with pytest.raises(SystemExit, match=r"^/.*cannot be read: .* \(2 of 120 images, more than 1 %\)$"):
        load(data.TrainBatches(120, 40, 0, 0, 3))


# ---- Objective ----------------------------------------------------------------------------------


def alive(module):
    """Positive weights: no ReLU dies, so that a gradient is zero only where there is no path."""
    for parameter in module.parameters():
        parameter.data.abs_()
    return module.double()


def test_context_is_causal_everywhere():
    """Sec. 2.1: c[i, j] sees {z[u, v]: u <= i}. Position by position, borders included, it sees
    exactly the rows i-5..i and columns j-5..j+5: all that is above on a 6x6 grid, not on 7x7."""
    for G in (6, 7):
        network = alive(cpc.PixelCNN(3, 2))
        latents = torch.rand(1, 3, G, G, dtype=torch.float64, requires_grad=True)
        context = network(latents)
        rows, cols = torch.arange(G).view(-1, 1), torch.arange(G).view(1, -1)
        for i in range(G):
            for j in range(G):
                gradient, = torch.autograd.grad(context[0, :, i, j].sum(), latents, retain_graph=True)
                expected = (rows <= i) & (rows >= i - 5) & ((cols - j).abs() <= 5)
                assert torch.equal(gradient[0].sum(0) != 0, expected), (i, j)


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_each_direction_looks_its_own_way(number):
    """In the image's own coordinates: down, right to left, up, left to right."""
    G = 6
    model = cpc.CPC(resnet.Encoder("tiny"), 4, hidden=4)
    direction = alive(model.directions[number])
    latents = torch.rand(1, model.encoder.out_channels, G, G, dtype=torch.float64, requires_grad=True)
    _, predictions = direction(latents.rot90(model.turns[number], (2, 3)))
    rows, cols = torch.arange(G).view(-1, 1).expand(G, G), torch.arange(G).view(1, -1).expand(G, G)
    seen = {0: lambda i: rows <= i, 1: lambda i: cols >= G - 1 - i,
            2: lambda i: rows >= G - 1 - i, 3: lambda i: cols <= i}[number]
    for i in range(G):
        gradient, = torch.autograd.grad(predictions[2][0, :, i].sum(), latents, retain_graph=True)
        assert torch.equal(gradient[0].sum(0) != 0, seen(i)), i


@pytest.mark.parametrize("k", [1, 2, 3])
def test_info_nce_against_a_triple_loop(k):
    """Loss, accuracy and gradient, image by image, row by row, column by column."""
    B, K, G = 3, 5, 4
    predictions = torch.randn(B, K, G, G, generator=generator(1), requires_grad=True)
    targets = torch.randn(B, K, G, G, generator=generator(2), requires_grad=True)
    loss, accuracy = cpc.info_nce(predictions, targets, k)
    losses, hits = [], []
    for b in range(B):
        for i in range(G - k):
            for j in range(G):
                scores = torch.einsum("c,bcij->bij", predictions[b, :, i, j], targets)
                losses.append(scores.flatten().logsumexp(0) - scores[b, i + k, j])
                hits.append(float(scores[b, i + k, j] == scores.max()))
    expected = torch.stack(losses).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert accuracy.item() == pytest.approx(sum(hits) / len(hits))
    ours = torch.autograd.grad(loss, (predictions, targets))
    for a, b in zip(ours, torch.autograd.grad(expected, (predictions, targets))):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 500, 2**24])
def test_info_nce_in_chunks_is_the_plain_form(chunk, monkeypatch):
    """A.2's loss, accuracy and gradients, whatever is computed at a time; a tie is no hit; and no logits are kept."""
    monkeypatch.setattr(cpc.Contrast, "CHUNK", chunk)
    labels, kept = torch.randint(120, (97,), generator=generator()), []
    queries, candidates = (torch.randn(n, 16, generator=generator(n), requires_grad=True) for n in (97, 120))
    logits = queries @ candidates.T
    expected = 3 * F.cross_entropy(logits, labels)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss, accuracy = cpc.Contrast.apply(queries, candidates, labels)
    assert sum(kept) == 16 * (97 + 120)
    assert 3 * loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert accuracy == (logits.argmax(1) == labels).float().mean()
    for ours, plain in zip(*(torch.autograd.grad(x, (queries, candidates)) for x in (3 * loss, expected))):
        assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert cpc.Contrast.apply(queries, torch.zeros(120, 16), labels)[1] == 0  # what a collapsed encoder gets


@pytest.mark.parametrize("directions, lengths", [(1, [2, 3, 4]), (2, [2]), (4, [2, 3])])
def test_initial_loss_is_chance(directions, lengths):
    torch.manual_seed(0)
    model = cpc.CPC(resnet.Encoder("tiny"), directions, lengths)  # the paper's emb_scale
    assert len(model.directions) == directions
    loss, accuracy = model(torch.randn(8, 5, 5, 3, 8, 8))
    assert loss.item() == pytest.approx(math.log(8 * 25), abs=0.05) and accuracy < 0.1


def test_one_batch_can_be_learned():
    torch.manual_seed(0)
    model = cpc.CPC(resnet.Encoder("tiny"), 4, [2, 3], hidden=32, target_dim=32, emb_scale=1.0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    images = torch.stack([x for x, _ in data.Shapes("train").__getitems__(list(range(4)))])
    patches = data.to_patches(images, CPU, 8, 6)
    for _ in range(80):
        loss, accuracy, _ = cpc.update(model, optimizer, patches, 2e-3, 1.0, bf16=False)
    assert loss < 0.25 * math.log(100) and accuracy > 0.8


def test_learning_rate():
    rates = [resnet.learning_rate(step, 100, 2.0, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[10] == 2.0 and rates[-1] < 0.01
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    for steps in range(1, 13):  # the shortest schedules learn too
        assert all(0 < resnet.learning_rate(step, steps, 1.0, steps // 10) <= 1 for step in range(steps))


# ---- Linear probe -------------------------------------------------------------------------------


def test_probe_is_a3():
    """Batch norm without scale; pooling the logits equals pooling the features (Sec. 2.2)."""
    probe = evaluation.LinearProbe(6, 4)
    z = torch.randn(5, 6, 3, 3) * 3 + 1
    assert sum(p.numel() for p in probe.parameters() if p.requires_grad) == 6 + 6 * 4 + 4  # no scale
    normalised = (z - z.mean((0, 2, 3), keepdim=True)) / (z.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
    pooled = normalised.mean((2, 3)) @ probe.conv.weight.flatten(1).T + probe.conv.bias
    assert torch.allclose(probe(z), pooled, atol=1e-5)


def test_count_correct():
    logits, labels = torch.randn(50, 8, generator=generator()), torch.arange(50) % 8
    order = [sorted(range(8), key=lambda c: -row[c]) for row in logits.tolist()]
    top1 = sum(o[0] == y for o, y in zip(order, labels.tolist()))
    top5 = sum(y in o[:5] for o, y in zip(order, labels.tolist()))
    assert evaluation.count_correct(logits, labels).tolist() == [top1, top5, 50]
    assert evaluation.count_correct(logits[:, :3], labels % 3)[1] == 50  # fewer than five classes


# ---- Few labels ---------------------------------------------------------------------------------


def test_label_subsets():
    """Sec. 2.2: balanced, the smaller inside the larger, fixed by the seed, at least one image of
    each class; held out (A.4) are other images, the same for every fraction."""
    targets = [0] * 130 + [1] * 130 + [2] * 5
    random.Random(0).shuffle(targets)
    fractions = (0.001, 0.01, 0.02, 0.1, 0.5, 1.0)
    before, held = set(), data.label_subset(targets, 1.0, 0, 0.1)[1]
    assert [sum(targets[i] == c for i in held) for c in (0, 1, 2)] == [13, 13, 0]
    for fraction in fractions:
        chosen, held_out = data.label_subset(targets, fraction, 0, 0.1)
        assert chosen == data.label_subset(targets, fraction, 0, 0.1)[0] and held_out == held
        counts = [sum(targets[i] == c for i in chosen) for c in (0, 1, 2)]
        assert counts[0] == counts[1] == min(117, max(1, round(130 * fraction))) and counts[2] >= 1
        assert before <= set(chosen) and not set(chosen) & set(held)
        before = set(chosen)
    assert before | set(held) == set(range(len(targets)))  # 100 %: everything that is not held out
    assert data.label_subset(targets, 1.0, 0)[0] == list(range(len(targets)))
    assert data.label_subset(targets, 0.1, 0)[0] != data.label_subset(targets, 0.1, 1)[0]


def test_subset_lists(folder, tmp_path):
    """Names of images, as S4L and SimCLR publish them; what names no training image is refused."""
    train = data.load_dataset(str(folder), "train", 32)
    names, path = data.image_names(train), tmp_path / "list.txt"
    assert len(set(names)) == 40 and "0.png" in names
    path.write_bytes(os.fsencode("\n".join([*names[:30], "class 0/2.jpg", ""])))
    assert data.read_subset(path, train) == list(range(30)) and names.index("2.jpg") < 20
    for bad in ("../../secret.jpg", "/etc/passwd", ""):
        path.write_text(bad)
        with pytest.raises(SystemExit, match="name no training image .NAME"):
            data.read_subset(path, train)
    with pytest.raises(SystemExit, match="cannot read --subset"):
        data.read_subset(tmp_path / "none.txt", train)


def test_resnet_head():
    """Sec. 2.2's 11 blocks, 4096 channels, 1024 in the bottleneck: 196.1 M, without norms and classifier."""
    with torch.device("meta"):
        head = evaluation.resnet_head(4096, 1000)
    sizes = {"norm": 0, "conv": 0, "linear": 0}
    for m in head.modules():
        kind = {"BatchNorm2d": "norm", "Conv2d": "conv", "Linear": "linear"}.get(type(m).__name__)
        if kind:
            sizes[kind] += sum(p.numel() for p in m.parameters())
    assert sizes["conv"] / 1e6 == pytest.approx(196.1, abs=0.05) and sizes["linear"] == 4096 * 1000 + 1000
    assert sum(isinstance(m, resnet.Bottleneck) for m in head.modules()) == 11


@pytest.fixture
def encoder_file(tmp_path, request):
    norm = getattr(request, "param", "layer")
    path = tmp_path / "encoder.pt"
    trained = dict(data="shapes", color_drop=0.5, jitter=True, flip=0.0, min_area=0.6, image_aug="inception")
    resnet.save_encoder(path, seeded(lambda: resnet.Encoder("tiny", norm)), dict(
        crop=32, patch=8, stride=6, mean=data.MEAN, std=data.STD), trained)
    return path


def seeded(make, seed=0):
    torch.manual_seed(seed)
    return make()


def make_bench(encoder, *flags):
    args, encoders = evaluation.parse_args(["--encoder", str(encoder), "--workers", "0", "--batch-size", "8", *flags])
    return evaluation.Bench(args, evaluation.find_sources(args, encoders)[0], CPU, bf16=False)


def fit_cell(bench, held_out=20, folder=None, caught=0):
    """One cell of the table, without a folder: what `classify` logged."""
    shapes, logged = data.Shapes("train"), []
    run = SimpleNamespace(is_main=folder is not None, folder=folder, log=lambda event, **fields: logged.append((event, fields)),
                          save=lambda state, event=None, **fields: logged.append((event, fields)), stop_signal=lambda: caught)
    recipe = evaluation.Recipe(epochs=4, min_steps=0, batch_size=8, lr=0.05, weight_decay=0.0, dropout=0.0)
    task = evaluation.Task(0.1, 0, 10, Subset(shapes, range(24)), Subset(shapes, range(100, 100 + held_out)),
                           Subset(data.Shapes("test"), range(20)))
    evaluation.classify(bench, task, recipe, run, {"done": {}, "solution": {}})
    return logged


@pytest.mark.parametrize("encoder_file", ["layer", "batch"], indirect=True)
def test_frozen_then_fine_tuned(encoder_file, monkeypatch):
    """Sec. 2.2: frozen is bit-identical, batch norm's statistics included; fine-tuning starts from
    both solutions, moves the encoder, and at a smaller rate."""
    seen, fit = [], evaluation.fit

    def spy(bench, model, task, recipe, *rest):
        before = copy.deepcopy(model.state_dict())
        result = fit(bench, model, task, recipe, *rest)
        seen.append((model.frozen, recipe.lr, before, copy.deepcopy(model.state_dict())))
        return result

    monkeypatch.setattr(evaluation, "fit", spy)
    logged = fit_cell(make_bench(encoder_file, "--labels", "0.1"), held_out=0)
    (frozen, lr, start, solution), (frozen2, lr2, start2, end) = seen
    equal = lambda a, b, part: {torch.equal(a[k], b[k]) for k in a if k.startswith(part)}
    assert frozen and not frozen2 and lr2 < lr
    assert equal(start, solution, "encoder.") == {True} and False in equal(start, solution, "head.")
    assert equal(solution, start2, "") == {True}
    assert False in equal(start2, end, "encoder.")
    if "encoder.final_norm.running_mean" in end:
        assert not torch.equal(start2["encoder.final_norm.running_mean"], end["encoder.final_norm.running_mean"])
    results = [fields for event, fields in logged if event == "result"]
    assert [(r["head"], r["finetuned"], r["labelled_images"]) for r in results] == [("resnet", False, 24), ("resnet", True, 24)]


def test_fine_tuning_that_only_harms_is_undone(encoder_file, monkeypatch):
    """Early stopping may stop at once: the state that fine-tuning starts from counts as well."""
    bench, states = make_bench(encoder_file, "--labels", "0.1"), []
    bench.source.arch = "tiny runs/finetuned/encoder.pt"  # two encoders have their paths

    def accuracy(model, images, cache):
        states.append((cache, copy.deepcopy(model.state_dict()), model))
        return (0.0 if not model.frozen else 90.0), 0.0

    monkeypatch.setattr(bench, "accuracy", accuracy)
    logged = fit_cell(bench)
    (frozen,) = (state for cache, state, _ in states if cache == "test")  # tested once, for both
    _, moved, model = states[-1]
    assert all(torch.equal(frozen[k], v) for k, v in model.state_dict().items()) and not model.frozen
    assert any(not torch.equal(frozen[k], moved[k]) for k in frozen)  # it had moved away
    assert logged[-1][1]["finetuned"] and logged[-1][1]["held_out_top1"] == logged[-1][1]["top1"] == 90


def test_a_loss_that_is_not_finite_is_never_saved(encoder_file, monkeypatch):
    monkeypatch.setattr(F, "cross_entropy", lambda logits, labels: math.nan * logits.sum())
    with pytest.raises(SystemExit, match="loss is not finite at step 1, learning rate .*: lower --lr"):
        fit_cell(make_bench(encoder_file, "--labels", "0.1"), caught=signal.SIGTERM)


def test_frozen_is_checked(encoder_file):
    encoder = resnet.load_encoder(encoder_file)[0]
    before = copy.deepcopy(encoder.state_dict())
    resnet.assert_unchanged(encoder, before)
    encoder.state_dict()["final_norm.bias"][0] += 1e-3
    with pytest.raises(AssertionError, match="has changed"):
        resnet.assert_unchanged(encoder, before)


def test_early_stopping_restores_the_best_state(encoder_file, monkeypatch):
    bench, states = make_bench(encoder_file, "--head", "linear", "--held-out", "0.1"), []
    scores = [10, 40, 20, 70, 30, 70, 5, 5, 5, 5]

    def accuracy(model, images, cache):
        states.append(copy.deepcopy(model.head.state_dict()))
        return (0.0 if cache == "test" else scores[len(states) - 1]), 0.0

    monkeypatch.setattr(bench, "accuracy", accuracy)
    logged = fit_cell(bench)
    assert len(states) == 11 and logged[-1][1]["held_out_top1"] == 70
    assert all(torch.equal(a, b) for a, b in zip(states[10].values(), states[3].values()))
    assert not torch.equal(states[10]["conv.weight"], states[9]["conv.weight"])


def test_what_is_cached_changes_nothing(encoder_file, monkeypatch):
    bench = make_bench(encoder_file, "--labels", "0.1")
    model = evaluation.Classifier(bench.source.make(0), evaluation.resnet_head(256, 10, 0, 256, 64), frozen=True)
    images = Subset(data.Shapes("test"), range(30))
    first = bench.accuracy(model, images, "test")
    monkeypatch.delattr(data.Shapes, "__getitems__")  # images are read once
    assert len(bench.caches["test latents"]) == 4 and bench.accuracy(model, images, "test") == first
    model.frozen = False  # fine-tuned: latents are made anew
    latents = lambda: [z for z, _ in bench.latents(model, images, "test")]
    assert all(torch.equal(z, c) for z, (c, _) in zip(latents(), bench.caches["test latents"], strict=True))
    model.encoder.conv1.weight.data.zero_()
    assert not any(torch.equal(z, c) for z, (c, _) in zip(latents(), bench.caches["test latents"]))
    monkeypatch.undo()
    monkeypatch.setattr(bench, "CACHE", 50_000)  # 16 of the 30 images
    assert len(list(bench.latents(model, images, "more"))) == 4 and "more images" not in bench.caches


def test_linear_trains_as_pretraining_saw_and_efficient_with_inception(encoder_file):
    """Sec. 2.2: the probe has the pre-training's augmentation, jitter included; efficient
    classification Inception's, with its colours, and colour dropping."""
    linear, efficient = make_bench(encoder_file), make_bench(encoder_file, "--labels", "0.1")
    assert linear.augmentation == dict(color_drop=0.5, jitter=True, flip=0.0)
    pixels = make_bench(encoder_file, "--head", "none", "--supervised", "tiny")
    assert pixels.augmentation == {} and pixels.source.name == "pixels"
    assert efficient.augmentation == dict(color_drop=0.5)
    distorts = lambda bench: any("ColorJitter" in type(t).__name__ for t in bench.train_transform.transforms)
    assert (distorts(linear), distorts(efficient), distorts(pixels)) == (False, True, True)


def test_two_encoders_are_two_rows_and_a_baseline_does_not_depend_on_one(encoder_file, tmp_path, monkeypatch):
    other = tmp_path / "other.pt"
    other.write_bytes(encoder_file.read_bytes())
    args = evaluation.parse_args(["--encoder", str(encoder_file), str(other), "random"])
    assert len({(s.name, s.arch) for s in evaluation.find_sources(*args)}) == 3
    flags = ["--head", "none", "--data", "/", "--supervised", "resnet50"]
    monkeypatch.chdir(tmp_path)
    alone = vars(evaluation.parse_args(flags)[0])
    (tmp_path / "runs/cpc").mkdir(parents=True)
    encoder_file.rename(tmp_path / "runs/cpc/encoder.pt")
    assert vars(evaluation.parse_args(flags)[0]) == alone


def test_supervised_rows(encoder_file):
    """A.4: ResNet v2 with batch norm on whole images. Sec. 4.1: the encoder's own architecture and
    patches from scratch, with batch norm and without. The same crops, labels and recipe as CPC's."""
    flags = ["--encoder", str(encoder_file), "--head", "none", "--supervised", "tiny", "tiny:3x3/2", "patched", "patched-none"]
    sources = evaluation.find_sources(*evaluation.parse_args(flags))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for source, norm, shape in zip(sources, ("batch", "batch", "batch", "none"), ((8, 8), (4, 4), (5, 5), (5, 5))):
        network = source.make(0)
        assert source.supervised and network.norm == norm
        model = evaluation.Classifier(network, nn.Identity(), frozen=False)
        assert model.latents(source.inputs(images, CPU)).shape == (2, 256, *shape)
        assert not torch.equal(network.conv1.weight, source.make(1).conv1.weight)
        assert torch.equal(network.conv1.weight, source.make(0).conv1.weight)
    one = data.normalise(images)
    assert torch.equal(sources[0].inputs(images, CPU), one)  # a whole image, uncut


def test_a_supervised_encoder_may_be_a_trunk(encoder_file, tmp_path):
    """Table 3's other row: what `patched` has learned is a file for --encoder, under its own name."""
    bench = make_bench(encoder_file, "--head", "none", "--supervised", "patched")
    fit_cell(bench, folder=tmp_path)
    file = str(tmp_path / "patched-0.1-seed-0.pt")
    (found,) = detect.parse_args(["--encoder", file])[1]
    learned, fresh = found.make(0).state_dict(), bench.source.make(0).state_dict()
    assert found.name == "patched" and found.file["norm"] == "batch" and found.file["trained"]["labels"] == 0.1
    assert learned.keys() == fresh.keys() and not any(torch.equal(learned[k], fresh[k]) for k in fresh if "bias" not in k)
    again = make_bench(file, "--head", "linear").source
    assert (again.name, again.crop, again.patch, again.stride) == ("patched", 32, 8, 6)


def test_sweep_selects_by_held_out_images_alone():
    state, held = {"done": {}}, {" trial 0": 30.0, " trial 1": 50.0, " trial 2": 40.0}

    def trial(recipe, trial):
        state["done"][trial] = {"held_out_top1": held[trial]}
        return trial

    recipe = evaluation.Recipe(10, 100, 64, 0.1, 1e-4, 0.2)
    chosen = evaluation.sweep(trial, recipe, 3, state)
    assert chosen == recipe.variant(1) != recipe and chosen.epochs == 10
    held[" trial 1"] = -1.0  # diverged
    assert evaluation.sweep(trial, recipe, 3, state) == recipe.variant(2)
    for n in range(200):  # A.4's grid
        v = recipe.variant(n)
        assert v.lr in (0.05, 0.1, 0.2) and v.batch_size in (32, 64)
        assert 1e-5 <= v.weight_decay <= 1e-2 and 0 <= v.dropout <= 0.9


@pytest.mark.parametrize("name, channels, side", [("resnet18", 512, 2), ("mobilenet_v3_small", 576, 2), ("swin_t", 768, 2)])
def test_torchvision_models_are_representations_too(name, channels, side, tmp_path):
    """Table 2 does it for BigBiGAN and AMDIM: any [B, D, h, w] grid in CPC's place."""
    weights = tmp_path / "weights.pth"
    model = seeded(lambda: models.get_model(name, weights=None))
    torch.save(model.state_dict(), weights)
    ours = seeded(lambda: resnet.TorchvisionGrid(name, str(weights)), seed=1).eval()
    grid = ours.features(torch.randn(2, 3, 64, 64, generator=generator()))
    assert grid.shape == (2, channels, side, side) and ours.out_channels == channels
    if name == "resnet18":  # its own pooled features and classifier
        x = torch.randn(2, 3, 64, 64, generator=generator())
        assert torch.allclose(model.eval()(x), model.fc(grid.mean((2, 3))), atol=1e-4)
    torch.save({"x": torch.zeros(1)}, weights)
    with pytest.raises(SystemExit, match=f"does not hold torchvision's weights of {name}"):
        resnet.TorchvisionGrid(name, str(weights))


# ---- Detection ----------------------------------------------------------------------------------


def truth(*boxes, labels=None, difficult=()):
    return {"boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4), "labels": torch.tensor(labels or [1] * len(boxes)),
            "difficult": torch.tensor([i in difficult for i in range(len(boxes))], dtype=torch.bool)}


def found(*scored, labels=None):
    return {"boxes": torch.tensor([box for _, box in scored], dtype=torch.float32).view(-1, 4),
            "labels": torch.tensor(labels or [1] * len(scored), dtype=torch.int64), "scores": torch.tensor([s for s, _ in scored])}


A, B, FAR = (0, 0, 10, 10), (20, 0, 30, 10), (50, 50, 60, 60)


@pytest.mark.parametrize("detections, truths, eleven, area", [
    ([found((0.9, A), (0.8, B))], [truth(A, B)], 1, 1),  # perfect
    ([found((0.9, FAR))], [truth(A)], 0, 0),  # all wrong
    ([found()], [truth(A)], 0, 0),  # nothing found
    ([found((0.9, A))], [truth(A, B)], 6 / 11, 1 / 2),  # half of them: recalls 0 to 0.5
    ([found((0.9, FAR), (0.8, A))], [truth(A)], 1 / 2, 1 / 2),  # a false one first
    ([found((0.9, A), (0.8, A), (0.7, B))], [truth(A, B)], (6 + 5 * 2 / 3) / 11, (1 + 2 / 3) / 2),  # a duplicate
    ([found((0.9, A), (0.8, B))], [truth(A, B, difficult=[0])], 1, 1),  # a difficult one neither helps nor harms
    ([found((0.9, A), (0.85, A), (0.8, B))], [truth(A, B, difficult=[0])], 1, 1),  # nor found twice
    ([found((0.9, A))], [truth(A, B, difficult=[1])], 1, 1),  # nor missed
    ([found((0.9, A), (0.8, B))], [truth(A)], 1, 1),  # a false one after all are found
    ([found((0.9, A)), found((0.8, A))], [truth(A), truth()], 1, 1),  # an image without objects
    ([found((0.5, FAR), (0.5, A)), found((0.5, A))], [truth(A), truth(A)], 2 / 3, 2 / 3),  # ties: in the images' order
    ([found((0.9, A), labels=[2])], [truth(A)], 0, 0),  # another class
    ([found((0.9, A))], [truth(A, FAR, labels=[3, 1])], 0, 0),  # on an object of another class
    ([found((0.9, (0, 0, 10, 5)))], [truth(A)], 1, 1),  # an IoU of 0.5 is enough
    ([found((0.9, (0, 0, 10, 4.9)))], [truth(A)], 0, 0),
])
def test_average_precision_by_hand(detections, truths, eleven, area):
    ap = detect.average_precisions(detections, truths, ["a", "without objects"])
    assert ap["ap"] == {"a": pytest.approx(100 * eleven, abs=1e-3)} and ap["mAP"] == ap["ap"]["a"]
    assert ap["mAP_area"] == pytest.approx(100 * area, abs=1e-3)


def test_coco_style_average_precision():
    """An IoU of 0.8 is right at seven of the ten thresholds; recall 1/2 holds at 51 of 101 points."""
    ap = detect.average_precisions([found((0.9, (0, 0, 10, 8)))], [truth(A, B)], ["a"])
    assert ap["mAP_coco"] == pytest.approx(100 * 0.7 * 51 / 101, abs=1e-3)


def test_average_precision_of_a_published_case():
    """github.com/rafaelpadilla/Object-Detection-Metrics: 15 objects, 24 detections (x, y, width, height),
    at IoU 0.3: 26.84 % by 11 points, 24.57 % by area."""
    objects = """25 16 38 56, 129 123 41 62; 123 11 43 55, 38 132 59 45; 16 14 35 48, 123 30 49 44, 99 139 47 47;
        53 42 40 52, 154 43 31 34; 59 31 44 51, 48 128 34 52; 36 89 52 76, 62 58 44 67; 28 31 55 63, 58 67 50 58"""
    detections = """.88 5 67 31 48, .70 119 111 40 67, .80 124 9 49 67; .71 64 111 64 58, .54 26 140 60 47, .74 19 18 43 35;
        .18 109 15 77 39, .67 86 63 46 45, .38 160 62 36 53, .91 105 131 47 47, .44 18 148 40 44;
        .35 83 28 28 26, .78 28 68 42 67, .45 87 89 25 39, .14 10 155 60 26;
        .62 50 38 28 46, .44 95 11 53 28, .95 29 131 72 29, .23 29 163 72 29;
        .45 43 48 74 38, .84 17 155 29 35, .43 95 110 25 42; .48 16 20 101 88, .95 33 116 37 49"""
    rows = lambda text: [[[float(v) for v in row.split()] for row in image.split(",")] for image in text.split(";")]
    corners = lambda x, y, w, h: (x, y, x + w + 1, y + h + 1)  # x + w is a box's last pixel there, as in VOC
    truths = [truth(*(corners(*row) for row in image)) for image in rows(objects)]
    matched = detect.match([found(*((s, corners(*box)) for s, *box in image)) for image in rows(detections)], truths)
    curve = detect.precision_recall(matched, 1, 15, 0.3)
    assert round(100 * detect.interpolated(*curve, 11), 2) == 26.84 and round(100 * detect.area(*curve), 2) == 24.57


@pytest.fixture(scope="session")
def voc(tmp_path_factory):
    """VOCdevkit/VOC2007 as it may be: grey, CMYK, without objects, with boxes beyond the border, difficult ones."""
    root = tmp_path_factory.mktemp("voc")
    base = root / "VOCdevkit" / "VOC2007"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (base / folder).mkdir(parents=True)
    shapes, mode = data.Shapes("train", 64), {1: "L", 2: "CMYK"}
    for i in range(8):
        image = to_pil_image(shapes[i][0]).resize((64 + i, 60)).convert(mode.get(i, "RGB"))
        image.save(base / "JPEGImages" / f"{i:06d}.jpg")
        boxes = [] if i == 3 else [(1, 1, 30, 60), (20, 5, 64 + i + (40 if i == 4 else 0), 60)]
        boxes = [(200, 5, 230, 60), *boxes] if i == 4 else boxes
        (base / "Annotations" / f"{i:06d}.xml").write_text("<annotation>" + "".join(
            f"<object><name>{'dog' if n else 'train'}</name><difficult>{int(i == 5)}</difficult><bndbox><xmin>{x1}</xmin>"
            f"<ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            for n, (x1, y1, x2, y2) in enumerate(boxes)) + "</annotation>")
    for split, names in (("trainval", range(6)), ("test", range(5, 8))):
        (base / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{i:06d}\n" for i in names))
    return root


def test_voc_boxes(voc, tmp_path):
    """VOC counts from 1 and includes the last pixel; what is written is in its terms again."""
    train, test = (data.load_objects(str(voc), split, 64) for split in ("train", "test"))
    assert len(train.classes) == 20 and train.classes[14] == "person" and len(train) == 6 and len(test) == 3
    assert b"torch" not in pickle.dumps(train.truths)  # a worker that is not forked is sent each tensor as a file
    one = test.truth(1)
    assert one["boxes"].tolist() == [[0, 0, 30, 60], [19, 4, 70, 60]] and one["labels"].tolist() == [19, 12]
    assert test.truth(0)["difficult"].tolist() == [True, True]
    detect.write_voc(tmp_path, [one | {"scores": torch.tensor([0.9, 0.5])} for one in map(test.truth, range(3))], test)
    assert len(list(tmp_path.iterdir())) == 20
    lines = (tmp_path / "comp4_det_test_dog.txt").read_text().splitlines()
    assert lines[1] == "000006 0.500000 20.00 5.00 70.00 60.00"
    for i in range(6):  # all sizes and modes train, with boxes inside the image only
        with torch.random.fork_rng():
            torch.manual_seed(i)
            image, truth = data.objects_transform(True)(*train[i])
        assert image.shape == (3, 60, 64 + i) and image.dtype == torch.uint8
        assert len(truth["boxes"]) == len(truth["labels"]) == (0 if i == 3 else 2)
        assert (truth["boxes"][:, ::2] <= 64 + i).all() and (truth["boxes"] >= 0).all()
    mirrored = [data.objects_transform(True)(*train[0])[1]["boxes"][0].tolist() for _ in range(20)]
    assert sorted(map(tuple, mirrored))[0] == (0, 0, 30, 60) and sorted(map(tuple, mirrored))[-1] == (34, 0, 64, 60)


def test_voc_that_is_incomplete(voc, tmp_path):
    shutil.copytree(voc, tmp_path / "voc")
    annotation = tmp_path / "voc/VOCdevkit/VOC2007/Annotations/000002.xml"
    text = annotation.read_text()
    for content in ("<annotation>", text.replace("dog", "wolf"), text.replace("<xmin>1", "<xmin>one")):
        annotation.write_text(content)
        with pytest.raises(SystemExit, match="000002.xml is not an annotation of VOC 2007"):
            data.load_objects(str(tmp_path / "voc"), "train", 64)
    annotation.unlink()
    with pytest.raises(SystemExit, match="1 files of VOC 2007's trainval are missing, the first .*000002.xml"):
        data.load_objects(str(tmp_path / "voc"), "train", 64)
    with pytest.raises(SystemExit, match="with VOCdevkit/VOC2007 in it"):
        data.load_objects(str(tmp_path), "train", 64)


@pytest.mark.parametrize("stem, stride, H, W", [("3x3", 4, 61, 83), ("7x7", 16, 130, 97)])
def test_trunk(stem, stride, H, W):
    """The encoder's features at its stride on any size; never in training mode itself."""
    encoder = resnet.Encoder("tiny", "batch", stem)
    trunk = detect.Trunk(encoder, bf16=False).train()
    images = torch.randn(1, 3, H, W)
    grid = trunk(images)
    assert grid.shape == (1, 256, math.ceil(H / stride), math.ceil(W / stride)) and not grid.requires_grad
    assert torch.equal(grid, encoder.eval().features(images)) and trunk.training and not encoder.training
    trunk.frozen = False
    assert trunk(images).requires_grad


def test_layer_norm_of_each_position():
    """In the trunk a position sees its own channels' statistics: padding far from it changes nothing."""
    encoder = resnet.Encoder("tiny")
    trunk, images = detect.Trunk(encoder, bf16=False), torch.randn(1, 3, 64, 64)
    assert torch.allclose(trunk(images)[..., :8, :8], trunk(F.pad(images, (0, 40, 0, 40)))[..., :8, :8], atol=1e-5)
    norm, x = resnet.LayerNorm(1, 8), torch.randn(2, 8, 3, 3)
    norm.per_position = True
    expected = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    assert torch.allclose(norm(x), expected, atol=1e-5)


def test_detector_is_faster_rcnn_c4():
    """Ren et al. 2015 on conv1..conv4: anchors of 32 to 512 pixels at the trunk's stride, 512 channels
    in the proposal network; He et al. 2016: conv5's three bottlenecks, 2048 channels, on 14x14 cells."""
    with torch.device("meta"):
        model = detect.build_detector(resnet.Encoder("resnet92"), 20, 480)
    assert model.rpn.anchor_generator.sizes == ((32, 64, 128, 256, 512),) and model.rpn.head.cls_logits.in_channels == 512
    head = model.roi_heads.box_head
    assert [b.conv3.out_channels for b in head.blocks] == [2048] * 3 and head.blocks[0].conv2.stride == (2, 2)
    assert model.roi_heads.box_predictor.cls_score.out_features == 21
    areas = [side * side * 4 / 3 for side in model.transform.min_size]
    assert areas[-1] == 480 * 640 and 150e3 < min(areas) < 156e3 and 450e3 < max(areas) < 465e3


def make_detector(encoder, *flags):
    args, encoders = detect.parse_args(["--encoder", str(encoder), "--workers", "0", "--batch-size", "2", *flags])
    network = encoders[0].make(0)
    model = seeded(lambda: detect.build_detector(network, 20, args.side, True, 20, 16))
    return args, network, model.to(memory_format=torch.channels_last)


QUIET = SimpleNamespace(is_main=False, log=lambda *a, **k: None, save=lambda *a, **k: None, stop_signal=lambda: 0)


def test_one_image_is_learned_and_the_frozen_trunk_is_not_touched(encoder_file, voc):
    """Sec. 4.3's two phases, on one image: mAP 100; the first leaves the trunk bit-identical, the second moves it."""
    args, network, model = make_detector(encoder_file, "--epochs", "30", "--finetune-epochs", "200", "--color-drop", "0",
                                         "--finetune-lr", "1e-3")
    objects = data.load_objects(str(voc), "train", 64)
    objects.names = objects.names[:1]
    before = copy.deepcopy(network.state_dict())
    detect.fit(args, "frozen", model, objects, CPU, QUIET, {}, "a")
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    detect.fit(args, "finetuned", model, objects, CPU, QUIET, {}, "b")
    assert not any(torch.equal(v, before[k]) for k, v in network.state_dict().items() if "conv" in k)
    assert model.roi_heads.box_roi_pool.scales == [1 / 4]  # torchvision's guess: the trunk's stride
    detections = detect.detect_all(args, model, objects, CPU, QUIET)
    assert detect.average_precisions(detections, [objects.truth(0)], objects.classes)["mAP"] == 100


def test_fine_tuning_is_slower_but_for_what_is_fresh(encoder_file, voc, monkeypatch):
    seen, AdamW = [], torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **rest: seen.append([g["lr"] for g in groups]) or AdamW(groups, **rest))
    objects = data.load_objects(str(voc), "train", 64)
    objects.names = objects.names[:1]
    for flags in ([], ["--phase", "finetuned"]):
        args, _, model = make_detector(encoder_file, "--epochs", "1", "--finetune-epochs", "1", *flags)
        for phase in args.phase:
            detect.fit(args, phase, model, objects, CPU, QUIET, {}, phase)
    assert seen == [[3e-3], [3e-4, 3e-4], [3e-4, 3e-3]]  # frozen, then; alone: trunk, heads


def test_colors_are_dropped_over_the_whole_image():
    """Sec. 2.2: the same two channels everywhere, in about half of the images; never in a test."""
    images = [torch.randint(0, 256, (3, 20 + n % 3, 30), dtype=torch.uint8, generator=generator(n)) for n in range(200)]
    plain = detect.prepare(images, CPU)
    assert all(torch.equal(x, data.normalise(i)) for x, i in zip(plain, images))
    kept = [(a == b).all(2).all(1).sum().item() for a, b in zip(detect.prepare(images, CPU, 0.5), plain)]
    assert set(kept) == {1, 3} and 70 < kept.count(1) < 130


# ---- Whole commands -----------------------------------------------------------------------------

TINY = ["--tiny", "--batch-size", "8", "--epochs", "2", "--warmup", "2"]


def command(script, *args, processes=0):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=3", f"--nproc_per_node={processes}"]
    return [*(launch if processes else [sys.executable]), str(HERE / script), *map(str, args)]


ONE_THREAD = dict(os.environ) | {"OMP_NUM_THREADS": "1"}


def run(script, *args, processes=0, cwd=None, timeout=150):
    return subprocess.run(command(script, *args, processes=processes), capture_output=True, text=True, cwd=cwd,
                          env=ONE_THREAD, timeout=timeout)


def start(script, *args):
    """A command in a process group of its own, running."""
    return subprocess.Popen(command(script, *args), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                            env=ONE_THREAD, start_new_session=True)


def stop(when, script, *args):
    """Run a command until `when()`, then send all its processes SIGTERM, and see that it says how to go on."""
    process = start(script, *args)
    while process.poll() is None and not when():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    lines = process.communicate()[1].splitlines()
    assert "--resume" in lines[-1] and "Traceback" not in "".join(lines) and process.returncode == 143, lines


def events(folder, event):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


@pytest.fixture(scope="session")
def trained(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "cpc"
    done = run("cpc.py", *TINY, "--data", folder, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def test_pretraining_leaves_what_it_promises(trained):
    first = json.loads((trained / "log.jsonl").read_text().splitlines()[0])
    assert first["event"] == "start" and first["args"]["lengths"] == [2, 3] and first["torch"] == torch.__version__
    epochs = events(trained, "epoch")
    assert [e["step"] for e in epochs] == [5, 10]
    assert all(0 < e["loss"] < 1.2 * e["chance_loss"] for e in epochs)
    assert epochs[0]["chance_loss"] == pytest.approx(math.log(8 * 25))
    for name in ("patches.png", "retrieval.png"):
        assert min(Image.open(trained / name).size) > 100
    assert resnet.load_encoder(trained / "encoder.pt")[1]["trained"]["epochs"] == 2


def test_a_run_is_never_overwritten(trained, folder):
    before = (trained / "encoder.pt").read_bytes()
    done = run("cpc.py", *TINY, "--out", trained)
    assert done.returncode == 1 and "holds a run" in done.stderr and len(done.stderr.splitlines()) == 1
    done = run("cpc.py", *TINY, "--out", trained, "--lr", "1e-3", "--resume", "--data", "shapes")
    assert done.returncode == 1 and "was made with" in done.stderr and "Traceback" not in done.stderr
    assert (trained / "encoder.pt").read_bytes() == before
    again = [*TINY, "--data", str(folder), "--out", str(trained), "--resume", "--workers", "1"]  # finished: nothing is left to do
    cpc.main(cpc.parse_args(again))
    assert (trained / "encoder.pt").read_bytes() == before and len(events(trained, "done")) == 1


def test_benchmark_counts_what_pencil_and_paper_count(folder, tmp_path):
    """Its GFLOP an image are 2 a multiply-add, forward and twice that backward, and it writes nothing."""
    done = run("cpc.py", *TINY, "--data", folder, "--benchmark", 1, "--directions", 1, "--lengths", 2, cwd=tmp_path)
    assert done.returncode == 0 and not list(tmp_path.iterdir()), done.stderr
    encoder = 64 * 3 * 9 * 32 + 64 * (32 * 32 + 9 * 32 * 32 + 32 * 64 + 32 * 64)  # stem, first block at 8x8
    encoder += 64 * 64 * 32 + 16 * (9 * 32 * 32 + 32 * 128 + 64 * 128)  # second, to 4x4
    encoder += 16 * 128 * 64 + 4 * (9 * 64 * 64 + 64 * 256 + 128 * 256)  # third, to 2x2
    context = 5 * (2 * 256 * 32 + 3 * 32 * 32 + 2 * 32 * 32) + 2 * 256 * 32  # and projections
    logits = 3 * 5 * 200 * 32  # rows with a target, of eight images' 200 candidates
    expected = 3 * 2 * (25 * (encoder + context) + logits) / 1e9
    assert float(re.search(r"([\d.]+) GFLOP an image", done.stdout)[1]) == pytest.approx(expected, abs=0.006)


def test_probe_command(trained, folder, tmp_path):
    done = run("eval.py", "--encoder", trained / "encoder.pt", "random", "--epochs", 1, "--batch-size", 8,
               "--out", tmp_path / "e")
    assert done.returncode == 0, done.stderr
    results = events(tmp_path / "e", "result")
    assert [r["encoder"] for r in results] == ["cpc", "random"]
    for r in results:
        assert (r["head"], r["finetuned"], r["labels"], r["labelled_images"]) == ("linear", False, 1.0, 40)
        assert (r["held_out_images"], r["seed"], r["top5"]) == (0, 0, 100)
        assert r["top1"] in [round(100 * n / 11, 3) for n in range(12)]
    assert "chance" in done.stdout and min(Image.open(tmp_path / "e" / "neighbours.png").size) > 100


FEW_LABELS = ["--labels", "1", "0.25", "--supervised", "tiny", "--seeds", "2", "--epochs", "1",
              "--finetune-epochs", "1", "--min-steps", "0", "--batch-size", "8", "--held-out", "0.2", "--sweep", "2", "--workers", "0"]


@pytest.fixture(scope="session")
def few_labels(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("few") / "e"
    done = run("eval.py", "--encoder", trained / "encoder.pt", *FEW_LABELS, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_few_labels_command(few_labels):
    """Every cell of the small Fig. 1 once; the lists of its labels; a table of means."""
    out, printed = few_labels
    results = events(out, "result")
    cells = [(r["encoder"], r["finetuned"], r["labels"], r["seed"]) for r in results]
    rows = [("cpc", False), ("cpc", True), ("pixels", True)]
    assert sorted(cells) == sorted((*row, f, s) for row in rows for f in (0.25, 1.0) for s in (0, 1))
    assert {(r["labels"], r["labelled_images"], r["held_out_images"]) for r in results} == {(0.25, 10, 8), (1.0, 32, 8)}
    assert len(events(out, "trial")) == 2 * 2 * 2  # a row and fraction each, on the first seed's labels
    few, all_, held = ([(out / f"{name}-seed-{s}.txt").read_bytes().split(b"\n")[:-1] for s in (0, 1)]
                       for name in ("labels-0.25", "labels-1", "held-out"))
    for seed in (0, 1):
        assert set(few[seed]) < set(all_[seed]) and not set(all_[seed]) & set(held[seed]) and len(held[seed]) == 8
    assert few[0] != few[1]
    mean = sum(r["top1"] for r in results if (r["encoder"], r["finetuned"], r["labels"]) == ("cpc", True, 0.25)) / 2
    row = next(line for line in printed.splitlines() if line.startswith("cpc tiny fine-tuned"))
    assert f"{mean:.1f} ±" in row and row.count("±") == 2


def test_resumed_evaluation_is_exact_and_repeats_nothing(few_labels, trained, tmp_path):
    """Stopped by SIGTERM in a fine-tuning, resumed: the same results, each fit trained once."""
    out = tmp_path / "e"
    flags = ["--encoder", trained / "encoder.pt", *FEW_LABELS, "--out", out]
    stop(lambda: (out / "log.jsonl").exists() and "finetuned" in (out / "log.jsonl").read_text(), "eval.py", *flags)
    done = run("eval.py", *flags, "--resume")
    assert done.returncode == 0, done.stderr
    fields = lambda out, event, *names: [[e[n] for n in names] for e in events(out, event)]
    for event, names in (("result", ("encoder", "labels", "seed", "held_out_top1", "top1", "recipe")),
                         ("train", ("fit", "step", "loss"))):
        assert fields(out, event, *names) == fields(few_labels[0], event, *names)


def test_fixed_schedule_and_subset_list(trained, folder, tmp_path):
    """--held-out 0: no label is seen but the listed ones."""
    names = data.image_names(data.load_dataset(str(folder), "train", 32))
    (tmp_path / "list.txt").write_bytes(os.fsencode("\n".join(names[:12])))
    done = run("eval.py", "--encoder", trained / "encoder.pt", "--subset", tmp_path / "list.txt", "--held-out", 0,
               "--epochs", 0.5, "--finetune-epochs", 0.5, "--min-steps", 4, "--batch-size", 8, "--out", tmp_path / "e")
    assert done.returncode == 0, done.stderr
    results = events(tmp_path / "e", "result")
    assert [(r["labels"], r["labelled_images"], r["held_out_images"], r["held_out_top1"]) for r in results] == [(0.3, 12, 0, None)] * 2
    assert (tmp_path / "e" / "labels-0.3-seed-0.txt").read_text().split("\n")[:-1] == sorted(names[:12], key=names.index)
    assert " 0 held-out" in done.stdout
    (tmp_path / "list.txt").write_bytes(os.fsencode("\n".join(names[1:13])))
    with pytest.raises(SystemExit, match="was made with subset-sha256"):
        evaluation.main(*evaluation.parse_args(
            ["--encoder", str(trained / "encoder.pt"), "--subset", str(tmp_path / "list.txt"), "--held-out", "0", "--epochs", "0.5",
             "--finetune-epochs", "0.5", "--min-steps", "4", "--batch-size", "8", "--out", str(tmp_path / "e"), "--resume"]))


DETECT = ["--epochs", "2", "--finetune-epochs", "1", "--batch-size", "2", "--regions", "8", "--proposals", "8"]


@pytest.fixture(scope="session")
def detected(trained, voc, tmp_path_factory):
    out = tmp_path_factory.mktemp("detect") / "d"
    done = run("detect.py", "--encoder", trained / "encoder.pt", "random", "--data", voc, *DETECT, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_detection_command(detected, tmp_path):
    """From cpc.py's encoder: a result for each encoder and phase, what VOC's devkit scores, pictures,
    and a detector for one's own picture."""
    out, printed = detected
    results = events(out, "result")
    assert [(r["encoder"], r["phase"], r["seed"]) for r in results] == [
        ("cpc", "frozen", 0), ("cpc", "finetuned", 0), ("random", "frozen", 0), ("random", "finetuned", 0)]
    assert all(set(r["ap"]) == {"dog", "train"} and 0 <= r["mAP"] <= 100 for r in results)  # the classes there are
    assert "mAP (VOC 2007)" in printed and "aeroplane" in printed
    assert len(list((out / "cpc" / "frozen").glob("comp4_det_test_*.txt"))) == 20
    assert min(Image.open(out / "random" / "finetuned" / "test.png").size) > 200
    picture = tmp_path / "mine.png"
    to_pil_image(data.Shapes("test", 64)[0][0]).convert("P").save(picture)
    for n in ("", "-2"):  # and nothing is drawn over
        detect.main(*detect.parse_args(["--detect", str(picture), "--out", str(out)]))
        assert min(Image.open(out / f"detected-mine{n}.png").size) == 256
    Image.new("RGB", (1, 3000)).save(tmp_path / "line.png")
    for path, message in ((out / "model.pt", "model.pt cannot be read"), (tmp_path / "line.png", "1 x 3000 pixels are too narrow")):
        with pytest.raises(SystemExit, match=message):
            detect.main(*detect.parse_args(["--detect", str(path), "--out", str(out)]))


def test_resumed_detection_is_exact_and_repeats_nothing(detected, trained, voc, tmp_path):
    """Stopped by SIGTERM in the second encoder's first phase, resumed: the same results."""
    out = tmp_path / "d"
    flags = ["--encoder", trained / "encoder.pt", "random", "--data", voc, *DETECT, "--out", out]
    stop(lambda: (out / "log.jsonl").exists() and "random/" in (out / "log.jsonl").read_text(), "detect.py", *flags, "--workers", 0)
    done = run("detect.py", *flags, "--workers", 0, "--resume")
    assert done.returncode == 0, done.stderr
    for event in ("result", "train"):
        a, b = ([{k: v for k, v in e.items() if k != "seconds"} for e in events(o, event)] for o in (detected[0], out))
        assert a == b


def kill_and_resume(times, seconds, script, *flags):
    """Start a run, kill all its processes at a random moment, so many times; then let it end."""
    for _ in range(times):
        process = start(script, *flags, "--resume")
        try:
            process.communicate(timeout=random.uniform(3, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    done = run(script, *flags, "--resume", timeout=900)
    assert done.returncode == 0, done.stderr


def outcome(folder):
    """All that a run has learned, but for the time it took: the leaves of its last state, and its results."""
    leaves = lambda x: [leaf for v in (x.values() if isinstance(x, dict) else x) for leaf in leaves(v)] if isinstance(
        x, (dict, list, tuple)) else [x.numpy().tobytes() if isinstance(x, torch.Tensor) else x]
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["state"]
    state["done"] = events(folder, "result")
    for result in state["done"]:
        del result["seconds"]
    return leaves(state)


def test_resume_is_exact(trained, folder, tmp_path):
    """Stopped by SIGTERM in the middle of an epoch, killed, and with another number of workers: the same bits."""
    out = tmp_path / "stopped"
    flags = [*TINY, "--data", folder, "--out", out]
    stop(lambda: (out / "patches.png").exists(), "cpc.py", *flags, "--workers", 1)  # written in the first step
    assert not (out / "encoder.pt").exists()
    kill_and_resume(1, 6, "cpc.py", *flags, "--workers", 0, "--save-every", 1)
    assert outcome(out) == outcome(trained)


def test_gradients_that_are_not_finite_end_the_run(folder, tmp_path, monkeypatch):
    update, steps = cpc.update, iter(range(10))
    monkeypatch.setattr(cpc, "update", lambda *args: (*update(*args)[:2], torch.tensor(math.nan if next(steps) == 7 else 1.0)))
    with pytest.raises(SystemExit, match=r"not finite at step 7, learning rate \d.*, loss \d.* after \d.*: lower --lr"):
        cpc.main(cpc.parse_args([*TINY, "--data", str(folder), "--workers", "0", "--out", str(tmp_path / "run")]))
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["state"]["step"] == 5


def check_kills(times, out):
    """`python test_cpc.py 20 DIR`: each script killed so often, against the same run undisturbed."""
    encoder = ["--encoder", out / "cpc" / "encoder.pt"]
    for name, script, *flags in (
            ("cpc", "cpc.py", "--tiny", "--epochs", 1, "--save-every", 1),
            ("eval", "eval.py", *encoder, "--labels", 0.01, 0.02, "--min-steps", 20, "--batch-size", 16),
            ("detect", "detect.py", *encoder, "--epochs", 0.02, "--finetune-epochs", 0.02, "--batch-size", 2)):
        done = run(script, *flags, "--out", out / name, timeout=900)
        assert done.returncode == 0, done.stderr
        kill_and_resume(times, 12, script, *flags, "--out", out / f"{name}-killed")
        same = outcome(out / name) == outcome(out / f"{name}-killed")
        print(f"{script} killed {times} times, {len(events(out / f'{name}-killed', 'start'))} starts: "
              f"{'the same' if same else 'DIFFERENT'}", flush=True)


def test_what_a_run_may_continue(tmp_path, monkeypatch):
    """The last good checkpoint and the one before; only the same run; what one torchrun starts again by itself."""
    def start(**flags):
        run = resnet.Run(SimpleNamespace(**{"out": str(tmp_path / "run"), "resume": False, "seed": 0} | flags))
        return run, run.start()

    run, state = start()
    assert state is None
    run.save({"step": 1})
    run.save({"step": 2})
    assert start(resume=True)[1] == {"step": 2}
    with pytest.raises(SystemExit, match="was made with seed 0, not 1"):
        start(resume=True, seed=1)
    with pytest.raises(SystemExit, match="holds a run"):
        start(seed=0)
    for name in ("job 7", "größe", "none"):  # --rdzv-id; without one, by torchrun's process
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        with pytest.raises(SystemExit, match="holds a run"):
            start()
        assert start(resume=True)[1] == start()[1] == {"step": 2}
    monkeypatch.setattr(os, "getppid", lambda: 1)  # another torchrun
    with pytest.raises(SystemExit, match="holds a run"):
        start()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/tmp/torchelastic_a/none_b/attempt_0/0/error.json")
    assert start(resume=True)[1] == start()[1] == {"step": 2}
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/tmp/torchelastic_a/none_c/attempt_0/0/error.json")
    with pytest.raises(SystemExit, match="holds a run"):
        start()
    last = tmp_path / "run" / "checkpoint.pt"
    for content in (last.read_bytes()[:-100], b"", b"PK not a checkpoint"):
        last.write_bytes(content)
        with pytest.raises(SystemExit, match="damaged or not ours .*checkpoint-before.pt beside it is the one before"):
            start(resume=True)
    last.unlink()  # killed between two renames
    assert start(resume=True)[1] == {"step": 1}
    last.with_name("checkpoint-before.pt").write_bytes(b"")
    with pytest.raises(SystemExit, match="checkpoint-before.pt is damaged or not ours .*; pass another --out"):
        start(resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "encoder.pt").touch()  # somebody's, without a log
    with pytest.raises(SystemExit, match="holds a run"):
        start(out=str(tmp_path / "other"))
    with pytest.raises(SystemExit, match="cannot use --out /dev/null/run: Not a directory"):
        start(out="/dev/null/run")


def test_a_log_is_what_the_checkpoint_knows(tmp_path):
    """Killed between a checkpoint and its line, within the line, or later: no line is lost, none is there twice."""
    def resume():
        run = resnet.Run(SimpleNamespace(out=str(tmp_path), resume=True))
        return run, run.start()

    log, (run, _) = tmp_path / "log.jsonl", resume()
    run.log("train", step=1)
    run.save({"step": 2}, "epoch", epoch=1)
    whole = log.read_bytes()
    start, train, epoch = whole.splitlines(keepends=True)
    later = start + train + epoch + start + epoch + start[:40]
    for killed, expected in ((whole, [start, train, epoch]), (whole[:-9], [start, train, epoch]), (start + train, [start, train, epoch]),
                             (later, [start, train, epoch, start])):
        log.write_bytes(killed)
        run, state = resume()
        assert state == {"step": 2}
        *lines, last = log.read_bytes().splitlines(keepends=True)
        assert lines == expected and last.startswith(start[:17])
    for name in ("checkpoint.pt", "checkpoint-before.pt"):
        (tmp_path / name).unlink(missing_ok=True)
    del run  # its lock
    with pytest.raises(SystemExit, match="holds a run without its checkpoint"):
        resume()
    log.write_bytes(start + start[:40])  # it never had one
    run, state = resume()
    assert state is None and len(events(tmp_path, "start")) == 2
    run.save({"step": 1}, "epoch", epoch=1)
    for edited in (b"", log.read_bytes()[:-70], b'{"event": "note"}\n' + log.read_bytes(), b'{"event": "st'):  # by hand, or a node's crash
        log.write_bytes(edited)
        run, state = resume()
        assert state == {"step": 1} and len(events(tmp_path, "start")) >= 1  # lines of JSON
    (tmp_path / "checkpoint.pt").unlink()
    del run
    log.write_text("step,loss\n1,2.0\n")  # somebody's
    with pytest.raises(SystemExit, match="what is not ours"):
        resume()
    assert log.read_text() == "step,loss\n1,2.0\n"


def test_nodes_must_share_a_folder(tmp_path, monkeypatch):
    """Each with its own, only the first would find the checkpoint."""
    def gather(found, mine):
        found[:] = [mine, (0, "")]

    run = resnet.Run(SimpleNamespace(out=str(tmp_path), resume=True))
    run.start()
    run.save({"step": 1}, "epoch", epoch=1)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    with pytest.raises(SystemExit, match="not all processes find the same .*checkpoint.pt: --out must be"):
        resnet.Run(SimpleNamespace(out=str(tmp_path), resume=True)).start()


def test_a_signal_may_come_from_all_sides(tmp_path, monkeypatch):
    """torchrun passes on what the terminal has sent to all: once is a wish to save, again and later to leave."""
    handlers, ends = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}, []
    monkeypatch.setattr(os, "_exit", ends.append)
    try:
        run = resnet.Run(SimpleNamespace(out=str(tmp_path), resume=False))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert run.stop_signal() == signal.SIGTERM and not ends
        run.caught -= 10
        os.kill(os.getpid(), signal.SIGINT)
        assert ends == [130]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_what_the_system_does_ends_in_one_line(capfd):
    """And not behind a progress bar."""
    def fail(error):
        bars.append(tqdm([], desc="training", total=3))
        raise error

    bars = []
    for cause, message in ((lambda: fail(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")),
                            "a data loading process was killed: if memory is full, lower --workers"),
                           (lambda: fail(MemoryError()), "memory is full: lower --batch-size"),
                           (lambda: torch.empty(2**60), "memory is full: lower --batch-size"),
                           (lambda: fail(OSError(28, "No space left on device")), "No space left on device: in the folder of --out"),
                           (lambda: fail(RuntimeError("[gloo/pair.cc:1] Connection closed")), "lost the connection to another process"),
                           (lambda: fail(KeyboardInterrupt()), 130), (lambda: fail(SystemExit("refused")), "refused")):
        with pytest.raises(SystemExit) as end:
            resnet.one_line(lambda: (), cause)
        assert end.value.code == message or end.value.code.startswith(message)
        error = capfd.readouterr().err
        assert not error or "training" in error and error.endswith("\n")
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        resnet.one_line(lambda: (), lambda: fail(RuntimeError("a mistake of ours")))


def test_two_processes(folder, voc, tmp_path):
    """Under torchrun: the gradients that the mathematics asks for, the three scripts one after the
    other (below), and every test image counted once, though 11 and 3 do not divide by two."""
    done = run("test_cpc.py", folder, voc, tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    starts = [e["resumed"] for e in events(tmp_path / "cpc", "start")]
    assert not starts[0] and starts[-1]
    states = [resnet.load_encoder(tmp_path / name / "encoder.pt")[0].state_dict().values() for name in ("undisturbed", "cpc")]
    assert all(map(torch.equal, *states))
    epochs = [[(e["step"], e["loss"], e["accuracy"]) for e in events(tmp_path / name, "epoch")] for name in ("undisturbed", "cpc")]
    assert epochs[0] == epochs[1] and [step for step, *_ in epochs[0]] == [5, 10]
    assert events(tmp_path / "cpc", "epoch")[0]["chance_loss"] == pytest.approx(math.log(4 * 25))  # local negatives
    assert len(events(tmp_path / "eval", "result")) == 2 and len(events(tmp_path / "eval", "start")) == 1  # at the first try
    assert all(r["top1"] in [round(100 * n / 11, 3) for n in range(12)] for r in events(tmp_path / "eval", "result"))
    assert [r["phase"] for r in events(tmp_path / "detect", "result")] == ["finetuned"]
    lines = [line.split() for file in (tmp_path / "detect").glob("*/*/comp4*") for line in file.read_text().splitlines()]
    assert len({tuple(sorted(map(tuple, (line[1:] for line in lines if line[0] == name)))) for name in (
        "000005", "000006", "000007")}) == 3 and len({line[0] for line in lines}) == 3  # each image's its own


def check_two_processes(folder, voc, out):
    """Run by each of two processes: DDP's gradient is that of the mean of the two halves' losses,
    each with the negatives of its own half; then every script. Process 1 is killed in pre-training,
    and torchrun starts both again."""
    data.start_process()
    pretrain = lambda name: cpc.main(cpc.parse_args([*TINY, "--data", folder, "--save-every", "3", "--out", f"{out}/{name}"]))
    if not Path(f"{out}/cpc/patches.png").exists():  # the first time
        check_gradients()
        pretrain("undisturbed")
        update, steps = cpc.update, iter(range(10))
        cpc.update = lambda *args: os.kill(os.getpid(), signal.SIGKILL) if next(steps) == 7 and dist.get_rank() else update(*args)
    pretrain("cpc")
    dist.barrier()  # encoder.pt is there
    encoder, fit = ["--encoder", f"{out}/cpc/encoder.pt", "--batch-size", "8"], evaluation.fit

    def checked_fit(bench, model, *rest):  # both score the test set with the same statistics of batch norm
        held_top1 = fit(bench, model, *rest)
        mine = torch.cat([buffer for buffer in model.head.buffers() if buffer.dim()])
        dist.broadcast(first := mine.clone(), 0)
        assert torch.equal(mine, first)
        return held_top1

    evaluation.fit = checked_fit
    evaluation.main(*evaluation.parse_args([*encoder, "--labels", "0.5", "--epochs", "1", "--min-steps", "4", "--held-out", "0.2",
                                            "--out", f"{out}/eval"]))
    detect.main(*detect.parse_args([*encoder, "--data", voc, *DETECT, "--phase", "finetuned", "--out", f"{out}/detect"]))


def check_gradients():
    torch.manual_seed(0)
    model = cpc.CPC(resnet.Encoder("tiny"), 2, [2], emb_scale=1.0)
    patches = torch.randn(4, 4, 4, 3, 8, 8, generator=generator())
    ddp = DistributedDataParallel(model)
    ddp(patches[dist.get_rank()::2])[0].backward()
    ours = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    ((model(patches[0::2])[0] + model(patches[1::2])[0]) / 2).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (ours - expected).norm() < 1e-4 * expected.norm() and expected.norm() > 0.01


@pytest.mark.parametrize("script, flags, message", [
    ("cpc.py", [], "no folder ./imagenet: pass --data DIR, or --tiny"),
    ("cpc.py", ["--data", "nowhere"], "no folder nowhere"),
    ("cpc.py", ["--tiny", "--stride", "7"], "crop 32, patch 8, stride 7"),
    ("cpc.py", ["--tiny", "--lengths", "2", "5"], "on a 5x5 grid"),
    ("cpc.py", ["--tiny", "--lengths", "2", "2"], "and named once"),
    ("cpc.py", ["--tiny", "--workers", "-5"], "--workers -5 is not between 0"),
    ("cpc.py", ["--tiny", "--emb-scale", "nan"], "--emb-scale nan is not between"),
    ("cpc.py", ["--tiny", "--data", ""], "--data is empty"),
    ("cpc.py", ["--tiny", "--out", ""], "--out is empty"),
    ("cpc.py", ["--tiny", "--batch-size", "0"], "--batch-size 0 is not a positive multiple"),
    ("cpc.py", ["--tiny", "--warmup", "496"], "--warmup 496 is all of the 496 steps"),
    ("cpc.py", ["--tiny", "--arch", "resnet92"], "pass --stem 3x3"),
    ("cpc.py", ["--tiny", "--batch-size", "9000"], "4000 images, fewer than --batch-size 9000"),
    ("cpc.py", ["--tiny", "--direction", "4"], "unrecognized arguments"),
    ("cpc.py", ["--tiny", "--norm", "group"], "invalid choice: 'group'"),
    ("eval.py", ["--encoder", "/dev/null"], "/dev/null is damaged or not ours (EOFError): make it again with cpc.py"),
    ("eval.py", ["--encoder", "/dev/"], "/dev/ is a folder: pass /dev/encoder.pt"),
    ("eval.py", ["--encoder", "none.pt"], "no encoder at none.pt: run cpc.py first"),
    ("eval.py", ["--tiny", "--head", "none", "--supervised", "vgg"], "--supervised vgg is none of"),
    ("eval.py", ["--tiny", "--head", "none"], "--head none leaves nothing to train"),
    ("eval.py", ["--tiny", "--supervised", "--labels", "0", "--head", "none"], "--labels [0.0] is not between"),
    ("eval.py", ["--tiny", "--supervised", "--subset", ""], "--subset is empty"),
    ("eval.py", ["--tiny", "--supervised", "--data", ""], "--data is empty"),
    ("eval.py", ["--tiny", "--supervised", "--sweep", "4", "--held-out", "0"], "--sweep needs held-out images"),
    ("eval.py", ["--tiny", "--supervised", "patched"], "no encoder at runs/cpc/encoder.pt"),
    ("eval.py", ["--tiny", "--encoder", "torchvision:resnet19"], "torchvision has no such"),
    ("eval.py", ["--tiny", "--encoder", "torchvision:vit_b_16"], "no feature map"),
    ("eval.py", ["--tiny", "--encoder", "torchvision:resnet18:none.pth"], "no file none.pth"),
    ("eval.py", ["--tiny", "--supervised", "tiny", "tiny"], "each may be named once"),
    ("eval.py", ["--tiny", "--supervised", "--held-out", "0.0001"], "is none: raise it"),
    ("detect.py", [], "no encoder at runs/cpc/encoder.pt: run cpc.py first"),
    ("detect.py", ["--encoder", "random"], "takes its architecture from an encoder.pt"),
    ("detect.py", ["--encoder", "torchvision:vgg11"], "vgg11 has no feature map [B, D, h, w] called layer3"),
    ("detect.py", ["--encoder", "torchvision:resnet18"], "trainval.txt: pass --data DIR with VOCdevkit/VOC2007"),
    ("detect.py", ["--encoder", "torchvision:resnet18", "--side", "8"], "--side 8 is not between 32 and 10000"),
    ("detect.py", ["--detect", ""], "no detector at runs/detect/model.pt"),
    ("detect.py", ["--encoder", "torchvision:resnet18", "--data", ""], "--data is empty"),
])
def test_mistakes_get_one_line(script, flags, message, tmp_path, monkeypatch, capsys):
    module = {"cpc.py": cpc, "eval.py": evaluation, "detect.py": detect}[script]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        args = module.parse_args(flags)
        module.main(*([args] if script == "cpc.py" else args))
    code, printed = stop.value.code, capsys.readouterr()
    error = printed.err + (f"{code}\n" if isinstance(code, str) else "")  # Python prints a string and exits with 1
    assert message in error and code != 0 and len(error.splitlines()) == 1
    assert not printed.out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("script, flags, rank, code", [("eval.py", ["--labels", "2"], None, 2), ("cpc.py", ["--tiny"], "0", 1)])
def test_mistakes_at_the_terminal(script, flags, rank, code, tmp_path, monkeypatch):
    if rank:  # left behind by some launcher
        monkeypatch.setitem(ONE_THREAD, "RANK", rank)
    done = run(script, *flags, cwd=tmp_path)
    assert done.returncode == code and len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, expected", [
    (["--data", "/"], dict(arch="resnet161", norm="layer", directions=4, lengths=[2, 3], crop=240, patch=80,
                           stride=32, target_dim=64, hidden=256, emb_scale=0.1, batch_size=512)),
    (["--data", "/", "--preset", "v1"], dict(arch="resnet92", norm="none", directions=1, lengths=[2, 3, 4, 5],
                                             crop=256, patch=64, color_drop=0.0, image_aug="v1")),
    (["--tiny", "--lr", "0.1"], dict(arch="tiny", data="shapes", lr=0.1)),
    (["--arch", "tiny"], dict(tiny=True, data="shapes", patch=8)),
])
def test_presets(flags, expected):
    args = vars(cpc.parse_args(flags))
    assert {k: args[k] for k in expected} == expected


def test_flags_at_random():
    """Each combination is refused with one line, or its model takes its patches."""
    draw = random.Random(0)
    choices = {
        "--arch": ["tiny", "small"], "--norm": resnet.NORMS, "--stem": resnet.STEMS, "--directions": ["1", "2", "3", "4"],
        "--lengths": ["1", "2 3", "2 3 4", "5", "0", "-1", "2 2", "x"], "--crop": ["32", "40", "48", "0", "240"],
        "--patch": ["4", "8", "12", "16", "40", "1"], "--stride": ["4", "6", "8", "0", "-4", "1"],
        "--image-aug": ["inception", "v1"], "--min-area": ["0.1", "1", "0", "2"], "--color-drop": ["0", "1", "nan", "-1"],
        "--flip": ["0.5", "1.1"], "--batch-size": ["2", "0", "-2", "1.5"], "--hidden": ["8", "0"], "--target-dim": ["1", "0"],
        "--emb-scale": ["0.1", "0"], "--lr": ["1e-3", "0", "inf", "nan"], "--clip": ["0", "-1"], "--average": ["0", "1"],
        "--epochs": ["1", "0"], "--warmup": ["0", "-1"], "--save-every": ["1", "0"], "--seed": ["1", "-1"], "--preset": ["v1", "v3"]}
    accepted = refused = 0
    for _ in range(250):
        names = draw.sample(list(choices), draw.randint(1, 5))
        flags = ["--tiny", "--batch-size", "2", *(f for name in names for f in (name, *draw.choice(list(choices[name])).split()))]
        error = io.StringIO()
        try:
            with contextlib.redirect_stderr(error):
                args = cpc.parse_args(flags)
        except SystemExit as stop:
            assert stop.code == 2 and len(error.getvalue().splitlines()) == 1, (flags, error.getvalue())
            refused += 1
            continue
        G = data.grid_side(args.crop, args.patch, args.stride)
        with torch.device("meta"):
            encoder = resnet.Encoder(args.arch, args.norm, args.stem)
            shape = encoder.grid(torch.empty(2, G, G, 3, args.patch, args.patch)).shape
        model = cpc.CPC(encoder, args.directions, args.lengths, args.hidden, args.target_dim, args.emb_scale)
        assert shape == (2, encoder.out_channels, G, G) and (G > 12 or model.contrast(torch.randn(shape))[0].isfinite()), flags
        assert 0 <= resnet.learning_rate(1, 2, args.lr, args.warmup) <= args.lr, flags
        accepted += 1
    assert accepted > 25 and refused > 25


def documented_commands():
    """Every command of the README, the docstrings, `./run.sh`, `./run.sh results` and `./run.sh paper`."""
    printed = [subprocess.run([HERE / "run.sh", what], capture_output=True, text=True, check=True).stdout for what in ("results", "paper")]
    texts = [(HERE / f).read_text() for f in ("README.md", "run.sh", "cpc.py", "eval.py", "detect.py")] + printed
    lines = [line for text in texts for line in text.splitlines()]
    pattern = re.compile(r'\s*(?:"?\$?[\w./]*python"?|\S*torchrun [^#]*?) (cpc|eval|detect)\.py\b([^#]*)')
    return [(m[1], shlex.split(m[2])) for m in map(pattern.match, lines) if m]


def test_the_readme_names_what_there_is():
    names = re.findall(r"`(data|resnet|cpc|eval|detect)\.([\w.]+)", (HERE / "README.md").read_text())
    modules = {"data": data, "resnet": resnet, "cpc": cpc, "eval": evaluation, "detect": detect}
    assert len(names) > 25
    for module, name in names:
        if name != "py":
            operator.attrgetter(name)(modules[module])


def test_documented_commands_parse(trained):
    commands = documented_commands()
    assert len(commands) > 110 and {script for script, _ in commands} == {"cpc", "eval", "detect"}
    for script, flags in commands:
        if script == "cpc":
            cpc.parse_args(flags)
        else:
            {"eval": evaluation, "detect": detect}[script].parse_args([*flags, "--encoder", str(trained / "encoder.pt")])


if __name__ == "__main__":
    check_two_processes(*sys.argv[1:]) if len(sys.argv) == 4 else check_kills(int(sys.argv[1]), Path(sys.argv[2]))
