"""What a run takes in, and what it leaves behind.

First the patches of Sec. 2.1, 4.1 and A.3 and their own augmentation, which happen on the training
device. Then, on the CPU in loader processes: image augmentation, data sets (folders, torchvision's,
the embedded `shapes`), subsets of the labels, and batches that depend neither on the number of
workers nor on that of processes. Last: processes, a run's folder, and the flags all scripts share.

Shapes: B batch, G grid side, P patch side, S image side. Images travel as uint8.
"""

import argparse
import atexit
import copy
import ctypes
import errno
import fcntl
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Container, Iterable, Iterator
from functools import cache
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2
from tqdm import tqdm

from resnet import load_file, save_file

# ---- Patches -------------------------------------------------------------------------------------

# ours: the paper gives no input normalisation; ImageNet's channel statistics, for every data set.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def grid_side(crop: int, patch: int, stride: int) -> int:
    """G, the number of patches along a side; a one-line message if they do not tile the crop."""
    if patch > crop or (crop - patch) % stride:
        raise SystemExit(f"crop {crop}, patch {patch}, stride {stride}: patches do not tile the "
                         f"crop (crop - patch must be a multiple of stride)")
    return (crop - patch) // stride + 1


def extract_patches(images: Tensor, patch: int, stride: int) -> Tensor:
    """Cut overlapping patches (Sec. 2.1; A.3: 80x80 at stride 32 out of 240x240 -> 6x6): a view, in
    which overlapping patches share their pixels. [B, 3, S, S] -> [B, G, G, 3, P, P]"""
    view = images.unfold(2, patch, stride).unfold(3, patch, stride)  # [B, 3, G, G, P, P]
    return view.permute(0, 2, 3, 1, 4, 5)


