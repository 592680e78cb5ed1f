"""What the paper claims and what the README promises, each as a test that can fail.

    pytest test_cpc.py        # two CPU cores, under three minutes

Sections follow the files: encoder, patches and data, objective, probe, whole commands.
"""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.v2.functional import to_pil_image

import cpc
import data
import eval as evaluation
import resnet

HERE = Path(__file__).parent
CPU = torch.device("cpu")


@pytest.fixture(scope="session", autouse=True)
def process_group():
    data.start_process()  # a world of one


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------
# Encoder
# ---------------------------------------------------------------------------------------------


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


def test_no_norm_stays_finite_at_full_depth():
    """53 blocks without normalisation: the latents keep the order of the input."""
    torch.manual_seed(0)
    encoder = resnet.Encoder("resnet161-deep", "none")
    with torch.no_grad():
        latents = encoder(torch.randn(2, 3, 64, 64))
    assert 0.05 < latents.std() < 20


def test_checkpointing_changes_no_gradient():
    patches, gradients = torch.randn(4, 3, 8, 8), []
    for on in (False, True):
        torch.manual_seed(0)
        encoder = resnet.Encoder("tiny", checkpointing=on)
        encoder(patches).square().sum().backward()
        gradients.append(encoder.conv1.weight.grad)
    assert torch.equal(*gradients)


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
    with pytest.raises(SystemExit, match="no encoder at"):
        resnet.load_encoder(tmp_path / "none.pt")
    torch.save({"state": {}}, path)
    with pytest.raises(SystemExit, match="is not our encoder file"):
        resnet.load_encoder(path)


# ---------------------------------------------------------------------------------------------
# Patches and data
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop, patch, stride, G", [(240, 80, 32, 6), (256, 64, 32, 7), (32, 8, 6, 5)])
def test_patches_equal_naive_slicing(crop, patch, stride, G):
    images = torch.randint(0, 256, (2, 3, crop, crop), dtype=torch.uint8, generator=generator())
    patches = data.extract_patches(images, patch, stride)
    assert patches.shape == (2, G, G, 3, patch, patch) and patches.is_contiguous()
    for b in range(2):
        for i in range(G):
            for j in range(G):
                y, x = i * stride, j * stride
                assert torch.equal(patches[b, i, j], images[b, :, y:y + patch, x:x + patch])


def test_geometry_that_does_not_tile_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match="crop 240, patch 80, stride 33"):
        data.grid_side(240, 80, 33)


def same_patches(n, P=16):
    """One random patch, n*3*3 times: any difference afterwards is augmentation's."""
    patch = torch.randint(0, 256, (3, P, P), dtype=torch.uint8, generator=generator())
    return patch.expand(n, 3, 3, 3, P, P).contiguous()


def test_color_dropping():
    """Sec. 4.1: two of three channels dropped, independently for each patch; Doersch et al. 2015:
    noise of 1/100 of the remaining channel's deviation in their place."""
    patches = same_patches(100)
    plain = data.normalise(patches).flatten(0, 2)
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
    plain, side = data.normalise(patches).flatten(0, 2)[0], 15  # 60/64 of 16
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
    plain = data.normalise(patches).flatten(0, 2)
    out = data.augment_patches(patches, generator(), flip=0.3).flatten(0, 2)
    flipped = (out == plain.flip(-1)).all(3).all(2).all(1)
    assert ((out == plain).all(3).all(2).all(1) | flipped).all()
    assert flipped.float().mean() == pytest.approx(0.3, abs=0.05)


def epoch_of(workers, seed=0, start=0):
    batches = data.TrainBatches(40, 8, seed, start, 10)  # two epochs of 5 steps
    loader = data.make_loader(data.Shapes("train"), data.image_transform("inception", 32), batches, CPU, workers)
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
    return root


def test_folders(folder, tmp_path):
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


# ---------------------------------------------------------------------------------------------
# Objective
# ---------------------------------------------------------------------------------------------


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
                expected = (rows <= i) & (rows >= i - 5) & ((cols - j).abs() <= (i - rows).clamp(0) + 5)
                expected &= (cols - j).abs() <= 5
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


def test_perfect_predictions_lose_nothing():
    targets = 10 * F.normalize(torch.randn(2, 64, 5, 5, generator=generator()), dim=1)
    loss, accuracy = cpc.info_nce(targets.roll(-2, 2), targets, 2)  # row i predicts row i + 2
    assert accuracy == 1 and loss < 1e-3


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
        loss, accuracy = cpc.update(model, optimizer, patches, 2e-3, 1.0, bf16=False)
    assert loss < 0.25 * math.log(100) and accuracy > 0.8


def test_learning_rate():
    rates = [cpc.learning_rate(step, 100, 2.0, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[10] == 2.0 and rates[-1] < 0.01
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)


# ---------------------------------------------------------------------------------------------
# Linear probe
# ---------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_frozen_is_bit_identical(norm):
    file = dict(patch=8, stride=6, trained=dict(color_drop=0.5, jitter=True, flip=0.0))
    frozen = evaluation.Frozen(resnet.Encoder("tiny", norm), file, CPU, bf16=False)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    latents = frozen.latents(images, seed=1)
    assert latents.shape == (4, 256, 5, 5) and not latents.requires_grad
    assert not torch.equal(latents, frozen.latents(images, seed=2)) and torch.equal(latents, frozen.latents(images, 1))
    frozen.assert_unchanged()
    frozen.encoder.state_dict()["final_norm.bias"][0] += 1e-3
    with pytest.raises(AssertionError, match="has changed"):
        frozen.assert_unchanged()


# ---------------------------------------------------------------------------------------------
# Whole commands
# ---------------------------------------------------------------------------------------------

TINY = ["--tiny", "--batch-size", "8", "--epochs", "2", "--warmup", "2"]


def command(script, *args, processes=0):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*(launch if processes else [sys.executable]), str(HERE / script), *map(str, args)]


