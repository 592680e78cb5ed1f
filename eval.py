"""What a representation is worth: classification with all labels or a few (Sec. 2.2, 4.2, A.3).

    python eval.py                                                # linear, all labels (A.3)
    python eval.py --labels 0.01 0.1 1 --supervised --out runs/labels       # Fig. 1
    python eval.py --labels 0.01 --held-out 0 --out runs/only     # no label but the 1 %
    python eval.py --head none --supervised resnet50 --sweep 8 --out runs/pixels
    torchrun --nproc_per_node=8 eval.py --data imagenet --labels 0.01 0.1 1 --out runs/labels-8

Linear: the encoder frozen, batch norm and one linear layer. Efficient (`--labels`): an 11-block
ResNet on the frozen latents, then both fine-tuned from that solution. Supervised: a network from
pixels, with the same labels. Each result is a line of log.jsonl; a table follows. The flags'
defaults are for an 11-block head at the paper's scale; RECIPES has those for the linear probe, for
small encoders and for --tiny.

Results: assets/results.md; at the paper's scale not yet measured.

Shapes: B batch, G grid side, D latent channels, S image side.
"""

import copy
import math
import random
import statistics
from argparse import Namespace
from dataclasses import dataclass
from operator import itemgetter

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, Subset
from torchvision.transforms import v2

import data
from data import COUNT, RATE, SHARE, learning_rate, number
from resnet import (ARCHITECTURES, ENCODER_HELP, STEMS, Encoder, Source, find_encoders,
                    residual_stack, save_encoder)

# ---- Classifiers h_psi: latents [B, D, G, G] -> logits [B, classes] ------------------------------


