"""Which images a process sees, and how they become patches.

Processes (torchrun's or one), data sets (folders, torchvision's, the embedded `shapes`), batches
that do not depend on the number of workers, image augmentation on the CPU in the workers, and
patches with their own augmentation on the training device (Sec. 2.1, 4.1, A.3).

Shapes: B batch, G grid side, P patch side, S image side. Images travel as uint8.
"""

import atexit
import ctypes
import hashlib
import math
import multiprocessing
import os
import random
import signal
import sys
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Callable, Iterator
from xml.etree import ElementTree

import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import datasets, tv_tensors
from torchvision.models.segmentation import FCN_ResNet50_Weights
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

# ours: the paper gives no input normalisation; ImageNet's channel statistics, for every data set.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# ---- Processes ----------------------------------------------------------------------------------


def start_process() -> torch.device:
    """Join torchrun's process group, or make a world of one; this rank's device."""
    cuda, local = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):  # one node: no other needs to see gloo
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        if local >= torch.cuda.device_count():
            raise SystemExit(f"process {local + 1} of this node finds {torch.cuda.device_count()} GPUs: "
                             f"lower --nproc_per_node")
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # every batch has the same shape
    else:
        keep_freed_memory()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        try:
            store, rank, world = next(dist.rendezvous("env://")) if "RANK" in os.environ else (dist.HashStore(), 0, 1)
        except (ValueError, dist.DistError) as error:
            raise SystemExit(f"cannot join the run that RANK in the environment is of: {str(error).splitlines()[0]}; "
                             f"start with torchrun, or unset RANK")
        # after a restart torchrun's store still holds the dead processes' addresses: a prefix for each start
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return device


