"""How similar the layers of two networks are: minibatch linear CKA between all of them (Figure 2).

    python tools/cka.py runs/prev_cifar_res56_scratch runs/prev_cifar_res20_res56/students/kd \\
        --recipe recipes/prev_cifar_res20_res56.json --data ../shared/data/cifar100 --out results/cka
    python tools/cka.py resnet152.a1h_in1k resnet50.a1_in1k --recipe recipes/a1_res50_res152.json \\
        --data DIR --out FILE

Writes FILE.json and a heat map, FILE.svg. A model is a folder of an exported student, a run's folder with one
student, or a timm tag ("resnet50.a1_in1k": pretrained weights).

Nguyen et al. 2021, "Do wide and deep networks learn the same things?", equations 2 to 4: the unbiased HSIC of
Song et al. 2012, summed over minibatches. A layer is the output of a module, in order of execution, one for
each tensor: a residual block counts. Containers that return the output of their last child, identities,
dropout and flattening do not count, nor do outputs without the batch as first dimension (Swin's windows). The
paper says "layer indexes" only; torch_cka, with which such maps are drawn, takes every module, so that the
end of a stage counts three times.
"""

import argparse
import dataclasses
import json
import math
import shlex
import sys
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # so that the tool runs from any folder

import figures  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
import finish  # noqa: E402
import launch  # noqa: E402
import models  # noqa: E402
import recipe  # noqa: E402
import rundir  # noqa: E402
import sources  # noqa: E402

SEED = 0  # of the images drawn from the test split
WANTED = "an exported student, a run's folder, or a timm tag"
NO_LAYERS = (nn.Identity, nn.Dropout, nn.Flatten)
CONSTANT = 1e-6  # a layer that varies by less than this share of its size over the images is only rounding


# ---------------------------------------------------------------- the measure


