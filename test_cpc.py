"""What the paper claims and what the README promises, each as a test that can fail.

    pytest test_cpc.py                       # two CPU cores, about two minutes
    python test_cpc.py 20 runs/kills         # each script killed 20 times: the same bits?

Sections follow the pipeline: encoder, patches and data, objective, probe, few labels, detection, a
run's folder, devices and processes, whole commands.
"""

import contextlib
import copy
import errno
import io
import json
import math
import operator
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import zipfile
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are of a CPU, also where GPUs are

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torch.utils.data import Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models
from torchvision.transforms.v2.functional import (center_crop, normalize, resize,
                                                  rgb_to_grayscale, to_pil_image)

import cpc
import data
import detect
import eval as evaluation
import resnet

HERE = Path(__file__).parent
CPU = torch.device("cpu")


@pytest.fixture(scope="session", autouse=True)
def session(request):
    """A world of one process and one thread. Whole commands begin at once, if a test wants one."""
    data.start_process(Namespace(batch_size=1, bf16=False))
    torch.set_num_threads(1)
    if any("commands" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("commands")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- Encoder ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch, norm, millions", [
    ("resnet161", "none", 303.4), ("resnet161", "layer", 303.6), ("resnet161", "batch", 303.6),
    ("resnet92", "none", 27.49), ("resnet92", "layer", 27.53),
    ("resnet161-narrow", "none", 53.2), ("resnet92-wide", "none", 152.6),
    ("resnet50", "batch", 23.50), ("resnet101", "batch", 42.49), ("resnet152", "batch", 58.14)])
def test_parameter_counts(arch, norm, millions):
    """Sec. 4.1, Fig. 4 and A.4, against counts made independently of this code."""
    with torch.device("meta"):
        encoder = resnet.Encoder(arch, norm)
    count = sum(p.numel() for p in encoder.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.06 if millions > 50 else 0.006)


def test_context_network_parameters():
    with torch.device("meta"):
        count = sum(p.numel() for p in cpc.PixelCNN(4096).parameters())
    assert count / 1e6 == pytest.approx(12.15, abs=0.005)  # A.2 at D = 4096
    assert cpc.PixelCNN(8, 4)(torch.randn(2, 8, 5, 5)).min() == 0  # it ends in a ReLU


@pytest.mark.parametrize("stem, patch, side", [
    ("7x7", 80, 5), ("7x7", 64, 4), ("3x3", 8, 2), ("3x3", 16, 4)])
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


def test_layer_norm_is_that_of_one_group():
    """Statistics over (C, H, W), a scale and bias for each channel; autocast keeps bfloat16."""
    norm, x = resnet.LayerNorm(8), 3 * torch.randn(2, 8, 3, 3, generator=generator()) + 1
    norm.weight.data.uniform_(0.5, 2, generator=generator())
    norm.bias.data.normal_(generator=generator())
    expected = F.group_norm(x, 1, norm.weight, norm.bias)
    assert torch.allclose(norm(x), expected, atol=1e-5)
    ours, theirs = (torch.autograd.grad(y.square().sum(), norm.parameters())
                    for y in (norm(x), expected))
    assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(ours, theirs))
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x.bfloat16())
    assert y.dtype == torch.bfloat16 and torch.allclose(y.float(), expected, atol=0.1)


def test_a_1x1_convolution_is_a_matrix_product():
    conv, x = resnet.Conv1x1(6, 4), torch.randn(2, 6, 3, 5)
    assert torch.allclose(conv(x), F.conv2d(x, conv.weight, conv.bias), atol=1e-5)
    # one product, not one for each row of a strided map, each with its own copy of the weight
    conv.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        conv(x[:, :, ::2, ::2])
    assert list(counter.flop_counts["Global"]) == [torch.ops.aten.addmm]


def test_no_norm_stays_finite_at_full_depth():
    """53 blocks without normalisation: the latents keep the order of the input."""
    torch.manual_seed(0)
    encoder = resnet.Encoder("resnet161-narrow", "none")
    with torch.no_grad():
        latents = encoder(torch.randn(2, 3, 64, 64))
    assert 0.05 < latents.std() < 20
    conv = encoder.blocks[-1].conv1  # begun as torchvision's are, by what a layer gives
    assert conv.weight.std().item() == pytest.approx((2 / conv.out_channels) ** 0.5, rel=0.05)


def test_checkpointing_changes_no_gradient(monkeypatch):
    """Each of the three blocks is recomputed, and that is all."""
    patches, gradients, calls, checkpoint = torch.randn(4, 3, 8, 8), [], [], resnet.checkpoint
    monkeypatch.setattr(resnet, "checkpoint",
                        lambda *args, **rest: calls.append(args) or checkpoint(*args, **rest))
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
    geometry = dict(crop=32, patch=8, stride=6)
    resnet.save_encoder(path, encoder, geometry | {"trained": dict(data="shapes")})
    loaded, file = resnet.load_encoder(path)
    patches = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded(patches), encoder(patches)) and not loaded.training
    assert (file["crop"], file["patch"], file["stride"]) == (32, 8, 6)
    assert file["trained"] == dict(data="shapes")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SystemExit, match="damaged"):
        resnet.load_encoder(path)
    with pytest.raises(SystemExit, match="no encoder at"):
        resnet.load_encoder(tmp_path / "none.pt")
    for content, message in (({"state": {}}, "is damaged or no encoder"), ([], "is damaged or no"),
                             ({"kind": "detector"}, "no encoder of ours, but a detector")):
        torch.save(content, path)
        with pytest.raises(SystemExit, match=message):
            resnet.load_encoder(path)


def test_a_full_disk_leaves_the_good_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    resnet.save_file({"kind": "checkpoint", "step": 1}, path)

    def full(contents, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit, match="the old one is kept: .*No space left on device"):
        resnet.save_file({"kind": "checkpoint", "step": 2}, path)
    assert resnet.load_file(path, "checkpoint")["step"] == 1 and len(list(tmp_path.iterdir())) == 1


class Malice:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_pickle_is_executed(tmp_path):
    """Whatever file is read: an encoder, a checkpoint, a detector, torchvision's weights."""
    made, detection = tmp_path / "made", tmp_path / "detection"
    file = detection / "cpc" / "model.pt"
    file.parent.mkdir(parents=True)
    torch.save({"kind": "encoder", "state": Malice(made)}, file)
    shutil.copy(file, tmp_path / "checkpoint.pt")
    done = {"cpc/frozen": {}}  # a detection that has trained a detector
    resnet.save_file({"kind": "checkpoint", "done": done}, detection / "checkpoint.pt")
    readers = (lambda: resnet.load_encoder(file), lambda: make_run(tmp_path),
               lambda: detect.detect_one(Namespace(out=detection, detect="photo.jpg")),
               lambda: resnet.TorchvisionResNet("resnet18", str(file)))
    for read in readers:
        with pytest.raises((SystemExit, UnpicklingError), match="is damaged or no|Weights only"):
            read()
    assert not made.exists()
    torch.load(file, weights_only=False)
    assert made.exists()  # it would have


@pytest.mark.parametrize("stacks, channels, side", [(4, 512, 2), (3, 256, 4)])
def test_torchvision_resnets_are_encoders_too(stacks, channels, side, tmp_path):
    """Table 2 does it for BigBiGAN and AMDIM: any [B, D, h, w] grid in CPC's place."""
    torch.manual_seed(0)
    model, weights = models.resnet18(), tmp_path / "weights.pth"
    torch.save(model.state_dict(), weights)
    ours = resnet.TorchvisionResNet("resnet18", str(weights), stacks).eval()
    x = torch.randn(2, 3, 64, 64, generator=generator())
    grid = ours.features(x)
    assert grid.shape == (2, channels, side, side) and ours.out_channels == channels
    assert ours.stride == 64 // side
    if stacks == 4:  # its own pooled features and classifier
        assert torch.allclose(model.eval()(x), model.fc(grid.mean((2, 3))), atol=1e-4)
    model.fc = nn.Identity()  # so other self-supervised methods save a backbone
    torch.save(model.state_dict(), weights)
    backbone = resnet.TorchvisionResNet("resnet18", str(weights), stacks).eval()
    assert torch.equal(backbone.features(x), grid)
    (source,), _ = resnet.find_encoders([f"torchvision:resnet18:{weights}"], stacks)
    assert torch.equal(source.make(1).eval().features(x), grid)  # by its name on --encoder


# ---- Patches and data ----------------------------------------------------------------------------


@pytest.mark.parametrize("crop, patch, stride, G", [
    (240, 80, 32, 6), (256, 64, 32, 7), (32, 8, 6, 5)])
def test_patches_equal_naive_slicing(crop, patch, stride, G):
    images = torch.randint(0, 256, (2, 3, crop, crop), dtype=torch.uint8, generator=generator())
    patches = data.extract_patches(images, patch, stride)
    assert patches.shape == (2, G, G, 3, patch, patch)
    for b in range(2):
        for i in range(G):
            for j in range(G):
                y, x = i * stride, j * stride
                assert torch.equal(patches[b, i, j], images[b, :, y:y + patch, x:x + patch])
    plain = data.to_patches(images, CPU, patch, stride)
    images01 = normalize(images / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert torch.allclose(plain, data.extract_patches(images01, patch, stride), atol=1e-5)
    assert torch.equal(data.to_patches(images, CPU, patch, stride, seed=0), plain)
    again = images.contiguous(memory_format=torch.channels_last)  # in whichever layout images come
    seen = [data.to_patches(x, CPU, patch, stride, 0, color_drop=0.5, jitter=True)
            for x in (images, again)]
    assert torch.equal(*seen)


def same_patches(n, **augmentation):
    """(one random patch; what augmentation makes of n*3*3 copies of it, [n*9, 3, 16, 16])"""
    patch = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=generator())
    images = patch.repeat(n, 1, 3, 3)  # side by side, none overlaps another
    patches = data.to_patches(images, CPU, 16, 16, seed=0, **augmentation)
    return data.normalise(patch), patches.flatten(0, 2)


def test_color_dropping():
    """Sec. 4.1: two of three channels dropped, independently for each patch; Doersch et al. 2015:
    noise of 1/100 of the remaining channel's deviation in their place."""
    plain, out = same_patches(100, color_drop=0.4)
    kept = (out == plain).all((2, 3))  # [900, 3]
    assert set(kept.sum(1).tolist()) == {1, 3}
    dropped = kept.sum(1) == 1
    assert dropped.float().mean() == pytest.approx(0.4, abs=0.05)
    shares = kept[dropped].float().mean(0)
    assert torch.allclose(shares, torch.full((3,), 1 / 3), atol=0.08)  # any channel may stay
    for one in dropped.nonzero()[:20, 0]:
        deviation = plain[kept[one]].std(correction=0).item()
        noise = out[one][~kept[one]]
        assert noise.std().item() == pytest.approx(0.01 * deviation, rel=0.2)
        assert noise.mean().abs() < 0.01
        assert not torch.equal(*noise)  # each channel's is its own
    grid = dropped.view(100, 9).float()  # one patch says nothing of its neighbour
    assert torch.corrcoef(grid.T).fill_diagonal_(0).abs().max() < 0.4


def test_jitter_shifts_each_patch_on_its_own():
    plain, out = same_patches(20, jitter=True)
    side, shifts = 15, []  # 60/64 of 16
    for patch in out:
        found = [(y, x) for y in range(2) for x in range(2)
                 if torch.equal(patch[:, :side, :side], plain[:, y:y + side, x:x + side])]
        assert len(found) == 1  # and the border repeats its last row and column
        assert torch.equal(patch[:, side], patch[:, side - 1])
        assert torch.equal(patch[:, :, side], patch[:, :, side - 1])
        shifts += found
    assert len(set(shifts)) == 4 and max(map(shifts.count, set(shifts))) < 0.4 * len(shifts)


def test_flips_each_patch_on_its_own():
    plain, out = same_patches(100, flip=0.3)
    flipped = (out == plain.flip(-1)).all(3).all(2).all(1)
    assert ((out == plain).all(3).all(2).all(1) | flipped).all()
    assert flipped.float().mean() == pytest.approx(0.3, abs=0.05)
    grid = flipped.view(100, 9).float()  # one patch says nothing of its neighbour
    assert torch.corrcoef(grid.T).fill_diagonal_(0).abs().max() < 0.4


def epoch_of(workers, seed=0, start=0):
    batches = data.train_batches(40, 8, seed, start, 10)  # two epochs of 5 steps
    transform = data.image_transform("inception", 32)
    loader = data.load_batches(data.Shapes("train"), transform, batches, workers)
    return [images for images, _ in loader]


def test_v1_is_grey():
    """CPC v1 saw grey images: the transform of its pre-training, and those of its evaluation."""
    image = torch.randint(0, 256, (3, 60, 70), dtype=torch.uint8, generator=generator())
    for kind, grey in (("v1", False), ("inception", True), ("test", True), ("inception", False)):
        made, _ = data.image_transform(kind, 32, grey=grey)(image, 0)
        assert made.shape == (3, 32, 32) and made.dtype == torch.uint8
        channels_agree = torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])
        assert channels_agree == (grey or kind == "v1")


