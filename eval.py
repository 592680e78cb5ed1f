"""What a representation is worth: classification with all labels or a few (Sec. 2.2, 4.2, A.3, A.4).

    python eval.py                                           # linear classification, all labels (A.3)
    python eval.py --labels 0.01 0.1 1 --supervised --out runs/labels    # Fig. 1: CPC and pixels, by labels
    python eval.py --labels 0.01 --held-out 0 --out runs/labels-only     # no label but the 1 %: a fixed schedule
    python eval.py --labels 0.01 --head none --supervised resnet50 resnet152 --sweep 8 --out runs/pixels
    python eval.py --encoder runs/cpc/encoder.pt random torchvision:resnet50:FILE --labels 0.1 --out runs/others
    torchrun --nproc_per_node=8 eval.py --data imagenet --labels 0.01 0.1 1 --out runs/labels-8

Linear: the encoder frozen, batch norm and one linear layer. Efficient (`--labels`): an 11-block
ResNet on the frozen latents, then both fine-tuned from that solution. Supervised: the same labels,
held-out images and augmentation, from pixels. A `result` line in log.jsonl for each, then a table.

Results: shapes, 1 % of the labels (40), five seeds, top-1 77.6 ± 6.3 fine-tuned, 47.8 ± 9.0 from pixels; 4,200 photos,
1 % (40), three seeds, 39.2 ± 2.6 and 35.6 ± 1.5; on CIFAR-10 no lasting gain (README). At the paper's scale not yet
measured.

Shapes: B batch, G grid side, D latent channels.
"""

import copy
import math
import os
import random
import statistics
import time
from argparse import BooleanOptionalAction
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, Subset
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

import data
from resnet import (ARCHITECTURES, STEMS, Bottleneck, Encoder, Parser, Representation, Run, assert_unchanged,
                    find_encoders, fresh, learning_rate, one_line, save_encoder, sha256)

# ---- Classifiers h_psi: latents [B, D, G, G] -> logits [B, classes] -----------------------------


class LinearProbe(nn.Module):
    """A.3: batch norm without scale, a 1x1 convolution to the classes, logits mean-pooled over the
    grid. Latents [B, D, G, G] -> logits [B, classes]."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.norm.weight.requires_grad_(False)  # paper: "without scale parameter": it stays 1
        self.conv = nn.Conv2d(channels, classes, 1)

    def forward(self, latents: Tensor) -> Tensor:
        return self.conv(self.norm(latents)).mean((2, 3))


def pooled_linear(channels: int, classes: int, dropout: float) -> nn.Sequential:
    """Mean-pool, A.4's "DropOut layer before the final linear classification layer", linear."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(channels, classes))


def resnet_head(in_channels: int, classes: int, dropout: float = 0.0, channels: int = 4096,
                width: int = 1024) -> nn.Sequential:
    """Sec. 2.2: "an 11-block ResNet architecture with 4096-dimensional feature maps and
    1024-dimensional bottleneck layers"."""
    # ours: batch norm, as in the supervised ResNets; no stride on a 6x6 grid
    blocks = (Bottleneck(channels if n else in_channels, channels, width, 1, "batch") for n in range(11))
    return nn.Sequential(*blocks, nn.BatchNorm2d(channels), nn.ReLU(), pooled_linear(channels, classes, dropout))


