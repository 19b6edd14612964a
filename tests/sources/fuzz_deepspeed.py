"""Draw random jobs, run them with DeepSpeed, and hold ckptengine to what DeepSpeed gathers and resumes.

Needs deepspeed (CPU is enough).  ``python tests/sources/fuzz_deepspeed.py OUT FIRST COUNT`` runs the jobs of the seeds
``FIRST`` to ``FIRST + COUNT - 1``.  Each saves a checkpoint and trains on.  The checkpoint is opened and compared bit
for bit with what lay in memory; what DeepSpeed's converter makes of it is compared too; and it is converted to other
stages and numbers of ranks, from which DeepSpeed resumes: its states must be equal bit for bit, and its losses near.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__:
    from . import make_deepspeed_zoo as zoo
else:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from tests.sources import make_deepspeed_zoo as zoo

LEAN_STATES = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
OPTIMIZERS = ["adamw", "sgd", "sgd0", "adagrad", "amsgrad", "nadam", "adamax", "asgd", "rmsprop", "lion", "groupstep"]
ODD = ("frozen", "tied", "odd", "scalar", "transposed", "shared", "empty")
STEPS = 2
"""Steps after the checkpoint, on data that is the same for all ranks."""


# what to run


def draw(seed: int) -> tuple[int, dict[str, Any]]:
    """The ranks and options of one job."""
    rng = random.Random(seed)
    kind = rng.choices(["dense", "pipeline", "moe"], [7, 1.5, 1.5])[0]
    sizes = {"width": [3, 5, 8, 11, 13], "inner": [1, 4, 7, 17], "vocabulary": [7, 19, 37], "blocks": [1, 2, 3]}
    options: dict[str, Any] = {key: rng.choice(choice) for key, choice in sizes.items()}
    options |= {"stage": rng.choice([1, 2, 3, 3, 0]), "dtype": rng.choice(["bf16", "bf16", "fp16", "fp32"])}
    options |= {key: True for key in ODD if rng.random() < 0.3}
    options["groups"] = rng.choice(["two", "two", "one", "each", "reversed"])
    options["optimizer"] = rng.choice([*OPTIMIZERS, "adamw", "adamw", "adamw"])
    options["steps"] = rng.choice([1, 2, 3, 4])
    ranks = rng.choice([1, 2, 2, 3, 3, 4, 5])
    if rng.random() < 0.3:
        options["scheduler"] = True
    if options["stage"] == 0 and options["optimizer"] == "adamw" and options["dtype"] != "fp32":
        options["fused"] = rng.random() < 0.5
    if kind == "pipeline":
        kept = {key: value for key, value in options.items() if key not in (*ODD[2:], "inner", "blocks", "scheduler")}
        ranks, options = rng.choice([2, 4]), {**kept, "pipeline": 2, "stage": rng.choice([0, 1]), "groups": "two"}
    elif kind == "moe":
        ranks = rng.choice([2, 4])
        options |= {"moe": rng.choice([1, 2]), "stage": rng.choice([0, 1, 2, 2]), "groups": "two"}
        options |= {"shared": False, "residual": rng.random() < 0.3}
    if options["stage"] in (1, 2) and options["dtype"] == "bf16" and rng.random() < 0.3:
        options["accumulate"] = "fp32"
    options["zero"], options["config"] = settings(rng, options, ranks, dense=kind == "dense")
    if rng.random() < 0.2 and options.get("frozen") and options["stage"]:
        options["save"] = {"exclude_frozen_parameters": True}
    if rng.random() < 0.2:
        options["save"] = {**options.get("save", {}), "tag": rng.choice(["best-model", "step 7", "v1.0", "12"])}
    return ranks, without_the_impossible(options, dense=kind == "dense")


def settings(
    rng: random.Random, options: dict[str, Any], ranks: int, *, dense: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the configuration says under ``zero_optimization``, and what else it says."""
    zero: dict[str, Any] = {}
    config: dict[str, Any] = {}
    stage = options["stage"]
    if options.get("moe") == 2 and ranks == 4 and stage and rng.random() < 0.3:
        config["use_data_before_expert_parallelism"] = True
    if stage in (1, 2) and "accumulate" not in options:
        zero["round_robin_gradients"] = "pipeline" not in options and rng.random() < 0.3
        zero["elastic_checkpoint"] = dense and rng.random() < 0.25
        zero["parameter_alignment"] = rng.random() < 0.25
        zero["contiguous_gradients"] = "moe" in options or rng.random() < 0.8
    if stage == 3:
        zero["sub_group_size"] = rng.choice([1, 7, 60, 500, 10**9])
        zero["stage3_param_persistence_threshold"] = rng.choice([0, 0, 20, 10**6])
        zero["zero_hpz_partition_size"] = 2 if ranks == 4 and rng.random() < 0.3 else 1
    if stage and dense and "accumulate" not in options:
        if rng.random() < 0.15:
            zero["offload_optimizer"] = {"device": "cpu"}
        elif options["dtype"] == "bf16" and rng.random() < 0.2:
            config |= LEAN_STATES
    return zero, config