def test_batches_do_not_depend_on_workers_but_on_the_epoch_and_the_seed():
    alone = epoch_of(0)
    assert all(torch.equal(a, b) for a, b in zip(alone, epoch_of(2), strict=True))
    later = epoch_of(0, start=7)  # continued
    assert all(torch.equal(a, b) for a, b in zip(alone[7:], later, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(alone[:5], alone[5:]))
    assert not torch.equal(alone[0], epoch_of(0, seed=1)[0])


def test_every_image_once_an_epoch(monkeypatch):
    """By one process, or by two that share each batch and the test images."""
    batches = list(data.train_batches(40, 8, 0, 0, 10))
    first, second = ([key for batch in half for key in batch]
                     for half in (batches[:5], batches[5:]))
    for epoch in (first, second):
        assert sorted(i for i, _ in epoch) == list(range(40))
    assert [i for i, _ in first] != [i for i, _ in second]
    assert len({seed for _, seed in first + second}) == 80  # no two images augmented alike, ever
    assert [i for batch in data.test_batches(10, 4) for i, _ in batch] == list(range(10))
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        assert list(data.train_batches(40, 8, 0, 0, 10)) == [batch[rank::2] for batch in batches]
        tested = [i for batch in data.test_batches(11, 4) for i, _ in batch]
        assert tested == list(range(rank, 11, 2))


def test_shapes_is_a_function_of_seed_and_index():
    a, b = data.Shapes("train"), data.Shapes("train")
    assert torch.equal(a[17][0], b[17][0])
    assert not torch.equal(a[17][0], data.Shapes("test")[17][0])
    assert not torch.equal(a[17][0], data.Shapes("train", seed=1)[17][0])
    images = torch.stack([a[i][0] for i in range(100)]).float()
    assert images.mean().item() == pytest.approx(127.18, rel=1e-3)  # what it always was
    assert images.diff(dim=3).abs().mean().item() == pytest.approx(17.069, rel=1e-3)


def test_each_split_is_its_own(monkeypatch):
    """Of what is made or downloaded, too: a test set is no training set."""
    splits, asked = ("pretrain", "train", "test"), []
    assert [data.load_dataset("shapes", s, 32).split for s in splits] == ["train", "train", "test"]

    def download(dataset, root, *which):
        asked.append(which)
        return Namespace(labels=torch.zeros(1))

    monkeypatch.setattr(data, "download", download)
    for name in ("cifar10", "stl10"):
        for split in splits:
            data.load_dataset(name, split, 32)
    for split in ("train", "test"):
        assert detect.load_objects("shapes", split, 32).split == split
        detect.load_objects("voc2007", split, 32)
    assert asked == [(True,), (True,), (False,), ("unlabeled",), ("train",), ("test",),
                     ("2007", "trainval"), ("2007", "test")]


@pytest.mark.parametrize("size", [32, 96])
def test_shapes_boxes(size):
    """Two to four boxes in an image, inside it, tight around what differs from the background."""
    shapes = data.Shapes("train", size)
    counts = set()
    for index in range(60):
        boxes = shapes.boxes(index)
        counts.add(len(boxes))
        assert (boxes >= 0).all() and (boxes <= size).all()
        sides = boxes[:, 2:] - boxes[:, :2]
        assert (sides >= 0.25 * size).all() and (sides <= 0.63 * size).all()
        masks = shapes._masks(*shapes._random(index)).any(0)
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
        shapes = data.Shapes(split)
        items = [shapes[i] for i in range(n)]
        return torch.stack([x for x, _ in items]).float() / 255, torch.tensor([y for _, y in items])
    (x, y), (test_x, test_y) = load("train", 2000), load("test", 1000)
    features = {
        "pixels": lambda x: x.flatten(1),
        "colours": lambda x: torch.cat((x.mean((2, 3)), x.std((2, 3))), 1)}
    for name, feature in features.items():
        a, b = feature(x), feature(test_x)
        mean, std = a.mean(0), a.std(0)
        a, b = (a - mean) / std, (b - mean) / std
        # ridge regression to one-hot labels, in closed form
        gram = a.T @ a + 100 * torch.eye(a.shape[1])
        weights = torch.linalg.solve(gram, a.T @ (F.one_hot(y) - 0.1))
        accuracy = ((b @ weights).argmax(1) == test_y).float().mean()
        assert accuracy < 0.22, name


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """train/, test/ and unlabelled/, in the sizes and colour modes that folders have."""
    root = tmp_path_factory.mktemp("photos")
    for split, n in (("train", 40), ("test", 11), ("unlabelled", 4)):
        shapes = data.Shapes("test" if split == "test" else "train")
        for i in range(n):
            place = root / split / f"class {i % 2}"
            place.mkdir(parents=True, exist_ok=True)
            image = to_pil_image(shapes[i][0]).resize((40 + i, 36))
            name = f"{split} {i}.{'jpg' if i % 3 else 'png'}"
            image.convert({3: "L", 6: "RGBA"}.get(i, "RGB")).save(place / name)
    return root


def test_folders(folder, tmp_path):
    assert len(data.load_dataset(str(folder), "pretrain", 32)) == 44  # train/ and unlabelled/
    train, test = (data.load_dataset(str(folder), split, 32) for split in ("train", "test"))
    assert train.classes == test.classes == ["class 0", "class 1"] and len(test) == 11
    one_class = str(folder / "train" / "class 0")
    assert len(data.load_dataset(one_class, "pretrain", 32)) == 20  # any folder of images
    imagenet = tmp_path / "imagenet"  # whose test/ has no labels
    (imagenet / "test").mkdir(parents=True)
    (imagenet / "val").symlink_to(folder / "test")
    assert len(data.load_dataset(str(imagenet), "test", 32)) == 11
    transform = data.image_transform("test", 32)
    for image, _ in train:
        assert transform(image).shape == (3, 32, 32) and transform(image).dtype == torch.uint8
    empty = tmp_path / "empty"
    empty.mkdir()
    for name, split, message in [("nowhere", "pretrain", "no folder nowhere"),
                                 (str(empty), "pretrain", "lacks images"),
                                 (str(empty), "train", "lacks images.*train"),
                                 (one_class, "train", "lacks images.*train")]:
        with pytest.raises(SystemExit, match=message):
            data.load_dataset(name, split, 32)
    (empty / "train" / "none").mkdir(parents=True)
    with pytest.raises(SystemExit, match="no valid file for the classes none"):
        data.load_dataset(str(empty), "train", 32)


def test_unreadable_images_are_named_and_skipped_in_training_alone(tmp_path, capfd):
    (tmp_path / "train").mkdir()
    for i in range(120):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "train" / f"{i:03d}.png")
    images = data.load_dataset(str(tmp_path), "pretrain", 8)
    transform = data.image_transform("test", 8)

    def load(batches, workers=0, skip=True):
        loader = data.load_batches(images, transform, batches, workers, skip)
        return torch.cat([x for x, _ in loader])[:, 0, 0, 0].tolist()

    whole = (tmp_path / "train" / "006.png").read_bytes()
    (tmp_path / "train" / "007.png").write_bytes(whole[:45])  # truncated
    expected = sorted(2 * [8 if i == 7 else i for i in range(120)])
    assert sorted(load(data.train_batches(120, 40, 0, 0, 6))) == expected
    skipped = capfd.readouterr().err.splitlines()
    assert len(skipped) == 2 and all("007.png cannot be read" in line for line in skipped)
    for workers in (0, 1):
        with pytest.raises(OSError, match="007.png cannot be read"):
            load(data.test_batches(120, 40), workers, skip=False)
    data.end_workers()  # as at a script's end
    for i in range(20, 30):
        (tmp_path / "train" / f"{i:03d}.png").write_bytes(b"")
    assert data.Seeded(images, transform, skip=True)[21, 0][0][0, 0, 0] == 30
    with pytest.raises(OSError, match="029.png cannot be read"):  # ten in a row
        data.Seeded(images, transform, skip=True)[20, 0]


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
                seen = context[0, :, i, j].sum()
                gradient, = torch.autograd.grad(seen, latents, retain_graph=True)
                expected = (rows <= i) & (rows >= i - 5) & ((cols - j).abs() <= 5)
                assert torch.equal(gradient[0].sum(0) != 0, expected), (i, j)


@pytest.mark.parametrize("ways", [["down"], ["down", "up"], ["down", "left", "up", "right"]])
def test_each_direction_looks_its_own_way(ways):
    """In the image's own coordinates: a prediction from a row sees it and all before it, on the
    way that it looks; a target its own row alone."""
    G, outputs = 6, []
    model = cpc.CPC(resnet.Encoder("tiny"), len(ways), hidden=4)
    latents = torch.rand(1, 256, G, G, dtype=torch.float64, requires_grad=True)
    model.encoder.grid = lambda patches: latents
    for direction in model.directions:
        alive(direction).register_forward_hook(lambda *call: outputs.append(call[-1]))
    model(None)
    rows, cols = torch.arange(G).view(-1, 1).expand(G, G), torch.arange(G).expand(G, G)
    seen = {"down": lambda i: rows <= i, "left": lambda i: cols >= G - 1 - i,
            "up": lambda i: rows >= G - 1 - i, "right": lambda i: cols <= i}
    for way, (targets, predictions) in zip(ways, outputs, strict=True):
        before = torch.zeros(G, G, dtype=torch.bool)
        for i in range(G):
            now = seen[way](i)
            for output, expected in ((predictions[2], now), (targets, now & ~before)):
                gradient, = torch.autograd.grad(output[0, :, i].sum(), latents, retain_graph=True)
                assert torch.equal(gradient[0].sum(0) != 0, expected), (way, i)
            before = now


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
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    shapes = data.Shapes("train")
    images = torch.stack([shapes[i][0] for i in range(2)])
    patches = data.to_patches(images, CPU, 8, 6)
    for _ in range(30):
        loss, accuracy = model(patches)
        data.update(loss, optimizer, model.parameters(), 1.0)
    assert loss < 0.25 * math.log(50) and accuracy > 0.8


def test_emb_scale_is_of_predictions_alone():
    """A.2: `preds_ik` is scaled by emb_scale, the targets are not."""
    torch.manual_seed(0)
    direction, latents = cpc.Direction(8, 4, 4, 1.0, [2]), torch.randn(2, 8, 5, 5)
    targets, predictions = direction(latents)
    direction.emb_scale = 0.1
    again, scaled = direction(latents)
    assert torch.equal(again, targets)
    assert torch.allclose(scaled[2], 0.1 * predictions[2])


def test_the_retrieval_picture_shows_what_it_says():
    """Dark what was not seen; the patch two rows further down; then the best-ranked, here it."""
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=generator())
    targets = torch.eye(50).view(2, 5, 5, 50).permute(0, 3, 1, 2)  # no two alike
    model = Namespace(eval=lambda: None, encoder=Namespace(grid=lambda patches: None),
                      directions=[lambda latents: (targets, {2: targets.roll(-2, 2)})])
    args = Namespace(patch=8, stride=6, crop=32, lengths=[2, 3])
    tiles, images = cpc.rank_patches(model, images, args), images / 255
    for b in range(2):
        shown, true, best = tiles[7 * b:7 * b + 3]
        assert torch.equal(shown[:, :14], images[b, :, :14])  # rows 0 and 1 of the grid
        assert torch.equal(shown[:, 14:], images[b, :, 14:] * 0.25)
        assert torch.equal(true[:, ::4, ::4], images[b, :, 18:26, 6 * b:6 * b + 8])
        assert torch.equal(true, best)


