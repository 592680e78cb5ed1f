"""What a representation is worth (Sec. 2.2): linear classification on frozen latents (A.3).

    python eval.py                              # runs/cpc/encoder.pt, on the data it was trained on
    python eval.py --encoder runs/x/encoder.pt --data DIR --out runs/x-linear
    torchrun --nproc_per_node=8 eval.py --data imagenet

The encoder is frozen, and shown to be; the same probe on the same network with random weights, and
chance, stand beside it: what they reach is not CPC's merit.

Results: see the README; at the paper's scale not yet measured.

Shapes: B batch, G grid side, D latent channels.
"""

import hashlib
import math
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from resnet import Encoder, Parser, Run, load_encoder


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


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Top-1 and top-5 hits and the number of images, int64 [3]. logits [B, C], labels [B]."""
    ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    return torch.stack((ranked[:, 0].sum(), ranked.sum(), torch.tensor(len(labels), device=labels.device)))


class Frozen:
    """The encoder f_theta* as a fixed function from images to latents, as encoder.pt describes it."""

    def __init__(self, encoder: Encoder, file: dict, device: torch.device, bf16: bool):
        self.encoder = encoder.to(device).eval().requires_grad_(False)
        self.file, self.device, self.bf16 = file, device, bf16
        self.before = {k: v.clone() for k, v in encoder.state_dict().items()}

    @torch.no_grad()
    def latents(self, images: Tensor, seed: int | None = None) -> Tensor:
        """uint8 [B, 3, S, S] -> float32 [B, D, G, G]; with a seed, under the pre-training's
        augmentation (Sec. 2.2: "the same data-augmentation as in the unsupervised learning phase")."""
        same = {k: self.file["trained"][k] for k in ("color_drop", "jitter", "flip")}
        patches = data.to_patches(images, self.device, self.file["patch"], self.file["stride"], seed, **same)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.encoder.grid(patches)

    def assert_unchanged(self) -> None:
        """Frozen means bit-identical, the statistics of a batch norm included."""
        for key, value in self.encoder.state_dict().items():
            assert torch.equal(value, self.before[key]), f"the frozen encoder's {key} has changed"


def train_probe(name: str, frozen: Frozen, loaders, args, run: Run, state: dict, classes: int, steps: int,
                epoch: int) -> nn.Module:
    """Train a LinearProbe (A.3: Adam, softmax cross-entropy) for `steps` steps, from `state` on."""
    torch.manual_seed(data.derive_seed(args.seed, "probe"))
    probe = LinearProbe(frozen.encoder.out_channels, classes).to(frozen.device)
    optimizer = torch.optim.Adam((p for p in probe.parameters() if p.requires_grad), args.lr)
    start = state.get("step", 0)
    if start:
        probe.load_state_dict(state["probe"])
        optimizer.load_state_dict(state["optimizer"])
    ddp = DistributedDataParallel(probe, broadcast_buffers=False)
    total = torch.zeros(2, device=frozen.device)  # sum of losses, steps
    bar = tqdm(loaders(start), desc=name, initial=start, total=steps, disable=not run.is_main, mininterval=1)
    for step, (images, labels) in enumerate(bar, start):
        seed = data.derive_seed(args.seed, "patches", step, dist.get_rank())
        loss = F.cross_entropy(ddp(frozen.latents(images, seed)), labels.to(frozen.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += torch.stack((loss.detach(), torch.ones_like(loss)))
        done, caught = step + 1, run.stop_signal()
        if done % epoch == 0:
            mean = (total[0] / total[1]).item()
            bar.set_postfix_str(f"loss {mean:.3f} of chance {math.log(classes):.3f}", refresh=False)
            run.log("epoch", encoder=name, epoch=done // epoch, step=done, loss=mean)
            total.zero_()
        if caught or done % epoch == 0:
            state.update(step=done, probe=probe.state_dict(), optimizer=optimizer.state_dict())
            run.save(state)
        if caught:
            bar.close()
            run.leave(caught)
    for buffer in probe.buffers():  # every process has running statistics of its own share
        dist.broadcast(buffer, 0)
    return probe.eval()


@torch.no_grad()
def test(frozen: Frozen, probe: nn.Module, loader) -> tuple[float, float]:
    """Top-1 and top-5 in percent, over all processes: no augmentation, a single crop (Sec. 2.2)."""
    counts = torch.zeros(3, dtype=torch.int64, device=frozen.device)
    for images, labels in loader:
        counts += count_correct(probe(frozen.latents(images)), labels.to(frozen.device))
    dist.all_reduce(counts)
    top1, top5, images = counts.tolist()
    return 100 * top1 / images, 100 * top5 / images


# ours: epochs are not stated; at tiny scale a few hundred steps must do
TINY = dict(epochs=4, batch_size=64, lr=5e-3)


def parse_args(argv: list[str] | None = None):
    """The command line, checked. Reads the encoder, whose scale and data are the defaults."""
    parser = Parser(__doc__, out="runs/eval")
    add = parser.add_argument
    add("--encoder", default="runs/cpc/encoder.pt", help="what cpc.py wrote")
    add("--epochs", type=int, default=30, help="over the training images")  # ours
    add("--batch-size", type=int, default=512, help="images of all processes together")  # paper: A.3
    add("--lr", type=float, default=5e-4, help="of Adam")  # paper: A.3
    early = parser.parse_known_args(argv)[0]
    if not os.path.exists(early.encoder):
        parser.error(f"no encoder at {early.encoder}: run cpc.py first, or pass --encoder FILE")
    encoder, file = load_encoder(early.encoder)
    parser.set_defaults(data=file["trained"]["data"])
    if early.tiny or file["arch"] == "tiny":
        parser.set_defaults_checked(TINY | {"tiny": True})
    args = parser.parse_args(argv)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size < world or args.batch_size % world:
        parser.error(f"--batch-size {args.batch_size} does not divide among {world} processes")
    if args.epochs < 1 or not 0 < args.lr < math.inf:
        parser.error(f"--epochs {args.epochs} and --lr {args.lr} must be positive")
    return args, encoder, file


def main(args, encoder: Encoder, file: dict) -> None:
    """The probe on the trained encoder, then on a random one; a result line and a table row each."""
    device = data.start_process()
    bf16 = data.has_bf16(device) if args.bf16 is None else args.bf16
    crop, trained = file["crop"], file["trained"]
    train_set, test_set = (data.load_dataset(args.data, split, crop) for split in ("train", "test"))
    if train_set.classes != test_set.classes:
        raise SystemExit(f"{args.data}: the training and test folders hold different classes")
    classes, epoch = len(train_set.classes), len(train_set) // args.batch_size
    if not epoch:
        raise SystemExit(f"{args.data} has {len(train_set)} images, fewer than --batch-size {args.batch_size}")
    steps = args.epochs * epoch
    train_transform = data.image_transform(trained["image_aug"], crop, trained["min_area"])

    def train_batches(start: int):
        batches = data.TrainBatches(len(train_set), args.batch_size, args.seed, start, steps)
        return data.make_loader(train_set, train_transform, batches, device, args.workers)

    digest = hashlib.sha256(open(args.encoder, "rb").read()).hexdigest()[:16]
    run = Run(args, images=len(train_set), encoder_sha256=digest)
    state = run.start(encoder_trained=trained, classes=classes, steps=steps) or {"results": []}
    torch.manual_seed(data.derive_seed(args.seed, "random encoder"))
    random_encoder = Encoder(file["arch"], file["norm"], file["stem"])
    for n, (name, network) in enumerate({"cpc": encoder, "random": random_encoder}.items()):
        if n < len(state["results"]):
            continue  # finished before this run was resumed
        frozen = Frozen(network, file, device, bf16)
        probe = train_probe(name, frozen, train_batches, args, run, state, classes, steps, epoch)
        batches = data.TestBatches(len(test_set), max(1, args.batch_size // dist.get_world_size()))
        test_loader = data.make_loader(test_set, data.image_transform("test", crop), batches, device, args.workers)
        top1, top5 = test(frozen, probe, test_loader)
        frozen.assert_unchanged()
        result = dict(encoder=name, head="linear", labels=1.0, seed=args.seed,
                      top1=round(top1, 3), top5=round(top5, 3))
        state = {"results": state["results"] + [result]}
        run.log("result", **result)
        run.save(state)

    if run.is_main:
        print(f"\nlinear classification, {len(test_set)} test images, {classes} classes")
        print(f"{'':16}{'top-1':>8}{'top-5':>8}")
        print(f"{'chance':16}{100 / classes:8.1f}{100 * min(5, classes) / classes:8.1f}")
        for result in reversed(state["results"]):
            print(f"{result['encoder']:16}{result['top1']:8.1f}{result['top5']:8.1f}")


if __name__ == "__main__":
    main(*parse_args())