class LinearProbe(nn.Module):
    """A.3: batch norm without scale, a 1x1 convolution to the classes, logits mean-pooled over the
    grid. Latents [B, D, G, G] -> logits [B, classes]."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.norm.weight.requires_grad_(False)  # paper: "without scale parameter": it stays 1
        self.conv = nn.Conv2d(channels, classes, 1)

    def forward(self, latents: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, enabled=False):  # logits in float32
            return self.conv(self.norm(latents.float())).mean((2, 3))


class PooledLinear(nn.Linear):
    """Mean-pooling, drop-out (A.4: "before the final linear classification layer") and that layer.
    Latents [B, D, G, G] -> logits [B, classes] in float32: in bfloat16 many would be equal, and
    top-5 arbitrary."""

    def __init__(self, channels: int, classes: int, dropout: float):
        super().__init__(channels, classes)
        self.dropout = dropout

    def forward(self, latents: Tensor) -> Tensor:
        pooled = latents.mean((2, 3), dtype=torch.float32)  # [B, D]
        pooled = F.dropout(pooled, self.dropout, self.training)
        with torch.autocast(latents.device.type, enabled=False):
            return super().forward(pooled)


def resnet_head(in_channels: int, classes: int, dropout: float = 0.0) -> nn.Sequential:
    """Sec. 2.2: "an 11-block ResNet architecture with 4096-dimensional feature maps and
    1024-dimensional bottleneck layers"."""
    # ours: the head of a small encoder is as wide as the encoder; batch norm and drop-out, as in
    # the supervised ResNets; no stride on a 6x6 grid
    channels = 4096 if in_channels >= 1024 else in_channels
    blocks = residual_stack(11, in_channels, channels, channels // 4, 1, "batch")
    return nn.Sequential(*blocks, nn.BatchNorm2d(channels), nn.ReLU(),
                         PooledLinear(channels, classes, dropout))


class Classifier(nn.Module):
    """h_psi o f_theta. frozen: f_theta is a fixed function, its batch norms' statistics too."""

    def __init__(self, encoder: nn.Module, head: nn.Module, frozen: bool):
        super().__init__()
        self.encoder, self.head, self.frozen = encoder, head, frozen
        encoder.requires_grad_(not frozen)

    def train(self, mode: bool = True):
        super().train(mode)
        self.encoder.train(mode and not self.frozen)
        return self

    def forward(self, patches: Tensor) -> Tensor:
        """Patches [B, G, G, 3, P, P], of which a whole image is one -> logits [B, classes]."""
        if patches.shape[1] == 1:
            latents = self.encoder.features(patches.flatten(0, 2))  # [B, D, S/stride, S/stride]
        else:
            latents = self.encoder.grid(patches)  # [B, D, G, G]
        return self.head(latents)


# ---- Rows of the table: feature extractors f_theta -----------------------------------------------


def find_rows(args: Namespace, sources: list[Source], metadata: dict | None,
              crop: int | None) -> list[Source]:
    """The rows that `--encoder` and `--supervised` ask for. Each one's `metadata` says its crop,
    patch and stride (a whole image is one patch), and how an encoder of ours was `trained`.
    metadata: of the first encoder.pt; crop: the flag's, if it was given."""
    def whole_image(side: int) -> dict:
        return dict(crop=side, patch=side, stride=1, trained={})

    rows = []
    if args.head != "none":
        usual = whole_image(crop or 224)  # what torchvision's weights were trained with
        rows = [source._replace(metadata=source.metadata or usual) for source in sources]
    for name in args.supervised:
        arch, _, stem = name.partition(":")
        if arch in ARCHITECTURES and stem in ("", *STEMS):
            # paper: A.4, ResNet v2, which has batch norm, on whole images
            arguments = arch, "batch", stem or None
            rows.append(Source("pixels", name, Encoder, arguments,
                               metadata=whole_image(args.crop), supervised=True))
        elif name in ("patched", "patched-none") and metadata:
            # Sec. 4.1: CPC's own encoder, 66.4 % with batch norm, 62.5 % "without": ours, with none
            arch, norm = metadata["arch"], "none" if name == "patched-none" else "batch"
            arguments = arch, norm, metadata["stem"]
            rows.append(Source(name, arch, Encoder, arguments,
                               metadata=metadata | {"trained": {}}, supervised=True))
        else:
            raise SystemExit(f"--supervised {name} is no ARCH[:STEM] of {', '.join(ARCHITECTURES)} "
                             f"and {', '.join(STEMS)}, nor, beside an encoder.pt in --encoder, "
                             f"patched, patched-none")
    return rows


def apply_flags(metadata: dict, flags: Namespace) -> None:
    """A flag that is given replaces what the encoder's file says, in its metadata."""
    crop = flags.crop or metadata["crop"]
    if metadata["patch"] == metadata["crop"]:  # a network from pixels: the whole image
        metadata["patch"] = crop
    metadata["crop"] = crop
    given = {name: getattr(flags, name) for name in ("min_area", "color_drop")}
    metadata["trained"] |= {name: value for name, value in given.items() if value is not None}


def augmentation(row: Source, args: Namespace) -> tuple[v2.Compose, dict]:
    """What a row trains with: a transform of the image, and `data.augment_patches`' keywords."""
    trained, crop = row.metadata["trained"], row.metadata["crop"]
    if args.head == "linear" and trained:
        # Sec. 2.2, linear classification: "the same data-augmentation as in the unsupervised
        # learning phase". encoder.pt says which, unless a flag does. ours: no distorted colours.
        patches = {name: trained[name] for name in ("color_drop", "jitter", "flip")}
        return data.image_transform(trained["image_aug"], crop, trained["min_area"]), patches
    grey = trained.get("image_aug") == "v1"
    distort = args.head != "linear"
    transform = data.image_transform("inception", crop, args.min_area, distort, grey)
    if row.supervised or args.head == "linear":
        # A.4: "the Inception pre-processing pipeline". ours: no colours are dropped, which is what
        # held-out images choose for supervised rows (assets/results.md, "Augmentation from
        # pixels"); nor for a probe of torchvision's.
        return transform, {}
    # Sec. 2.2, efficient classification: "In addition to random color-dropping we use the
    # Inception data-augmentation scheme"; ours: dropped patch by patch, as in pre-training. Grey
    # images have no colours to drop.
    return transform, {"color_drop": 0.0 if grey else args.color_drop}


# ---- A task: a row of the table, a share of the labels, a seed -----------------------------------


@dataclass
class Task:
    """One training and test: whose labels are used, and how images reach the classifier."""

    args: Namespace
    row: Source
    fraction: float  # of the training labels
    seed: int
    train: Subset
    held_out: Subset  # of the training images, to stop and select by
    test: Dataset
    device: torch.device

    def patches(self, images: Tensor, seed: int | None = None, **augmented) -> Tensor:
        """uint8 [B, 3, S, S] -> what the classifier takes."""
        patch, stride = self.row.metadata["patch"], self.row.metadata["stride"]
        return data.to_patches(images, self.device, patch, stride, seed, **augmented)

    @torch.no_grad()
    def accuracy(self, model: Classifier, images: Dataset, skip: bool = False
                 ) -> tuple[float, float]:
        """Top-1 and top-5 in percent over all processes: a single crop (Sec. 2.2). skip: as in
        `data.Seeded`, for held-out images, which are training images."""
        model.eval()
        metadata = self.row.metadata
        grey = metadata["trained"].get("image_aug") == "v1"
        transform = data.image_transform("test", metadata["crop"], grey=grey)
        batches = data.test_batches(len(images), self.args.batch_size // dist.get_world_size())
        loader = data.load_batches(images, transform, batches, self.args.workers, skip)
        counts = torch.zeros(2, dtype=torch.int64, device=self.device)
        for x, y in loader:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
                logits = model(self.patches(x))
            counts += count_correct(logits, y.to(self.device, non_blocking=True))
        dist.all_reduce(counts)
        top1, top5 = counts.tolist()
        return 100 * top1 / len(images), 100 * top5 / len(images)


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Top-1 and top-5 hits, int64 [2]. logits [B, C], labels [B]."""
    hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    return torch.stack((hits[:, 0].sum(), hits.sum()))


# ---- Training a classifier -----------------------------------------------------------------------


def first_recipe(args: Namespace, row: Source) -> dict:
    """The flags' recipe of a row's first stage."""
    names = ("epochs", "min_steps", "batch_size", "lr", "weight_decay", "dropout")
    recipe = {name: getattr(args, name) for name in names}
    if row.supervised:
        # ours: random weights need longer: 2.5 times the first stage and, beside CPC, at least as
        # long as its two stages together
        stages = 0 if args.head == "none" else 1 + args.finetune_epochs / args.epochs
        recipe["epochs"] *= max(2.5, stages)
        recipe["min_steps"] *= max(2.5, stages)
    return recipe


def variant(recipe: dict, seed: int) -> dict:
    """Random draws from A.4's ranges, around a recipe: lr {0.05, 0.1, 0.2}, the batch size or half
    of it (A.4: 32 or 16 a worker), weight decay logarithmically from 1e-5 to 1e-2, drop-out
    linearly from 0 to 1 (differs: to 0.9, which still learns). A.4's architectures are rows of the
    table."""
    rng = random.Random(seed)
    return recipe | dict(
        lr=recipe["lr"] * rng.choice((0.5, 1, 2)), weight_decay=10 ** rng.uniform(-5, -2),
        batch_size=max(1, recipe["batch_size"] // rng.choice((1, 2))), dropout=rng.uniform(0, 0.9))


def build_classifier(task: Task, dropout: float) -> Classifier:
    """The row's network under its head. Random weights are a function of the seed."""
    row, encoder = task.row, task.row.make(task.seed)
    channels, classes = encoder.out_channels, len(task.train.dataset.classes)
    torch.manual_seed(data.derive_seed(task.seed, "head"))
    if row.supervised:
        head = PooledLinear(channels, classes, dropout)
    elif task.args.head == "linear":
        head = LinearProbe(channels, classes)
    else:
        head = resnet_head(channels, classes, dropout)
    model = Classifier(encoder, head, frozen=not row.supervised)
    return model.to(task.device, memory_format=torch.channels_last)


def make_optimizer(model: Classifier, stage: str, recipe: dict) -> torch.optim.Optimizer:
    """Adam for a linear probe, AdamW for fine-tuning, SGD for what starts from random weights."""
    weights = [p for p in model.parameters() if p.requires_grad]
    lr, decay = recipe["lr"], recipe["weight_decay"]
    # paper: A.3's Adam for the probe, which is AdamW at RECIPES' decay of 0. ours: the others;
    # SGD at a tenth of the rate undid a tiny encoder within six steps of fine-tuning, and A.4
    # names learning rates and weight decays, not the optimiser that they suit.
    if isinstance(model.head, LinearProbe) or stage == "finetuned":
        return torch.optim.AdamW(weights, lr, weight_decay=decay)
    return torch.optim.SGD(weights, lr, momentum=0.9, nesterov=True, weight_decay=decay)


def average_buffers(module: nn.Module) -> None:
    """Batch norm's running statistics after a step: the mean over processes, so that all test with
    the same ones. (Before each step DDP broadcasts those of rank 0.)"""
    for buffer in module.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer.div_(dist.get_world_size()))


def fit(task: Task, model: Classifier, recipe: dict, stage: str, key: str, run: data.Run,
        start_top1: float | None = None) -> float | None:
    """Train `model` in place and return its held-out top-1 (None: no held-out images).

    Early stopping (Sec. 2.2 has it for fine-tuning; ours: in every stage with held-out images, of
    which a linear probe has none by default). The schedule runs to its end; ten times along the way
    the held-out images are tested. The best of these states is loaded, or the initial one if its
    accuracy (start_top1) is known and as high. Without held-out images the last state stays."""
    world = dist.get_world_size()
    batch = max(1, min(recipe["batch_size"], len(task.train)) // world) * world  # equal shares
    steps = recipe["epochs"] * len(task.train) / batch
    stop = math.ceil(max(steps, recipe["min_steps"]))
    constant = isinstance(model.head, LinearProbe)  # paper: A.3 names a learning rate, no schedule
    tests = {math.ceil(stop * n / 10) for n in range(1, 11)}
    trained = model.head if model.frozen else model
    optimizer = make_optimizer(model, stage, recipe)
    start = run.resume(key, model=trained, optimizer=optimizer)
    run.keep_if_best(trained, start_top1)

    ddp = DistributedDataParallel(model)
    transform, augmented = augmentation(task.row, task.args)
    # otherwise fine-tuning would begin with the same crops as the first stage
    seed = data.derive_seed(task.seed, stage) if stage == "finetuned" else task.seed
    batches = data.train_batches(len(task.train), batch, seed, start, stop)
    loader = data.load_batches(task.train, transform, batches, task.args.workers, skip=True)
    model.train()
    for step, (images, labels) in run.steps(loader, stop, batch, due=tests):
        scale = 1.0 if constant else learning_rate(step, stop, 1.0, stop // 10)
        optimizer.param_groups[0]["lr"] = recipe["lr"] * scale
        patches = task.patches(images, data.derive_seed(seed, "patches", step), **augmented)
        torch.manual_seed(data.derive_seed(seed, "drop-out", step + 1, dist.get_rank()))
        with torch.autocast(task.device.type, torch.bfloat16, enabled=task.args.bf16):
            logits = ddp(patches)
        loss = F.cross_entropy(logits, labels.to(task.device, non_blocking=True))
        norm = data.update(loss, optimizer, model.parameters())
        run.tally(loss=loss, gradient_norm=norm)
        if step + 1 in tests:
            average_buffers(trained)
            if len(task.held_out):
                top1, _ = task.accuracy(model, task.held_out, skip=True)
                model.train()
                run.note(held_out=top1)
                run.keep_if_best(trained, top1)
    return run.load_best(trained)


def choose_recipe(task: Task, recipe: dict, trials: int, run: data.Run) -> dict:
    """`--sweep`: of `trials` recipes, this one and variants of it, the one with the best held-out
    top-1 of the first stage, on the first seed's labels for all seeds. A trial that diverges
    loses; none sees a test image."""
    stage = "scratch" if task.row.supervised else "frozen"
    tried = []
    for n in range(trials):
        key = f"{task.row.name}/{task.row.arch}/{stage}/{task.fraction:g}/trial {n}"
        if key not in run.done:
            trial = variant(recipe, n) if n else recipe
            model = build_classifier(task, trial["dropout"])
            try:
                top1 = fit(task, model, trial, stage, key, run)
            except data.Diverged:
                top1 = -1.0
            run.finish(key, "trial", dict(fit=key, held_out_top1=top1, recipe=trial))
        tried.append(run.done[key])
    return max(tried, key=itemgetter("held_out_top1"))["recipe"]


def classify(task: Task, recipe: dict, run: data.Run) -> None:
    """The stages of a task (Sec. 2.2), one from the other's solution, each tested. What the
    run has done already is not trained again."""
    args, row = task.args, task.row
    model = build_classifier(task, recipe["dropout"])
    if row.supervised:
        stages = ["scratch"]
    else:  # "keep the feature extractor f_theta fixed": psi* on the latents of theta*
        stages = ["frozen", "finetuned"] if args.head == "resnet" else ["frozen"]
    held_top1 = None
    for stage in stages:
        if stage == "finetuned":
            # "initialize the feature extractor and classifier with the solutions theta*, psi*
            # found in the previous learning phase, and train them both", with "a smaller learning
            # rate and early-stopping"
            model = Classifier(model.encoder, model.head, frozen=False)
            ratio = args.finetune_epochs / args.epochs
            recipe = recipe | dict(lr=args.finetune_lr, epochs=args.finetune_epochs,
                                   min_steps=ratio * recipe["min_steps"])
        key = f"{row.name}/{row.arch}/{stage}/{task.fraction:g}/seed {task.seed}"
        if key in run.done:
            held_top1 = run.done[key]["held_out_top1"]
            if key in run.solution:
                model.head.load_state_dict(run.solution[key])
            continue
        weights = copy.deepcopy(model.encoder.state_dict()) if model.frozen else None
        held_top1 = fit(task, model, recipe, stage, key, run, held_top1)
        if model.frozen:
            # fixed means bit-identical, batch norm's statistics included
            torch.testing.assert_close(model.encoder.state_dict(), weights, rtol=0, atol=0)
        top1, top5 = (round(top, 3) for top in task.accuracy(model, task.test))
        result = dict(
            encoder=row.name, arch=row.arch, stage=stage, head=args.head, labels=task.fraction,
            labelled_images=len(task.train), held_out_images=len(task.held_out), seed=task.seed,
            held_out_top1=held_top1, top1=top1, top5=top5, recipe=recipe)
        if run.is_main and row.supervised:
            save_trunk(task, model.encoder, run)
        run.finish(key, "result", result, None if stage == stages[-1] else model.head.state_dict())


def save_trunk(task: Task, encoder: Encoder, run: data.Run) -> None:
    """A supervised network of three stacks (conv1 to conv4), as a file for detect.py's `--encoder`:
    a supervised trunk beside CPC's (Table 3's: a ResNet-152)."""
    args, row = task.args, task.row
    if len(ARCHITECTURES[encoder.arch].blocks) != 3:
        return
    how = dict(data=args.data, supervised=row.name, labels=task.fraction, jitter=False, flip=0.0,
               color_drop=0.0, image_aug="inception", min_area=args.min_area)
    name = row.arch if row.name == "pixels" else row.name
    name = name.replace(":", "-").replace("/", "-")  # small:3x3/2
    path = run.folder / f"{name}-{task.fraction:g}-seed-{task.seed}.pt"
    save_encoder(path, encoder, row.metadata | {"trained": run.flags | how})


# ---- The table -----------------------------------------------------------------------------------


def row_name(result: dict) -> str:
    """A row of the table: which encoder, and what of it was trained."""
    stages = {"frozen": "linear" if result["head"] == "linear" else "fixed",
              "finetuned": "fine-tuned", "scratch": "supervised"}
    return f"{result['encoder']} {result['arch']} {stages[result['stage']]}"


def print_tables(results: list[dict], classes: int, test_images: int) -> None:
    """Table 5's shape, top-1 and top-5: a column for each share of the labels, mean ± standard
    deviation over seeds."""
    labelled = {r["labels"]: r["labelled_images"] for r in results}
    shares, names = sorted(labelled), list(dict.fromkeys(map(row_name, results)))
    width = max(15, *map(len, names)) + 2

    def print_row(name: str, cells: list) -> None:
        print(f"{name:{width}}" + "".join(f"{cell:>14}" for cell in cells))

    print(f"\n{test_images} test images, {classes} classes, seeds "
          f"{sorted({r['seed'] for r in results})}, {results[0]['held_out_images']} held-out "
          f"training images to stop and select by")
    print_row("labelled images", [labelled[share] for share in shares])
    for top, title, guesses in (("top1", "top-1 %", 1), ("top5", "top-5 %", min(5, classes))):
        print_row(title, [f"{100 * share:g} %" for share in shares])
        for name in names:
            cells = []
            for share in shares:
                values = [r[top] for r in results if row_name(r) == name and r["labels"] == share]
                spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.1f}{spread}")
            print_row(name, cells)
        print_row("chance", [f"{100 * guesses / classes:.1f}"] * len(shares))


# ---- Command line --------------------------------------------------------------------------------

# The flags' defaults are those of an 11-block head, or of pixels, at the paper's scale. The others:
RECIPES = {
    # paper: A.3, Adam at 5e-4; ours: the epochs, which are not stated, and all below
    ("paper", "linear"): dict(epochs=30, min_steps=0, lr=5e-4, weight_decay=0.0, held_out=0.0),
    ("paper", "head"): {},
    # an encoder of fewer than 1024 channels, about a million parameters
    ("small", "linear"): dict(epochs=10, batch_size=64, lr=5e-3),
    # Fine-tuning is four times as long as the first stage. Accuracy falls at first, and with 10 %
    # of the labels ends 5 points above that of one as long as the first stage (held-out photos).
    ("small", "head"): dict(epochs=5, min_steps=450, batch_size=32, held_out=0.05,
                            finetune_epochs=20, finetune_lr=1e-3),
    # on the embedded data set, where the whole of ./run.sh takes minutes
    ("tiny", "linear"): dict(epochs=3, batch_size=64, lr=5e-3),
    ("tiny", "head"): dict(epochs=1, min_steps=60, batch_size=64, held_out=0.05,
                           finetune_epochs=0.5, finetune_lr=3e-4),
}


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The command line, checked, and the `rows` that it asks for. The first encoder's file gives
    scale, data and augmentation their defaults."""
    parser = data.make_parser(__doc__, out="runs/eval")
    add = parser.add_argument
    add("--data", default="imagenet", help=data.DATA_HELP + "; with an encoder, its own")
    add("--tiny", action="store_true", help="the CPU scale, on shapes; implied by shapes")
    add("--encoder", nargs="+", metavar="NAME", help=ENCODER_HELP + " (default: "
        "runs/cpc/encoder.pt)")
    add("--head", choices=("linear", "resnet", "none"), help="none: supervised rows alone "
        "(default: resnet with --labels or --subset, else linear)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--labels", type=number(1e-9, 1), nargs="+", metavar="F",
                       help="shares of the training labels, 0.01 is 1 %% (default: 1)")
    which.add_argument("--subset", type=data.existing, metavar="FILE", help="the labelled images "
        "by name instead")
    add("--supervised", nargs="*", metavar="ARCH", help="from pixels (A.4): ARCH[:STEM] (default: "
        "resnet152, or a small encoder's); from patches (Sec. 4.1): patched, patched-none")
    add("--held-out", type=number(0, 0.5), default=0.02, help="share of the training images to "
        "select by (default: 0.02; linear probe: 0)")  # ours
    add("--sweep", type=number(0, 1e6, int), default=0, metavar="N", help="recipes tried for each "
        "row and share, by held-out images")  # paper: A.4
    add("--seeds", type=COUNT, default=1, help="runs, each with its own labels, unless --subset")
    # The recipe (others: RECIPES). paper: the batch, which is A.3's for the probe, and the learning
    # rate, A.4's for supervised rows. ours: the rest.
    add("--epochs", type=number(1e-3, 1e6), default=50, help="over the labelled images "
        "(default: 50; linear probe: 30); supervised rows take 2.5 times as many, or CPC's two "
        "stages together if these are longer; the same holds for --min-steps")
    add("--finetune-epochs", type=number(1e-3, 1e6), default=50, help="of fine-tuning; "
        "--min-steps is scaled with it, by its ratio to --epochs")
    add("--min-steps", type=number(0, 1e9), default=10_000, help="train so many at least "
        "(default: 10000; linear probe: 0)")
    add("--batch-size", type=COUNT, default=512, help="of all processes")
    add("--lr", type=RATE, default=0.1, help="peak learning rate of SGD (default: 0.1; linear "
        "probe: 5e-4, Adam)")
    add("--finetune-lr", type=RATE, default=1e-4, help="of AdamW")
    add("--weight-decay", type=SHARE, default=1e-4, help="of all weights (default: "
        "1e-4; linear probe: 0)")
    add("--dropout", type=number(0, 0.99), default=0.2, help="before the last layer")
    # Sec. 2.2, A.4: Inception preprocessing and color-dropping. With an encoder, crop and area are
    # its own, for a linear probe colour dropping too.
    add("--crop", type=COUNT, help="side of the image, in more or fewer patches (default: the "
        "encoder's; torchvision's: 224; or 240)")
    add("--min-area", type=number(1e-3, 1), help="of the inception crop (default: the encoder's, "
        "or 0.08)")
    add("--color-drop", type=SHARE, help="probability for a patch; supervised rows drop none "
        "(default: 0.5; linear probe: the encoder's)")

    early, _ = parser.parse_known_args(argv)
    head = early.head or ("resnet" if early.labels or early.subset else "linear")
    kind = "linear" if head == "linear" else "head"
    names = early.encoder or ([] if head == "none" else ["runs/cpc/encoder.pt"])
    sources, metadata = find_encoders(names)
    for source in sources:
        if source.metadata:
            apply_flags(source.metadata, early)
    scale = "paper"
    baseline = "resnet152"  # that `--supervised` by itself means
    # paper: A.3's crop; Szegedy et al. 2014's area. ours: A.4's networks, whose size is not stated,
    # have the same crop; half of the patches lose colours.
    parser.set_defaults(crop=240, min_area=0.08, color_drop=0.5)
    if metadata:
        trained = metadata["trained"]
        parser.set_defaults(crop=metadata["crop"], data=trained["data"],
                            min_area=trained["min_area"])
        if head == "linear":
            parser.set_defaults(color_drop=trained["color_drop"])
        if ARCHITECTURES[metadata["arch"]].channels[-1] < 1024:
            scale = "small"
            baseline = metadata["arch"]
            if metadata["stem"] != ARCHITECTURES[baseline].stem:
                baseline += f":{metadata['stem']}"
    if early.tiny or parser.parse_known_args(argv)[0].data == "shapes":
        scale = "tiny"
        parser.set_defaults(data="shapes")
        if not metadata:
            baseline = "tiny"
            parser.set_defaults(crop=32, min_area=0.6)  # cpc.py's
    parser.set_defaults(**RECIPES["paper", kind] | RECIPES[scale, kind])
    args = parser.parse_args(argv)
    args.head, args.encoder = head, names
    args.labels = sorted(set(args.labels or [1.0]))
    if args.supervised == []:  # the flag by itself
        args.supervised = [baseline]
    args.supervised = args.supervised or []
    args.rows = find_rows(args, sources, metadata, early.crop)
    for row in args.rows:  # do the patches tile the crop?
        data.grid_side(row.metadata["crop"], row.metadata["patch"], row.metadata["stride"])
    if head == "linear" and args.supervised:
        parser.error("--supervised beside --head linear: their learning rates differ, run it alone "
                     "with --head none")
    if head == "none" and not args.supervised:
        parser.error("--head none leaves nothing to train: pass --supervised")
    if args.sweep and not args.held_out:
        parser.error("--sweep needs held-out images to select by: pass --held-out")
    return args


def choose_labels(args: Namespace, train_set: Dataset, seed: int) -> list[tuple]:
    """(fraction, labelled images, held-out images) for each column of the table."""
    targets = train_set.targets
    if not args.subset:
        return [(fraction, *data.label_subset(targets, fraction, seed, args.held_out))
                for fraction in args.labels]
    chosen = data.read_subset(args.subset, train_set)
    rest = sorted(set(range(len(targets))) - set(chosen))
    _, held = data.label_subset([targets[i] for i in rest], 1, seed, args.held_out)
    return [(round(len(chosen) / len(targets), 4), chosen, [rest[i] for i in held])]


def main(args: Namespace) -> None:
    """Every seed, row and share of the labels; a result line each, and a table."""
    device = data.start_process(args)
    train_set, test_set = (data.load_dataset(args.data, split, args.crop)
                           for split in ("train", "test"))
    classes = len(train_set.classes)
    if train_set.classes != test_set.classes or classes < 2:
        raise SystemExit(f"{args.data}: training and test folders must hold the same classes, two "
                         f"at least")
    seeds = range(args.seed, args.seed + args.seeds)
    columns = {seed: choose_labels(args, train_set, seed) for seed in seeds}
    if args.held_out and not columns[args.seed][0][2]:
        raise SystemExit(f"--held-out {args.held_out} of {len(train_set)} images in {classes} "
                         f"classes is none: raise it, or pass 0 for a fixed schedule")
    rows = vars(args).pop("rows")  # no flag, and not to be logged
    run = data.Run(args, data.names_of(train_set), processes=dist.get_world_size(),
                   encoders=list(map(data.fingerprint, args.encoder)),
                   labelled=data.fingerprint(args.subset or ""))
    for seed in seeds:
        for row in rows:
            for fraction, chosen, held in columns[seed]:
                task = Task(args, row, fraction, seed, Subset(train_set, chosen),
                            Subset(train_set, held), test_set, device)
                recipe = first_recipe(args, row)
                if args.sweep:
                    recipe = choose_recipe(task, recipe, args.sweep, run)
                classify(task, recipe, run)
    if run.is_main:
        results = [result for result in run.done.values() if "top1" in result]
        print_tables(results, classes, len(test_set))


if __name__ == "__main__":
    main(parse_args())
    data.leave_group()
