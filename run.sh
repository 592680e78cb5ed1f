#!/usr/bin/env bash
# The table of contents of the experiments, in the paper's order.
#
#   ./run.sh              tiny scale, end to end, on the embedded data set: two CPU cores, under ten minutes in float32
#   ./run.sh test         the tests
#   ./run.sh results      print the commands of the README's tables;  ./run.sh results DATA [TABLE]  runs them, TABLE one of
#                         table1, fig1, fig3, table3: what is finished is not run again
#   ./run.sh paper        print the paper's commands;  ./run.sh paper DATA  runs them on 8 GPUs
#
# VENV=dir uses another virtual environment than .venv; OUT=dir another folder than a fresh runs/tiny-N.
set -euo pipefail
cd "$(dirname "$0")"

environment() {
    venv=${VENV:-.venv}
    [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
    python=$venv/bin/python
    "$python" -c 'import sys; sys.exit("Python 3.10 or newer is needed" if sys.version_info < (3, 10) else 0)'
    # one pip call, and only when something is missing: a second run starts at once
    "$python" -c 'import sys; from importlib.util import find_spec
sys.exit(not all(map(find_spec, ("torch", "torchvision", "tqdm", "pytest"))))' ||
        "$python" -m pip install --quiet -r requirements.txt
}

tiny() {
    n=1
    while [ -e "runs/tiny-$n" ]; do n=$((n + 1)); done
    out=${OUT:-runs/tiny-$n}
    "$python" cpc.py --tiny --out "$out/cpc"                                       # Sec. 2.1, 4.1
    "$python" eval.py --encoder "$out/cpc/encoder.pt" --out "$out/linear"          # Table 1: A.3
    "$python" eval.py --encoder "$out/cpc/encoder.pt" --labels 0.01 0.1 1 --supervised --out "$out/labels"  # Fig. 1
    "$python" detect.py --encoder "$out/cpc/encoder.pt" random --out "$out/detect"  # Table 3
}

go() {  # print a command and run it; without a folder of data, only print it
    echo "$@"
    [ "$data" = DATA ] || "$@"
}

one_change() {  # Fig. 3: calls $1 with a name and flags, one change from v2 each
    "$1" norm-batch --norm batch                  # LN
    "$1" norm-none --norm none
    "$1" directions-1 --directions 1              # down only
    "$1" directions-2 --directions 2              # 2 of 4: without HP
    "$1" no-color-drop --color-drop 0             # RC
    "$1" patch-flips --flip 0.5                   # HF
}

paper() {
    data=${1:-DATA}
    venv=${VENV:-.venv}
    if [ "$data" != DATA ]; then
        [ -d "$data/train" ] && { [ -d "$data/val" ] || [ -d "$data/test" ]; } || { echo "run.sh: no train/ and val/ under $data: pass ImageNet's folder" >&2; exit 1; }
        environment
    fi
    launch="$venv/bin/torchrun --nproc_per_node=${GPUS:-8}"
    # Table 1, CPC v2: pre-training (Sec. 4.1), then linear classification (A.3)
    go $launch cpc.py --data "$data" --out runs/v2 --resume
    go $launch eval.py --data "$data" --encoder runs/v2/encoder.pt --out runs/v2-linear --resume
    # Fig. 1, Table 5: efficient classification (Sec. 4.2), and supervised from pixels (A.4), tuned alike
    labels="0.01 0.02 0.05 0.1 0.2 0.5 1"
    go $launch eval.py --data "$data" --encoder runs/v2/encoder.pt --labels $labels --sweep 8 --out runs/v2-labels --resume
    go $launch eval.py --data "$data" --head none --supervised resnet50 resnet101 resnet152 --labels $labels --sweep 8 --out runs/supervised --resume
    # 1 % of the labels and no other: a fixed schedule, for both
    go $launch eval.py --data "$data" --encoder runs/v2/encoder.pt --labels 0.01 --supervised --held-out 0 --out runs/v2-1percent --resume
    # Sec. 4.1: the patched encoder itself, supervised from scratch, with batch norm (66.4 %) and without (62.5 %)
    go $launch eval.py --data "$data" --encoder runs/v2/encoder.pt --supervised patched patched-none --out runs/patched --resume
    # Table 1, CPC v1, and where Fig. 3 starts
    go $launch cpc.py --data "$data" --preset v1 --out runs/v1 --resume
    go $launch eval.py --data "$data" --encoder runs/v1/encoder.pt --out runs/v1-linear --resume
    # Table 3: detection on VOC 2007 (Sec. 4.3), downloaded, or VOC=DIR
    go $launch detect.py --data "${VOC:-voc2007}" --encoder runs/v2/encoder.pt random --out runs/v2-voc --resume
    # Fig. 3 and 4: the larger encoder, one change from v2 at a time; linear, and with few labels
    variant() {
        name=$1; shift
        go $launch cpc.py --data "$data" --out "runs/$name" --resume "$@"
        go $launch eval.py --data "$data" --encoder "runs/$name/encoder.pt" --out "runs/$name-linear" --resume
        go $launch eval.py --data "$data" --encoder "runs/$name/encoder.pt" --labels 0.01 0.1 --out "runs/$name-labels" --resume
    }
    one_change variant
    variant lengths-2-5 --lengths 2 3 4 5         # TL: the original lengths
    variant resnet92 --arch resnet92              # capacity
    go $launch detect.py --data "${VOC:-voc2007}" --encoder runs/resnet92/encoder.pt --out runs/resnet92-voc --resume  # Table 3, "ResNet-101"
    variant deeper --arch resnet161-deep          # Fig. 4, right
    variant wider --arch resnet161-wide
}

results() {  # the README's tables; on one core about a day, most of it CIFAR-10's
    data=${1:-DATA} stage=${2:-all} out=${OUT:-runs/results} venv=${VENV:-.venv} seen=" "
    [[ " all table1 fig1 fig3 table3 " = *" $stage "* ]] || { echo "run.sh: $stage is none of: table1, fig1, fig3, table3" >&2; exit 2; }
    if [ "$data" != DATA ]; then
        for set in cifar10 photos VOCdevkit; do
            [ -d "$data/$set" ] || { echo "run.sh: no $set/ under $data: the README's Results say what is in it" >&2; exit 1; }
        done
        environment
    fi
    wants() { [ "$stage" = all ] || [ "$stage" = "$1" ]; }
    script() {  # SCRIPT RUN FLAGS: what is finished is not run again, what was stopped goes on
        [[ "$seen" = *" $2 "* ]] && return
        seen+="$2 "
        go "$venv/bin/python" "$1.py" --out "$out/$2" --resume "${@:3}"
    }
    cpc() { script cpc "$1" --tiny "${@:2}"; }                                   # RUN FLAGS
    score() { script "$1" "$2" --encoder "$out/$3/encoder.pt" "${@:4}"; }       # SCRIPT RUN PRE-TRAINING [random] FLAGS
    shapes() { for s in 0 1 2 3 4; do cpc "shapes-$s" --seed "$s"; done; }
    cifar() { cpc cifar --data "$data/cifar10" --patch 12 --stride 5 --stem 3x3/2 --min-area 0.4 --epochs 12; }
    photos() { cpc photos --data "$data/photos" --stem 7x7 --crop 240 --patch 80 --stride 32 --min-area 0.4 --batch-size 32 --epochs 12; }  # A.3's
    photos_half() { cpc "photos-half-$1" --data "$data/photos" --stem 7x7 --crop 120 --patch 40 --stride 16 --min-area 0.3 --batch-size 32 --epochs "$1"; }

    if wants table1; then  # linear classification, all labels
        shapes
        for s in 0 1 2 3 4; do score eval "shapes-$s-linear" "shapes-$s" random --seed "$s"; done
        cifar
        score eval cifar-linear cifar random --epochs 2
        photos
        score eval photos-linear photos random
        for epochs in 10 40; do  # longer pre-training: half the side, a third of the cost
            photos_half "$epochs"
            score eval "photos-half-$epochs-linear" "photos-half-$epochs" random
        done
    fi
    if wants fig1; then  # and Table 5: few labels
        shapes
        for s in 0 1 2 3 4; do
            fractions=(0.01)
            [ "$s" -gt 2 ] || fractions+=(0.02 0.05 0.1 0.2 0.5 1)  # three seeds for the curve, five at 1 %
            score eval "shapes-$s-labels" "shapes-$s" --seed "$s" --labels "${fractions[@]}" --supervised
            score eval "shapes-$s-only" "shapes-$s" --seed "$s" --labels 0.01 --supervised --held-out 0
        done
        cifar
        cpc cifar-small --data "$data/cifar10" --arch small --patch 12 --stride 5 --stem 3x3/2 --min-area 0.4 --epochs 4 --lr 2e-3 --warmup 100
        few() { score eval "$1" "$2" --batch-size 32 --held-out 0.02 --supervised small:3x3/2 "${@:3}"; }
        few cifar-few cifar --labels 0.01 0.02 0.05 0.1 1 --min-steps 1500 --seeds 3
        few cifar-few-more cifar --labels 0.2 0.5 --min-steps 1500
        # CPC's encoder without CPC: from scratch on the labels, patch by patch and on whole images, and untrained
        alike=(--labels 0.01 0.1 --batch-size 32 --held-out 0.02 --min-steps 1500)
        score eval cifar-scratch cifar --head none --supervised patched tiny:3x3/2 "${alike[@]}" --seeds 3
        score eval cifar-untrained cifar random "${alike[@]}"
        few cifar-short cifar --labels 0.01 --min-steps 500
        few cifar-small-short cifar-small --labels 0.01 --min-steps 500
        cpc cifar-small-long --data "$data/cifar10" --arch small --patch 16 --stride 8 --stem 3x3/2 --min-area 0.4 --lengths 1 2 --epochs 8
        score eval cifar-small-long-few cifar-small-long --labels 0.01 --batch-size 32 --held-out 0.02 --min-steps 1500
        photos
        recipe=(--batch-size 32 --min-steps 150 --supervised tiny:7x7 small:7x7)
        score eval photos-few photos --labels 0.01 "${recipe[@]}" --seeds 3
        score eval photos-few-10 photos --labels 0.1 "${recipe[@]}"
        photos_half 10
        score eval photos-half-10-few photos-half-10 --labels 0.01 0.1 --batch-size 32 --min-steps 450
        photos_half 40
        score eval photos-half-few photos-half-40 --labels 0.01 0.1 --batch-size 32 --min-steps 450 --supervised tiny:7x7 tiny:3x3/2 --seeds 3
        score eval photos-pixels-long photos --head none --labels 0.01 --batch-size 32 --min-steps 450 --supervised tiny:7x7
    fi
    if wants fig3; then
        variant() {  # the fewest patches of which one is out of sight: 3x3, half a patch apart
            for s in 0 1; do
                cpc "fig3-$1-$s" --seed "$s" --data "$data/cifar10" --patch 16 --stride 8 --stem 3x3/2 --min-area 0.4 --lengths 2 --epochs 2 "${@:2}"
                score eval "fig3-$1-$s-linear" "fig3-$1-$s" random --seed "$s" --epochs 1 --held-out 0.02
            done
            score eval "fig3-$1-0-labels" "fig3-$1-0" --labels 0.01 0.1 --batch-size 32 --held-out 0.02 --min-steps 500  # Fig. 4
        }
        variant v2
        one_change variant
        variant lengths-1-2 --lengths 1 2
        variant color-drop-1 --color-drop 1
        variant small --arch small                # capacity
        variant batch-16 --batch-size 16 --lr 2e-3 --warmup 200
        [ "$data" = DATA ] || "$python" - "$out"/fig3-*-linear <<'EOF'
import json, sys
from pathlib import Path
from statistics import correlation
lines = lambda run, event: [line for line in map(json.loads, (Path(run) / "log.jsonl").open()) if line["event"] == event]
names = ["contrast", "random", "linear", "1 %", "1 % tuned", "10 %", "10 % tuned"]
print(f"\n{'top-1 % and contrastive accuracy':32}" + "".join(f"{name:>12}" for name in names))
rows = []
for run in (name.removesuffix("-linear") for name in sys.argv[1:]):
    linear = {line["encoder"]: line["top1"] for line in lines(f"{run}-linear", "result")}
    few = {(line["labels"], line["finetuned"]): line["top1"] for line in lines(f"{run}-labels", "result")} if run[-1] == "0" else {}
    rows.append([100 * lines(run, "epoch")[-1]["accuracy"], linear["random"], linear["cpc"], *(few[cell] for cell in sorted(few))])
    print(f"{Path(run).name:32}" + "".join(f"{x:12.1f}" for x in rows[-1]))
columns = list(zip(*(row for row in rows if len(row) == len(names))))
print(f"{'correlation with linear':32}" + "".join(f"{correlation(column, columns[2]):12.2f}" for column in columns))
EOF
    fi
    if wants table3; then  # detection
        shapes
        for s in 0 1 2; do
            score detect "shapes-$s-detect" "shapes-$s" random --seed "$s"
            score eval "shapes-$s-patched" "shapes-$s" --seed "$s" --head none --supervised patched --epochs 3.2
            script detect "shapes-$s-detect-patched" --seed "$s" --encoder "$out/shapes-$s-patched/patched-1-seed-$s.pt"
            long="--epochs 1 --finetune-epochs 0.5"  # eight times the schedule
            score detect "shapes-$s-detect-long" "shapes-$s" random --seed "$s" $long
            script detect "shapes-$s-detect-patched-long" --seed "$s" --encoder "$out/shapes-$s-patched/patched-1-seed-$s.pt" $long
        done
        voc=(--data "$data" --side 240 --regions 32 --batch-size 8 --proposals 100 --epochs 6 --finetune-epochs 3 --lr 2e-3 --finetune-lr 5e-4)
        photos_half 10
        score detect voc photos-half-10 random "${voc[@]}"
        score eval photos-patched photos-half-10 --head none --supervised patched --epochs 4 --batch-size 32
        script detect voc-patched --encoder "$out/photos-patched/patched-1-seed-0.pt" "${voc[@]}"
    fi
}

case ${1:-tiny} in
    tiny) environment; tiny ;;
    test) environment; exec "$python" -m pytest -q test_cpc.py "${@:2}" ;;
    results) results "${@:2}" ;;
    paper) paper "${2:-DATA}" ;;
    *) echo "run.sh: ${1} is none of: (nothing), test, results [DATA [TABLE]], paper [DATA]" >&2; exit 2 ;;
esac
