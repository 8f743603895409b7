"""What a choice costs: time and peak memory of several ways to do a thing, measured side by side.

    python tools/bench.py losses           # every loss against its definition as the reference repositories compute it
    python tools/bench.py methods          # a training step by every method, res56 -> res20 on CIFAR-100
    python tools/bench.py dkd              # one loss alone; also kd, dist, bkl, cc, rkd, crd, reviewkd
        [--device cuda] [--rounds 5] [--threads 1] [--json FILE]

Time is the median over rounds that take them in turn, so that other work on the machine meets all; memory is the peak of one
forward and backward above what is there before it, each in a process of its own. Ratios are to the first row. The references
are written here by the formulas of vanillaKD, mdistiller, RepDistiller and DIST_KD.
"""

import argparse
import json
import multiprocessing
import os
import re
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import losses
import models
import recipe
import train

ROOT = Path(__file__).resolve().parent.parent


BATCH, CLASSES, WIDTH = 256, 1000, 2048  # the paper's batch on ImageNet, ResNet-50's width
IMAGES, NEGATIVES, DIM = 1_281_167, 16_384, 128  # of CRD on ImageNet


def literal_kd(student, teacher, target):
    log_p, p = F.log_softmax(student, dim=1), F.softmax(teacher, dim=1)
    return F.kl_div(log_p, p, reduction="none").sum(dim=1).mean()


def literal_dkd(student, teacher, target):
    """With masks, two more softmaxes and logarithms of sums."""
    own = torch.zeros_like(student).scatter_(1, target[:, None], 1).bool()

    def binary(z):
        p = F.softmax(z, dim=1)
        return torch.cat([(p * own).sum(dim=1, keepdim=True), (p * ~own).sum(dim=1, keepdim=True)], dim=1)

    target_kl = F.kl_div(binary(student).log(), binary(teacher), reduction="sum") / len(target)
    others = F.log_softmax(student - 1000.0 * own, dim=1), F.softmax(teacher - 1000.0 * own, dim=1)
    return target_kl + 2 * F.kl_div(*others, reduction="sum") / len(target)


def literal_dist(student, teacher, target):
    def correlation(a, b):
        a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
        return ((a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)).mean()

    p, q = F.softmax(student, dim=1), F.softmax(teacher, dim=1)
    return (1 - correlation(p, q)) + (1 - correlation(p.t(), q.t()))


def literal_bkl(student, teacher, target):
    return F.binary_cross_entropy_with_logits(student, F.softmax(teacher, dim=1))


