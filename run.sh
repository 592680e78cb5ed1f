#!/usr/bin/env bash
# The table of contents of the experiments, in the paper's order.
#
#   ./run.sh                  tiny scale, end to end, on the embedded data set, minutes on a CPU
#   ./run.sh test             the tests
#   ./run.sh results          print the commands of the README's tables
#   ./run.sh results DATA     run them; what is finished is not run again, what was stopped goes on
#   ./run.sh paper            print the paper's commands
#   ./run.sh paper DATA       run them on 8 GPUs (GPUS=n for another number)
#
# VENV=dir uses another virtual environment than .venv.
set -euo pipefail
cd "$(dirname "$0")"
venv=${VENV:-.venv}

environment() {
    # a python without pip is half an environment, as Debian makes it without its python3-venv
    "$venv/bin/python" -c 'import pip' 2>/dev/null || python3 -m venv "$venv"
    PATH="$(cd "$venv/bin" && pwd):$PATH"
    python -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        { echo "run.sh: $venv has no Python 3.10 or newer: remove it, install one" >&2; exit 1; }
    # one pip call, and only when something is missing or old: a second run starts at once
    there='import pytest, torchvision, tqdm, torch; assert torch.__version__ >= (2, 9)'
    python -c "$there" 2>/dev/null || python -m pip install --quiet -r requirements.txt
}

# How a script is started here. Without a GPU: several processes of one thread each, which wait for
# each other once a step; the threads of one process would wait for each other in every operation.
launcher() {
    if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        echo python
    else
        cores=$(getconf _NPROCESSORS_ONLN)
        processes=$((cores >= 4 ? 4 : cores >= 2 ? 2 : 1))
        echo "env OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=$processes"
    fi
}

tiny() {
    n=1
    while [ -e "runs/tiny-$n" ]; do n=$((n + 1)); done
    out=runs/tiny-$n
    launch=$(launcher)
    encoder=$out/cpc/encoder.pt
    # Sec. 2.1, 4.1: pre-training
    $launch cpc.py --tiny --out "$out/cpc"
    # Table 1, A.3: linear classification
    $launch eval.py --encoder "$encoder" --out "$out/linear"
    # Fig. 1: few labels
    $launch eval.py --encoder "$encoder" --labels 0.01 0.1 1 --supervised --out "$out/labels"
    # Table 3: detection
    $launch detect.py --encoder "$encoder" random --out "$out/detect"
}

add() {  # a line of what `commands` prints and runs
    lines+="$*"$'\n'
}

commands() {  # print the lines and, with a folder of data, run them one by one
    printf '%s' "$lines"
    [ "$data" = DATA ] || { environment; bash -euc "$lines"; }
}

results() {
    printf -v data %q "$1"
    lines=""
    photos="--tiny --arch small --stem 7x7 --crop 96 --patch 32 --stride 16 --min-area 0.3"
    photos+=" --hidden 128 --target-dim 64 --lr 2e-3 --warmup 200 --batch-size 64 --epochs 144"
    # supervised rows take 2.5 times --min-steps: 900, 1800, 3600 are 2,250, 4,500 and 9,000 steps
    pixels="--crop 120 --min-area 0.3 --batch-size 32 --min-steps 1800 --epochs 10 --held-out 0.05"
    add export OMP_NUM_THREADS=1
    add "# Photos: pre-training, Table 1 (linear), Fig. 1"
    add python cpc.py $photos --bf16 --data $data/photos --out runs/photos
    add python eval.py --encoder runs/photos/encoder.pt --epochs 3 --out runs/photos-linear
    for s in 0 1 2; do
        add python eval.py --encoder runs/photos/encoder.pt --labels 0.01 --finetune-epochs 5 \
            --crop 128 --seed $s --out runs/photos-labels-1-$s
        add python eval.py --encoder runs/photos/encoder.pt --labels 0.02 0.05 0.1 --crop 128 \
            --seed $s --out runs/photos-labels-$s
        add python eval.py --head none --supervised medium --labels 0.01 0.02 0.05 0.1 --seed $s \
            $pixels --data $data/photos --out runs/photos-pixels-$s
        add python eval.py --head none --supervised medium --labels 0.01 0.1 --seed $s \
            ${pixels/1800/900} --data $data/photos --out runs/short-pixels-$s
        add python eval.py --head none --supervised medium --labels 0.01 0.1 --seed $s \
            ${pixels/1800/3600} --data $data/photos --out runs/longer-pixels-$s
        add python eval.py --encoder runs/photos/encoder.pt --labels 0.01 --finetune-epochs 5 \
            --crop 128 --held-out 0 --seed $s --out runs/only-labels-$s
        add python eval.py --head none --supervised medium --labels 0.01 --seed $s \
            ${pixels/0.05/0} --data $data/photos --out runs/only-pixels-$s
    done
    add python eval.py --encoder runs/photos/encoder.pt --labels 0.2 0.5 1 --crop 128 \
        --out runs/photos-labels-more
    add python eval.py --head none --supervised medium --labels 0.05 --sweep 4 \
        ${pixels/1800/900} --data $data/photos --out runs/short-pixels-5
    add python eval.py --head none --supervised medium --labels 0.02 0.2 0.5 1 \
        ${pixels/1800/900} --data $data/photos --out runs/photos-pixels-more
    add "# Photos' encoder on VOC 2007, Table 3, beside its architecture trained with all labels"
    add python eval.py --head none --supervised small:7x7 --labels 1 ${pixels/1800/900} \
        --data $data/photos --out runs/photos-trunk
    for s in 0 1 2; do
        add python detect.py --tiny --data $data --encoder runs/photos/encoder.pt random \
            runs/photos-trunk/small-7x7-1-seed-0.pt --side 240 --regions 64 --proposals 100 \
            --held-out 0.1 --epochs 12 --finetune-epochs 4 --lr 1e-3 --finetune-lr 3e-4 \
            --seed $s --out runs/photos-voc-$s
    done
    add "# Shapes, five seeds, 1 % of the labels; then as short as ./run.sh has it"
    pixels="--tiny --head none --supervised tiny --labels 0.01 --epochs 1 --min-steps 960"
    pixels+=" --batch-size 64 --held-out 0.05"
    for s in 0 1 2 3 4; do
        add python cpc.py --tiny --epochs 64 --seed $s --out runs/shapes-$s
        add python eval.py --encoder runs/shapes-$s/encoder.pt --seed $s --labels 0.01 \
            --min-steps 240 --finetune-epochs 4 --finetune-lr 1e-3 --out runs/shapes-labels-$s
        add python eval.py $pixels --seed $s --out runs/shapes-pixels-$s
        add python cpc.py --tiny --seed $s --out runs/short-shapes-$s
        add python eval.py --encoder runs/short-shapes-$s/encoder.pt --seed $s --labels 0.01 \
            --supervised --out runs/short-shapes-labels-$s
        add python eval.py ${pixels/960/480} --seed $s --out runs/short-shapes-pixels-$s
    done
    commands
}

