"""Transfer to another task: Faster R-CNN on PASCAL VOC 2007 (Sec. 4.3, Table 3).

    python detect.py --data DIR                                   # DIR holds VOCdevkit/VOC2007
    python detect.py --encoder runs/cpc/encoder.pt random --out runs/detect-both
    python detect.py --tiny                                       # the embedded data set, a CPU
    python detect.py --encoder torchvision:resnet50:FILE --data DIR --out runs/detect-supervised
    torchrun --nproc_per_node=8 detect.py --data DIR --out runs/detect-8
    python detect.py --detect photo.jpg --out runs/detect         # draw what a finished run finds

The encoder is conv1..conv4 of a ResNet. Sec. 4.3 "replaced the neural network classifier ... with a
Faster-RCNN": here torchvision's, with the encoder run fully convolutionally as its trunk and a fresh
conv5 on the regions. First the trunk is fixed, then everything is fine-tuned from that solution.

Results: shapes, three seeds, mAP 42.1 ± 6.6 fine-tuned, 3.8 ± 1.1 from random weights, in eight times the steps
88.4 ± 5.7 and 17.1 ± 2.8; a part of VOC 2007, one seed, 5.5 and 2.4 (README). At the paper's scale not yet measured.

Shapes: N images, R regions, D latent channels, H W an image's sides.
"""

import copy
import math
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign, box_iou
from torchvision.utils import draw_bounding_boxes, make_grid, save_image
from tqdm import tqdm

import data
from resnet import (FORMAT, Bottleneck, Encoder, LayerNorm, Parser, Run, TorchvisionGrid, assert_unchanged, atomic_save,
                    find_encoders, learning_rate, load_file, norm_layer, one_line)

LAYERS = ("layer3",)  # torchvision's conv4: ResNets

# ---- The detector -------------------------------------------------------------------------------


class Trunk(nn.Module):
    """f_theta on whole images, fully convolutional: [N, 3, H, W] -> [N, D, H/stride, W/stride].

    Its normalisation stays as trained: batch norm with its running statistics. Layer norm's were a
    patch's; here they are each position's, over its channels. ours, measured: with those of the whole
    image mAP is 12 points lower (README), and the padding that a batch adds would change latents."""

    def __init__(self, encoder: nn.Module, bf16: bool):
        super().__init__()
        self.encoder, self.out_channels, self.bf16, self.frozen = encoder, encoder.out_channels, bf16, True
        for module in encoder.modules():
            if isinstance(module, LayerNorm):
                module.per_position = True

    def train(self, mode: bool = True):
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        with (torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16),
              torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen)):
            return self.encoder.features(images).float()


