"""The encoder f_theta of CPC v2, the file it travels in, and the folder a run lives in.

Sec. 2.1 and 4.1: every patch goes through a pre-activation bottleneck ResNet on its own and is
mean-pooled to one vector z. Sec. 2.2 will use this network and "discard the rest": `encoder.pt` is
all that crosses from cpc.py to eval.py and detect.py, so it describes itself (architecture, norm,
patch geometry, normalisation, training) and nothing has to be said twice on a command line.

Shapes: N patches or images, B batch, G grid side, P patch side, D channels of the last stack.
"""

import argparse
import copy
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor
from tqdm import tqdm

# ---- Architectures ------------------------------------------------------------------------------

# blocks per stack, channels per stack, bottleneck channels per stack, stem
ARCHITECTURES = {
    # paper: Sec. 4.1. ResNet-101's third stack (23 blocks, 1024, 256) becomes 46 blocks, 4096, 512.
    "resnet161": ((3, 4, 46), (256, 512, 4096), (64, 128, 512), "7x7"),
    # paper: Sec. 4.1. CPC v1's encoder: the first three stacks of ResNet-101.
    "resnet92": ((3, 4, 23), (256, 512, 1024), (64, 128, 256), "7x7"),
    # paper: Fig. 4, right: only deeper, only wider.
    "resnet161-deep": ((3, 4, 46), (256, 512, 1024), (64, 128, 256), "7x7"),
    "resnet161-wide": ((3, 4, 23), (256, 512, 4096), (64, 128, 512), "7x7"),
    # paper: A.4, the supervised baselines, "'v2' variant": all four stacks, on whole images
    "resnet50": ((3, 4, 6, 3), (256, 512, 1024, 2048), (64, 128, 256, 512), "7x7"),
    "resnet101": ((3, 4, 23, 3), (256, 512, 1024, 2048), (64, 128, 256, 512), "7x7"),
    "resnet152": ((3, 8, 36, 3), (256, 512, 1024, 2048), (64, 128, 256, 512), "7x7"),
    # ours: CPU scale, for the tests, `--tiny` and small images.
    "small": ((2, 2, 2), (128, 256, 512), (32, 64, 128), "3x3"),
    "wide": ((1, 1, 1), (128, 256, 512), (64, 128, 192), "7x7"),
    "tiny": ((1, 1, 1), (64, 128, 256), (32, 32, 64), "3x3"),
}
STEMS = {"7x7": 4, "3x3/2": 2, "3x3": 1}  # and their strides; ours: the last two are for small patches
NORMS = ("layer", "batch", "none")  # paper: Sec. 4.1, "Layer normalization", compares the three


class LayerNorm(nn.Module):
    """ours: Ba et al. 2016 do not say over which axes of a feature map. All of (C, H, W) make the
    statistics those of one patch: no patch can see another, which is what batch norm gets wrong
    (Sec. 4.1: "a dependency between patches ... that can be exploited"). A scale and a bias for
    each channel. [N, C, H, W] -> the same.

    per_position: the statistics of each position over its channels, with the same weights, for
    detection, where a map is no longer a patch's."""

    per_position = False

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # [N, H, W, C], which is how channels_last lies in memory
        shape = x.shape[3:] if self.per_position else x.shape[1:]
        with torch.autocast(x.device.type, enabled=False):  # it would make float32 maps of bfloat16 ones
            weight, bias = self.weight.to(x.dtype).expand(shape), self.bias.to(x.dtype).expand(shape)
            return F.layer_norm(x, shape, weight, bias).permute(0, 3, 1, 2)


