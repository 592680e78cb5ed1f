"""CPC v2 pre-training (Sec. 2.1, 4.1, appendix A.2): images in, an encoder out.

    python cpc.py --tiny                                          # two CPU cores, minutes
    torchrun --nproc_per_node=8 cpc.py --data imagenet            # the paper's network, one node
    torchrun --nproc_per_node=8 cpc.py --data imagenet --preset v1 --out runs/v1
    python cpc.py --tiny --benchmark 20                           # where the time goes

An image is cut into overlapping patches, each encoded on its own to a latent z. In each of four
directions a masked context network sums up the rows seen so far and predicts, linearly, a
projection of the latents two and three rows further on. InfoNCE asks it to tell the true one from
all others in the batch. `encoder.pt` in the run's folder, new after each epoch, is the result; the
rest is discarded (Sec. 2.2).

Results: assets/results.md; at the paper's scale not yet measured.

Shapes: B images of this process, N of the batch, G grid side, D latent channels, K target channels,
P patch side. Comments, here and in the other files: `paper:` the paper says so; `ours:` it is
silent; `differs:` it says something else, for the reason given.
"""

import copy
import math
import statistics
import time
from argparse import BooleanOptionalAction, Namespace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.utils import make_grid, save_image

import data
from data import COUNT, RATE, SHARE, learning_rate, number
from resnet import ARCHITECTURES, NORMS, STEMS, Conv1x1, Encoder, save_encoder

# ---- The model and its loss ----------------------------------------------------------------------


class PixelCNN(nn.Module):
    """The context network g_phi (A.2 `pixelCNN`): [B, D, G, G] -> [B, D, G, G], where c[i, j] sees
    z[u, v] for rows u <= i only (Sec. 2.1). Each of the five blocks reaches one row further up and
    one column further to either side. The mask is the padding: it adds rows above, never below."""

    def __init__(self, channels: int, hidden: int = 256):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                Conv1x1(channels, hidden), nn.ReLU(inplace=True),
                # SAME padding, which A.2 does not state but its residual sum needs
                nn.Conv2d(hidden, hidden, (1, 3), padding=(0, 1)),
                nn.ZeroPad2d((0, 0, 1, 0)),  # one row of zeros on top; A.2's 2x1 is VALID
                nn.Conv2d(hidden, hidden, (2, 1)), nn.ReLU(inplace=True),  # row i sees i - 1 and i
                Conv1x1(hidden, channels),
            ) for _ in range(5))  # paper: A.2, five blocks

    def forward(self, latents: Tensor) -> Tensor:
        c = latents
        for block in self.blocks:
            c = c + block(c)
        return F.relu(c)


def info_nce(predictions: Tensor, targets: Tensor, k: int,
             first_image: int = 0) -> tuple[Tensor, Tensor]:
    """InfoNCE (Sec. 2.1, A.2) for prediction length k.

    predictions [B, K, G, G]: at [b, :, i, j] the one made from c[i, j], for z[i + k, j];
    targets [N, K, G, G]: of the whole minibatch, in which this process's begin at `first_image`.
    Returns the mean cross-entropy over all positions that have a target, and the contrastive
    accuracy, the share of them where the true target scores highest: two scalars. Candidates are
    all N*G*G targets, so that chance is log(N*G*G): the negatives are "other locations in the
    image and other images in the minibatch".
    """
    B, K, G, _ = predictions.shape
    candidates = targets.permute(0, 2, 3, 1).reshape(-1, K).float()  # [N*G*G, K]
    # Rows 0 .. G-k-1 have a target k rows below. A.2's loop counts k - 1: its col_dim_i is G-k.
    queries = predictions[:, :, :-k].permute(0, 2, 3, 1).reshape(-1, K).float()  # [B*(G-k)*G, K]
    # differs: A.2's `col` lacks % (col_dim_i * row_dim): as printed, only a batch's first image has
    # right labels
    index = torch.arange(len(candidates), device=targets.device).view(-1, G, G)  # of a candidate
    labels = index[first_image:first_image + B, k:].flatten()  # of z[i + k, j], for c[i, j]
    with torch.autocast(targets.device.type, enabled=False):  # ours: logits in float32
        logits = queries @ candidates.T  # [B*(G-k)*G, N*G*G]
    accuracy = (logits.argmax(1) == labels).float().mean()
    return F.cross_entropy(logits, labels), accuracy


