"""Train the students of a recipe, several at once over one teacher forward.

    accelerate launch train.py recipes/quickstart.json
    accelerate launch train.py recipes/prev_cifar_res20_res56.json --data ../shared/data/cifar100 --limit 200
    accelerate launch train.py recipes/prev_cifar_res20_res56.json --set epochs=60 --students kd --resume

Writes into --out (default: runs/RECIPE): recipe.json as it ran, metrics.jsonl, STUDENT/ for
TensorBoard, checkpoints/ to --resume from, students/STUDENT/ for timm, and result.json. Processes, precision
and devices belong to `accelerate launch`.

The learning rate, the weight of the distillation loss and all randomness are functions of (seed, step): a run
that was stopped and resumed is the uninterrupted run bit for bit, and a student learns the same alone or in
company.
"""

import argparse
import dataclasses
import json
import os
import shlex
import sys
import time
from pathlib import Path

if __name__ == "__main__" and os.environ.get("RANK", "0") == "0":  # the imports below take seconds
    print(f"train.py {' '.join(sys.argv[1:])}: loading PyTorch and the recipe ...", file=sys.stderr)

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, ProjectConfiguration
from tqdm import tqdm

import augment
import checkpoint
import class_names
import data
import distill
import launch
import models
import optim
import recipe
import rundir
import sources
import workers
from evaluate import accuracy, to_float
from finish import finish, summary
from log import Log, count_parameters, plan


def train(settings, loader, teacher, students, log, checkpoints, signals, step, stop):
    """Train `students` from optimizer step `step` to `stop`. Leaves the log written and a last checkpoint."""
    lead, device, per_epoch = log.lead, log.lead.device, loader.steps_per_epoch
    mix = augment.mixer(settings.data)
    batches = loader.batches(settings.seed, step, stop)
    progress = progress_bar(log.folder.name, step, stop, lead)
    while step < stop:
        started, epoch = time.perf_counter(), step // per_epoch
        for part in range(loader.accumulate):
            log.clock.mark(None)
            images, labels, index = next(batches)
            images = to_float(images, device)
            target, index = labels.to(device, non_blocking=True), index.to(device, non_blocking=True)
            seed = augment.seed_of(settings.seed, step, part, lead.process_index)
            if mix:
                augment.seed_all(seed, device)
                images, target = mix(images, target)
            log.clock.mark("data")

            taught = teacher(images) if teacher else None
            log.clock.mark("teacher")

            for student in students:
                augment.seed_torch(seed, device)  # the same dropout, alone or in company
                lr = optim.lr_at(step, per_epoch, settings.epochs, settings.schedule, student.settings.lr)
                soft_weight = optim.soft_weight_at(epoch, student.settings.soft)
                with student.accelerator.accumulate(student.module):
                    optim.set_lr(student.optimizer, lr)
                    terms = student.forward(images, taught, target, index, soft_weight)
                    student.backward(terms)
                    if student.accelerator.sync_gradients:
                        student.step()  # clip, optimizer, EMA
                log.clock.mark(student.name)
        step += 1
        log.count_step(time.perf_counter() - started, index)

        if step % settings.log_every == 0:
            progress.set_postfix({"mean loss": log.losses(step)})
        if step % per_epoch == 0 and step // per_epoch in evaluated_epochs(settings):
            log.accuracy(step)
        if step % (settings.save_every or per_epoch) == 0 or step == stop:
            checkpoints.save(step, students, log, loader)
        progress.update()
        if number := signals.agreed():
            checkpoints.save(step, students, log, loader)
            raise launch.Stopped(f"{log.folder}: stopped by signal {number} at step {step}: --resume", number)
    progress.close()


def progress_bar(name, step, stop, lead):
    seconds = 0.2 if sys.stderr.isatty() else 30  # between two lines: a log file wants few
    disable = not lead.is_main_process
    return tqdm(total=stop, initial=step, unit="step", desc=name, disable=disable, mininterval=seconds)


