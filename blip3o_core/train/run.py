"""One whole run: open, check, cache, train, report. Everything that can be checked is checked before weights are read."""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from ..data.loading import TrainingData, batches
from ..data.prepare import Example
from ..errors import ConfigError, DataError, OutputError
from ..files import require_writable, write_text
from ..runtime import require_package, resolve_device
from ..sheets import contact_sheet
from . import state as checkpoints
from .build import build_model, frozen_dtype, require_compiler, require_trainable, resolve_precision
from .caching import fill_caches
from .config import TrainConfig, as_dict, print_config
from .datasets import Caches, TrainingSets, open_training_sets, validation_examples
from .ema import MovingAverage
from .export import MODEL_FOLDER, export_lora, export_model
from .frozen import FrozenNetworks, Sources
from .log import FILE as LOG_FILE
from .log import RunLog, peak_memory_bytes, read_log
from .loop import Run, StopRequest, Update, train
from .model import TrainingModel
from .optimizer import build_optimizer
from .pictures import Prompts, draw, encode_fixed_prompts, open_prompts, require_drawable, save_sheet
from .report import write_report
from .sharding import (
    assign,
    gathered,
    gathered_optimizer,
    is_sharded,
    prepare_sharded,
    replace_weights,
    require_shardable,
    restore_optimizer,
)
from .state import RunState
from .validation import validation_losses

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)

CONFIG_FILE = "config.toml"
BROKEN_FILE = "broken.jsonl"


@dataclass(frozen=True)
class Opened:
    """What a run will work with: files are opened and checked, no network is loaded."""

    config: TrainConfig
    sources: Sources
    sets: TrainingSets
    caches: Caches
    validation_sets: TrainingSets
    sample_images: tuple[Image.Image | None, ...]


def open_run(config: TrainConfig, precision: str) -> Opened:
    """`precision`: bf16, fp16 or fp32. Raises ConfigError, DataError, CheckpointError, InputError for whatever is wrong."""
    config.require_complete()
    if config.train.compile:
        require_compiler(resolve_device(config.train.device))
    sources = Sources.open(config.model)
    tasks = [data.task for data in config.data]
    require_trainable(config, [*tasks, *(data.task for data in config.validation.data)])
    caches = Caches.of(config, sources, tasks, frozen_dtype(precision))
    sets = open_training_sets(config.data, config, sources, caches)
    validation = sets
    if config.validation.data:
        validation = open_training_sets(config.validation.data, config, sources, caches)
        for task in validation.tasks:
            if task not in sets.tasks:
                raise ConfigError(f"validation.data has the task {task}, which is not trained. Trained: {', '.join(sets.tasks)}.")
    sets.mixture(config.train.seed)  # raises for weights that contradict each other
    images: tuple[Image.Image | None, ...] = ()
    if config.samples.every:
        if not set(tasks) & {"text_to_image", "edit", "reconstruct"}:
            raise ConfigError("samples.every is set, but no dataset trains drawing (text_to_image, edit, reconstruct).")
        require_drawable(config.samples, sources.require_decoder().factor)
        images = open_prompts(config.samples)
    return Opened(config, sources, sets, caches, validation, images)


def run_training(config: TrainConfig) -> int:
    """Trains as configured -> 0, or the number of the signal that stopped it (what was done is saved).

    Raises: Blip3oError of any kind; a checkpoint that was written stays whole.
    """
    config.require_complete()
    accelerator = make_accelerator(config)
    try:
        return Session(open_run(config, precision_of(accelerator)), accelerator).run()
    finally:
        accelerator.free_memory()
        _forget_accelerator(accelerator)


def make_accelerator(config: TrainConfig) -> "Accelerator":
    """accelerate's engine for one process or for those that `accelerate launch` started, with its own configuration files."""
    accelerate = require_package("accelerate", extra="train", purpose="training")
    device = resolve_device(config.train.device)
    precision = resolve_precision(config.train.precision, device)
    several_tasks = len({data.task for data in config.data}) > 1  # then a process may meet none of one task
    unused = accelerate.DistributedDataParallelKwargs(find_unused_parameters=several_tasks)
    accelerator = accelerate.Accelerator(
        mixed_precision={"fp32": "no"}.get(precision, precision), cpu=device.type == "cpu", kwargs_handlers=[unused],
        gradient_accumulation_steps=config.train.gradient_accumulation,
    )  # fmt: skip
    require_shardable(accelerator, config)
    return accelerator