def normalise(images: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] -> float32, zero mean and unit variance by MEAN and STD."""
    mean, std = torch.tensor((MEAN, STD)).view(2, 3, 1, 1)
    # A blocking copy would wait, in every step, for all that the GPU has yet to do.
    scale, shift = torch.stack((1 / (255 * std), mean / std)).to(images.device, non_blocking=True)
    return images.float().mul_(scale).sub_(shift)


def jitter_indices(patch: int, numbers: Tensor) -> Tensor:
    """For each row (or column) of a patch the row that it is copied from: int64 [..., P]. numbers:
    uniform in 0..1, [...].

    paper: Sec. 4.1, v1 "spatially jitters individual patches", and v2 furthers its logic. v1's own
    paper has a random 60x60 subcrop of a 64x64 patch, padded back. ours: the same proportion for
    other patches (80 -> 75, 8 -> 7), and the border is repeated: a border of zeros, which patches
    at test time do not have, cost a linear probe on CIFAR-10 25 points of top-1 in an early
    trial."""
    side = max(1, patch * 60 // 64)
    shift = ((patch - side + 1) * numbers).long()
    inside = torch.arange(patch, device=shift.device) - (patch - side) // 2
    return shift[..., None] + inside.clamp(0, side - 1)


def drop_colors(x: Tensor, dropped: Tensor, keep: Tensor, noise: Tensor) -> Tensor:
    """Drop two of the three colours of some patches (or of whole images), in place.

    x: normalised, float32 [..., 3, P, P]; dropped: bool [...], which patches; keep: int64 [...],
    the channel that is left unchanged; noise: [3, P, P], of unit deviation.

    paper: Sec. 4.1, "randomly drops two of the three color channels in each patch". Doersch et al.
    2015: replaced by Gaussian noise of 1/100 of the remaining channel's deviation. The noise is
    around zero, the mean colour after normalisation."""
    # Each channel's deviation is sqrt(E[x^2] - E[x]^2): `x.std` takes many times as long on a CPU.
    mean_square = torch.linalg.vector_norm(x, dim=(-2, -1)).square() / noise[0].numel()  # [..., 3]
    deviation = (mean_square - x.mean((-2, -1)).square()).clamp(min=0).sqrt()
    keep = keep[..., None]
    replaced = dropped[..., None] & (torch.arange(3, device=x.device) != keep)  # [..., 3]
    noise_deviation = 0.01 * deviation.gather(-1, keep) * replaced  # 0 where a channel stays
    return x.mul_(~replaced[..., None, None]).addcmul_(noise, noise_deviation[..., None, None])


def augment_patches(images: Tensor, patch: int, stride: int, generator: torch.Generator,
                    color_drop: float = 0.0, jitter: bool = False, flip: float = 0.0) -> Tensor:
    """Patch-based augmentation (Sec. 4.1), every patch on its own, as the image is cut.

    images: normalised, float32 [B, 3, S, S], this process's share of a batch; generator: on their
    device; color_drop, flip: probability for a patch; jitter: whether to shift patches at random.
    Returns new patches [B, G, G, 3, P, P]."""
    B, G = len(images), grid_side(images.shape[-1], patch, stride)
    rank, world = dist.get_rank(), dist.get_world_size()

    def uniform() -> Tensor:
        # Every process draws the numbers of the whole batch and keeps those of its own images, as
        # `train_batches` deals them out: they do not depend on the number of processes.
        numbers = torch.rand(B * world, G, G, generator=generator, device=images.device)
        return numbers[rank::world]  # [B, G, G]

    rows = cols = torch.arange(patch, device=images.device).expand(B, G, G, patch)
    if jitter:
        rows = jitter_indices(patch, uniform())  # [B, G, G, P]
        cols = jitter_indices(patch, uniform())
    if flip:  # paper: "randomly flip patches horizontally"
        flipped = uniform() < flip
        cols = torch.where(flipped[..., None], cols.flip(-1), cols)
    patches = extract_patches(images, patch, stride)  # [B, G, G, 3, P, P]
    source = (patch * rows[..., :, None] + cols[..., None, :]).flatten(3)  # [B, G, G, P*P]
    taken = patches.flatten(4).gather(4, source[..., None, :].expand(-1, -1, -1, 3, -1))
    patches = taken.view(patches.shape)
    if color_drop:
        dropped, keep = uniform() < color_drop, (3 * uniform()).long()
        # ours: one sheet of noise serves the whole batch: it tells no patch from another
        noise = torch.randn(patches.shape[3:], generator=generator, device=images.device)
        patches = drop_colors(patches, dropped, keep, noise)
    return patches


def to_patches(images: Tensor, device: torch.device, patch: int, stride: int,
               seed: int | None = None, **augmentation) -> Tensor:
    """From the loader to the encoder: uint8 images [B, 3, S, S] -> float32 patches
    [B, G, G, 3, P, P] on the device, with `augment_patches`' augmentation, a function of the seed
    alone, or without (seed None)."""
    # Normalised before it is cut: A.3's patches hold a pixel four times, on average.
    images = normalise(images.to(device, non_blocking=True).contiguous())
    if seed is None:
        return extract_patches(images, patch, stride)
    generator = torch.Generator(device).manual_seed(seed)
    return augment_patches(images, patch, stride, generator, **augmentation)


# ---- Image augmentation --------------------------------------------------------------------------


def image_transform(kind: str, crop: int, min_area: float = 0.08, distort: bool = False,
                    grey: bool = False) -> v2.Compose:
    """PIL image or uint8 tensor -> uint8 tensor [3, crop, crop].

    kind: "inception" (random area of min_area..1 of the image, aspect 3/4..4/3, mirrored half the
    time: Szegedy et al. 2014 in its common reading; A.3), "v1" (CPC v1: a random crop of an image
    resized in the proportion 300:256, mirrored), or "test" (Sec. 2.2: none, a single crop).
    distort: Inception's random brightness, contrast, saturation and hue; grey: as in "v1"."""
    if kind == "inception":
        crops = v2.RandomResizedCrop(crop, scale=(min_area, 1.0), ratio=(3 / 4, 4 / 3))
        steps = [crops, v2.RandomHorizontalFlip()]
    elif kind == "v1":
        resized = v2.Resize(round(crop * 300 / 256))
        steps = [resized, v2.RandomCrop(crop), v2.RandomHorizontalFlip()]
    else:
        # ours: the usual centre crop, 224 of 256, at every size. It magnifies a 4:3 image's objects
        # 1.3 times, training crops (min_area 0.08) do so 1.7 times on average. Testing on the whole
        # image cost 10 points on CIFAR-10 in an early trial.
        steps = [v2.Resize(round(crop / 0.875)), v2.CenterCrop(crop)]
    if distort:  # ours: Inception's published ranges, but brightness is multiplied, not added to
        steps.append(v2.ColorJitter(brightness=32 / 255, contrast=0.5, saturation=0.5, hue=0.2))
    if grey or kind == "v1":
        steps.append(v2.Grayscale(3))
    return v2.Compose([*steps, v2.PILToTensor()])


# ---- Data sets -----------------------------------------------------------------------------------


