"""Parquet files of JPEGs, so transcoded that a crop can be cut out of the compressed bytes: the same pixels, less decoding.

    python tools/prepare.py DIR OUT              # every .parquet below DIR -> the same name below OUT
        [--column image] [--jobs 8]

Training then takes `--data OUT`. A JPEG gets a restart marker about every 64 pixels, optimal Huffman tables, and a list of
where its markers are (an APP11 segment that other decoders skip); data.cut reads it. Coefficients stay what they are. Every
image is decoded before and after: what does not come out pixel by pixel the same, or is no JPEG, is kept as it was. A file
appears complete or not at all; files that are there are left out, so that a second call goes on. The originals are only read.

It needs jpegtran, of libjpeg-turbo: `apt install libjpeg-turbo-progs`, `brew install jpeg-turbo`. No wheel has a lossless
transcoder with restart markers (2026-11: not Pillow, simplejpeg, opencv, imagecodecs, PyTurboJPEG, jpeglib).
"""

import argparse
import collections
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data

TILE = 64  # pixels between markers, about: fewer cut closer, more cost fewer bytes
ROWS = 256  # of a table in memory


def interval(jpeg):
    """MCUs between two markers: a divisor of a row's, so that every row begins with one, of 32 to 128 pixels; else a row."""
    frame = data.jpeg_frame(jpeg)
    row = -(-frame.width // frame.mcu_width)
    wide = [n for n in range(1, row + 1) if row % n == 0 and TILE / 2 <= n * frame.mcu_width <= 2 * TILE]
    return min(wide, key=lambda n: abs(n * frame.mcu_width - TILE), default=row)


def with_index(jpeg):
    """The JPEG with the places of its restart markers, uint32 from the first byte of the scan, in front of all else."""
    scan = np.frombuffer(jpeg, np.uint8)[data.jpeg_frame(jpeg).scan :]
    found = np.flatnonzero(scan[:-1] == 0xFF)  # of data, an FF is followed by a 0
    places = found[(scan[found + 1] & 0xF8) == 0xD0].astype("<u4").tobytes()
    size = 2 + len(data.RESTART_INDEX) + len(places)
    if size > 0xFFFF:
        raise ValueError("more markers than a segment can list")
    return jpeg[:2] + b"\xff\xeb" + size.to_bytes(2, "big") + data.RESTART_INDEX + places + jpeg[2:]


def transcoded(jpeg):
    """(bytes, what was done): "prepared", or the bytes as they were and the reason."""
    if not jpeg or jpeg[:3] != b"\xff\xd8\xff":
        return jpeg, "no JPEG"
    try:
        before = data.decode({"bytes": jpeg, "path": None})
        command = ["jpegtran", "-copy", "all", "-optimize", "-restart", f"{interval(jpeg)}B"]
        made = subprocess.run(command, input=jpeg, capture_output=True, check=True).stdout
        made = with_index(made)
        after = data.decode({"bytes": made, "path": None})
    except subprocess.CalledProcessError:
        return jpeg, "jpegtran refused it"
    except Exception as error:  # broken in any way: the loader will say in which
        return jpeg, type(error).__name__
    same = np.array_equal(np.asarray(before), np.asarray(after))
    return (made, "prepared") if same else (jpeg, "other pixels")


def prepare(source, target, column, pool):
    """Writes `target` from `source`; returns (Counter of what was done, bytes before, bytes after)."""
    done, sizes = collections.Counter(), np.zeros(2, np.int64)
    file = pq.ParquetFile(source)
    if column not in file.schema_arrow.names:
        raise SystemExit(f"{source}: no column {column!r} (columns: {', '.join(file.schema_arrow.names)}): --column NAME")
    origin = json.dumps({"name": source.name, "bytes": source.stat().st_size})
    schema = file.schema_arrow.with_metadata({**(file.schema_arrow.metadata or {}), b"prepared_from": origin.encode()})
    part = target.with_name(f".{target.name}.part")
    with pq.ParquetWriter(part, schema) as writer:
        for batch in file.iter_batches(ROWS):
            images = batch.column(column).to_pylist()
            made = list(pool.map(lambda image: transcoded(image and image["bytes"]), images))
            done.update(what for _, what in made)
            for image, (jpeg, _) in zip(images, made, strict=True):
                if image:
                    sizes += len(image["bytes"] or b""), len(jpeg or b"")
                    image["bytes"] = jpeg
            place = batch.schema.get_field_index(column)
            columns = [*batch.columns[:place], pa.array(images, batch.schema.field(column).type), *batch.columns[place + 1 :]]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=ROWS)
    with open(part, "rb") as written:
        os.fsync(written.fileno())
    os.replace(part, target)
    return done, *sizes


def is_done(source, target):
    if not target.exists():
        return False
    origin = json.loads((pq.read_schema(target).metadata or {}).get(b"prepared_from", b"{}"))
    if origin != {"name": source.name, "bytes": source.stat().st_size}:
        raise SystemExit(f"{target} is there and was not made of {source}: remove it, or take another OUT")
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="DIR")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--column", default="image")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if shutil.which("jpegtran") is None:
        raise SystemExit("jpegtran is not there: apt install libjpeg-turbo-progs, or brew install jpeg-turbo")
    files = sorted(args.source.rglob("*.parquet"))
    if not files:
        raise SystemExit(f"{args.source}: no .parquet files below it")
    if args.out.resolve() == args.source.resolve():
        raise SystemExit(f"{args.out}: is the source, which is only read: take another OUT")

    total, before, after = collections.Counter(), 0, 0
    with ThreadPoolExecutor(args.jobs) as pool:  # jpegtran is a process, PIL decodes outside of Python's lock: threads do
        for source in tqdm(files, unit="file"):
            target = args.out / source.relative_to(args.source)
            if is_done(source, target):
                total["files left out: there already"] += 1
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            done, b, a = prepare(source, target, args.column, pool)
            total, before, after = total + done, before + b, after + a
    for what, n in total.most_common():
        print(f"{n:>10,} {what}")
    if before:
        print(f"{before:,} bytes before, {after:,} after ({100 * (after / before - 1):+.2f} %)")


if __name__ == "__main__":
    main()