class Conv1x1(nn.Conv2d):
    """A 1x1 convolution, computed as the matrix product of channels that it is. ours, measured on a
    CPU in bfloat16: torch's own takes up to ten times as long backward on maps of few positions."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True):
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # [out, in]
        return F.linear(x.permute(0, 2, 3, 1), weight, self.bias).permute(0, 3, 1, 2)


def norm_layer(norm: str, channels: int) -> nn.Module:
    """The normalisation in front of every ReLU: "layer" (the paper's choice), "batch" or "none"."""
    if norm == "layer":
        return LayerNorm(channels)
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.Identity()


class Bottleneck(nn.Module):
    """Pre-activation bottleneck (He et al. 2016b): x + conv1x1(conv3x3(conv1x1(x))), a norm and
    a ReLU before each convolution. The 3x3 carries the stride. [N, C, h, w] -> [N, D, h/s, w/s]"""

    def __init__(self, in_channels: int, out_channels: int, width: int, stride: int, norm: str):
        super().__init__()
        bias = norm == "none"  # elsewhere redundant: a norm follows, here or after the sum, with a bias of its own
        self.norm1 = norm_layer(norm, in_channels)
        self.conv1 = Conv1x1(in_channels, width, bias)
        self.norm2 = norm_layer(norm, width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=bias)
        self.norm3 = norm_layer(norm, width)
        self.conv3 = Conv1x1(width, out_channels, bias)
        self.project = None
        if stride != 1 or in_channels != out_channels:
            self.project = Conv1x1(in_channels, out_channels, bias)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        shortcut = x
        if self.project is not None:
            stride = self.conv2.stride[0]
            shortcut = self.project(h[:, :, ::stride, ::stride])
        h = self.conv1(h)
        h = self.conv2(F.relu(self.norm2(h)))
        h = self.conv3(F.relu(self.norm3(h)))
        return h + shortcut


class Encoder(nn.Module):
    """f_theta: one vector per patch (`forward`), or a feature map per image (`features`).

    arch: a key of ARCHITECTURES; norm: one of NORMS; stem: "7x7" (7x7/2, 3x3/2 max-pool: with three
    stacks a total stride of 16), "3x3/2" (8) or "3x3" (4), the two for patches under 32 pixels, None
    for the architecture's own; checkpointing: recompute each block in the backward pass.
    """

    def __init__(self, arch: str = "resnet161", norm: str = "layer", stem: str | None = None,
                 checkpointing: bool = False):
        super().__init__()
        blocks, channels, widths, own_stem = ARCHITECTURES[arch]
        self.arch, self.norm, self.stem = arch, norm, stem or own_stem
        self.checkpointing = checkpointing
        self.out_channels = channels[-1]
        self.stride = STEMS[self.stem] * 2 ** (len(blocks) - 1)
        bias = norm == "none"
        if self.stem == "7x7":
            self.conv1 = nn.Conv2d(3, widths[0], 7, 2, padding=3, bias=bias)
            self.pool = nn.MaxPool2d(3, 2, padding=1)
        else:
            self.conv1 = nn.Conv2d(3, widths[0], 3, STEMS[self.stem], padding=1, bias=bias)
            self.pool = nn.Identity()
        self.blocks = nn.ModuleList()
        c = widths[0]
        for stack, (n, d, w) in enumerate(zip(blocks, channels, widths)):
            for block in range(n):
                self.blocks.append(Bottleneck(c, d, w, 2 if stack > 0 and block == 0 else 1, norm))
                c = d
        self.final_norm = norm_layer(norm, c)  # pre-activation blocks end without one

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if norm == "none":
            # ours: without a norm each residual sum adds its branch's variance, and 53 blocks
            # overflow; 1/sqrt(blocks) on every branch keeps the sum of the order of its input.
            for block in self.blocks:
                block.conv3.weight.data.mul_(len(self.blocks) ** -0.5)
        self.to(memory_format=torch.channels_last)  # 1x1 convolutions become plain matrix products

    def features(self, images: Tensor) -> Tensor:
        """Fully convolutional: [N, 3, H, W] -> [N, D, H / stride, W / stride] (rounded up)."""
        x = images.contiguous(memory_format=torch.channels_last)
        x = self.pool(self.conv1(x))
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return F.relu(self.final_norm(x))

    def forward(self, patches: Tensor) -> Tensor:
        """z = f_theta(x): patches [N, 3, P, P], normalised -> latents [N, D] in float32."""
        return self.features(patches).mean((2, 3), dtype=torch.float32)  # paper: Fig. 2, mean-pool

    def grid(self, patches: Tensor) -> Tensor:
        """The field of latents of Fig. 2, from `data.extract_patches`:
        [B, G, G, 3, P, P] -> [B, D, G, G]."""
        channels_last = patches.permute(0, 1, 2, 4, 5, 3).flatten(0, 2)  # [B*G*G, P, P, 3], one copy
        latents = self(channels_last.permute(0, 3, 1, 2))  # [B*G*G, D]
        return latents.unflatten(0, patches.shape[:3]).permute(0, 3, 1, 2)  # [B, D, G, G]


# ---- encoder.pt ---------------------------------------------------------------------------------

FORMAT = 1  # of every file written here; raised when an old reader would misread a new file


def atomic_save(obj: dict, path: Path, before: Path | None = None) -> None:
    """torch.save that a crash or a full disk cannot turn into half a file: write, fsync, rename.
    before: where the file that it replaces is kept."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            torch.save(obj, file)
            file.flush()
            os.fsync(file.fileno())
        if before and path.exists():
            os.replace(path, before)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as RuntimeError
        part.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise SystemExit(f"cannot write {path}: {reason}; what was there is kept")


def load_file(path: Path, kind: str) -> dict:
    """One of our files, without unpickling anything but tensors and plain values."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise SystemExit(f"no {kind} at {path}")
    except OSError as error:
        raise SystemExit(f"cannot read {path}: {error.strerror}")
    except Exception as error:  # torch.load's failures on foreign bytes have no common base class
        again = {"encoder": ": make it again with cpc.py", "detector": ": make it again with detect.py"}.get(kind, "")
        raise SystemExit(f"{path} is damaged or not ours ({type(error).__name__}){again}")
    if not isinstance(saved, dict) or saved.get("kind") != kind:
        raise SystemExit(f"{path} is not our {kind} file")
    if saved.get("format") != FORMAT:
        raise SystemExit(f"{path} has format {saved.get('format')}, this code reads {FORMAT}: update it")
    return saved


def save_encoder(path: str | Path, encoder: Encoder, geometry: dict, trained: dict) -> None:
    """Write `encoder.pt`: the weights and all that is needed to use them.

    geometry: crop, patch, stride in pixels and mean, std of the inputs; trained: how the weights
    came to be (data, arguments, steps), plain values only. Exits with one line if it cannot."""
    atomic_save({"kind": "encoder", "format": FORMAT, "arch": encoder.arch, "norm": encoder.norm,
                 "stem": encoder.stem, **geometry, "trained": trained,
                 "state": encoder.state_dict()}, Path(path))


def load_encoder(path: str | Path) -> tuple[Encoder, dict]:
    """Read `encoder.pt`: the network it describes with its weights (strictly), in eval mode, and
    everything else in the file. Exits with one line on a missing, foreign or damaged file."""
    saved = load_file(Path(path), "encoder")
    if saved.get("arch") not in ARCHITECTURES:
        raise SystemExit(f"{path} holds a {saved.get('arch')}, which this code does not know: update it")
    try:
        encoder = Encoder(saved["arch"], saved["norm"], saved["stem"])
        encoder.load_state_dict(saved.pop("state"), strict=True)
    except (KeyError, RuntimeError):
        raise SystemExit(f"{path} does not hold the weights of the {saved['arch']} it names")
    return encoder.eval(), saved


# ---- Encoders by the names that command lines give them -----------------------------------------


class TorchvisionGrid(nn.Module):
    """A convolutional classification model of torchvision as f_theta: `features` is a layer's
    output, [N, 3, H, W] -> [N, D, h, w]. Exits with one line on weights that are not this model's."""

    # the last feature map, as the families call it: Swin, ResNet, RegNet, most others, ShuffleNet, MNASNet
    LAST = ("permute", "layer4", "trunk_output", "features", "conv5", "layers")

    def __init__(self, name: str, weights: str | None = None, layers: tuple[str, ...] = LAST):
        super().__init__()
        model = models.get_model(name, weights=None)
        if weights:
            try:
                model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
            except Exception as error:  # foreign bytes, another model's weights: no common base class
                reason = " ".join(str(error).split())[:200]
                raise SystemExit(f"{weights} does not hold torchvision's weights of {name}: {reason}")
        layer = next((layer for layer in layers if hasattr(model, layer)), None)
        if layer is None:
            raise SystemExit(f"torchvision's {name} has no feature map [B, D, h, w] called {' or '.join(layers)}")
        self.arch = name
        self.extract = create_feature_extractor(model, {layer: "grid"})
        with torch.no_grad():
            shape = self.eval().features(torch.zeros(1, 3, 96, 96)).shape
        self.out_channels, self.stride = shape[1], 96 // shape[3]

    def features(self, images: Tensor) -> Tensor:
        return self.extract(images)["grid"]


@dataclass
class Representation:
    """What one name on `--encoder` stands for."""

    name: str  # cpc, random, torchvision, or patched, from eval.py: a result's "encoder"
    arch: str
    make: Callable[[int], nn.Module]  # seed -> a new network with `features`, `out_channels` and `stride`
    file: dict | None = None  # what encoder.pt says beside the weights
    sha256: str | None = None  # of the weights' file, its first 16 digits


def fresh(build: Callable[..., nn.Module], *arguments) -> Callable[[int], nn.Module]:
    """seed -> a new network whose weights are a function of the seed: those that pre-training
    under this seed starts from."""
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return build(*arguments)
    return make


def sha256(path: str) -> str:
    """Of a file, the first 16 hexadecimal digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def find_encoders(parser: argparse.ArgumentParser, names: list[str],
                  layers: tuple[str, ...] = TorchvisionGrid.LAST) -> list[Representation]:
    """FILE: what cpc.py wrote; random: the first FILE's network, untrained;
    torchvision:MODEL[:WEIGHTS]: the first of `layers` that it has. Exits with one line on others."""
    if len(set(names)) < len(names):
        parser.error(f"--encoder {' '.join(names)}: each may be named once")
    files = {}
    for name in names:
        if name != "random" and not name.startswith("torchvision:"):
            if not os.path.exists(name):
                parser.error(f"no encoder at {name}: run cpc.py first, or pass --encoder FILE")
            if os.path.isdir(name):
                parser.error(f"--encoder {name} is a folder: pass {name.rstrip('/')}/encoder.pt")
            files[name] = load_encoder(name)
    found = []
    for name in names:
        if name in files:
            encoder, file = files[name]
            arch = file["arch"] if len(files) == 1 else f"{file['arch']} {name}"
            make = lambda seed, encoder=encoder: copy.deepcopy(encoder)  # bound now: the loop goes on
            found.append(Representation(file["trained"].get("supervised", "cpc"), arch, make, file, sha256(name)))
        elif name == "random":
            if not files:
                parser.error("--encoder random takes its architecture from an encoder.pt: name one beside it")
            file = next(iter(files.values()))[1]
            make = fresh(Encoder, file["arch"], file["norm"], file["stem"])
            found.append(Representation(name, file["arch"], make, file))
        else:
            _, model, *weights = name.split(":", 2)
            if model not in models.list_models(models):
                parser.error(f"--encoder {name}: torchvision has no such classification model")
            if weights and not os.path.isfile(weights[0]):
                parser.error(f"--encoder {name}: no file {weights[0]}")
            make = fresh(TorchvisionGrid, model, *weights or [None], layers)
            make(0)  # so that what cannot be used is refused at once
            found.append(Representation("torchvision", name.split(":", 1)[1], make, None, *map(sha256, weights)))
    return found


def assert_unchanged(network: nn.Module, before: dict) -> None:
    """Frozen means bit-identical, the statistics of a batch norm included."""
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), f"the frozen encoder's {key} has changed"


# ---- A run: its flags, folder, log, checkpoint and signals, the same for every script -----------


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The file's docstring as it stands, and every flag's default."""

    def _get_help_string(self, action):
        shown = action.default is not None and action.default is not False and "(default" not in action.help
        return super()._get_help_string(action) if shown else action.help


class Parser(argparse.ArgumentParser):
    """argparse with whole flag names, one-line errors, and the flags all scripts share."""

    DATA = ("folder with train/ and val/ (or test/), or any folder of images; or cifar10, stl10, imagenette "
            "(downloaded), shapes (made) (default: ./imagenet; eval.py: the encoder's)")

    def __init__(self, doc: str, out: str, data: str = DATA):
        super().__init__(description=doc, allow_abbrev=False, formatter_class=HelpFormatter)
        self.add_argument("--data", help=data)
        self.add_argument("--out", default=out, help="the run's folder")
        self.add_argument("--resume", action="store_true",
                          help="continue the run in --out, if there is one")
        self.add_argument("--seed", type=int, default=0, help="of everything random")
        self.add_argument("--tiny", action="store_true", help="the CPU scale, on shapes")
        self.add_argument("--workers", type=int, help="data loading processes (default: by cores)")
        self.add_argument("--bf16", action=argparse.BooleanOptionalAction,
                          help="bfloat16 autocast (default: where the hardware has it)")

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")

    def set_defaults_checked(self, defaults: dict) -> None:
        """A preset: defaults that explicit flags still override."""
        assert defaults.keys() <= vars(self.parse_known_args([])[0]).keys()
        self.set_defaults(**defaults)

    def check_ranges(self, args: argparse.Namespace, ranges: dict[str, tuple[float, float]]) -> None:
        """Exit with one line on a flag out of its range, or a batch that does not divide."""
        for name in ("data", "out", "subset"):
            if getattr(args, name, None) == "":
                self.error(f"--{name} is empty: pass a path")
        for name, (low, high) in (ranges | dict(workers=(0, 1024), seed=(0, 2**61))).items():
            value = getattr(args, name) or 0  # --workers has no default
            if not all(low <= v <= high for v in (value if isinstance(value, list) else [value])):
                self.error(f"--{name.replace('_', '-')} {value} is not between {low:g} and {high:g}")
        world = int(os.environ.get("WORLD_SIZE", 1))
        if args.batch_size < 1 or args.batch_size % world:
            self.error(f"--batch-size {args.batch_size} is not a positive multiple of the number of processes, {world}")


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """ours: linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


LOST = "lost the connection to another process of this run, whose own message says why"
KNOWN = {  # errors of torch that a user can do something about
    "can't allocate memory": "memory is full: lower --batch-size or --workers, or use more processes",
    "CUDA out of memory": "the GPU's memory is full: lower --batch-size, or use more GPUs",
    "DataLoader worker": "a data loading process was killed: if memory is full, lower --workers; --resume continues",
    "Output size is too small": "the images are too small for this network: raise --crop",
    "gloo": LOST, "NCCL": LOST}


def one_line(parse_args: Callable, main: Callable) -> None:
    """A script from its command line to its end; what a user or the system causes ends it with one line."""
    try:
        args = parse_args()
        main(*(args if isinstance(args, tuple) else (args,)))
        if dist.is_initialized():  # a process that fails leaves without: NCCL's end would wait for the others
            dist.destroy_process_group()
    except KeyboardInterrupt:  # there is no run yet that could be saved
        raise SystemExit(130)
    except OSError as error:
        full = "in the folder of --out, or where the output goes" if error.errno == errno.ENOSPC else ""
        where = error.filename or full
        raise SystemExit(f"{error.strerror or error}{f': {where}' if where else ''}")
    except (RuntimeError, MemoryError) as error:
        text = "can't allocate memory" if isinstance(error, MemoryError) else str(error)
        known = next((k for k in KNOWN if k in text), None)
        if not known:
            raise
        raise SystemExit(f"{KNOWN[known]} ({' '.join(str(error).split())[:200] or type(error).__name__})")
    finally:
        end_bars()


def end_bars() -> None:
    """Progress bars that are still drawn keep their line, what is printed next gets its own."""
    for bar in list(tqdm._instances):
        bar.close()


def git_commit() -> str | None:
    """The commit of this code, if it is in a git checkout."""
    try:
        git = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "-q", "--verify", "HEAD"],
                             capture_output=True, text=True)
    except OSError:
        return None  # no git here
    return git.stdout.strip() or None


class Run:
    """What a run leaves on disk: `log.jsonl`, `checkpoint.pt` and the one before, pictures, all below `--out`.

    Refuses a folder that another run has used or is using, unless it resumes that very run: the
    arguments must be the same, but for where and how it runs. What one torchrun starts again (a process
    has died, a node has come or gone) resumes by itself. SIGTERM and SIGINT are caught, for
    `stop_signal` to pick up between two steps; another one, later, ends the process at once.
    """

    # where and how it runs
    MAY_DIFFER = {"data", "out", "resume", "workers", "checkpointing", "compile", "benchmark", "save_every"}
    BEFORE, START = "checkpoint-before.pt", b'{"event": "start"'
    SAME_SIGNAL = 2.0  # ours: a signal so many seconds after the first is the same one, sent by terminal and torchrun

    def __init__(self, args: argparse.Namespace, **facts):
        """facts: what else must be the same for a run to be continued (its images, its encoder)."""
        self.folder, self.signal, self.caught = Path(args.out), 0, 0.0
        self.args, self.facts = dict(vars(args)), facts
        self.is_main = dist.get_rank() == 0
        self.launcher = os.environ.get("TORCHELASTIC_RUN_ID")  # --rdzv-id; None without torchrun
        if self.launcher == "none":  # not given: the folder that each torchrun makes for its processes' errors
            file = os.environ.get("TORCHELASTIC_ERROR_FILE") or f"{os.getppid()}/attempt/rank/error.json"
            self.launcher = Path(file).parents[2].name
        self.resume = args.resume
        verdict = [(self._open(), self.resume) if self.is_main else None]
        dist.broadcast_object_list(verdict)  # rank 0 decides, so that all ranks leave together
        error, self.resume = verdict[0]
        if error:
            raise SystemExit(error if self.is_main else 1)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _open(self) -> str | None:
        """Take the folder; what is wrong with it. A run that this torchrun has begun is resumed."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = open(self.folder / "log.jsonl", "ab+")
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a data loader's processes do not share it
        except BlockingIOError:
            return f"another run is writing to {self.folder}: pass another --out"
        except OSError as error:
            reason = "it is not a folder" if isinstance(error, FileExistsError) else error.strerror
            return f"cannot use --out {self.folder}: {reason}"
        self.file.seek(0)
        lines = self.file.read().splitlines()
        there = lambda *names: any((self.folder / name).exists() for name in names)
        last = re.findall(rb'"launcher": (".*?")', b"\n".join(lines))[-1:]
        self.resume = self.resume or last == [json.dumps(self.launcher).encode()]
        if not self.resume and (lines or there("checkpoint.pt", "encoder.pt", "model.pt")):
            return f"{self.folder} holds a run: pass --resume to continue it, or another --out"
        begun = any(not line.startswith(self.START[:len(line)]) for line in lines)  # of the first, half may be written
        if (begun or there("encoder.pt", "model.pt")) and not there("checkpoint.pt", self.BEFORE):
            return f"{self.folder} holds a run without its checkpoint, or what is not ours: pass another --out"
        return None

    def _write(self, text: str) -> None:
        try:
            self.file.seek(0, os.SEEK_END)
            self.file.write(text.encode())
            self.file.flush()
        except OSError as error:
            raise SystemExit(f"cannot write {self.folder}/log.jsonl: {error.strerror}")

    def log(self, event: str, **fields) -> None:
        """Append one JSON line, on rank 0."""
        if self.is_main:
            self._write(json.dumps({"event": event, **fields}) + "\n")

    def start(self, **fields) -> dict | None:
        """The checkpoint to continue from when resuming, else None; logs the first line."""
        path, state, log = self.folder / "checkpoint.pt", None, (0, "")
        if not path.exists():  # killed while one replaced the other
            path = self.folder / self.BEFORE
        if self.resume and path.exists():
            try:
                saved = load_file(path, "checkpoint")
            except SystemExit as error:
                fix = "pass another --out to begin again"
                if path.name != self.BEFORE and (self.folder / self.BEFORE).exists():
                    fix = f"{self.BEFORE} beside it is the one before: rename it to go on from there"
                raise SystemExit(f"{error}; {fix}")
            for key, now in self._identity().items():
                if saved["args"].get(key) != now:
                    raise SystemExit(f"{path} was made with {key.replace('_', '-')} {saved['args'].get(key)}, "
                                     f"not {now}: use the same, or another --out")
            state, log = saved["state"], saved["log"]
        found = [None] * dist.get_world_size()  # a process without the checkpoint would wait for the others for ever
        dist.all_gather_object(found, log)
        if any(other != log for other in found):
            raise SystemExit(f"not all processes find the same {path}: --out must be a folder that all nodes share")
        if self.is_main:
            self._rewind(*log)
        versions = dict(python=sys.version.split()[0], torch=torch.__version__, torchvision=torchvision.__version__)
        self.log("start", args=self.args, **self.facts, **fields, resumed=state is not None, launcher=self.launcher,
                 commit=git_commit(), **versions, world_size=dist.get_world_size(),
                 time=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
        return state

    def _rewind(self, size: int, line: str) -> None:
        """The log as of a checkpoint: its first `size` bytes and `line`. Later lines are dropped, since their work
        is done again; later starts are kept."""
        self.file.seek(0)
        text = self.file.read()
        size = text.rfind(b"\n", 0, size) + 1  # the same, unless somebody has edited it
        starts = [row.decode() for row in text[size:].splitlines(keepends=True)
                  if row.startswith(self.START) and row.endswith(b"\n")]
        self.file.truncate(size)
        self._write(line + "".join(starts))

    def _identity(self) -> dict:
        """What must be the same for a run to be continued."""
        same = {k: v for k, v in self.args.items() if k not in self.MAY_DIFFER}
        return same | self.facts | {"processes": dist.get_world_size()}

    def save(self, state: dict, event: str | None = None, **fields) -> None:
        """Replace the checkpoint, on rank 0, and append a line to the log if there is an event: killed between
        the two, a resumed run finds the line in the checkpoint. state: tensors and plain values."""
        if self.is_main:
            line = json.dumps({"event": event, **fields}) + "\n" if event else ""
            os.fsync(self.file.fileno())  # never behind the checkpoint
            log = self.file.seek(0, os.SEEK_END), line
            atomic_save({"kind": "checkpoint", "format": FORMAT, "args": self._identity(), "state": state, "log": log},
                        self.folder / "checkpoint.pt", self.folder / self.BEFORE)
            self._write(line)

    def _on_signal(self, number, frame) -> None:
        if not self.signal:
            self.signal, self.caught = number, time.monotonic()
        elif time.monotonic() - self.caught > self.SAME_SIGNAL:
            os._exit(128 + number)

    def stop_signal(self) -> int:
        """The signal any rank has caught, 0 for none. All ranks must ask at the same step."""
        caught = torch.tensor(self.signal)
        dist.all_reduce(caught, dist.ReduceOp.MAX)
        return int(caught)

    def leave(self, number: int) -> None:
        """End after a caught signal and a save: one line, and the conventional exit code."""
        end_bars()
        if self.is_main:
            print(f"stopped by {signal.Signals(number).name}, state saved: "
                  f"the same command with --resume continues", file=sys.stderr)
        raise SystemExit(128 + number)
