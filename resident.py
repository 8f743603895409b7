"""A split that is decoded once and stays on a device as one tensor: small images, cropped and flipped there.

    resident = Resident(split, data, device)
    for images, labels, index in batches(resident, data, order, seed): ...

The draws differ from those of decoded images, with the same distribution; the pixels of a view are the same.
"""

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

import augment
import sources
from augment import BrokenImage
from sources import DataError


class Resident:
    """A split's images, padded, as one tensor on a device: uint8 [N, 3, size + 2 padding, size + 2 padding].

    A crop of an image is one of its `views`: view = 2 * (y * (2 padding + 1) + x) + flipped, for a crop at
    (y, x) of the padded image; view `whole` is the image itself. A broken image stays black, is in `broken`
    ({row number: reason}), and no batch shows it.
    """

    def __init__(self, split, data, device):
        padding = data.crop.padding
        n, side = len(split.rows), data.size + 2 * padding
        inside = slice(padding, padding + data.size)
        self.size, self.device, self.broken = data.size, device, {}
        self.views, self.whole = 2 * (2 * padding + 1) ** 2, 2 * padding * (2 * padding + 2)
        try:
            images = torch.zeros(n, 3, side, side, dtype=torch.uint8)
            labels = torch.zeros(n, dtype=torch.int64)
            for i, decoded in enumerate(_decoded(split, data)):
                if isinstance(decoded, BrokenImage):
                    self.broken[i] = str(decoded)
                    continue
                pixels, labels[i] = decoded
                images[i, :, inside, inside] = torch.from_numpy(pixels)
            self.images, self.labels = images.to(device), labels.to(device)
        except RuntimeError as error:  # no memory, on a GPU and on a CPU
            raise DataError(
                f"{data.source}: its {n:,} images do not fit into the memory of {device} "
                f"({3 * n * side**2 / 1e9:.2f} GB): set data.resident to false"
            ) from error

    def crops(self, index, view):
        """uint8 [B, 3, size, size]: view int64 [B] of images index int64 [B], both on the device."""
        # windows[i, y, x]: the crop at (y, x) of image i, without a copy
        windows = self.images.unfold(2, self.size, 1).unfold(3, self.size, 1).permute(0, 2, 3, 1, 4, 5)
        position = view // 2
        images = windows[index, position // windows.shape[2], position % windows.shape[2]]
        return torch.where((view % 2 == 1).view(-1, 1, 1, 1), images.flip(3), images)


def _decoded(split, data):
    """(uint8 [3, size, size], class id) of every row in order, or its BrokenImage."""

    def decoded(index, row):
        image = sources.encoded(row, index, data, split)
        try:
            with sources.named(image.name):
                pixels = np.array(augment.of_size(data.size, augment.decode(image.content)))
        except BrokenImage as error:
            return error
        return pixels.transpose(2, 0, 1), image.label

    rows = itertools.chain.from_iterable(map(sources.rows_of, split.rows.iter(1000)))
    with ThreadPoolExecutor() as pool:  # PIL decodes without Python's lock
        yield from pool.map(decoded, itertools.count(), rows)


def batches(resident, data, order, seed):
    """(images, labels, index) on the device for every list of `order`, (epoch, repeat, row number) each."""
    for drawn in drawn_views(resident, data, order, seed):
        index, view = torch.from_numpy(drawn).to(resident.device, non_blocking=True)
        yield resident.crops(index, view), resident.labels[index], index


def drawn_views(resident, data, order, seed):
    """int64 [2, B] for each batch: the images' row numbers and the views of them."""
    size = len(resident.labels)

    @functools.lru_cache(maxsize=data.repeats + 1)
    def views(epoch, repeat):
        """Of all images."""
        # not [seed, epoch, repeat]: numpy ignores zeros at the end, and [seed, epoch] draws the order
        chance = np.random.default_rng([seed, epoch, 1 + repeat])
        positions = chance.integers(resident.views // 2, size=size)
        return 2 * positions + (chance.random(size) < data.hflip)

    for crops in order:
        epochs, repeats, index = np.array(without_broken(crops, resident.broken, data)).T
        view = np.empty_like(index)
        for repeat in set(repeats.tolist()):
            here = repeats == repeat
            view[here] = views(epochs[0], repeat)[index[here]]
        yield np.stack([index, view])


def without_broken(crops, broken, data):
    """The crops (epoch, repeat, number, ...) of a batch; those of broken images go to its next good image.

    They get a repeat that no other crop has, so that nothing depends on other batches, on workers or on what
    came before. `broken`: {number: reason}. Raises DataError where no image is good.
    """
    if broken and all(crop[2] in broken for crop in crops):
        raise sources.nothing_decoded(data.source, len(crops), {crop[2]: broken[crop[2]] for crop in crops})
    result = []
    for place, crop in enumerate(crops):
        if crop[2] in broken:
            epoch, _, *rest = next(c for c in crops[place:] + crops[:place] if c[2] not in broken)
            crop = (epoch, data.repeats + place, *rest)
        result.append(crop)
    return result


def test_batches(split, data, batch_size, rank, world, device):
    """[(images, labels, index)] of this process's share of a split, in order and on the device."""
    resident = Resident(split, data, device)
    if resident.broken:
        raise DataError(next(iter(resident.broken.values())))
    share = torch.arange(rank, len(resident.labels), world, device=device).split(batch_size)
    return [
        (resident.crops(index, torch.full_like(index, resident.whole)), resident.labels[index], index)
        for index in share
        if len(index)
    ]
