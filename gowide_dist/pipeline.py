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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gowide_dist import stop
from gowide_dist.collector import collect_seldom
from gowide_dist.data.info import read_dataset_info
from gowide_dist.errors import RunError, UserError, is_full, mendable
from gowide_dist.identity import fingerprint, identities
from gowide_dist.launch.local import end_with_launcher, leave, leave_error
from gowide_dist.prepare import check_data, check_group
from gowide_dist.recipe import Instance, Recipe, load_recipe
from gowide_dist.run import Done, Run
from gowide_dist.timeline import Batching

if TYPE_CHECKING:
    from gowide_dist.networks.resnet import ResNet
    from gowide_dist.train.loop import Images, TrainContext
    from gowide_dist.world import World


def walk(run: Run, keys: Sequence[str], *, sequential: bool = False) -> None:
    """Train the named instances of a run, stage after stage; every process of the group calls this.

    Instances of one stage that follow each other train together, on one data stream and one teacher's answers, or with
    `sequential` one after the other, which takes less memory and gives the same weights.
    """
    importlib.import_module("torch._dynamo")  # the first optimiser does; sooner, the collector still looks seldom
    from gowide_dist import world as worlds
    from gowide_dist.train.loop import TrainContext, train_together

    recipe = load_recipe(run.recipe_path)
    if unknown := [key for key in keys if key not in recipe.instances]:
        raise RunError(f"{run.recipe_path}: no longer has {', '.join(unknown)}; `gowide cancel` ends its jobs")
    recipe, checksums = check_data(recipe)
    with worlds.join() as world:
        check_group(recipe, world.size, on_gpus=world.device.type == "cuda")
        if world.is_main:
            run.write_environment(_devices(world.device), world.size)
        with open_images(recipe, world) as images:
            ctx = TrainContext(recipe, run, world, images, identities(recipe, checksums))
            for _, team in itertools.groupby(keys, lambda key: key if sequential else recipe.instances[key].stage_name):
                instances = [recipe.instances[key] for key in team]
                for instance in instances:
                    _check_parents(instance, ctx.identities, run)
                # a job that was queued again at its very end finds its instance done
                left = [instance.key for instance in instances if not _is_done(instance, ctx)]
                if left := world.broadcast(left):
                    train_together([recipe.instances[key] for key in left], ctx)


@contextlib.contextmanager
def open_images(recipe: Recipe, world: World) -> Iterator[Images]:
    """This process's share of the data that a recipe names. Raises DataError if it cannot be read."""
    from gowide_dist.data.loader import Loader, geometry_of
    from gowide_dist.train.loop import Images

    info, data = read_dataset_info(recipe.data.train), recipe.data
    loader = functools.partial(
        Loader,
        batching=Batching(recipe.batch_size, world.size, world.rank),
        resolution=data.resolution,
        num_threads=world.num_threads,
    )
    train = functools.partial(loader, data.train, train=True, geometry=geometry_of(data, train=True), order=data.order)
    with contextlib.closing(loader(data.val, train=False, geometry=geometry_of(data, train=False))) as val:
        val.preflight(len(info.classes))
        mean, std = (_channels(values, world.device) for values in (info.mean, info.std))
        yield Images(lambda seed: train(seed=seed), val, len(info.classes), mean, std)


def load_model(run: str | Path, stage: str, network: str | None = None) -> ResNet:
    """The finished network of a stage, on the CPU, in eval mode. `network` may be left out if the stage has one.

    Raises UserError if the run has no such stage or it is not finished.
    """
    from gowide_dist.train.loop import load_trained

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


def _check_parents(instance: Instance, identities: Mapping[str, Mapping[str, Any]], run: Run) -> None:
    """Raises RunError unless what the instance builds on is there: Slurm starts jobs whose parents it has forgotten."""
    for parent in instance.parents:
        if not run.stage(parent).is_done(fingerprint(identities[parent])):
            raise RunError(f"{instance.key}: needs {parent}, which is not finished in {run.path}; submit the run again")


def _is_done(instance: Instance, ctx: TrainContext) -> bool:
    return ctx.run.stage(instance.key).is_done(fingerprint(ctx.identities[instance.key]))


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
    parser.add_argument("--sequential", action="store_true", help="one instance after the other")
    given = parser.parse_args(arguments)
    return work(functools.partial(walk, Run(given.run), given.keys, sequential=given.sequential), given.run)


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