def test_learning_rate():
    rates = [data.learning_rate(step, 100, 2.0, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[10] == 2.0 and rates[-1] < 0.01
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    for steps in range(1, 13):  # the shortest schedules learn too
        rates = [data.learning_rate(step, steps, 1.0, steps // 10) for step in range(steps)]
        assert all(0 < rate <= 1 for rate in rates)


def test_update():
    """A step's gradient is its own, clipped to `clip`; its norm is told from before."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], 1.0)
    for _ in range(2):
        assert data.update(weight @ torch.tensor([3.0, 4.0]), optimizer, [weight], 1.0) == 5
    assert torch.allclose(weight, torch.tensor([-1.2, -1.6]))


def test_the_average_leaves_its_random_start_behind():
    """After 50 steps an average of decay 0.9999 is near the weights, not near where they began."""
    torch.manual_seed(0)
    model = nn.Linear(50, 50)
    average, begin = copy.deepcopy(model), model.weight.detach().clone()
    for step in range(50):
        model.weight.data += 1
        cpc.update_average(average, model, 0.9999, step)

    def moved():
        return ((average.weight - begin).mean() / (model.weight - begin).mean()).item()

    assert 0.75 < moved() < 0.95
    before = moved()
    cpc.update_average(average, model, 0.9999, 10**9)
    assert moved() == pytest.approx(before, abs=1e-3)  # in the end the decay is what was asked for


# ---- Linear probe -------------------------------------------------------------------------------


def test_probe_is_a3():
    """Batch norm without scale; pooling the logits equals pooling the features (Sec. 2.2)."""
    probe = evaluation.LinearProbe(6, 4)
    z = torch.randn(5, 6, 3, 3) * 3 + 1
    trained = [p.numel() for p in probe.parameters() if p.requires_grad]
    assert sum(trained) == 6 + 6 * 4 + 4  # no scale
    variance = z.var((0, 2, 3), keepdim=True, correction=0)
    normalised = (z - z.mean((0, 2, 3), keepdim=True)) / (variance + 1e-5).sqrt()
    pooled = normalised.mean((2, 3)) @ probe.conv.weight.flatten(1).T + probe.conv.bias
    assert torch.allclose(probe(z), pooled, atol=1e-5)


def test_logits_are_float32():
    """Also where all else is bfloat16: a thousand of its logits tie, and top-5 is then luck."""
    latents = torch.randn(16, 64, 3, 3)
    for head in (evaluation.LinearProbe(64, 1000), evaluation.PooledLinear(64, 1000, 0.0)):
        logits = head(latents)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(head(latents), logits) and logits.dtype == torch.float32


@pytest.mark.parametrize("grey", [False, True])
def test_nothing_is_augmented_in_a_test(encoder_file, grey):
    """Sec. 2.2: "none at test time", "a single crop": the middle; of CPC v1's images in grey."""
    task, seen = make_task(encoder_file), []
    task.row.metadata["trained"]["image_aug"] = "v1" if grey else "inception"

    class Spy(nn.Module):
        def forward(self, patches):
            seen.append(patches)
            return torch.zeros(len(patches), 10)

    task.accuracy(Spy(), task.test)
    images = center_crop(resize(torch.stack([x for x, _ in task.test]), [37]), [32])
    images = rgb_to_grayscale(images, 3) if grey else images
    assert torch.equal(torch.cat(seen), data.to_patches(images, CPU, 8, 6))


def test_drop_out_is_of_training_alone():
    """A.4: before the last layer."""
    head, latents = evaluation.PooledLinear(64, 10, 0.5), torch.ones(1, 64, 2, 2)
    assert not torch.equal(head(latents), head(latents))
    head.eval()
    assert torch.equal(head(latents), head(latents))


def test_drop_out_is_drawn_anew_in_every_step(encoder_file, tmp_path, monkeypatch):
    """Also in the steps after held-out images were tested."""
    masks, dropout = [], F.dropout

    def recorded(x, p, training):
        x = dropout(x, p, training)
        if training:
            masks.append((x == 0).numpy().tobytes())
        return x

    monkeypatch.setattr(F, "dropout", recorded)
    task = make_task(encoder_file, "--head", "none", "--supervised", "tiny")
    evaluation.classify(task, RECIPE | dict(dropout=0.5), make_run(tmp_path / "run"))
    assert len(masks) == len(set(masks)) == 12


def test_count_correct():
    logits, labels = torch.randn(50, 8, generator=generator()), torch.arange(50) % 8
    order = [sorted(range(8), key=lambda c: -row[c]) for row in logits.tolist()]
    top1 = sum(o[0] == y for o, y in zip(order, labels.tolist()))
    top5 = sum(y in o[:5] for o, y in zip(order, labels.tolist()))
    assert evaluation.count_correct(logits, labels).tolist() == [top1, top5]
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
    names, path = data.names_of(train), tmp_path / "list.txt"
    assert len(set(names)) == 40 and names.index("class 0/train 2.jpg") < 20
    path.write_text("\n".join([*names[:20], *(name.split("/")[1] for name in names[10:30]), ""]))
    assert data.read_subset(path, train) == list(range(30))
    (_, chosen, held), = evaluation.choose_labels(Namespace(subset=path, held_out=0.2), train, 0)
    assert chosen == list(range(30)) and len(held) == 2 and min(held) >= 30
    for bad in ("../../secret.jpg", ""):
        path.write_text(bad)
        with pytest.raises(SystemExit, match="name no training image .CLASS/NAME"):
            data.read_subset(path, train)


def test_resnet_head():
    """Sec. 2.2's 11 blocks, 4096 channels, 1024 in the bottleneck: 196.1 M, without norms."""
    with torch.device("meta"):
        head = evaluation.resnet_head(4096, 1000)
    convolutions = [m for m in head.modules() if isinstance(m, nn.Conv2d)]
    millions = sum(p.numel() for m in convolutions for p in m.parameters()) / 1e6
    assert millions == pytest.approx(196.1, abs=0.05)
    assert sum(isinstance(m, resnet.Bottleneck) for m in head.modules()) == 11
    assert head[-1].weight.shape == (1000, 4096)
    assert not any(isinstance(m, resnet.LayerNorm) for m in head.modules())


@pytest.fixture
def encoder_file(tmp_path, request):
    """An untrained encoder.pt as cpc.py writes it."""
    torch.manual_seed(0)
    encoder = resnet.Encoder("tiny", getattr(request, "param", "layer"))
    trained = dict(data="shapes", color_drop=0.5, jitter=True, flip=0.0, min_area=0.6,
                   image_aug="inception")
    geometry = dict(crop=32, patch=8, stride=6)
    resnet.save_encoder(tmp_path / "encoder.pt", encoder, geometry | {"trained": trained})
    return tmp_path / "encoder.pt"


def parse_eval(*flags):
    return evaluation.parse_args([*map(str, flags), "--workers", "0", "--batch-size", "8",
                                  "--no-bf16"])


def make_task(encoder, *flags, held_out=20, labels=0.1):
    args = parse_eval("--encoder", encoder, *flags)
    shapes, test = data.Shapes("train"), data.Shapes("test")
    (row,) = args.rows
    return evaluation.Task(args, row, labels, 0, Subset(shapes, range(24)),
                           Subset(shapes, range(100, 100 + held_out)), Subset(test, range(20)),
                           CPU)


def make_run(folder, **flags):
    return data.Run(Namespace(out=str(folder), save_every=10, **flags), ["an image"])


RECIPE = dict(epochs=4, min_steps=0, batch_size=8, lr=0.05, weight_decay=1e-3, dropout=0.0)


def classify(task, folder):
    """One task: its results."""
    run = make_run(folder)
    evaluation.classify(task, RECIPE, run)
    return list(run.done.values())


@pytest.fixture
def drawn(monkeypatch):
    """A list that fills: (image, seed) of every training image, and the seeds of patches."""
    keys, train_batches, to_patches = [], data.train_batches, data.to_patches

    def batches(*args):
        for batch in train_batches(*args):
            keys.extend(batch)
            yield batch

    def patches(images, device, patch, stride, seed=None, **augmentation):
        keys.extend([] if seed is None else [seed])
        return to_patches(images, device, patch, stride, seed, **augmentation)

    monkeypatch.setattr(data, "train_batches", batches)
    monkeypatch.setattr(data, "to_patches", patches)
    return keys


@pytest.mark.parametrize("encoder_file", ["layer", "batch"], indirect=True)
def test_frozen_then_fine_tuned(encoder_file, tmp_path, monkeypatch, drawn):
    """Sec. 2.2: frozen is bit-identical, batch norm's statistics included; fine-tuning starts from
    both solutions, moves the encoder, at a smaller rate, and on images augmented anew."""
    seen, fit = [], evaluation.fit

    def spy(task, model, recipe, *rest):
        before = copy.deepcopy(model.state_dict())
        result = fit(task, model, recipe, *rest)
        seen.append((model.frozen, recipe["lr"], before, copy.deepcopy(model.state_dict())))
        return result

    monkeypatch.setattr(evaluation, "fit", spy)
    results = classify(make_task(encoder_file, "--labels", "0.1", held_out=0), tmp_path / "run")
    (frozen, lr, start, solution), (frozen2, lr2, start2, end) = seen

    def equal(a, b, part):
        return {torch.equal(a[k], b[k]) for k in a if k.startswith(part)}

    assert frozen and not frozen2 and lr2 < lr
    assert len(drawn) > 48 and len(set(drawn)) == len(drawn)
    assert equal(start, solution, "encoder.") == {True}
    assert False in equal(start, solution, "head.")
    assert equal(solution, start2, "") == {True}
    assert False in equal(start2, end, "encoder.")
    mean = "encoder.final_norm.running_mean"
    assert mean not in end or not torch.equal(start2[mean], end[mean])
    assert [(r["stage"], r["head"], r["labelled_images"]) for r in results] == [
        ("frozen", "resnet", 24), ("finetuned", "resnet", 24)]


def test_fine_tuning_that_only_harms_is_undone(encoder_file, tmp_path, monkeypatch):
    """Early stopping may stop at once: the state that fine-tuning starts from counts as well."""
    task, states = make_task(encoder_file, "--labels", "0.1"), []

    def accuracy(model, images, skip=False):
        states.append((images is task.test, copy.deepcopy(model.state_dict())))
        return (90.0 if model.frozen else 0.0), 0.0

    monkeypatch.setattr(task, "accuracy", accuracy)
    results = classify(task, tmp_path / "run")
    fixed, undone = (state for test, state in states if test)
    _, moved = states[-2]
    assert all(torch.equal(fixed[k], v) for k, v in undone.items())
    assert any(not torch.equal(fixed[k], moved[k]) for k in fixed)  # it had moved away
    assert results[-1]["stage"] == "finetuned" and results[-1]["held_out_top1"] == 90


def test_fine_tuning_continues_from_the_solution(encoder_file, tmp_path, monkeypatch):
    """Killed between the stages: the second one has the first one's head and held-out score."""
    task, begun = make_task(encoder_file, "--labels", "0.1"), []

    def fit(task, model, recipe, stage, key, run, start_top1=None):
        begun.append((stage, start_top1, copy.deepcopy(model.head.state_dict())))
        if stage == "finetuned":
            raise KeyboardInterrupt
        model.head[-1].bias.data += 1
        return 40.0

    monkeypatch.setattr(evaluation, "fit", fit)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            classify(task, tmp_path / "run")
    _, (*first, solution), (*again, loaded) = begun
    assert first == again == ["finetuned", 40.0]
    assert all(torch.equal(loaded[name], value) for name, value in solution.items())


def test_frozen_is_checked(encoder_file, tmp_path, monkeypatch):
    task = make_task(encoder_file, "--labels", "0.1")

    def fit(task, model, *rest):
        model.encoder.state_dict()["final_norm.bias"][0] += 1e-3

    monkeypatch.setattr(evaluation, "fit", fit)
    with pytest.raises(AssertionError, match="final_norm.bias"):
        classify(task, tmp_path / "run")


def test_early_stopping_restores_the_best_state(encoder_file, tmp_path, monkeypatch):
    task, states = make_task(encoder_file, "--head", "linear", "--held-out", "0.1"), []
    scores = [10, 40, 20, 70, 30, 70, 5, 5, 5, 5]

    def accuracy(model, images, skip=False):
        states.append(copy.deepcopy(model.head.state_dict()))
        assert images is (task.held_out if len(states) <= 10 else task.test)
        return (0.0 if images is task.test else scores[len(states) - 1]), 0.0

    monkeypatch.setattr(task, "accuracy", accuracy)
    results = classify(task, tmp_path / "run")
    assert len(states) == 11 and results[-1]["held_out_top1"] == 70
    assert all(torch.equal(a, b) for a, b in zip(states[10].values(), states[3].values()))
    assert not torch.equal(states[10]["conv.weight"], states[9]["conv.weight"])


def test_what_each_row_trains_with(encoder_file):
    """Sec. 2.2: the probe has the pre-training's augmentation, jitter included; efficient
    classification Inception's, with its colours, and colour dropping; A.4 Inception's alone."""
    def augmentation(*flags):
        args = parse_eval("--encoder", encoder_file, *flags)
        (row,) = args.rows
        transform, patches = evaluation.augmentation(row, args)
        assert transform.transforms[0].scale[0] == 0.6
        return patches, any("ColorJitter" in type(t).__name__ for t in transform.transforms)

    assert augmentation() == (dict(color_drop=0.5, jitter=True, flip=0.0), False)
    assert augmentation("--labels", "0.1") == (dict(color_drop=0.5), True)
    assert augmentation("--labels", "0.1", "--color-drop", "0.25")[0] == dict(color_drop=0.25)
    assert augmentation("--head", "none", "--supervised", "tiny") == ({}, True)
    saved = torch.load(encoder_file, weights_only=True)  # of a pre-training without colour dropping
    saved["trained"]["color_drop"] = 0.0
    torch.save(saved, encoder_file)
    assert augmentation()[0]["color_drop"] == 0.0
    assert augmentation("--labels", "0.1")[0]["color_drop"] == 0.5
    saved["trained"]["image_aug"] = "v1"  # grey
    torch.save(saved, encoder_file)
    assert augmentation("--labels", "0.1")[0]["color_drop"] == 0.0
    args = parse_eval("--encoder", encoder_file)
    transform, _ = evaluation.augmentation(args.rows[0], args)
    assert list(transform.transforms[0].size) == [38]  # of which v1 takes 32 pixels


def test_optimisers_and_how_long_each_trains(encoder_file, tmp_path, monkeypatch):
    """A.3: Adam for the probe, at one rate; AdamW for fine-tuning, SGD from random weights. A
    supervised row has 2.5 times the steps of CPC's first stage, and no fewer than its two. Labels
    and random weights are of the seed; rates and drop-out are the flags'."""
    trained, labelled, begun = {}, {}, {}

    def fit(task, model, recipe, stage, *rest):
        labelled[task.seed] = task.train.indices
        begun[stage, task.seed] = model.state_dict()
        optimizer = evaluation.make_optimizer(model, stage, recipe)
        *_, last = model.head.modules()
        trained[stage] = (type(optimizer), recipe["lr"], last.dropout, recipe["epochs"],
                          recipe["min_steps"])

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "fit", fit)
        patch.setattr(evaluation.Task, "accuracy", lambda *rest: (0.0, 0.0))
        for epochs, longer in ((4, 2.5), (12, 4)):
            flags = ["--encoder", encoder_file, "--labels", 0.1, "--supervised", "--epochs", 4,
                     "--min-steps", 40, "--finetune-epochs", epochs, "--seeds", 2, "--lr", 0.2,
                     "--finetune-lr", 0.003, "--dropout", 0.3]
            evaluation.main(parse_eval(*flags, "--out", tmp_path / str(epochs)))
            assert trained == {"frozen": (torch.optim.SGD, 0.2, 0.3, 4, 40),
                               "finetuned": (torch.optim.AdamW, 0.003, 0.3, epochs, 10 * epochs),
                               "scratch": (torch.optim.SGD, 0.2, 0.3, 4 * longer, 40 * longer)}
    assert labelled[0] != labelled[1]
    for stage, name in (("frozen", "head.0.conv1.weight"), ("scratch", "encoder.conv1.weight")):
        assert not torch.equal(begun[stage, 0][name], begun[stage, 1][name])
    rates, update = [], data.update

    def recorded(loss, optimizer, *rest):
        group = optimizer.param_groups[0]
        rates.append((type(optimizer), group["lr"], group["weight_decay"]))
        return update(loss, optimizer, *rest)

    monkeypatch.setattr(data, "update", recorded)
    classify(make_task(encoder_file), tmp_path / "probe")
    assert rates == [(torch.optim.AdamW, 0.05, 1e-3)] * 12
    rates.clear()
    pixels = make_task(encoder_file, "--head", "none", "--supervised", "tiny", held_out=0)
    classify(pixels, tmp_path / "pixels")
    assert rates == [(torch.optim.SGD, 0.05 * data.learning_rate(step, 12, 1.0, 1), 1e-3)
                     for step in range(12)]
    rates.clear()
    evaluation.classify(pixels, RECIPE | dict(min_steps=20), make_run(tmp_path / "longer"))
    assert len(rates) == 20


def test_a_row_trains_with_its_augmentation_and_tests_without(encoder_file, tmp_path, monkeypatch):
    transforms, patches = [], []
    load_batches, to_patches = data.load_batches, data.to_patches
    own = data.image_transform("inception", 32)

    def seen_batches(dataset, transform, *rest, **named):
        transforms.append(transform is own)
        return load_batches(dataset, transform, *rest, **named)

    def seen_patches(images, device, patch, stride, seed=None, **augmentation):
        patches.append(augmentation)
        return to_patches(images, device, patch, stride, seed, **augmentation)

    monkeypatch.setattr(data, "load_batches", seen_batches)
    monkeypatch.setattr(data, "to_patches", seen_patches)
    monkeypatch.setattr(evaluation, "augmentation", lambda row, args: (own, dict(flip=0.25)))
    classify(make_task(encoder_file, held_out=0), tmp_path / "run")
    assert transforms == [True, False] and patches == [dict(flip=0.25)] * 12 + [{}] * 3


def test_a_larger_crop_is_a_larger_grid(encoder_file):
    task = make_task(encoder_file, "--labels", "0.1", "--crop", "44")
    image, _ = task.test.dataset[0]
    assert task.patches(F.interpolate(image[None], (44, 44))).shape == (1, 7, 7, 3, 8, 8)
    model = evaluation.build_classifier(task, 0.0)
    encoded = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0])))
    task.accuracy(model, task.test)
    assert sum(encoded) == 49 * len(task.test)
    rows = parse_eval("--encoder", encoder_file, "random", "--supervised", "--labels", "0.1",
                      "--crop", "44").rows
    assert {row.metadata["crop"] for row in rows} == {44}
    with pytest.raises(SystemExit, match="do not tile"):
        parse_eval("--encoder", encoder_file, "--crop", "40")


def test_each_probe_has_its_own_files_augmentation(encoder_file, tmp_path):
    encoder, metadata = resnet.load_encoder(encoder_file)
    other = metadata | {"trained": metadata["trained"] | {"color_drop": 0.125, "min_area": 0.9}}
    other = {key: other[key] for key in ("crop", "patch", "stride", "trained")}
    resnet.save_encoder(tmp_path / "other.pt", encoder, other)
    both = "--encoder", encoder_file, tmp_path / "other.pt"
    for flags, drops, areas in (
            ((), [metadata["trained"]["color_drop"], 0.125], [0.6, 0.9]),
            (("--color-drop", "0", "--min-area", "0.3"), [0, 0], [0.3, 0.3])):
        args = parse_eval(*both, *flags)
        transforms, patches = zip(*(evaluation.augmentation(row, args) for row in args.rows))
        assert [augmented["color_drop"] for augmented in patches] == drops
        assert [transform.transforms[0].scale[0] for transform in transforms] == areas
    assert parse_eval(*both, "--labels", "0.1").min_area == 0.6  # the first file's


