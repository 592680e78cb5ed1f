"""CPC v2 pre-training (Sec. 2.1, 4.1, appendix A.2): images in, an encoder out.

    python cpc.py --tiny                                          # two CPU cores, minutes
    torchrun --nproc_per_node=8 cpc.py --data imagenet            # the paper's run, one node
    torchrun --nproc_per_node=8 cpc.py --data imagenet --preset v1 --out runs/v1    # where Fig. 3 starts
    python cpc.py --tiny --benchmark 20                           # where the time goes

An image is cut into overlapping patches, each encoded on its own to a latent z. In each of four
directions a masked context network sums up the rows seen so far, and predicts, linearly, the
latents two and three rows further on. InfoNCE asks it to tell the true latent from all others in
the batch. `encoder.pt` in the run's folder is the result; the rest is discarded (Sec. 2.2).

Results: see the README; at the paper's scale not yet measured.

Shapes: B batch, G grid side, D latent channels, K target channels, P patch side.
"""

import copy
import math
import os
import resource
import sys
import time
from argparse import BooleanOptionalAction

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

import data
from resnet import ARCHITECTURES, NORMS, STEMS, Conv1x1, Encoder, Parser, Run, learning_rate, one_line, save_encoder

# ---- The model and its loss ---------------------------------------------------------------------


class PixelCNN(nn.Module):
    """The context network g_phi (A.2 `pixelCNN`): [B, D, G, G] -> [B, D, G, G], where c[i, j] sees
    z[u, v] for rows u <= i only (Sec. 2.1; its own row included), one row and one column further
    with each of the five blocks."""

    def __init__(self, channels: int, hidden: int = 256):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                Conv1x1(channels, hidden), nn.ReLU(inplace=True),
                # SAME padding, which A.2 does not state but its residual sum needs
                nn.Conv2d(hidden, hidden, (1, 3), padding=(0, 1)),
                nn.ZeroPad2d((0, 0, 1, 0)),  # a row of zeros on top, and with the VALID 2x1 below
                nn.Conv2d(hidden, hidden, (2, 1)), nn.ReLU(inplace=True),  # row i sees rows i - 1 and i
                Conv1x1(hidden, channels),
            ) for _ in range(5))  # paper: A.2, five blocks

    def forward(self, latents: Tensor) -> Tensor:
        c = latents
        for block in self.blocks:
            c = c + block(c)
        return F.relu(c)


CHUNK = 2**24  # ours: logits computed at a time, 64 MB