class Classifier(nn.Module):
    """h_psi o f_theta. frozen: f_theta is a fixed function, its batch norms' statistics too."""

    def __init__(self, encoder: nn.Module, head: nn.Module, frozen: bool):
        super().__init__()
        self.encoder, self.head, self.frozen = encoder.requires_grad_(not frozen), head, frozen

    def train(self, mode: bool = True):
        super().train(mode)
        self.encoder.train(mode and not self.frozen)
        return self

    def latents(self, inputs: Tensor) -> Tensor:
        """Patches [B, G, G, 3, P, P] or whole images [B, 3, S, S] -> [B, D, G, G]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.encoder.grid(inputs) if inputs.dim() == 6 else self.encoder.features(inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.latents(inputs)).float()


# ---- Representations f_theta: a row of the table each -------------------------------------------


@dataclass
class Source:
    """Something that turns images into latents, and how images get there.

    make: seed -> a new network with `grid` or `features`; patch None: it sees whole images."""

    name: str  # cpc, random, pixels, patched, torchvision: the result's "encoder"
    arch: str
    make: Callable[[int], nn.Module]
    crop: int
    patch: int | None = None
    stride: int | None = None
    supervised: bool = False  # trained from scratch on the labels
    trained: dict = field(default_factory=dict)  # pre-training's arguments, for its augmentation

    def inputs(self, images: Tensor, device: torch.device, seed: int | None = None, **augmentation) -> Tensor:
        """uint8 [B, 3, S, S] -> what the network takes; a whole image is one patch as large as it."""
        patches = data.to_patches(images, device, self.patch or self.crop, self.stride or 1, seed, **augmentation)
        return patches if self.patch else patches.flatten(0, 2)


def find_sources(args, encoders: list[Representation]) -> list[Source]:
    """The rows that `--encoder` and `--supervised` ask for."""
    file = next((e.file for e in encoders if e.file), None)
    if file is None and any("patched" in name for name in args.supervised):
        raise SystemExit("patched takes architecture and patches from an encoder.pt: name one in --encoder")
    geometry = lambda file: (file["crop"], file["patch"], file["stride"]) if file else (args.crop,)
    sources = [Source(e.name, e.arch, e.make, *geometry(e.file), trained=e.file["trained"] if e.file else {})
               for e in encoders if args.head != "none"]
    for name in args.supervised:
        if name.startswith("patched"):  # Sec. 4.1: 66.4 % with batch norm, 62.5 % without
            make = fresh(Encoder, file["arch"], "none" if name == "patched-none" else "batch", file["stem"])
            sources.append(Source(name, file["arch"], make, *geometry(file), supervised=True))
        else:  # A.4
            arch, *stem = name.split(":")
            sources.append(Source("pixels", name, fresh(Encoder, arch, "batch", *stem), args.crop, supervised=True))
    return sources


# ---- Training a classifier ----------------------------------------------------------------------


@dataclass
class Recipe:
    """How one classifier is trained; what `--sweep` varies."""

    epochs: float  # over the labelled images
    min_steps: float  # and at least so many steps: 1 % of the labels make short epochs
    batch_size: int
    lr: float
    weight_decay: float
    dropout: float

    def times(self, factor: float) -> "Recipe":
        """As long as `factor` times this one."""
        return replace(self, epochs=factor * self.epochs, min_steps=factor * self.min_steps)

    def variant(self, seed: int) -> "Recipe":
        """A.4's grid, around this one: lr {0.05, 0.1, 0.2}, the batch size or half of it, weight decay
        logarithmically from 1e-5 to 1e-2, drop-out linearly from 0 to 1 (ours: 0.9, which still learns)."""
        draw = random.Random(seed)
        return replace(self, lr=self.lr * draw.choice((0.5, 1, 2)), weight_decay=10 ** draw.uniform(-5, -2),
                       batch_size=max(1, self.batch_size // draw.choice((1, 2))), dropout=draw.uniform(0, 0.9))


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Top-1 and top-5 hits and the number of images, int64 [3]. logits [B, C], labels [B]."""
    ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    return torch.stack((ranked[:, 0].sum(), ranked.sum(), torch.tensor(len(labels), device=labels.device)))


@dataclass
class Task:
    """A column of the table under one seed: whose labels are used, and what is tested on."""

    labels: float  # fraction
    seed: int
    classes: int
    train: Subset
    held_out: Subset  # of the training images, to stop and select by
    test: Dataset