def centered_gram(features):
    """Features [B, ...] -> [B, B] float64 with zero diagonal: inner products of images, centred for HSIC.

    Rows sum to 0 as in Szekely and Rizzo 2014, so that HSIC_1(K, L) = <K, L> / (B (B - 3)). This is Song et
    al.'s unbiased formula without its differences of large numbers. B of at least 4.
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
    """(names of the layers in order of execution, centred Gram matrices [layers, B, B], sizes [layers]).

    Gram matrices are taken while the network runs, so that feature maps are freed as always and none is read
    after a ReLU in place has changed it. A module that runs again is there again; sizes are mean squared
    norms of an image's features.
    """
    seen, last = [], (None, None)
    counted = {module: name for name, module in network.named_modules() if not isinstance(module, NO_LAYERS)}

    def see(module, inputs, output):
        nonlocal last
        is_batch = isinstance(output, torch.Tensor) and output.dim() > 1 and len(output) == len(images)
        if not counted.get(module) or not is_batch:
            return
        if output is last[0] and output._version == last[1]:  # unlike the output of an activation in place
            return
        last = output, output._version
        size = output.flatten(1).float().norm(dim=1).double().square().mean()
        seen.append((counted[module], centered_gram(output), size))

    with register_module_forward_hook(see):
        network(images)
    names, grams, sizes = zip(*seen, strict=True)
    return [name.removeprefix("model.") for name in names], torch.stack(grams), torch.stack(sizes)


def cka(network_a, network_b, batches):
    """(names of a's layers, of b's, CKA [layers of a, layers of b] float64) over batches of images.

    batches: [B, 3, H, W] in [0, 1]. CKA is in [-1, 1], NaN where a layer has equal features for all images.
    Memory: the Gram matrices of a batch and three sums, for any number of images. Raises ModelError for
    features that are not finite and for a batch of fewer than 4 images.
    """
    network_a.eval(), network_b.eval()
    cross = hsic_a = hsic_b = size_a = size_b = 0
    for images in batches:
        if len(images) < 4:
            raise models.ModelError(f"a batch of {len(images)} images: the unbiased HSIC needs 4 or more")
        names_a, a, norms_a = layers(network_a, images)
        names_b, b, norms_b = layers(network_b, images)
        pairs = len(images) * (len(images) - 3)
        cross = cross + a.flatten(1) @ b.flatten(1).T / pairs
        hsic_a = hsic_a + a.square().sum((1, 2)) / pairs
        hsic_b = hsic_b + b.square().sum((1, 2)) / pairs
        size_a, size_b = size_a + norms_a**2, size_b + norms_b**2
    for name, value in zip(names_a + names_b, torch.cat((hsic_a, hsic_b)).tolist(), strict=True):
        if not math.isfinite(value):
            raise models.ModelError(f"features that are not finite at {name}: the network has diverged")
    hsic_a = hsic_a.where(hsic_a > CONSTANT**4 * size_a, torch.nan)
    hsic_b = hsic_b.where(hsic_b > CONSTANT**4 * size_b, torch.nan)
    return names_a, names_b, cross / (hsic_a.sqrt()[:, None] * hsic_b.sqrt())


# ---------------------------------------------------------------- models and images


def load(model, section):
    """(network, description) of a model as the command line names it.

    It resizes the images of `section` where it was trained on another size.
    """
    if Path(model).is_dir():
        first, *others = evaluate.exported_students(Path(model))
        if others:
            names = ", ".join(map(str, (first, *others)))
            raise models.ModelError(f"{model}: several students: name one of {names}")
        network, config = models.load_exported(first)
        description = f"{config['architecture']} ({'/'.join(first.resolve().parts[-3:])})"
    else:
        config, description = models.pretrained_config(model), model
        shape = dict(classes=config["num_classes"], size=config["input_size"][-1])
        network = models.build(model, pretrained=True, **shape)
    if config["input_size"][-1] != section.size:
        network.size = config["input_size"][-1]
    return network, description


def section_of(args):
    """The recipe.Data of --recipe, not streamed and with the source of --data."""
    section = recipe.load(args.recipe).data
    source = args.data or section.source
    section = dataclasses.replace(section, streaming=False, shuffle_buffer=0, source=source)
    return sources.resolved(section)


def image_loader(section, images, batch, workers):
    """`images` of the test split in whole batches, drawn at random because a split can be sorted by class.

    Raises DataError where there is no whole batch.
    """
    dataset = data.test_loader(section, batch_size=batch).dataset
    generator = torch.Generator().manual_seed(SEED)
    chosen = torch.randperm(len(dataset), generator=generator)[:images].tolist()
    if len(chosen) < batch:
        few = f"{len(chosen)} images do not fill one batch of {batch}"
        raise sources.DataError(f"{section.source}: {few}: lower --batch")
    return DataLoader(Subset(dataset, chosen), batch, num_workers=workers, drop_last=True)


# ---------------------------------------------------------------- command line


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model_a", metavar="MODEL_A", help=WANTED)
    add("model_b", metavar="MODEL_B", help="the same")
    add("--out", required=True, metavar="FILE", help="writes FILE.json and FILE.svg")
    add("--recipe", required=True, metavar="FILE", help="whose test images to use")
    add("--data", help="folder of the data set or its name on the hub (default: the recipe's)")
    add("--images", type=int, default=2048, help="drawn from the test split (default: 2048)")
    add("--batch", type=int, default=256, help="images a minibatch (default: 256)")
    add("--workers", type=int, default=2, help="loader processes (default: 2)")
    args = parser.parse_args(arguments)
    accelerator = launch.make_accelerator()
    try:
        result = compare(args, accelerator)
    except (recipe.RecipeError, sources.DataError, models.ModelError) as error:
        parser.exit(2, f"error: {error}\n")
    result |= finish.environment(accelerator)
    result["command"] = shlex.join(["tools/cka.py", *(sys.argv[1:] if arguments is None else arguments)])
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    rundir.write_atomic(f"{args.out}.json", json.dumps(result) + "\n")
    title = "CKA of " + " and ".join(result["models"])
    rundir.write_atomic(f"{args.out}.svg", figures.svg(figures.heat_map(result), title))
    frame = pd.DataFrame(result["cka"], dtype=float)
    shape = f"{frame.shape[0]} x {frame.shape[1]} layers, {result['images']} images"
    mean = f"mean over the rows of their largest similarity: {frame.max(axis=1).mean():.2f}"
    print(f"{args.out}.json, {args.out}.svg: {shape}; {mean}")


def compare(args, accelerator):
    """What FILE.json says of the models, the images, the layers and their CKA (None for a constant layer)."""
    section = section_of(args)
    network_a, name_a = load(args.model_a, section)
    network_b, name_b = load(args.model_b, section)
    network_a, network_b = network_a.to(accelerator.device), network_b.to(accelerator.device)
    loader = image_loader(section, args.images, args.batch, args.workers)
    batches = (evaluate.to_float(pixels, accelerator.device) for pixels, _, _ in tqdm(loader, unit="batch"))
    layers_a, layers_b, matrix = cka(network_a, network_b, batches)
    rows = [[None if math.isnan(value) else round(value, 4) for value in row] for row in matrix.tolist()]
    return {
        "models": [name_a, name_b],
        "data": section.source,
        "split": section.test_split,
        "images": len(loader) * args.batch,
        "batch": args.batch,
        "layers": [layers_a, layers_b],
        "cka": rows,
    }


if __name__ == "__main__":
    main()
