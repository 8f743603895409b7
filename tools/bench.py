"""What a choice costs: time and peak memory of several ways to do a thing, measured side by side.

    python tools/bench.py rkd              # losses.RKD against [B, B, D] tensors
    python tools/bench.py methods          # a training step by every method, res56 -> res20 on CIFAR-100
        [--device cuda] [--rounds 5] [--threads 1] [--json FILE]

Time is the median over rounds that take them in turn, so that other work on the machine meets all; memory is the peak of one
forward and backward above what is there before it, each in a process of its own. Ratios are to the first row.
"""

import argparse
import json
import multiprocessing
import resource
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import losses
import models
import recipe

ROOT = Path(__file__).resolve().parent.parent


def literal_rkd(student, teacher):
    """losses.RKD as its definition reads, and as the reference repositories compute it: with [B, B, D] tensors."""

    def relations(x):
        gaps = x[:, None] - x
        distance = gaps.norm(dim=2)
        unit = F.normalize(gaps, dim=2)
        return distance / distance[distance > 0].mean(), unit @ unit.transpose(1, 2)

    with torch.no_grad():
        teacher = relations(teacher)
    distance, angle = map(F.smooth_l1_loss, relations(student), teacher)
    return 25 * distance + 50 * angle


def rkd(device):
    """RKD at the paper's batch and ResNet-50's width: (what it is, the two by name, a maker of their inputs)."""
    batch, width = 256, 2048
    ours = losses.RKD([(width,)], [(width,)])
    return (
        f"RKD forward and backward, B = {batch}, D = {width}, float32",
        {"losses.RKD": lambda s, t: ours([s], [t]), "[B, B, D]": literal_rkd},
        lambda: (torch.randn(batch, width, device=device, requires_grad=True), torch.randn(batch, width, device=device)),
    )


def methods(device):
    """A step of the classic CIFAR-100 recipes but for the optimizer: teacher forward, student forward and backward."""
    files = ("prev_cifar_res20_res56", "prev_cifar_res20_res56_hints")
    students = {s.name: s for file in files for s in recipe.load(ROOT / "recipes" / f"{file}.json").students}
    return (
        "a training step without the optimizer, cifar_resnet56 -> cifar_resnet20, B = 64, 50,000 images, float32",
        {name: Method(student, device) for name, student in students.items()},
        lambda: (
            torch.rand(64, 3, 32, 32, device=device),
            torch.randint(100, (64,), device=device),
            torch.randperm(50_000, device=device)[:64],
        ),
    )


class Method:
    """One student's step; built when it is first called, so that each has a process to itself for the measure of memory."""

    def __init__(self, student, device):
        self.student, self.device, self.module = student, device, None

    def build(self):
        shape, soft = dict(classes=100, size=32), self.student.soft
        self.teacher = models.build("cifar_resnet56", **shape).to(self.device).eval()
        network, loss, taps = models.build(self.student.model, **shape), losses.make_loss(soft.loss, **soft.args), None
        if isinstance(losses.LOSSES[soft.loss], type):
            taps = network.default_taps()
            loss = loss(network.shapes(32, taps), self.teacher.shapes(32, taps), torch.arange(50_000) % 100)
        module = models.Distilled(network, losses.cross_entropy, loss, self.student.hard.weight, taps)
        self.module = module.to(self.device).train()

    def __call__(self, images, target, index):
        if self.module is None:
            self.build()
        self.module.zero_grad()
        with torch.no_grad():
            taught = self.teacher(images, self.module.taps) if self.module.taps else (self.teacher(images), None)
        return self.module(images, taught, target, index, self.student.soft.weight)["loss"]

    def kept(self):
        """Bytes that the loss keeps between steps: parameters with gradient and momentum, and its memory."""
        if not self.module.taps:
            return 0
        own = self.module.soft
        return sum(3 * p.nbytes for p in own.parameters()) + sum(b.nbytes for b in own.buffers())


SECTIONS = {"rkd": rkd, "methods": methods}


def step(function, inputs):
    """One forward and backward: (the loss, its seconds)."""
    start = time.perf_counter()
    loss = function(*inputs)
    loss.backward()
    if loss.is_cuda:
        torch.cuda.synchronize()
    inputs[0].grad = None
    return loss.item(), time.perf_counter() - start


def peak(section, name, device):
    """MB that a step needs above its inputs: of the allocator on a GPU, of the whole process on a CPU."""
    _, functions, make_inputs = SECTIONS[section](device)
    inputs = make_inputs()
    step(functions[name], [x[:4].detach().requires_grad_(x.requires_grad) for x in inputs])  # libraries load at first use
    if device == "cpu":
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step(functions[name], inputs)
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(functions[name], inputs)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(section, device, rounds):
    """{"title", "rounds", "rows": [{"name", "loss", "seconds", "peak_mb", "kept_mb"}]}."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # before this process grows: it is inherited
        title, functions, make_inputs = SECTIONS[section](device)
        memory = {name: pool.apply(peak, (section, name, device)) for name in functions}
    inputs = make_inputs()
    steps = [{name: step(function, inputs) for name, function in functions.items()} for _ in range(rounds + 1)][1:]
    rows = []
    for name in functions:
        seconds = statistics.median(taken[name][1] for taken in steps)
        kept = functions[name].kept() / 2**20 if hasattr(functions[name], "kept") else 0.0
        row = {"name": name, "loss": steps[0][name][0], "seconds": seconds, "peak_mb": memory[name], "kept_mb": kept}
        rows.append(row)
    return {"title": title, "rounds": rounds, "rows": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    result = measure(args.section, args.device, args.rounds)
    machine = f"{args.device}, {args.threads} threads" if args.device == "cpu" else torch.cuda.get_device_name()
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    result |= {"command": shlex.join(sys.argv), "commit": commit, "machine": machine, "torch": torch.__version__}
    print(f"{result['title']}; {machine}, torch {torch.__version__}, median of {args.rounds} rounds")
    print(f"{'':16}{'loss':>12}{'ms':>10}{'times':>8}{'peak MB':>10}{'times':>8}{'kept MB':>10}")
    first = result["rows"][0]
    for row in result["rows"]:
        times, memory = row["seconds"] / first["seconds"], row["peak_mb"] / first["peak_mb"]
        print(
            f"{row['name']:16}{row['loss']:12.6f}{1000 * row['seconds']:10.1f}{times:8.2f}{row['peak_mb']:10.0f}{memory:8.1f}"
            f"{row['kept_mb']:10.1f}"
        )
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
