"""Which images when: training batches of memory-mapped, streamed and resident data, and the test images.

    train = TrainLoader(data, batch_size=64, batch_size_per_process=64)
    for images, labels, index in train.batches(seed=0, start=0, stop=train.steps_per_epoch): ...

Batches are (images uint8 [B, 3, size, size], labels int64 [B], index int64 [B]); scaling to [0, 1], mixing
and each network's normalisation follow on the device. What an image looks like depends only on (seed, epoch,
repeat, its id), so a run can be resumed at any step without saved generator states. Batches of
memory-mapped and resident data are the same for any number of workers and processes; which images of a
stream make a batch depends on both.

A training image that cannot be decoded is skipped, counted and named, up to `data.max_broken`; its place in
the batch is taken by another crop of a good image of that batch, so that batches keep their sizes and their
order. Missing files and network failures stop the run. In evaluation broken images do, too: scores over
fewer images would not be comparable.
"""

import functools
import itertools
import random
import re
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info

import augment
import resident
import sources
from augment import BrokenImage, seed_of
from sources import DataError
from workers import Loader


class TrainLoader:
    """The training batches of one process, for every seed of a recipe.

    A step is one optimizer step of `batch_size` images over all processes: `accumulate` batches here, of
    `batch_size_per_process` images each. Without drop_last an epoch's last step is smaller, with the same
    share for each process. With data.fraction below 1 the split, its size, labels and ids (row numbers) are
    those of the fraction; data.train_size is the whole split's.

    `broken`: what was skipped, {number: "image 17 (name): reason"}, in the batches that `batches` has
    yielded. A trainer sets it at the start of a run, to {} or to what a checkpoint has, so that
    data.max_broken holds for the whole run. The numbers are int: of the row, or in a stream of the shard
    and the row in it.

    With data.resident batches are made on `device` from a `Resident` set, whose broken images are all
    known, and counted, before the first batch.
    """

    def __init__(
        self, data, *, batch_size, batch_size_per_process, rank=0, world=1, workers=0, pin=False, device="cpu"
    ):
        if batch_size % (batch_size_per_process * world):
            raise DataError(
                f"batch_size {batch_size} is not a multiple of {world} processes x "
                f"batch_size_per_process {batch_size_per_process}: launch another number of processes or "
                "change batch_size_per_process"
            )
        self.data, self.batch_size, self.per_process = data, batch_size, batch_size_per_process
        self.rank, self.world, self.workers, self.pin = rank, world, workers, pin
        self.accumulate = batch_size // (batch_size_per_process * world)
        self.broken = {}

        self.split = sources.open_split(data, data.train_split)
        sources.check_classes(data, self.split)
        self.shard_lengths = self._shard_lengths() if data.streaming else None
        self.size = self._checked_size()
        if data.fraction < 1:
            self.split = sources.take_fraction(self.split, data)
            self.size = len(self.split.rows)
        self.steps_per_epoch = self._steps_per_epoch()
        self.resident = None
        if data.resident:
            self.resident = resident.Resident(self.split, data, torch.device(device))
            self._count(self.resident.broken)

    def _shard_lengths(self):
        """Images of each shard of a stream, or None; DataError for one that cannot be shuffled or shared."""
        source = self.data.source
        if sources.is_image_folder(self.split):
            raise DataError(
                f"{source}: image files lie sorted by class, and a stream cannot shuffle them: "
                "--set data.streaming=false data.shuffle_buffer=0"
            )
        lengths, shards = sources.shard_lengths(self.split), self.split.rows.num_shards
        readers = self.world * max(self.workers, 1)
        if lengths is None and shards < readers:
            raise DataError(
                f"{source}: {shards} shards cannot feed {readers} readers: fewer processes or --workers"
            )
        return lengths

    def _checked_size(self):
        """Images of the whole training split: counted, or data.train_size where they cannot be."""
        data = self.data
        if self.shard_lengths:
            size = sum(self.shard_lengths)
        else:
            size = data.train_size if data.streaming else len(self.split.rows)
        if data.train_size not in (None, size):
            raise DataError(
                f"{data.source}, {data.train_split}: {size} images found, the recipe's data.train_size is "
                f"{data.train_size}: if these are the right images, --set data.train_size={size}"
            )
        return size

    def _steps_per_epoch(self):
        steps, rest = divmod(self.size, self.batch_size)
        if not self.data.drop_last and rest >= self.accumulate * self.world:
            steps += 1
        if not steps:
            raise DataError(
                f"{self.data.source}, {self.data.train_split}: {self.size} images do not fill one step of "
                f"{self.batch_size}"
            )
        return steps

    @property
    def smallest_batch(self):
        """Images in the smallest batch of a process: without drop_last, of an epoch's last step."""
        parts = self.accumulate * self.world
        rest = 0 if self.data.drop_last else self.size % self.batch_size // parts
        return rest or self.per_process

    def labels(self):
        """Class id of every training image by its index, int64 [size]; None for a stream."""
        if self.data.streaming:
            return None
        column = self.data.label
        labels = torch.as_tensor(self.split.rows.with_format("numpy", columns=[column])[:][column])
        return labels if self.split.ids is None else torch.tensor(self.split.ids)[labels]

    def batches(self, seed, start, stop):
        """Batches of steps start..stop-1, `accumulate` for each step, by one set of worker processes.

        Raises DataError for more broken images than data.max_broken allows, and for a worker process that
        died.
        """
        if self.resident:
            self._count(self.resident.broken)
            order = _order(self, seed, start, stop)
            return resident.batches(self.resident, self.data, order, seed)
        if self.data.streaming:
            dataset, order = _StreamedBatches(self, seed, start, stop), None
        else:
            dataset, order = _MappedBatches(self, seed), _order(self, seed, start, stop)
        loader = Loader(
            dataset,
            batch_size=None,  # the data set makes whole batches
            sampler=order,
            num_workers=self.workers,
            pin_memory=self.pin,
        )
        return self._counted(iter(loader))

    def _counted(self, batches):
        """The batches without their broken images, which are counted."""
        for images, labels, index, broken in batches:
            self._count(broken)
            yield images, labels, index

    def _count(self, broken):
        data = self.data
        self.broken.update(broken)
        allowed = max(1, int(data.max_broken * self.size)) if data.max_broken else 0
        if broken and len(self.broken) > allowed:
            reasons = sources.first_lines(list(self.broken.values()))
            raise DataError(
                f"{data.source}, {data.train_split}: {len(self.broken)} of {self.size} images are broken "
                f"so far, the recipe's data.max_broken {data.max_broken} allows {allowed}: repair or remove "
                f"them, or allow more with --set data.max_broken=SHARE\n{reasons}"
            )