def run(script, *args, processes=0, cwd=None):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command(script, *args, processes=processes), capture_output=True, text=True, cwd=cwd,
                          env=env, timeout=150)


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


def test_a_run_is_never_overwritten(trained):
    before = (trained / "encoder.pt").read_bytes()
    done = run("cpc.py", *TINY, "--out", trained)
    assert done.returncode == 1 and "holds a run" in done.stderr and len(done.stderr.splitlines()) == 1
    done = run("cpc.py", *TINY, "--out", trained, "--lr", "1e-3", "--resume", "--data", "shapes")
    assert done.returncode == 1 and "was made with" in done.stderr and "Traceback" not in done.stderr
    assert (trained / "encoder.pt").read_bytes() == before


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
    done = run("eval.py", "--encoder", trained / "encoder.pt", "--epochs", 1, "--batch-size", 8,
               "--out", tmp_path / "e")
    assert done.returncode == 0, done.stderr
    results = events(tmp_path / "e", "result")
    assert [r["encoder"] for r in results] == ["cpc", "random"]
    for r in results:
        assert (r["head"], r["labels"], r["seed"], r["top5"]) == ("linear", 1.0, 0, 100)
        assert r["top1"] in [round(100 * n / 11, 3) for n in range(12)]
    assert "chance" in done.stdout


def test_resume_is_exact(trained, folder, tmp_path):
    """Stopped by SIGTERM in the middle of an epoch, with another number of workers: the same bits."""
    out = tmp_path / "stopped"
    flags = [*TINY, "--data", folder, "--out", out]
    process = subprocess.Popen(command("cpc.py", *flags, "--workers", 1), stderr=subprocess.PIPE, text=True,
                               stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not (out / "patches.png").exists() and process.poll() is None:
        time.sleep(0.02)  # written in the first step
    process.send_signal(signal.SIGTERM)
    assert "--resume" in process.communicate()[1].splitlines()[-1] and process.returncode == 143
    assert not (out / "encoder.pt").exists()
    done = run("cpc.py", *flags, "--workers", 0, "--resume")
    assert done.returncode == 0, done.stderr
    saved = [torch.load(f / "checkpoint.pt", weights_only=True)["state"] for f in (trained, out)]
    for part in ("model", "optimizer", "average"):
        a, b = (json.dumps(s[part], default=lambda t: t.tolist()) for s in saved)
        assert a == b, part


def test_two_processes(folder, tmp_path):
    """Under torchrun: the gradients that the mathematics asks for (below), the same commands, and
    every test image counted once, though 11 do not divide by two."""
    done = run("test_cpc.py", processes=2)
    assert done.returncode == 0, done.stderr
    done = run("cpc.py", *TINY, "--data", folder, "--out", tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr
    assert [e["step"] for e in events(tmp_path / "two", "epoch")] == [5, 10]
    assert events(tmp_path / "two", "epoch")[0]["chance_loss"] == pytest.approx(math.log(4 * 25))  # local negatives
    done = run("eval.py", "--encoder", tmp_path / "two" / "encoder.pt", "--epochs", 1, "--batch-size", 8,
               "--out", tmp_path / "e", processes=2)
    assert done.returncode == 0, done.stderr
    assert all(r["top1"] in [round(100 * n / 11, 3) for n in range(12)] for r in events(tmp_path / "e", "result"))


def check_two_processes():
    """Run by each of two processes: DDP's gradient is that of the mean of the two halves' losses,
    each with the negatives of its own half."""
    data.start_process()
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
    ("cpc.py", ["--tiny", "--arch", "resnet92"], "pass --stem 3x3"),
    ("cpc.py", ["--tiny", "--batch-size", "9000"], "8000 images, fewer than --batch-size 9000"),
    ("cpc.py", ["--tiny", "--color-drop", "2"], "--color-drop 2.0 is not between 0 and 1"),
    ("cpc.py", ["--tiny", "--direction", "4"], "unrecognized arguments"),
    ("eval.py", ["--encoder", "none.pt"], "no encoder at none.pt: run cpc.py first"),
])
def test_mistakes_get_one_line(script, flags, message, tmp_path):
    done = run(script, *flags, cwd=tmp_path)
    assert done.returncode in (1, 2) and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


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


def documented_commands():
    """Every cpc.py and eval.py command of the README, the docstrings and `./run.sh paper`."""
    paper = subprocess.run([HERE / "run.sh", "paper"], capture_output=True, text=True, check=True).stdout
    lines = [line for text in (*((HERE / f).read_text() for f in ("README.md", "cpc.py", "eval.py")), paper)
             for line in text.splitlines()]
    pattern = re.compile(r"\s*(?:python|\S*torchrun [^#]*?) (cpc|eval)\.py\b([^#]*)")
    return [(m[1], shlex.split(m[2].replace("$s", "0"))) for m in map(pattern.match, lines) if m]


def test_documented_commands_parse(trained):
    commands = documented_commands()
    assert len(commands) > 25 and {script for script, _ in commands} == {"cpc", "eval"}
    for script, flags in commands:
        if script == "cpc":
            cpc.parse_args(flags)
        else:
            evaluation.parse_args([*flags, "--encoder", str(trained / "encoder.pt")])


if __name__ == "__main__":
    check_two_processes()
