"""Walks the stages of a run: what every process of a launched run executes, `python -m gowide_dist.pipeline RUN ...`.

Imports no torch before training starts.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gowide_dist import stop
from gowide_dist.data.info import read_dataset_info
from gowide_dist.data.preprocessing import Preprocessing, read_preprocessing
from gowide_dist.errors import DataError, RunError, UserError, fixable, is_full, may_pass
from gowide_dist.identity import identities
from gowide_dist.instances import Instance
from gowide_dist.launch.local import (
    GPUS_VARIABLE,
    LAUNCHER_VARIABLE,
    end_with_launcher,
    leave,
    leave_error,
    num_gpus,
)
from gowide_dist.prepare import Prepared, adopt, check_data, check_foreign, check_group
from gowide_dist.progress import write_text_only
from gowide_dist.recipe import Recipe
from gowide_dist.run import Done, Run, key_of
from gowide_dist.timeline import Batching

if TYPE_CHECKING:
    from gowide_dist.networks.network import Network
    from gowide_dist.train.context import TrainContext, TrainData
    from gowide_dist.world import World


def walk(run: Run, keys: Sequence[str], *, sequential: bool = False, logits: bool = False) -> None:
    """Train the named instances of a run, stage after stage; every process of the group calls this.

    Instances of one stage that follow each other train together, on one data stream and one pass of the teacher, or
    with `sequential` one after the other, which takes less memory and gives the same weights. With `logits` they do not
    train: their teacher's logits are stored.
    """
    from gowide_dist.train.context import TrainContext
    from gowide_dist.train.loop import store_logits, train_together
    from gowide_dist.world import join

    recipe = run.recipe()
    if unknown := [key for key in keys if key not in recipe.instances]:
        raise RunError(f"{run.recipe_path}: no longer has {', '.join(unknown)}; `gowide cancel` ends its jobs")
    is_resolved = recipe.data.classes is not None  # not where it was submitted before the data were there
    recipe, checksums = check_data(recipe)
    with join() as world:
        check_group(recipe, world.size, on_gpus=world.device.type == "cuda")
        world.on_main(lambda: run.write_environment(world.device_names, world.size))
        if not is_resolved:
            world.on_main(lambda: run.write_recipe(recipe))
        with open_data(recipe, world) as data:
            ctx = TrainContext(recipe, run, world, data, world.on_main(lambda: identities(recipe, checksums)))
            world.on_main(
                lambda: check_foreign(recipe, [recipe.instances[key] for key in keys if not ctx.is_done(key)])
            )
            for _, group in itertools.groupby(keys, lambda key: key if sequential else key.partition("/")[0]):
                if left := world.on_main(functools.partial(_unfinished, list(group), ctx, logits=logits)):
                    instances = [recipe.instances[key] for key in left]
                    task = store_logits if logits else train_together
                    task(instances, ctx)


def _unfinished(keys: Sequence[str], ctx: TrainContext, *, logits: bool) -> list[str]:
    """Those of the instances that are to be trained: a job that was requeued at its very end finds its own done.

    What they build on, or for `logits` their teacher, may have been trained by a job of a run beside this one, as that
    of another seed. Raises RunError unless all of it is finished: Slurm starts jobs whose parents it has forgotten.
    """
    instances = ctx.recipe.instances
    needs = {key: [instances[key].teacher or ""] if logits else instances[key].parents for key in keys}
    parents = {parent: instances[parent] for key in keys for parent in needs[key]}
    adopt(Prepared(ctx.recipe, ctx.run, parents, ctx.identities))
    for key in keys:
        for parent in needs[key]:
            if not ctx.is_done(parent):
                raise RunError(f"{key}: needs {parent}, which is not finished in {ctx.run.path}; submit the run again")
    return [key for key in keys if not ctx.is_done(key)]


@contextlib.contextmanager
def open_data(recipe: Recipe, world: World) -> Iterator[TrainData]:
    """This process's part of the data that a recipe names. Raises DataError if it cannot be read."""
    from gowide_dist.data.loader import Loader, augmentations_of, geometry_of
    from gowide_dist.train.context import TrainData

    info, data = read_dataset_info(recipe.data.train), recipe.data
    batching, num_threads = Batching(recipe.batch_size, world.size, world.rank), world.num_loader_threads
    loader = functools.partial(Loader, batching=batching, resolution=data.resolution, num_threads=num_threads)
    train = functools.partial(
        loader, data.train, train=True, geometry=geometry_of(data, train=True),
        augmentations=tuple(augmentations_of(data.augment, info.mean)), order=data.order,
    )  # fmt: skip
    with contextlib.closing(loader(data.val, train=False, geometry=geometry_of(data, train=False))) as val:
        val.preflight(len(info.classes))
        yield TrainData(lambda seed: train(seed=seed), val, info, world.device)