def without_the_impossible(options: dict[str, Any], *, dense: bool) -> dict[str, Any]:
    """The options without what DeepSpeed itself refuses, or dies of."""
    zero = options["zero"]
    if options["optimizer"] == "adagrad":  # DeepSpeed makes its states for the first group only
        plain = not dense or options["stage"] == 0 or "accumulate" in options
        options |= {"optimizer": "adamw"} if plain else {"groups": "one"}
        zero.pop("elastic_checkpoint", None)
    if options["groups"] == "each" or zero.get("sub_group_size", 10**9) < 10**9 or "moe" in options:
        options["empty"] = False  # no group may be without elements
    if options["stage"] == 3:
        options |= {"transposed": False, "scalar": False}
    if options["optimizer"] == "asgd" and "bf16" in options["config"]:  # torch rounds its numbers when it loads them
        options["optimizer"] = "adamw"
    return {key: value for key, value in options.items() if value or key == "stage"}


def targets(seed: int, ranks: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    """What to convert the checkpoint to: the format, its layout and options, and the job that resumes from it."""
    rng = random.Random(seed)
    if "pipeline" in options or (options["stage"] == 0 and "moe" in options):
        return []
    made = []
    for universal in (False, rng.random() < 0.7):
        stage = rng.choice([1, 2, 3]) if universal or "moe" in options else rng.choice([0, 1, 2, 3])
        if "moe" in options:
            stage = rng.choice([1, 2])
        count = rng.choice([2, 4]) if "moe" in options else rng.choice([1, 2, 3, 4])
        job = {**options, "stage": stage, "universal": universal}
        kept = {
            key: value
            for key, value in options.get("zero", {}).items()
            if key in ("sub_group_size", "offload_optimizer")
        }
        if stage == 3:
            job |= {"transposed": False, "scalar": False}
        asked: dict[str, Any] = {}
        if stage in (1, 2) and "accumulate" not in options:
            kept |= {key: rng.random() < 0.3 for key in ("round_robin_gradients", "parameter_alignment")}
            kept["round_robin_gradients"] &= not universal  # DeepSpeed links other parameters than it loads
            asked = {key: kept[key] for key in ("round_robin_gradients", "parameter_alignment")}
        if stage == 3:
            asked = {"sub_group_size": kept.setdefault("sub_group_size", 10**9)}
            kept["stage3_param_persistence_threshold"] = 0
        if stage == 0:
            kept = {}
            job["fused"] = options["optimizer"] == "adamw" and options["dtype"] != "fp32" and rng.random() < 0.5
            asked = {"fused": job["fused"]}
        job["zero"] = kept
        layout = f"dp={count},zero={stage}"
        if "moe" in options:
            job["moe"] = 1 if universal else rng.choice([1, 2])
            layout += f",ep={job['moe']}"
            job["config"] = {}
        if universal:
            asked, layout = {}, rng.choice(["", f"dp={count},zero={stage}"]) if "moe" not in options else ""
        made.append(
            {
                "to": "deepspeed-universal" if universal else "deepspeed",
                "layout": layout,
                "options": asked,
                "ranks": count,
                "job": job,
            }
        )
    return [target for target in made if possible(options, target)]


def possible(options: dict[str, Any], target: dict[str, Any]) -> bool:
    """Whether DeepSpeed could resume such a job at all."""
    job = target["job"]
    same_model = all(bool(job.get(key)) == bool(options.get(key)) for key in ODD)
    groups_with_empty = options.get("empty") and (job["zero"].get("sub_group_size", 10**9) < 10**9)
    refused = job["stage"] in (0, 3) or job["zero"].get("offload_optimizer")
    elastic = options.get("zero", {}).get("elastic_checkpoint") and refused
    adagrad = options["optimizer"] == "adagrad" and (job["stage"] in (0, 3) or target["to"] != "deepspeed")
    counted = options["optimizer"] in ("nadam", "asgd") and target["to"] != "deepspeed"
    others = options["optimizer"] != "adamw" and target["to"] != "deepspeed" and job["stage"] == 3
    empty = options.get("empty") and job["stage"] == 0 and job["dtype"] == "fp32"
    if counted or others or empty:
        return False
    return same_model and not groups_with_empty and not elastic and not adagrad


# what a job does


def save(case: Path, options: dict[str, Any]) -> None:
    """Train, save a checkpoint and the truth, and train on."""
    import deepspeed
    import torch

    deepspeed.init_distributed(dist_backend="gloo", dist_init_required=True)
    torch.manual_seed(7)
    engine = zoo.build(deepspeed, torch, options)
    zoo.train(engine, torch, options)
    notes = {"note": "seven", "iteration": 3}
    engine.save_checkpoint(str(case / "checkpoint"), client_state=notes, **options.get("save", {}))
    write(torch, zoo.gather(engine, torch, options), case / "truth.safetensors")
    losses(engine, torch, options, case / "losses.json")


def resume(case: Path, checkpoint: Path, options: dict[str, Any]) -> None:
    """Load a checkpoint, save what was loaded, and train on."""
    import deepspeed
    import torch

    deepspeed.init_distributed(dist_backend="gloo", dist_init_required=True)
    torch.manual_seed(7 if options["universal"] else 99)  # DeepSpeed takes no buffers, no frozen weights from universal
    engine = zoo.build(deepspeed, torch, options)
    path, client = engine.load_checkpoint(str(checkpoint))
    assert path is not None, "DeepSpeed found no checkpoint"
    assert client["note"] == "seven"
    write(torch, zoo.gather(engine, torch, options), case / "loaded.safetensors")
    losses(engine, torch, options, case / "resumed.json")


def write(torch: Any, tensors: dict[str, Any], path: Path) -> None:
    from safetensors.torch import save_file

    if torch.distributed.get_rank() == 0:
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)