def contrast(queries: Tensor, candidates: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """A.2's softmax cross-entropy, summed, and how often the true candidate scores highest.
    queries [Q, K], candidates [C, K], labels int64 [Q] -> two scalars."""
    logits = queries @ candidates.T  # [Q, C]
    hits = (logits.argmax(1) == labels).sum()
    return F.cross_entropy(logits, labels, reduction="sum"), hits


def info_nce(predictions: Tensor, targets: Tensor, k: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """InfoNCE (Sec. 2.1, A.2) for prediction length k.

    predictions [B, K, G, G]: at [b, :, i, j] the one made from c[i, j], for z[i + k, j];
    targets [N, K, G, G]: of the whole minibatch, in which this process's B images begin at `first`.
    Returns the mean cross-entropy over all positions that have a target, and the contrastive
    accuracy, the share of them where the true target scores highest: two scalars. Candidates are
    all N*G*G targets, so that chance is log(N*G*G): the negatives are "other locations in the
    image and other images in the minibatch".
    """
    B, K, G, _ = predictions.shape
    rows = G - k  # A.2's col_dim_i, with k = i + 1: rows 0 .. G-k-1 have a target k rows below
    candidates = targets.permute(0, 2, 3, 1).reshape(-1, K).float()  # [N*G*G, K]
    queries = predictions[:, :, :rows].permute(0, 2, 3, 1).reshape(-1, K).float()  # [B*rows*G, K]
    # A.2's labels miss a modulo: they hold for the first image of a batch only. Query t is
    # position t % (rows*G) of image t // (rows*G); k rows of G further is its target.
    t = torch.arange(B * rows * G, device=targets.device)
    labels = (first + t // (rows * G)) * (G * G) + k * G + t % (rows * G)
    loss = hits = 0
    with torch.autocast(targets.device.type, enabled=False):  # ours: logits in float32
        chunk = max(1, CHUNK // len(candidates))
        for q, y in zip(queries.split(chunk), labels.split(chunk)):
            # of many logits, a chunk is made at a time, and again in the backward pass
            sums = contrast(q, candidates, y) if len(q) == len(queries) else checkpoint(
                contrast, q, candidates, y, use_reentrant=False)
            loss, hits = loss + sums[0], hits + sums[1]
    return loss / len(queries), hits / len(queries)


class Direction(nn.Module):
    """A.2's `CPC` for one direction: context network, target projection, a predictor W_k per k."""

    def __init__(self, channels: int, hidden: int, target_dim: int, emb_scale: float, lengths: list[int]):
        super().__init__()
        self.emb_scale = emb_scale
        self.context = PixelCNN(channels, hidden)
        self.target = Conv1x1(channels, target_dim)
        self.predict = nn.ModuleDict({str(k): Conv1x1(channels, target_dim) for k in lengths})

    def forward(self, latents: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """[B, D, G, G] -> targets [B, K, G, G] and, for each k, predictions [B, K, G, G]."""
        context = self.context(latents)
        # paper: emb_scale on the predictions only
        return self.target(latents), {int(k): W(context) * self.emb_scale for k, W in self.predict.items()}


class CPC(nn.Module):
    """Encoder, and for each direction a context network, a target projection and predictors.

    directions: 1 (above predicts below), 2 (and below above) or 4 (and left right, right left).
    """

    # Sec. 2.1 predicts downwards ("patches below ... from those above"), Sec. 4.1 says CPC v1 used
    # "context from ... beneath": we take the first. Quarter turns that bring a direction to "down".
    TURNS = {1: (0,), 2: (0, 2), 4: (0, 1, 2, 3)}

    def __init__(self, encoder: Encoder, directions: int = 4, lengths: tuple[int, ...] = (2, 3),
                 hidden: int = 256, target_dim: int = 64, emb_scale: float = 0.1):
        super().__init__()
        self.encoder = encoder
        self.turns = self.TURNS[directions]
        # ours: nothing is shared between directions, A.2 read literally on each turned grid
        self.directions = nn.ModuleList(
            Direction(encoder.out_channels, hidden, target_dim, emb_scale, lengths)
            for _ in self.turns)

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Augmented patches [B, G, G, 3, P, P] -> (loss, contrastive accuracy), two scalars."""
        latents = self.encoder.grid(patches)  # [B, D, G, G]
        return self.contrast(latents)

    def contrast(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [B, D, G, G] -> (loss, contrastive accuracy), means over directions and lengths.

        paper: L_CPC sums over i, j, k; ours: the mean, which only rescales it and has log(B*G*G)
        as chance. A.2's range(2, 3) holds k = 3 alone; Sec. 4.1's k in {2, 3} is what we take."""
        terms = []
        for turn, direction in zip(self.turns, self.directions):
            turned = latents.rot90(turn, (2, 3)).contiguous(memory_format=torch.channels_last)
            targets, predictions = direction(turned)
            targets = data.GatherBatch.apply(targets.float().contiguous())  # of all processes: [N, K, G, G]
            first = dist.get_rank() * len(latents)
            terms += [info_nce(prediction, targets, k, first) for k, prediction in predictions.items()]
        losses, accuracies = zip(*terms)
        return torch.stack(losses).mean(), torch.stack(accuracies).mean()


# ---- Training -----------------------------------------------------------------------------------


def chance_loss(args) -> float:
    """The loss of guessing: log of the number of candidates, all patches of the batch."""
    return math.log(args.batch_size * data.grid_side(args.crop, args.patch, args.stride) ** 2)


def image_transform(args):
    """Augmentation of the whole image (Sec. 4.1, A.3); CPC v1's images are grey."""
    return data.image_transform(args.image_aug, args.crop, args.min_area, grey=args.image_aug == "v1")


def make_patches(images: Tensor, args, device: torch.device, step: int) -> Tensor:
    """A batch's augmented patches [B, G, G, 3, P, P], different in every step."""
    seed = data.derive_seed(args.seed, "patches", step)
    return data.to_patches(images, device, args.patch, args.stride, seed,
                           color_drop=args.color_drop, jitter=args.jitter, flip=args.flip)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, patches: Tensor, lr: float, clip: float,
           bf16: bool) -> tuple[Tensor, Tensor, Tensor]:
    """One optimisation step; this process's loss and contrastive accuracy, detached, and the norm of the
    gradients, the same on all."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    with torch.autocast(patches.device.type, torch.bfloat16, enabled=bf16):
        loss, accuracy = model(patches)
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
    optimizer.step()
    return loss.detach(), accuracy, norm


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Polyak averaging after step `step`, counted from 0. ours: the decay grows with the steps, or
    else a constant 0.9999 would leave half of the random start in the average after 6,000 steps."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    for mine, new in zip(average.buffers(), model.buffers()):  # batch norm's statistics
        mine.copy_(new)


def train(args, device: torch.device, dataset, model: CPC, optimizer, bf16: bool) -> None:
    """The run: from its checkpoint, or the start, to `encoder.pt`."""
    steps_per_epoch, chance = len(dataset) // args.batch_size, chance_loss(args)
    steps = args.epochs * steps_per_epoch
    run = Run(args, images_sha256=data.fingerprint(dataset), bf16=bf16)
    state = run.start(images=len(dataset), steps=steps, chance_loss=chance)
    # ours: Polyak averaging, of the encoder alone, since nothing else is kept
    average = copy.deepcopy(model.encoder).requires_grad_(False) if args.average else None
    start, totals = 0, torch.zeros(3, device=device)  # sums of loss and accuracy, steps
    if state:
        start, totals = state["step"], state["totals"].to(device)
        model.load_state_dict(state["model"])
        if average:
            average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        del state  # at the paper's scale 5 GB
        if run.is_main:
            print(f"continuing {run.folder} at step {start} of {steps}")
    if args.compile:
        model.encoder.compile()
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)

    transform = image_transform(args)
    batches = data.TrainBatches(len(dataset), args.batch_size, args.seed, start, steps)
    loader = data.load_batches(dataset, transform, batches, device, args.workers)
    model.train()
    bar = tqdm(total=steps, initial=start, disable=not run.is_main, unit="step", mininterval=1)
    clock, clock_step, loss = time.time(), start, chance
    for step, (images, _) in enumerate(loader, start):
        patches = make_patches(images, args, device, step)
        if step == 0 and run.is_main:
            save_patches(patches, run.folder / "patches.png")
        lr = learning_rate(step, steps, args.lr, args.warmup)
        before = loss
        loss, accuracy, norm = update(ddp, optimizer, patches, lr, args.clip, bf16)
        if not norm.isfinite():  # the same on every rank
            raise SystemExit(f"gradients are not finite at step {step}, learning rate {lr:.2e}, loss {loss:.3g} after "
                             f"{before:.3g}: lower --lr, or --clip the gradients; the last checkpoint is kept")
        if average:
            update_average(average, model.encoder, args.average, step)
        totals += torch.stack((loss, accuracy, torch.ones_like(loss)))

        bar.update()
        if step % 20 == 0:
            speed = (bar.format_dict["rate"] or 0) * args.batch_size
            bar.set_postfix_str(f"loss {loss:.2f} (chance {chance:.2f}), accuracy {accuracy:.4f} (chance "
                                f"{math.exp(-chance):.4f}), {speed:.0f} images/s", refresh=False)
        done, caught, line = step + 1, run.stop_signal(), {}
        if caught or done % steps_per_epoch == 0 or done % args.save_every == 0:
            dist.all_reduce(totals.div_(dist.get_world_size()))  # from now on every rank's are the mean
            if done % steps_per_epoch == 0:
                mean_loss, mean_accuracy = (totals[:2] / totals[2]).tolist()
                totals.zero_()
                seconds, seen = time.time() - clock, (done - clock_step) * args.batch_size
                line = dict(event="epoch", epoch=done // steps_per_epoch, step=done, loss=mean_loss,
                            accuracy=mean_accuracy, chance_loss=chance, lr=lr, seconds=round(seconds, 3),
                            images_per_second=round(seen / seconds, 1))
                clock, clock_step = time.time(), done
            run.save({"step": done, "totals": totals, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                      "average": average.state_dict() if average else None}, **line)
        if caught:
            run.leave(caught)
    bar.close()

    if run.is_main and not (start == steps and (run.folder / "encoder.pt").exists()):  # else it was finished before
        encoder = average or model.encoder
        geometry = dict(crop=args.crop, patch=args.patch, stride=args.stride, mean=data.MEAN, std=data.STD)
        save_encoder(run.folder / "encoder.pt", encoder, geometry, vars(args) | dict(steps=steps))
        save_retrieval(model, dataset, args, device, run.folder / "retrieval.png")
        print(f"wrote {run.folder}/encoder.pt, patches.png, retrieval.png, log.jsonl")
    run.log("done", step=steps)


# ---- Pictures -----------------------------------------------------------------------------------


def displayable(patches: Tensor) -> Tensor:
    """Undo `data.normalise`: float32 [N, 3, P, P] in 0..1."""
    mean, std = (patches.new_tensor(v).view(3, 1, 1) for v in (data.MEAN, data.STD))
    return (patches * std + mean).clamp(0, 1)


def save_enlarged(picture: Tensor, path, factor: int) -> None:
    """A picture [3, H, W] of small images, every pixel `factor` times as large."""
    save_image(F.interpolate(picture[None], scale_factor=max(1, factor), mode="nearest"), path)


def save_patches(patches: Tensor, path, images: int = 6) -> None:
    """What the network sees: the patch grids of a few images after all augmentation."""
    grids = [make_grid(displayable(p.flatten(0, 1)), nrow=p.shape[1], padding=1) for p in patches[:images].cpu()]
    save_enlarged(make_grid(grids, nrow=3, padding=4, pad_value=1), path, 48 // patches.shape[-1])


@torch.no_grad()
def save_retrieval(model: CPC, dataset, args, device: torch.device, path, rows: int = 10) -> None:
    """What the predictions mean. A row each: an image, dark where the context network has not
    looked; the true patch k rows below its last row; the five patches that the prediction ranks
    highest among all patches of 32 training images (not augmented)."""
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:32].tolist()
    transform = data.image_transform("test", args.crop, grey=args.image_aug == "v1")
    items = data.Seeded(dataset, transform, skip=1).__getitems__([(i, 0) for i in chosen])
    images = torch.stack([image for image, _ in items])
    patches = data.to_patches(images, device, args.patch, args.stride)
    G, P, S, k = patches.shape[1], args.patch, args.crop, min(args.lengths)
    model.eval()
    targets, predictions = model.directions[0](model.encoder.grid(patches))  # downwards
    candidates = targets.permute(0, 2, 3, 1).flatten(0, 2)  # [B*G*G, K]
    gallery = displayable(patches.flatten(0, 2))  # [B*G*G, 3, P, P]
    scale = lambda picture: F.interpolate(picture[None], (S, S), mode="nearest")[0]
    tiles = []
    for b in range(min(rows, len(images))):
        i, j = (G - 1 - k) // 2, b % G  # the middle of what can be predicted from; any column
        shown = images[b].to(device) / 255
        shown[:, i * args.stride + P:] *= 0.25
        ranked = (candidates @ predictions[k][b, :, i, j]).topk(min(5, len(candidates))).indices
        tiles += [shown, scale(gallery[(b * G + i + k) * G + j]), *(scale(gallery[n]) for n in ranked)]
    save_enlarged(make_grid(torch.stack(tiles).cpu(), nrow=7, padding=2, pad_value=1), path, 96 // S)


# ---- Benchmark ----------------------------------------------------------------------------------


def benchmark(args, device: torch.device, dataset, model: CPC, optimizer, bf16: bool) -> None:
    """`--benchmark N`: the data path alone, N whole steps on a prepared batch, then N steps taken apart,
    without what several processes exchange. Prints on rank 0; nothing is written."""
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    N, local = args.benchmark, args.batch_size // dist.get_world_size()
    model.train()
    batches = data.TrainBatches(len(dataset), args.batch_size, args.seed, 0, N + 2)
    begin = now()  # the start of the workers included: what they prefetch before is not free
    for images, _ in data.load_batches(dataset, image_transform(args), batches, device, args.workers):
        pass  # keeps the last
    loading = (now() - begin) / (N + 2)
    images = images.to(device)

    patches = make_patches(images, args, device, 0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(patches)
    flop = 3 * counter.get_total_flops() / local  # an image's forward, and twice that backward
    if args.compile:
        model.encoder.compile()
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    step = lambda n: update(ddp, optimizer, make_patches(images, args, device, n), args.lr, args.clip, bf16)
    step(0), step(1)
    begin = now()
    for n in range(N):
        step(n)
    whole = (now() - begin) / N

    names = ("patches", "encoder", "context and loss", "backward", "optimizer")
    parts = torch.zeros(len(names))
    for n in range(N):
        clock = [now()]
        patches = make_patches(images, args, device, n)
        clock.append(now())
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            latents = model.encoder.grid(patches)
            clock.append(now())
            loss, _ = model.contrast(latents)
        clock.append(now())
        optimizer.zero_grad()
        loss.backward()
        clock.append(now())
        nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
        optimizer.step()
        clock.append(now())
        parts += torch.tensor(clock).diff() / N
    if dist.get_rank() == 0:
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        print(f"step      {1e3 * whole:9.1f} ms   {args.batch_size / whole:.1f} images/s on all ranks")
        print(f"model     {flop / 1e9:9.2f} GFLOP an image   {flop * local / whole / 1e9:.0f} GFLOP/s a rank")
        print(f"memory    {peak / 2**30:9.2f} GiB at the peak")
        print(f"data      {1e3 * loading:9.1f} ms   {args.batch_size / loading:.1f} images/s, alone")
        for name, seconds in zip(names, parts.tolist()):
            print(f"  {name:18} {1e3 * seconds:9.1f} ms   {100 * seconds / sum(parts.tolist()):.0f} %")


# ---- Command line -------------------------------------------------------------------------------

PRESETS = {
    "v2": {},  # the defaults below
    # Where Fig. 3 starts: CPC v1 (van den Oord et al. 2018), as this paper and that one describe it:
    # 256-pixel grey crops, 64-pixel patches jittered, one direction, k up to 5, no norm, Adam 2e-4.
    "v1": dict(arch="resnet92", norm="none", directions=1, lengths=[2, 3, 4, 5], color_drop=0.0,
               image_aug="v1", crop=256, patch=64, stride=32, lr=2e-4, clip=0.0, average=0.0),
}
# ours: all of it at a scale that two CPU cores train in minutes. emb_scale 0.1 and a clip of 0.01
# are made for hundreds of thousands of steps: here they leave the loss at chance.
TINY = dict(data="shapes", arch="tiny", crop=32, patch=8, stride=6, min_area=0.6, hidden=32, target_dim=32,
            emb_scale=1.0, batch_size=64, epochs=8, lr=3e-3, warmup=50, clip=1.0, average=0.0)


def parse_args(argv: list[str] | None = None):
    """The command line, checked: exits with one line on flags that cannot work together."""
    parser = Parser(__doc__, out="runs/cpc")
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="v2", help="v1: CPC v1's settings, where Fig. 3 starts")
    # Sec. 4.1, the axes of Fig. 3 and 4
    add("--arch", choices=ARCHITECTURES, default="resnet161", help="encoder; tiny implies --tiny")  # paper
    add("--norm", choices=NORMS, default="layer", help="in the encoder")  # paper
    add("--stem", choices=STEMS,
        help="7x7: total stride 16; for patches under 32 pixels 3x3/2: 8, 3x3: 4 (default: by --arch)")
    add("--directions", type=int, choices=CPC.TURNS, default=4, help="of prediction")  # paper
    add("--lengths", type=int, nargs="+", default=[2, 3], metavar="K", help="of prediction, rows")  # paper
    add("--color-drop", type=float, default=0.5, help="probability for a patch")  # ours: not stated
    add("--flip", type=float, default=0.0, help="probability for a patch")  # paper: no gain at this size
    add("--jitter", action=BooleanOptionalAction, default=True, help="shift patches at random")  # paper
    # A.3: the geometry
    add("--crop", type=int, default=240, help="side of the image, pixels")  # paper
    add("--patch", type=int, default=80, help="side of a patch, pixels")  # paper
    add("--stride", type=int, default=32, help="from patch to patch, pixels")  # paper
    add("--image-aug", choices=("inception", "v1"), default="inception", help="of the whole image")  # paper: A.3
    add("--min-area", type=float, default=0.08, help="of the inception crop, a share of the image")  # ours: GoogLeNet's
    # A.2: the objective
    add("--hidden", type=int, default=256, help="channels inside the context network")  # paper
    add("--target-dim", type=int, default=64, help="channels of targets and predictions")  # paper
    add("--emb-scale", type=float, default=0.1, help="factor on the predictions")  # paper
    # ours: the optimisation is not stated; what is remembered of the later published version
    add("--batch-size", type=int, default=512, help="images of all processes together")
    add("--epochs", type=int, default=200, help="over the images")
    add("--lr", type=float, default=4e-4, help="peak learning rate of Adam")
    add("--warmup", type=int, default=1000, help="steps to the peak")
    add("--clip", type=float, default=0.01, help="gradient norm, 0 for none")
    add("--average", type=float, default=0.9999, help="Polyak averaging of the encoder, 0 for none")
    # how it runs
    add("--checkpointing", action=BooleanOptionalAction,
        help="recompute activations in the backward pass (default: for 4096 channels on a GPU)")
    add("--compile", action="store_true", help="torch.compile the encoder")
    add("--save-every", type=int, default=500, metavar="N", help="steps, beside the end of each epoch")
    add("--benchmark", type=int, metavar="N", help="time N steps, train nothing")

    early = parser.parse_known_args(argv)[0]
    parser.set_defaults_checked(PRESETS[early.preset])
    if early.tiny or early.arch == "tiny":
        parser.set_defaults_checked(TINY | {"tiny": True})
    args = parser.parse_args(argv)

    if args.data is None:
        args.data = "imagenet"  # the folder ./imagenet
        if not os.path.isdir(args.data):
            parser.error("no folder ./imagenet: pass --data DIR, or --tiny for the embedded data set")
    try:
        G = data.grid_side(args.crop, args.patch, args.stride)
    except ValueError as error:
        parser.error(str(error))
    if not all(1 <= k < G for k in args.lengths) or len(set(args.lengths)) < len(args.lengths):
        parser.error(f"--lengths {args.lengths} on a {G}x{G} grid: each must be 1 to {G - 1}, and named once")
    if args.benchmark is not None and args.benchmark < 1:
        parser.error(f"--benchmark {args.benchmark}: at least one step")
    if (args.stem or ARCHITECTURES[args.arch][3]) == "7x7" and args.patch < 32:
        parser.error(f"--patch {args.patch} is too small for the 7x7 stem of {args.arch}: pass --stem 3x3")
    parser.check_ranges(args, dict(
        color_drop=(0, 1), flip=(0, 1), average=(0, 0.9999999), min_area=(0.001, 1), hidden=(1, 1e6),
        target_dim=(1, 1e6), emb_scale=(1e-9, 1e6), epochs=(1, 1e9), lr=(1e-12, 1e3), warmup=(0, 1e9), clip=(0, 1e9),
        save_every=(1, 1e9)))
    return args


def main(args) -> None:
    """Everything in order: process group, data, model, what it will cost, and the run."""
    device = data.start_process()
    bf16 = data.has_bf16(device) if args.bf16 is None else args.bf16
    dataset = data.load_dataset(args.data, "pretrain", args.crop)
    steps_per_epoch = len(dataset) // args.batch_size  # a last partial batch is dropped
    if not steps_per_epoch:
        raise SystemExit(f"{args.data} has {len(dataset)} images, fewer than --batch-size {args.batch_size}")
    if args.warmup >= args.epochs * steps_per_epoch and not args.benchmark:
        raise SystemExit(f"--warmup {args.warmup} is all of the {args.epochs * steps_per_epoch} steps: lower it")

    torch.manual_seed(args.seed)  # the same initial weights everywhere
    if args.checkpointing is None:  # ours: 64 images of ResNet-161 do not fit in 80 GB without
        args.checkpointing = device.type == "cuda" and ARCHITECTURES[args.arch][1][-1] == 4096
    encoder = Encoder(args.arch, args.norm, args.stem, args.checkpointing)
    model = CPC(encoder, args.directions, args.lengths, args.hidden, args.target_dim, args.emb_scale)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, betas=(0.8, 0.999), fused=True)  # ours

    if dist.get_rank() == 0:
        millions = lambda module: f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M parameters"
        G, world = data.grid_side(args.crop, args.patch, args.stride), dist.get_world_size()
        print(f"{args.arch}, {args.norm} norm: {millions(encoder)}; with context networks and predictors "
              f"{millions(model)}\n"
              f"{len(dataset)} images, {G}x{G} patches of {args.patch} pixels each; {args.batch_size} images a "
              f"step on {world} x {device.type} in {'bfloat16' if bf16 else 'float32'}\n"
              f"{args.epochs} epochs of {steps_per_epoch} steps; loss at chance "
              f"log({args.batch_size * G * G}) = {chance_loss(args):.3f}")
    (benchmark if args.benchmark else train)(args, device, dataset, model, optimizer, bf16)


if __name__ == "__main__":
    one_line(parse_args, main)