class Shapes(Dataset):
    """The embedded data set: textured shapes on textured backgrounds, a function of the index.

    Each image holds two to four discs, squares and diamonds. Its class is the pattern that fills
    them: stripes (horizontal, vertical, either diagonal), checks or diamonds, coarse or fine. All
    else is drawn anew for every image or object: number, outline, size, place, phase, the two
    colours, and the background. So the class cannot be read from colour, size, place or mean
    brightness; it survives a mirror flip; and a larger `size` shows larger objects, same textures.

    item: (image uint8 [3, size, size], class int).
    """

    PERIODS = {"coarse": 7.0, "fine": 3.5}  # pixels
    PATTERNS = {  # one wave, or the product of two, along these directions (x, y)
        "horizontal": [(0, 1)], "vertical": [(1, 0)], "diagonal": [(0.71, 0.71)],
        "checks": [(1, 0), (0, 1)], "diamonds": [(0.71, 0.71), (0.71, -0.71)]}
    classes = [" ".join(words) for words in product(PERIODS, PATTERNS)]
    LENGTH = {"train": 4000, "test": 2000}
    # How many random numbers each choice takes, for an object and for an image; `spare` is what
    # is left of 16.
    OBJECT = {"size": 1, "x": 1, "y": 1, "outline": 1, "phase": 2, "mirror": 1, "one color": 3,
              "other color": 3, "spare": 3}
    IMAGE = {"count": 1, "order": 4, "angle": 3, "length": 3, "phase": 3, "spare": 2}

    def __init__(self, split: str, size: int = 32, seed: int = 0):
        self.split, self.size, self.seed = split, size, seed
        self.targets = [i % len(self.classes) for i in range(self.LENGTH[split])]

    def __len__(self) -> int:
        return len(self.targets)

    def _random(self, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Uniform numbers in 0..1 by name, n of each: [4, n, 1, 1] for four objects, [n, 1, 1] for
        the image."""
        seed = derive_seed("shapes", self.split, self.seed, index)
        numbers = torch.rand(5, 16, 1, 1, generator=torch.Generator().manual_seed(seed))
        objects = numbers[:4].split(list(self.OBJECT.values()), 1)
        image = numbers[4].split(list(self.IMAGE.values()))
        return dict(zip(self.OBJECT, objects)), dict(zip(self.IMAGE, image))

    def _masks(self, objects: dict[str, Tensor], image: dict[str, Tensor]) -> Tensor:
        """Where the objects are: bool [4, S, S], an absent one empty."""
        S = self.size
        outline = objects["outline"][:, 0]  # [4, 1, 1], and so are the next
        radius = S * (0.17 + 0.07 * objects["size"][:, 0])
        corner = torch.arange(4).view(4, 1, 1)  # one to a quadrant: only a diamond's tips leave it
        room = S / 2 - 2 * radius
        center_x = corner % 2 * S / 2 + radius + room * objects["x"][:, 0]
        center_y = corner // 2 * S / 2 + radius + room * objects["y"][:, 0]
        axis = torch.arange(S) + 0.5
        dx = (axis - center_x).abs()  # [4, 1, S]
        dy = (axis[:, None] - center_y).abs()  # [4, S, 1]
        disc = dx**2 + dy**2 <= radius**2
        square = torch.maximum(dx, dy) <= 0.89 * radius  # of the same area, and so is the diamond
        diamond = dx + dy <= 1.25 * radius
        masks = torch.where(outline < 1 / 3, disc, torch.where(outline < 2 / 3, square, diamond))
        count = 2 + (3 * image["count"]).floor()  # 2, 3 or 4 of the four
        return masks & (image["order"].argsort(0) < count)

    @cache  # made once a process
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        label = self.targets[index]
        objects, image = self._random(index)
        x = torch.arange(self.size, dtype=torch.float32)
        y = x[:, None]
        # the background, a slow wave of its own direction and length for each colour channel: it
        # has no colour of its own to tell images apart by
        angle, slow = 2 * math.pi * image["angle"], 0.2 + 0.4 * image["length"]  # [3, 1, 1] each
        phase = 2 * math.pi * image["phase"]
        wave = (slow * angle.cos() * x + slow * angle.sin() * y + phase).sin()
        pixels = 0.5 + 0.2 * wave  # [3, S, S]
        # the class's pattern over the whole image, for each object: [4, S, S] in -1..1
        period, name = self.classes[label].split()
        directions = torch.tensor(self.PATTERNS[name]) * (2 * math.pi / self.PERIODS[period])
        mirror = torch.where(objects["mirror"][:, 0] < 0.5, -1.0, 1.0)  # leaning left or right
        pattern = 1.0
        for (kx, ky), phase in zip(directions, objects["phase"].unbind(1)):
            pattern = pattern * (kx * mirror * x + ky * y + 2 * math.pi * phase).sin()
        # each object between two colours of its own: [4, 3, S, S]
        share = (0.5 + 0.5 * pattern)[:, None]
        paint = torch.lerp(objects["one color"], objects["other color"], share)
        for mask, painted in zip(self._masks(objects, image), paint):
            pixels = torch.where(mask, painted, pixels)
        return (255 * pixels).to(torch.uint8), label

    def boxes(self, index: int) -> Tensor:
        """The objects' boxes: x1 y1 x2 y2 in pixels, the ends exclusive, float32 [n, 4]."""
        masks = self._masks(*self._random(index))
        present = masks[masks.any(2).any(1)]
        return masks_to_boxes(present) + torch.tensor([0.0, 0.0, 1.0, 1.0])


def read_image(path: str) -> Image.Image:
    """An image file in RGB, as torchvision reads it; OSError, with the path, if it cannot."""
    try:
        return datasets.folder.default_loader(path)
    except Exception as error:  # image decoders have no common base class
        raise OSError(f"{path} cannot be read: {error!r}")


class Unlabelled(datasets.ImageFolder):
    """Every image below train/ and unlabelled/, or below a folder that has neither, whatever the
    folders in them are called: enough for Sec. 2.1, where no label is used."""

    def find_classes(self, directory: Path) -> tuple[list[str], dict[str, int]]:
        names = ("train", "unlabelled", "unlabeled")
        there = [name for name in names if (Path(directory) / name).is_dir()] or ["."]
        return there, dict.fromkeys(there, 0)


DOWNLOADS = Path("datasets")  # where torchvision keeps what it downloads


def load_dataset(data: str, split: str, size: int) -> Dataset:
    """The images of `data`. split: "pretrain" (no labels needed), "train" or "test", both of
    (image, class) and with `.classes`; size: of the images that are made, not read (pixels).

    data: "shapes", "cifar10", "stl10", "imagenette", or a folder with train/ and val/ (or test/),
    a folder of images for each class in them; "pretrain" takes all images of train/ and of
    unlabelled/, or those of a folder that has neither; of stl10 only those without labels. Anything
    else ends in a one-line message."""
    train = split != "test"
    if data == "shapes":
        return Shapes("train" if train else "test", size)
    if data == "cifar10":
        return download(datasets.CIFAR10, DOWNLOADS, train)
    if data == "stl10":
        stl = download(datasets.STL10, DOWNLOADS, "unlabeled" if split == "pretrain" else split)
        stl.targets = stl.labels.tolist()  # as the others call them
        return stl
    if data == "imagenette":
        download(datasets.Imagenette, DOWNLOADS)
        data = DOWNLOADS / "imagenette2"
    root = Path(data)
    if not root.is_dir():
        raise SystemExit(f"no folder {root}: pass --data DIR, or --tiny for the embedded data set")
    if split == "test" and (root / "val").is_dir():  # ImageNet's test/ has no labels
        split = "val"
    try:
        if split == "pretrain":
            return Unlabelled(root, loader=read_image)
        return datasets.ImageFolder(root / split, loader=read_image)
    except FileNotFoundError as error:  # torchvision names the folder
        raise SystemExit(f"--data {root} lacks images, or a folder for each class in train/ and in "
                         f"val/ (or test/): {error}")


def download(dataset: Callable[..., Dataset], *arguments) -> Dataset:
    """One of torchvision's: the first process of each node downloads it, then all read it."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        try:
            dataset(*arguments)
        except (RuntimeError, FileNotFoundError):  # not there yet
            dataset(*arguments, download=True)
    dist.barrier()
    return dataset(*arguments)


def names_of(dataset: Dataset) -> list[str]:
    """Every image's name in lists of labels: CLASS/NAME, or a number where there are no files."""
    if not isinstance(dataset, datasets.ImageFolder):
        return [f"{i:05d}" for i in range(len(dataset))]
    return [path.removeprefix(f"{dataset.root}{os.sep}") for path, _ in dataset.samples]


# ---- Labels --------------------------------------------------------------------------------------


def label_subset(targets: list[int], fraction: float, seed: int,
                 held_out: float = 0.0) -> tuple[list[int], list[int]]:
    """The images whose labels are used (Sec. 2.2: 1 % to 100 %), and held-out ones to select on
    (A.4: "a separate validation set"): two sorted lists of indices. differs: the share of each
    class, on ImageNet 7 to 13 images at 1 %; the abstract has "13 per class".

    The seed fixes an order of each class's images. The subset is its first `fraction` (rounded, at
    least one image), so that the 1 % lies inside the 2 %; held out is its last `held_out`, the same
    for every fraction. They never overlap: at 100 % the subset is all but the held-out images."""
    chosen, held, of_class = [], [], {}
    for i, y in enumerate(targets):
        of_class.setdefault(y, []).append(i)
    for label, indices in of_class.items():
        random.Random(derive_seed(seed, "subset", label)).shuffle(indices)
        end = len(indices) - round(held_out * len(indices))  # held_out is a half at most
        chosen += indices[:min(end, max(1, round(fraction * len(indices))))]
        held += indices[end:]
    return sorted(chosen), sorted(held)


def read_subset(path: str, dataset: Dataset) -> list[int]:
    """The indices of the images that a list names, one a line: CLASS/NAME, or NAME as in the
    published lists of ImageNet subsets (S4L, SimCLR). Exits with a one-line message on a name that
    no image of the data set has, or more than one."""
    names = names_of(dataset)
    short = [name.rpartition("/")[2] for name in names]
    index = {name: i for i, name in enumerate(names)}
    if len(set(short)) == len(short):
        index |= {name: i for i, name in enumerate(short)}
    wanted = [line for line in Path(path).read_text("utf-8").splitlines() if line]
    unknown = [name for name in wanted if name not in index]
    if unknown or not wanted:
        raise SystemExit(f"--subset {path}: {len(unknown)} of {len(wanted)} lines name no training "
                         f"image (CLASS/NAME; NAME where classes share none): {unknown[:1]}")
    return sorted({index[name] for name in wanted})


# ---- Batches -------------------------------------------------------------------------------------


def derive_seed(*keys: int | str) -> int:
    """An independent seed for each tuple of keys: every random choice of a run is a function of
    (seed, what it is for), so that continuing a run needs no saved random states."""
    return random.Random("/".join(map(str, keys))).getrandbits(63)


class Seeded(Dataset):
    """`dataset` seen through `transform`, each item augmented under its own seed: which worker
    makes it, or in what order, changes nothing. key: (index, seed).

    skip: in training, an image that cannot be read is named on stderr, and the next one takes its
    place; ten of them in a row are an error. Without skip one is."""

    def __init__(self, dataset: Dataset, transform: v2.Transform, skip: bool = False):
        self.dataset, self.transform, self.tries = dataset, transform, 10 if skip else 1

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        index, seed = key
        item = self._read(index)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torchvision's transforms draw from this one
            return self.transform(*item)  # (image, label); the boxes of a label follow the image

    def _read(self, index: int) -> tuple:
        for n in range(1, self.tries + 1):
            try:
                return self.dataset[index]
            except OSError as error:
                if n == self.tries:
                    raise
                print(f"skipped: {error}", file=sys.stderr, flush=True)
                index = (index + 1) % len(self.dataset)


def train_batches(length: int, batch: int, seed: int, start: int, stop: int) -> Iterator:
    """This rank's share of every global batch, for steps `start` to `stop` counted over the whole
    run: continuing is starting at another step. Every epoch is a new permutation, its last partial
    batch dropped. Yields lists of (index, seed)."""
    for step in range(start, stop):
        epoch, position = divmod(step, length // batch)
        if position == 0 or step == start:
            generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
            order = torch.randperm(length, generator=generator)
        global_batch = order[position * batch:(position + 1) * batch]
        local_batch = global_batch[dist.get_rank()::dist.get_world_size()].tolist()
        yield [(i, derive_seed(seed, "image", epoch, i)) for i in local_batch]


def test_batches(length: int, batch: int) -> Iterator:
    """Every image once over all ranks, whatever their number. Yields lists of (index, seed)."""
    mine = range(dist.get_rank(), length, dist.get_world_size())
    for start in range(0, len(mine), batch):
        yield [(i, 0) for i in mine[start:start + batch]]


def ignore_signals(worker: int) -> None:
    """Ctrl-C and SIGTERM often reach all processes of a job: workers ignore them, the main process
    saves and ends its workers."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


def end_workers() -> None:
    """Workers ignore SIGTERM (above): Python's own terminate and join would wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler would raise at their end
    for worker in multiprocessing.active_children():
        worker.kill()


def load_batches(dataset: Dataset, transform: v2.Transform, batches: Iterator,
                 workers: int | None = None, skip: bool = False,
                 collate: Callable | None = None) -> DataLoader:
    """Batches of (images uint8 [B, 3, S, S], labels int64 [B]), or as `collate` makes them.
    workers: None leaves one core of this rank's share for the training step; 0 loads here; skip:
    as in `Seeded`."""
    if workers is None:
        # macOS has no affinity
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        workers = max(0, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))
    images = Seeded(dataset, transform, skip)
    # ours: forked on Linux, where Python 3.14 made "forkserver" the default: other methods pickle
    # the list of all images for every worker
    fork = "fork" if sys.platform == "linux" else None
    return DataLoader(images, batch_sampler=batches, num_workers=workers, collate_fn=collate,
                      pin_memory=torch.cuda.is_available(), worker_init_fn=ignore_signals,
                      multiprocessing_context=fork if workers else None)


# ---- Processes -----------------------------------------------------------------------------------


def leave_group() -> None:
    """Close the process group: at a script's end or, without a GPU, at exit after an error."""
    if dist.is_initialized():
        dist.destroy_process_group()


def start_process(args: argparse.Namespace) -> torch.device:
    """Join torchrun's process group, or make a world of one; this rank's device. Decides on
    args.bf16 where it is None. A batch that does not divide ends in a one-line message."""
    atexit.register(end_workers)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # training batches have one shape
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        device, backend = torch.device("cpu"), "gloo"
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        if sys.platform == "linux":
            # Reuse freed activations instead of returning them to the kernel, which would hand
            # them back page by page, zeroed, in every step: several times slower.
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-4, 0)  # M_MMAP_MAX
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    # On one node gloo stays on the loopback. On several the user names their network interface in
    # this variable, and --out must be a folder that all of them share.
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    if not dist.is_initialized():
        store, rank, world = dist.HashStore(), 0, 1
        if "RANK" in os.environ:
            store, rank, world = next(dist.rendezvous("env://"))
            # torchrun's own store outlives a restart, and so do the addresses of dead processes in
            # it. (Nodes may count restarts differently: with --rdzv_backend=c10d a restart on
            # several needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.)
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                restarts = os.environ["TORCHELASTIC_RESTART_COUNT"]
                store = dist.PrefixStore(f"start {restarts}", store)
        gpu = device if device.type == "cuda" else None
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, device_id=gpu)
        if gpu is None:  # threads of gloo that are left running can abort a process at its end
            atexit.register(leave_group)
    if args.batch_size % dist.get_world_size():
        raise SystemExit(f"--batch-size {args.batch_size} is not a multiple of the "
                         f"{dist.get_world_size()} processes")
    if args.bf16 is None:
        args.bf16 = has_bf16
    return device