class LiteralCC(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.student, self.teacher = torch.nn.Linear(WIDTH, DIM), torch.nn.Linear(WIDTH, DIM)

    def forward(self, student, teacher):
        gaps = (self.student(student) - self.teacher(teacher)).abs()
        return (gaps[:-1] * gaps[1:]).sum(dim=1).mean()


class LiteralCRD(torch.nn.Module):
    """With [B, 1 + K, D] rows copied from the banks; the negatives are there already, of whatever class."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = torch.nn.Linear(WIDTH, DIM), torch.nn.Linear(WIDTH, DIM)
        self.banks = [(2 * torch.rand(IMAGES, DIM) - 1) * (3 / DIM) ** 0.5 for _ in range(2)]

    def forward(self, student, teacher, index, sampled):
        v_s, v_t = (F.normalize(net(x)) for net, x in ((self.student, student), (self.teacher, teacher)))
        loss = 0.0
        for v, bank in ((v_s, self.banks[1]), (v_t, self.banks[0])):
            rows = bank.index_select(0, sampled.flatten()).view(*sampled.shape, DIM)
            x = (torch.bmm(rows, v[:, :, None]).squeeze(2) / 0.07).exp()
            x, noise = x / (x.detach().mean() * IMAGES), NEGATIVES / IMAGES
            positive, negative = x[:, 0] / (x[:, 0] + noise + 1e-7), noise / (x[:, 1:] + noise + 1e-7)
            loss = loss - (positive.log().sum() + negative.log().sum()) / len(v)
        with torch.no_grad():
            for v, bank in ((v_s, self.banks[0]), (v_t, self.banks[1])):
                bank.index_copy_(0, index, F.normalize(0.5 * bank[index] + 0.5 * v))
        return loss


class LiteralReviewKD(torch.nn.Module):
    """By the convolutions of losses.ReviewKD, which no algebra makes cheaper; what goes round them as in the reference."""

    def __init__(self, levels):
        super().__init__()
        self.levels = levels

    def forward(self, student, teacher):
        loss, deeper = 0.0, None
        for level, x, y in zip(self.levels, student[::-1], teacher[::-1], strict=True):
            x, y = (f[:, :, None, None] if f.ndim == 2 else f for f in (x, y))
            x = level.conv1(x)
            if deeper is not None:
                deeper = F.interpolate(deeper, x.shape[2:], mode="nearest")
                a = level.attention(torch.cat([x, deeper], dim=1)).sigmoid()
                x = x * a[:, 0].unsqueeze(1) + deeper * a[:, 1].unsqueeze(1)
            x, deeper = level.conv2(x), x
            error, weight, total = F.mse_loss(x, y), 1.0, 1.0
            for size in (4, 2, 1):
                if size < x.shape[2]:
                    weight = weight / 2
                    pooled = F.adaptive_avg_pool2d(x, (size, size)), F.adaptive_avg_pool2d(y, (size, size))
                    error, total = error + weight * F.mse_loss(*pooled), total + weight
            loss = loss + error / total
        return loss


class Made:
    """A module that is made when it is first called: in the process that measures its memory, before the measure."""

    def __init__(self, make, device):
        self.make, self.device, self.module = make, device, None

    def __call__(self, *inputs):
        if self.module is None:
            torch.manual_seed(0)
            self.module = self.make().to(self.device)
        self.module.zero_grad()
        return self.module(*inputs)


def on_logits(ours, literal):
    """A section for a loss on logits."""

    def section(device):
        def inputs():
            student, teacher = (3 * torch.randn(BATCH, CLASSES, device=device) for _ in range(2))
            return student.requires_grad_(), teacher, torch.randint(CLASSES, (BATCH,), device=device)

        title = f"{ours.__name__} forward and backward, logits {BATCH} x {CLASSES}, float32"
        return title, {f"losses.{ours.__name__}": ours, "reference": literal}, inputs

    return section


def cc(device):
    one = [(WIDTH,)]
    return (
        f"CC forward and backward, features {BATCH} x {WIDTH}, float32",
        {"losses.CC": Made(lambda: PooledInputs(losses.CC(one, one)), device), "reference": Made(LiteralCC, device)},
        lambda: (torch.randn(BATCH, WIDTH, device=device, requires_grad=True), torch.randn(BATCH, WIDTH, device=device)),
    )


class PooledInputs(torch.nn.Module):
    """A loss on features that gets two pooled vectors, and CRD the ids; the reference's list of negatives is left out."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, student, teacher, index=None, sampled=None):
        return self.loss([student], [teacher], None, index)


def crd(device):
    batch = 32
    return (
        f"CRD forward and backward, features {batch} x {WIDTH}, K = {NEGATIVES:,}, {IMAGES:,} images, float32",
        {"losses.CRD": Made(lambda: PooledInputs(make_crd()), device), "reference": Made(LiteralCRD, device)},
        lambda: (
            torch.randn(batch, WIDTH, device=device, requires_grad=True),
            torch.randn(batch, WIDTH, device=device),
            torch.randperm(IMAGES, device=device)[:batch],
            torch.randint(IMAGES, (batch, 1 + NEGATIVES), device=device),
        ),
    )


def make_crd():
    return losses.CRD([(WIDTH,)], [(WIDTH,)], torch.arange(IMAGES) % CLASSES)


def reviewkd(device):
    batch = 4
    shapes = [(256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7), (2048,)]  # of ResNet-50 and of ResNet-152

    def make(literal):
        ours = losses.ReviewKD(shapes, shapes)
        module = LiteralReviewKD(ours.levels) if literal else ours
        return Levels(module, len(shapes))

    return (
        f"ReviewKD forward and backward, ResNet-152 to ResNet-50, B = {batch}, float32",
        {"losses.ReviewKD": Made(lambda: make(False), device), "reference": Made(lambda: make(True), device)},
        lambda: (
            *(torch.randn(batch, *s, device=device, requires_grad=True) for s in shapes),
            *(torch.randn(batch, *s, device=device) for s in shapes),
        ),
    )


class Levels(torch.nn.Module):
    def __init__(self, loss, n):
        super().__init__()
        self.loss, self.n = loss, n

    def forward(self, *maps):
        return self.loss(list(maps[: self.n]), list(maps[self.n :]))


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
    ours = losses.RKD([(WIDTH,)], [(WIDTH,)])
    return (
        f"RKD forward and backward, features {BATCH} x {WIDTH}, float32",
        {"losses.RKD": lambda s, t: ours([s], [t]), "reference": literal_rkd},
        lambda: (torch.randn(BATCH, WIDTH, device=device, requires_grad=True), torch.randn(BATCH, WIDTH, device=device)),
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


LOGITS = {"kd": literal_kd, "dkd": literal_dkd, "dist": literal_dist, "bkl": literal_bkl}
PAIRS = {name: on_logits(losses.LOSSES[name], literal) for name, literal in LOGITS.items()}
PAIRS |= {"cc": cc, "rkd": rkd, "crd": crd, "reviewkd": reviewkd}
SECTIONS = {"methods": methods, **PAIRS}


def step(function, inputs):
    """One forward and backward: (the loss, its seconds)."""
    start = time.perf_counter()
    loss = function(*inputs)
    loss.backward()
    if loss.is_cuda:
        torch.cuda.synchronize()
    inputs[0].grad = None
    return loss.item(), time.perf_counter() - start


def median_step(function, inputs, least=0.1):
    """`step`, again and again for `least` seconds: a step of two milliseconds alone is mostly chance."""
    taken = [step(function, inputs)]
    while sum(seconds for _, seconds in taken) < least:
        taken.append(step(function, inputs))
    return taken[0][0], statistics.median(seconds for _, seconds in taken)


def peak(section, name, device):
    """MB that a step needs above its inputs: of the allocator on a GPU, of the whole process on a CPU."""
    _, functions, make_inputs = SECTIONS[section](device)
    inputs = make_inputs()
    step(functions[name], [x[:4].detach().requires_grad_(x.requires_grad) for x in inputs])  # libraries load at first use
    if device == "cpu":
        before = resident_kb("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: making a module can have needed more than a step
        step(functions[name], inputs)
        return (resident_kb("VmHWM") - before) / 1024
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(functions[name], inputs)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def resident_kb(what):
    return int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def measure(section, device, rounds):
    """{"title", "rounds", "rows": [{"name", "loss", "seconds", "peak_mb", "kept_mb"}]}."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # of the children: glibc's heap keeps, by chance, what a step has freed
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # before this process grows: it is inherited
        title, functions, make_inputs = SECTIONS[section](device)
        memory = {name: pool.apply(peak, (section, name, device)) for name in functions}
    inputs = make_inputs()
    steps = [{name: median_step(function, inputs) for name, function in functions.items()} for _ in range(rounds + 1)][1:]
    rows = []
    for name in functions:
        seconds = statistics.median(taken[name][1] for taken in steps)
        kept = functions[name].kept() / 2**20 if hasattr(functions[name], "kept") else 0.0
        row = {"name": name, "loss": steps[0][name][0], "seconds": seconds, "peak_mb": memory[name], "kept_mb": kept}
        rows.append(row)
    return {"title": title, "rounds": rounds, "rows": rows}


def measure_pairs(device, rounds):
    """{"title", "rounds", "losses": {name: what `measure` gives}, "crd_setup_seconds"}."""
    result = {"title": "losses beside their references", "rounds": rounds, "losses": {}, "crd_setup_seconds": []}
    for name in PAIRS:
        result["losses"][name] = measure(name, device, rounds)
    for _ in range(3):
        start = time.perf_counter()
        make_crd()
        result["crd_setup_seconds"].append(time.perf_counter() - start)
    return result


def show_pairs(result):
    print(f"{'':10}{'ms':>10}{'reference':>11}{'times':>7}{'peak MB':>9}{'reference':>11}{'share':>7}")
    for name, pair in result["losses"].items():
        ours, reference = pair["rows"]
        times, share = reference["seconds"] / ours["seconds"], ours["peak_mb"] / max(reference["peak_mb"], 1e-9)
        print(
            f"{name:10}{1000 * ours['seconds']:10.2f}{1000 * reference['seconds']:11.2f}{times:7.2f}{ours['peak_mb']:9.0f}"
            f"{reference['peak_mb']:11.0f}{share:7.2f}"
        )
    print(f"to make CRD for {IMAGES:,} images: {statistics.median(result['crd_setup_seconds']):.2f} s")


def show(result):
    print(f"{'':16}{'loss':>12}{'ms':>10}{'times':>8}{'peak MB':>10}{'times':>8}{'kept MB':>10}")
    first = result["rows"][0]
    for row in result["rows"]:
        times, memory = row["seconds"] / first["seconds"], row["peak_mb"] / max(first["peak_mb"], 1e-9)
        print(
            f"{row['name']:16}{row['loss']:12.6f}{1000 * row['seconds']:10.1f}{times:8.2f}{row['peak_mb']:10.0f}{memory:8.1f}"
            f"{row['kept_mb']:10.1f}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=["losses", *SECTIONS])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    every = args.section == "losses"
    result = measure_pairs(args.device, args.rounds) if every else measure(args.section, args.device, args.rounds)
    result |= {"threads": args.threads, "tool": shlex.join(sys.argv), **train.environment(train.make_accelerator())}
    del result["command"]
    machine = f"{args.device}, {args.threads} threads" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"{result['title']}; {machine}, torch {torch.__version__}, median of {args.rounds} rounds")
    (show_pairs if every else show)(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