class Conv5(nn.Module):
    """A ResNet's last stack (He et al. 2016), fresh, on each region: [R, D, h, w] -> [R, channels]."""

    def __init__(self, in_channels: int, channels: int, bf16: bool):
        super().__init__()
        # ours: layer norm as in the trunk, since the few regions of a batch resemble each other
        self.blocks = nn.Sequential(*(
            Bottleneck(channels if n else in_channels, channels, channels // 4, 1 if n else 2, "layer")
            for n in range(3)))
        self.norm, self.bf16 = norm_layer("layer", channels), bf16

    def forward(self, regions: Tensor) -> Tensor:
        with torch.autocast(regions.device.type, torch.bfloat16, enabled=self.bf16):
            return F.relu(self.norm(self.blocks(regions))).mean((2, 3), dtype=torch.float32)


def build_detector(encoder: nn.Module, classes: int, side: int, tiny: bool = False, proposals: int = 300,
                   regions: int = 128, bf16: bool = False) -> FasterRCNN:
    """Faster R-CNN (Ren et al. 2015) with the encoder as its trunk, images already normalised.

    classes: without the background; side: shorter side of test images, pixels; proposals: from the
    region proposal network at test time; regions: trained on, of an image."""
    D = encoder.out_channels
    anchors = AnchorGenerator(  # 32 to 512 pixels at side 480, three shapes
        (tuple(max(1, round(side * 2 ** n / 15)) for n in range(5)),), ((0.5, 1.0, 2.0),))
    rpn_head = RPNHead(min(D, 512), anchors.num_anchors_per_location()[0])  # Ren et al. 2015: 512
    rpn_head.conv = nn.Sequential(nn.Conv2d(D, min(D, 512), 3, padding=1), nn.ReLU())  # torchvision's keeps D
    nn.init.normal_(rpn_head.conv[0].weight, std=0.01)  # as the others in RPNHead
    nn.init.zeros_(rpn_head.conv[0].bias)
    channels, cells = (D, 6) if tiny else (2048, 14)  # a ResNet's conv5, on 14x14 cells of a region
    # paper: Sec. 2.2, "scale-augmentation (Doersch et al., 2015)", who draw 150 to 450 thousand
    # pixels: of a 4:3 image with a short side of 480, 154 to 461. torchvision's detector draws one
    # of these short sides in training and takes the last at test time.
    sides = [round(side * math.sqrt(area / 10)) for area in range(5, 16) if area != 10] + [side]
    return FasterRCNN(
        Trunk(encoder, bf16), min_size=sides, max_size=round(2.5 * side), image_mean=(0.0,) * 3, image_std=(1.0,) * 3,
        rpn_anchor_generator=anchors, rpn_head=rpn_head, rpn_post_nms_top_n_test=proposals,
        box_roi_pool=MultiScaleRoIAlign(["0"], cells, 2), box_head=Conv5(D, channels, bf16),
        box_predictor=FastRCNNPredictor(channels, classes + 1), box_batch_size_per_image=regions,
        box_score_thresh=0.01,  # ours: average precision wants the doubtful ones too
        # torchvision's RoIAlign guesses the stride from its first images' sizes before padding: pad little
        size_divisible=encoder.stride)


def prepare(images: list[Tensor], device: torch.device, color_drop: float = 0.0, seed: int = 0) -> list[Tensor]:
    """uint8 [3, H, W] each, this process's share of a batch -> what the detector takes; colours dropped
    over the whole image (Sec. 2.2), each under a seed of its own place in the batch."""
    prepared = []
    for n, image in enumerate(images):
        x = data.normalise(image.to(device, non_blocking=True))
        if color_drop:
            place = dist.get_rank() + n * dist.get_world_size()  # `TrainBatches` deals images out in turn
            own = torch.Generator(device).manual_seed(data.derive_seed(seed, place))
            dropped, keep = torch.rand(2, generator=own, device=device)
            noise = torch.randn(x.shape, generator=own, device=device)
            x = data.drop_colors(x, dropped < color_drop, (3 * keep).long(), noise)
        prepared.append(x)
    return prepared


# ---- Average precision --------------------------------------------------------------------------


def match(detections: list[dict], truths: list[dict]) -> dict[str, Tensor]:
    """All images' detections, the best score first, each with the object of its class that it
    overlaps most (VOC's rule): its `iou`, `object` (a number) and whether that is `difficult`.

    detections: boxes [n, 4], labels [n], scores [n] of each image; truths: boxes, labels, difficult."""
    parts, first = [], 0
    for found, truth in zip(detections, truths, strict=True):
        overlap = box_iou(found["boxes"], truth["boxes"]) * (found["labels"][:, None] == truth["labels"])
        iou, which = F.pad(overlap, (0, 1)).max(1)  # a last object that nothing overlaps
        parts.append((found["scores"], found["labels"], iou, first + which, F.pad(truth["difficult"], (0, 1))[which]))
        first += len(truth["boxes"]) + 1
    columns = [torch.cat(column) for column in zip(*parts)]
    order = columns[0].argsort(descending=True, stable=True)
    return dict(zip(("scores", "labels", "iou", "object", "difficult"), (column[order] for column in columns)))


def precision_recall(matched: dict[str, Tensor], label: int, positives: int, iou: float) -> tuple[Tensor, Tensor]:
    """(recall, precision) of a class after each of its detections, float64; precision as the best at
    this or any higher recall. The first detection of an object counts, every further one is a false
    positive; one of a `difficult` object neither rewards nor punishes."""
    mine, taken, hits = matched["labels"] == label, set(), []
    for overlap, number, difficult in zip(*(matched[k][mine].tolist() for k in ("iou", "object", "difficult"))):
        if overlap < iou:
            hits.append(False)
        elif not difficult:
            hits.append(number not in taken)
            taken.add(number)
    hit = torch.tensor(hits, dtype=torch.bool)
    true, false = hit.cumsum(0).double(), (~hit).cumsum(0)
    return true / positives, (true / (true + false)).flip(0).cummax(0).values.flip(0)


def interpolated(recall: Tensor, precision: Tensor, points: int) -> float:
    """Mean precision at so many evenly spaced recalls: 11 for VOC 2007, 101 for COCO."""
    wanted = torch.linspace(0, 1, points, dtype=torch.float64) - 1e-9
    return F.pad(precision, (0, 1))[torch.searchsorted(recall, wanted)].mean().item()


def area(recall: Tensor, precision: Tensor) -> float:
    """The area under the curve, as VOC has it since 2010."""
    return (precision * recall.diff(prepend=recall.new_zeros(1))).sum().item()


def average_precisions(detections: list[dict], truths: list[dict], classes: list[str]) -> dict:
    """Percent: `ap` of each class (VOC 2007: 11 points at IoU 0.5) and the mean `mAP`; `mAP_area`
    (VOC 2010); `mAP_coco`, 101 points, the mean over IoU 0.5 to 0.95, with VOC's matching. A class
    without objects that count has none."""
    matched, ap, areas, cocos = match(detections, truths), {}, [], []
    for label, name in enumerate(classes, 1):
        positives = sum(int(((t["labels"] == label) & ~t["difficult"]).sum()) for t in truths)
        if positives:
            curves = [precision_recall(matched, label, positives, 0.5 + 0.05 * n) for n in range(10)]
            ap[name] = round(100 * interpolated(*curves[0], 11), 3)
            areas.append(area(*curves[0]))
            cocos.append(sum(interpolated(*curve, 101) for curve in curves) / 10)
    mean = lambda values: round(sum(values) / max(1, len(values)), 3)
    return {"mAP": mean(ap.values()), "mAP_area": mean([100 * v for v in areas]),
            "mAP_coco": mean([100 * v for v in cocos]), "ap": ap}


# ---- Training and testing -----------------------------------------------------------------------


def collate(items: list[tuple]) -> tuple:
    """A batch as (images, truths): images differ in size."""
    return tuple(zip(*items))


def fit(args, phase: str, model: FasterRCNN, objects, device: torch.device, run: Run, state: dict, key: str) -> None:
    """Train `model` in place: `frozen`, all but the trunk, or `finetuned`, everything."""
    frozen, rank = phase == "frozen", dist.get_rank()
    model.backbone.frozen = frozen
    model.backbone.requires_grad_(not frozen)
    batch = min(args.batch_size, len(objects) // dist.get_world_size() * dist.get_world_size())
    steps = math.ceil((args.epochs if frozen else args.finetune_epochs) * len(objects) / batch)
    # paper: "then fine-tuned the entire model end-to-end"; ours: slower, but for what is still fresh
    slow = dict(params=list(model.backbone.parameters()), lr=args.finetune_lr)
    fast = dict(params=[*model.rpn.parameters(), *model.roi_heads.parameters()],
                lr=args.lr if args.phase[0] == phase else args.finetune_lr)
    optimizer = torch.optim.AdamW([fast] if frozen else [slow, fast], weight_decay=args.weight_decay)  # ours
    start, totals = 0, torch.zeros(5, device=device)  # sums of torchvision's four losses, steps
    if state.get("key") == key:
        start = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        totals += state["totals"].to(device)
    schedule = LambdaLR(optimizer, partial(learning_rate, steps=steps, peak=1.0, warmup=steps // 10), start - 1)
    ddp = DistributedDataParallel(model)
    stops = {math.ceil(steps * n / 10) for n in range(1, 11)}  # where a line is logged and the state saved
    batches = data.TrainBatches(len(objects), batch, args.seed, start, steps)
    loader = data.load_batches(objects, data.objects_transform(train=True), batches, device, args.workers, collate)
    bar = tqdm(loader, desc=key, initial=start, total=steps, disable=not run.is_main, mininterval=1)
    model.train()
    for done, (images, truths) in enumerate(bar, start + 1):
        seed = data.derive_seed(args.seed, phase, done)
        # of the scale, and of the anchors and regions that torchvision draws, each process its own
        torch.manual_seed(data.derive_seed(seed, rank))
        targets = [{k: truth[k].as_subclass(Tensor).to(device) for k in ("boxes", "labels")} for truth in truths]
        losses = ddp(prepare(images, device, args.color_drop, seed), targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 10.0)  # ours: a batch of bad boxes is survived
        if not norm.isfinite():  # the same on every rank
            loss, lr = float(sum(losses.values())), schedule.get_last_lr()[-1]
            raise SystemExit(f"{key}: gradients are not finite at step {done}, loss {loss:.3g}, learning rate "
                             f"{lr:.2e}: lower --lr; the last checkpoint is kept")
        optimizer.step()
        schedule.step()
        totals += torch.stack([loss.detach() for loss in losses.values()] + [torch.ones((), device=device)])
        caught, line = run.stop_signal(), {}
        if caught or done in stops:
            dist.all_reduce(totals.div_(dist.get_world_size()))  # from now on every rank's are the mean
            if done in stops:
                means = dict(zip(losses, (totals[:4] / totals[4]).tolist()))
                totals.zero_()
                bar.set_postfix_str(f"loss {sum(means.values()):.3f}", refresh=False)
                line = dict(event="train", fit=key, step=done, steps=steps, loss=sum(means.values()), **means)
            state.update(key=key, step=done, model=model.state_dict(), optimizer=optimizer.state_dict(), totals=totals)
            run.save(state, **line)
        if caught:
            run.leave(caught)


@torch.no_grad()
def detect_all(args, model: FasterRCNN, objects, device: torch.device, run: Run) -> list[dict]:
    """Every image's detections, from all processes, each image once: boxes in its own pixels."""
    model.eval()
    batches, world = data.TestBatches(len(objects), 1), dist.get_world_size()
    loader = data.load_batches(objects, data.objects_transform(train=False), batches, device, args.workers, collate)
    found = []
    bar = tqdm(loader, desc="test", total=len(batches.mine), disable=not run.is_main, mininterval=1)
    for n, (images, _) in enumerate(bar):
        found += [{k: v.cpu() for k, v in one.items()} for one in model(prepare(images, device))]
        if n % 20 == 0 and n < len(objects) // world and (caught := run.stop_signal()):
            run.leave(caught)  # `fit` has saved all there is
    shares = [None] * world
    dist.all_gather_object(shares, found)
    return [shares[i % world][i // world] for i in range(len(objects))]


# ---- What is left behind ------------------------------------------------------------------------


def write_voc(folder: Path, detections: list[dict], objects) -> None:
    """A file for each class that VOC's devkit scores: image, score and corners, counted from 1."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = {name: [] for name in objects.classes}
    for name, found in zip(objects.names, detections):
        for box, label, score in zip(*(found[k].tolist() for k in ("boxes", "labels", "scores"))):
            corners = " ".join(f"{v:.2f}" for v in (box[0] + 1, box[1] + 1, box[2], box[3]))
            lines[objects.classes[label - 1]].append(f"{name} {score:.6f} {corners}\n")
    for name, found in lines.items():
        (folder / f"comp4_det_test_{name.replace(' ', '_')}.txt").write_text("".join(found))


def draw(image: Tensor, found: dict, classes: list[str], truth: dict | None = None, score: float = 0.5) -> Tensor:
    """uint8 [3, H, W], enlarged if small: detections red, with class and score, the truth green."""
    scale = max(1, 256 // min(image.shape[1:]))
    image = image.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    if truth is not None and len(truth["boxes"]):
        image = draw_bounding_boxes(image, truth["boxes"] * scale, colors="lime", width=1)
    sure = {k: v[found["scores"] >= score] for k, v in found.items()}
    names = [f"{classes[y - 1]} {s:.2f}" for y, s in zip(sure["labels"].tolist(), sure["scores"].tolist())]
    return draw_bounding_boxes(image, sure["boxes"] * scale, names, colors="red", width=2) if names else image


def save_picture(path: Path, objects, detections: list[dict], images: int = 12) -> None:
    """The first test images, with what was found and what is there."""
    transform, shown = data.objects_transform(train=False), []
    for i in range(min(images, len(objects))):
        shown.append(draw(transform(*objects[i])[0], detections[i], objects.classes, objects.truth(i), score=0.2))
    H, W = (max(image.shape[side] for image in shown) for side in (1, 2))
    shown = [F.pad(image, (0, W - image.shape[2], 0, H - image.shape[1]), value=255) for image in shown]
    save_image(make_grid(shown, nrow=4, pad_value=255) / 255, path)


def print_table(results: dict[str, dict], classes: list[str]) -> None:
    """A column for each encoder and phase, a row for each class."""
    heads, results = list(results), list(results.values())
    width = max(map(len, heads)) + 2
    row = lambda name, cells: print(f"{name:20}" + "".join(f"{c:>{width}}" for c in cells))
    print()
    row("AP %", heads)
    for name in classes:
        row(name, [f"{r['ap'][name]:.1f}" if name in r["ap"] else "-" for r in results])
    for key, name in (("mAP", "mAP (VOC 2007)"), ("mAP_area", "mAP (area)"), ("mAP_coco", "mAP (COCO-style)")):
        row(name, [f"{r[key]:.1f}" for r in results])


def detect_one(args) -> None:
    """`--detect`: draw what the run in --out finds in one picture, into that run's folder."""
    saved = load_file(Path(args.out) / "model.pt", "detector")
    encoder = TorchvisionGrid(saved["arch"], None, LAYERS) if saved["norm"] is None else Encoder(
        saved["arch"], saved["norm"], saved["stem"])
    model = build_detector(encoder, len(saved["classes"]), **saved["sizes"])
    model.load_state_dict(saved["state"])
    try:
        image = data.objects_transform(train=False)(data.read_image(args.detect, upright=True))
    except data.Unreadable as error:
        raise SystemExit(str(error))
    if max(image.shape[1:]) > 100 * min(image.shape[1:]):  # resized, nothing would be left of the shorter side
        raise SystemExit(f"{args.detect}: {image.shape[2]} x {image.shape[1]} pixels are too narrow for a detector")
    with torch.no_grad():
        found = model.eval()(prepare([image], torch.device("cpu")))[0]
    for box, label, score in zip(*(found[k].tolist() for k in ("boxes", "labels", "scores"))):
        if score >= 0.5:
            print(f"{saved['classes'][label - 1]:16} {score:.2f}   {' '.join(f'{v:.0f}' for v in box)}")
    if not (found["scores"] >= 0.5).any():
        print("nothing that scores 0.5 or more")
    stem, n = f"detected-{Path(args.detect).stem}", 2
    path = Path(args.out) / f"{stem}.png"
    while path.exists():
        path, n = path.with_name(f"{stem}-{n}.png"), n + 1
    save_image(draw(image, found, saved["classes"]) / 255, path)
    print(f"wrote {path}")


# ---- Command line -------------------------------------------------------------------------------

# ours: on shapes, minutes on a CPU
TINY = dict(tiny=True, data="shapes", side=64, proposals=50, regions=16, batch_size=4, epochs=0.12,
            finetune_epochs=0.06, lr=3e-3, finetune_lr=3e-4)


def parse_args(argv: list[str] | None = None):
    """The command line, checked. Returns (args, encoders)."""
    parser = Parser(__doc__, out="runs/detect", data="folder that holds VOCdevkit/VOC2007 (default: voc); or voc2007 "
                    "(downloaded), shapes (made)")
    add = parser.add_argument
    add("--encoder", nargs="+", default=["runs/cpc/encoder.pt"], metavar="NAME", help="what cpc.py wrote; random: the "
        "same network untrained; torchvision:MODEL[:WEIGHTS]: a ResNet's conv1 to conv4")
    add("--phase", nargs="+", choices=("frozen", "finetuned"), default=["frozen", "finetuned"],
        help="trunk fixed, or everything trained: from the frozen solution, or alone from the encoder")  # paper: both
    add("--detect", metavar="IMAGE", help="draw what the run in --out finds in a picture, train nothing")
    # Sec. 2.2: color-dropping and scale-augmentation, which is around --side
    add("--side", type=int, default=480,
        help="shorter side of test images, pixels; in training half to 1.5 of the area")
    add("--color-drop", type=float, default=0.5, help="probability for an image")  # ours: not stated
    add("--proposals", type=int, default=300, help="regions of a test image")  # Ren et al. 2015
    add("--regions", type=int, default=128, help="of a training image")  # Girshick 2015
    # ours: the paper states nothing of the optimisation
    add("--epochs", type=float, default=30, help="with the trunk frozen")
    add("--finetune-epochs", type=float, default=30, help="of everything")
    add("--batch-size", type=int, default=16, help="images of all processes together")
    add("--lr", type=float, default=2e-4, help="peak learning rate of AdamW")
    add("--finetune-lr", type=float, default=2e-5, help="and for everything")
    add("--weight-decay", type=float, default=1e-4, help="of all weights")

    early = parser.parse_known_args(argv)[0]
    encoders = [] if early.detect is not None else find_encoders(parser, early.encoder, LAYERS)
    first = next((e.file for e in encoders if e.file), None)
    if early.tiny or first and first["arch"] in ("tiny", "small"):
        parser.set_defaults_checked(TINY)
    args = parser.parse_args(argv)
    args.data = "voc" if args.data is None else args.data
    args.phase = [p for p in ("frozen", "finetuned") if p in args.phase]
    parser.check_ranges(args, dict(
        side=(32, 1e4), color_drop=(0, 1), proposals=(1, 1e4), regions=(4, 1e4), epochs=(1e-3, 1e6),
        finetune_epochs=(1e-3, 1e6), lr=(1e-12, 1e3), finetune_lr=(1e-12, 1e3), weight_decay=(0, 1)))
    return args, encoders


def main(args, encoders) -> None:
    """Every encoder and phase: a result line each, and a table."""
    if args.detect is not None:
        return detect_one(args)
    device = data.start_process()
    torch.backends.cudnn.benchmark = False  # images and batches differ in size
    bf16 = data.has_bf16(device) if args.bf16 is None else args.bf16
    train_set, test_set = (data.load_objects(args.data, split, args.side) for split in ("train", "test"))
    if len(train_set) < dist.get_world_size():
        raise SystemExit(f"{args.data} has {len(train_set)} training images, fewer than processes")
    truths = [test_set.truth(i) for i in range(len(test_set))]
    run = Run(args, images_sha256=data.fingerprint(train_set, test_set), bf16=bf16,
              encoder_sha256=[e.sha256 for e in encoders])
    state = run.start(images=len(train_set), classes=train_set.classes) or {"done": {}, "solution": {}}
    sizes = dict(side=args.side, tiny=args.tiny, proposals=args.proposals, regions=args.regions)
    if run.is_main:
        print(f"{len(train_set)} training and {len(test_set)} test images, {len(train_set.classes)} classes, shorter "
              f"side {args.side}{', tiny scale' if args.tiny else ''}; {args.batch_size} images a step on "
              f"{dist.get_world_size()} x {device.type} in {'bfloat16' if bf16 else 'float32'}")
    names = [encoder.name for encoder in encoders]
    for n, encoder in enumerate(encoders):
        row = encoder.name if names.count(encoder.name) == 1 else f"{encoder.name}-{n}"
        network = encoder.make(args.seed)
        torch.manual_seed(data.derive_seed(args.seed, "detector"))
        model = build_detector(network, len(train_set.classes), **sizes, bf16=bf16)
        network.checkpointing = device.type == "cuda" and network.out_channels == 4096  # as in pre-training
        model = model.to(device, memory_format=torch.channels_last)
        for phase in args.phase:
            key = f"{row}/{phase}"
            if key in state["done"]:
                if key in state["solution"]:
                    model.load_state_dict(state["solution"][key])
                continue
            before, clock = copy.deepcopy(network.state_dict()) if phase == "frozen" else None, time.time()
            fit(args, phase, model, train_set, device, run, state, key)
            if phase == "frozen":
                assert_unchanged(network, before)
            detections = detect_all(args, model, test_set, device, run)
            seconds = round(time.time() - clock, 1)
            result = dict(encoder=encoder.name, arch=encoder.arch, phase=phase, seed=args.seed, seconds=seconds,
                          **average_precisions(detections, truths, test_set.classes))
            if run.is_main:
                write_voc(run.folder / key, detections, test_set)
                save_picture(run.folder / key / "test.png", test_set, detections)
                if n == 0:
                    described = dict(arch=network.arch, norm=getattr(network, "norm", None),
                                     stem=getattr(network, "stem", None), sizes=sizes, classes=test_set.classes,
                                     trained=vars(args))
                    atomic_save({"kind": "detector", "format": FORMAT, **described, "state": model.state_dict()},
                                run.folder / "model.pt")
            done = state["done"] | {key: result}
            state.clear()
            # where the next phase starts; not a copy: once fine-tuning has moved the model, `fit` keeps what counts
            state.update(done=done, solution={key: model.state_dict()} if phase != args.phase[-1] else {})
            run.save(state, "result", **result)
    if run.is_main:
        print_table(state["done"], test_set.classes)


if __name__ == "__main__":
    one_line(parse_args, main)
