"""Transfer to another task: Faster R-CNN on PASCAL VOC 2007 (Sec. 4.3, Table 3).

    python detect.py --data DIR                                   # DIR holds VOCdevkit/VOC2007
    python detect.py --encoder runs/cpc/encoder.pt random --out runs/detect-both
    python detect.py --tiny                                       # the embedded data set, a CPU
    torchrun --nproc_per_node=8 detect.py --data DIR --out runs/detect-8
    python detect.py --detect photo.jpg --out runs/detect         # draw what a run has learned

The encoder is conv1..conv4 of a ResNet. Sec. 4.3 "replaced the neural network classifier ... with a
Faster-RCNN": here torchvision's, with the encoder as its trunk, fully convolutional on the whole
image, not on patches (Fig. 2 allows both), and a conv5 with random weights on the regions (ours).
First the trunk is fixed, then everything is fine-tuned from that solution, with early stopping
(Sec. 2.2 has it for fine-tuning; ours: in both stages, on held-out training images).

Results: assets/results.md; at the paper's scale not yet measured.

Shapes: R regions, D latent channels, H W an image's sides.
"""

import copy
import math
from argparse import Namespace
from operator import itemgetter
from pathlib import Path
from xml.etree import ElementTree

import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, Subset
from torchvision import datasets, tv_tensors
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign, box_iou
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, make_grid, save_image

import data
from data import COUNT, RATE, SHARE, learning_rate, number
from resnet import (ENCODER_HELP, Encoder, LayerNorm, Source, TorchvisionResNet, find_encoders,
                    load_file, residual_stack, save_file)

# ---- The detector --------------------------------------------------------------------------------


class Trunk(nn.Module):
    """f_theta on whole images, fully convolutional: [N, 3, H, W] -> [N, D, H/stride, W/stride].

    Its batch norm keeps its running statistics. Layer norm was trained on the statistics of one
    patch; a whole image has no patches, so here each position is normalised over its channels.
    ours: with the statistics of the whole image mAP was 12 points lower in a trial on shapes, and
    the padding that a batch adds would change latents."""

    def __init__(self, encoder: nn.Module, bf16: bool):
        super().__init__()
        self.encoder, self.out_channels, self.bf16 = encoder, encoder.out_channels, bf16
        for module in encoder.modules():
            if isinstance(module, LayerNorm):
                module.per_position = True

    def train(self, mode: bool = True):
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            return self.encoder.features(images).float()


class Conv5(nn.Module):
    """A ResNet's last stack (He et al. 2016b), on each region: [R, D, h, w] -> [R, C]."""

    def __init__(self, in_channels: int, channels: int, bf16: bool):
        super().__init__()
        # ours: layer norm over a region's (C, h, w), as in pre-training over a patch's: the few
        # regions of a batch resemble each other too much for batch norm
        self.blocks = residual_stack(3, in_channels, channels, channels // 4, 2, "layer")
        self.norm, self.bf16 = LayerNorm(channels), bf16

    def forward(self, regions: Tensor) -> Tensor:
        with torch.autocast(regions.device.type, torch.bfloat16, enabled=self.bf16):
            return F.relu(self.norm(self.blocks(regions))).mean((2, 3), dtype=torch.float32)


def build_detector(encoder: nn.Module, classes: int, side: int, tiny: bool = False,
                   proposals: int = 300, regions: int = 128, bf16: bool = False) -> FasterRCNN:
    """Faster R-CNN (Ren et al. 2015) with the encoder as its trunk, images already normalised, with
    the scale augmentation of Sec. 2.2.

    classes: without the background; side: shorter side of test images, pixels; proposals: from the
    region proposal network at test time; regions: trained on, of an image."""
    D = encoder.out_channels
    # ours: torchvision's sizes where --side is 480, at others in proportion
    anchor_sides = tuple(round(pixels * side / 480) for pixels in (32, 64, 128, 256, 512))
    anchors = AnchorGenerator((anchor_sides,), ((0.5, 1.0, 2.0),))
    width = min(D, 512)  # Ren et al. 2015: 512; torchvision's keeps D
    rpn_head = RPNHead(width, anchors.num_anchors_per_location()[0])
    rpn_head.conv = nn.Sequential(nn.Conv2d(D, width, 3, padding=1), nn.ReLU())
    nn.init.normal_(rpn_head.conv[0].weight, std=0.01)  # as the others in RPNHead
    nn.init.zeros_(rpn_head.conv[0].bias)
    # a ResNet's conv5, on regions resized to 14x14
    channels, region_side = (D, 6) if tiny else (2048, 14)
    # paper: Sec. 2.2, "scale-augmentation (Doersch et al., 2015)", who draw 150 to 450 thousand
    # pixels: of a 4:3 image with a short side of 480, 154 to 461. ours: in ten steps; torchvision's
    # detector draws one of these short sides in training and takes the last at test time.
    areas = (0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.2, 1.3, 1.4, 1.5, 1.0)
    sides = [round(side * math.sqrt(area)) for area in areas]
    return FasterRCNN(
        Trunk(encoder, bf16), min_size=sides, max_size=round(2.5 * side),
        image_mean=(0.0,) * 3, image_std=(1.0,) * 3,
        rpn_anchor_generator=anchors, rpn_head=rpn_head, rpn_post_nms_top_n_test=proposals,
        box_roi_pool=MultiScaleRoIAlign(["0"], region_side, 2), box_head=Conv5(D, channels, bf16),
        box_predictor=FastRCNNPredictor(channels, classes + 1), box_batch_size_per_image=regions,
        box_score_thresh=0.01,  # ours: low scores add recall
        # torchvision's RoIAlign infers the stride from the unpadded size: pad little
        size_divisible=encoder.stride)


# ---- Images with boxes ---------------------------------------------------------------------------


def with_truth(image: Image.Image | Tensor, boxes: Tensor, labels: list[int],
               difficult: list[bool]) -> tuple:
    """An item: an image, and a dict of boxes float32 [n, 4], x1 y1 x2 y2 in pixels, labels int64
    [n], from 1, and difficult bool [n]."""
    size = v2.functional.get_size(image)
    boxes = tv_tensors.BoundingBoxes(boxes.view(-1, 4), format="XYXY", canvas_size=size)
    return image, {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64),
                   "difficult": torch.tensor(difficult, dtype=torch.bool)}


