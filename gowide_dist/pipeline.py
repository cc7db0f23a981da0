"""A recipe on this machine's disk: what is done, what is left, and walking it.

`prepare` checks everything that can be checked before anything is spent. `python -m gowide_dist.pipeline RUN` is what
every process of a launched run executes. Nothing here imports torch before training starts.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import itertools
import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gowide_dist import stop
from gowide_dist.collector import collect_seldom
from gowide_dist.data.info import DatasetInfo, check_split, read_dataset_info
from gowide_dist.errors import DataError, RecipeError, RunError, UserError, is_full, mendable
from gowide_dist.launch.local import end_with_launcher, leave, leave_error, num_gpus, torchrun
from gowide_dist.launch.profile import Profile
from gowide_dist.launch.queue import job_name, newest_jobs, read_jobs
from gowide_dist.launch.slurm import Chain, Job, Worker, check_folder
from gowide_dist.recipe import Instance, KlStage, Recipe, load_recipe
from gowide_dist.run import Done, Run, StageDir, fingerprint, identities, write_atomically

if TYPE_CHECKING:
    from gowide_dist.networks import ResNet
    from gowide_dist.stage import Images, Workshop
    from gowide_dist.world import World


@dataclass(frozen=True)
class Prepared:
    """A checked recipe and its run directory."""

    recipe: Recipe
    run: Run
    selected: Mapping[str, Instance]
    identities: Mapping[str, Mapping[str, Any]]

    @property
    def unfinished(self) -> list[Instance]:
        """The selected instances that are not done, parents first."""
        return [
            instance
            for key, instance in self.selected.items()
            if not self.run.stage(key).is_done(fingerprint(self.identities[key]))
        ]


def prepare(
    recipe: Recipe, runs: Path, *, num_processes: int = 1, only: Sequence[str] = (), fresh: bool = False
) -> Prepared:
    """Check the recipe against the data, the processes and the run directory, then write the directory.

    `fresh` forgets what another recipe left in the places of the selected stages. Raises UserError, with nothing
    changed, if anything does not fit.
    """
    check_group(recipe, num_processes, on_gpus=num_gpus() > 0)
    prepared = examine(recipe, runs, only=only, fresh=fresh)
    write(prepared, fresh=fresh)
    return prepared


def examine(
    recipe: Recipe, runs: Path, *, only: Sequence[str] = (), fresh: bool = False, in_jobs: Collection[str] = ()
) -> Prepared:
    """Check the recipe against the data and the run directory, and write nothing.

    in_jobs: instances that Slurm jobs are training or will train. Raises UserError if anything does not fit.
    """
    selected = recipe.select(only) if only else recipe.instances
    recipe, checksums = check_data(recipe)
    run = Run(runs / recipe.name)
    for path in (runs, run.path):
        if path.exists() and not path.is_dir():
            raise RunError(f"{path}: is no folder; choose another place with --runs")
    prepared = Prepared(recipe, run, selected, identities(recipe, checksums))
    for instance in prepared.unfinished:
        place = run.stage(instance.key)
        if instance.key not in in_jobs:
            place.check_unlocked()
        elif fresh:
            raise RunError(
                f"{place.path}: a Slurm job trains {instance.key}; `gowide cancel {run.path}` before --fresh"
            )
        if not fresh:
            place.check_identity(prepared.identities[instance.key])
    return prepared


def write(prepared: Prepared, *, fresh: bool = False, in_jobs: Collection[str] = ()) -> None:
    """Write the run directory, and take over what a sibling run has finished. `fresh` as in `prepare`.

    in_jobs: instances whose folders are left alone, for Slurm jobs write them.
    """
    run = prepared.run
    for instance in prepared.unfinished if fresh else ():
        run.stage(instance.key).forget()
    run.write_recipe(prepared.recipe)
    for instance in prepared.unfinished:
        if instance.key not in in_jobs and (there := sibling(instance, prepared)):
            _adopt(instance, there, prepared)


def prepare_chain(
    recipe: Recipe, runs: Path, profile: Profile, *, only: Sequence[str] = (), fresh: bool = False
) -> tuple[Prepared, Chain]:
    """A Slurm job for each instance that is neither finished nor in the queue; writes nothing.

    Raises UserError if the recipe does not fit the data, the profile or the run directory.
    """
    run = Run(runs.absolute() / recipe.name)
    check_folder(run.slurm, profile)
    known = read_jobs(run.slurm)
    states = newest_jobs(run.slurm, recipe.name)
    queued = {key: state.job_id for key, state in states.items() if state.is_waiting or state.is_running}
    leaving = {key: state.job_id for key, state in states.items() if state.is_leaving}
    prepared = examine(recipe, run.path.parent, only=only, fresh=fresh, in_jobs={*queued, *leaving})
    unfinished = [instance.key for instance in prepared.unfinished]
    stale: dict[str, str] = {}
    for key in unfinished:  # parents first
        waits_in_vain = {*recipe.instances[key].parents} & {*unfinished} - {*queued}
        if key in queued and states[key].is_waiting and waits_in_vain:
            stale[key] = queued.pop(key)
    left = [
        instance
        for instance in prepared.unfinished
        if instance.key not in queued and sibling(instance, prepared) is None
    ]
    return prepared, Chain(run.slurm, _jobs(left, recipe, run, profile), queued, leaving, stale, known)


def rehearse_chain(
    recipe: Recipe, runs: Path, profile: Profile, *, only: Sequence[str] = (), fresh: bool = False
) -> Chain:
    """What `prepare_chain` would submit; without the data, which a rehearsal can do without, all that was selected."""
    try:
        return prepare_chain(recipe, runs, profile, only=only, fresh=fresh)[1]
    except DataError as error:
        sys.stderr.write(f"gowide: {error}; these are the jobs of a run of which nothing is finished\n")
    run = Run(runs.absolute() / recipe.name)
    selected = recipe.select(only) if only else recipe.instances
    return Chain(run.slurm, _jobs(selected.values(), recipe, run, profile), {}, {})


def _jobs(instances: Iterable[Instance], recipe: Recipe, run: Run, profile: Profile) -> tuple[Job, ...]:
    """The instances' jobs. Raises RecipeError if the global batch cannot be shared by a job's processes."""
    for name in {*profile.stages} - {*recipe.stages} - {*recipe.instances}:
        sys.stderr.write(f"gowide: the cluster profile's stages.{name} is no stage of recipe {recipe.name}\n")
    jobs = []
    for instance in instances:
        resources = profile.resources(instance)
        for num_processes in resources.num_processes:
            check_group(recipe, num_processes, on_gpus=resources.gpus_per_node > 0)
        worker = Worker("gowide_dist.pipeline", (str(run.path), instance.key))
        jobs.append(Job(instance.key, job_name(recipe.name, instance.key), instance.parents, worker, resources))
    return tuple(jobs)


def run_here(prepared: Prepared, num_processes: int, *, apart: bool = False) -> None:
    """Train all unfinished stages under torchrun. apart: as in `walk`."""
    if left := prepared.unfinished:
        arguments = [str(prepared.run.path), *(instance.key for instance in left), *(["--apart"] if apart else [])]
        torchrun("gowide_dist.pipeline", arguments, num_processes)


def check_group(recipe: Recipe, num_processes: int, *, on_gpus: bool) -> None:
    """Raises RecipeError if so many processes cannot train the recipe."""
    recipe.check_processes(num_processes)
    if recipe.sync_batch_norm and num_processes > 1 and not on_gpus:
        raise RecipeError(
            f"sync_batch_norm: PyTorch has it for GPUs only, and the {num_processes} processes have none; "
            "set it to false"
        )


def walk(run: Run, keys: Sequence[str], *, apart: bool = False) -> None:
    """Train the named instances of a run, stage after stage; every process of the group calls this.

    Instances of one stage that follow each other train together, on one data stream and one teacher's answers, or with
    `apart` one after the other, which takes less memory and gives the same weights.
    """
    importlib.import_module("torch._dynamo")  # the first optimiser does; sooner, the collector still looks seldom
    from gowide_dist import world as worlds
    from gowide_dist.stage import Workshop, train_together

    recipe = load_recipe(run.recipe_path)
    if unknown := [key for key in keys if key not in recipe.instances]:
        raise RunError(f"{run.recipe_path}: no longer has {', '.join(unknown)}; `gowide cancel` ends its jobs")
    recipe, checksums = check_data(recipe)
    with worlds.join() as world:
        check_group(recipe, world.size, on_gpus=world.device.type == "cuda")
        if world.is_main:
            run.write_environment(_devices(world.device), world.size)
        with open_images(recipe, world) as images:
            shop = Workshop(recipe, run, world, images, identities(recipe, checksums))
            for _, team in itertools.groupby(keys, lambda key: key if apart else recipe.instances[key].stage_name):
                instances = [recipe.instances[key] for key in team]
                for instance in instances:
                    _check_parents(instance, shop.identities, run)
                # a job that was queued again at its very end finds its instance done
                left = [instance.key for instance in instances if not _is_done(instance, shop)]
                if left := world.share(left):
                    train_together([recipe.instances[key] for key in left], shop)


@contextlib.contextmanager
def open_images(recipe: Recipe, world: World) -> Iterator[Images]:
    """This process's share of the data that a recipe names. Raises DataError if it cannot be read."""
    from gowide_dist.data.loader import Loader
    from gowide_dist.stage import Images

    info = read_dataset_info(recipe.data.train)
    data, augment = recipe.data, recipe.data.augment
    loader = functools.partial(
        Loader,
        batch_size=recipe.batch_size,
        rank=world.rank,
        world_size=world.size,
        resolution=data.resolution,
        num_threads=world.num_threads,
    )
    train = functools.partial(
        loader,
        data.train,
        train=True,
        flip=augment.flip,
        translate=augment.translate,
        crop_scale=augment.crop and augment.crop.scale,
        crop_ratio=augment.crop.ratio if augment.crop else (1.0, 1.0),
        order=data.order,
    )
    with contextlib.closing(loader(data.val, train=False, center_crop_ratio=data.center_crop)) as val:
        val.preflight(len(info.classes))
        mean, std = (_channels(values, world.device) for values in (info.mean, info.std))
        yield Images(lambda seed: train(seed=seed), val, len(info.classes), mean, std)


