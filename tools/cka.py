"""How alike the layers of two networks are: minibatch linear CKA between all of them, as JSON and a heat map (Figure 2).

    python tools/cka.py runs/prev_cifar_res56_scratch runs/prev_cifar_res20_res56/students/kd --out results/cka_res56_res20 \\
        --recipe recipes/prev_cifar_res20_res56.json --data ../shared/data/cifar100
    python tools/cka.py resnet152.a1h_in1k resnet50.a1_in1k --recipe recipes/a1_res50_res152.json --data DIR --out FILE

A model is a folder of an exported student, a run's folder with one student, a timm tag ("resnet50.a1_in1k": pretrained
weights), a timm name (random weights: what the architecture alone gives) or NAME=FILE, a checkpoint of a timm model.

Nguyen et al. 2021, "Do wide and deep networks learn the same things?", equations 2 to 4: the unbiased HSIC of Song et al.
2012, summed over minibatches. A layer is the output of a module, in order of execution, one for each tensor: a residual
block counts; a container that hands on its last child's output, identities, dropout and flattening do not, nor does what
has not the batch first (Swin's windows). The paper says "layer indexes" only; torch_cka, with which such maps are drawn,
takes every module, so that the end of a stage counts three times.
"""

import argparse
import dataclasses
import functools
import json
import math
import shlex
import sys
import types
from pathlib import Path

import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent))
import report

import data
import evaluate
import models
import recipe
import train

SEED = 0  # of the images drawn from the test split, and of random weights
WANTED = "an exported student, a run's folder, a timm name or tag, or NAME=FILE"
HANDS_ON = (nn.Identity, nn.Dropout, nn.Flatten)
CONSTANT = 1e-6  # a layer that varies by less than this share of its size over images is rounding


# ---------------------------------------------------------------- the measure


def centered_gram(features):
    """Features [B, ...] -> [B, B] float64 with zero diagonal: inner products of images, centred for the unbiased HSIC.

    The rows sum to 0 as in Szekely and Rizzo 2014, so that HSIC_1(K, L) = <K, L> / (B (B - 3)), which is Song et al.'s
    formula without its differences of large numbers. B of at least 4.
    """
    x = features.flatten(1).float()
    x = x - x.mean(0)  # changes nothing but the rounding
    gram = (x @ x.T).double().fill_diagonal_(0)
    n = len(gram)
    rows = gram.sum(1) / (n - 2)
    gram = gram - rows - rows[:, None] + gram.sum() / ((n - 1) * (n - 2))
    return gram.fill_diagonal_(0)


@torch.no_grad()
def layers(network, images):
    """(names of the layers in order of execution, centred Gram matrices [layers, B, B], sizes [layers]) of images [B, ...].

    A Gram matrix is taken where its layer runs, so that no feature map outlives its use and none is seen after a ReLU in
    place. A module that runs again has a number; sizes are mean squared norms of an image's features.
    """
    seen, last = [], (None, None)

    def see(name, module, inputs, output):
        nonlocal last
        if not isinstance(output, torch.Tensor) or output.dim() < 2 or len(output) != len(images):
            return
        if output is last[0] and output._version == last[1]:  # an activation in place is a layer with the tensor of the last
            return
        last = output, output._version
        size = output.flatten(1).float().norm(dim=1).double().square().mean()
        seen.append((name, centered_gram(output), size))

    named = [(name, module) for name, module in network.named_modules() if name and not isinstance(module, HANDS_ON)]
    hooks = [module.register_forward_hook(functools.partial(see, name)) for name, module in named]
    try:
        network(images)
    finally:
        for hook in hooks:
            hook.remove()
    names, grams, sizes = zip(*seen, strict=True)
    numbered = [f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]
    return [name.removeprefix("model.") for name in numbered], torch.stack(grams), torch.stack(sizes)


def cka(network_a, network_b, batches):
    """(names of a's layers, of b's, [layers of a, layers of b] float64 in [-1, 1]) over batches [B, 3, H, W] in [0, 1].

    Memory: a batch's Gram matrices and three sums, whatever the number of images. NaN where a layer says the same of every
    image. ModelError for features that are not finite and for a batch of fewer than 4 images.
    """
    modes = network_a.training, network_b.training
    network_a.eval(), network_b.eval()
    cross = own_a = own_b = size_a = size_b = 0
    for images in batches:
        if len(images) < 4:
            raise models.ModelError(f"a batch of {len(images)} images: the unbiased HSIC needs 4 or more")
        (names_a, a, norms_a), (names_b, b, norms_b) = layers(network_a, images), layers(network_b, images)
        pairs = len(images) * (len(images) - 3)
        cross = cross + a.flatten(1) @ b.flatten(1).T / pairs
        own_a, own_b = own_a + a.square().sum((1, 2)) / pairs, own_b + b.square().sum((1, 2)) / pairs
        size_a, size_b = size_a + norms_a**2, size_b + norms_b**2
    network_a.train(modes[0])
    network_b.train(modes[1])
    for names, own in ((names_a, own_a), (names_b, own_b)):
        if broken := [name for name, value in zip(names, own.tolist(), strict=True) if not math.isfinite(value)]:
            raise models.ModelError(f"features that are not finite at {', '.join(broken[:5])}: the network has diverged")
    own_a, own_b = own_a.where(own_a > CONSTANT**4 * size_a, torch.nan), own_b.where(own_b > CONSTANT**4 * size_b, torch.nan)
    return names_a, names_b, cross / (own_a.sqrt()[:, None] * own_b.sqrt())