def evaluated_epochs(settings):
    """Numbers of epochs after which the students are evaluated: every `evaluate_every`, and the last."""
    return {*range(settings.evaluate_every, settings.epochs, settings.evaluate_every), settings.epochs}


# ---------------------------------------------------------------- a recipe: everything is built, then it runs


@dataclasses.dataclass
class Prepared:
    """A recipe with all that it needs, built once, so that errors show before a teacher is trained."""

    settings: recipe.Recipe
    out: Path
    options: argparse.Namespace
    loader: data.TrainLoader
    test_loader: object
    students: list  # what distill.build_student gave for the first seed
    network: models.Network | None  # the teacher; a stand-in of its shape where `teacher` must run first
    teacher: "Prepared | None"  # its recipe, where it has not finished
    exported: Path | None  # where its recipe leaves it


def run_recipe(path, overrides, out, options):
    """Train every run of a recipe into `out`, or print its plan."""
    lead = launch.make_accelerator()
    prepared = prepare(path, overrides, out, options, lead)
    if options.dry_run:
        dry_run(prepared, lead)
    else:
        execute(prepared, lead)


def prepare(path, overrides, out, options, lead):
    """Load a recipe and build all that it needs; RecipeError, DataError or ModelError for what is wrong."""
    settings = load(path, overrides, options)
    launch.check_launch(settings, lead)
    place = dict(rank=lead.process_index, world=lead.num_processes, workers=options.workers)
    place |= dict(pin=lead.device.type == "cuda", device=lead.device)
    sizes = dict(batch_size=settings.batch_size, batch_size_per_process=settings.batch_size_per_process)
    loader = data.TrainLoader(settings.data, **sizes, **place)
    test_loader = data.test_loader(settings.data, batch_size=settings.batch_size_per_process, **place)
    augment.try_views(settings.data)
    network, teacher, exported = None, None, None
    if settings.teacher and settings.teacher.recipe:
        network, teacher, exported = prepare_teacher(settings, path, out, options, lead)
    elif settings.teacher:
        if not (settings.teacher.pretrained or settings.teacher.checkpoint or options.limit):
            raise recipe.RecipeError(
                f"{path}: teacher: expected one of recipe, checkpoint, pretrained; without any it is "
                "untrained, which only a trial with --limit accepts"
            )
        torch.manual_seed(settings.seed)  # an untrained teacher is the same on every process
        network = distill.build_teacher(settings.teacher, settings.data)
    if network and loader.split.names:
        names = teacher.loader.split.names if teacher else class_names.of_network(network)
        if names:
            class_names.check_same(names, loader.split.names, "the teacher")
    students = build_students(settings, network, loader)
    return Prepared(settings, out, options, loader, test_loader, students, network, teacher, exported)


def prepare_teacher(settings, path, out, options, lead):
    """(network, Prepared or None, exported folder) of a teacher that another recipe trains, beside `out`."""
    path_of_teacher = Path(settings.teacher.recipe)
    if not os.path.isfile(path_of_teacher):  # False, unlike pathlib's, for a name that is too long
        path_of_teacher = Path(path).parent / settings.teacher.recipe
    options = argparse.Namespace(**vars(options) | dict(students=None, overwrite=False))
    wanted = load(path_of_teacher, [], options)
    if len(wanted.students) != 1 or wanted.runs != 1 or wanted.teacher:
        raise recipe.RecipeError(
            f"{path}: teacher.recipe: {path_of_teacher} must train one student, once, without a teacher"
        )
    if wanted.data.classes != settings.data.classes:
        raise recipe.RecipeError(
            f"{path}: teacher.recipe: {path_of_teacher} has {wanted.data.classes} classes, this recipe "
            f"{settings.data.classes}"
        )
    folder = out.parent / path_of_teacher.stem
    if not finished(folder, None):
        folder = folder.with_name(path_of_teacher.stem + limit_suffix(options))
    refuse_other_teacher(folder, wanted, path_of_teacher)
    exported = folder / "students" / wanted.students[0].name
    if finished(folder, None):
        return models.load_exported(exported)[0], None, exported
    options.resume = folder.exists()
    teacher = prepare(path_of_teacher, [], folder, options, lead)
    return teacher.students[0][0].net, teacher, exported