class Direction(nn.Module):
    """A.2's `CPC` for one direction: context network, target projection, a predictor W_k per k."""

    def __init__(self, channels: int, hidden: int, target_dim: int, emb_scale: float,
                 lengths: list[int]):
        super().__init__()
        self.emb_scale = emb_scale
        self.context = PixelCNN(channels, hidden)
        self.target = Conv1x1(channels, target_dim)
        self.predict = nn.ModuleDict({str(k): Conv1x1(channels, target_dim) for k in lengths})

    def forward(self, latents: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """[B, D, G, G] -> targets [B, K, G, G] and, for each k, predictions [B, K, G, G]."""
        context = self.context(latents)
        # paper: A.2, emb_scale multiplies the predictions only
        predictions = {int(k): W(context) * self.emb_scale for k, W in self.predict.items()}
        return self.target(latents), predictions


class GatherBatch(torch.autograd.Function):
    """The whole batch from each process's share, rank by rank: [B, ...] -> [N, ...]. An image's
    gradient is the sum of what every process asks of it. (torch's own is deprecated since 2.14.)"""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.contiguous()
        shares = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(shares, x)
        return torch.cat(shares)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


class CPC(nn.Module):
    """Encoder, and one `Direction` for each of the directions.

    directions: 1 (downwards), 2 (upwards too) or 4 (to both sides too).
    lengths: the k that are predicted, in rows. paper: Sec. 4.1, {2, 3}, not v1's {2, ..., 5}:
    "distant patches might lie on distinct objects".
    """

    # For each direction, the quarter turns of the grid that make it downwards. One direction is
    # downwards itself, as in Sec. 2.1 ("patches below ... from those above") and in Fig. 3, which
    # adds "bottum up" to v1. Sec. 4.1 says the opposite of v1: "context from ... beneath".
    TURNS = {1: (0,), 2: (0, 2), 4: (0, 1, 2, 3)}

    def __init__(self, encoder: Encoder, directions: int = 4, lengths: tuple[int, ...] = (2, 3),
                 hidden: int = 256, target_dim: int = 64, emb_scale: float = 0.1):
        super().__init__()
        self.encoder = encoder
        self.turns = self.TURNS[directions]
        # ours: directions share the encoder and nothing else, A.2 read literally on each turn
        self.directions = nn.ModuleList(
            Direction(encoder.out_channels, hidden, target_dim, emb_scale, lengths)
            for _ in self.turns)

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Augmented patches [B, G, G, 3, P, P] -> loss and contrastive accuracy, two scalars.

        paper: L_CPC sums over i, j, k. differs: the mean over the positions of each k, then over k
        and directions; a longer k has fewer positions, so that each weighs more. Guessing scores
        log(N*G*G). A.2's range(2, 3) holds k = 3 alone; we take Sec. 4.1's k in {2, 3}."""
        latents = self.encoder.grid(patches)  # [B, D, G, G]
        losses, accuracies = [], []
        first_image = dist.get_rank() * len(latents)
        for turn, direction in zip(self.turns, self.directions):
            turned = latents.rot90(turn, (2, 3)).contiguous(memory_format=torch.channels_last)
            targets, predictions = direction(turned)
            # ours: the negatives are those of all processes, some 20 MB a step by the defaults, and
            # their gradients as many; the paper's "minibatch" may be that of a worker
            targets = GatherBatch.apply(targets.float())  # [N, K, G, G]
            for k, prediction in predictions.items():
                loss, accuracy = info_nce(prediction, targets, k, first_image)
                losses.append(loss)
                accuracies.append(accuracy)
        return torch.stack(losses).mean(), torch.stack(accuracies).mean()


# ---- Training ------------------------------------------------------------------------------------


def make_patches(images: Tensor, args: Namespace, device: torch.device, step: int) -> Tensor:
    """A batch's augmented patches [B, G, G, 3, P, P], different in every step."""
    seed = data.derive_seed(args.seed, "patches", step)
    return data.to_patches(images, device, args.patch, args.stride, seed,
                           color_drop=args.color_drop, jitter=args.jitter, flip=args.flip)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Polyak averaging after step `step`, counted from 0. ours: the decay grows with the steps: a
    constant 0.9999 would leave 55 % of the random start in the average after 6,000 of them."""
    decay = min(decay, (1 + step) / (10 + step))
    for mine, new in zip(average.parameters(), model.parameters()):
        mine.lerp_(new, 1 - decay)
    for mine, new in zip(average.buffers(), model.buffers()):  # batch norm's statistics
        mine.copy_(new)


def train(args: Namespace, device: torch.device, dataset, model: CPC, optimizer) -> None:
    """The run: from its checkpoint, or the start, to `encoder.pt`."""
    steps_per_epoch = len(dataset) // args.batch_size  # a last partial batch is dropped
    stop = args.epochs * steps_per_epoch
    G = data.grid_side(args.crop, args.patch, args.stride)
    chance = math.log(args.batch_size * G**2)  # the loss of guessing among all patches of a batch
    # A continued run may change the number of processes, but not with batch norm (Sec. 4.1's
    # comparison), whose statistics each process takes by itself.
    processes = dist.get_world_size() if args.norm == "batch" else "any"
    run = data.Run(args, data.names_of(dataset), processes=processes)
    parts = {"model": model, "optimizer": optimizer}
    if args.average:  # ours: of the encoder alone: the rest is discarded after training
        parts["average"] = copy.deepcopy(model.encoder)
    start = run.resume("cpc", **parts)
    encoder_file, picture = run.folder / "encoder.pt", run.folder / "retrieval.png"
    if start == stop and encoder_file.exists() and picture.exists():
        if run.is_main:
            print(f"{run.folder} holds this run, finished")
        return

    def write_encoder(steps: int) -> None:
        metadata = dict(crop=args.crop, patch=args.patch, stride=args.stride,
                        trained=run.flags | dict(data=args.data, steps=steps))
        save_encoder(encoder_file, parts.get("average", model.encoder), metadata)

    if args.compile:
        model.encoder.compile_blocks()
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    transform = data.image_transform(args.image_aug, args.crop, args.min_area)
    batches = data.train_batches(len(dataset), args.batch_size, args.seed, start, stop)
    loader = data.load_batches(dataset, transform, batches, args.workers, skip=True)
    model.train()
    epoch_ends = range(steps_per_epoch, stop + 1, steps_per_epoch)
    for step, (images, _) in run.steps(loader, stop, args.batch_size, due=epoch_ends):
        if step in epoch_ends and run.is_main:
            # The last step ended an epoch and was saved, so that its weights are known to be
            # finite. A long run can be evaluated while it goes on.
            write_encoder(step)
        patches = make_patches(images, args, device, step)
        if step == 0 and run.is_main:
            save_patches(patches, run.folder / "patches.png")
        lr = learning_rate(step, stop, args.lr, args.warmup)
        optimizer.param_groups[0]["lr"] = lr
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            loss, accuracy = ddp(patches)
        norm = data.update(loss, optimizer, model.parameters(), args.clip or math.inf)
        if args.average:
            update_average(parts["average"], model.encoder, args.average, step)
        run.tally(loss=loss, accuracy=accuracy, gradient_norm=norm)
        run.note(epoch=(step + 1) // steps_per_epoch, chance_loss=chance, lr=lr)

    if run.is_main:
        write_encoder(stop)
        save_retrieval(model, dataset, args, device, picture)
        print(f"wrote {run.folder}/encoder.pt, patches.png, retrieval.png, log.jsonl")


# ---- Pictures ------------------------------------------------------------------------------------


def save_enlarged(picture: Tensor, path, factor: int) -> None:
    """A picture [3, H, W] of small images, every pixel `factor` times as large."""
    save_image(F.interpolate(picture[None], scale_factor=max(1, factor), mode="nearest"), path)


def save_patches(patches: Tensor, path, images: int = 6) -> None:
    """What the network sees: the patch grids of a few images after all augmentation."""
    G, P = patches.shape[1], patches.shape[-1]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.MEAN, data.STD))
    shown = (patches[:images].cpu() * std + mean).clamp(0, 1)  # `data.normalise`, undone
    grids = [make_grid(image.flatten(0, 1), nrow=G, padding=1) for image in shown]
    save_enlarged(make_grid(grids, nrow=3, padding=4, pad_value=1), path, 48 // P)


@torch.no_grad()
def rank_patches(model: CPC, images: Tensor, args: Namespace) -> list[Tensor]:
    """The tiles of `save_retrieval`, from uint8 images [B, 3, S, S]: seven [3, S, S] a row."""
    model.eval()
    patches = data.to_patches(images, images.device, args.patch, args.stride)
    targets, predictions = model.directions[0](model.encoder.grid(patches))  # downwards
    candidates = targets.permute(0, 2, 3, 1).flatten(0, 2)  # [B*G*G, K]
    images = images / 255
    gallery = data.extract_patches(images, args.patch, args.stride)  # [B, G, G, 3, P, P]
    G, S, k = gallery.shape[1], args.crop, min(args.lengths)
    tiles = []
    for b, image in enumerate(images[:10].clone()):
        i, j = (G - 1 - k) // 2, b % G  # the middle of what can be predicted from; any column
        ranked = (candidates @ predictions[k][b, :, i, j]).topk(min(5, len(candidates))).indices
        shown = torch.cat((gallery[b, i + k, j][None], gallery.flatten(0, 2)[ranked]))
        image[:, i * args.stride + args.patch:] *= 0.25  # rows that the context has not seen
        tiles += [image, *F.interpolate(shown, (S, S), mode="nearest")]
    return tiles


def save_retrieval(model: CPC, dataset, args: Namespace, device: torch.device, path) -> None:
    """What the predictions mean. A row each: an image, dark where the context network has not
    looked; the true patch k rows below its last row; the five patches that the prediction ranks
    highest among all patches of 32 training images (not augmented). The weights are the last ones,
    not their average."""
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:32].tolist()
    transform = data.image_transform("test", args.crop, grey=args.image_aug == "v1")
    seeded = data.Seeded(dataset, transform, skip=True)
    images = torch.stack([seeded[i, 0][0] for i in chosen]).to(device)
    tiles = torch.stack(rank_patches(model, images, args)).cpu()
    save_enlarged(make_grid(tiles, nrow=7, padding=2, pad_value=1), path, 96 // args.crop)


# ---- Benchmark -----------------------------------------------------------------------------------


def benchmark(args: Namespace, device: torch.device, dataset, model: CPC, optimizer) -> None:
    """`--benchmark N`: the data path alone, then N whole steps on one prepared batch. Prints on
    rank 0; nothing is written."""
    N, local = args.benchmark, args.batch_size // dist.get_world_size()
    model.train()
    batches = data.train_batches(len(dataset), args.batch_size, args.seed, 0, N + 2)
    transform = data.image_transform(args.image_aug, args.crop, args.min_area)
    begin = time.perf_counter()  # before the workers start: what they prefetch would look free
    for images, _ in data.load_batches(dataset, transform, batches, args.workers, skip=True):
        pass  # keeps the last
    loading = (time.perf_counter() - begin) / (N + 2)

    images = images.to(device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(make_patches(images, args, device, 0))
    flop = 3 * counter.get_total_flops() / local  # an image's forward, and twice that backward
    average = copy.deepcopy(model.encoder) if args.average else None
    if args.compile:
        model.encoder.compile_blocks()
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    times = []
    for n in range(N + 2):
        begin = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            loss, _ = ddp(make_patches(images, args, device, n))
        data.update(loss, optimizer, model.parameters(), args.clip or math.inf)
        if args.average:
            update_average(average, model.encoder, args.average, n)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    step = statistics.median(times[2:])  # the first two allocate memory and choose algorithms
    if dist.get_rank() == 0:
        rate = flop * local / step / 1e9
        print(f"step     {1e3 * step:9.1f} ms   {args.batch_size / step:.1f} images/s on all ranks")
        print(f"model    {flop / 1e9:9.2f} GFLOP an image   {rate:.0f} GFLOP/s a rank")
        print(f"data     {1e3 * loading:9.1f} ms   {args.batch_size / loading:.1f} images/s, alone")
        if device.type == "cuda":
            print(f"memory   {torch.cuda.max_memory_allocated() / 2**30:9.2f} GiB at the peak")


# ---- Command line --------------------------------------------------------------------------------

PRESETS = {
    "v2": {},  # the defaults below
    # Where Fig. 3 starts, as we read both papers: CPC v1 (van den Oord et al. 2018), 256-pixel grey
    # crops, 64-pixel jittered patches, one direction, k up to 5, no norm, Adam at 2e-4. ours: the
    # rest of the optimisation.
    "v1": dict(arch="resnet92", norm="none", directions=1, lengths=[2, 3, 4, 5], color_drop=0.0,
               image_aug="v1", crop=256, patch=64, stride=32, lr=2e-4, clip=0.0, average=0.0),
}
# ours: all of it at a scale that two CPU cores train in minutes. An emb_scale of 0.1 starts slowly:
# in early trials on shapes the loss was still at chance after a thousand steps.
TINY = dict(data="shapes", arch="tiny", crop=32, patch=8, stride=6, min_area=0.6, hidden=32,
            target_dim=32, emb_scale=1.0, batch_size=64, epochs=8, lr=3e-3, warmup=50, clip=1.0,
            average=0.0)


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The command line, checked: flags that cannot work together end in a one-line message."""
    parser = data.make_parser(__doc__, out="runs/cpc")
    add = parser.add_argument
    add("--data", default="imagenet", help=data.DATA_HELP)
    add("--tiny", action="store_true", help="the CPU scale, on shapes")
    add("--preset", choices=PRESETS, default="v2", help="v1: CPC v1, where Fig. 3 starts")
    # Sec. 4.1, the axes of Fig. 3 and 4
    add("--arch", choices=ARCHITECTURES, default="resnet161", help="encoder")  # paper
    add("--norm", choices=NORMS, default="layer", help="normalisation")  # paper
    add("--stem", choices=STEMS, help="3x3/2, 3x3: for small patches (default: by --arch)")
    add("--directions", type=int, choices=CPC.TURNS, default=4, help="to predict in")  # paper
    add("--lengths", type=COUNT, nargs="+", default=[2, 3], metavar="K", help="rows ahead")  # paper
    add("--color-drop", type=SHARE, default=0.5, help="probability for a patch")  # ours: not stated
    add("--flip", type=SHARE, default=0.0, help="probability for a patch")  # paper: no gain in v2
    # paper: in v1; ours: kept in v2
    add("--jitter", action=BooleanOptionalAction, default=True, help="shift patches")
    # A.3: the geometry, a 6x6 grid; A.2's example has 7x7, which is v1's 256/64/32
    add("--crop", type=COUNT, default=240, help="side of the image, pixels")  # paper
    add("--patch", type=COUNT, default=80, help="side of a patch, pixels")  # paper
    add("--stride", type=COUNT, default=32, help="from patch to patch, pixels")  # paper
    # paper, in two steps: A.3 gives the probe Inception's, Sec. 2.2 gives it pre-training's
    add("--image-aug", choices=("inception", "v1"), default="inception", help="of the whole image")
    # ours: Szegedy et al. 2014's
    add("--min-area", type=number(1e-3, 1), default=0.08, help="of an inception crop")
    # A.2: the objective
    add("--hidden", type=COUNT, default=256, help="channels inside the context network")  # paper
    add("--target-dim", type=COUNT, default=64, help="channels of targets and predictions")  # paper
    add("--emb-scale", type=number(1e-9, 1e6), default=0.1, help="factor on predictions")  # paper
    # ours, all of it: the paper states nothing of the optimisation. Warm-up and cosine are our own.
    # The rest, and Adam's betas, are those of its later, published version: from memory, unchecked.
    add("--batch-size", type=COUNT, default=512, help="images of all processes together")
    add("--epochs", type=COUNT, default=200, help="over the images")
    add("--lr", type=RATE, default=4e-4, help="peak learning rate of Adam")
    add("--warmup", type=number(0, 1e9, int), default=1000, help="steps to the peak")
    add("--clip", type=number(0, 1e9), default=0.01, help="gradient norm, 0 for none")
    add("--average", type=number(0, 0.99999), default=0.9999, help="the average's decay, 0: none")
    # how it runs
    # ours: 128 images of ResNet-161 on a GPU take 56 GiB with recomputed activations, 127 without
    add("--checkpointing", action=BooleanOptionalAction, help="recompute activations in the "
        "backward pass (default: only with 4096 channels)")
    add("--compile", action="store_true", help="torch.compile the blocks: slower on a CPU")
    add("--benchmark", type=COUNT, metavar="N", help="time N steps, train nothing")

    early, _ = parser.parse_known_args(argv)
    parser.set_defaults(**PRESETS[early.preset])
    if early.tiny:
        parser.set_defaults(**TINY)
    args = parser.parse_args(argv)
    G = data.grid_side(args.crop, args.patch, args.stride)
    if max(args.lengths) >= G:
        parser.error(f"--lengths {args.lengths} on a {G}x{G} grid: each must be 1 to {G - 1}")
    if (args.stem or ARCHITECTURES[args.arch].stem) == "7x7" and args.patch < 32:
        parser.error(f"--patch {args.patch} is too small for the 7x7 stem: pass --stem 3x3")
    return args


def main(args: Namespace) -> None:
    """Everything in order: process group, data, model, and the run."""
    device = data.start_process(args)
    dataset = data.load_dataset(args.data, "pretrain", args.crop)
    stop = args.epochs * (len(dataset) // args.batch_size)
    least = 0 if args.benchmark else args.warmup
    if stop <= least:
        raise SystemExit(f"--epochs {args.epochs} of {len(dataset)} images are {stop} steps, not "
                         f"more than {least}: lower --batch-size or --warmup, or raise --epochs")

    torch.manual_seed(args.seed)  # the same initial weights everywhere
    encoder = Encoder(args.arch, args.norm, args.stem, args.checkpointing)
    model = CPC(encoder, args.directions, args.lengths, args.hidden, args.target_dim,
                args.emb_scale)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.8, 0.999), fused=True)  # ours

    if dist.get_rank() == 0:
        millions = sum(p.numel() for p in encoder.parameters()) / 1e6
        print(f"{args.arch}: {millions:.1f} M parameters; {len(dataset)} images, {args.batch_size} "
              f"a step on {dist.get_world_size()} x {device.type}, bfloat16: {args.bf16}")
    job = benchmark if args.benchmark else train
    job(args, device, dataset, model, optimizer)


if __name__ == "__main__":
    main(parse_args())
    data.leave_group()
