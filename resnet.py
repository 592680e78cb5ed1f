"""The encoder f_theta of CPC v2, and the file it travels in.

Sec. 2.1 and 4.1: every patch goes through a bottleneck ResNet on its own and is mean-pooled to one
vector z (differs: with pre-activation, He et al. 2016b, as A.4's baselines; Sec. 4.1 cites 2016a).
Sec. 2.2 uses this network and discards "the rest": `encoder.pt` is all that crosses from cpc.py to
eval.py and detect.py, so it describes itself: architecture, norm, patch geometry, and how it was
trained, from which eval.py takes its defaults. Its inputs are what `data.normalise` makes.

Shapes: N patches or images, B batch, G grid side, P patch side, D channels of the last stack.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision import models

# ---- Architectures -------------------------------------------------------------------------------


class Architecture(NamedTuple):
    """A ResNet, stack by stack."""

    blocks: tuple[int, ...]
    channels: tuple[int, ...]
    widths: tuple[int, ...]  # channels inside the bottlenecks
    stem: str  # of STEMS


ARCHITECTURES = {
    # paper: Sec. 4.1. ResNet-101's third stack (23 blocks, 1024, 256) becomes 46 blocks, 4096, 512.
    "resnet161": Architecture((3, 4, 46), (256, 512, 4096), (64, 128, 512), "7x7"),
    # paper: Sec. 4.1. CPC v1's encoder: the first three stacks of ResNet-101.
    "resnet92": Architecture((3, 4, 23), (256, 512, 1024), (64, 128, 256), "7x7"),
    # paper: Fig. 4, right, a deeper and a wider variant. ours: their block counts, since the text
    # that we have lacks this figure. Each has one of the two steps from ResNet-92 to ResNet-161.
    "resnet161-narrow": Architecture((3, 4, 46), (256, 512, 1024), (64, 128, 256), "7x7"),
    "resnet92-wide": Architecture((3, 4, 23), (256, 512, 4096), (64, 128, 512), "7x7"),
    # paper: A.4, the supervised baselines, "'v2' variant": all four stacks, on whole images.
    "resnet50": Architecture((3, 4, 6, 3), (256, 512, 1024, 2048), (64, 128, 256, 512), "7x7"),
    "resnet101": Architecture((3, 4, 23, 3), (256, 512, 1024, 2048), (64, 128, 256, 512), "7x7"),
    "resnet152": Architecture((3, 8, 36, 3), (256, 512, 1024, 2048), (64, 128, 256, 512), "7x7"),
    # ours: `tiny` is for the tests and `--tiny`, on a CPU; the others, for photos of a hundred
    # pixels, have about a million parameters. `medium` is for patches of 40 pixels: its stem
    # halves them where the paper's quarters 80, so that they too end as maps of 5x5.
    "medium": Architecture((1, 2, 2), (128, 256, 512), (64, 96, 128), "3x3/2"),
    "shallow": Architecture((1, 1, 1), (128, 256, 512), (64, 128, 128), "7x7"),
    "small": Architecture((2, 2, 2), (128, 256, 512), (32, 64, 128), "3x3"),
    "tiny": Architecture((1, 1, 1), (64, 128, 256), (32, 32, 64), "3x3"),
}
# Side and stride of a stem's convolution, stride of the max-pool after it. ours: the last two, for
# small patches, whose sides the 7x7 stem would quarter.
STEMS = {"7x7": (7, 2, 2), "3x3/2": (3, 2, 1), "3x3": (3, 1, 1)}


class LayerNorm(nn.Module):
    """ours: the paper does not say over which axes of a feature map. All of (C, H, W) make the
    statistics those of one patch: no patch can see another, as it can through batch norm (Sec.
    4.1: "a dependency between patches ... that can be exploited"). Each channel has a scale and a
    bias. [N, C, H, W] -> the same shape. (`nn.GroupNorm(1, C)` does this, but not `per_position`.)

    per_position: the statistics of each position over its channels, with the same weights, for
    detection, where a map is no longer a patch's (detect.py)."""

    per_position = False

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # [N, H, W, C], which is how channels_last lies in memory
        shape = x.shape[3:] if self.per_position else x.shape[1:]
        with torch.autocast(x.device.type, enabled=False):  # it would turn bfloat16 into float32
            weight = self.weight.to(x.dtype).expand(shape)
            bias = self.bias.to(x.dtype).expand(shape)
            return F.layer_norm(x, shape, weight, bias).permute(0, 3, 1, 2)