def refuse_other_teacher(folder, wanted, path):
    """RecipeError where the teacher in a folder was trained with other settings, or on other data."""
    if not (folder / "recipe.json").exists():
        return
    trained = recipe.load(folder / "recipe.json")
    changes = rundir.differences(trained, wanted)
    if os.path.realpath(trained.data.source) != os.path.realpath(wanted.data.source):
        changes.append(f"data.source: {json.dumps(trained.data.source)} -> {json.dumps(wanted.data.source)}")
    if changes:
        first = f"{folder}: this teacher was trained with other settings than {path} has now:"
        lines = "\n  ".join([first, *changes])
        advice = f"Choose another --out, beside which a teacher is trained anew, or remove {folder}"
        student = trained.students[0]
        weights = folder / "students" / student.name / "model.safetensors"
        if weights.is_file() and trained.data.classes == wanted.data.classes:
            values = {"recipe": None, "model": student.model, "model_args": student.model_args}
            values |= {"checkpoint": str(weights)}
            option = ["--set", *(f"teacher.{key}={json.dumps(value)}" for key, value in values.items())]
            advice += f"; or, where it is the teacher that you want: {shlex.join(option)}"
        raise recipe.RecipeError(f"{lines}\n{advice}")


def build_students(settings, teacher, loader):
    """[(Distilled, optimizer)] of the students, with the initial weights of the recipe's seed."""
    shapes, labels = None, None
    if any(map(distill.compares_features, settings.students)):
        taps = distill.teacher_taps(settings, teacher)
        shapes = teacher.shapes(settings.data.size, taps, settings.teacher.preactivation)
        labels = loader.labels()
    needs = shapes, labels, loader.smallest_batch
    return [distill.build_student(settings, student, *needs) for student in settings.students]


def dry_run(prepared, lead):
    """Print the plan of a recipe, after that of a teacher which would be trained first. Writes nothing."""
    if prepared.teacher:
        dry_run(prepared.teacher, lead)
    runs = runs_of(prepared.settings, prepared.out)
    for folder, of_seed in runs:
        rundir.check_folder(folder, of_seed, prepared.options)
    log = make_log(prepared.settings, prepared.out, prepared, prepared.students)
    lead.print(plan(log, prepared.network, 0))
    files = "recipe.json, metrics.jsonl, checkpoints/, students/, result.json, TensorBoard's files"
    lead.print(f"  would write {', '.join(str(folder) for folder, _ in runs)}, each with {files}")


def execute(prepared, lead):
    """Train the teacher if it must be, then every seed, and print the scores."""
    settings, out, options = prepared.settings, prepared.out, prepared.options
    locks = []
    if lead.is_main_process:
        for folder, of_seed in runs_of(settings, out):
            locks.append(rundir.lock(folder))
            rundir.open_folder(folder, of_seed, options)
    lead.wait_for_everyone()
    teacher, teacher_scores = make_teacher(prepared, lead) if settings.teacher else (None, None)
    results = []
    for folder, of_seed in runs_of(settings, out):
        result = finished(folder, options.limit)
        if result is None:
            students = prepared.students
            if of_seed.seed != settings.seed:
                students = build_students(of_seed, prepared.network, prepared.loader)
            prepared.students = None  # later seeds need their memory on the device
            prepared.loader.broken = {}
            result = run_seed(of_seed, folder, prepared, students, teacher, teacher_scores)
        results.append(result)
    lead.wait_for_everyone()
    for held in locks:
        held.close()
    if lead.is_main_process:
        print(f"\n{out}\n{summary(results)}")