def losses(engine: Any, torch: Any, options: dict[str, Any], path: Path) -> None:
    """The losses of some steps on data that is the same for all ranks."""
    generator = torch.Generator().manual_seed(123)
    torch.manual_seed(5)  # experts take tokens by lot
    found = []
    for _ in range(STEPS + 1):
        data = torch.randint(0, options.get("vocabulary", zoo.SIZES["vocabulary"]), (1, 6), generator=generator)
        batch = data[:, :-1], data[:, 1:]
        if "pipeline" in options:
            found.append(float(engine.train_batch(iter([batch, batch]))))
            continue
        loss = engine(*batch)
        engine.backward(loss)
        engine.step()
        found.append(float(loss))
    if torch.distributed.get_rank() == 0:
        path.write_text(json.dumps({"losses": found, "steps": engine.global_steps}))


# what is checked


def read(case: Path, options: dict[str, Any]) -> None:
    """The checkpoint holds the truth."""
    from ckptengine.sources.detect import open_source
    from tests.sources.reading import compare, truth_of_safetensors

    source = open_source(case / "checkpoint")
    truth = truth_of_safetensors(case / "truth.safetensors")
    if any(name.startswith("optim.state.") for name in source.names()):  # by position, which nothing names
        assert options["stage"] == 0
        assert len(source.names()) == len(truth)
        truth = {name: held for name, held in truth.items() if name.startswith("model.")}
        return compare(source, truth, exact=False)
    return compare(source, truth)


