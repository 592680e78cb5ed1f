#!/usr/bin/env bash
# The table of contents of the experiments, in the paper's order.
#
#   ./run.sh              tiny scale, end to end, on the embedded data set: two CPU cores, under ten minutes in float32
#   ./run.sh test         the tests
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

paper() {
    data=${1:-DATA}
    go() {
        echo "$@"
        [ "$data" = DATA ] || "$@"
    }
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
    fig3() {
        name=$1; shift
        go $launch cpc.py --data "$data" --out "runs/$name" --resume "$@"
        go $launch eval.py --data "$data" --encoder "runs/$name/encoder.pt" --out "runs/$name-linear" --resume
        go $launch eval.py --data "$data" --encoder "runs/$name/encoder.pt" --labels 0.01 0.1 --out "runs/$name-labels" --resume
    }
    fig3 norm-batch --norm batch                  # LN
    fig3 norm-none --norm none
    fig3 directions-1 --directions 1              # down only
    fig3 directions-2 --directions 2              # 2 of 4: without HP
    fig3 lengths-2-5 --lengths 2 3 4 5            # TL: the original lengths
    fig3 no-color-drop --color-drop 0             # RC
    fig3 patch-flips --flip 0.5                   # HF
    fig3 resnet92 --arch resnet92                 # capacity
    go $launch detect.py --data "${VOC:-voc2007}" --encoder runs/resnet92/encoder.pt --out runs/resnet92-voc --resume  # Table 3, "ResNet-101"
    fig3 deeper --arch resnet161-deep             # Fig. 4, right
    fig3 wider --arch resnet161-wide
}

case ${1:-tiny} in
    tiny) environment; tiny ;;
    test) environment; exec "$python" -m pytest -q test_cpc.py "${@:2}" ;;
    paper) paper "${2:-DATA}" ;;
    *) echo "run.sh: ${1} is none of: (nothing), test, paper [DATA]" >&2; exit 2 ;;
esac