def make_teacher(prepared, lead):
    """(frozen network, its scores): trained if it must be, evaluated, refused at chance level."""
    settings, limit = prepared.settings, prepared.options.limit
    if prepared.teacher:
        execute(prepared.teacher, lead)
        prepared.network, prepared.teacher = models.load_exported(prepared.exported)[0], None
    network = prepared.network.to(lead.device).eval().requires_grad_(False)
    (scores,) = accuracy([network], prepared.test_loader, lead, limit)
    name = settings.teacher.checkpoint or settings.teacher.model or str(prepared.exported)
    found = f"top-1 {scores['top1']:.2f} %, top-5 {scores['top5']:.2f} % of {scores['n']} images"
    lead.print(f"teacher {name}: {found}")
    if distill.at_chance(scores, settings.data.classes):
        message = (
            f"teacher {name} is at chance level: {found} with {settings.data.classes} classes. Are the "
            "weights, the class order and mean/std those of this data?"
        )
        if not limit:
            raise models.ModelError(message)
        lead.print(f"warning: {message} Going on, because --limit asks for a trial only.")
    scores = {"name": name, "parameters": count_parameters(network), **scores}
    return distill.freeze(network, settings.data.size), scores


# ---------------------------------------------------------------- one seed of a recipe


def make_log(settings, folder, prepared, students):
    """The Log of one seed, with its students prepared for training; students: as in Prepared."""
    tracking = dict(log_with="tensorboard", project_config=ProjectConfiguration(str(folder), str(folder)))
    lead = launch.make_accelerator(**tracking)  # the first: the last one sets the accumulation of all
    loader, limit = prepared.loader, prepared.options.limit
    students = [
        distill.prepare_student(student, *built, loader, **tracking)
        for student, built in zip(settings.students, students, strict=True)
    ]
    total = settings.epochs * loader.steps_per_epoch
    stop = min(total, limit or total)
    return Log(folder, settings, lead, students, loader, prepared.test_loader, stop, limit)


def run_seed(settings, folder, prepared, students, teacher, teacher_scores):
    """Train one seed in its folder, from where it was left; returns what result.json holds.

    students: as in Prepared; teacher: a frozen Network or None.
    """
    log = make_log(settings, folder, prepared, students)
    lead, students, loader = log.lead, log.students, prepared.loader
    if teacher is not None:
        taps = distill.teacher_taps(settings, teacher)
        teacher = distill.Teacher(compiled(teacher, lead, len(students)), settings.teacher, lead, taps)
    checkpoints = checkpoint.Checkpoints(folder, settings, lead)
    signals = launch.Signals(lead.num_processes)
    step = checkpoints.restore(students, log, loader)
    log.open_board(step)
    lead.print(plan(log, prepared.network, step))
    with signals:
        train(settings, loader, teacher, students, log, checkpoints, signals, step, log.stop)
        result = finish(log, log.stop, teacher_scores)
    log.close_board()
    return result


def compiled(teacher, lead, students):
    """The teacher under torch.compile where the launch asks for it; `prepare` has compiled the students."""
    dynamo = lead.state.dynamo_plugin
    if dynamo.backend == DynamoBackend.NO:
        return teacher
    # the students share Distilled.forward, which needs a graph for each
    torch._dynamo.config.recompile_limit = 4 * students + 4
    return torch.compile(teacher, **dynamo.to_kwargs())


# ---------------------------------------------------------------- recipes and folders


def load(path, overrides, options):
    """The recipe with the command line's changes: --set, --data, --students."""
    if options.data:
        overrides = [*overrides, f"data.source={json.dumps(options.data)}"]
    settings = recipe.load(path, overrides)
    settings = dataclasses.replace(settings, data=sources.resolved(settings.data))
    if not options.students:
        return settings
    students = chosen_students(settings, path, options.students)
    teacher = settings.teacher if any(student.soft for student in students) else None
    return dataclasses.replace(settings, students=students, teacher=teacher)