def _forget_accelerator(accelerator: "Accelerator") -> None:
    """accelerate keeps device and precision for the life of the process; the next run here may have others."""
    from accelerate.state import AcceleratorState, GradientState

    if accelerator.num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def precision_of(accelerator: "Accelerator") -> str:
    """fp32, bf16 or fp16."""
    return {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)


class Session:
    """The parts of a run in this process."""

    def __init__(self, opened: Opened, accelerator: "Accelerator") -> None:
        self.opened, self.accelerator = opened, accelerator
        self.config = opened.config
        self.output = Path(os.path.expanduser(self.config.output.folder))
        self.precision = precision_of(accelerator)
        self.main = accelerator.is_main_process
        self.log: RunLog | None = None

    def run(self) -> int:
        """-> 0, or the signal that stopped it."""
        resumed_from, state = self._start_state()
        frozen = FrozenNetworks(self.opened.sources, device=self.accelerator.device, dtype=frozen_dtype(self.precision))
        prompts = self._prepare_frozen(frozen)
        model = build_model(self.config, self.opened.sources, frozen, self.opened.sets.tasks, precision=self.precision)
        model.set_training(True)
        run = self._prepare(model, state)
        if resumed_from is not None:
            self._restore(run, resumed_from)
        examples = self._validation_examples()
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(StopRequest())
            if self.main:
                stack.callback(self._report)  # after the log is closed, also of a run that fails
                self.log = stack.enter_context(RunLog(
                    self.output, total_steps=self.config.train.steps, start_step=state.step, config=as_dict(self.config),
                    log_every=self.config.output.log_every, wandb=self.config.output.wandb, resumed=resumed_from is not None,
                ))  # fmt: skip
            stopped = self._train(run, model, frozen, prompts, examples, stop)
            self._finish(run, model, stopped)
        self.accelerator.wait_for_everyone()
        return stopped

    def _report(self) -> None:
        try:
            write_report(self.output)
        except OutputError as error:  # what was trained is saved; this must not hide why a run failed
            log.warning("%s", error)

    def _start_state(self) -> tuple[Path | None, RunState]:
        """Where to go on, or a fresh state in a folder that is new or empty. Raises OutputError, TrainingError."""
        config, base = as_dict(self.config), self.opened.sources.checkpoint.fingerprint
        topology = {"processes": self.accelerator.num_processes, "workers": self.config.loader.workers}
        found = checkpoints.find_resumable(self.output, self.config.output.resume) if self.config.output.resume else None
        if found is None:
            used = checkpoints.list_checkpoints(self.output) or ((self.output / LOG_FILE).exists() and not self.config.output.resume)
            if used:
                raise OutputError(f"{self.output} holds another run. Give a new output.folder, or go on with it: output.resume=latest.")
            state = RunState(config=config, base=base, topology=topology)
        else:
            state = checkpoints.load_state(found, config, base)
            if any(hasattr(dataset, "stream") for dataset in self.opened.sets.datasets) and state.topology != topology:
                log.warning("%s was written with %s, this run has %s: tars are split differently from here on, so some samples come "
                            "twice and others later in this pass.", found, state.topology, topology)  # fmt: skip
            state.config, state.topology = config, topology
        self.accelerator.wait_for_everyone()
        if self.main:
            require_writable([self.output], self.output)
            write_text(self.output / CONFIG_FILE, print_config(self.config))
        return found, state

    def _prepare_frozen(self, frozen: FrozenNetworks) -> Prompts | None:
        """Fills the caches and encodes the sample prompts; afterwards the frozen networks are released if training won't need them."""
        prompts = None
        cached = self.opened.caches.states is not None
        if self.config.samples.every and self.main:
            prompts = encode_fixed_prompts(self.config.samples, self.opened.sample_images, frozen,
                                           cacheable=not self.config.trains_language_side)  # fmt: skip
            if cached:
                frozen.release()
        if self.config.cache.enabled:
            fill_caches(self.opened, frozen, self.accelerator)
        return prompts

    def _prepare(self, model: TrainingModel, state: RunState) -> Run:
        optimizer = build_optimizer(self.config.optimizer, model.trained(), self.accelerator.device)
        if is_sharded(self.accelerator):
            wrapped, optimizer = prepare_sharded(self.accelerator, model, optimizer)
        else:
            wrapped, optimizer = self.accelerator.prepare(model, optimizer)
        parameters = model.trained()
        ema = MovingAverage(parameters, self.config.train.ema_decay) if self.config.train.ema_decay else None
        return Run(self.config, self.accelerator, wrapped, parameters, optimizer, ema, state, self.opened.sets.tasks,
                   has_dropout=self.config.train.method == "lora" and self.config.lora.dropout > 0)  # fmt: skip

    def _restore(self, run: Run, path: Path) -> None:
        for name, tensor in checkpoints.load_tensors(path, run.parameters).items():
            assign(run.parameters[name], tensor)
        restore_optimizer(run.optimizer, checkpoints.load_optimizer(path))
        if run.ema is not None:
            run.ema.load(checkpoints.load_tensors(path, run.ema.shadow, checkpoints.EMA))

    def _validation_examples(self) -> list[Example]:
        if not self.config.validation.every:
            return []
        return validation_examples(self.opened.validation_sets, self.config.validation.samples)

    def _train(
        self, run: Run, model: TrainingModel, frozen: FrozenNetworks, prompts: Prompts | None, examples: list[Example], stop: StopRequest
    ) -> int:
        """The loop, with what happens between updates."""
        config, state, accelerator = self.config, run.state, self.accelerator
        data = TrainingData(
            self.opened.sets.datasets, self.opened.sets.mixture(config.train.seed), self.opened.sets.preparers,
            batch_size=config.train.batch_size, rank=accelerator.process_index, world=accelerator.num_processes,
            workers=config.loader.workers, known_broken=frozenset(state.broken),
        )  # fmt: skip
        steps = config.train.steps
        saved_at = state.step

        def due(every: int) -> bool:
            return bool(every) and (state.step % every == 0 or state.step == steps)

        def between_updates(done: Sequence[str] = ()) -> None:
            if due(config.validation.every) and "validation" not in done:
                self._validate(run, model, examples)
            if due(config.samples.every) and prompts is not None and "pictures" not in done:
                self._draw(run, model, frozen, prompts)
            accelerator.wait_for_everyone()

        def after_update(update: Update) -> None:
            nonlocal saved_at
            if self.main:
                self.log.train(state.step, loss=update.loss, losses=update.losses, learning_rate=update.learning_rate,
                               grad_norm=update.grad_norm, samples=update.samples,
                               memory_bytes=peak_memory_bytes(accelerator.device))  # fmt: skip
            too_many = self._too_many_broken(run, update)
            if due(config.output.save_every) or too_many:
                self._save(run, model)
                saved_at = state.step
            if too_many:
                raise DataError(too_many)
            if due(config.validation.every) or due(config.samples.every):
                between_updates()

        between_updates(done=self._logged_at(state.step))
        source = batches(data, state.position - state.position % (config.train.batch_size * accelerator.num_processes))
        try:
            stopped = train(run, source, stop, after_update)
        except DataError:
            if state.step > saved_at and accelerator.num_processes == 1:  # others may be anywhere
                self._save(run, model)  # a killed worker or a bad dataset costs nothing that was trained
            raise
        finally:
            source.close()
        if state.step > saved_at:
            self._save(run, model)
        return stopped

    def _logged_at(self, step: int) -> list[str]:
        """Kinds of lines that the log has of this step: a run may have been killed between its checkpoint and what follows that."""
        kinds = [sorted({line["kind"] for line in read_log(self.output) if line["step"] == step})] if self.main else [[]]
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(kinds)
        return kinds[0]

    def _validate(self, run: Run, model: TrainingModel, examples: list[Example]) -> None:
        accelerator, options = self.accelerator, self.config.validation
        with self._averaged(run), accelerator.autocast():
            sums = validation_losses(model, examples, timesteps=options.timesteps, batch_size=self.config.train.batch_size,
                                     seed=self.config.train.seed, rank=accelerator.process_index,
                                     world=accelerator.num_processes)  # fmt: skip
        tasks = sorted({example.task for example in examples})
        values = torch.tensor([sums.get(task, (0.0, 0)) for task in tasks], dtype=torch.float32, device=accelerator.device)
        values = accelerator.reduce(values, "sum")
        if self.main:
            self.log.validation(run.state.step, {task: (total / count).item() for task, (total, count) in zip(tasks, values, strict=True)})

    def _draw(self, run: Run, model: TrainingModel, frozen: FrozenNetworks, prompts: Prompts) -> None:
        with self._averaged(run):
            pictures = draw(prompts, model, frozen)
        sheet = contact_sheet(pictures, list(self.config.samples.prompts), title=f"step {run.state.step}")
        self.log.pictures(run.state.step, sheet, save_sheet(self.output, run.state.step, sheet))

    @contextlib.contextmanager
    def _averaged(self, run: Run):
        """The moving average in place of the weights, if there is one."""
        if run.ema is None:
            yield
            return
        if is_sharded(self.accelerator):
            saved = {name: parameter.detach().clone() for name, parameter in run.parameters.items()}
            replace_weights(run.wrapped, run.parameters, run.ema.shadow)
            try:
                yield
            finally:
                replace_weights(run.wrapped, run.parameters, saved)
            return
        current = {name: parameter.data for name, parameter in run.parameters.items()}
        for name, parameter in run.parameters.items():
            parameter.data = run.ema.shadow[name]
        try:
            yield
        finally:
            for name, parameter in run.parameters.items():
                parameter.data = current[name]

    def _save(self, run: Run, model: TrainingModel) -> None:
        """On all processes; the first one writes."""
        self._collect_broken(run)
        trained = gathered(run.parameters, keep=self.main)
        average = None if run.ema is None else gathered(run.ema.shadow, keep=self.main)
        optimizer = gathered_optimizer(run.optimizer, keep=self.main)
        if self.main:
            path = checkpoints.save_checkpoint(
                self.output, run.state, trained, optimizer, average, keep=self.config.output.keep,
                export=self._exporter(run, model, trained if average is None else average),
            )  # fmt: skip
            log.info("saved %s", path)
        self.accelerator.wait_for_everyone()

    def _exporter(self, run: Run, model: TrainingModel, values: dict[str, torch.Tensor]) -> Callable[[Path], None] | None:
        """Puts the LoRA file into every checkpoint: small, and ready to be tried."""
        if self.config.train.method != "lora":
            return None
        return lambda folder: export_lora(folder / f"{self.config.output.name}.safetensors", self.config, self.opened.sources, model,
                                          values, run.state.step)  # fmt: skip

    def _result(self, run: Run) -> dict[str, torch.Tensor]:
        """On all processes; the first one gets it."""
        return gathered(run.parameters if run.ema is None else run.ema.shadow, keep=self.main)

    def _finish(self, run: Run, model: TrainingModel, stopped: int) -> None:
        """The result, if the run came to its end. On all processes; the first one writes."""
        values = {} if stopped else self._result(run)
        if not self.main:
            return
        if stopped:
            self.log.event(run.state.step, "stopped by a signal; saved")
            return
        if self.config.train.method == "lora":
            path = self.output / f"{self.config.output.name}.safetensors"
            export_lora(path, self.config, self.opened.sources, model, values, run.state.step)
        else:
            path = self.output / MODEL_FOLDER
            factor = self._scaling_factor(run, model)
            export_model(path, self.config, self.opened.sources, model, values, overwrite=True, scaling_factor=factor)
        self.log.event(run.state.step, f"finished: {path.name}")

    def _scaling_factor(self, run: Run, model: TrainingModel) -> float | None:
        """1 / standard deviation of the latents of a VAE that was trained."""
        if model.vae is None or "vae_decoder" in self.config.train.parts:
            return None
        examples = validation_examples(self.opened.sets, max(64, self.config.validation.samples))
        pictures = [example.picture for example in examples if example.picture is not None]
        with self._averaged(run), torch.no_grad():
            latents = torch.cat([model.vae.encode(picture[None].to(model.device)).latent_dist.mode() for picture in pictures])
        return 1 / latents.float().std().item()

    def _collect_broken(self, run: Run) -> None:
        """All processes learn of all broken samples: a resumed run skips them in the same places."""
        found = run.broken_here
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            found = dict(pair for pairs in gather_object([list(run.broken_here.items())]) for pair in pairs)
        new = {name: reason for name, reason in found.items() if name not in run.state.broken}
        run.state.broken.update(new)
        run.broken_here.clear()
        if self.main and run.state.broken:
            lines = [json.dumps({"name": name, "reason": reason}, ensure_ascii=False) for name, reason in run.state.broken.items()]
            write_text(self.output / BROKEN_FILE, "\n".join(lines) + "\n")

    def _too_many_broken(self, run: Run, update: Update) -> str:
        """What is to be said if loader.max_broken is passed, on all processes; else nothing."""
        limit = self.config.loader.max_broken
        if len(run.state.broken) + update.broken <= limit:
            return ""
        self._collect_broken(run)
        if len(run.state.broken) <= limit:  # several processes had met the same
            return ""
        name, reason = list(run.state.broken.items())[-1]
        return (f"{len(run.state.broken)} samples can't be used, more than loader.max_broken = {limit}. They are listed in "
                f"{self.output / BROKEN_FILE}; the last is {name}: {reason}. Mend them or raise the limit.")