def load_model(run: str | Path, stage: str, network: str | None = None) -> Network:
    """The finished network of a stage, on the CPU, in eval mode. `network` may be left out if the stage has one.

    Its `preprocessing` has the names of the classes, and makes its input of image files. The run's folder is enough.
    Raises UserError if the run has no such stage or it is not finished.
    """
    from gowide_dist.train.start import load_trained

    run_dir = Run(Path(run))
    recipe, instance, _ = find_finished(run_dir, stage, network)
    assert recipe.data.classes is not None, "a run's recipe is resolved"
    loaded = load_trained(instance, run_dir, recipe.data.classes).eval()
    with contextlib.suppress(DataError):  # of an older run without its data
        loaded.preprocessing = preprocessing_of(run_dir, recipe, instance)
    return loaded


def preprocessing_of(run: Run, recipe: Recipe, instance: Instance) -> Preprocessing:
    """What a finished network takes and gives: from the metadata of its weights.

    An older run has no such metadata: then from the data that it was trained on. Raises DataError if these are missing
    or have changed.
    """
    if known := read_preprocessing(run.stage(instance.key).model):
        return known
    train, info = recipe.data.train, read_dataset_info(recipe.data.train)
    checksums = {split.file: split.checksum for split in info.splits.values()}
    if checksums.get(train.name) != (run.stage(instance.key).read_identity() or {})["data"]["train"]:
        raise DataError(
            f"{train}: differs from the data that {instance.key} was trained on, whose mean and standard deviation it "
            "needs; encode it again with the original settings"
        )
    return Preprocessing.of(recipe.data, info, instance.normalise)


def find_finished(run: Run, stage: str, network: str | None = None) -> tuple[Recipe, Instance, Done]:
    """The finished instance of a stage, and its recipe. Raises UserError as `load_model` does."""
    recipe = run.recipe()
    key = key_of(f"{stage}/{network}" if network else stage, recipe.instances, run.path)
    if (done := run.finished(recipe).get(key)) is None:
        if run.stage(key).done:
            raise RunError(
                f"{run.path}: {key} is finished, but not by this recipe.yaml on the stages that are here; copy the "
                "run's whole folder, or run the recipe again"
            )
        raise RunError(f"{run.path}: {key} is not finished; run the recipe again to continue it")
    return recipe, recipe.instances[key], done


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of every training process.

    Exit status 2 for a UserError, which is left for the launcher to show; 128 and the signal's number if it was told
    to stop, and has saved.
    """
    parser = argparse.ArgumentParser(prog="python -m gowide_dist.pipeline")
    parser.add_argument("run", type=Path)
    parser.add_argument("keys", nargs="+", metavar="STAGE/NETWORK")
    parser.add_argument("--sequential", action="store_true", help="one instance after the other")
    parser.add_argument("--logits", action="store_true", help="store the teacher's logits, and train nothing")
    given = parser.parse_args(arguments)
    options = {"sequential": given.sequential, "logits": given.logits}
    return work(functools.partial(walk, Run(given.run), given.keys, **options), given.run)


def work(task: Callable[[], None], path: Path) -> int:
    """Do a launched process's task; its exit status, as `main` says. path: where it writes.

    A process that fails alone says why, where the launcher finds it, and is to leave at once (`leave`).
    """
    write_text_only()
    end_with_launcher()
    try:
        stop.listen()
        if "TORCHELASTIC_RUN_ID" in os.environ and LAUNCHER_VARIABLE not in os.environ:
            os.environ.setdefault(GPUS_VARIABLE, str(num_gpus()))  # a torchrun of the user's own says nothing of GPUs
        task()
    except UserError as error:
        if may_pass(error) and "TORCHELASTIC_RUN_ID" not in os.environ:  # Slurm's batch script tries again
            sys.stderr.write(f"{error}\n")
            return 1
        leave_error(str(error))
        return 2
    except stop.Stopped as stopped:
        return 128 + stopped.signum
    except BaseException as error:  # an interpreter that shuts down waits for the process group
        if isinstance(error, OSError | ImportError) and (line := fixable(error)):
            leave_error(f"{path}: {line}" if isinstance(error, OSError) and is_full(error) else line)
            return 2
        if isinstance(error, FileNotFoundError) and not path.exists():
            leave_error(f"{path}: was deleted during the training; the same command begins it again")
            return 2
        from gowide_dist.world import peer_failure

        with contextlib.suppress(OSError):
            if line := peer_failure(error):
                sys.stderr.write(f"rank {os.environ.get('RANK', '0')}: {line}\n")
            else:
                traceback.print_exception(error)
        return 1
    return 0


if __name__ == "__main__":
    leave(main())