def chosen_students(settings, path, names):
    """The students of a recipe with these names; RecipeError for a name that it does not have."""
    known = [student.name for student in settings.students]
    for name in names:
        if name not in known:
            raise recipe.RecipeError(
                f"{path}: --students: no student {name!r} (students: {', '.join(known)})"
            )
    return tuple(student for student in settings.students if student.name in names)


def runs_of(settings, out):
    """[(folder, the recipe with one seed)]; several seeds get a folder each."""
    seeds = range(settings.seed, settings.seed + settings.runs)
    of_seeds = [dataclasses.replace(settings, seed=seed, runs=1) for seed in seeds]
    return [(out / f"seed{one.seed}" if settings.runs > 1 else out, one) for one in of_seeds]


def limit_suffix(options):
    return f"-limit{options.limit}" if options.limit else ""


def finished(folder, limit):
    """The result of a run that reached its end (or `limit` steps), or None."""
    if not (folder / "result.json").exists():
        return None
    result = rundir.read_checked(folder / "result.json", rundir.RESULT)
    return result if result["limit"] in (None, limit) else None


# ---------------------------------------------------------------- command line


def main(arguments=None):
    parser = make_parser(__doc__)
    dry_run = "make every check, print the plan, write nothing"
    parser.add_argument("--dry-run", action="store_true", help=dry_run)
    args = parser.parse_args(arguments)
    launch_command(parser, args, lambda out: run_recipe(args.recipe, args.set, out, args))


def make_parser(description):
    """The flags that train.py and detect.py have in common."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("recipe", type=Path, help="JSON file: a run's settings")
    change = "change the recipe, e.g. epochs=60"
    add("--set", nargs="+", action="extend", default=[], metavar="PATH=VALUE", help=change)
    add("--data", help="where the data is: a folder, a name on the hub, or digits (sets data.source)")
    add("--students", nargs="+", metavar="NAME", help="train only these of the recipe's students")
    add("--out", type=Path, help="the run's folder (default: runs/RECIPE); its teacher's lies beside it")
    add("--resume", action="store_true", help="continue the run in --out from its newest checkpoint")
    add("--overwrite", action="store_true", help="delete the run in --out and start again")
    trial = "a trial: stop after so many steps, evaluate on so many batches"
    add("--limit", type=whole_number(1), metavar="STEPS", help=trial)
    processes = min(os.cpu_count() or 1, 8)
    add("--workers", type=whole_number(0), default=processes, help="loader processes per process")
    return parser


def launch_command(parser, args, run):
    """`run(out)` for the arguments of a command; its errors become one line and an exit code."""
    out = args.out or Path("runs") / (args.recipe.stem + limit_suffix(args))
    if args.resume and args.overwrite:
        parser.error("--resume continues a run, --overwrite deletes it: choose one")
    try:
        run(out)
    except (recipe.RecipeError, sources.DataError, models.ModelError, launch.TrainingError) as error:
        fail(error)
    except RuntimeError as error:  # PyTorch raises it wherever the loop is when a loader's process dies
        died = workers.dead_worker(error)
        if died is None:
            raise
        fail(died)
    Accelerator().end_training()


def fail(error):
    """Print an error and exit with its code, 2 for one that has none: bad input."""
    text = "\n".join(map(recipe.printable, str(error).split("\n")))  # file names come from others
    print(f"\nerror: {text}\n", file=sys.stderr)  # `accelerate launch` prints a traceback of its own below
    sys.exit(getattr(error, "exit_code", 2))


def whole_number(least):
    """A type for argparse."""

    def convert(text):
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number, {least} or more, got {text!r}")
        return int(text)

    return convert


if __name__ == "__main__":
    main()