variant() {  # Fig. 3 and 4: a name and one change from v2; linear, and with few labels
    add $launch cpc.py --data $data "${@:2}" --out runs/$1
    add $launch eval.py --data $data --encoder runs/$1/encoder.pt --out runs/$1-linear
    add $launch eval.py --data $data --encoder runs/$1/encoder.pt --labels 0.01 0.1 \
        --out runs/$1-labels
}

paper() {
    printf -v data %q "$1"
    printf -v voc %q "${VOC:-voc2007}"
    lines=""
    launch="torchrun --nproc_per_node=${GPUS:-8}"
    labels="0.01 0.02 0.05 0.1 0.2 0.5 1"
    v2="--data $data --encoder runs/v2/encoder.pt"
    add "# Table 1: pre-training (Sec. 4.1) and linear classification (A.3)"
    add $launch cpc.py --data $data --out runs/v2
    add $launch eval.py $v2 --out runs/v2-linear
    add "# Fig. 1, Table 5: efficient classification (Sec. 4.2), and from pixels (A.4), with as many"
    add "# recipes; of the three networks the best by held-out images counts"
    add $launch eval.py $v2 --labels $labels --sweep 8 --out runs/v2-labels
    add $launch eval.py --data $data --head none --supervised resnet50 resnet101 resnet152 \
        --labels $labels --sweep 8 --out runs/supervised
    add "# 1 % of the labels and no other: a fixed schedule, for both"
    add $launch eval.py $v2 --labels 0.01 --supervised --held-out 0 --out runs/v2-1percent
    add "# Fig. 3 and 4, v2 itself with few labels, as its variants below"
    add $launch eval.py $v2 --labels 0.01 0.1 --out runs/v2-few
    add "# Sec. 4.1: the patched encoder itself, with batch norm (66.4 %) and without (62.5 %)"
    add $launch eval.py $v2 --head none --supervised patched patched-none --out runs/patched
    add "# Table 1, CPC v1, where Fig. 3 starts"
    add $launch cpc.py --data $data --preset v1 --out runs/v1
    add $launch eval.py --data $data --encoder runs/v1/encoder.pt --out runs/v1-linear
    add "# Table 3: detection on VOC 2007 (Sec. 4.3), downloaded, or VOC=DIR"
    add "# and CPC's encoder trained with labels, above, where the paper has a ResNet-152"
    add $launch detect.py --data $voc --encoder runs/v2/encoder.pt random \
        runs/patched/patched-1-seed-0.pt --out runs/v2-voc
    add "# Fig. 3 and 4: one change from v2 at a time"
    variant norm-batch --norm batch
    variant norm-none --norm none
    variant directions-1 --directions 1
    variant directions-2 --directions 2
    variant no-color-drop --color-drop 0
    variant patch-flips --flip 0.5
    variant lengths-2-5 --lengths 2 3 4 5
    variant resnet92 --arch resnet92
    variant resnet161-narrow --arch resnet161-narrow
    variant resnet92-wide --arch resnet92-wide
    add "# Table 3, \"ResNet-101\": its first three stacks"
    add $launch detect.py --data $voc --encoder runs/resnet92/encoder.pt --out runs/resnet92-voc
    commands
}

case ${1:-tiny} in
    tiny) environment; tiny ;;
    test) environment; exec python -m pytest -q test_cpc.py "${@:2}" ;;
    results) results "${2:-DATA}" ;;
    paper) paper "${2:-DATA}" ;;
    *) echo "run.sh: $1 is none of: (nothing), test, results [DATA], paper [DATA]" >&2; exit 2 ;;
esac