class ShapesObjects(data.Shapes):
    """The embedded data set: every object of an image is of the image's class."""

    # ours: 200 test images, 600 objects, tell a few points of mAP apart
    LENGTH = {"train": 4000, "test": 200}
    names = [f"{i:05d}" for i in range(4000)]

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        image, label = super().__getitem__(index)
        boxes = self.boxes(index)
        return with_truth(image, boxes, [1 + label] * len(boxes), [False] * len(boxes))


class VOCObjects(datasets.VOCDetection):
    """A list of VOC 2007's images. VOC counts pixels from 1 and its boxes hold their last ones:
    (x1, y1, x2, y2) of its files is (x1 - 1, y1 - 1, x2, y2) here, so that x2 - x1 is a width."""

    classes = ["aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
               "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant",
               "sheep", "sofa", "train", "tvmonitor"]

    @property
    def names(self) -> list[str]:  # as VOC's devkit wants them
        return [Path(path).stem for path in self.images]

    def __getitem__(self, index: int) -> tuple[Image.Image, dict]:
        things = ElementTree.parse(self.annotations[index]).getroot().findall("object")
        corners = [[float(thing.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax")]
                   for thing in things]
        boxes = torch.tensor(corners).view(-1, 4) - torch.tensor([1.0, 1.0, 0.0, 0.0])
        labels = [1 + self.classes.index(thing.findtext("name")) for thing in things]
        # ours: difficult objects are trained on, too (the paper is silent), and ignored in tests
        difficult = [thing.findtext("difficult") == "1" for thing in things]
        return with_truth(data.read_image(self.images[index]), boxes, labels, difficult)


def load_objects(name: str, split: str, size: int) -> ShapesObjects | VOCObjects:
    """Sec. 4.3. name: "shapes", of `size` pixels, "voc2007", downloaded, or a folder that holds
    VOCdevkit/VOC2007; split: "train" (VOC's trainval) or "test"."""
    if name == "shapes":
        return ShapesObjects(split, size)
    which = "trainval" if split == "train" else "test"
    if name == "voc2007":
        return data.download(VOCObjects, data.DOWNLOADS, "2007", which)
    names = Path(name) / "VOCdevkit/VOC2007/ImageSets/Main" / f"{which}.txt"
    if not names.is_file():
        raise SystemExit(f"no {names}: pass --data DIR with VOCdevkit/VOC2007 in it, or "
                         f"--data shapes")
    return VOCObjects(name, "2007", which)


def objects_transform(train: bool) -> v2.Compose:
    """(image, truth) -> (uint8 tensor, truth). Scale and colours (Sec. 2.2) are drawn on the
    device, by the detector and `prepare`. ours: mirrored half the time; boxes of less than a pixel
    inside the image are left out."""
    steps = [v2.RandomHorizontalFlip(), v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()]
    return v2.Compose([*(steps if train else []), v2.PILToTensor(), v2.ToPureTensor()])


def prepare(images: list[Tensor], device: torch.device, color_drop: float = 0.0,
            seed: int = 0) -> list[Tensor]:
    """uint8 [3, H, W] each, this process's share of a batch -> what the detector takes. Colours are
    dropped (Sec. 2.2; ours: over the whole image) by random numbers that depend on an image's place
    in the whole batch, not on the number of processes."""
    prepared = []
    for n, image in enumerate(images):
        x = data.normalise(image.to(device, non_blocking=True))
        if color_drop:
            place = dist.get_rank() + n * dist.get_world_size()  # as train_batches deals them out
            own = torch.Generator(device).manual_seed(data.derive_seed(seed, place))
            dropped, keep = torch.rand(2, generator=own, device=device)
            noise = torch.randn(x.shape, generator=own, device=device)
            x = data.drop_colors(x, dropped < color_drop, (3 * keep).long(), noise)
        prepared.append(x)
    return prepared


# ---- Average precision ---------------------------------------------------------------------------


def average_precision(detections: list[dict], truths: list[dict], label: int,
                      threshold: float = 0.5) -> float | None:
    """VOC 2007's measure for one class: the mean, at the recalls 0, 0.1, ..., 1, of the best
    precision at that recall or a higher one, in 0..1; None for a class without objects that count.

    A detection is right if its IoU with the object of its class that it overlaps most is at least
    `threshold`, and if no better one has found this object before. One that matches a `difficult`
    object counts neither way. detections: boxes [n, 4], labels [n], scores [n] of each image."""
    candidates, positives = [], 0  # (score, the object it matches or None)
    for image, (detected, truth) in enumerate(zip(detections, truths, strict=True)):
        mine, true = detected["labels"] == label, truth["labels"] == label
        difficult = truth["difficult"][true]
        positives += int((~difficult).sum())
        ious = box_iou(detected["boxes"][mine], truth["boxes"][true])  # [n, objects]
        for score, row in zip(detected["scores"][mine].tolist(), ious):
            if not len(row) or row.max() < threshold:
                candidates.append((score, None))
            elif not difficult[row.argmax()]:
                candidates.append((score, (image, int(row.argmax()))))
    if not positives:
        return None
    candidates.sort(key=itemgetter(0), reverse=True)
    hits, matched = [], set()
    for _, match in candidates:
        hits.append(match is not None and match not in matched)
        matched.add(match)
    true_positives = torch.tensor(hits, dtype=torch.float64).cumsum(0)
    recall = true_positives / positives
    precision = true_positives / torch.arange(1, len(hits) + 1)
    best = [max(precision[recall >= tenth / 10].tolist(), default=0.0) for tenth in range(11)]
    return sum(best) / 11


def average_precisions(detections: list[dict], truths: list[dict], classes: list[str]) -> dict:
    """In percent: `ap` of each class that has objects, and their mean, `mAP`."""
    values = [average_precision(detections, truths, 1 + n) for n in range(len(classes))]
    ap = {name: round(100 * v, 3) for name, v in zip(classes, values) if v is not None}
    return {"mAP": round(sum(ap.values()) / max(1, len(ap)), 3), "ap": ap}


# ---- Training and testing ------------------------------------------------------------------------


@torch.no_grad()
def detect_all(model: FasterRCNN, objects: Dataset, device: torch.device, workers: int | None,
               skip: bool = False) -> tuple[tuple[dict, ...], tuple[dict, ...]]:
    """Every image's detections, boxes in its own pixels, and its truth; from all processes.
    skip: as in `data.Seeded`, for held-out images, which are training images."""
    model.eval()
    batches = data.test_batches(len(objects), 1)
    transform = objects_transform(train=False)
    pairs = []
    for items in data.load_batches(objects, transform, batches, workers, skip, collate=list):
        ((image, truth),) = items
        (detected,) = model(prepare([image], device))
        pairs.append(({k: v.cpu() for k, v in detected.items()}, truth))
    world = dist.get_world_size()
    shares = [None] * world
    dist.all_gather_object(shares, pairs)
    # in the data set's order again: `test_batches` dealt them out
    pairs = [shares[i % world][i // world] for i in range(len(objects))]
    return tuple(zip(*pairs))


def fit(args: Namespace, stage: str, model: FasterRCNN, train_set: Subset, held_out: Subset,
        device: torch.device, run: data.Run, key: str,
        start_map: float | None = None) -> float | None:
    """Train `model` in place, `frozen`: all but the trunk, or `finetuned`: everything. Returns the
    held-out mAP (None: no held-out images). Early stopping, start_map included, as in eval.py."""
    # paper: "fine-tuned the entire model end-to-end", Sec. 2.2: with "a smaller learning rate"
    frozen = stage == "frozen"
    peak, epochs = (args.lr, args.epochs) if frozen else (args.finetune_lr, args.finetune_epochs)
    model.backbone.requires_grad_(not frozen)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, peak, weight_decay=args.weight_decay)  # ours
    world = dist.get_world_size()
    batch = min(args.batch_size, len(train_set) // world * world)
    stop = math.ceil(epochs * len(train_set) / batch)
    tests = {math.ceil(stop * n / 10) for n in range(1, 11)}
    start = run.resume(key, model=model, optimizer=optimizer)
    run.keep_if_best(model, start_map)

    ddp = DistributedDataParallel(model)
    # otherwise fine-tuning would begin with the same images in the same order as the first stage
    order = args.seed if frozen else data.derive_seed(args.seed, stage)
    batches = data.train_batches(len(train_set), batch, order, start, stop)
    transform = objects_transform(train=True)
    loader = data.load_batches(train_set, transform, batches, args.workers, skip=True, collate=list)
    model.train()
    for step, items in run.steps(loader, stop, batch, due=tests):
        optimizer.param_groups[0]["lr"] = peak * learning_rate(step, stop, 1.0, stop // 10)
        seed = data.derive_seed(args.seed, stage, step + 1)
        # of the scale, and of the anchors and regions that torchvision draws: each process its own
        torch.manual_seed(data.derive_seed(seed, "process", dist.get_rank()))
        images = prepare([image for image, _ in items], device, args.color_drop, seed)
        targets = [{k: truth[k].to(device) for k in ("boxes", "labels")} for _, truth in items]
        losses = ddp(images, targets)
        loss = sum(losses.values())
        # ours: clipped, for a batch of bad boxes
        norm = data.update(loss, optimizer, model.parameters(), clip=10.0)
        run.tally(loss=loss, **losses, gradient_norm=norm)
        if step + 1 in tests and len(held_out):
            detections, truths = detect_all(model, held_out, device, args.workers, skip=True)
            held_map = average_precisions(detections, truths, held_out.dataset.classes)["mAP"]
            model.train()
            run.note(held_out=held_map)
            run.keep_if_best(model, held_map)
    return run.load_best(model)


def run_stages(args: Namespace, source: Source, sets: tuple[Subset, Subset, Dataset],
               device: torch.device, run: data.Run) -> None:
    """A row of the table: the stages of Sec. 4.3, one from the other's solution, each tested."""
    train_set, held_out, test_set = sets
    network = source.make(args.seed)
    sizes = dict(side=args.side, tiny=args.tiny, proposals=args.proposals, regions=args.regions)
    torch.manual_seed(data.derive_seed(args.seed, "detector"))
    model = build_detector(network, len(test_set.classes), **sizes, bf16=args.bf16)
    model = model.to(device, memory_format=torch.channels_last)
    held_map = None
    for stage in ("frozen", "finetuned"):
        key = f"{source.name}/{stage}"
        if key in run.done:
            held_map = run.done[key]["held_out_map"]
            if key in run.solution:
                model.load_state_dict(run.solution[key])
            continue
        weights = copy.deepcopy(network.state_dict()) if stage == "frozen" else None
        held_map = fit(args, stage, model, train_set, held_out, device, run, key, held_map)
        if stage == "frozen":
            # fixed means bit-identical, batch norm's statistics included
            torch.testing.assert_close(network.state_dict(), weights, rtol=0, atol=0)
        detections, truths = detect_all(model, test_set, device, args.workers)
        result = dict(encoder=source.name, arch=source.arch, stage=stage, seed=args.seed,
                      held_out_map=held_map,
                      **average_precisions(detections, truths, test_set.classes))
        if run.is_main:
            write_voc(run.folder / key, detections, test_set)
            save_picture(run.folder / key / "test.png", test_set, detections)
            detector = dict(kind="detector", network=source.network.__name__, sizes=sizes,
                            arguments=source.arguments, classes=test_set.classes,
                            state=model.state_dict())
            save_file(detector, run.folder / source.name / "model.pt")
        run.finish(key, "result", result, model.state_dict() if stage == "frozen" else None)


# ---- What is left behind -------------------------------------------------------------------------


def write_voc(folder: Path, detections: list[dict], objects: Dataset) -> None:
    """A file for each class that VOC's devkit scores: image, score and corners, counted from 1."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = {name: [] for name in objects.classes}
    for name, detected in zip(objects.names, detections):
        columns = (detected[k].tolist() for k in ("boxes", "labels", "scores"))
        for (x1, y1, x2, y2), label, score in zip(*columns):
            corners = f"{x1 + 1:.2f} {y1 + 1:.2f} {x2:.2f} {y2:.2f}"
            lines[objects.classes[label - 1]].append(f"{name} {score:.6f} {corners}\n")
    for name, rows in lines.items():
        (folder / f"comp4_det_test_{name.replace(' ', '_')}.txt").write_text("".join(rows))


def draw(image: Tensor, detected: dict, classes: list[str], truth: dict | None = None,
         score: float = 0.5) -> Tensor:
    """uint8 [3, H, W], enlarged if small: detections red, with class and score, the truth green."""
    scale = max(1, 256 // min(image.shape[1:]))
    image = image.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    if truth is not None and len(truth["boxes"]):
        image = draw_bounding_boxes(image, truth["boxes"] * scale, colors="lime", width=1)
    sure = detected["scores"] >= score
    names = [f"{classes[label - 1]} {s:.2f}" for label, s in
             zip(detected["labels"][sure].tolist(), detected["scores"][sure].tolist())]
    if not names:
        return image
    return draw_bounding_boxes(image, detected["boxes"][sure] * scale, names, colors="red", width=2)


def save_picture(path: Path, objects: Dataset, detections: list[dict], images: int = 12) -> None:
    """The first test images, with what was detected and what is there."""
    transform = objects_transform(train=False)
    shown = []
    for i in range(min(images, len(objects))):
        image, truth = transform(*objects[i])
        shown.append(draw(image, detections[i], objects.classes, truth, score=0.2))
    H, W = (max(image.shape[side] for image in shown) for side in (1, 2))
    shown = [F.pad(image, (0, W - image.shape[2], 0, H - image.shape[1]), value=255)
             for image in shown]
    save_image(make_grid(shown, nrow=4, pad_value=255) / 255, path)


def print_table(results: dict[str, dict], classes: list[str]) -> None:
    """A column for each encoder and stage, a row for each class."""
    columns = [key.replace("/frozen", " fixed").replace("/finetuned", " fine-tuned")
               for key in results]
    width = max(map(len, columns)) + 2

    def print_row(name: str, cells: list) -> None:
        print(f"{name:20}" + "".join(f"{cell:>{width}}" for cell in cells))

    print()
    print_row("AP %", columns)
    for name in classes:
        values = [result["ap"].get(name) for result in results.values()]
        print_row(name, ["-" if v is None else f"{v:.1f}" for v in values])
    print_row("mAP (11-point)", [f"{result['mAP']:.1f}" for result in results.values()])


def detect_one(args: Namespace) -> None:
    """`--detect`: draw what the run in --out finds in one picture, into that run's folder."""
    checkpoint = Path(args.out) / "checkpoint.pt"
    done = load_file(checkpoint, "checkpoint")["done"] if checkpoint.is_file() else {}
    if not done:
        raise SystemExit(f"no detector in {args.out}: run detect.py first, or pass --out")
    encoder_name = next(iter(done)).partition("/")[0]  # the one that was named first
    model_file = Path(args.out) / encoder_name / "model.pt"
    saved = load_file(model_file, "detector")
    network = {"Encoder": Encoder, "TorchvisionResNet": TorchvisionResNet}[saved["network"]]
    encoder = network(*saved["arguments"])
    model = build_detector(encoder, len(saved["classes"]), **saved["sizes"]).eval()
    model.load_state_dict(saved["state"])
    picture = ImageOps.exif_transpose(data.read_image(args.detect))  # as a camera was held
    image = v2.functional.pil_to_tensor(picture)
    with torch.no_grad():
        (detected,) = model(prepare([image], torch.device("cpu")))
    path = Path(args.out) / f"detected-{Path(args.detect).stem}.png"
    save_image(draw(image, detected, saved["classes"]) / 255, path)
    sure = int((detected["scores"] >= 0.5).sum())
    print(f"wrote {path}, by {model_file}: {sure} objects that score 0.5 or more")


# ---- Command line --------------------------------------------------------------------------------

# ours: on shapes, minutes on a CPU
TINY = dict(data="shapes", side=64, proposals=50, regions=16, batch_size=4, epochs=0.12,
            finetune_epochs=0.06, lr=3e-3, finetune_lr=3e-4, held_out=0.01)


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The command line, checked; `sources` in it are the encoders."""
    parser = data.make_parser(__doc__, out="runs/detect")
    add = parser.add_argument
    add("--data", default="voc", help="folder with VOCdevkit/VOC2007; voc2007: downloaded; shapes")
    add("--tiny", action="store_true", help="the CPU scale, on shapes; implied by shapes")
    add("--encoder", nargs="+", default=["runs/cpc/encoder.pt"], metavar="NAME", help=ENCODER_HELP)
    add("--detect", type=data.existing, metavar="IMAGE", help="draw what the run in --out finds, "
        "train nothing")
    # Sec. 2.2: "In addition to color-dropping, we use scale-augmentation", drawn around --side
    add("--side", type=number(32, 1e4, int), default=480, help="shorter side, pixels")  # ours
    add("--color-drop", type=SHARE, default=0.5, help="probability for an image")  # ours
    add("--proposals", type=number(1, 1e4, int), default=300, help="of a test image")  # Ren 2015
    add("--regions", type=number(4, 1e4, int), default=128, help="of a training image")  # ours
    # differs: the paper trains on all 5,011 images and does not say which decide when to stop
    add("--held-out", type=number(0, 0.5), default=0.1, help="share, to stop by, or 0")
    # ours, all below: the paper states nothing of the optimisation
    add("--epochs", type=number(1e-3, 1e6), default=30, help="with the trunk fixed")
    add("--finetune-epochs", type=number(1e-3, 1e6), default=30, help="of everything")
    add("--batch-size", type=COUNT, default=16, help="images of all processes")
    add("--lr", type=RATE, default=2e-4, help="peak learning rate of AdamW")
    add("--finetune-lr", type=RATE, default=2e-5, help="and of fine-tuning")
    add("--weight-decay", type=SHARE, default=1e-4, help="of all weights")

    early, _ = parser.parse_known_args(argv)
    sources, metadata = find_encoders([] if early.detect else early.encoder, stacks=3)
    if metadata and metadata["trained"]["data"] == "shapes":
        parser.set_defaults(data="shapes")
    if early.tiny or parser.parse_known_args(argv)[0].data == "shapes":
        parser.set_defaults(tiny=True, **TINY)
    args = parser.parse_args(argv)
    args.sources = sources
    return args


def main(args: Namespace) -> None:
    """Every encoder and stage: a result line each, and a table."""
    sources = vars(args).pop("sources")  # no flag, and not to be logged
    device = data.start_process(args)
    if args.detect:
        return detect_one(args)
    torch.backends.cudnn.benchmark = False  # images and batches differ in size
    # Else each tensor in the lists that workers send keeps a file open, and Linux allows 1,024.
    torch.multiprocessing.set_sharing_strategy("file_system")
    whole, test_set = (load_objects(args.data, split, args.side) for split in ("train", "test"))
    chosen, held = data.label_subset([0] * len(whole), 1.0, args.seed, args.held_out)
    if args.held_out and not held:
        raise SystemExit(f"--held-out {args.held_out} of {len(whole)} images is none: raise it, or "
                         f"pass 0 for a fixed schedule")
    train_set, held_out = Subset(whole, chosen), Subset(whole, held)
    run = data.Run(args, whole.names, processes=dist.get_world_size(),
                   encoders=list(map(data.fingerprint, args.encoder)))
    if run.is_main:
        print(f"{len(train_set)} training, {len(held_out)} held-out and {len(test_set)} test "
              f"images, {args.batch_size} a step on {dist.get_world_size()} x {device.type}")
    for source in sources:
        run_stages(args, source, (train_set, held_out, test_set), device, run)
    if run.is_main:
        print_table(run.done, test_set.classes)


if __name__ == "__main__":
    main(parse_args())
    data.leave_group()