# ---- A run: its folder, log, checkpoint and signals ----------------------------------------------


class Diverged(SystemExit):
    """A loss or a gradient is not finite. Uncaught, it ends the run with its message."""


class Run:
    """What a run leaves on disk, below `--out`: log.jsonl and checkpoint.pt.

    The same command continues what is there, another one is refused with the difference. The log's
    lines travel in the checkpoint, and log.jsonl is written anew from it on a start: what was
    logged after the last checkpoint is done again, and nothing is there twice.
    """

    # Flags that a continued run may change: they say where it finds its files, and how it runs.
    MAY_DIFFER = {"data", "out", "encoder", "subset", "workers", "checkpointing", "compile",
                  "save_every"}

    def __init__(self, args: argparse.Namespace, names: list[str], **facts):
        """names: the images' names, without their folder; facts: what else a continued run must
        share, such as its encoder.

        A continued run finds here again the results that are `done`, and the `solution` that the
        next training starts from. Exits with a one-line message if the folder holds another run,
        is in use, or cannot be written."""
        self.folder, self.is_main = Path(args.out), dist.get_rank() == 0
        self.flags = {k: v for k, v in vars(args).items() if k not in self.MAY_DIFFER}
        facts["images"] = [len(names), names[0], names[-1]]
        self.identity, self.lines = facts | self.flags, []
        self.done, self.solution, self.key = {}, {}, None
        self.save_seconds, self.saved_at = 60 * args.save_every, time.monotonic()
        self.signal = 0
        problem = [self._open() if self.is_main else None]
        dist.broadcast_object_list(problem)
        if problem[0]:
            raise SystemExit(problem[0] if self.is_main else 1)
        saved = load_file(self.folder / "checkpoint.pt", "checkpoint")
        for key, now in self.identity.items():
            before = saved["identity"].get(key)
            if before != now:
                line = (f"{self.folder} holds a run with {key.replace('_', '-')} {before}, not "
                        f"{now}: use the same, or another --out")
                raise SystemExit(line if self.is_main else 1)
        self.done, self.solution = saved["done"], saved["solution"]
        self.unfinished, self.lines = saved["training"], saved["log"]
        if self.is_main:
            self.file.truncate(0)
            self.file.writelines(self.lines)
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._on_signal)
        here = Path(__file__).parent
        # ends in "-dirty" if a file was changed since
        commit = subprocess.getoutput(
            f"git -C '{here}' describe --always --abbrev=40 --exclude '*' --dirty 2>/dev/null")
        versions = dict(python=sys.version.split()[0], torch=torch.__version__,
                        torchvision=torchvision.__version__, commit=commit)
        self.log("start", **vars(args), **facts, **versions, world_size=dist.get_world_size(),
                 time=time.strftime("%Y-%m-%dT%H:%M:%S%z"))

    def _open(self) -> str | None:
        """Lock the folder and, if it is new, write a first checkpoint. Returns a message if that
        cannot be."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = open(self.folder / "log.jsonl", "a")
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return f"another run is writing to {self.folder}: pass another --out"
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK):  # Lustre, NFS may have no locks
                return f"cannot use --out {self.folder}: {error.strerror}"
        if not (self.folder / "checkpoint.pt").exists():
            # the log was opened at its end
            if self.file.tell() or (self.folder / "encoder.pt").exists():
                return (f"{self.folder} holds a run without its checkpoint, or what is not ours: "
                        f"pass another --out")
            self.save()

    def log(self, event: str, **fields) -> None:
        """Append a JSON line, on rank 0."""
        if self.is_main:
            self.lines.append(json.dumps({"event": event, **fields}) + "\n")
            self.file.write(self.lines[-1])
            self.file.flush()

    def save(self) -> None:
        """Replace the checkpoint; Diverged if what was tallied is not finite."""
        training = None
        if self.key:
            self._means()  # for its check alone
            parts = {name: part.state_dict() for name, part in self.parts.items()}
            training = dict(key=self.key, step=self.step, parts=parts, sums=self.sums,
                            count=self.count, best=self.best)
        self.saved_at = time.monotonic()
        if self.is_main:
            save_file(dict(kind="checkpoint", identity=self.identity, done=self.done,
                           solution=self.solution, log=self.lines, training=training),
                      self.folder / "checkpoint.pt")

    def finish(self, key: str, event: str, result: dict, solution: dict | None = None) -> None:
        """A training is done: its result, and the weights that the next one starts from, if any."""
        self.done[key] = result
        self.solution = {key: copy.deepcopy(solution)} if solution else {}
        self.log(event, **result)
        self.save()

    def resume(self, key: str, **parts) -> int:
        """Begin a training, or continue it from the checkpoint. Returns the steps already done.

        key: its name, also in the log; parts: all that training changes (model, optimizer), with
        `state_dict` and `load_state_dict`: saved with every checkpoint of this training."""
        self.key, self.parts, self.step = key, parts, 0
        self.sums, self.count, self.notes, self.best = {}, 0, {}, None
        saved, self.unfinished = self.unfinished, None
        if saved and saved["key"] == key:
            self.step, self.best = saved["step"], saved["best"]
            self.sums, self.count = saved["sums"], saved["count"]
            for name, part in parts.items():
                part.load_state_dict(saved["parts"][name])
        return self.step

    def tally(self, **values: Tensor) -> None:
        """Add this step's values, averaged over processes, to the means of the next log line."""
        mean = torch.stack([value.detach().double() for value in values.values()])
        dist.all_reduce(mean.div_(dist.get_world_size()))
        for name, value in zip(values, mean):
            self.sums[name] = value + self.sums.get(name, 0)
        self.count += 1

    def keep_if_best(self, module: nn.Module, score: float | None) -> None:
        """Early stopping (Sec. 2.2): keep a module's state if its score on held-out images, None if
        unknown, is this training's best so far."""
        if score is not None and (self.best is None or score > self.best["score"]):
            self.best = dict(score=score, state=copy.deepcopy(module.state_dict()))

    def load_best(self, module: nn.Module) -> float | None:
        """Load the best state that was kept and return its score; None if there is none."""
        if self.best is None:
            return None
        module.load_state_dict(self.best["state"])
        return self.best["score"]

    def note(self, **fields) -> None:
        """Fields of the next line of the log, as they are, not averaged."""
        self.notes |= fields

    def _means(self) -> dict[str, float]:
        """What the next line of the log says. Diverged if it is not finite: nothing is saved."""
        means = {name: value.item() / self.count for name, value in self.sums.items()}
        if not all(map(math.isfinite, means.values())):
            message = (f"not finite: {means}, {self.notes}: lower --lr, in another --out; the last "
                       f"checkpoint is kept")
            raise Diverged(message if self.is_main else 1)
        return means

    def steps(self, batches: Iterable, stop: int, batch_size: int, due: Container) -> Iterator:
        """(step, batch) for a training loop, whose body calls `tally`, from where `resume` has it.

        batch_size: of all processes; due: the numbers of steps after which a line of the log and a
        checkpoint are due. Saves every `--save-every` minutes too. After SIGTERM or SIGINT
        it saves at the end of the step and leaves with the conventional exit code."""
        bar = tqdm(batches, self.key, stop, initial=self.step, disable=not self.is_main,
                   mininterval=1, unit=" images", unit_scale=batch_size)
        clock, logged = time.monotonic(), self.step
        try:
            for step, batch in enumerate(bar, self.step):
                yield step, batch
                self.step = step + 1
                if step % 20 == 0:  # reading a value waits for a GPU
                    bar.set_postfix(self._means() | self.notes, refresh=False)
                caught, late = self._agree()
                if self.step in due:
                    means = {name: float(f"{mean:.7g}") for name, mean in self._means().items()}
                    seconds = time.monotonic() - clock
                    rate = (self.step - logged) * batch_size / seconds
                    self.log("train", fit=self.key, step=self.step, **means, **self.notes,
                             seconds=round(seconds, 3), images_per_second=round(rate, 1))
                    self.sums, self.count, self.notes = {}, 0, {}
                    clock, logged = time.monotonic(), self.step
                if self.step in due or caught or late:
                    self.save()
                if caught:
                    break
        finally:
            bar.close()
            self.key, self.parts = None, {}
        caught, _ = self._agree()  # or one that came during the last save
        if caught:
            self._leave(caught)  # in every process, as `_agree` says

    def _agree(self) -> tuple[int, int]:
        """What all processes agree on: the signal that one of them caught (0: none), and whether it
        is time for rank 0 to save."""
        late = self.is_main and time.monotonic() - self.saved_at >= self.save_seconds
        both = torch.tensor([self.signal, int(late)])
        dist.all_reduce(both, dist.ReduceOp.MAX)
        return tuple(both.tolist())

    def _on_signal(self, signum: int, frame) -> None:
        if not self.signal:
            self.signal, self.caught_at = signum, time.monotonic()
        # Outside a training this leaves at once: what was not saved is done again. During one,
        # `steps` sees the signal at the end of the step. If that never ends, a second signal
        # counts, but not within 5 seconds: torchrun repeats the first one at once.
        if not self.key or time.monotonic() - self.caught_at > 5:
            self._leave(signum)

    def _leave(self, signum: int) -> None:
        if self.is_main:
            print(f"stopped by {signal.Signals(signum).name}: the same command continues",
                  file=sys.stderr)
        end_workers()
        raise SystemExit(128 + signum)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """ours: linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def update(loss: Tensor, optimizer: torch.optim.Optimizer, parameters: Iterator,
           clip: float = math.inf) -> Tensor:
    """One optimisation step. Returns the gradient's norm before it is clipped to `clip`; DDP makes
    it the same on all processes."""
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
    return norm


def fingerprint(name: str) -> int | str:
    """What stands for an input in a run's identity: for a file (also in torchvision:MODEL:FILE) its
    content, so that it may be moved; any other name stands for itself."""
    path = name.rpartition(":")[2]
    return zlib.crc32(Path(path).read_bytes()) if os.path.isfile(path) else name


# ---- Command lines -------------------------------------------------------------------------------


def number(low: float, high: float, kind: type = float) -> Callable[[str], float]:
    """A flag's type: a number in a range."""
    def number(text: str) -> float:  # argparse shows its name: "invalid number value: 'x'"
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value
    return number