class Bench:
    """How images reach a row's classifier: what its training and testing share."""

    CACHE = 4 << 30  # ours: bytes of a set's images, and of its latents, that a process keeps

    def __init__(self, args, source: Source, device: torch.device, bf16: bool):
        self.args, self.source, self.device, self.bf16 = args, source, device, bf16
        self.caches = {}  # what is kept of a set of images: see `cached`
        kind, self.augmentation, trained = "inception", {}, source.trained
        if args.head == "linear" and trained:
            # Sec. 2.2: "the same data-augmentation as in the unsupervised learning phase"
            kind, self.augmentation = trained["image_aug"], {k: trained[k] for k in ("jitter", "flip")}
        if trained or args.head == "resnet" and not source.supervised:
            # Sec. 2.2: "In addition to random color-dropping ... the Inception data-augmentation scheme".
            # A.4 drops no colours; with it the supervised rows did worse (README, "What differs").
            self.augmentation["color_drop"] = args.color_drop
        grey = trained.get("image_aug") == "v1"
        self.train_transform = data.image_transform(kind, source.crop, args.min_area, args.distort, grey)
        self.test_transform = data.image_transform("test", source.crop, grey=grey)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def train_batches(self, images, batch: int, seed: int, start: int, stop: int):
        """(inputs, labels) of steps start to stop, augmented."""
        batches = data.TrainBatches(len(images), batch, seed, start, stop)
        loader = data.load_batches(images, self.train_transform, batches, self.device, self.args.workers)
        for step, (x, y) in enumerate(loader, start):
            patch_seed = data.derive_seed(seed, "patches", step)
            yield self.source.inputs(x, self.device, patch_seed, **self.augmentation), y.to(self.device)

    def cached(self, name: str, pairs):
        """Pairs of tensors, from `pairs` the first time and then from memory, if they fit."""
        if name in self.caches:
            yield from self.caches[name]
            return
        kept, size = [], 0
        for pair in pairs:
            size += pair[0].nbytes
            if size <= self.CACHE:
                kept.append(tuple(x.cpu() for x in pair))
            else:
                kept.clear()
            yield pair
        if size <= self.CACHE:
            self.caches[name] = kept

    @torch.no_grad()
    def latents(self, model: Classifier, images, name: str):
        """(latents, labels) of all images, this process's share, without augmentation: nothing is random
        about them, so that images are read once, and a frozen encoder sees them once."""
        batches = data.TestBatches(len(images), max(1, self.args.batch_size // dist.get_world_size()))
        loader = data.load_batches(images, self.test_transform, batches, self.device, self.args.workers)

        def encode():
            for x, y in self.cached(f"{name} images", loader):
                with self.autocast():
                    yield model.latents(self.source.inputs(x, self.device)), y

        for z, y in self.cached(f"{name} latents", encode()) if model.frozen else encode():
            yield z.to(self.device), y.to(self.device)

    @torch.no_grad()
    def accuracy(self, model: Classifier, images, cache: str) -> tuple[float, float]:
        """Top-1 and top-5 in percent over all processes: a single crop (Sec. 2.2)."""
        model.eval()
        counts = torch.zeros(3, dtype=torch.int64, device=self.device)
        for z, y in self.latents(model, images, cache):
            with self.autocast():
                counts += count_correct(model.head(z).float(), y)
        dist.all_reduce(counts)
        top1, top5, n = counts.tolist()
        return 100 * top1 / n, 100 * top5 / n


def make_optimizer(model: Classifier, stage: str, recipe: Recipe) -> torch.optim.Optimizer:
    """Adam for a linear probe (A.3), AdamW for fine-tuning, SGD for what starts from random weights."""
    weights = [p for p in model.parameters() if p.requires_grad]
    # paper: A.3's Adam for the probe, which is AdamW at the default decay of 0. ours: fine-tuning's; SGD at a
    # tenth of the rate before undid a tiny encoder in six steps
    if isinstance(model.head, LinearProbe) or stage == "finetuned":
        return torch.optim.AdamW(weights, recipe.lr, weight_decay=recipe.weight_decay)
    # ours: A.4 names learning rates and weight decays, not the optimiser they suit
    return torch.optim.SGD(weights, recipe.lr, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay)


def fit(bench: Bench, model: Classifier, task: Task, recipe: Recipe, stage: str, key: str, run: Run, state: dict,
        start_top1: float | None) -> float | None:
    """Train `model` in place and return its held-out top-1 (None: no held-out images).

    Held-out images are tested ten times along the way and the best of these states is restored, the
    first one too if its accuracy is known (start_top1): early stopping (Sec. 2.2) with all of the
    schedule as its patience. Without held-out images: the last state. FloatingPointError if it diverges."""
    world = dist.get_world_size()
    batch = min(max(recipe.batch_size, world), len(task.train)) // world * world
    if not batch:
        raise SystemExit(f"{len(task.train)} labelled images do not fill a batch of {world} processes")
    steps = math.ceil(max(recipe.epochs * len(task.train) / batch, recipe.min_steps))
    part = model.head if model.frozen else model  # what is trained, and saved
    optimizer = make_optimizer(model, stage, recipe)
    constant = isinstance(model.head, LinearProbe)  # paper: A.3 names a learning rate, no schedule
    start, totals = 0, torch.zeros(2, device=bench.device)  # sum of losses, steps
    best, best_top1 = (None, -1.0) if start_top1 is None else (copy.deepcopy(part.state_dict()), start_top1)
    if state.get("key") == key:
        start, best, best_top1 = state["step"], state["best"], state["best_top1"]
        part.load_state_dict(state["part"])
        optimizer.load_state_dict(state["optimizer"])
        totals += state["totals"].to(bench.device)
    factor = (lambda step: 1.0) if constant else partial(learning_rate, steps=steps, peak=1.0, warmup=steps // 10)
    schedule = LambdaLR(optimizer, factor, start - 1)
    ddp = DistributedDataParallel(model)
    tests = {math.ceil(steps * n / 10) for n in range(1, 11)}
    batches = bench.train_batches(task.train, batch, task.seed, start, steps)
    bar = tqdm(batches, desc=key, initial=start, total=steps, disable=not run.is_main, mininterval=1)
    model.train()
    for done, (inputs, labels) in enumerate(bar, start + 1):
        torch.manual_seed(data.derive_seed(task.seed, "drop-out", done, dist.get_rank()))  # the same when resumed
        with bench.autocast():
            logits = ddp(inputs)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        totals += torch.stack((loss.detach(), torch.ones_like(loss)))
        caught, line = run.stop_signal(), {}
        if caught or done in tests:
            dist.all_reduce(totals.div_(world))  # from now on every rank's are the mean
            mean = (totals[0] / totals[1]).item()
            if not math.isfinite(mean):
                raise FloatingPointError(
                    f"{key}: loss is not finite at step {done}, learning rate {schedule.get_last_lr()[0]:.2e}: "
                    f"lower --lr; the last checkpoint is kept")
            if done in tests:
                totals.zero_()
                for buffer in part.buffers():  # of batch norm: DDP hands on rank 0's, but not the last step's
                    if buffer.is_floating_point():
                        dist.all_reduce(buffer.div_(world))
                top1, shown = None, f"loss {mean:.3f}"
                if len(task.held_out):
                    top1, _ = bench.accuracy(model, task.held_out, "held-out")
                    model.train()
                    shown += f", held-out {top1:.1f} %"
                    if top1 > best_top1:
                        best, best_top1 = copy.deepcopy(part.state_dict()), top1
                bar.set_postfix_str(shown, refresh=False)
                line = dict(event="train", fit=key, step=done, steps=steps, loss=mean, held_out=top1)
            state.update(key=key, step=done, part=part.state_dict(), optimizer=optimizer.state_dict(), totals=totals,
                         best=best, best_top1=best_top1)
            run.save(state, **line)
        if caught:
            run.leave(caught)
    if best:
        part.load_state_dict(best)
    return best_top1 if best else None


def sweep(classify_trial: Callable, recipe: Recipe, trials: int, state: dict) -> Recipe:
    """The recipe with the best held-out top-1 among this one and `trials` - 1 variants of it."""
    recipes = [recipe if n == 0 else recipe.variant(n) for n in range(trials)]
    keys = [classify_trial(r, trial=f" trial {n}") for n, r in enumerate(recipes)]
    return recipes[max(range(trials), key=lambda n: state["done"][keys[n]]["held_out_top1"])]


def build_classifier(bench: Bench, task: Task, dropout: float) -> Classifier:
    """The row's network under its head, both with weights that are a function of the seed: what is to be trained."""
    args, source, encoder = bench.args, bench.source, bench.source.make(task.seed)
    # ours: as in pre-training, 64 images of ResNet-161 do not fit in 80 GB without recomputation
    encoder.checkpointing = bench.device.type == "cuda" and encoder.out_channels == 4096
    channels = encoder.out_channels
    torch.manual_seed(data.derive_seed(task.seed, "head"))
    if source.supervised:
        head = pooled_linear(channels, task.classes, dropout)
    elif args.head == "linear":
        head = LinearProbe(channels, task.classes)
    else:
        size = (channels, channels // 4) if args.tiny else (4096, 1024)  # paper: 4096 and 1024
        head = resnet_head(channels, task.classes, dropout, *size)
    model = Classifier(encoder, head, frozen=not source.supervised)
    return model.to(bench.device, memory_format=torch.channels_last)


def save_trunk(bench: Bench, task: Task, encoder: Encoder, folder: Path) -> None:
    """What a supervised row has learned on CPC's own patches, as a file for detect.py's `--encoder`: Table 3's
    supervised trunk, here of the same labels."""
    source = bench.source
    geometry = dict(crop=source.crop, patch=source.patch, stride=source.stride, mean=data.MEAN, std=data.STD)
    how = dict(supervised=source.name, labels=task.labels, image_aug="inception", jitter=False, flip=0.0)
    path = folder / f"{source.name}-{task.labels:g}-seed-{task.seed}.pt"
    save_encoder(path, encoder, geometry, vars(bench.args) | how)


def classify(bench: Bench, task: Task, recipe: Recipe, run: Run, state: dict, trial: str = "") -> str:
    """One cell of the table: a classifier on frozen latents, then (ResNet head) both fine-tuned; or a
    network from scratch. A `result` for each stage; a trial of a recipe has one, and no test.
    What is in state["done"] already is not trained again. Returns the last stage's key there."""
    args, source, earlier = bench.args, bench.source, None  # earlier: what the stage before has come to
    model = build_classifier(bench, task, recipe.dropout)
    if source.supervised:
        stages = ["scratch"]
    else:
        stages = ["frozen", "finetuned"] if args.head == "resnet" and not trial else ["frozen"]
    for stage in stages:
        key = f"{source.name}/{source.arch}/{stage}/{task.labels:g}/seed {task.seed}{trial}"
        if stage == "finetuned":
            # Sec. 2.2: from "the solutions theta*, psi*", "a smaller learning rate and early-stopping"
            recipe = replace(recipe, lr=args.finetune_lr).times(args.finetune_epochs / args.epochs)
            model.frozen = False
            model.requires_grad_(True)
        if key in state["done"]:
            earlier = state["done"][key]
            if key in state["solution"]:
                model.head.load_state_dict(state["solution"][key])
            continue
        before = copy.deepcopy(model.encoder.state_dict()) if model.frozen else None
        clock = time.time()
        start_top1 = earlier and earlier["held_out_top1"]
        try:
            held_top1 = fit(bench, model, task, recipe, stage, key, run, state, start_top1)
        except FloatingPointError as error:
            if not trial:
                raise SystemExit(str(error))
            held_top1 = -1.0  # a recipe that diverges loses
        done = dict(held_out_top1=held_top1, seconds=round(time.time() - clock, 1), recipe=vars(recipe))
        if model.frozen:
            assert_unchanged(model.encoder, before)
        if trial:
            line = dict(event="trial", fit=key, **done)
        else:
            if start_top1 is not None and held_top1 == start_top1:  # still the fixed solution, which has been tested
                top1, top5 = earlier["top1"], earlier["top5"]
            else:
                top1, top5 = bench.accuracy(model, task.test, "test")
            done |= dict(encoder=source.name, arch=source.arch, head="linear" if source.supervised else args.head,
                         finetuned=not model.frozen, labels=task.labels, labelled_images=len(task.train),
                         held_out_images=len(task.held_out), seed=task.seed, top1=round(top1, 3), top5=round(top5, 3))
            line = dict(event="result", **done)
            if run.is_main and source.supervised and source.patch:
                save_trunk(bench, task, model.encoder, run.folder)
        earlier, finished = done, state["done"] | {key: done}
        state.clear()  # what `fit` kept there
        # where the next stage starts; not a copy: once fine-tuning has moved the head, `fit` keeps what counts
        state.update(done=finished, solution={key: model.head.state_dict()} if stage != stages[-1] else {})
        run.save(state, **line)
    return key


# ---- What is shown ------------------------------------------------------------------------------


def row_name(result: dict) -> str:
    """A row of the table."""
    how = {("linear", False): "linear", ("resnet", False): "fixed", ("resnet", True): "fine-tuned"}
    return f"{result['encoder']} {result['arch']} " + how.get((result["head"], result["finetuned"]), "supervised")


def print_tables(results: list[dict], classes: int, test_images: int) -> None:
    """Table 5's shape, top-1 and top-5: a column for each fraction of labels, mean ± standard
    deviation over seeds."""
    fractions = sorted({r["labels"] for r in results})
    rows = list(dict.fromkeys(map(row_name, results)))
    width = max(15, *map(len, rows)) + 2
    cells = lambda values: "".join(f"{v:>14}" for v in values)
    seen = {f: next(r for r in results if r["labels"] == f) for f in fractions}
    print(f"\n{test_images} test images, {classes} classes, seeds {sorted({r['seed'] for r in results})}, "
          f"{results[0]['held_out_images']} held-out training images to stop and select by")
    for title, count in (("labelled images", lambda r: r["labelled_images"]),
                         ("with held-out", lambda r: r["labelled_images"] + r["held_out_images"])):
        print(f"{title:{width}}" + cells(count(seen[f]) for f in fractions))
    for top, title, chance in (("top1", "top-1 %", 1), ("top5", "top-5 %", min(5, classes))):
        print(f"{title:{width}}" + cells(f"{100 * f:g} %" for f in fractions))
        for row in rows:
            found = [[r[top] for r in results if row_name(r) == row and r["labels"] == f] for f in fractions]
            print(f"{row:{width}}" + cells(
                f"{statistics.mean(v):.1f}" + (f" ± {statistics.stdev(v):.1f}" if len(v) > 1 else "") for v in found))
        print(f"{'chance':{width}}" + cells([f"{100 * chance / classes:.1f}"] * len(fractions)))


@torch.no_grad()
def save_neighbours(bench: Bench, test_set, path, queries: int = 10, among: int = 1000) -> None:
    """The first encoder's. A row each: a test image, and the five nearest others among the first 1,000 of a shuffle, by
    the angle between their mean latents. No label is used."""
    chosen = torch.randperm(len(test_set), generator=torch.Generator().manual_seed(0))[:among].tolist()
    images = data.Seeded(Subset(test_set, chosen), bench.test_transform)
    model = Classifier(bench.source.make(bench.args.seed), nn.Identity(), frozen=True).to(bench.device).eval()
    z, shown = [], []
    for keys in torch.arange(len(chosen)).split(50):
        shown.append(torch.stack([x for x, _ in images.__getitems__([(i, 0) for i in keys.tolist()])]))
        with bench.autocast():
            z.append(model(bench.source.inputs(shown[-1], bench.device)).mean((2, 3)))
    z, shown = F.normalize(torch.cat(z), dim=1), torch.cat(shown)  # [N, D], [N, 3, S, S]
    nearest = (z[:queries] @ z.T).topk(min(6, len(z))).indices.cpu()  # itself first
    tiles = F.interpolate(shown[nearest.flatten()] / 255, scale_factor=max(1, 96 // shown.shape[-1]), mode="nearest")
    save_image(make_grid(tiles, nrow=nearest.shape[1], padding=2, pad_value=1), path)


# ---- Command line -------------------------------------------------------------------------------

# paper: A.3, Adam 5e-4 and 512 images; ours: the epochs, which are not stated
LINEAR = dict(epochs=30, min_steps=0, batch_size=512, lr=5e-4, weight_decay=0.0, held_out=0.0, distort=False)
# ours: at tiny scale a few hundred steps must do
TINY = dict(tiny=True, crop=32, epochs=1, finetune_epochs=0.5, min_steps=60, finetune_lr=3e-4, batch_size=64,
            held_out=0.05)
# ours: random weights need longer: 2.5 times the first stage's steps, or both stages' together if that is more
SUPERVISED = 2.5
TINY_LINEAR = dict(epochs=3, min_steps=0, lr=5e-3, held_out=0.0)


def parse_args(argv: list[str] | None = None):
    """The command line, checked. Reads the encoders: the first one's scale, data and augmentation
    are the defaults. Returns (args, encoders)."""
    parser = Parser(__doc__, out="runs/eval")
    add = parser.add_argument
    add("--encoder", nargs="+", default=["runs/cpc/encoder.pt"], metavar="NAME",
        help="what cpc.py wrote; random: the same network untrained; torchvision:MODEL[:WEIGHTS]: one of torchvision's")
    add("--head", choices=("linear", "resnet", "none"), help="on the latents; none: the supervised rows alone "
        "(default: linear, with --labels resnet)")
    add("--labels", type=float, nargs="+", metavar="F", help="fractions of the training labels (default: 1)")
    add("--subset", metavar="FILE", help="the labelled images by name, one a line, instead of --labels")
    add("--supervised", nargs="*", metavar="ARCH", help="also from pixels (A.4): resnet50, resnet101, resnet152 "
        "(default), ..., with :STEM for another stem; from scratch as CPC's encoder: patched, with batch norm, or "
        "patched-none")
    add("--held-out", type=float, default=0.02,  # ours
        help="fraction of the training images, or of those that --subset leaves, to stop and select by; 0 for a "
        "fixed schedule (default: 0.02, at tiny scale 0.05, linear probe 0)")
    add("--sweep", type=int, default=0, metavar="N", help="recipes tried for each row and fraction")  # A.4
    add("--seeds", type=int, default=1, help="runs, each with its own labels and weights")
    # the recipe: ours, but for A.4's learning rates, and for the linear probe's
    add("--epochs", type=float, default=50,
        help="over the labelled images (default: 50, linear probe 30; tiny: 1 and 3)")
    add("--finetune-epochs", type=float, default=50,
        help="of fine-tuning; the supervised rows get 2.5 times --epochs, or both together")
    add("--min-steps", type=int, default=10_000, help="at least, for few labels; for --finetune-epochs in proportion "
        "(default: 10000, linear probe 0; tiny: 60)")
    add("--batch-size", type=int, default=512, help="images of all processes together")
    add("--lr", type=float, default=0.1, help="peak learning rate of SGD (default: 0.1), linear probe: of Adam (5e-4; "
        "tiny: 5e-3)")
    add("--finetune-lr", type=float, default=1e-4,
        help="peak learning rate of fine-tuning, of AdamW (default: 1e-4; tiny: 3e-4)")
    add("--weight-decay", type=float, default=1e-4, help="of all weights (default: 1e-4, linear probe 0)")
    add("--dropout", type=float, default=0.2, help="before the last layer")
    # Sec. 2.2, A.4: Inception preprocessing and color-dropping
    add("--crop", type=int, default=240, help="side of the image, where no encoder.pt says it")
    add("--min-area", type=float, default=0.08, help="of the inception crop, a share of the image")
    add("--color-drop", type=float, default=0.5, help="of the encoders' rows, probability for a patch or a whole image")
    add("--distort", action=BooleanOptionalAction, default=True, help="Inception's colour distortion (default: but for "
        "the linear probe)")

    early = parser.parse_known_args(argv)[0]
    few = early.labels or early.subset
    head = early.head or ("resnet" if few else "linear" if early.supervised is None else "none")
    if head == "linear":
        parser.set_defaults_checked(LINEAR)
    if head == "none" and not any("patched" in name for name in early.supervised or ()):
        parser.set_defaults(encoder=[])  # pixels need no encoder: whether one was trained here changes nothing
    encoders = find_encoders(parser, parser.parse_known_args(argv)[0].encoder)
    first = next((e.file for e in encoders if e.file), None)
    if early.tiny or first and first["arch"] in ("tiny", "small"):
        parser.set_defaults_checked(TINY | (TINY_LINEAR if head == "linear" else {}))
    if first:
        same = {k: first["trained"][k] for k in ("data", "color_drop", "min_area")}
        parser.set_defaults_checked(same | {"crop": first["crop"]})
    args = parser.parse_args(argv)
    if first and args.crop != first["crop"]:
        parser.error(f"--crop {args.crop} is not the {first['crop']} pixels of the encoder, which every row gets")
    args.head, args.labels = head, sorted(set(args.labels or [1.0]))
    if args.data is None:
        args.data = "shapes" if args.tiny else "imagenet"
    if args.supervised is None:
        args.supervised = []
    elif not args.supervised:
        args.supervised = ["tiny" if args.tiny else "resnet152"]  # ours: a tiny ResNet v2 stands in
    return check_args(parser, args), encoders


def check_args(parser: Parser, args):
    """Exit with one line on flags that are out of range or cannot work together."""
    for name in args.supervised:
        arch, _, stem = name.partition(":")
        if name not in ("patched", "patched-none") and (arch not in ARCHITECTURES or ":" in name and stem not in STEMS):
            parser.error(f"--supervised {name} is none of {', '.join(ARCHITECTURES)} (with :STEM, one of "
                         f"{', '.join(STEMS)}, for another), patched, patched-none")
    if len(set(args.supervised)) < len(args.supervised):
        parser.error(f"--supervised {' '.join(args.supervised)}: each may be named once")
    if args.head == "linear" and args.supervised:
        parser.error("--supervised beside --head linear: their learning rates differ, run it alone with --head none")
    if args.head == "none" and not args.supervised:
        parser.error("--head none leaves nothing to train: pass --supervised")
    if args.subset and args.labels != [1.0]:
        parser.error("--subset and --labels both say which labels are used: pass one")
    if args.sweep and not args.held_out:
        parser.error("--sweep needs held-out images to select by: pass --held-out")
    parser.check_ranges(args, dict(
        labels=(1e-9, 1), held_out=(0, 0.5), sweep=(0, 1e6), seeds=(1, 1e6), epochs=(1e-3, 1e6),
        finetune_epochs=(1e-3, 1e6), min_steps=(0, 1e9), lr=(1e-12, 1e3), finetune_lr=(1e-12, 1e3), weight_decay=(0, 1),
        dropout=(0, 0.99), crop=(1, 1e5), min_area=(0.001, 1), color_drop=(0, 1)))
    return args


def make_tasks(args, train_set, test_set, seed: int) -> list[Task]:
    """A task for each fraction of the labels."""
    targets = data.targets(train_set)
    if args.subset:
        chosen = data.read_subset(args.subset, train_set)
        rest = sorted(set(range(len(targets))) - set(chosen))
        held = data.label_subset([targets[i] for i in rest], 1, seed, args.held_out)[1]
        columns = [(round(len(chosen) / len(targets), 4), chosen, [rest[i] for i in held])]
    else:
        columns = [(f, *data.label_subset(targets, f, seed, args.held_out)) for f in args.labels]
    return [Task(f, seed, len(train_set.classes), Subset(train_set, chosen), Subset(train_set, held), test_set)
            for f, chosen, held in columns]


def main(args, encoders) -> None:
    """Every seed, row and fraction; a result line each, and a table."""
    device = data.start_process()
    bf16 = data.has_bf16(device) if args.bf16 is None else args.bf16
    train_set, test_set = (data.load_dataset(args.data, split, args.crop) for split in ("train", "test"))
    if train_set.classes != test_set.classes:
        raise SystemExit(f"{args.data}: the training and test folders hold different classes")
    if len(train_set.classes) < 2:
        raise SystemExit(f"{args.data} holds one class: there is nothing to tell apart")
    tasks = {seed: make_tasks(args, train_set, test_set, seed) for seed in range(args.seed, args.seed + args.seeds)}
    if args.held_out and not all(len(task.held_out) for task in sum(tasks.values(), [])):
        raise SystemExit(f"--held-out {args.held_out} of {len(train_set)} images in {len(train_set.classes)} classes "
                         f"is none: raise it, or pass 0 for a fixed schedule")
    sources = find_sources(args, encoders)
    run = Run(args, images_sha256=data.fingerprint(train_set, test_set), bf16=bf16,
              encoder_sha256=[e.sha256 for e in encoders], subset_sha256=sha256(args.subset) if args.subset else None)
    state = run.start(images=len(train_set), classes=len(train_set.classes)) or {"done": {}, "solution": {}}
    recipes = {}
    if run.is_main:
        names = data.image_names(train_set)
        for task in sum(tasks.values(), []):
            for name, subset in ((f"labels-{task.labels:g}", task.train), ("held-out", task.held_out)):
                file = run.folder / f"{name}-seed-{task.seed}.txt"
                file.write_bytes(os.fsencode("".join(names[i] + "\n" for i in subset.indices)))
    for seed in tasks:
        for source in sources:
            bench = Bench(args, source, device, bf16)
            for task in tasks[seed]:
                cell = partial(classify, bench, task, run=run, state=state)
                where = source.name, source.arch, task.labels
                if where not in recipes:  # found on the first seed's labels, for all seeds
                    recipe = Recipe(**{f.name: getattr(args, f.name) for f in fields(Recipe)})
                    if source.supervised:
                        recipe = recipe.times(max(SUPERVISED, 1 + args.finetune_epochs / args.epochs))
                    recipes[where] = sweep(cell, recipe, args.sweep, state) if args.sweep else recipe
                cell(recipes[where])
    if run.is_main:
        if not sources[0].supervised:
            save_neighbours(Bench(args, sources[0], device, bf16), test_set, run.folder / "neighbours.png")
        print_tables([r for r in state["done"].values() if "top1" in r], len(train_set.classes), len(test_set))


if __name__ == "__main__":
    one_line(parse_args, main)