def load_model(run: str | Path, stage: str, network: str | None = None) -> ResNet:
    """The finished network of a stage, on the CPU, in eval mode. `network` may be left out if the stage has one.

    Raises UserError if the run has no such stage or it is not finished.
    """
    from gowide_dist.stage import load_trained

    place = Run(Path(run))
    recipe, instance, _ = find_finished(place, stage, network)
    assert recipe.data.classes is not None, "a run's recipe is resolved"
    return load_trained(instance, place, recipe.data.classes).eval()


def find_finished(run: Run, stage: str, network: str | None = None) -> tuple[Recipe, Instance, Done]:
    """The finished instance of a stage, and its recipe. Raises UserError as `load_model` does."""
    recipe = load_recipe(run.recipe_path)
    found = [
        instance
        for instance in recipe.instances.values()
        if instance.stage_name == stage and network in (None, instance.network_name)
    ]
    if len(found) != 1:
        raise RunError(f"{run.path}: name one of its stages and networks: {', '.join(recipe.instances)}")
    if (done := run.finished(recipe).get(found[0].key)) is None:
        raise RunError(f"{run.path}: {found[0].key} is not finished; run the recipe again to continue it")
    return recipe, found[0], done


def check_data(recipe: Recipe) -> tuple[Recipe, dict[str, str]]:
    """The recipe with its class count filled in, and the checksums of its files. Raises DataError if they don't fit."""
    data = recipe.data
    cuts = {"train": ("augment.crop", data.augment.crop, "{scale: [0.08, 1.0]}"),
            "val": ("center_crop", data.center_crop, "0.875")}  # fmt: skip
    infos: dict[str, DatasetInfo] = {}
    checksums: dict[str, str] = {}
    for name, path in (("train", data.train), ("val", data.val)):
        infos[name] = info = read_dataset_info(path)
        split = check_split(path)
        checksums[name] = split.checksum
        if data.classes not in (None, len(info.classes)):
            raise DataError(f"data.classes: {path} has {len(info.classes)} classes, the recipe says {data.classes}")
        if info.fixed_side_px not in (None, data.resolution):
            raise DataError(
                f"data.resolution: the images of {path} have {info.fixed_side_px} px, the recipe says {data.resolution}"
            )
        key, given, example = cuts[name]
        if info.fixed_side_px is None and given is None:
            raise DataError(
                f"data.{key}: the images of {path} have {info.min_side_px} to {info.max_side_px} px; "
                f"say how they become {data.resolution} px, for example data.{key}: {example}"
            )
        if name == "train" and split.samples < recipe.batch_size:
            raise DataError(
                f"batch_size: {recipe.batch_size} is more than the {split.samples} images of {path}; take a smaller one"
            )
    if infos["train"].classes != infos["val"].classes:
        raise DataError(f"data: {data.train} and {data.val} have different classes; encode both parts together")
    classes = len(infos["train"].classes)
    for name, stage in recipe.stages.items():
        if isinstance(stage, KlStage) and stage.top_k and stage.top_k >= classes:
            raise RecipeError(f"stages.{name}.top_k: {stage.top_k} of {classes} classes; leave it out to keep all")
    return recipe.model_copy(update={"data": data.model_copy(update={"classes": classes})}), checksums