def existing(path: str) -> str:
    """A flag's type: a file that is there."""
    if not os.path.isfile(path):
        raise argparse.ArgumentTypeError(f"there is no file {path}")
    return path


SHARE, RATE, COUNT = number(0, 1), number(1e-12, 1e3), number(1, 1e9, int)


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Prints the docstring unwrapped, and each flag's default unless it is None or False."""

    def _get_help_string(self, action: argparse.Action) -> str:
        told = action.default is None or action.default is False or "(default" in action.help
        return action.help if told else super()._get_help_string(action)


DATA_HELP = ("folder with train/ and val/ (or test/), class folders in them, perhaps unlabelled/; "
             "for cpc.py any folder of images; or shapes (made), cifar10, stl10, imagenette "
             "(downloaded)")


def make_parser(doc: str, out: str) -> argparse.ArgumentParser:
    """A parser with whole flag names, one-line errors, and the flags that all scripts share."""
    parser = argparse.ArgumentParser(description=doc, usage=argparse.SUPPRESS, allow_abbrev=False,
                                     formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--out", default=out, help="the run's folder; the same command continues it")
    add("--seed", type=number(0, 2**61, int), default=0, help="seed of all random numbers")
    add("--workers", type=number(0, 1024, int), help="loading processes (default: cores left over)")
    add("--bf16", action=argparse.BooleanOptionalAction, help="autocast (default: by the hardware)")
    add("--save-every", type=number(0, 1e6), default=10.0, metavar="MINUTES", help="between "
        "checkpoints")
    return parser