# ---------------------------------------------------------------- models and images


def load(model, section):
    """(network, what it is) of a model as the command line names it."""
    if Path(model).is_dir():
        students = evaluate._students(Path(model))
        if len(students) > 1:
            raise models.ModelError(f"{model}: several students: name one of {', '.join(map(str, students))}")
        network, config = models.load_exported(students[0])
        network.size = own if (own := config["input_size"][-1]) != section.size else None
        place = students[0].resolve()
        run = place.parent.parent.name if place.parent.name == "students" else place.parent.name
        return network, f"{config['architecture']} ({run}/{place.name})"
    name, _, file = model.partition("=")
    if not timm.is_model(name):
        raise models.ModelError(f"{model}: expected {WANTED}")
    build = dict(classes=section.classes, size=section.size)
    if file:
        return models.build(name, checkpoint=file, **build), model
    if "." not in name:
        torch.manual_seed(SEED)
        return models.build(name, **build), f"{name}, random weights"
    config = models.pretrained_config(name)
    build["classes"] = config["num_classes"]  # the head is a layer, too, and need not know these classes
    own = config["input_size"][-1]
    return models.build(name, pretrained=True, resize=own if own != section.size else None, **build), name


def section_of(args):
    """Which images, and how they are prepared: of --recipe, else of the run that trained model A, else --data in its way."""
    beside = Path(args.model_a) if Path(args.model_a).is_dir() else None
    paths = (
        [args.recipe]
        if args.recipe
        else [folder / "recipe.json" for folder in (beside, beside.parent.parent)]
        if beside
        else []
    )
    if found := next((path for path in paths if args.recipe or path.is_file()), None):
        section = recipe.load(found).data
        return dataclasses.replace(section, streaming=False, shuffle_buffer=0, source=args.data or section.source)
    if not args.data:
        raise data.DataError(f"{args.model_a}: nothing says which images to use: name a --recipe, or --data")
    name = args.model_a.partition("=")[0]
    config = models.load_exported(evaluate._students(beside)[0])[1] if beside else timm.get_pretrained_cfg(name).to_dict()
    described = data.describe(args.data) | {"streaming": False, "source": args.data, "size": config["input_size"][-1]}
    return types.SimpleNamespace(**described, crop_pct=config["crop_pct"], interpolation=config["interpolation"])


def image_loader(section, images, batch, workers):
    """`images` of the test split in whole batches, drawn by SEED because a split can be sorted by class.

    DataError where there is no whole batch.
    """
    dataset = data.test_loader(section, batch_size=batch).dataset
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(SEED))[:images].tolist()
    if len(chosen) < batch:
        raise data.DataError(f"{section.source}: {len(chosen)} images do not fill one batch of {batch}: lower --batch")
    return DataLoader(Subset(dataset, chosen), batch, num_workers=workers, drop_last=True)


# ---------------------------------------------------------------- command line


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_a", metavar="MODEL_A", help=WANTED)
    parser.add_argument("model_b", metavar="MODEL_B", help="the same")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="writes FILE.json and FILE.svg")
    parser.add_argument("--recipe", metavar="FILE", help="whose test images to use (default: of the run that trained MODEL_A)")
    parser.add_argument("--data", help="folder of the data set or its name on the hub (default: the recipe's)")
    parser.add_argument("--images", type=int, default=2048, help="drawn from the test split (default: 2048)")
    parser.add_argument("--batch", type=int, default=256, help="images a minibatch (default: 256)")
    parser.add_argument("--workers", type=int, default=2, help="loader processes (default: 2)")
    args = parser.parse_args(arguments)
    accelerator = train.make_accelerator()
    try:
        result = compare(args, accelerator)
    except (recipe.RecipeError, data.DataError, models.ModelError) as error:
        parser.exit(2, f"error: {error}\n")
    result |= train.environment(accelerator)
    result["command"] = shlex.join(["tools/cka.py", *(sys.argv[1:] if arguments is None else arguments)])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_atomic(args.out.with_name(args.out.name + ".json"), as_json(result))
    recipe.write_atomic(args.out.with_name(args.out.name + ".svg"), report.heat_map(result))
    print(f"{args.out}.json, {args.out}.svg: {len(result['cka'])} x {len(result['cka'][0])} layers, {result['images']} images")


def compare(args, accelerator):
    """{"models", "layers", "cka", "images", "batch", "data", "split"}; a constant layer's CKA is None."""
    section = section_of(args)
    (network_a, name_a), (network_b, name_b) = load(args.model_a, section), load(args.model_b, section)
    network_a, network_b = network_a.to(accelerator.device), network_b.to(accelerator.device)
    loader = image_loader(section, args.images, args.batch, args.workers)
    batches = (evaluate.to_float(pixels, accelerator.device) for pixels, _, _ in tqdm(loader, unit="batch"))
    layers_a, layers_b, matrix = cka(network_a, network_b, batches)
    return {
        "models": [name_a, name_b],
        "data": section.source,
        "split": section.test_split,
        "images": len(loader) * args.batch,
        "batch": args.batch,
        "layers": [layers_a, layers_b],
        "cka": [[None if math.isnan(value) else round(value, 4) for value in row] for row in matrix.tolist()],
    }


def as_json(result):
    """JSON with a line for each key, and for each row of the matrix."""
    rows = ",\n    ".join(json.dumps(row) for row in result["cka"])
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in result.items() if key != "cka"]
    return "{\n" + ",\n".join([*lines, f'  "cka": [\n    {rows}\n  ]']) + "\n}\n"


if __name__ == "__main__":
    main()