# ---------------------------------------------------------------- rows to batches


class _Crop(NamedTuple):
    """One place of a batch: which crop of which image belongs there."""

    epoch: int
    repeat: int
    id: int  # of the image, for the seed of its crop
    number: int  # of the image in the split, for the count of broken ones
    row: dict  # undecoded


class _BatchMaker:
    """Makes a batch of crops: (images, labels, index, {number: reason} of the broken images)."""

    def __init__(self, loader, seed):
        self.data, self.split, self.seed = loader.data, loader.split, seed

    @functools.cached_property  # in the process that uses them: they keep buffers
    def views(self):
        return augment.train_views(self.data)

    def __call__(self, crops):
        """An image is decoded once for its crops where they are neighbours.

        A broken image's place goes to the next good image of the batch, as a crop with a repeat that no
        other has. So nothing depends on other batches, on workers or on what came before.
        """
        samples, broken = [], {}
        for number, group in itertools.groupby(crops, key=lambda crop: crop.number):
            group = list(group)
            try:
                samples += self._samples(group)
            except BrokenImage as error:
                broken[number] = str(error)
                samples += [None] * len(group)

        good = [place for place, sample in enumerate(samples) if sample]
        if not good:
            raise sources.nothing_decoded(self.data.source, len(crops), broken)
        for place in range(len(crops)):
            if samples[place] is None:
                following = crops[min(good, key=lambda g, place=place: (g - place) % len(crops))]
                (samples[place],) = self._samples([following._replace(repeat=self.data.repeats + place)])
        images, labels, index = zip(*samples, strict=True)
        return _stacked(images), torch.tensor(labels), torch.tensor(index), broken

    def _samples(self, crops):
        """[(image, label, id)] of crops of one image."""
        image = sources.encoded(crops[0].row, crops[0].id, self.data, self.split)
        seeds = [seed_of(self.seed, crop.epoch, crop.id, crop.repeat) for crop in crops]
        with sources.named(image):
            views = list(self.views(image.content, seeds))
        return [(view, image.label, crop.id) for view, crop in zip(views, crops, strict=True)]


def _stacked(views):
    """uint8 [B, 3, size, size], channels-last in memory where the views are: reordering takes longer."""
    if views[0].stride(0) != 1:
        return default_collate(views)
    return default_collate([view.permute(1, 2, 0) for view in views]).permute(0, 3, 1, 2)


# ---------------------------------------------------------------- memory-mapped data