def _check_parents(instance: Instance, identities: Mapping[str, Mapping[str, Any]], run: Run) -> None:
    """Raises RunError unless what the instance builds on is there: Slurm starts jobs whose parents it has forgotten."""
    for parent in instance.parents:
        if not run.stage(parent).is_done(fingerprint(identities[parent])):
            raise RunError(f"{instance.key}: needs {parent}, which is not finished in {run.path}; submit the run again")


def _is_done(instance: Instance, shop: Workshop) -> bool:
    return shop.run.stage(instance.key).is_done(fingerprint(shop.identities[instance.key]))


def sibling(instance: Instance, prepared: Prepared) -> StageDir | None:
    """Where another run beside this one has finished the same instance, with its weights as they were."""
    mine = fingerprint(prepared.identities[instance.key])
    for path in sorted(prepared.run.path.parent.glob("*/stages/*/*/done.json")):
        place = StageDir(path.parent, "/".join(path.parts[-3:-1]))
        with contextlib.suppress(RunError):
            if place.is_done(mine):
                place.check_weights()
                return place
    return None


def _adopt(instance: Instance, there: StageDir, prepared: Prepared) -> None:
    """Take over what another run has finished."""
    here = prepared.run.stage(instance.key)
    assert there.done is not None
    with here.lock():
        here.claim(prepared.identities[instance.key])
        write_atomically(here.model, there.model.read_bytes())
        if there.metrics.exists():
            shutil.copyfile(there.metrics, here.metrics)
        here.finish(there.done.model_copy(update={"stage": instance.stage_name, "network": instance.network_name}))
    sys.stdout.write(f"{instance.key}  is {there.path} already: taken from there\n")


