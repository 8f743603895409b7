"""What a training step costs beside other people's loops for the same work, and what the process around it costs.

    python tools/bench_step.py cifar       # res56 -> res20 at batch 64: mdistiller's loop, ours, ours compiled
    python tools/bench_step.py imagenet    # resnet34 -> resnet18 at 224, batch 8: vanillaKD's loop, timm's task, ours
    python tools/bench_step.py beitb       # BEiTv2-B -> ResNet-50 at batch 256 in bf16 (and beitl): for a GPU
    python tools/bench_step.py overhead    # next to no arithmetic: what our loop adds to a plain one
    python tools/bench_step.py startup     # seconds from the command to the first step, and the imports that take them
    python tools/bench_step.py memory      # resident size over thousands of steps
        [--rounds 7] [--steps 4] [--threads 1] [--device cuda] [--ways NAME ...] [--json FILE]

Every way lives in a process of its own, and they take turns; the figures are medians over rounds, the ratios medians of the
ratios within a round. On a CPU the time is that of the process, so that other work on the machine disturbs little; on a GPU
it is the wall's. The batch is made up and already on the device: loaders have benchmarks of their own.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import re
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timm.task
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import models
import recipe
import train

ROOT = Path(__file__).resolve().parent.parent
COMPILED = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}
CUDA_GRAPHS = COMPILED | {"ACCELERATE_DYNAMO_MODE": "reduce-overhead"}


@dataclasses.dataclass(frozen=True)
class Work:
    """A step of student kd of a recipe, on one batch."""

    recipe: str
    teacher: str
    student: str
    batch: int
    size: int
    optimizer: str
    bf16: bool = False


WORK = {
    "cifar": Work("prev_cifar_res20_res56", "cifar_resnet56", "cifar_resnet20", 64, 32, "momentum"),
    "imagenet": Work("strong_res18_res34", "resnet34", "resnet18", 8, 224, "lamb"),
    "beitb": Work("a1_res50_beitb", "beitv2_base_patch16_224", "resnet50", 256, 224, "lamb", True),
    "beitl": Work("a1_res50_beitl", "beitv2_large_patch16_224", "resnet50", 256, 224, "lamb", True),
    "overhead": Work("prev_cifar_res20_res56", "tiny", "tiny", 64, 8, "momentum"),
    "memory": Work("prev_cifar_res20_res56", "cifar_resnet8", "cifar_resnet8", 8, 32, "momentum"),
}


class Tiny(nn.Module):
    """One matrix."""

    def __init__(self):
        super().__init__()
        self.model = nn.Linear(3 * 8 * 8, 100)

    def forward(self, images):
        return self.model(images.flatten(1))


def network(name, settings, work):
    return Tiny() if name == "tiny" else models.build(name, classes=settings.data.classes, size=work.size)


class Repeated:
    """What train.py asks of a loader, with one batch again and again."""

    steps_per_epoch, accumulate, workers, broken, split = 10**9, 1, 0, {}, None

    def __init__(self, images, labels):
        self.batch, self.batch_size = (images, labels, torch.arange(len(images), device=images.device)), len(images)

    def batches(self, *_):
        return iter(lambda: self.batch, None)


def a_batch(settings, work, device):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (work.batch, 3, work.size, work.size), generator=generator, dtype=torch.uint8)
    return images.to(device), torch.randint(settings.data.classes, (work.batch,), generator=generator).to(device)


def ours(settings, work, device):
    """train.train itself, with nothing to evaluate or to save."""
    teacher = network(work.teacher, settings, work).to(device).eval().requires_grad_(False)
    teacher = teacher if work.teacher == "tiny" else models.freeze(teacher, work.size)
    train.make_loaders = lambda *_: (Repeated(*a_batch(settings, work, device)), None)
    train.restore = train.save = lambda run: None
    models.build = lambda name, **_: network(work.student, settings, work)
    plain = dataclasses.replace(settings.data, mixup=0.0, cutmix=0.0, random_erasing=0.0)  # as the others
    settings = dataclasses.replace(settings, data=plain, epochs=1, log_every=10**9, save_every=10**9)
    run = train.make_run(settings, Path(tempfile.mkdtemp()), teacher, train.Options(None, None, None, False, False, 0))

    def advance(steps):
        run.limit = run.step + steps
        train.train(run)

    return advance


def theirs(settings, work, device, *, layout=torch.contiguous_format, task=False, compiled=False, reads=False):
    """A plain loop as other repositories write it, or timm's task; `reads`: the loss and accuracies of every step."""
    nets = [network(name, settings, work) for name in (work.student, work.teacher)]
    student, teacher = (getattr(net, "model", net) if work.student != "tiny" else net for net in nets)
    student = student.to(device).to(memory_format=layout).train()
    teacher = teacher.to(device).to(memory_format=layout).eval().requires_grad_(False)
    optimizer = create_optimizer_v2(student, opt=work.optimizer, lr=0.05, weight_decay=5e-4, momentum=0.9)
    images, labels = a_batch(settings, work, device)
    mean, std = (torch.full((1, 3, 1, 1), value, device=device) for value in (0.45, 0.25))
    if task:
        task = timm.task.LogitDistillationTask(student, timm.task.DistillationTeacher(teacher, device=device), temperature=4.0)
        task.device = torch.device(device)
        if compiled:
            task.compile()

    def loss_and_logits(inputs):
        if task:
            found = task(inputs, labels)
            return found["loss"], found["output"]
        logits = student(inputs)
        with torch.no_grad():
            taught = teacher(inputs)
        log_p, p = F.log_softmax(logits / 4, dim=1), F.softmax(taught / 4, dim=1)
        return 0.1 * F.cross_entropy(logits, labels) + 0.9 * 16 * F.kl_div(log_p, p, reduction="batchmean"), logits

    def advance(steps):
        for _ in range(steps):
            inputs = ((images.float() / 255 - mean) / std).contiguous(memory_format=layout)
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=work.bf16):
                loss, logits = loss_and_logits(inputs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if reads:
                top = logits.topk(5)[1].eq(labels[:, None])
                loss.item(), top[:, :1].float().mean().item(), top.any(dim=1).float().mean().item()

    return advance


LAST = dict(layout=torch.channels_last)
TIMM = {
    "timm's task, channels-last": (theirs, dict(task=True, **LAST), {}),
    "timm's task, compiled": (theirs, dict(task=True, compiled=True, **LAST), {}),
}
OURS = {"ours": (ours, {}, {}), "ours, compiled": (ours, {}, COMPILED)}
GRAPHS = {"ours, CUDA graphs": (ours, {}, CUDA_GRAPHS)}
WAYS = {
    "cifar": {"mdistiller's loop": (theirs, dict(reads=True), {}), **OURS, **GRAPHS},
    "imagenet": {"vanillaKD's loop": (theirs, dict(reads=True), {}), **TIMM, **OURS},
    "beitb": {**TIMM, **OURS},
    "beitl": {**TIMM, **OURS},
    "overhead": {"a plain loop": (theirs, {}, {}), "ours": (ours, {}, {})},
    "memory": {"ours": (ours, {}, {})},
}


def serve(connection, section, way, device, threads):
    """A process of one way: it is asked for a number of steps, and answers with the seconds that one took."""
    make, arguments, environment = WAYS[section][way]
    os.environ |= {"TQDM_DISABLE": "1"} | environment | ({"ACCELERATE_USE_CPU": "true"} if device == "cpu" else {})
    os.environ |= {"ACCELERATE_MIXED_PRECISION": "bf16"} if WORK[section].bf16 else {}
    torch.set_num_threads(threads)
    work, clock = WORK[section], time.process_time if device == "cpu" else time.perf_counter
    settings = recipe.load(ROOT / "recipes" / f"{work.recipe}.json")
    (student,) = (s for s in settings.students if s.name == "kd")
    settings = dataclasses.replace(settings, students=(student,), batch_size=work.batch, batch_size_per_process=work.batch)
    advance = make(settings, work, device, **arguments)
    while steps := connection.recv():
        start = clock()
        advance(steps)
        if device != "cpu":
            torch.cuda.synchronize()
        connection.send(((clock() - start) / steps, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def open_ways(section, args):
    """{way: connection to its process}, warm."""
    context, connections = multiprocessing.get_context("spawn"), {}
    for way in args.ways or [w for w in WAYS[section] if w not in GRAPHS or args.device != "cpu"]:
        here, there = context.Pipe()
        context.Process(target=serve, args=(there, section, way, args.device, args.threads), daemon=True).start()
        there.close()
        here.send(3)  # compiles; libraries load at first use
        here.recv()
        connections[way] = here
    return connections


def compare(section, args):
    """{"rows": [{"name", "ms", "images_per_second", "ratio"}]}, ratio of the first way's time to this one's."""
    connections, rounds = open_ways(section, args), []
    for _ in range(args.rounds):
        taken = {}
        for way, connection in connections.items():
            connection.send(args.steps)
            taken[way] = connection.recv()[0]
        rounds.append(taken)
    first, rows = next(iter(connections)), []
    for way in connections:
        seconds = statistics.median(taken[way] for taken in rounds)
        ratio = statistics.median(taken[first] / taken[way] for taken in rounds)
        rows.append(dict(name=way, ms=1000 * seconds, images_per_second=WORK[section].batch / seconds, ratio=ratio))
    print(f"{'':28}{'ms a step':>12}{'images/s':>12}{'ratio':>8}")
    for row in rows:
        print(f"{row['name']:28}{row['ms']:12.3f}{row['images_per_second']:12.1f}{row['ratio']:8.2f}")
    result = {"work": dataclasses.asdict(WORK[section]), "rows": rows}
    if section == "overhead":
        result["overhead_us"] = 1e6 * statistics.median(t["ours"] - t["a plain loop"] for t in rounds)
        print(f"our loop adds {result['overhead_us']:.0f} us a step")
    return result


def startup(args):
    """Seconds until train.py has trained a step of the quickstart, and the largest imports' own share of them."""
    command = [sys.executable, "-X", "importtime", "train.py", "recipes/quickstart_teacher.json", "--limit", "1"]
    seconds, imports = [], {}
    for i in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            out = subprocess.run([*command, "--out", f"{folder}/{i}"], cwd=ROOT, capture_output=True, text=True, check=True)
            seconds.append(time.perf_counter() - start)
        for own, name in re.findall(r"import time:\s+(\d+) \|\s+\d+ \| \s*([\w.]+)", out.stderr):
            imports.setdefault(name.split(".")[0], {}).setdefault(i, []).append(int(own))
    totals = {name: statistics.median(sum(v) / 1e6 for v in runs.values()) for name, runs in imports.items()}
    largest = dict(sorted(totals.items(), key=lambda item: -item[1])[:12])
    print(f"{statistics.median(seconds):.1f} s from the command to the end of a run of one step; imports, own seconds:")
    print("  " + ", ".join(f"{name} {value:.2f}" for name, value in largest.items()))
    return {"seconds": statistics.median(seconds), "imports": largest}


def memory(args):
    """Peak resident size, in MB, after every thousand steps."""
    (connection,) = open_ways("memory", args).values()
    sizes = []
    for _ in range(args.rounds):
        connection.send(1000)
        sizes.append(connection.recv()[1])
        print(f"after {1000 * len(sizes)} steps: {sizes[-1]:.0f} MB", flush=True)
    return {"steps": 1000, "peak_resident_mb": sizes}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=[*WAYS, "startup"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="of a way before the next one's turn")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--ways", nargs="+", metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if unknown := set(args.ways or ()).difference(WAYS.get(args.section, ())):
        parser.error(f"--ways {', '.join(unknown)}: {args.section} has {', '.join(WAYS.get(args.section, ()))}")
    result = {"startup": startup, "memory": memory}.get(args.section, lambda args: compare(args.section, args))(args)
    result |= {"section": args.section, "rounds": args.rounds, "steps": args.steps, "threads": args.threads}
    result |= {"tool": shlex.join(sys.argv), **train.environment(train.make_accelerator())}
    del result["command"]
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