def test_a_network_of_whole_images_takes_a_larger_one(tmp_path):
    encoder = resnet.Encoder("tiny", "batch")
    how = dict(data="shapes", supervised="pixels", min_area=0.6, color_drop=0.0, jitter=False,
               flip=0.0, image_aug="inception")
    metadata = dict(crop=32, patch=32, stride=1, trained=how)
    resnet.save_encoder(tmp_path / "pixels.pt", encoder, metadata)
    task = make_task(tmp_path / "pixels.pt", "--crop", "40")
    assert task.patches(torch.zeros(1, 3, 40, 40, dtype=torch.uint8)).shape == (1, 1, 1, 3, 40, 40)


def test_shapes_mean_the_tiny_scale(encoder_file):
    """Whether the encoder or --data says so, and no other data does."""
    shapes = ["--encoder", str(encoder_file)]
    photos = ["--encoder", str(HERE / "assets/cpc-photos.pt")]
    for module in (evaluation, detect):
        tiny = module.parse_args(shapes)
        assert tiny.data == "shapes"
        assert module.parse_args([*photos, "--data", "shapes"]).epochs == tiny.epochs
        for name in ("elsewhere", "voc"):
            other = module.parse_args([*shapes, "--data", name])
            assert other.data == name and other.epochs > tiny.epochs
    pixels = parse_eval("--head", "none", "--supervised", "--data", "shapes")
    assert vars(pixels) == vars(parse_eval("--head", "none", "--supervised", "--tiny")) | {
        "tiny": False}


def test_two_encoders_are_two_rows_and_a_baseline_depends_on_none(encoder_file, tmp_path,
                                                                 monkeypatch):
    other = tmp_path / "other.pt"
    other.write_bytes(encoder_file.read_bytes())
    rows = parse_eval("--encoder", encoder_file, other, "random").rows
    assert [row.name for row in rows] == ["cpc-0", "cpc-1", "random"]
    assert [row.weights is None for row in rows] == [False, False, True]
    others = ["--encoder", "torchvision:resnet18", other, "random"]
    args = parse_eval(*others)
    first, _, third = args.rows
    crops = [evaluation.augmentation(row, args)[0].transforms[0].size[0] for row in args.rows]
    assert crops == [224, 32, 32]  # each trains with its own
    assert (third.name, third.arch) == ("random", "tiny")  # of the file before it
    assert first.metadata["crop"] == 224 and third.metadata["crop"] == 32
    assert parse_eval(*others, "--crop", "44").rows[0].metadata["crop"] == 44
    untrained = parse_eval("--encoder", other, "random", encoder_file, "random").rows
    assert [source.name for source in untrained] == ["cpc-0", "random-1", "cpc-2", "random-3"]
    named = parse_eval("--encoder", other, "--supervised", "--head", "none")
    assert (named.head, named.encoder) == ("none", [str(other)])
    assert named.supervised == ["tiny"]  # its own architecture, data, scale
    assert named.data == "shapes" and named.min_steps == 60
    monkeypatch.chdir(tmp_path)
    flags = ["--head", "none", "--supervised", "resnet50"]
    alone = vars(parse_eval(*flags))
    (tmp_path / "runs/cpc").mkdir(parents=True)
    encoder_file.rename(tmp_path / "runs/cpc/encoder.pt")
    assert vars(parse_eval(*flags)) == alone


def test_supervised_rows(encoder_file):
    """A.4: ResNet v2 with batch norm on whole images. Sec. 4.1: the encoder's own architecture and
    patches from scratch, with batch norm and without. The same crops as CPC's."""
    names = ["tiny", "tiny:3x3/2", "patched", "patched-none"]
    args = parse_eval("--encoder", encoder_file, "--head", "none", "--supervised", *names)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    norms, sides = ("batch", "batch", "batch", "none"), (8, 4, 5, 5)
    for row, norm, side in zip(args.rows, norms, sides, strict=True):
        task = evaluation.Task(args, row, 1.0, 0, None, None, None, CPU)
        network = row.make(0)
        assert row.supervised and network.norm == norm
        model = evaluation.Classifier(network, nn.Identity(), frozen=False)
        assert model(task.patches(images)).shape == (2, 256, side, side)
        assert not torch.equal(network.conv1.weight, row.make(1).conv1.weight)
        assert torch.equal(network.conv1.weight, row.make(0).conv1.weight)
        if row.name == "pixels":  # uncut
            assert torch.equal(task.patches(images).flatten(0, 2), data.normalise(images))


@pytest.mark.parametrize("network, kind, saved, geometry", [
    ("patched", "patched", "patched", [32, 8, 6]),
    ("tiny:3x3/2", "pixels", "tiny-3x3-2", [32, 32, 1])])
def test_a_supervised_encoder_may_be_a_trunk(network, kind, saved, geometry, encoder_file,
                                             tmp_path):
    """Table 3's other row: what a network has learned is a file for --encoder, by its own name."""
    task = make_task(encoder_file, "--head", "none", "--supervised", network)
    classify(task, tmp_path / "run")
    file = str(tmp_path / "run" / f"{saved}-0.1-seed-0.pt")
    before = Path(file).read_bytes()
    classify(task, tmp_path / "run")  # done: nothing is trained, and nothing written
    assert Path(file).read_bytes() == before
    (found,) = detect.parse_args(["--encoder", file]).sources
    learned, fresh = found.make(0).state_dict(), task.row.make(0).state_dict()
    assert found.name == kind and found.metadata["trained"]["labels"] == 0.1
    assert found.make(0).stride == task.row.make(0).stride
    assert learned.keys() == fresh.keys()
    assert not any(torch.equal(learned[k], fresh[k]) for k in fresh if "bias" not in k)
    again = make_task(file, "--head", "linear").row
    assert again.name == kind
    assert [again.metadata[name] for name in ("crop", "patch", "stride")] == geometry


def test_sweep_selects_by_held_out_images_alone(encoder_file, tmp_path, monkeypatch):
    held = {"trial 0": 30.0, "trial 1": 50.0, "trial 2": 40.0}
    diverged = []

    def fit(task, model, recipe, stage, key, *rest):
        assert model.head[-1].dropout == recipe["dropout"]
        trial = key.split("/")[-1]
        if trial in diverged:
            raise data.Diverged
        return held[trial]

    def chosen(name):
        return evaluation.choose_recipe(task, RECIPE, 3, make_run(tmp_path / name))

    task = make_task(encoder_file, "--labels", "0.1")
    monkeypatch.setattr(evaluation, "fit", fit)
    assert chosen("a") == evaluation.variant(RECIPE, 1) != RECIPE
    diverged.append("trial 1")
    assert chosen("b") == evaluation.variant(RECIPE, 2)
    for n in range(200):  # A.4's ranges
        v = evaluation.variant(RECIPE | dict(lr=0.1, batch_size=64), n)
        assert v["lr"] in (0.05, 0.1, 0.2) and v["batch_size"] in (32, 64)
        assert 1e-5 <= v["weight_decay"] <= 1e-2 and 0 <= v["dropout"] <= 0.9
    decays = [evaluation.variant(RECIPE, n)["weight_decay"] for n in range(200)]
    assert 70 < sum(decay < 10 ** -3.5 for decay in decays) < 130  # logarithmically
    recipes = []  # that the tasks of a whole command are trained with
    monkeypatch.setattr(evaluation, "classify", lambda task, recipe, run: recipes.append(recipe))
    monkeypatch.setattr(evaluation, "print_tables", lambda *rest: None)
    flags = "--encoder", encoder_file, "--labels", "0.1", "--sweep", "3", "--seeds", "2"
    evaluation.main(parse_eval(*flags, "--out", tmp_path / "main"))
    first = evaluation.first_recipe(task.args, task.row)
    assert recipes == [evaluation.variant(first, 2)] * 2


def test_the_table(capsys):
    """A cell is the mean ± standard deviation over the seeds of one row and one share."""
    tops = [("frozen", 0.1, 0, 10, 30), ("frozen", 0.1, 1, 14, 50), ("frozen", 1.0, 0, 60, 90),
            ("finetuned", 0.1, 0, 20, 40), ("finetuned", 1.0, 0, 70, 95)]
    results = [dict(encoder="cpc", arch="tiny", head="resnet", stage=stage, labels=labels,
                    seed=seed, top1=top1, top5=top5, held_out_images=0,
                    labelled_images=round(400 * labels))
               for stage, labels, seed, top1, top5 in tops]
    evaluation.print_tables(results, 8, 50)
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    cells = [[cell.strip() for cell in row if cell] for row in rows]
    assert cells[2:] == [
        ["labelled images", "40", "400"],
        ["top-1 %", "10 %", "100 %"],
        ["cpc tiny fixed", "12.0 ± 2.8", "60.0"],
        ["cpc tiny fine-tuned", "20.0", "70.0"],
        ["chance", "12.5", "12.5"],
        ["top-5 %", "10 %", "100 %"],
        ["cpc tiny fixed", "40.0 ± 14.1", "90.0"],
        ["cpc tiny fine-tuned", "40.0", "95.0"],
        ["chance", "62.5", "62.5"]]


# ---- Detection -----------------------------------------------------------------------------------


def truth(*boxes, labels=None, difficult=()):
    _, item = detect.with_truth(torch.zeros(3, 200, 200), torch.tensor(boxes, dtype=torch.float32),
                                labels or [1] * len(boxes),
                                [i in difficult for i in range(len(boxes))])
    return {k: v.as_subclass(torch.Tensor) for k, v in item.items()}


def found(*scored, labels=None):
    boxes = torch.tensor([box for _, box in scored], dtype=torch.float32).view(-1, 4)
    labels = torch.tensor(labels or [1] * len(scored), dtype=torch.int64)
    return {"boxes": boxes, "labels": labels, "scores": torch.tensor([s for s, _ in scored])}


A, B, FAR = (0, 0, 10, 10), (20, 0, 30, 10), (50, 50, 60, 60)


@pytest.mark.parametrize("detections, truths, expected", [
    ([found((0.9, A), (0.8, B))], [truth(A, B)], 1),  # perfect
    ([found((0.9, FAR))], [truth(A)], 0),  # all wrong
    ([found()], [truth(A)], 0),  # nothing found
    ([found((0.9, A))], [truth(A, B)], 6 / 11),  # half of them: recalls 0 to 0.5
    ([found((0.9, FAR), (0.8, A))], [truth(A)], 1 / 2),  # a false one first
    # a duplicate
    ([found((0.9, A), (0.8, A), (0.7, B))], [truth(A, B)], (6 + 5 * 2 / 3) / 11),
    # a difficult one neither helps nor harms, nor found twice, nor missed
    ([found((0.9, A), (0.8, B))], [truth(A, B, difficult=[0])], 1),
    ([found((0.9, A), (0.85, A), (0.8, B))], [truth(A, B, difficult=[0])], 1),
    ([found((0.9, A))], [truth(A, B, difficult=[1])], 1),
    # nor does one that overlaps a detection less than the object it finds
    ([found((0.9, A))], [truth(A, (0, 0, 10, 7), difficult=[1])], 1),
    ([found((0.9, A), (0.8, B))], [truth(A)], 1),  # a false one after all are found
    ([found((0.9, A)), found((0.8, A))], [truth(A), truth()], 1),  # an image without objects
    # ties: in the images' order
    ([found((0.5, FAR), (0.5, A)), found((0.5, A))], [truth(A), truth(A)], 2 / 3),
    ([found((0.9, A), labels=[2])], [truth(A)], 0),  # another class
    ([found((0.9, A))], [truth(A, FAR, labels=[3, 1])], 0),  # on an object of another class
    ([found((0.9, (0, 0, 10, 5)))], [truth(A)], 1),  # an IoU of 0.5 is enough
    ([found((0.9, (0, 0, 10, 4.9)))], [truth(A)], 0),
])
def test_average_precision_by_hand(detections, truths, expected):
    ap = detect.average_precisions(detections, truths, ["a", "without objects"])
    assert ap["ap"] == {"a": pytest.approx(100 * expected, abs=1e-3)} and ap["mAP"] == ap["ap"]["a"]


def test_average_precision_of_a_published_case():
    """github.com/rafaelpadilla/Object-Detection-Metrics: 15 objects, 24 detections (score; x, y,
    width, height), at IoU 0.3: 26.84 % by 11 points."""
    objects = """25 16 38 56, 129 123 41 62; 123 11 43 55, 38 132 59 45;
        16 14 35 48, 123 30 49 44, 99 139 47 47; 53 42 40 52, 154 43 31 34;
        59 31 44 51, 48 128 34 52; 36 89 52 76, 62 58 44 67; 28 31 55 63, 58 67 50 58"""
    detections = """.88 5 67 31 48, .70 119 111 40 67, .80 124 9 49 67;
        .71 64 111 64 58, .54 26 140 60 47, .74 19 18 43 35;
        .18 109 15 77 39, .67 86 63 46 45, .38 160 62 36 53, .91 105 131 47 47, .44 18 148 40 44;
        .35 83 28 28 26, .78 28 68 42 67, .45 87 89 25 39, .14 10 155 60 26;
        .62 50 38 28 46, .44 95 11 53 28, .95 29 131 72 29, .23 29 163 72 29;
        .45 43 48 74 38, .84 17 155 29 35, .43 95 110 25 42; .48 16 20 101 88, .95 33 116 37 49"""

    def rows(text):
        return [[[float(v) for v in row.split()] for row in image.split(",")]
                for image in text.split(";")]

    def corners(x, y, w, h):
        return x, y, x + w + 1, y + h + 1  # x + w is a box's last pixel there, as in VOC

    truths = [truth(*(corners(*row) for row in image)) for image in rows(objects)]
    detections = [found(*((score, corners(*box)) for score, *box in image))
                  for image in rows(detections)]
    value = detect.average_precision(detections, truths, 1, threshold=0.3)
    assert round(100 * value, 2) == 26.84


@pytest.fixture(scope="session")
def voc(tmp_path_factory):
    """VOCdevkit/VOC2007 as it may be: grey, CMYK, without objects, with boxes beyond the border,
    difficult ones."""
    root = tmp_path_factory.mktemp("voc")
    base = root / "VOCdevkit" / "VOC2007"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (base / folder).mkdir(parents=True)
    shapes, mode = data.Shapes("train", 64), {1: "L", 2: "CMYK"}
    for i in range(8):
        image = to_pil_image(shapes[i][0]).resize((64 + i, 60)).convert(mode.get(i, "RGB"))
        image.save(base / "JPEGImages" / f"{i:06d}.jpg")
        boxes = [(1, 1, 30, 60), (20, 5, 64 + i, 60)]
        if i == 3:
            boxes = []
        if i == 4:
            boxes = [(200, 5, 230, 60), (1, 1, 30, 60), (20, 5, 108, 60)]
        objects = "".join(
            f"<object><name>{'dog' if n else 'train'}</name><difficult>{int(i == 5)}</difficult>"
            f"<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>"
            f"</object>" for n, (x1, y1, x2, y2) in enumerate(boxes))
        text = f"<annotation><filename>{i:06d}.jpg</filename>{objects}</annotation>"
        (base / "Annotations" / f"{i:06d}.xml").write_text(text)
    for split, names in (("trainval", range(6)), ("test", range(5, 8))):
        lines = "".join(f"{i:06d}\n" for i in names)
        (base / "ImageSets" / "Main" / f"{split}.txt").write_text(lines)
    return root