# paper: Sec. 4.1, "Layer normalization", compares the three
NORMS = {"layer": LayerNorm, "batch": nn.BatchNorm2d, "none": nn.Identity}


class Conv1x1(nn.Conv2d):
    """A 1x1 convolution, computed as the matrix product that it is. ours, measured on a CPU with
    bfloat16 matrix units: torch's convolution takes up to ten times as long backward on small maps
    (512 to 128 channels on 2x2 maps 15.3 ms, this 1.5)."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True):
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        # [out, in]; permuted first, so that its gradient has the strides that DDP's buckets expect
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        # A strided map is made contiguous: else torch repeats a frozen weight for each of its rows.
        x = x.permute(0, 2, 3, 1).contiguous()  # [N, H, W, C]
        return F.linear(x, weight, self.bias).permute(0, 3, 1, 2)


class Bottleneck(nn.Module):
    """Pre-activation bottleneck (He et al. 2016b): x + conv1x1(conv3x3(conv1x1(x))), a norm and a
    ReLU before each convolution. The 3x3 carries the stride. [N, C, h, w] -> [N, D, h/s, w/s]"""

    def __init__(self, in_channels: int, out_channels: int, width: int, stride: int, norm: str):
        super().__init__()
        bias = norm == "none"  # a norm after a convolution has a bias of its own
        self.norm1 = NORMS[norm](in_channels)
        self.conv1 = Conv1x1(in_channels, width, bias)
        self.norm2 = NORMS[norm](width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=bias)
        self.norm3 = NORMS[norm](width)
        self.conv3 = Conv1x1(width, out_channels, bias)
        self.stride = stride
        self.project = None
        if stride != 1 or in_channels != out_channels:
            self.project = Conv1x1(in_channels, out_channels, bias)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        shortcut = x
        if self.project is not None:
            shortcut = self.project(h[:, :, ::self.stride, ::self.stride])
        h = self.conv1(h)
        h = self.conv2(F.relu(self.norm2(h)))  # [N, width, h/s, w/s]
        h = self.conv3(F.relu(self.norm3(h)))  # [N, D, h/s, w/s]
        return h + shortcut


def residual_stack(blocks: int, in_channels: int, out_channels: int, width: int, stride: int,
                   norm: str) -> nn.Sequential:
    """Bottlenecks, of which the first carries the stride and the change of channels."""
    first = Bottleneck(in_channels, out_channels, width, stride, norm)
    others = [Bottleneck(out_channels, out_channels, width, 1, norm) for _ in range(blocks - 1)]
    return nn.Sequential(first, *others)


class Encoder(nn.Module):
    """f_theta: one vector per patch (`forward`), or a feature map per image (`features`).

    arch, norm, stem: keys of ARCHITECTURES, NORMS, STEMS (stem None: the architecture's own). With
    three stacks the stems make a total stride of 16, 8 or 4. checkpointing: recompute each block in
    the backward pass, keep no activations inside it (None: only at 4096 channels). Batch norm's
    running statistics then take two steps instead of one: both passes count."""

    def __init__(self, arch: str = "resnet161", norm: str = "layer", stem: str | None = None,
                 checkpointing: bool | None = None):
        super().__init__()
        blocks, channels, widths, own_stem = ARCHITECTURES[arch]
        self.arch, self.norm, self.stem = arch, norm, stem or own_stem
        self.out_channels = channels[-1]
        if checkpointing is None:
            checkpointing = self.out_channels == 4096
        self.checkpointing = checkpointing
        side, stem_stride, pool = STEMS[self.stem]
        self.stride = stem_stride * pool * 2 ** (len(blocks) - 1)
        self.conv1 = nn.Conv2d(3, widths[0], side, stem_stride, side // 2, bias=norm == "none")
        self.pool = nn.MaxPool2d(3, pool, padding=1) if pool > 1 else nn.Identity()
        self.blocks = nn.ModuleList()
        in_channels = (widths[0], *channels)
        for n, sizes in enumerate(zip(blocks, in_channels, channels, widths)):
            self.blocks.extend(residual_stack(*sizes, stride=2 if n else 1, norm=norm))
        self.final_norm = NORMS[norm](channels[-1])  # pre-activation blocks end without one

        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # ours: as torchvision's ResNets
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if norm == "none":
            # ours: without a norm each residual sum adds its branch's variance, and 53 blocks
            # overflow; 1/sqrt(blocks) on every branch keeps the sum of the order of its input.
            for block in self.blocks:
                block.conv3.weight.data.mul_(len(self.blocks) ** -0.5)
        self.to(memory_format=torch.channels_last)

    def features(self, images: Tensor) -> Tensor:
        """Fully convolutional: [N, 3, H, W] -> [N, D, H / stride, W / stride] (rounded up). Layer
        norm then has the statistics of all that it is given: a patch, or a whole image."""
        x = images.contiguous(memory_format=torch.channels_last)
        x = self.pool(self.conv1(x))
        for block in self.blocks:
            if self.checkpointing and x.requires_grad:
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x)
        return F.relu(self.final_norm(x))

    def forward(self, patches: Tensor) -> Tensor:
        """z = f_theta(x): patches [N, 3, P, P], normalised -> latents [N, D] in float32."""
        return self.features(patches).mean((2, 3), dtype=torch.float32)  # paper: Fig. 2, mean-pool

    def grid(self, patches: Tensor) -> Tensor:
        """The field of latents of Fig. 2, from patches as `data.to_patches` cuts them:
        [B, G, G, 3, P, P] -> [B, D, G, G]."""
        latents = self(patches.flatten(0, 2))  # [B*G*G, D]
        return latents.unflatten(0, patches.shape[:3]).permute(0, 3, 1, 2)  # [B, D, G, G]

    def compile_blocks(self, backend: str | Callable = "inductor") -> None:
        """torch.compile each block: all of the same shape share a graph (six for ResNet-161's 53),
        and each can still be recomputed on its own."""
        torch._dynamo.config.recompile_limit = 64  # torch's 8 are too few for two sizes of patches
        torch._dynamo.config.optimize_ddp = False  # it would cut a wide block's graph in two
        for block in self.blocks:
            block.compile(backend=backend)


# ---- Files ---------------------------------------------------------------------------------------


def save_file(contents: dict, path: Path) -> None:
    """torch.save that a crash or a full disk cannot turn into half a file: write, fsync, rename."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as RuntimeError
        part.unlink(missing_ok=True)
        raise SystemExit(f"cannot write {path} (is the disk full?), the old one is kept: {error}")


def load_file(path: Path, kind: str) -> dict:
    """A file of `save_file`: tensors and plain values, no pickle is executed. Exits with a one-line
    message if it is no file of this kind."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        found = saved["kind"]
    except Exception as error:  # torch.load's failures on foreign bytes have no common base class
        raise SystemExit(f"{path} is damaged or no {kind} of ours ({type(error).__name__})")
    if found != kind:
        raise SystemExit(f"{path} is no {kind} of ours, but a {found}")
    return saved


def save_encoder(path: Path, encoder: Encoder, metadata: dict) -> None:
    """Write `encoder.pt`: the weights and all that is needed to use them.

    metadata: crop, patch and stride in pixels, and how the weights were `trained` (data, arguments,
    steps), plain values only. Exits with a one-line message if it cannot."""
    network = dict(kind="encoder", arch=encoder.arch, norm=encoder.norm, stem=encoder.stem)
    state = {name: value.cpu() for name, value in encoder.state_dict().items()}
    save_file(metadata | network | {"state": state}, path)


def load_encoder(path: str | Path) -> tuple[Encoder, dict]:
    """Read `encoder.pt`: the network it describes with its weights, in eval mode, and the file's
    metadata. Exits with a one-line message on a missing, foreign or damaged file."""
    if not os.path.isfile(path):
        raise SystemExit(f"no encoder at {path}: run cpc.py first, or pass --encoder FILE")
    saved = load_file(Path(path), "encoder")
    encoder = Encoder(saved["arch"], saved["norm"], saved["stem"])
    encoder.load_state_dict(saved.pop("state"))
    return encoder.eval(), saved


# ---- Encoders by the names that command lines give them ------------------------------------------


class TorchvisionResNet(nn.Module):
    """One of torchvision's ResNets in CPC's place (Table 2 does this with BigBiGAN and AMDIM).

    name: resnet18, resnet50, ...; weights: a file of its weights, or None for random ones; stacks:
    all 4, or 3 (to conv4) as a detector's trunk."""

    def __init__(self, name: str, weights: str | None = None, stacks: int = 4):
        super().__init__()
        model = models.get_model(name, weights=None)
        self.stride = 2 ** (1 + stacks)
        self.out_channels = model.fc.in_features // 2 ** (4 - stacks)
        model.fc = nn.Identity()  # other methods' files have none, or one of other classes
        if weights:
            state = torch.load(weights, map_location="cpu", weights_only=True)
            model.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})
        self.layers = nn.Sequential(*list(model.children())[:4 + stacks])  # after the stem's four

    def features(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, D, H / stride, W / stride] (rounded up)."""
        return self.layers(images)


class Source(NamedTuple):
    """A feature extractor: what one name on `--encoder` or `--supervised` stands for."""

    name: str  # cpc, random, torchvision; pixels, patched, patched-none: trained by eval.py
    arch: str
    network: type[nn.Module]
    arguments: tuple  # of `network`
    weights: dict | None = None  # a state_dict; None: random weights
    metadata: dict | None = None  # crop, patch, stride, and how it was trained, as in encoder.pt
    supervised: bool = False  # it starts from random weights and learns from labels alone

    def make(self, seed: int) -> nn.Module:
        """A new network. Random weights are a function of the seed: cpc.py starts from the same."""
        torch.manual_seed(seed)
        network = self.network(*self.arguments)
        if self.weights:
            network.load_state_dict(self.weights)
        return network


ENCODER_HELP = ("FILE: what cpc.py wrote; random: the network named before it, untrained; "
                "torchvision:resnet50[:WEIGHTS]")


def find_encoders(names: list[str], stacks: int = 4) -> tuple[list[Source], dict | None]:
    """The encoders that `--encoder` names, and the metadata of the first encoder.pt among them.
    random, and torchvision's without WEIGHTS, are untrained. Exits with a one-line message on
    another name."""
    sources = []
    for name in names:
        if name == "random":
            if not sources:
                raise SystemExit("--encoder random is the network before it, untrained: name one")
            sources.append(sources[-1]._replace(name="random", weights=None))
        elif name.startswith("torchvision:"):
            _, model, *weights = name.split(":", 2)
            if model not in models.list_models(models, include="resnet*"):
                raise SystemExit(f"--encoder {name}: torchvision has no such ResNet")
            if weights and not os.path.isfile(weights[0]):
                raise SystemExit(f"--encoder {name}: there is no file {weights[0]}")
            arguments = model, None, stacks
            trained = TorchvisionResNet(model, weights[0], stacks).state_dict() if weights else None
            sources.append(Source("torchvision", model, TorchvisionResNet, arguments, trained))
        else:
            encoder, metadata = load_encoder(name)
            kind = metadata["trained"].get("supervised", "cpc")
            arguments = encoder.arch, encoder.norm, encoder.stem
            weights = encoder.state_dict()
            sources.append(Source(kind, encoder.arch, Encoder, arguments, weights, metadata))
    kinds = [source.name for source in sources]
    for n, kind in enumerate(kinds):
        if kinds.count(kind) > 1:  # rows of the table are told apart by their place
            sources[n] = sources[n]._replace(name=f"{kind}-{n}")
    return sources, next((s.metadata for s in sources if s.metadata), None)