def _devices(device: Any) -> list[str]:
    import torch

    if device.type == "cuda":
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [str(device)]


def _channels(values: Sequence[float], device: Any) -> Any:
    """Channel values from 0 to 1 as a tensor [3] for pixels from 0 to 255."""
    import torch

    return torch.tensor(values, device=device) * 255


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of every training process.

    Exit status 2 for a UserError, which is left for the launcher to show; 128 and the signal's number if it was told
    to stop, and has saved.
    """
    parser = argparse.ArgumentParser(prog="python -m gowide_dist.pipeline")
    parser.add_argument("run", type=Path)
    parser.add_argument("keys", nargs="+", metavar="STAGE/NETWORK")
    parser.add_argument("--apart", action="store_true", help="one instance after the other")
    given = parser.parse_args(arguments)
    return work(functools.partial(walk, Run(given.run), given.keys, apart=given.apart), given.run)


def work(task: Callable[[], None], place: Path) -> int:
    """Do a launched process's task; its exit status, as `main` says. `place`: where it writes."""
    end_with_launcher()
    collect_seldom()
    stop.listen()
    try:
        task()
    except UserError as error:
        leave_error(str(error))
        return 2
    except OSError as error:
        if (line := mendable(error)) is None:
            raise
        leave_error(f"{place}: {line}" if is_full(error) else line)
        return 2
    except stop.Stopped as stopped:
        return 128 + stopped.signum
    return 0


if __name__ == "__main__":
    leave(main())
