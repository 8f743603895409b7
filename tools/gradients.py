"""How hard each term of Table 4 pulls at the student's logits, with 100 and with 1,000 classes.

    python tools/gradients.py --cifar ../shared/data/cifar100 --imagenet ../shared/data/imagenet_sample
    python tools/gradients.py --cifar DIR --teacher runs/prev_cifar_res56_scratch/students/scratch

The prediction: BCE and BKL as published are means over images and classes, so their gradients are about K times smaller
than those of CE and KL, which sum over the classes. A teacher learns one batch by heart, so that it is as sure of its images
as a trained one; a student then learns the batch from labels and teacher. Told are the ratios of the gradients' norms at its
start, half-way and at the end. During a real run train.py logs the same ratio of its two terms: gradient_ratio/STUDENT.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runnable from anywhere

import data  # noqa: E402
import losses  # noqa: E402
import models  # noqa: E402
import recipe  # noqa: E402
import train  # noqa: E402
from evaluate import to_float  # noqa: E402

BATCH = 64
CASES = {  # recipe that describes the data, changes to it, teacher, student
    "cifar": ("study_fraction_weak", [], "cifar_resnet56", "cifar_resnet20"),
    "imagenet": (
        "a2_res50_beitl",
        ["data.train_size=null", "data.size=64", "data.repeats=1", "data.rand_augment=null"],
        "resnet18",
        "mobilenetv3_small_050",
    ),
}
RATIOS = (("bce", "kl"), ("ce", "kl"), ("bkl", "kl"), ("bkl", "ce"))


def norms(logits, teacher_logits, target):
    """{"ce", "bce", "kl", "bkl"}: norms of the terms' gradients in the student's logits [B, K], as in Table 4."""
    logits = logits.detach().float().requires_grad_()
    terms = {"ce": losses.cross_entropy(logits, target), "bce": losses.binary_cross_entropy(logits, target)}
    terms |= {"kl": losses.kd(logits, teacher_logits), "bkl": losses.bkl(logits, teacher_logits)}
    return {name: torch.autograd.grad(term, logits)[0].norm().item() for name, term in terms.items()}


def study(case, source, steps, teacher_folder=None):
    """Rows of one case: {"data", "classes", "step", "teacher_sure", "student_sure", "bce/kl", ...}."""
    name, changes, teacher, student = CASES[case]
    settings = recipe.load(ROOT / "recipes" / f"{name}.json", [f"data.source={json.dumps(source)}", *changes]).data
    loader = data.TrainLoader(settings, seed=0, batch_size=BATCH, batch_size_per_process=BATCH)
    images, target, _ = next(loader.batches(0, 1))
    images = to_float(images, "cpu")
    torch.manual_seed(0)
    shape = dict(classes=settings.classes, size=settings.size)
    if teacher_folder:
        taught = models.load_exported(teacher_folder)[0].eval()
    else:
        taught = models.build(teacher, **shape).train()
        learn(taught, images, steps, lambda logits: losses.cross_entropy(logits, target))
    with torch.no_grad():
        theirs = taught(images)
    network, rows = models.build(student, **shape).train(), []
    for step in (0, steps // 2, steps):
        if step:
            learn(network, images, steps // 2, lambda logits: losses.cross_entropy(logits, target) + losses.kd(logits, theirs))
        with torch.no_grad():
            logits = network(images)
        found = norms(logits, theirs, target)
        sure = {
            f"{who}_sure": round(z.softmax(1).amax(1).mean().item(), 3) for who, z in (("teacher", theirs), ("student", logits))
        }
        row = {"teacher": teacher, "student": student, "classes": settings.classes, "step": step, **sure}
        rows.append(row | {f"{a}/{b}": round(found[a] / found[b], 4) for a, b in RATIOS})
    return rows


def learn(network, images, steps, loss):
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(network(images)).backward()
        optimizer.step()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", metavar="DIR", help=f"the data of {CASES['cifar'][0]}")
    parser.add_argument("--imagenet", metavar="DIR", help=f"the data of {CASES['imagenet'][0]}")
    parser.add_argument("--teacher", metavar="DIR", help="an exported student as the teacher on CIFAR, instead of a quick one")
    parser.add_argument("--steps", type=int, default=40, help="of the teacher, and of the student (default: 40)")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write the rows there, too")
    args = parser.parse_args(arguments)
    sources = {case: getattr(args, case) for case in CASES if getattr(args, case)}
    if not sources:
        parser.error("expected --cifar DIR, --imagenet DIR or both")
    rows = []
    try:
        for case, source in sources.items():
            rows += study(case, source, args.steps, args.teacher if case == "cifar" else None)
    except (recipe.RecipeError, data.DataError, models.ModelError) as error:
        parser.error(str(error))
    print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    print("\n".join(f"| {' | '.join(map(str, row.values()))} |" for row in rows))
    if args.out:
        facts = {"rows": rows, "steps": args.steps, "batch": BATCH} | train.environment(train.make_accelerator())
        recipe.write_atomic(args.out, json.dumps(facts | {"command": shlex.join(sys.argv)}, indent=2) + "\n")


if __name__ == "__main__":
    main()