def keep_freed_memory() -> None:
    """Let glibc reuse freed activations instead of returning them to the kernel, which would hand
    them back page by page, zeroed, in every step: several times slower for large activations."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return  # not glibc
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class GatherBatch(torch.autograd.Function):
    """The rows of all processes, rank by rank: [B, ...] -> [B * world, ...]. A row's gradient is the sum
    of what every process asks of it. (torch has one, deprecated since 2.14.)"""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x)
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products are done by the hardware, not emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def derive_seed(*keys: int | str) -> int:
    """An independent seed for each tuple of keys: every random choice of a run is a function of
    (seed, what it is for), so that resuming needs no saved random states."""
    return random.Random("/".join(map(str, keys))).getrandbits(63)


# ---- Data sets ----------------------------------------------------------------------------------


class Shapes(Dataset):
    """The embedded data set: textured shapes on textured backgrounds, a function of the index.

    Each image holds two to four discs, squares and diamonds. Its class is the pattern that fills
    them: stripes (horizontal, vertical, either diagonal), checks or diamonds, coarse or fine. All
    else is drawn anew for every image or object: number, outline, size, place, phase, the two
    colours, and the background. So the class cannot be read from colour, size, place or mean
    brightness; it survives a mirror flip; and a larger `size` shows larger objects, same textures.

    item: (image uint8 [3, size, size], class int). `boxes(index)`: the objects' boxes.
    """

    PATTERNS = {  # one wave, or the product of two, along these directions (x, y)
        "horizontal": ((0, 1), None), "vertical": ((1, 0), None), "diagonal": ((0.71, 0.71), None),
        "checks": ((1, 0), (0, 1)), "diamonds": ((0.71, 0.71), (0.71, -0.71))}
    PERIODS = (7.0, 3.5)  # pixels, coarse and fine
    classes = [" ".join(words) for words in product(("coarse", "fine"), PATTERNS)]
    LENGTH = {"train": 4000, "test": 2000}

    def __init__(self, split: str, size: int = 32, seed: int = 0):
        self.split, self.size, self.seed = split, size, seed

    def __len__(self) -> int:
        return self.LENGTH[self.split]

    @property
    def targets(self) -> list[int]:
        return [i % len(self.classes) for i in range(len(self))]

    def _outlines(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """(uniform numbers [B, 5, 16]: a row for each object, one for the image; objects as masks
        [B, 4, S, S], an absent one empty)."""
        u = torch.stack([torch.rand(5, 16, generator=torch.Generator().manual_seed(
            derive_seed("shapes", self.split, self.seed, i))) for i in indices])
        S, own, image = self.size, u[:, :4], u[:, 4]
        radius = S * (0.17 + 0.07 * own[..., 0])  # [B, 4]
        corner = torch.arange(4)  # one object to a quadrant, so that none hides another
        room = S / 2 - 2 * radius
        cx = corner % 2 * S / 2 + radius + room * own[..., 1]
        cy = corner // 2 * S / 2 + radius + room * own[..., 2]
        axis = torch.arange(S) + 0.5
        dx = (axis - cx[..., None]).abs()[..., None, :]  # [B, 4, 1, S]
        dy = (axis - cy[..., None]).abs()[..., :, None]  # [B, 4, S, 1]
        r, outline = radius[..., None, None], (3 * own[..., 3, None, None]).floor()
        masks = torch.where(outline == 0, dx**2 + dy**2 <= r**2, torch.where(  # of equal areas
            outline == 1, torch.maximum(dx, dy) <= 0.89 * r, dx + dy <= 1.25 * r))
        present = image[:, 1:5].argsort(1) < 2 + (3 * image[:, :1]).floor()  # 2, 3 or 4 of the four
        return u, masks & present[..., None, None]

    def boxes(self, index: int) -> Tensor:
        """The objects' boxes: x1 y1 x2 y2 in pixels, the ends exclusive, float32 [n, 4]. Every
        object is of the image's class."""
        masks = self._outlines([index])[1][0]
        return masks_to_boxes(masks[masks.any(2).any(1)]) + torch.tensor([0.0, 0.0, 1.0, 1.0])

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        """Many at once (DataLoader's protocol): ten times faster than one by one."""
        u, masks = self._outlines(indices)
        labels = [i % len(self.classes) for i in indices]
        own, image, axis = u[:, :4], u[:, 4], torch.arange(self.size, dtype=torch.float32)
        x, y = axis.view(1, -1), axis.view(-1, 1)
        mirror = torch.where(own[..., 6] < 0.5, -1.0, 1.0)  # [B, 4]: a diagonal leans either way

        kinds = [list(self.PATTERNS.values())[label % len(self.PATTERNS)] for label in labels]
        speed = torch.tensor([2 * math.pi / self.PERIODS[label // len(self.PATTERNS)] for label in labels])
        wave = 1.0
        for which in (0, 1):
            d = torch.tensor([kind[which] or (0, 0) for kind in kinds]) * speed[:, None]  # [B, 2]
            single = torch.tensor([kind[which] is None for kind in kinds]).view(-1, 1, 1, 1)
            kx, ky = (d[:, :1] * mirror)[..., None, None], d[:, 1].view(-1, 1, 1, 1)
            sine = (kx * x + ky * y + 2 * math.pi * own[..., 4 + which, None, None]).sin()
            wave = wave * torch.where(single, 1.0, sine)  # [B, 4, S, S]

        # background: a slow wave of its own direction and length for each colour channel,
        # so that it has no colour of its own to tell images apart by
        angle, slow = 2 * math.pi * image[:, 5:8], 0.2 + 0.4 * image[:, 8:11]  # [B, 3]
        kx, ky = ((slow * f(angle))[..., None, None] for f in (torch.cos, torch.sin))
        phase = (2 * math.pi * image[:, 11:14])[..., None, None]
        pixels = 0.5 + 0.2 * (kx * x + ky * y + phase).sin()  # [B, 3, S, S]
        colors = lambda row, at: row[:, at:at + 3, None, None]  # [B, 3, 1, 1]
        for k in range(4):  # each object between two colours of its own
            paint = torch.lerp(colors(own[:, k], 7), colors(own[:, k], 10), 0.5 + 0.5 * wave[:, k, None])
            pixels = torch.where(masks[:, k, None], paint, pixels)
        return list(zip((255 * pixels).to(torch.uint8), labels))

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([range(len(self))[index]])[0]


class Unreadable(Exception):
    """An image file that cannot be decoded, or too many of them: one line."""


def read_image(path: str, upright: bool = False) -> Image.Image:
    """An image file in RGB, whatever its mode; of 16 bits the upper 8, of an animation the first picture;
    turned by its EXIF orientation only if `upright` (ours: torchvision does not, nor do ImageNet's figures)."""
    try:
        with Image.open(path) as image:
            if upright:
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits: Pillow would clip them to white
                image = image.convert("I").point(lambda value: value / 256).convert("L")
            return image.convert("RGB")
    except Exception as error:  # decoders have no common base class; a decompression bomb is one of these
        raise Unreadable(f"{path} cannot be read: {' '.join(str(error).split()) or type(error).__name__}")


def walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Every folder and the files in it, links followed. Exits with one line at a folder that is reached in two
    ways: its images would count twice, and a circle has no end."""
    def refuse(error: OSError):
        raise SystemExit(f"cannot read {error.filename}: {error.strerror}")

    seen = set()
    for folder, _, names in os.walk(root, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            raise SystemExit(f"symbolic links under {root} lead to a folder twice, or in a circle: remove {folder}")
        seen.add(real)
        yield folder, names


class ImageFiles(Dataset):
    """Every image file below some folders of `root`, whatever the folders in them are called: enough for
    Sec. 2.1, where no label is used. item: (PIL image, 0)."""

    def __init__(self, root: Path, folders: list[Path]):
        self.root = root
        self.files = sorted(
            os.path.join(folder, name)
            for top in folders for folder, names in walk(top) for name in names
            if name.lower().endswith(datasets.folder.IMG_EXTENSIONS))
        if not self.files:
            raise SystemExit(f"no image files under {root}: pass --data DIR")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return read_image(self.files[index]), 0


DOWNLOADS = Path("datasets")  # where torchvision keeps what it downloads


@contextmanager
def one_downloads(data: str):
    """The first process of a node goes first, the others find what it has downloaded."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        dist.barrier()
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"cannot download {data} to {DOWNLOADS}/: {str(error).splitlines()[0]}")
    if first:
        dist.barrier()


def from_first(make: Callable):
    """What `make` returns or exits with on the first process, on all: of a shared file system, each of many
    ranks would ask the same (ours, measured: a copy of ImageNet's 1.28 million paths takes a second)."""
    try:
        box = [make() if dist.get_rank() == 0 else None]
    except SystemExit as error:
        box = [error]
    dist.broadcast_object_list(box)
    if isinstance(box[0], SystemExit):
        raise box[0] if dist.get_rank() == 0 else SystemExit(1)
    return box[0]


def fingerprint(*sets: Dataset) -> str:
    """What is the same when a run goes on with the same images, wherever they lie: their kind, number and
    names, 16 hexadecimal digits. Their contents are not read."""
    digest = hashlib.sha256()
    for images in sets:
        paths = getattr(images, "files", None) or [path for path, _ in getattr(images, "samples", ())]
        names = [path[len(str(images.root)):] for path in paths] or getattr(images, "names", [])
        digest.update(os.fsencode("\0".join([type(images).__name__, str(len(images)), *names, ""])))
    return digest.hexdigest()[:16]


def load_dataset(data: str, split: str, size: int) -> Dataset:
    """The images of `data`. split: "pretrain" (no labels needed), "train" or "test", both of
    (image, class) and with `.classes`; size: of the images that are made, not read (pixels).

    Exits with one line if there is nothing to read."""
    train = split != "test"
    if data == "shapes":
        return Shapes("train" if train else "test", size)
    if data in ("cifar10", "stl10", "imagenette"):
        with one_downloads(data):
            if data == "cifar10":
                return datasets.CIFAR10(DOWNLOADS, train=train, download=True)
            if data == "stl10":
                return datasets.STL10(DOWNLOADS, {"pretrain": "unlabeled"}.get(split, split), download=True)
            datasets.Imagenette(DOWNLOADS, download=True)
        data = DOWNLOADS / "imagenette2"
    return from_first(lambda: list_folder(Path(data), split))


def list_folder(root: Path, split: str) -> Dataset:
    """`load_dataset` of the user's own images."""
    if not root.is_dir():
        raise SystemExit(f"no folder {root}: pass --data DIR, or --tiny for the embedded data set")
    if split == "pretrain":
        folders = [root / name for name in ("train", "unlabelled") if (root / name).is_dir()]
        return ImageFiles(root, folders or [root])
    names = ("train",) if split == "train" else ("val", "test")
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    if folder is None:
        raise SystemExit(f"no {'/ or '.join(names)}/ under {root}: pass --data DIR with class folders in it")
    for _ in walk(folder):  # torchvision's own would not end in a circle
        pass
    try:
        return datasets.ImageFolder(folder, loader=read_image)
    except FileNotFoundError as error:  # torchvision names the classes
        raise SystemExit(f"labels are needed here, a folder of images for each class under {folder}: "
                         f"{str(error).split('. Supported')[0]}")


# ---- Detection ----------------------------------------------------------------------------------


class Objects(Dataset):
    """Images with boxes. item: (PIL image or uint8 tensor, its `truth`); names: the images'.

    VOC counts pixels from 1 and its boxes hold their last ones: (x1, y1, x2, y2) of its files is
    (x1 - 1, y1 - 1, x2, y2) here, so that x2 - x1 is a width."""

    def __init__(self, source: Shapes | datasets.VOCDetection, classes: list[str], names: list[str]):
        self.source, self.classes, self.names = source, classes, names
        if not isinstance(source, Shapes):  # all at once: a bad file is found before any work
            self.truths = [self._parse(path) for path in source.annotations]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Image.Image | Tensor, dict]:
        shapes, truth = isinstance(self.source, Shapes), self.truth(index)
        image = self.source[index][0] if shapes else read_image(self.source.images[index])
        boxes = tv_tensors.BoundingBoxes(truth["boxes"], format="XYXY", canvas_size=v2.functional.get_size(image))
        return image, truth | {"boxes": boxes}

    def truth(self, index: int) -> dict[str, Tensor]:
        """boxes: float32 [n, 4], x1 y1 x2 y2 in pixels; labels: int64 [n], from 1; difficult: bool [n]."""
        if isinstance(self.source, Shapes):
            boxes = self.source.boxes(index)
            labels, difficult = [1 + index % len(self.classes)] * len(boxes), [False] * len(boxes)
        else:
            boxes, labels, difficult = self.truths[index]
            boxes = torch.tensor(boxes).view(-1, 4)
        return {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64),
                "difficult": torch.tensor(difficult, dtype=torch.bool)}

    def _parse(self, path: str) -> tuple[list, list, list]:
        """boxes, labels, difficult: numbers, since a worker that is not forked is sent each tensor as a file."""
        try:
            objects = ElementTree.parse(path).getroot().findall("object")
            corners = [[float(o.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax")] for o in objects]
            labels = [1 + self.classes.index(o.findtext("name")) for o in objects]
            difficult = [o.findtext("difficult") == "1" for o in objects]
        except (OSError, SyntaxError, TypeError, ValueError) as error:
            raise SystemExit(f"{path} is not an annotation of VOC 2007: {type(error).__name__} {error}")
        return [(x1 - 1, y1 - 1, x2, y2) for x1, y1, x2, y2 in corners], labels, difficult


def load_objects(data: str, split: str, size: int) -> Objects:
    """Sec. 4.3. data: "shapes", of `size` pixels, "voc2007", downloaded, or a folder that holds
    VOCdevkit/VOC2007; split: "train" (VOC's trainval) or "test". Exits with one line if anything
    that VOC's list names is missing or damaged."""
    if data == "shapes":
        shapes = Shapes(split, size)
        # ours: 200 test images, 600 objects, tell a few points of mAP apart
        return Objects(shapes, shapes.classes, [f"{i:05d}" for i in range(len(shapes) if split == "train" else 200)])
    which = "trainval" if split == "train" else "test"
    if data == "voc2007":
        with one_downloads(data):
            datasets.VOCDetection(DOWNLOADS, "2007", which, download=True)
        data = DOWNLOADS
    return from_first(lambda: read_voc(Path(data), which))


def read_voc(root: Path, which: str) -> Objects:
    """VOC 2007's list `which` and all its annotations."""
    if not (path := root / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / f"{which}.txt").is_file():
        raise SystemExit(f"no {path}: pass --data DIR with VOCdevkit/VOC2007 in it, or --data shapes")
    voc = datasets.VOCDetection(root, "2007", which)
    missing = [path for path in (*voc.images, *voc.annotations) if not os.path.isfile(path)]
    if missing:
        raise SystemExit(f"{len(missing)} files of VOC 2007's {which} are missing, the first {missing[0]}")
    if not len(voc):
        raise SystemExit(f"{path} lists no image")
    classes = FCN_ResNet50_Weights.DEFAULT.meta["categories"][1:]  # VOC's twenty, without the background
    return Objects(voc, classes, [Path(path).stem for path in voc.images])


def labels_of(item: tuple) -> tuple[Tensor, Tensor]:
    """What SanitizeBoundingBoxes removes together with a box."""
    return item[1]["labels"], item[1]["difficult"]


def objects_transform(train: bool) -> v2.Compose:
    """(image, truth) -> (uint8 tensor, truth): mirrored half the time. Scale and colours (Sec. 2.2)
    are drawn on the device. ours: boxes of less than a pixel inside the image are left out."""
    steps = [v2.RandomHorizontalFlip(), v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(labels_getter=labels_of)]
    return v2.Compose([*(steps if train else []), v2.PILToTensor()])


# ---- Labels -------------------------------------------------------------------------------------


def targets(dataset: Dataset) -> list[int]:
    """Every image's class, without reading an image."""
    return [int(y) for y in (dataset.targets if hasattr(dataset, "targets") else dataset.labels)]


def image_names(dataset: Dataset) -> list[str]:
    """What a list of images calls them: file names, as in the published lists of ImageNet subsets
    (S4L, SimCLR); CLASS/NAME where classes share names; numbers where there are no files."""
    if not isinstance(dataset, datasets.ImageFolder):
        return [f"{i:05d}" for i in range(len(dataset))]
    parts = [path.split(os.sep)[-2:] for path, _ in dataset.samples]
    names = [name for _, name in parts]
    return names if len(set(names)) == len(names) else ["/".join(part) for part in parts]


def label_subset(targets: list[int], fraction: float, seed: int, held_out: float = 0.0) -> tuple[list[int], list[int]]:
    """The images whose labels are used (Sec. 2.2: 1 % to 100 %), and held-out ones to select on
    (A.4: "a separate validation set"): two sorted lists of indices.

    Each class's images in an order fixed by the seed: the subset is its first `fraction`, so that
    the 1 % is inside the 2 %, rounded, at least one; held out is its last `held_out`, the same for
    every fraction. They never overlap: at 100 % the subset is all but the held-out images."""
    chosen, held, of_class = [], [], {}
    for i, y in enumerate(targets):
        of_class.setdefault(y, []).append(i)
    for label, indices in of_class.items():
        random.Random(derive_seed(seed, "subset", label)).shuffle(indices)
        last = len(indices) - min(round(held_out * len(indices)), len(indices) - 1)
        chosen += indices[:min(last, max(1, round(fraction * len(indices))))]
        held += indices[last:]
    return sorted(chosen), sorted(held)


def read_subset(path: str, dataset: Dataset) -> list[int]:
    """The indices of the images that a list names, one a line: NAME or CLASS/NAME. Only images of
    the data set can be named. Exits with one line on a missing file or an unknown name."""
    try:
        names = os.fsdecode(Path(path).read_bytes()).split("\n")
    except OSError as error:
        raise SystemExit(f"cannot read --subset {path}: {error.strerror}")
    index = {name: i for i, name in enumerate(image_names(dataset))}
    if isinstance(dataset, datasets.ImageFolder):
        index |= {"/".join(path.split(os.sep)[-2:]): i for i, (path, _) in enumerate(dataset.samples)}
    names = [name.strip() for name in names if name.strip()]
    unknown = [name for name in names if name not in index]
    if unknown or not names:
        raise SystemExit(f"--subset {path}: {len(unknown)} of {len(names)} lines name no training image (NAME, "
                         f"CLASS/NAME where classes share names)"
                         + "".join(f", the first {name!r}" for name in unknown[:1]))
    return sorted({index[name] for name in names})


# ---- Image augmentation -------------------------------------------------------------------------


def image_transform(kind: str, crop: int, min_area: float = 0.08, distort: bool = False,
                    grey: bool = False) -> v2.Compose:
    """PIL image or uint8 tensor -> uint8 tensor [3, crop, crop].

    kind: "inception" (random area of min_area..1 of the image, aspect 3/4..4/3, mirrored half the
    time: Szegedy et al. 2014 in its common reading; A.3), "v1" (CPC v1: a random crop of an image
    resized in the proportion 300:256, mirrored), or "test" (Sec. 2.2: none, a single crop).
    distort: Inception's random brightness, contrast, saturation and hue; grey: as CPC v1 sees.
    """
    if kind == "inception":
        steps = [v2.RandomResizedCrop(crop, scale=(min_area, 1.0), ratio=(3 / 4, 4 / 3), antialias=True),
                 v2.RandomHorizontalFlip()]
    elif kind == "v1":
        steps = [v2.Resize(round(crop * 300 / 256), antialias=True), v2.RandomCrop(crop),
                 v2.RandomHorizontalFlip()]
    else:
        # ours: ImageNet's usual 224 of 256, for every size: objects as large as the inception crop
        # shows them on average. The whole image instead cost 10 points of top-1 on CIFAR-10.
        steps = [v2.Resize(round(crop / 0.875), antialias=True), v2.CenterCrop(crop)]
    if distort:  # ours: the ranges of Inception's published preprocessing
        steps.append(v2.ColorJitter(brightness=32 / 255, contrast=0.5, saturation=0.5, hue=0.2))
    if grey:
        steps.append(v2.Grayscale(3))
    return v2.Compose([*steps, v2.PILToTensor()])


# ---- Batches ------------------------------------------------------------------------------------


class Seeded(Dataset):
    """`dataset` behind `transform`, each item augmented under its own seed: which worker makes it,
    or in what order, changes nothing. key: (index, seed).

    skip: the share of images that may be unreadable, each replaced by the next and named on stderr."""

    def __init__(self, dataset: Dataset, transform: v2.Transform, skip: float = 0.0):
        self.dataset, self.transform, self.skip = dataset, transform, skip
        self.unreadable = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()  # counted by all workers

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[tuple[Tensor, int]]:
        indices = [index for index, _ in keys]
        many = getattr(self.dataset, "__getitems__", lambda indices: [self.dataset[i] for i in indices])
        try:
            items = many(indices)
        except Unreadable:
            items = [self._readable(index) for index in indices]
        with torch.random.fork_rng(devices=[]):
            return [self._augment(item, seed) for item, (_, seed) in zip(items, keys)]

    def _readable(self, index: int) -> tuple:
        """The item, or the first after it that can be read."""
        while True:
            try:
                return self.dataset[index]
            except Unreadable as error:
                new = not self.unreadable[index]
                self.unreadable[index] = True
                count, images = int(self.unreadable.sum()), len(self.dataset)
                if count > self.skip * images:
                    raise Unreadable(f"{error} ({count} of {images} images, more than 1 %)") if self.skip else error
                if new:
                    print(f"skipped: {error} ({count} of {images} images)", file=sys.stderr, flush=True)
                index = (index + 1) % images

    def _augment(self, item: tuple, seed: int) -> tuple[Tensor, int]:
        torch.default_generator.manual_seed(seed)  # torchvision's transforms draw from this one
        return self.transform(*item)  # (image, label); the boxes of a label follow the image


class TrainBatches(Sampler):
    """This rank's share of every global batch, for steps `start` to `stop` counted over the whole
    run: resuming is starting at another step. Every epoch is a new permutation, its last partial
    batch dropped. Yields lists of (index, seed)."""

    def __init__(self, length: int, batch: int, seed: int, start: int, stop: int):
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.length, self.batch, self.seed, self.start, self.stop = length, batch, seed, start, stop

    def __iter__(self):
        shuffled = None
        for step in range(self.start, self.stop):
            epoch, position = divmod(step, self.length // self.batch)
            if epoch != shuffled:
                generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
                order, shuffled = torch.randperm(self.length, generator=generator), epoch
            batch = order[position * self.batch:(position + 1) * self.batch][self.rank::self.world]
            yield [(i, derive_seed(self.seed, "image", epoch, i)) for i in batch.tolist()]


class TestBatches(Sampler):
    """Every image once over all ranks, whatever their number. Yields lists of (index, seed)."""

    def __init__(self, length: int, batch: int):
        self.mine, self.batch = range(dist.get_rank(), length, dist.get_world_size()), batch

    def __iter__(self):
        for start in range(0, len(self.mine), self.batch):
            yield [(i, 0) for i in self.mine[start:start + self.batch]]


def ignore_signals(worker: int) -> None:
    """A signal to all processes of a job is for the main ones, which save and end their workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers() -> None:
    """Workers ignore SIGTERM (above): Python's own terminate and join would wait for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # their end is no failure
    for worker in multiprocessing.active_children():
        worker.kill()


def load_batches(dataset: Dataset, transform: v2.Transform, batches: Sampler, device: torch.device,
                 workers: int | None = None, collate: Callable | None = None) -> Iterator:
    """Batches of (images uint8 [B, 3, S, S], labels int64 [B]), or as `collate` makes them. workers:
    None leaves one core of this rank's share for the training step itself; 0 loads in the process.

    Exits with one line on an image that cannot be read, in training when more than 1 % cannot."""
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1)
    seeded = Seeded(dataset, transform, skip=0.01 if isinstance(batches, TrainBatches) else 0.0)
    # ours: forked on Linux, since Python 3.14 no default: they share the list of images, ImageNet's among them
    several = dict(prefetch_factor=4, multiprocessing_context="fork" if sys.platform == "linux" else None)
    try:
        yield from DataLoader(seeded, batch_sampler=batches, num_workers=max(0, workers), collate_fn=collate,
                              pin_memory=device.type == "cuda", worker_init_fn=ignore_signals,
                              **(several if workers > 0 else {}))
    except Unreadable as error:  # a worker's has its traceback in front
        raise SystemExit(str(error).strip().splitlines()[-1].removeprefix("data.Unreadable: "))


# ---- Patches ------------------------------------------------------------------------------------


def grid_side(crop: int, patch: int, stride: int) -> int:
    """G, the number of patches along a side. ValueError, with the numbers, if they do not tile."""
    if not 0 < stride or not 0 < patch <= crop or (crop - patch) % stride:
        raise ValueError(f"crop {crop}, patch {patch}, stride {stride}: patches do not tile the crop "
                         f"(crop - patch must be a multiple of stride)")
    return (crop - patch) // stride + 1


def extract_patches(images: Tensor, patch: int, stride: int) -> Tensor:
    """Cut overlapping patches (Sec. 2.1; A.3: 80x80 at stride 32 out of 240x240 -> 6x6): a view, in
    which overlapping patches share their pixels. [B, 3, S, S] -> [B, G, G, 3, P, P], of the same type."""
    grid_side(images.shape[-1], patch, stride)
    view = images.unfold(2, patch, stride).unfold(3, patch, stride)  # [B, 3, G, G, P, P]
    return view.permute(0, 2, 3, 1, 4, 5)


def normalise(images: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] -> float32, zero mean and unit variance by MEAN and STD."""
    mean, std = (images.new_tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (MEAN, STD))
    return images.float().mul_(1 / (255 * std)).sub_(mean / std)


def draw(generator: torch.Generator, *size: int) -> Tensor:
    """Uniform numbers, a row for each of this process's images: rows of those for the whole batch, which
    `TrainBatches` deals out in turn, so that an image's do not depend on the number of processes."""
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = torch.rand(size[0] * world, *size[1:], generator=generator, device=generator.device)
    return rows[rank::world]


def jittered(patch: int, generator: torch.Generator, *size: int) -> Tensor:
    """Which row (or column) of a patch each of its rows is taken from: [*size] -> int64 [*size, P].

    paper: Sec. 4.1, "spatially jitters individual patches"; v1: a random 60x60 subcrop of a 64x64 patch,
    padded back. ours: the same proportion for other patches (80 -> 75, 8 -> 7), and the border repeated:
    a border of zeros, which patches at test time do not have, cost a linear probe on CIFAR-10 25 points."""
    side = max(1, min(patch - 1, patch * 60 // 64))
    shift = ((patch - side + 1) * draw(generator, *size)).long()
    inside = torch.arange(patch, device=shift.device) - (patch - side) // 2
    return shift[..., None] + inside.clamp(0, side - 1)


def drop_colors(x: Tensor, dropped: Tensor, keep: Tensor, noise: Tensor) -> Tensor:
    """Drop two of the three colours of some patches (or of whole images), in place.

    x: normalised, float32 [..., 3, P, P]; dropped: bool [...], whose; keep: int64 [...], the channel
    that stays, in its place; noise: [3, P, P], of unit deviation.

    paper: Sec. 4.1, "randomly drops two of the three color channels in each patch". Doersch et al.
    2015: replaced by Gaussian noise of 1/100 of the remaining channel's deviation. The noise is
    around zero, the mean colour after normalisation."""
    power = torch.linalg.vector_norm(x, dim=(-2, -1)).square() / noise[0].numel()  # [..., 3]
    deviation = (power - x.mean((-2, -1)).square()).clamp(min=0).sqrt()
    keep = keep[..., None]
    replaced = dropped[..., None] & (torch.arange(3, device=x.device) != keep)  # [..., 3]
    level = 0.01 * deviation.gather(-1, keep) * replaced
    return x.mul_(~replaced[..., None, None]).addcmul_(noise, level[..., None, None])


def augment_patches(images: Tensor, patch: int, stride: int, generator: torch.Generator,
                    color_drop: float = 0.0, jitter: bool = False, flip: float = 0.0) -> Tensor:
    """Patch-based augmentation (Sec. 4.1), every patch on its own, as the image is cut.

    images: normalised, float32 [B, 3, S, S], this process's share of a batch; generator: on the same
    device; -> patches [B, G, G, 3, P, P]. color_drop, flip: probability for a patch; jitter: whether to shift.
    """
    B, _, S, _ = images.shape
    G = grid_side(S, patch, stride)
    if not jitter and not flip:
        patches = extract_patches(images, patch, stride).clone(memory_format=torch.contiguous_format)
    else:
        rows = cols = torch.arange(patch, device=images.device).expand(B, G, G, patch)  # within the patch
        if jitter:
            rows, cols = (jittered(patch, generator, B, G, G) for _ in range(2))
        if flip:  # paper: "randomly flip patches horizontally"
            flipped = draw(generator, B, G, G) < flip
            cols = torch.where(flipped[..., None], cols.flip(-1), cols)
        corner = stride * torch.arange(G, device=images.device)
        rows, cols = rows + corner[:, None, None], cols + corner[:, None]  # within the image
        pixels = S * rows[..., :, None] + cols[..., None, :]  # [B, G, G, P, P]
        taken = images.flatten(2).gather(2, pixels.flatten(1)[:, None].expand(-1, 3, -1))
        patches = taken.view(B, 3, *pixels.shape[1:]).permute(0, 2, 3, 1, 4, 5)  # [B, G, G, 3, P, P]
    if color_drop:
        dropped = draw(generator, B, G, G) < color_drop
        keep = (3 * draw(generator, B, G, G)).long()
        # ours: one sheet of noise serves the whole batch: it tells no patch from another, and costs nothing
        noise = torch.randn(patches.shape[3:], generator=generator, device=images.device)
        patches = drop_colors(patches, dropped, keep, noise)
    return patches


def to_patches(images: Tensor, device: torch.device, patch: int, stride: int, seed: int | None = None,
               **augmentation) -> Tensor:
    """From the loader to the encoder: uint8 images [B, 3, S, S] -> float32 patches
    [B, G, G, 3, P, P] on the device, with `augment_patches`' augmentation, a function of the seed
    alone, or without (seed None)."""
    # normalised before it is cut: A.3's patches hold each pixel of the image four times
    images = normalise(images.to(device, non_blocking=True).contiguous())
    if seed is None:
        return extract_patches(images, patch, stride).contiguous()
    generator = torch.Generator(device).manual_seed(seed)
    return augment_patches(images, patch, stride, generator, **augmentation)
