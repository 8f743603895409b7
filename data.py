"""Which images when: training batches of memory-mapped, streamed and resident data, and the test images.

    train = TrainLoader(data, batch_size=64, batch_size_per_process=64)
    for images, labels, index in train.batches(seed=0, start=0, stop=train.steps_per_epoch): ...

Batches are (images uint8 [B, 3, size, size], labels int64 [B], index int64 [B]); scaling to [0, 1], mixing
and each network's normalisation follow on the device. What an image looks like depends only on (seed, epoch,
repeat, its id), so a run can be resumed at any step without saved generator states. Memory-mapped and
resident data give the same batches for any number of workers and processes; streams do not.

A training image that cannot be decoded is skipped, counted and named, up to `data.max_broken`; another crop
of a good image of the batch takes its place. Missing files and network failures stop the run. In evaluation
broken images do, too: scores over fewer images would not be comparable.
"""

import functools
import itertools
import random
import re

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
    yielded; of a resident set, all. A trainer sets it at the start of a run, to {} or to what a checkpoint
    has, so that data.max_broken holds for the whole run. The numbers are int: of the row, or in a stream of
    the shard and the row in it.
    """

    def __init__(
        self, data, *, batch_size, batch_size_per_process, rank=0, world=1, workers=0, pin=False, device="cpu"
    ):
        if batch_size % (batch_size_per_process * world):
            raise DataError(
                f"batch_size {batch_size} is not a multiple of {world} processes x batch_size_per_process "
                f"{batch_size_per_process}: change it, or launch another number of processes"
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
        if sources.is_image_folder(self.split.files):
            raise DataError(
                f"{source}: image files lie sorted by class, and a stream cannot shuffle them: "
                "--set data.streaming=false data.shuffle_buffer=0"
            )
        lengths, shards = sources.shard_lengths(self.split), self.split.rows.num_shards
        readers = self.world * max(self.workers, 1)
        if lengths is None and shards < readers:
            found = f"{shards} shards cannot feed {readers} readers"
            raise DataError(f"{source}: {found}: fewer processes or --workers")
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
            name = f"{self.data.source}, {self.data.train_split}"
            raise DataError(f"{name}: {self.size} images do not fill one step of {self.batch_size}")
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
        labels = torch.as_tensor(sources.labels_of(self.split.rows, self.data))
        return labels if self.split.ids is None else torch.tensor(self.split.ids)[labels]

    def batches(self, seed, start, stop):
        """Batches of steps start..stop-1, `accumulate` for each step, by one set of worker processes.

        Raises DataError for more broken images than data.max_broken allows, and for a dead worker process.
        """
        order = None if self.data.streaming else _order(self, seed, start, stop)
        if self.resident:
            self._count(self.resident.broken)
            yield from resident.batches(self.resident, self.data, order, seed)
            return
        dataset = _MappedBatches(self, seed) if order else _StreamedBatches(self, seed, start, stop)
        # batch_size None: the data set makes whole batches
        loader = Loader(
            dataset, batch_size=None, sampler=order, num_workers=self.workers, pin_memory=self.pin
        )
        for images, labels, index, broken in loader:
            self._count(broken)
            yield images, labels, index

    def _count(self, broken):
        data = self.data
        self.broken.update(broken)
        allowed = max(1, int(data.max_broken * self.size)) if data.max_broken else 0
        if broken and len(self.broken) > allowed:
            raise DataError(
                f"{data.source}, {data.train_split}: {len(self.broken)} of {self.size} images are broken "
                f"so far, the recipe's data.max_broken {data.max_broken} allows {allowed}: repair or remove "
                f"them, or allow more with --set data.max_broken=SHARE\n{sources.reasons(self.broken)}"
            )


# ---------------------------------------------------------------- rows to batches


class _BatchMaker:
    """Makes a batch: (images, labels, index, {number: reason} of the broken images).

    A crop is (epoch, repeat, number, row): the number is that of the image in the split, its row undecoded.
    """

    def __init__(self, loader, seed):
        self.data, self.split, self.seed = loader.data, loader.split, seed

    @functools.cached_property  # in the process that uses them: they keep buffers
    def views(self):
        return augment.train_views(self.data)

    def __call__(self, crops):
        """An image is decoded once for its crops where they are neighbours."""
        samples, broken = [], {}
        for number, group in itertools.groupby(crops, key=lambda crop: crop[2]):
            group = list(group)
            try:
                samples += self._samples(group)
            except BrokenImage as error:
                broken[number] = str(error)
                samples += [None] * len(group)

        for place, crop in enumerate(resident.without_broken(crops, broken, self.data)):
            if samples[place] is None:
                (samples[place],) = self._samples([crop])
        images, labels, index = zip(*samples, strict=True)
        return _stacked(images), torch.tensor(labels), torch.tensor(index), broken

    def _samples(self, crops):
        """[(image, label, id)] of crops of one image."""
        _, _, number, row = crops[0]
        # a checksum is the same for any sharding
        id = sources.checksum(row, self.data) if self.data.streaming else number
        image = sources.encoded(row, id, self.data, self.split)
        seeds = [seed_of(self.seed, epoch, id, repeat) for epoch, repeat, _, _ in crops]
        with sources.named(image.name):
            return [(view, image.label, id) for view in self.views(image.content, seeds)]


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
    different processes, or batches that are accumulated, and a step does not depend on their number.
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
        return self.make([(*key, rows[key[2]]) for key in keys])


# ---------------------------------------------------------------- streams


class _StreamedBatches(IterableDataset):
    """Batches of a stream: shards in an order of (seed, epoch), dealt to processes and workers, and a buffer.

    Where the lengths of the shards are known, every reader takes as many images as its batches need from
    the concatenated shards: each image comes once an epoch, whatever the number of shards. Where they are
    not (tar files on the hub), readers take whole shards, and one with too few images begins them again.

    `datasets`' own shuffle is not used: it sleeps 5 s at the end of a pass, copies its buffer, and cannot be
    resumed inside an epoch; here a resumed reader skips rows without decoding them. Repeated crops are
    neighbours in a batch: to spread them over processes, each would have to read the whole stream.
    """

    def __init__(self, loader, seed, start, stop):
        self.loader, self.data, self.seed = loader, loader.data, seed
        self.first, self.last = start * loader.accumulate, stop * loader.accumulate  # batches
        self.make = _BatchMaker(loader, seed)

    def __iter__(self):
        workers, worker = _worker()
        per_epoch, per_process = self.loader.steps_per_epoch * self.loader.accumulate, self.loader.per_process
        # the DataLoader takes batch `first` from worker 0; batches are dealt as if a run began at batch 0
        slot = (self.first + worker) % workers
        for epoch in range(self.first // per_epoch, -(-self.last // per_epoch)):
            batches = range(epoch * per_epoch, (epoch + 1) * per_epoch)
            dealt = [[batch for batch in batches if batch % workers == s] for s in range(workers)]
            needed = [-(-len(hand) * per_process // self.data.repeats) for hand in dealt]  # images
            rows = self._rows(epoch, slot, needed)
            crops = ((epoch, repeat, *row) for row in rows for repeat in range(self.data.repeats))
            served = sum(batch < self.first for batch in dealt[slot]) * per_process
            crops = itertools.islice(crops, served, None)
            for batch in dealt[slot]:
                if self.first <= batch < self.last:
                    yield self.make(list(itertools.islice(crops, per_process)))

    def _rows(self, epoch, slot, needed):
        """Shuffled (number, row) of a reader; `needed`: how many each worker of the process reads."""
        loader, data, workers = self.loader, self.data, len(needed)
        shards = np.random.default_rng([self.seed, epoch]).permutation(loader.split.rows.num_shards).tolist()
        chance = random.Random(f"{self.seed} {epoch} {loader.rank} {slot}")
        if loader.shard_lengths:
            before = loader.rank * sum(needed) + sum(needed[:slot])
            yield from _shuffled(self._interval(shards, before, needed[slot]), data.shuffle_buffer, chance)
            return
        own = shards[loader.rank * workers + slot :: loader.world * workers]
        while True:  # all readers make equally many batches
            rows = itertools.chain.from_iterable(map(self._numbered_rows, own))
            rows = _shuffled(rows, data.shuffle_buffer, chance)
            first = next(rows, None)
            if first is None:
                name = f"{data.source}: the shards of reader {slot} of process {loader.rank}"
                raise DataError(f"{name} are empty")
            yield first
            yield from rows

    def _interval(self, shards, before, needed):
        """Rows before..before+needed-1 of the shards, which repeat (with repeats and few images)."""
        for shard in itertools.cycle(shards):
            if not needed:
                return
            length = self.loader.shard_lengths[shard]
            taken = max(min(needed, length - before), 0)
            if taken:
                yield from itertools.islice(self._numbered_rows(shard), before, before + taken)
            before, needed = max(before - length, 0), needed - taken

    def _numbered_rows(self, shard):
        """(number, row): the number is another for each row of the split, and the same in every epoch."""
        rows = sources.shard_rows(self.loader.split, shard, self.data.source)
        return enumerate(rows, start=shard << 32)


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

    The shares of the processes may differ in size. `numbered`: the index of an image is the number in its
    file name, ILSVRC2012_val_00000001.JPEG, by which ImageNet-ReaL knows it; DataError for other names.
    `device`: where a resident set shall lie; None: nowhere, images are decoded in each pass.
    """
    split = sources.open_split(data, data.test_split)
    if device is not None and data.resident and data.crop_pct == 1:
        return resident.test_batches(split, data, batch_size, rank, world, torch.device(device))
    streamed = isinstance(split.rows, datasets.IterableDataset)
    if not streamed and not len(split.rows):
        raise DataError(f"{data.source}, {data.test_split}: no images")
    images = (_StreamedTestImages if streamed else _TestImages)(split, data, rank, world, numbered)
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
        with sources.named(image.name):
            pixels = torch.as_tensor(self.transform(augment.decode(image.content)))
        return pixels, image.label, _validation_number(image) if self.numbered else index


def _validation_number(image):
    match = re.search(r"ILSVRC2012_val_(\d{8})", image.path or "")
    if not match:
        expected = "by its file name, ILSVRC2012_val_00000001.JPEG"
        raise DataError(f"ImageNet-ReaL knows an image {expected}; found {image.name}")
    return int(match[1])


class _StreamedTestImages(_TestImages, IterableDataset):
    """(image, label, index) of a streamed split: its shards are dealt to processes and workers."""

    def __iter__(self):
        workers, worker = _worker()
        shards = range(self.split.rows.num_shards)[self.rank * workers + worker :: self.world * workers]
        for shard in shards:
            for row in sources.shard_rows(self.split, shard, self.data.source):
                yield self.sample(row, sources.checksum(row, self.data))