def read_universal(case: Path, options: dict[str, Any]) -> None:
    """What DeepSpeed's converter makes of the checkpoint is the same as the checkpoint."""
    from deepspeed.checkpoint.ds_to_universal import main as ds_to_universal

    from ckptengine.sources.detect import open_source

    tag = (case / "checkpoint" / "latest").read_text()
    arguments = argparse.Namespace(
        input_folder=str(case / "checkpoint" / tag), output_folder=str(case / "universal" / tag), num_extract_workers=1,
        num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True,
    )  # fmt: skip
    ds_to_universal(arguments)
    equal(contents(open_source(case / "checkpoint")), contents(open_source(case / "universal" / tag)))


def write_target(case: Path, options: dict[str, Any], target: dict[str, Any]) -> None:
    from ckptengine.operations.convert import convert
    from ckptengine.sources.detect import open_source

    source = open_source(case / "checkpoint")
    convert(source, case / "target", to=target["to"], layout=target["layout"] or None, options=target["options"])
    made = open_source(case / "target")
    before, after = contents(source), contents(made)
    job = target["job"]
    masters = {f"model.{name[6:-7]}": held for name, held in before.items() if name.endswith(".master")}
    trained = {name for name in masters if name in after}
    trained |= {alias for alias, owner in source.aliases().items() if owner in trained}
    if job["stage"] == 3 or options["stage"] == 3:  # whose weights are the masters
        before, after = ({name: held for name, held in side.items() if name not in trained} for side in (before, after))
    if job["stage"] == 0 and job["dtype"] == "fp32":  # where the weights are the masters
        before = {name: held for name, held in before.items() if not name.endswith(".master")}
    equal({n: widened(n, h) for n, h in before.items()}, {n: widened(n, h) for n, h in after.items()})


def resumed(case: Path, target: dict[str, Any]) -> None:
    """DeepSpeed loaded the truth, and goes on as the first job did."""
    truth, loaded = states(case / "truth.safetensors"), states(case / "loaded.safetensors")
    if target["job"]["stage"] == 0 and target["job"]["dtype"] == "fp32":
        truth = {name: held for name, held in truth.items() if not name.endswith(".master")}
    elif not any(name.endswith(".master") for name in truth):
        loaded = {name: held for name, held in loaded.items() if not name.endswith(".master")}
    equal(truth, loaded)
    one, other = (json.loads((case / name).read_text()) for name in ("losses.json", "resumed.json"))
    assert one["steps"] == other["steps"], (one, other)
    near = 1e-5 if target["job"]["dtype"] == "fp32" else 3e-2
    pairs = list(zip(one["losses"], other["losses"], strict=True))
    several = target["job"]["groups"] != "one"
    if target["job"]["universal"] and target["job"]["stage"] == 3 and several:
        pairs = pairs[:1]  # DeepSpeed gives every group the settings of the first
    for a, b in pairs:
        assert abs(a - b) <= near * max(1.0, abs(a)), (one["losses"], other["losses"])


def contents(source: Any) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    from tests.sources.reading import read_bytes

    return {
        name: (tensor.dtype, tensor.shape, read_bytes(source.files, tensor))
        for name, tensor in ((name, source.tensor(name)) for name in source.names())
    }


def widened(name: str, held: tuple[str, tuple[int, ...], bytes]) -> tuple[str, tuple[int, ...], bytes]:
    """Optimizer states as float32, in which they are written."""
    from ckptengine.sources.torchrecords import cast

    dtype, shape, data = held
    if not name.startswith("optim.") or dtype not in ("bfloat16", "float16"):
        return held
    return "float32", shape, bytes(cast(data, dtype, "float32"))