def test_voc_boxes(voc, tmp_path):
    """VOC counts from 1 and includes the last pixel; what is written is in its terms again."""
    train, test = (detect.load_objects(str(voc), split, 64) for split in ("train", "test"))
    assert len(train.classes) == 20 and train.classes[14] == "person"
    assert (len(train), len(test)) == (6, 3)
    one = test[1][1]
    assert one["boxes"].tolist() == [[0, 0, 30, 60], [19, 4, 70, 60]]
    assert one["labels"].tolist() == [19, 12]
    assert test[0][1]["difficult"].tolist() == [True, True]
    scored = [test[i][1] | {"scores": torch.tensor([0.9, 0.5])} for i in range(3)]
    detect.write_voc(tmp_path, scored, test)
    assert len(list(tmp_path.iterdir())) == 20
    lines = (tmp_path / "comp4_det_test_dog.txt").read_text().splitlines()
    assert lines[1] == "000006 0.500000 20.00 5.00 70.00 60.00"
    for i in range(6):  # all sizes and modes train, with boxes inside the image only
        with torch.random.fork_rng():
            torch.manual_seed(i)
            image, seen = detect.objects_transform(True)(*train[i])
        assert image.shape == (3, 60, 64 + i) and image.dtype == torch.uint8
        assert len(seen["boxes"]) == len(seen["labels"]) == (0 if i == 3 else 2)
        assert (seen["boxes"][:, ::2] <= 64 + i).all() and (seen["boxes"] >= 0).all()
    mirrored = [detect.objects_transform(True)(*train[0])[1]["boxes"][0].tolist()
                for _ in range(20)]
    assert {tuple(box) for box in mirrored} == {(0, 0, 30, 60), (34, 0, 64, 60)}


@pytest.mark.parametrize("stem, stride, H, W", [("3x3", 4, 61, 83), ("7x7", 16, 130, 97)])
def test_trunk(stem, stride, H, W):
    """The encoder's features at its stride on any size; never in training mode itself."""
    encoder = resnet.Encoder("tiny", "batch", stem)
    trunk = detect.Trunk(encoder, bf16=False).train().requires_grad_(False)
    images = torch.randn(1, 3, H, W)
    grid = trunk(images)
    assert grid.shape == (1, 256, math.ceil(H / stride), math.ceil(W / stride))
    assert torch.equal(grid, encoder.eval().features(images)) and not grid.requires_grad
    assert trunk.training and not encoder.training
    assert trunk.requires_grad_(True)(images).requires_grad


def test_layer_norm_of_each_position():
    """In the trunk a position sees the statistics of its own channels: far padding is not seen."""
    encoder = resnet.Encoder("tiny")
    trunk, images = detect.Trunk(encoder, bf16=False), torch.randn(1, 3, 64, 64)
    padded = trunk(F.pad(images, (0, 40, 0, 40)))
    assert torch.allclose(trunk(images)[..., :8, :8], padded[..., :8, :8], atol=1e-5)
    norm, x = resnet.LayerNorm(8), torch.randn(2, 8, 3, 3)
    norm.per_position = True
    variance = x.var(1, keepdim=True, correction=0)
    expected = (x - x.mean(1, keepdim=True)) / (variance + 1e-5).sqrt()
    assert torch.allclose(norm(x), expected, atol=1e-5)


def test_detector_is_faster_rcnn_c4():
    """Ren et al. 2015 on conv1..conv4: anchors of 32 to 512 pixels, 512 channels in the proposal
    network; He et al. 2016: conv5's three bottlenecks, 2048 channels, on 14x14 cells."""
    with torch.device("meta"):
        model = detect.build_detector(resnet.Encoder("resnet92"), 20, 480)
    assert model.rpn.anchor_generator.sizes == ((32, 64, 128, 256, 512),)
    assert model.rpn.head.cls_logits.in_channels == 512
    head = model.roi_heads.box_head
    assert [b.conv3.out_channels for b in head.blocks] == [2048] * 3
    assert head.blocks[0].conv2.stride == (2, 2)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in head.modules())
    assert model.roi_heads.box_roi_pool.output_size == (14, 14)
    assert model.roi_heads.box_predictor.cls_score.out_features == 21
    areas = [side * side * 4 / 3 for side in model.transform.min_size]
    assert areas[-1] == 480 * 640
    assert 150e3 < min(areas) < 156e3 and 450e3 < max(areas) < 465e3
    assert model.rpn.anchor_generator.aspect_ratios == ((0.5, 1.0, 2.0),)
    assert model.eval().rpn.post_nms_top_n() == 300  # Ren et al. 2015
    assert model.roi_heads.fg_bg_sampler.batch_size_per_image == 128
    assert model.roi_heads.score_thresh == 0.01
    assert model.transform.max_size == 1200 and model.transform.size_divisible == 16
    (source,) = detect.parse_args(["--encoder", "torchvision:resnet18"]).sources
    assert source.make(0).out_channels == 256  # of its conv4
    half = detect.build_detector(resnet.Encoder("tiny"), 20, 240, True)
    assert half.rpn.anchor_generator.sizes == ((16, 32, 64, 128, 256),)
    regions = torch.randn(2, 256, 6, 6)
    assert half.roi_heads.box_head(regions).min() >= 0  # conv5 ends in a ReLU


def make_detector(encoder, *flags):
    args = detect.parse_args(
        ["--encoder", str(encoder), "--workers", "0", "--batch-size", "2", *flags])
    network = vars(args).pop("sources")[0].make(0)
    torch.manual_seed(0)
    model = detect.build_detector(network, 20, args.side, True, 20, 16)
    return args, network, model.to(memory_format=torch.channels_last)


def test_one_image_is_learned_and_the_frozen_trunk_is_not_touched(encoder_file, voc, tmp_path):
    """Sec. 4.3's two stages, on one image: mAP 100; the first leaves the trunk bit-identical."""
    args, network, model = make_detector(encoder_file, "--epochs", "20", "--finetune-epochs", "60",
                                         "--color-drop", "0", "--finetune-lr", "1e-3")
    one = Subset(detect.load_objects(str(voc), "train", 64), [0])
    nothing, run = Subset(one.dataset, []), make_run(tmp_path / "run")
    before = copy.deepcopy(network.state_dict())
    detect.fit(args, "frozen", model, one, nothing, CPU, run, "a")
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    detect.fit(args, "finetuned", model, one, nothing, CPU, run, "b")
    moved = [not torch.equal(v, before[k]) for k, v in network.state_dict().items() if "conv" in k]
    assert all(moved)
    assert model.roi_heads.box_roi_pool.scales == [1 / 4]  # torchvision's guess: the trunk's stride
    found = detect.detect_all(model, one, CPU, 0)
    assert detect.average_precisions(*found, one.dataset.classes)["mAP"] == 100


def test_a_detector_is_the_flags_and_continues_from_its_solution(encoder_file, voc, tmp_path,
                                                                 monkeypatch):
    """Killed between the stages: the second one has the first one's weights and held-out mAP."""
    args = detect.parse_args(["--encoder", str(encoder_file), "--proposals", "30", "--regions",
                              "12", "--side", "96", "--bf16", "--workers", "0"])
    begun, (source,) = [], vars(args).pop("sources")
    test = detect.load_objects(str(voc), "test", 64)

    def fit(args, stage, model, train_set, held_out, device, run, key, start_map=None):
        assert model.eval().rpn.post_nms_top_n() == 30 and model.backbone.bf16
        assert model.roi_heads.fg_bg_sampler.batch_size_per_image == 12
        assert model.transform.min_size[-1] == 96
        begun.append((stage, start_map, copy.deepcopy(model.state_dict())))
        if stage == "finetuned":
            raise KeyboardInterrupt
        model.roi_heads.box_predictor.cls_score.bias.data += 1
        return 40.0

    monkeypatch.setattr(detect, "fit", fit)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            detect.run_stages(args, source, (None, None, test), CPU, make_run(tmp_path / "run"))
    _, (*first, solution), (*again, loaded) = begun
    assert first == again == ["finetuned", 40.0]
    assert all(torch.equal(loaded[name], value) for name, value in solution.items())
    args.seed, name = 1, "roi_heads.box_predictor.bbox_pred.weight"
    with pytest.raises(KeyboardInterrupt):
        detect.run_stages(args, source, (None, None, test), CPU, make_run(tmp_path / "other"))
    assert not torch.equal(begun[-1][2][name], solution[name])  # random weights are the seed's


def test_detections_of_two_processes_are_in_the_images_order(voc, monkeypatch):
    class Widths(nn.Module):
        def forward(self, images):
            return [{"width": torch.tensor(image.shape[2])} for image in images]

    shares = []

    def gather(everyones, mine):
        shares.append(mine)
        everyones[:] = shares[0], mine  # process 1 comes last and has both

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    objects = detect.load_objects(str(voc), "test", 64)
    for rank in (0, 1):
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        detections, truths = detect.detect_all(Widths(), objects, CPU, 0)
    assert [detected["width"] for detected in detections] == [69, 70, 71]
    assert truths[1]["boxes"].tolist() == [[0, 0, 30, 60], [19, 4, 70, 60]]  # not mirrored


def test_detection_stops_early(encoder_file, voc, tmp_path, monkeypatch, drawn):
    """Sec. 2.2: "a smaller learning rate and early-stopping": the best of ten held-out states is
    kept, or that which fine-tuning began with. Fine-tuning draws images and crops of its own."""
    args, _, model = make_detector(encoder_file, "--epochs", "10", "--finetune-epochs", "10",
                                   "--weight-decay", "0.03")
    rates, update = [], data.update

    def recorded(loss, optimizer, *rest, clip):
        group = optimizer.param_groups[0]
        rates.append((group["lr"], group["weight_decay"], clip))
        return update(loss, optimizer, *rest, clip)

    mirrored, objects_transform = [], detect.objects_transform

    def seen_transform(train):
        mirrored.append(train)
        return objects_transform(train)

    monkeypatch.setattr(detect, "objects_transform", seen_transform)
    monkeypatch.setattr(data, "update", recorded)
    one = Subset(detect.load_objects(str(voc), "train", 64), [0])
    held_out = Subset(one.dataset, [1])
    scores, states = [10, 40, 20, 70, 30, 70, 5, 5, 5, 5] + [60] * 10, []

    def detect_all(model, objects, *rest, skip=False):
        assert objects is held_out
        states.append(copy.deepcopy(model.state_dict()))
        return [], []

    monkeypatch.setattr(detect, "detect_all", detect_all)
    monkeypatch.setattr(detect, "average_precisions",
                        lambda *rest: {"mAP": scores[len(states) - 1]})
    run = make_run(tmp_path / "run")
    for stage, start in (("frozen", None), ("finetuned", 70)):
        best = detect.fit(args, stage, model, one, held_out, CPU, run, stage, start)
        assert best == 70
        assert all(torch.equal(v, states[3][k]) for k, v in model.state_dict().items())
    schedule = [data.learning_rate(step, 10, 1.0, 1) for step in range(10)]
    assert rates == [(peak * s, 0.03, 10.0) for peak in (3e-3, 3e-4) for s in schedule]
    assert len(states) == 20 and mirrored == [True, True]
    assert len(set(drawn)) == len(drawn) == 20


def test_colors_are_dropped_over_the_whole_image(monkeypatch):
    """Sec. 2.2: the same two channels everywhere, in about half of the images; never in a test. The
    second of two processes draws what one alone draws for the same images."""
    images = [torch.randint(0, 256, (3, 20 + n % 3, 30), dtype=torch.uint8, generator=generator(n))
              for n in range(200)]
    plain = detect.prepare(images, CPU)
    assert all(torch.equal(x, data.normalise(i)) for x, i in zip(plain, images))
    alone = detect.prepare(images, CPU, 0.5)
    kept = [(a == b).all(2).all(1).sum().item() for a, b in zip(alone, plain)]
    assert set(kept) == {1, 3} and 70 < kept.count(1) < 130
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    second = detect.prepare(images[1::2], CPU, 0.5)
    assert all(map(torch.equal, second, alone[1::2]))