def _order(loader, seed, start, stop):
    """A list of (epoch, repeat, row number) for each batch: step s is crops[s * batch_size:][:batch_size].

    crops: an epoch's random order of the images, each `repeats` times in a row, cut at the size of the data
    set. They are dealt out one by one, as by timm's RepeatAugSampler: the crops of an image fall to
    different processes. With fewer processes they fall to the batches that are accumulated instead, so a
    step does not depend on their number.
    """
    permuted_epoch, repeats = None, loader.data.repeats
    hands = loader.world * loader.accumulate
    for step in range(start, stop):
        epoch, position = divmod(step, loader.steps_per_epoch)
        if epoch != permuted_epoch:
            images = np.random.default_rng([seed, epoch]).permutation(loader.size)
            permuted_epoch = epoch
        first = position * loader.batch_size
        crops = range(first, min(first + loader.batch_size, loader.size))
        share = len(crops) // hands  # the same for all: gradients are averaged, not summed
        for k in range(loader.accumulate):
            hand = crops[k * loader.world + loader.rank :: hands][:share]
            yield [(epoch, crop % repeats, int(images[crop // repeats])) for crop in hand]


class _MappedBatches(Dataset):
    """Batches by lists of (epoch, repeat, row number)."""

    def __init__(self, loader, seed):
        self.rows, self.make = loader.split.rows, _BatchMaker(loader, seed)

    def __getitem__(self, keys):
        numbers = list(dict.fromkeys(number for _, _, number in keys))
        # together: one by one they take three times as long
        rows = dict(zip(numbers, sources.rows_of(self.rows[numbers]), strict=True))
        return self.make([_Crop(epoch, repeat, n, n, rows[n]) for epoch, repeat, n in keys])


# ---------------------------------------------------------------- streams


class _StreamedBatches(IterableDataset):
    """Batches of a stream: shards in an order of (seed, epoch), dealt to processes and workers, and a buffer.

    Where the lengths of the shards are known, every reader takes as many images as its batches need from
    the concatenated shards: each image comes once an epoch, whatever the number of shards. Where they are
    not (tar files on the hub), readers take whole shards, and one with too few images begins its shards
    again.

    An image's id is a checksum of its bytes, which any sharding leaves as it is. `datasets`' own shuffle is
    not used: it sleeps 5 s at the end of a pass, copies its buffer, and cannot be resumed inside an epoch;
    here a resumed reader skips rows without decoding them. Which images make a batch depends on the number
    of processes and workers. Repeated crops are neighbours in a batch: to spread them over processes, each
    would have to read the whole stream.
    """

    def __init__(self, loader, seed, start, stop):
        self.data, self.split, self.shard_lengths = loader.data, loader.split, loader.shard_lengths
        self.seed, self.rank, self.world = seed, loader.rank, loader.world
        self.per_process = loader.per_process
        self.per_epoch = loader.steps_per_epoch * loader.accumulate  # batches
        self.first, self.last = start * loader.accumulate, stop * loader.accumulate
        self.make = _BatchMaker(loader, seed)

    def __iter__(self):
        workers, worker = _worker()
        # the DataLoader takes batch `first` from worker 0; batches are dealt as if a run began at batch 0
        slot = (self.first + worker) % workers
        for epoch in range(self.first // self.per_epoch, -(-self.last // self.per_epoch)):
            batches = range(epoch * self.per_epoch, (epoch + 1) * self.per_epoch)
            dealt = [[batch for batch in batches if batch % workers == s] for s in range(workers)]
            needed = [-(-len(hand) * self.per_process // self.data.repeats) for hand in dealt]  # images
            if self.shard_lengths:
                before = self.rank * sum(needed) + sum(needed[:slot])
                rows = self._interval(epoch, before, needed[slot])
                rows = _shuffled(rows, self.data.shuffle_buffer, self._chance(epoch, slot))
            else:
                rows = self._whole_shards(epoch, slot, workers)
            served = sum(batch < self.first for batch in dealt[slot]) * self.per_process
            crops = itertools.islice(self._crops(rows, epoch), served, None)
            for batch in dealt[slot]:
                if self.first <= batch < self.last:
                    yield self.make(list(itertools.islice(crops, self.per_process)))

    def _shards(self, epoch):
        return np.random.default_rng([self.seed, epoch]).permutation(self.split.rows.num_shards).tolist()

    def _chance(self, epoch, slot):
        return random.Random(f"{self.seed} {epoch} {self.rank} {slot}")

    def _interval(self, epoch, before, needed):
        """Rows before..before+needed-1 of an epoch's shards, which repeat (with repeats and few images)."""
        for shard in itertools.cycle(self._shards(epoch)):
            if not needed:
                return
            length = self.shard_lengths[shard]
            taken = max(min(needed, length - before), 0)
            if taken:
                yield from itertools.islice(self._numbered_rows(shard), before, before + taken)
            before, needed = max(before - length, 0), needed - taken

    def _whole_shards(self, epoch, slot, workers):
        """Shuffled rows of this reader's shards, without end: all readers make equally many batches."""
        readers = self.world * workers
        shards = self._shards(epoch)[self.rank * workers + slot :: readers]
        chance = self._chance(epoch, slot)
        while True:
            rows = itertools.chain.from_iterable(map(self._numbered_rows, shards))
            rows = _shuffled(rows, self.data.shuffle_buffer, chance)
            first = next(rows, None)
            if first is None:
                raise DataError(
                    f"{self.data.source}: the shards of reader {slot} of process {self.rank} are empty"
                )
            yield first
            yield from rows

    def _numbered_rows(self, shard):
        """(number, row): the number is another for each row of the split, and the same in every epoch."""
        return enumerate(sources.shard_rows(self.split, shard, self.data.source), start=shard << 32)

    def _crops(self, rows, epoch):
        for number, row in rows:
            id = sources.checksum(row, self.data)
            for repeat in range(self.data.repeats):
                yield _Crop(epoch, repeat, id, number, row)


def _worker():
    """(number of workers, number of this one); (1, 0) in the main process."""
    info = get_worker_info()
    return (info.num_workers, info.id) if info else (1, 0)


def _shuffled(rows, size, chance):
    """Rows through a buffer of `size`: each row once, each output a random one of the buffer."""
    buffer = list(itertools.islice(rows, size))
    for row in rows:
        i = chance.randrange(size)
        yield buffer[i]
        buffer[i] = row
    chance.shuffle(buffer)
    yield from buffer


# ---------------------------------------------------------------- evaluation


def test_loader(data, *, batch_size, rank=0, world=1, workers=0, pin=False, numbered=False, device=None):
    """Batches as of training, of every image of the test split once over all processes, in a fixed order.

    The shares of the processes may differ in size. It can be iterated again. `numbered`: the index of an
    image is the number in its file name, ILSVRC2012_val_00000001.JPEG, by which ImageNet-ReaL knows it;
    DataError for other names. `device`: where a resident set shall lie; None: nowhere, images are decoded
    in each pass.
    """
    if device is not None and data.resident and data.crop_pct == 1:
        split = sources.open_split(data, data.test_split)
        return resident.test_batches(split, data, batch_size, rank, world, torch.device(device))
    split = sources.open_split(data, data.test_split)
    images = _TestImages(split, data, rank, world, numbered)
    if isinstance(split.rows, datasets.IterableDataset):
        images = _StreamedTestImages(images)
    elif not len(split.rows):
        raise DataError(f"{data.source}, {data.test_split}: no images")
    return Loader(images, batch_size, num_workers=workers, pin_memory=pin)


class _TestImages(Dataset):
    """(image, label, index) of this process's share of a memory-mapped split."""

    def __init__(self, split, data, rank, world, numbered):
        self.split, self.data, self.rank, self.world, self.numbered = split, data, rank, world, numbered
        self.transform = augment.test_transform(data)

    def __len__(self):
        return len(range(self.rank, len(self.split.rows), self.world))

    def __getitem__(self, i):
        index = self.rank + i * self.world
        return self.sample(self.split.rows[index], index)

    def sample(self, row, index):
        image = sources.encoded(row, index, self.data, self.split)
        with sources.named(image):
            pixels = torch.as_tensor(self.transform(augment.decode(image.content)))
        return pixels, image.label, _validation_number(image) if self.numbered else index


def _validation_number(image):
    match = re.search(r"ILSVRC2012_val_(\d{8})", image.path or "")
    if not match:
        name = Path(image.path).name if image.path else "no name"
        raise DataError(
            f"ImageNet-ReaL knows an image by its file name, ILSVRC2012_val_00000001.JPEG; found {name}"
        )
    return int(match[1])


class _StreamedTestImages(IterableDataset):
    """(image, label, index) of a streamed split: its shards are dealt to processes and workers."""

    def __init__(self, images):
        self.images = images

    def __iter__(self):
        images, shards = self.images, self.images.split.rows.num_shards
        workers, worker = _worker()
        for shard in range(images.rank * workers + worker, shards, images.world * workers):
            for row in sources.shard_rows(images.split, shard, images.data.source):
                yield images.sample(row, sources.checksum(row, images.data))