def states(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    import torch
    from safetensors.torch import load_file

    found = {}
    for name, tensor in load_file(path).items():
        if name.startswith("optim."):
            wide = tensor.float() if tensor.is_floating_point() else tensor.to(torch.float32)
            found[name] = ("float32", tuple(tensor.shape), wide.numpy().tobytes())
    return found


def equal(before: Any, after: Any) -> None:
    missing = [name for name in before if name not in after]
    extra = [name for name in after if name not in before]
    assert not missing, f"missing {missing[:4]} of {len(missing)}"
    assert not extra, f"extra {extra[:4]} of {len(extra)}"
    wrong = [name for name in before if before[name] != after[name]]
    assert not wrong, (
        f"{len(wrong)} of {len(before)} differ: {wrong[:4]} {[(before[n][:2], after[n][:2]) for n in wrong[:2]]}"
    )


# running it all


def main(out: Path, first: int, count: int) -> int:
    zoo.preload()
    failed = []
    for seed in range(first, first + count):
        case = out / str(seed)
        shutil.rmtree(case, ignore_errors=True)
        case.mkdir(parents=True)
        if one(seed, case):
            shutil.rmtree(case)
        else:
            failed.append(seed)
    print("failed:", *failed)
    return bool(failed)


def one(seed: int, case: Path) -> bool:
    ranks, options = draw(seed)
    print(f"== {seed} {ranks} {json.dumps(options)}", flush=True)
    if not job(case, ranks, seed, lambda: save(case, options)):
        return True
    good = step(case, "read", lambda: read(case, options))
    zero = options.get("zero", {})
    adam = options["optimizer"] == "adamw" and options["stage"] and "moe" not in options and "pipeline" not in options
    mixed = zero.get("round_robin_gradients") or zero.get("elastic_checkpoint") or options.get("empty")
    if adam and not mixed:
        good &= step(case, "universal", lambda: read_universal(case, options))
    for target in targets(seed, ranks, options):
        shutil.rmtree(case / "target", ignore_errors=True)
        print(f"   -> {target['to']} {target['layout']} on {target['ranks']} {target['options']}", flush=True)
        good &= step(case, "write", lambda target=target: write_target(case, options, target))  # type: ignore[misc]
        if good and job(
            case, target["ranks"], seed + 1, lambda target=target: resume(case, case / "target", target["job"])
        ):  # type: ignore[misc]
            good &= step(case, "resumed", lambda target=target: resumed(case, target))  # type: ignore[misc]
        if not good:
            break
    return good


def job(case: Path, ranks: int, seed: int, work: Callable[[], None]) -> bool:
    """``work`` on so many ranks; what fails there is DeepSpeed's own, and shown."""
    log = case / "run.log"
    if quiet(log, lambda: zoo.forked(ranks, 20000 + (seed * 7 + os.getpid()) % 9000, work)):
        return True
    lines = log.read_text(errors="replace").strip().splitlines()
    shutil.copy(log, case.parent / f"deepspeed-{seed}.log")
    errors = [line for line in lines if "Error" in line and "gloo" not in line]
    print("   DEEPSPEED:", (errors or lines)[-1:], flush=True)
    return False


def quiet(log: Path, work: Callable[[], bool]) -> bool:
    """``work`` with its output in a file."""
    sys.stdout.flush()
    saved = os.dup(1), os.dup(2)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            return work()
        finally:
            for number, old in enumerate(saved):
                os.dup2(old, number + 1)
                os.close(old)


def step(case: Path, name: str, work: Callable[[], None]) -> bool:
    """One check, in a process of its own."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            quiet(case / "step.log", lambda: bool(work()) or True)
            code = 0
        except BaseException as error:
            print(f"   FAILED {name}: {type(error).__name__} {str(error)[:600]}", flush=True)
            (case / "failure.txt").write_text(traceback.format_exc())
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), int(sys.argv[2]), int(sys.argv[3])))