def test_colors_and_scale_are_drawn_independently(tmp_path):
    """Sec. 2.2's two augmentations, over a hundred steps of one image: the first number that the
    detector draws, which is of the scale, says nothing about the image's colours."""
    class Recorder(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.drawn = nn.Linear(1, 1), []

        def forward(self, images, targets):
            dropped = images[0].std((1, 2)).min() < 0.05
            self.drawn.append((dropped.item(), (torch.rand(()) < 0.5).item()))
            return {"of_boxes": self.backbone(torch.zeros(1)).sum()}

    args = detect.parse_args(["--encoder", "torchvision:resnet18", "--batch-size", "1", "--workers",
                              "0", "--epochs", "10", "--finetune-epochs", "10", "--color-drop",
                              "0.75"])
    model, objects = Recorder(), Subset(detect.load_objects("shapes", "train", 64), range(10))
    nothing, run = Subset(objects.dataset, []), make_run(tmp_path / "run")
    detect.fit(args, "finetuned", model, objects, nothing, CPU, run, "a")
    assert len(model.drawn) == 100 and 30 < sum(a == b for a, b in model.drawn) < 70
    assert 62 < sum(dropped for dropped, _ in model.drawn) < 88


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files in /proc")
def test_images_from_workers_keep_no_files_open(request):
    """Images of many sizes come unstacked; Linux lets a process have 1,024 files open."""
    usual = torch.multiprocessing.get_sharing_strategy()
    request.addfinalizer(partial(torch.multiprocessing.set_sharing_strategy, usual))
    torch.multiprocessing.set_sharing_strategy("file_system")  # as detect.main does
    objects = detect.load_objects("shapes", "train", 32)
    batches = data.test_batches(40, 4)
    transform = detect.objects_transform(train=True)
    before = len(os.listdir("/proc/self/fd"))
    items = list(data.load_batches(objects, transform, batches, workers=1, collate=list))
    assert len(items) == 10 and len(os.listdir("/proc/self/fd")) < before + 10


# ---- A run's folder ------------------------------------------------------------------------------


def test_what_a_run_may_continue(tmp_path):
    """The same command, with its state and its log; nothing else, and nothing is lost."""
    out = tmp_path / "run"
    run = make_run(out, seed=0)
    assert run.done == {} and events(out, "start")[0]["seed"] == 0
    with pytest.raises(SystemExit, match="holds a run with seed 0, not 1"):
        make_run(out, seed=1)
    run.log("train", step=1)
    run.done = 1
    run.save()
    run.log("train", step=2)  # after the last checkpoint: it will be done again
    assert make_run(out, seed=0, workers=3).done == 1
    assert [line["step"] for line in events(out, "train")] == [1]
    with pytest.raises(SystemExit, match="holds a run with seed 0, not 1"):
        make_run(out, seed=1)
    good = (out / "checkpoint.pt").read_bytes()
    (out / "checkpoint.pt").write_bytes(good[:-100])
    with pytest.raises(SystemExit, match="checkpoint.pt is damaged"):
        make_run(out, seed=0)
    (out / "checkpoint.pt").unlink()  # a finished run whose checkpoint was deleted
    log = (out / "log.jsonl").read_text()
    (tmp_path / "encoder").mkdir()
    for product in (out / "log.jsonl", tmp_path / "encoder" / "encoder.pt"):
        product.write_text(log + '{"event": "result"}\n')
        with pytest.raises(SystemExit, match="holds a run without its checkpoint"):
            make_run(product.parent, seed=0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "log.jsonl").write_text("step,loss\n1,2.0\n")  # somebody's
    with pytest.raises(SystemExit, match="what is not ours"):
        make_run(tmp_path / "other")
    assert (tmp_path / "other" / "log.jsonl").read_text() == "step,loss\n1,2.0\n"
    with pytest.raises(SystemExit, match="cannot use --out /dev/null/run: Not a directory"):
        make_run("/dev/null/run")


def test_an_input_is_known_by_its_content(tmp_path):
    """An encoder may be moved, not replaced, under a run that goes on."""
    for name, content in (("a", b"1"), ("moved", b"1"), ("other", b"2")):
        (tmp_path / name).write_bytes(content)
    a, moved, other = (data.fingerprint(str(tmp_path / name)) for name in ("a", "moved", "other"))
    assert a == moved != other and data.fingerprint("random") == "random"
    assert data.fingerprint(f"torchvision:resnet18:{tmp_path / 'a'}") == a


def test_an_evaluation_continues_with_the_same_inputs_alone(encoder_file, tmp_path, monkeypatch,
                                                            capsys):
    """Another encoder, or other labelled images, in a file of the same name are refused."""
    labelled = tmp_path / "list.txt"
    for module, function in ((evaluation, "classify"), (evaluation, "print_tables"),
                             (detect, "run_stages"), (detect, "print_table")):
        monkeypatch.setattr(module, function, lambda *rest: None)

    def evaluate():
        flags = "--encoder", encoder_file, "--subset", labelled, "--out", tmp_path / "eval"
        evaluation.main(parse_eval(*flags))

    def detection():
        flags = ["--encoder", str(encoder_file), "--out", str(tmp_path / "detect")]
        detect.main(detect.parse_args(flags))

    labelled.write_text("00001\n00002")
    evaluate()
    detection()
    assert "3960 training, 40 held-out and 200 test images, 4 a step" in capsys.readouterr().out
    labelled.write_text("00001\n00003")
    with pytest.raises(SystemExit, match="holds a run with labelled"):
        evaluate()
    labelled.write_text("00001\n00002")
    saved = torch.load(encoder_file, weights_only=True)
    saved["state"]["conv1.weight"] += 1
    torch.save(saved, encoder_file)
    for script in (evaluate, detection):
        with pytest.raises(SystemExit, match="holds a run with encoders"):
            script()


def test_two_runs_in_one_folder_are_refused(tmp_path):
    code = ("import fcntl; log = open('log.jsonl', 'a'); fcntl.lockf(log, fcntl.LOCK_EX); "
            "print(flush=True); input()")
    other = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    other.stdout.readline()  # it has the lock, as a run has
    with pytest.raises(SystemExit, match="another run is writing to"):
        make_run(tmp_path)
    other.communicate(b"\n")
    make_run(tmp_path)


def test_a_file_system_may_have_no_locks(tmp_path, monkeypatch):
    def lockf(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(data.fcntl, "lockf", lockf)
    make_run(tmp_path)


def steps_of(run, values, key="train", after=None):
    """A training whose loss takes these values; `after(step)` is called in each step's body."""
    start = run.resume(key)
    for step, value in run.steps(values[start:], len(values), 1, due=[4]):
        run.tally(loss=torch.tensor(float(value)))
        if after:
            after(step)


def test_a_save_changes_no_logged_mean(tmp_path):
    """Stopped between two lines of the log, by a signal, the mean is that of an undisturbed run."""
    steps_of(make_run(tmp_path / "a"), [1, 2, 3, 6])

    def stop(step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as end:
        steps_of(make_run(tmp_path / "b"), [1, 2, 3, 6], after=stop)
    assert end.value.code == 143
    assert make_run(tmp_path / "b").resume("train") == 2
    steps_of(make_run(tmp_path / "b"), [1, 2, 3, 6])
    (a,), (b,) = events(tmp_path / "a", "train"), events(tmp_path / "b", "train")
    assert a["loss"] == b["loss"] == 3 and a["step"] == b["step"] == 4


def test_a_signal_during_the_last_save_is_not_forgotten(tmp_path):
    run = make_run(tmp_path)
    save = run.save
    run.save = lambda: (save(), os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as end:
        steps_of(run, [1, 2, 3, 4])
    assert end.value.code == 143 and make_run(tmp_path).resume("train") == 4


def test_a_signal_ends_a_step_that_never_ends(tmp_path):
    """When it is repeated later; torchrun's own repeat, at once, still lets the run save."""
    run = make_run(tmp_path)

    def hang(step):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        run.caught_at -= 6  # seconds go by
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the step went on")

    with pytest.raises(SystemExit) as end:
        steps_of(run, [1, 2, 3, 4], after=hang)
    assert end.value.code == 143 and run.signal == signal.SIGINT
    assert make_run(tmp_path).resume("train") == 0


def test_what_is_not_finite_is_never_saved(tmp_path):
    run = make_run(tmp_path)
    steps_of(run, [1, 2, 3, 4])
    for values in ([1, math.nan, 3, 4], [1, 2, 3, math.inf]):
        with pytest.raises(data.Diverged, match="not finite.*lower --lr, in another --out"):
            steps_of(run, values)
    assert make_run(tmp_path).resume("train") == 4 and len(events(tmp_path, "train")) == 1
    run.done = 1
    run.save()  # a sweep goes on after a trial that diverged
    assert make_run(tmp_path).done == 1 and make_run(tmp_path).resume("train") == 0


def test_checkpoints_come_by_the_clock_too(tmp_path):
    run = make_run(tmp_path)
    assert run.save_seconds == 600  # --save-every 10
    run.save_seconds, saves, save = 0, [], run.save
    run.save = lambda: saves.append(run.step) or save()
    steps_of(run, [1, 2, 3, 4])
    assert saves == [1, 2, 3, 4]


# ---- Devices and processes -----------------------------------------------------------------------


@pytest.mark.skipif(torch.__version__ < "2.14", reason="fake tensors of 2.9 ask for a driver")
def test_everything_stays_on_its_device(monkeypatch):
    """On a GPU that is not there: fake tensors have a device and no memory. Seen to fail where
    images of the CPU met patches of the device in the retrieval picture. Not seen: the backward
    pass and generators, which ask for a driver, and boxes, whose number is a value."""
    monkeypatch.setattr(nn.Module, "to", lambda self, *args, **rest: self)  # made where it stays
    cuda = torch.device("cuda")
    with FakeTensorMode(allow_non_fake_inputs=True), cuda:
        images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device="cpu")  # from the loader
        normalised = data.normalise(images.to(cuda))
        patches = data.augment_patches(normalised, 8, 6, None, color_drop=0.5, jitter=True,
                                       flip=0.5)
        seen = [patches]
        for norm in resnet.NORMS:
            for checkpointing in (False, True):
                encoder = resnet.Encoder("tiny", norm, checkpointing=checkpointing)
                model = cpc.CPC(encoder, 4, [2, 3], 8, 8)
                seen += model(patches)
        args = Namespace(patch=8, stride=6, crop=32, lengths=[2, 3])
        seen += cpc.rank_patches(model, images.to(cuda), args)
        latents = encoder.grid(patches)
        seen += [evaluation.LinearProbe(256, 10)(latents)]
        seen += [evaluation.resnet_head(256, 10)(latents)]
        prepared = detect.prepare([images[0]], cuda)
        seen += [detect.Trunk(encoder, bf16=False)(torch.stack(prepared))]
        seen += [detect.Conv5(256, 256, bf16=False)(torch.zeros(2, 256, 6, 6))]
    assert {x.device.type for x in seen} == {"cuda"}


def test_compiled_blocks_share_graphs_and_compute_the_same():
    """ResNet-92's 30 blocks are six graphs, also recomputed and in DDP; another size adds few."""
    torch.manual_seed(0)
    encoder, patches = resnet.Encoder("resnet92", checkpointing=True), torch.randn(2, 3, 32, 32)
    expected = encoder(patches).detach()
    compiler = CompileCounter()  # runs what it is given
    encoder.compile_blocks(compiler)
    ddp = DistributedDataParallel(encoder)
    compiled = ddp(patches)
    compiled.sum().backward()
    assert torch.allclose(compiled, expected, atol=1e-4)
    assert compiler.frame_count == 6
    ddp(torch.randn(2, 3, 48, 48)).sum().backward()
    assert compiler.frame_count <= 12


def three_steps(norm):
    """[(patches of the batch, gradient, loss of the batch)] of three steps, the same work on any
    number of processes: four directions."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = cpc.CPC(resnet.Encoder("tiny", norm), 4, [2, 3], 16, 16, emb_scale=1.0)
    model = model.to(memory_format=torch.channels_last)
    # not Adam, which makes whole steps of the rounding where a gradient is next to nothing
    optimizer, ddp = torch.optim.SGD(model.parameters(), 0.01), DistributedDataParallel(model)
    steps = []
    for step in range(3):
        images = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8,
                               generator=generator(step))
        patches = data.to_patches(images[rank::world], CPU, 8, 6, seed=step, color_drop=0.5,
                                  jitter=True, flip=0.5).contiguous()
        loss, _ = ddp(patches)
        data.update(loss, optimizer, model.parameters())
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        rows = [torch.empty_like(patches) for _ in range(world)]
        dist.all_gather(rows, patches)
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        steps.append((torch.stack(rows, 1).flatten(0, 1), gradient, mean / world))
    return steps


def check_processes(folder, voc, out):
    """Run by each process of torchrun: three steps of each norm into a file; and, as two, the
    scripts one after the other, process 1 being killed in pre-training, which torchrun restarts."""
    data.start_process(Namespace(batch_size=6, bf16=False))
    world = dist.get_world_size()
    first_time = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first_time:
        steps = {norm: three_steps(norm) for norm in ("layer", "none")}
        if dist.get_rank() == 0:
            torch.save(steps, f"{out}/steps-{world}.pt")
    if world != 2:
        return

    def pretrain(name):
        flags = [*TINY, "--data", folder, "--workers", "0", "--save-every", "0"]
        cpc.main(cpc.parse_args([*flags, "--out", f"{out}/{name}"]))

    if first_time:
        pretrain("undisturbed")
        update, steps = data.update, iter(range(10))

        def killed(*args):
            if next(steps) == 7 and dist.get_rank():
                os.kill(os.getpid(), signal.SIGKILL)
            return update(*args)

        data.update = killed
    pretrain("cpc")
    dist.barrier()  # encoder.pt is there
    encoder, fit = ["--encoder", f"{out}/cpc/encoder.pt", "--batch-size", "8"], evaluation.fit

    def checked_fit(task, model, *rest):  # both test with the same statistics of batch norm
        held_top1 = fit(task, model, *rest)
        mine = torch.cat([buffer for buffer in model.head.buffers() if buffer.dim()])
        dist.broadcast(first := mine.clone(), 0)
        assert torch.equal(mine, first)
        return held_top1

    evaluation.fit = checked_fit
    evaluation.main(evaluation.parse_args(
        [*encoder, "--labels", "0.5", "--epochs", "1", "--min-steps", "4", "--held-out", "0.2",
         "--out", f"{out}/eval"]))
    detect.main(detect.parse_args(
        [*encoder, "--data", voc, *DETECT, "--out", f"{out}/detect"]))


def test_any_number_of_processes_computes_the_same(commands):
    """Sec. 2.1's minibatch is the whole batch: one, two and three processes have the same patches,
    to the bit, and the same losses and gradients. Two processes, one of them killed, end with the
    same weights; and every test image counts once, though 11 and 3 do not divide by two."""
    out = commands("two processes")[0].with_name("processes")
    commands("three processes")
    one = {norm: three_steps(norm) for norm in ("layer", "none")}
    for world in (2, 3):
        steps = torch.load(out / f"steps-{world}.pt", weights_only=True)
        for norm in one:
            for (patches, gradient, loss), ours in zip(one[norm], steps[norm], strict=True):
                assert torch.equal(patches, ours[0])
                assert (gradient - ours[1]).norm() < 1e-5 * gradient.norm()
                assert ours[2].item() == pytest.approx(loss.item(), rel=1e-4)
    assert len(events(out / "cpc", "start")) == 2
    states = [resnet.load_encoder(out / name / "encoder.pt")[0].state_dict().values()
              for name in ("undisturbed", "cpc")]
    assert all(map(torch.equal, *states))
    lines = [[(e["step"], e["loss"], e["accuracy"]) for e in events(out / name, "train")]
             for name in ("undisturbed", "cpc")]
    assert lines[0] == lines[1] and [step for step, *_ in lines[0]] == [5, 10]
    chance = events(out / "cpc", "train")[0]["chance_loss"]
    assert chance == pytest.approx(math.log(8 * 25))
    assert lines[0][0][1] == pytest.approx(chance, rel=0.1)  # logged is a mean over processes
    results = events(out / "eval", "result")
    assert len(results) == 2
    assert all(r["top1"] in [round(100 * n / 11, 3) for n in range(12)] for r in results)
    assert [r["stage"] for r in events(out / "detect", "result")] == ["frozen", "finetuned"]
    files = (out / "detect").glob("*/*/comp4*")
    lines = [line.split() for file in files for line in file.read_text().splitlines()]
    assert {line[0] for line in lines} == {"000005", "000006", "000007"}


# ---- Whole commands ------------------------------------------------------------------------------

TINY = ["--tiny", "--batch-size", "8", "--epochs", "2", "--warmup", "2", "--average", "0.9"]
DETECT = ["--tiny", "--epochs", "2", "--finetune-epochs", "1", "--batch-size", "2",
          "--regions", "8", "--proposals", "8", "--held-out", "0.2"]
ONE_THREAD = dict(os.environ) | {"OMP_NUM_THREADS": "1"}


def command(script, *args, processes=0):
    launch = [sys.executable]
    if processes:
        launch += ["-m", "torch.distributed.run", "--standalone", "--max-restarts=3",
                   f"--nproc_per_node={processes}"]
    return [*launch, str(HERE / script), *map(str, args)]


def run(script, *args, processes=0, cwd=None, timeout=300):
    return subprocess.run(command(script, *args, processes=processes), capture_output=True,
                          text=True, cwd=cwd, env=ONE_THREAD, timeout=timeout)


def start(script, *args):
    """A command in a process group of its own, running."""
    return subprocess.Popen(command(script, *args), stderr=subprocess.PIPE, text=True,
                            stdout=subprocess.DEVNULL, env=ONE_THREAD, start_new_session=True)


def interrupt(number, when, script, *args):
    """Run a command until `when()`, then send all its processes a signal. Its exit code, stderr."""
    process = start(script, *args)
    while process.poll() is None and not when():
        time.sleep(0.01)
    os.killpg(process.pid, number)
    lines = process.communicate()[1].splitlines()
    return process.returncode, lines


def stop(when, script, *args, number=signal.SIGTERM):
    code, lines = interrupt(number, when, script, *args)
    assert "the same command continues" in lines[-1], lines
    assert "Traceback" not in "".join(lines) and code == 128 + number


def stop_and_kill(out, *flags):
    """Pre-training, stopped in its first epoch, continued, and killed in its second."""
    stop(lambda: (out / "patches.png").exists(), "cpc.py", *flags, "--workers", 1)  # the first step
    assert not (out / "encoder.pt").exists()
    code, _ = interrupt(signal.SIGKILL, logged(out, '"train"'), "cpc.py", *flags, "--save-every", 0)
    assert code == -signal.SIGKILL


def logged(folder, text):
    """Whether a run has logged this text."""
    return lambda: (folder / "log.jsonl").exists() and text in (folder / "log.jsonl").read_text()


def events(folder, event):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


@pytest.fixture(scope="session")
def commands(folder, voc, tmp_path_factory):
    """Whole commands, run two at a time beside the tests, some of them interrupted. A function of
    a command's name: its folder and what it printed, when it is done."""
    out = tmp_path_factory.mktemp("commands")
    encoder = ["--encoder", out / "cpc" / "encoder.pt"]
    few = [*encoder, *FEW_LABELS, "--out"]
    detection = [*encoder, "random", "--data", voc, *DETECT, "--out"]
    processes = out / "processes"
    processes.mkdir()
    pool = ThreadPoolExecutor(2)
    pretraining = pool.submit(run, "cpc.py", *TINY, "--data", folder, "--out", out / "cpc")
    calls = {
        "two processes": partial(run, "test_cpc.py", folder, voc, processes, processes=2),
        "three processes": partial(run, "test_cpc.py", folder, voc, processes, processes=3),
        "few labels": partial(run, "eval.py", *few, out / "few labels"),
        "detection": partial(run, "detect.py", *detection, out / "detection"),
        "few labels again": partial(
            stop, logged(out / "few labels again", "finetuned/1/"), "eval.py", *few,
            out / "few labels again"),
        "detection again": partial(
            stop, logged(out / "detection again", "random/"), "detect.py", *detection,
            out / "detection again", number=signal.SIGINT),
        "cpc again": partial(
            stop_and_kill, out / "cpc again", *TINY, "--data", folder, "--out", out / "cpc again"),
    }

    def with_encoder(call):
        pretraining.result()
        return call()

    started = {name: pool.submit(with_encoder, call) for name, call in calls.items()}
    started["cpc"] = pretraining

    def finished(name):
        done = started[name].result()
        if done is None:  # interrupted
            return out / name
        assert done.returncode == 0, done.stderr
        return out / name, done.stdout

    yield finished
    pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def trained(commands):
    return commands("cpc")[0]


def test_pretraining_leaves_what_it_promises(trained):
    first = json.loads((trained / "log.jsonl").read_text().splitlines()[0])
    assert first["event"] == "start" and first["lengths"] == [2, 3]
    assert first["torch"] == torch.__version__
    epochs = events(trained, "train")
    assert [(e["epoch"], e["step"]) for e in epochs] == [(1, 5), (2, 10)]
    assert all(0 < e["loss"] < 1.2 * e["chance_loss"] for e in epochs)
    for name in ("patches.png", "retrieval.png"):
        assert min(Image.open(trained / name).size) > 100
    file = resnet.load_encoder(trained / "encoder.pt")[1]
    assert file["trained"]["epochs"] == 2 and str(trained) not in str(file)


def test_a_run_is_never_overwritten(trained, folder, capsys):
    before = (trained / "encoder.pt").read_bytes()
    for flags, difference in ((["--lr", "1e-3", "--data", str(folder)], "lr 0.003, not 0.001"),
                              ([], r"images \[44, .*, not \[4000, ")):
        with pytest.raises(SystemExit, match=f"holds a run with {difference}"):
            cpc.main(cpc.parse_args([*TINY, *flags, "--out", str(trained)]))
    capsys.readouterr()
    cpc.main(cpc.parse_args([*TINY, "--data", str(folder), "--out", str(trained)]))
    assert "holds this run, finished" in capsys.readouterr().out
    assert (trained / "encoder.pt").read_bytes() == before


def test_every_epoch_leaves_an_encoder(folder, tmp_path, monkeypatch):
    """A long run is evaluated while it goes on: here, in its second epoch of five steps."""
    update, steps = data.update, iter(range(10))

    def interrupted(*args):
        if next(steps) == 7:
            raise KeyboardInterrupt
        return update(*args)

    monkeypatch.setattr(data, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cpc.main(cpc.parse_args([*TINY, "--data", str(folder), "--out", str(tmp_path / "run")]))
    file = resnet.load_encoder(tmp_path / "run" / "encoder.pt")[1]
    assert file["trained"]["steps"] == 5


def test_pretraining_does_what_its_flags_say(folder, tmp_path, monkeypatch):
    """Images and patches are augmented as asked, patches anew in every step; the rate, the clipping
    and the sizes are the flags', all random numbers the seed's; encoder.pt is the average, with
    batch norm's last statistics."""
    transforms, patches, rates, clips, orders, autocast = [], [], [], [], [], []
    image_transform, to_patches, update = data.image_transform, data.to_patches, data.update
    train_batches, train = data.train_batches, cpc.train

    def seen_transform(*args, **named):
        transforms.append(args)
        return image_transform(*args, **named)

    def seen_patches(images, device, patch, stride, seed=None, **augmentation):
        patches.append((seed, augmentation))
        return to_patches(images, device, patch, stride, seed, **augmentation)

    def seen_update(loss, optimizer, parameters, clip):
        rates.append(optimizer.param_groups[0]["lr"])
        clips.append(clip)
        return update(loss, optimizer, parameters, clip)

    def seen_batches(*args):
        orders.append(args)
        return train_batches(*args)

    def seen_train(args, device, dataset, model, optimizer):
        torch.manual_seed(3)
        begin = resnet.Encoder("tiny", "batch", "3x3/2").state_dict()
        assert all(torch.equal(v, begin[k]) for k, v in model.encoder.state_dict().items())
        assert {direction.emb_scale for direction in model.directions} == {0.5}
        assert optimizer.defaults["betas"] == (0.8, 0.999)
        model.encoder.register_forward_pre_hook(
            lambda *call: autocast.append(torch.is_autocast_enabled("cpu")))
        train(args, device, dataset, model, optimizer)

    monkeypatch.setattr(data, "image_transform", seen_transform)
    monkeypatch.setattr(data, "to_patches", seen_patches)
    monkeypatch.setattr(data, "update", seen_update)
    monkeypatch.setattr(data, "train_batches", seen_batches)
    monkeypatch.setattr(cpc, "train", seen_train)
    flags = ["--min-area", "0.4", "--color-drop", "0.75", "--flip", "0.25", "--clip", "0.5",
             "--hidden", "24", "--target-dim", "16", "--norm", "batch", "--workers", "0",
             "--seed", "3", "--emb-scale", "0.5", "--stem", "3x3/2", "--bf16"]
    cpc.main(cpc.parse_args([*TINY, *flags, "--data", str(folder), "--out", str(tmp_path)]))
    assert transforms == [("inception", 32, 0.4), ("test", 32)]  # of training, of the picture
    *training, picture = patches
    assert orders == [(44, 8, 3, 0, 10)] and autocast == [True] * 10 + [False]
    assert [seed for seed, _ in training] == [data.derive_seed(3, "patches", step)
                                              for step in range(10)]
    assert all(how == dict(color_drop=0.75, jitter=True, flip=0.25) for _, how in training)
    assert picture == (None, {})
    assert rates == [data.learning_rate(step, 10, 3e-3, 2) for step in range(10)]
    assert clips == [0.5] * 10
    parts = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["training"]["parts"]
    assert parts["model"]["directions.3.target.weight"].shape[0] == 16
    encoder, _ = resnet.load_encoder(tmp_path / "encoder.pt")
    assert (encoder.stem, encoder.norm) == ("3x3/2", "batch")
    buffers = dict(encoder.named_buffers())
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, parts["average"][name])
        last = parts["model"][f"encoder.{name}"]
        assert torch.equal(value, last) == (name in buffers)


def test_benchmark_counts_what_pencil_and_paper_count(folder, tmp_path, monkeypatch, capsys):
    """GFLOP an image are 2 a multiply-add, forward and twice that backward. It writes nothing. By
    a clock that is a second later each time it is read, three batches take a second to load."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cpc, "time", Namespace(perf_counter=iter(range(99)).__next__))
    cpc.main(cpc.parse_args([*TINY, "--data", str(folder), "--benchmark", "1", "--directions", "1",
                             "--lengths", "2"]))
    assert not list(tmp_path.iterdir())
    encoder = 64 * 3 * 9 * 32 + 64 * (32 * 32 + 9 * 32 * 32 + 32 * 64 + 32 * 64)  # stem, 8x8
    encoder += 64 * 64 * 32 + 16 * (9 * 32 * 32 + 32 * 128 + 64 * 128)  # second block, to 4x4
    encoder += 16 * 128 * 64 + 4 * (9 * 64 * 64 + 64 * 256 + 128 * 256)  # third, to 2x2
    context = 5 * (2 * 256 * 32 + 3 * 32 * 32 + 2 * 32 * 32) + 2 * 256 * 32  # and projections
    logits = 3 * 5 * 200 * 32  # rows with a target, of eight images' 200 candidates
    expected = 3 * 2 * (25 * (encoder + context) + logits) / 1e9
    printed = capsys.readouterr().out
    measured = float(re.search(r"([\d.]+) GFLOP an image", printed)[1])
    assert measured == pytest.approx(expected, abs=0.006)
    assert re.search(r"step +1000\.0 ms +8\.0 images/s", printed)
    assert re.search(r"data +333\.3 ms +24\.0 images/s", printed)


def test_probe_command(trained, tmp_path, capsys):
    flags = ["--encoder", trained / "encoder.pt", "random", "--epochs", 1, "--batch-size", 8]
    evaluation.main(evaluation.parse_args([*map(str, flags), "--out", str(tmp_path / "e")]))
    results = events(tmp_path / "e", "result")
    assert [r["encoder"] for r in results] == ["cpc", "random"]
    for r in results:
        assert (r["head"], r["stage"], r["labels"]) == ("linear", "frozen", 1)
        assert r["labelled_images"] == 40
        assert (r["held_out_images"], r["seed"], r["top5"]) == (0, 0, 100)
        assert r["top1"] in [round(100 * n / 11, 3) for n in range(12)]
    assert "chance" in capsys.readouterr().out


FEW_LABELS = ["--labels", "1", "0.25", "--supervised", "tiny", "--seeds", "2", "--epochs", "1",
              "--finetune-epochs", "1", "--min-steps", "0", "--batch-size", "8",
              "--held-out", "0.2", "--sweep", "2", "--workers", "0"]


def test_few_labels_command(commands):
    """Every cell of the small Fig. 1 once; the lists of its labels; a table of means."""
    out, printed = commands("few labels")
    results = events(out, "result")
    cells = [(r["encoder"], r["stage"], r["labels"], r["seed"]) for r in results]
    rows = [("cpc", "frozen"), ("cpc", "finetuned"), ("pixels", "scratch")]
    expected = [(*row, f, s) for row in rows for f in (0.25, 1.0) for s in (0, 1)]
    assert sorted(cells) == sorted(expected)
    counts = {(r["labels"], r["labelled_images"], r["held_out_images"]) for r in results}
    assert counts == {(0.25, 10, 8), (1.0, 32, 8)}
    assert len(events(out, "trial")) == 2 * 2 * 2  # for each row and share, on the first seed
    tops = [r["top1"] for r in results
            if (r["encoder"], r["stage"], r["labels"]) == ("cpc", "finetuned", 0.25)]
    row = next(line for line in printed.splitlines() if line.startswith("cpc tiny fine-tuned"))
    assert f"{sum(tops) / 2:.1f} ±" in row and row.count("±") == 2


def fields(out, event, names):
    return [[line[name] for name in names] for line in events(out, event)]


def test_a_continued_evaluation_is_exact_and_repeats_nothing(commands, trained):
    """Stopped by SIGTERM in a fine-tuning, continued: the same results, each trained once."""
    (out, _), again = commands("few labels"), commands("few labels again")
    evaluation.main(evaluation.parse_args(
        ["--encoder", str(trained / "encoder.pt"), *FEW_LABELS, "--out", str(again)]))
    assert len(events(again, "start")) == 2
    for event, names in (("result", ("encoder", "labels", "seed", "held_out_top1", "top1")),
                         ("train", ("fit", "step", "loss"))):
        assert fields(again, event, names) == fields(out, event, names)


def test_fixed_schedule_and_subset_list(trained, folder, tmp_path):
    """--held-out 0: no label is seen but the listed ones."""
    names = data.names_of(data.load_dataset(str(folder), "train", 32))
    (tmp_path / "list.txt").write_text("\n".join(names[:12]))
    evaluation.main(evaluation.parse_args(
        ["--encoder", str(trained / "encoder.pt"), "--subset", str(tmp_path / "list.txt"),
         "--held-out", "0", "--epochs", "0.5", "--finetune-epochs", "0.5", "--min-steps", "4",
         "--batch-size", "8", "--workers", "0", "--out", str(tmp_path / "e")]))
    results = events(tmp_path / "e", "result")
    counts = [(r["labels"], r["labelled_images"], r["held_out_images"], r["held_out_top1"])
              for r in results]
    assert counts == [(0.3, 12, 0, None)] * 2


def test_detection_command(commands, tmp_path):
    """From cpc.py's encoder: a result for each encoder and stage, what VOC's devkit scores,
    pictures, and a detector for one's own picture."""
    out, printed = commands("detection")
    results = events(out, "result")
    assert [(r["encoder"], r["stage"], r["seed"]) for r in results] == [
        ("cpc", "frozen", 0), ("cpc", "finetuned", 0), ("random", "frozen", 0),
        ("random", "finetuned", 0)]
    for r in results:
        assert set(r["ap"]) == {"dog", "train"} and 0 <= r["mAP"] <= 100  # the classes there are
    assert "mAP (11-point)" in printed and "aeroplane" in printed
    assert len(list((out / "cpc" / "frozen").glob("comp4_det_test_*.txt"))) == 20
    assert min(Image.open(out / "random" / "finetuned" / "test.png").size) > 200
    picture = tmp_path / "mine.png"
    to_pil_image(data.Shapes("test", 64)[0][0]).convert("P").save(picture)
    detect.main(detect.parse_args(["--detect", str(picture), "--out", str(out)]))
    assert min(Image.open(out / "detected-mine.png").size) == 256
    with pytest.raises(OSError, match="model.pt cannot be read"):
        broken = str(out / "cpc" / "model.pt")
        detect.main(detect.parse_args(["--detect", broken, "--out", str(out)]))


def test_a_continued_detection_is_exact_and_repeats_nothing(commands, trained, voc):
    """Stopped in the second encoder's first stage, continued: the same results."""
    (out, _), again = commands("detection"), commands("detection again")
    detect.main(detect.parse_args(
        ["--encoder", str(trained / "encoder.pt"), "random", "--data", str(voc), *DETECT,
         "--out", str(again)]))
    assert torch.multiprocessing.get_sharing_strategy() == "file_system"
    assert len(events(again, "start")) == 2
    for event, names in (("result", ("encoder", "stage", "held_out_map", "mAP", "ap")),
                         ("train", ("fit", "step", "loss"))):
        assert fields(again, event, names) == fields(out, event, names)


def kill_and_continue(times, seconds, script, *flags):
    """Start a run, kill all its processes at a random moment, so many times; then let it end."""
    for _ in range(times):
        process = start(script, *flags)
        try:
            process.communicate(timeout=random.uniform(3, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    done = run(script, *flags, timeout=900)
    assert done.returncode == 0, done.stderr


def outcome(folder):
    """All that a run has learned: the values of its last state, tensors as their bytes."""
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    values = tree_leaves([saved["done"], saved["solution"], saved["training"]])
    return [x.numpy().tobytes() if isinstance(x, torch.Tensor) else x for x in values]


def test_continuing_is_exact(commands, trained, folder):
    """Stopped by SIGTERM in the middle of an epoch, killed, with other workers: the same bits."""
    out = commands("cpc again")
    cpc.main(cpc.parse_args(
        [*TINY, "--data", str(folder), "--out", str(out), "--workers", "0"]))
    assert len(events(out, "start")) == 3
    assert outcome(out) == outcome(trained)


def check_kills(times, out):
    """`python test_cpc.py 20 DIR`: each script killed so often, and the same run undisturbed."""
    encoder = ["--encoder", out / "cpc" / "encoder.pt"]
    for name, script, *flags in (
            ("cpc", "cpc.py", "--tiny", "--epochs", 1, "--save-every", 0),
            ("eval", "eval.py", *encoder, "--labels", 0.01, 0.02, "--min-steps", 20, "--batch-size",
             16),
            ("detect", "detect.py", *encoder, "--epochs", 0.02, "--finetune-epochs", 0.02,
             "--batch-size", 2)):
        done = run(script, *flags, "--out", out / name, timeout=900)
        assert done.returncode == 0, done.stderr
        killed = out / f"{name}-killed"
        kill_and_continue(times, 12, script, *flags, "--out", killed)
        same = outcome(out / name) == outcome(killed)
        print(f"{script} killed {times} times: {'the same' if same else 'DIFFERENT'}", flush=True)


PIXELS = ["--tiny", "--head", "none", "--supervised"]


@pytest.mark.parametrize("script, flags, message", [
    ("cpc.py", [], "no folder imagenet: pass --data DIR, or --tiny"),
    ("cpc.py", ["--data", "nowhere"], "no folder nowhere"),
    ("cpc.py", ["--tiny", "--stride", "7"], "crop 32, patch 8, stride 7"),
    ("cpc.py", ["--tiny", "--lengths", "2", "5"], "on a 5x5 grid"),
    ("cpc.py", ["--tiny", "--workers", "-5"], "-5 is not between 0"),
    ("cpc.py", ["--tiny", "--emb-scale", "nan"], "nan is not between"),
    ("cpc.py", ["--tiny", "--batch-size", "0"], "0 is not between 1"),
    ("cpc.py", ["--tiny", "--warmup", "496"], "--epochs 8 of 4000 images are 496 steps, not more"),
    ("cpc.py", ["--tiny", "--arch", "resnet92"], "pass --stem 3x3"),
    ("cpc.py", ["--tiny", "--batch-size", "9000"], "4000 images are 0 steps, not more than 50"),
    ("cpc.py", ["--tiny", "--direction", "4"], "unrecognized arguments"),
    ("cpc.py", ["--tiny", "--norm", "group"], "invalid choice: 'group'"),
    ("eval.py", ["--encoder", "none.pt"], "no encoder at none.pt: run cpc.py first"),
    ("eval.py", ["--tiny", "--head", "none", "--supervised", "vgg"], "--supervised vgg is no ARCH"),
    ("eval.py", ["--tiny", "--head", "none"], "--head none leaves nothing to train"),
    ("eval.py", ["--tiny", "--supervised", "--labels", "0", "--head", "none"], "0 is not between"),
    ("eval.py", ["--tiny", "--labels", "1", "--sweep", "4"], "no encoder at runs/cpc"),
    ("eval.py", [*PIXELS, "--sweep", "4", "--held-out", "0"], "--sweep needs"),
    ("eval.py", [*PIXELS, "patched"], "beside an encoder.pt in --encoder"),
    ("eval.py", ["--tiny", "--encoder", "torchvision:vit_b_16"], "torchvision has no such ResNet"),
    ("eval.py", ["--tiny", "--encoder", "torchvision:resnet18:no.pt"], "there is no file no.pt"),
    ("eval.py", [*PIXELS, "--held-out", "0.0001"], "is none: raise it"),
    ("detect.py", [], "no encoder at runs/cpc/encoder.pt: run cpc.py first"),
    ("detect.py", ["--encoder", "random"], "the network before it, untrained: name one"),
    ("detect.py", ["--encoder", "torchvision:resnet18"], "pass --data DIR with VOCdevkit/VOC2007"),
    ("detect.py", ["--encoder", "torchvision:resnet18", "--side", "8"], "8 is not between 32 and"),
    ("detect.py", ["--tiny", "--encoder", "torchvision:resnet18", "--held-out", "0.0001"],
     "is none: raise it"),
    ("eval.py", ["--subset", "list.txt"], "there is no file list.txt"),
    ("detect.py", ["--detect", "photo.jpg"], "there is no file photo.jpg"),
    ("detect.py", ["--detect", __file__], "no detector in runs/detect"),
])
def test_mistakes_get_one_line(script, flags, message, tmp_path, monkeypatch, capsys):
    module = {"cpc.py": cpc, "eval.py": evaluation, "detect.py": detect}[script]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        module.main(module.parse_args(flags))
    code, printed = end.value.code, capsys.readouterr()
    error = printed.err + (f"{code}\n" if isinstance(code, str) else "")  # Python prints a string
    assert message in error and code != 0 and len(error.splitlines()) == 1
    assert not printed.out and not list(tmp_path.iterdir())


def test_mistakes_at_the_terminal(tmp_path):
    done = run("eval.py", "--labels", "2", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, expected", [
    ([], dict(arch="resnet161", norm="layer", directions=4, lengths=[2, 3], crop=240, patch=80,
              stride=32, target_dim=64, hidden=256, emb_scale=0.1)),
    (["--preset", "v1"], dict(arch="resnet92", norm="none", directions=1, lengths=[2, 3, 4, 5],
                              crop=256, patch=64, stride=32, color_drop=0.0, image_aug="v1",
                              lr=2e-4, clip=0.0, average=0.0)),
    (["--tiny", "--lr", "0.1"], dict(arch="tiny", data="shapes", lr=0.1)),
])
def test_presets(flags, expected):
    args = vars(cpc.parse_args(flags))
    assert {k: args[k] for k in expected} == expected


def test_the_papers_recipes():
    """A.3: Adam at 5e-4, here without decay, on 512 images of 240 pixels; none is held out. A.4:
    the best supervised network is a ResNet-152, its learning rates are around 0.1."""
    probe = evaluation.parse_args(["--encoder", "torchvision:resnet50"])
    assert (probe.head, probe.lr, probe.weight_decay) == ("linear", 5e-4, 0)
    assert (probe.batch_size, probe.crop, probe.held_out, probe.labels) == (512, 240, 0, [1])
    pixels = evaluation.parse_args(["--head", "none", "--supervised"])
    assert (pixels.supervised, pixels.lr, pixels.crop) == (["resnet152"], 0.1, 240)


def test_flags_at_random():
    """Each combination is refused with one line, or its model takes its patches."""
    rng = random.Random(0)
    choices = {
        "--arch": ["tiny", "small"], "--norm": resnet.NORMS, "--stem": resnet.STEMS,
        "--directions": ["1", "2", "3", "4"], "--lengths": ["1", "2 3", "2 3 4", "5", "0", "2 2"],
        "--crop": ["32", "40", "48", "0", "240"], "--patch": ["4", "8", "12", "16", "40", "1"],
        "--stride": ["4", "6", "8", "0", "-4", "1"], "--image-aug": ["inception", "v1"],
        "--color-drop": ["0", "1", "nan", "-1"], "--flip": ["0.5", "1.1"],
        "--batch-size": ["2", "0", "-2", "1.5"], "--hidden": ["8", "0"], "--lr": ["1e-3", "0", "x"],
        "--average": ["0", "1"], "--warmup": ["0", "-1"], "--preset": ["v1", "v3"]}
    accepted = refused = 0
    for _ in range(250):
        flags = ["--tiny", "--batch-size", "2"]
        for name in rng.sample(list(choices), rng.randint(1, 5)):
            flags += [name, *rng.choice(list(choices[name])).split()]
        error = io.StringIO()
        try:
            with contextlib.redirect_stderr(error):
                args = cpc.parse_args(flags)
        except SystemExit as end:
            line = error.getvalue() if end.code == 2 else end.code  # of argparse, or of grid_side
            assert len(line.splitlines()) == 1, flags
            refused += 1
            continue
        G = data.grid_side(args.crop, args.patch, args.stride)
        accepted += 1
        if G < 8:
            encoder = resnet.Encoder(args.arch, args.norm, args.stem)
            model = cpc.CPC(encoder, args.directions, args.lengths, args.hidden)
            loss, _ = model(torch.randn(2, G, G, 3, args.patch, args.patch))
            assert loss.isfinite(), flags
    assert accepted > 25 and refused > 25


def documented_commands():
    """[(script, flags)] of the README, the docstrings and `./run.sh`, its lists included."""
    printed = [subprocess.run([HERE / "run.sh", what], capture_output=True, text=True, check=True)
               for what in ("results", "paper")]
    names = ("README.md", "assets/results.md", "run.sh", "cpc.py", "eval.py", "detect.py")
    texts = [(HERE / name).read_text() for name in names] + [done.stdout for done in printed]
    launcher = r"(?:\S*python\S*|\S*torchrun\S* [^#]*?|\$launch)"
    pattern = re.compile(rf'\s*{launcher} "?(cpc|eval|detect)\.py\b([^#]*)')
    lines = [line for text in texts for line in text.replace("\\\n", " ").splitlines()]
    matches = [pattern.match(line) for line in lines]
    return [(m[1], shlex.split(m[2])) for m in matches if m]


def test_documented_commands_parse(trained, monkeypatch):
    monkeypatch.setattr(data, "existing", str)  # the user's own pictures and lists
    commands = documented_commands()
    assert len(commands) > 60 and {script for script, _ in commands} == {"cpc", "eval", "detect"}
    for script, flags in commands:
        module = {"cpc": cpc, "eval": evaluation, "detect": detect}[script]
        if script != "cpc" and ("none" not in flags or "--encoder" in flags):
            flags = [*flags, "--encoder", str(trained / "encoder.pt")]
        module.parse_args(flags)


def test_the_results_are_what_runs_wrote():
    """Each figure of the README's table is a mean ± deviation of lines in assets/results.jsonl."""
    lines = [json.loads(line) for line in (HERE / "assets/results.jsonl").read_text().splitlines()]
    results = [line for line in lines if line["event"] == "result"]
    pattern = r"^\| ([\d.]+) % \([\d,]+\) \| (.*) \|$"
    rows = re.findall(pattern, (HERE / "README.md").read_text(), re.MULTILINE)
    assert len(rows) >= 4
    columns = (("photos", "scratch"), ("longer-pixels", "scratch"), ("photos", "frozen"),
               ("photos", "finetuned"))
    for share, cells in rows:
        for (name, stage), cell in zip(columns, cells.split(" | "), strict=True):
            tops = [r["top1"] for r in results if r["run"].startswith(name) and r["stage"] == stage
                    and r["head"] != "linear" and r["labels"] == float(share) / 100]
            spread = f" ± {statistics.stdev(tops):.1f}" if len(tops) > 1 else ""
            expected = f"{statistics.mean(tops):.1f}{spread}" if tops else "not run"
            assert cell.strip("*") == expected, (name, share, stage)


def test_the_shipped_encoder_loads():
    """assets/cpc-photos.pt: a network of under 4 MB, without a path of where it was trained."""
    path = HERE / "assets" / "cpc-photos.pt"
    encoder, file = resnet.load_encoder(path)
    assert path.stat().st_size < 4e6 and not os.path.isabs(file["trained"]["data"])
    assert zipfile.ZipFile(path).testzip() is None  # its checksums are right
    images = (7 * torch.arange(2 * 3 * 96 * 96) % 256).view(2, 3, 96, 96).to(torch.uint8)
    latents = encoder.grid(data.to_patches(images, CPU, file["patch"], file["stride"]))
    assert latents.shape == (2, 512, 5, 5)
    assert latents.mean().item() == pytest.approx(0.12995, rel=1e-3)  # what it always computed
    assert latents.std().item() == pytest.approx(0.13122, rel=1e-3)


def test_the_readme_names_what_there_is():
    text = (HERE / "README.md").read_text()
    names = re.findall(r"`(data|resnet|cpc|eval|detect)\.([\w.]+)", text)
    modules = {"data": data, "resnet": resnet, "cpc": cpc, "eval": evaluation, "detect": detect}
    assert len(names) > 20
    for module, name in names:
        if name != "py":
            operator.attrgetter(name)(modules[module])


if __name__ == "__main__":
    if len(sys.argv) == 4:
        check_processes(*sys.argv[1:])
    else:
        check_kills(int(sys.argv[1]), Path(sys.argv[2]))
