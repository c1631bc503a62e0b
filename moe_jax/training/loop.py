"""The training loop: data, steps, metrics, evaluation, checkpoints, samples, report."""

import json
import logging
import math
import pathlib
import time
from typing import Any

import jax
import numpy as np

from moe_jax.config import Config
from moe_jax.data.baselines import ngram_losses
from moe_jax.data.batches import Prefetcher
from moe_jax.errors import UserError
from moe_jax.nn.moe import WITHOUT_DROPS, RoutingMode
from moe_jax.routing import has_fixed_choices
from moe_jax.training import processes
from moe_jax.training.checkpoint import Checkpointer, CheckpointError
from moe_jax.training.evaluate import Evaluator, drop_fraction, loss_summary, put_batch, routing_arrays
from moe_jax.training.flops import count_parameters, hardware_flops_per_token, training_flops_per_token
from moe_jax.training.metrics import MetricsWriter, Progress, mfu, peak_flops_per_device, read_metrics, routing_metrics
from moe_jax.training.run import (
    Run, check_workdir, evaluated_params, locked, open_run, record_config, require_equal_processes, restore, write_arrays,
    write_json)
from moe_jax.training.signals import Interrupted, Signals
from moe_jax.training.state import new_state
from moe_jax.training.step import check_trainable, jitted_train_step

log = logging.getLogger("moe_jax")


class NonFiniteError(UserError, RuntimeError):
    """Loss or gradient was not finite; the message says at which step and where the batch is recorded."""


def train(config: Config, workdir: str, allow_config_change: bool = False, finish: bool = True) -> pathlib.Path:
    """Trains to ``training.num_steps``, resuming if the workdir holds a checkpoint, and writes the report.

    ``finish=False`` ends with the last checkpoint: no final evaluation, samples or report, for callers with their own.

    Returns:
      Path of the report. A finished run does nothing but say so.

    Raises:
      ConfigError, CorpusError, CheckpointError, MetricsError, ReportError, RunError, ProcessError, NonFiniteError: each with
        one line for people.
      Interrupted: after saving, if SIGTERM or SIGINT came (to any process, where there are several).
    """
    started = time.monotonic()
    path = pathlib.Path(workdir).absolute()
    report = path / "report.html"
    check_trainable(config)
    require_equal_processes(config, path, allow_config_change=allow_config_change)
    if processes.of_process_0("is the run complete", lambda: _is_there(path, config, report, allow_config_change)):
        log.info("The run in %s is complete (%d steps). Its report: %s", path, config.training.num_steps, report)
        return report
    with locked(path), Signals() as signals:
        processes.require_shared(path)
        run = open_run(config, path)
        trainer = _Trainer(run, signals, started)
        try:
            trainer.run_to_end()
            if finish:
                trainer.finish()
            else:
                trainer.checkpointer.close()
        finally:
            trainer.close()
    processes.at("the end of training", math.inf)
    if finish:
        log.info("Done in %.0f s. Report: %s", time.monotonic() - started, report)
    return report


def _is_there(path: pathlib.Path, config: Config, report: pathlib.Path, allow_config_change: bool) -> bool:
    check_workdir(path, config, allow_config_change)
    return _is_complete(path, config) and report.exists()


def _is_complete(workdir: pathlib.Path, config: Config) -> bool:
    try:
        return json.loads((workdir / "complete.json").read_text())["step"] >= config.training.num_steps
    except (OSError, ValueError, KeyError, TypeError):
        return False


class _Trainer:
    """The state of the loop. The step itself is :func:`moe_jax.training.step.train_step`.

    Attributes:
      step: batches trained on; ``state["step"]`` counts without the skipped ones.
      tokens_seen, skipped: up to the last step whose metrics were read.
      saved_step, evaluated_step: the last one that was.
    """

    def __init__(self, run: Run, signals: Signals, started: float):
        self.run, self.signals, self.started = run, signals, started
        self.config = config = run.config
        processes.at("the start of training", processes.COMPILING)
        self.checkpointer = Checkpointer(run.checkpoints, config.training.keep_checkpoints)
        restored = restore(run, self.checkpointer)
        if restored is None:
            self.state, self.step, self.tokens_seen = new_state(config, run.vocab_size, run.mesh), 0, 0
            self.evaluated_step = self.saved_step = 0
        else:
            self.state, self.step = restored.state, restored.step
            self.tokens_seen = restored.metadata["tokens_seen"]
            self.saved_step = self.step
            self.evaluated_step = restored.metadata.get("evaluated_step", self.step)
            log.info("Resumed from the checkpoint of step %d", self.step)
        if config.training.nonfinite == "stop" and int(self.state["skipped"]):
            # Steps skipped earlier, under nonfinite="skip", are forgiven; the noise goes on where it was.
            self.state["rng"] = jax.random.fold_in(self.state["rng"], self.state["skipped"])
            self.state["skipped"] = self.state["skipped"] * 0
        self.skipped = int(self.state["skipped"])
        record_config(run.workdir, config)
        self.train_step = processes.compiled_together(jitted_train_step(config, run.vocab_size), "the training step")
        self.evaluator = Evaluator(config, run.vocab_size, run.data.vocabulary.bytes_per_token_V, run.data.domains, run.mesh)
        self.writer = MetricsWriter(run.workdir, config.training.tensorboard, config.training.wandb,
                                    None if restored is None else self.step, config.to_dict())
        self.progress = Progress(config.training.num_steps, self.step, processes.index() == 0)
        self.profile = _Profile(config, run.workdir / "profile")
        self.prefetcher = Prefetcher(run.batch, self.step, lambda batch: put_batch(batch, run.mesh, config.data.batch_size))
        self.flops_per_token = training_flops_per_token(config, run.vocab_size)
        self._say_what_is_trained()

    def _say_what_is_trained(self):
        config, run = self.config, self.run
        count = count_parameters(config, run.vocab_size)
        log.info("%s parameters, %s of them active per token; %.1f M training FLOPs per token; mesh %s on %s",
                 f"{count.total:,}", f"{count.active:,}", self.flops_per_token / 1e6,
                 " x ".join(f"{axis}={size}" for axis, size in run.mesh.shape.items() if size > 1) or "of one device",
                 f"{jax.device_count()} x {jax.devices()[0].device_kind}")
        peak = peak_flops_per_device(jax.devices()[0].device_kind)
        if peak is not None:
            log.info("MFU is of %.0f TFLOP/s per device (dense bf16; %s)", peak[0] / 1e12, peak[1])

    def close(self):
        self.profile.stop()
        self.progress.close()
        self.prefetcher.close()
        try:
            self.checkpointer.close()
        except CheckpointError as error:  # another error is on its way; this one must not hide it
            log.warning("%s", error)
        self.writer.close()

    def run_to_end(self):
        """Steps until ``num_steps``.

        A step's metrics are read after the next step was started, so that the devices never wait for the host. Before
        an evaluation or a checkpoint the last ones are read too: ``tokens_seen`` is then that of ``self.step``.
        """
        training = self.config.training
        self.signals.polling = True
        if self._evaluation_is_due() and self.evaluated_step < self.step:
            self._evaluate()  # a signal came before or during it
        first, unread, window = self.step, None, _Window()
        while self.step < training.num_steps:
            processes.at(f"step {self.step + 1}")
            step, batch, waited = self.prefetcher.next()
            self.profile.before(step)
            self.state, metrics = self.train_step(self.state, batch)
            self.step = step + 1
            if step == first:
                jax.block_until_ready(metrics)
                log.info("First step after %.1f s", time.monotonic() - self.started)
            if unread is not None:
                self._read(*unread, window)
            unread = (self.step, metrics, waited)
            self.profile.after(self.step, metrics)
            save = self.step == training.num_steps or self.step % training.checkpoint_every == 0
            stop = self._signal() is not None
            if not (save or stop or self._evaluation_is_due()):
                continue
            self._read(*unread, window)
            unread, window = None, _Window()
            if self._evaluation_is_due() and not stop:
                self._evaluate()
            if save:
                self._save()
            self._stop_if_asked()

    def _signal(self) -> int | None:
        """The signal to stop for, if one came: to this process or, where there are several, to any, agreed by all."""
        return processes.stop_signal(self.signals.received)

    def _evaluation_is_due(self) -> bool:
        """After every ``eval_every`` steps; the one after the last step belongs to :meth:`finish`."""
        training = self.config.training
        return 0 < self.step < training.num_steps and self.step % training.eval_every == 0

    def _read(self, step: int, metrics: dict[str, Any], waited: float, window: "_Window"):
        """Fetches one step's metrics, stops on a non-finite one, writes the first and every ``log_every``-th."""
        training = self.config.training
        metrics = jax.device_get(metrics)
        self.tokens_seen += int(metrics["tokens"])
        window.add(int(metrics["tokens"]), waited)
        if not metrics["applied"]:
            self._non_finite(step, metrics)
        if step % training.log_every and step != training.num_steps and step != 1:
            return
        values = {name: float(value) for name, value in metrics["sums"].items()}
        values |= {"grad_norm": float(metrics["grad_norm"]), "router_grad_norm": float(metrics["router_grad_norm"]),
                   "learning_rate": float(metrics["learning_rate"]), "tokens_seen": self.tokens_seen}
        if "targets" in metrics:
            values["target_fraction"] = float(metrics["targets"] / max(metrics["tokens"], 1))
        values |= self._routing(metrics["routing"], metrics.get("routed_tokens_L", metrics["tokens"]))
        values |= self._speed(window)
        self.writer.write(step, values)
        self.progress.update(step, values["loss/ce"], values.get("tokens_per_second"), values.get("moe/drop_fraction"),
                             values.get("moe/load_max"))
        window.clear()

    def _speed(self, window: "_Window") -> dict[str, float]:
        if not window.steps:
            return {}
        seconds = window.seconds / window.steps
        per_second = window.tokens / window.seconds
        speed = {"tokens_per_second": per_second, "step_seconds": seconds,
                 "data_wait_seconds": window.waited / window.steps,
                 "model_tflops_per_second": per_second * self.flops_per_token / 1e12,
                 "hardware_tflops_per_second":
                     per_second * hardware_flops_per_token(self.config, self.run.vocab_size) / 1e12}
        utilisation = mfu(per_second * self.flops_per_token, list(self.run.mesh.devices.flat))
        return speed if utilisation is None else {**speed, "mfu": utilisation}

    def _routing(self, routing: dict[str, np.ndarray], valid_tokens) -> dict[str, Any]:
        if not routing:
            return {}
        tokens_L = np.maximum(routing["tokens_L"], 1.0)
        per_token = self.config.moe.experts_per_token if has_fixed_choices(self.config.moe) else None
        return routing_metrics({**routing, "valid_tokens": valid_tokens, "layers": self.config.trained_moe_layers,
                                "entropy_L": routing["entropy_L"] / tokens_L,
                                "confidence_L": routing["confidence_L"] / tokens_L}, per_token)

    def _non_finite(self, step: int, metrics: dict[str, Any]):
        """A refused step: records its batch; stops, or goes on within ``max_skipped_steps``. All processes come here."""
        training = self.config.training
        path = self.run.workdir / f"nonfinite_step_{step:08d}.json"
        if processes.index() == 0:
            batch = self.run.data.train.batch(step - 1)
            documents = sorted({int(d) for d in batch["document_ids"][batch["valid"]].ravel()}) if "document_ids" in batch else []
            write_json(path, {"step": step, "grad_norm": str(metrics["grad_norm"]), "data_step": step - 1,
                              **{name: str(value) for name, value in metrics["sums"].items()}, "document_ids": documents})
        self.skipped += 1
        if training.nonfinite == "skip" and self.skipped <= training.max_skipped_steps:
            log.warning("step %d: loss or gradient is not finite; its update was skipped (%d of at most %d). Batch: %s",
                        step, self.skipped, training.max_skipped_steps, path)
            return
        why = ("training.nonfinite='stop'" if training.nonfinite == "stop" else
               f"more than training.max_skipped_steps={training.max_skipped_steps} steps were skipped")
        raise NonFiniteError(
            f"step {step}: loss {metrics['sums']['loss/total']}, gradient norm {metrics['grad_norm']} – not finite; the "
            f"update was not applied and the run stops ({why}). The batch is recorded in {path}; lower "
            f"optimizer.learning_rate, or set training.nonfinite='skip' (with --allow-config-change in this workdir).")

    def _save(self):
        """Saves everything; the write goes on in the background."""
        processes.at(f"saving step {self.step}")
        self.checkpointer.save(self.step, self.state, {
            "config": self.config.to_dict(), "data_step": self.step, "data_fingerprint": self.run.data.fingerprint,
            "tokens_seen": self.tokens_seen, "evaluated_step": self.evaluated_step, "vocab_size": self.run.vocab_size,
            "vocabulary": self.run.data.vocabulary.fingerprint})
        self.saved_step = self.step

    def _stop_if_asked(self):
        """After a signal: makes sure of the checkpoint and raises Interrupted. Call it with all metrics read."""
        signal_number = self._signal()
        if signal_number is None:
            return
        if self.saved_step != self.step:
            self._save()
        self.checkpointer.close()
        self.progress.say(f"Interrupted: step {self.step} is saved. The same command goes on from there.")
        raise Interrupted(128 + signal_number)

    def batches(self):
        """The validation batches, whole: for what needs no devices."""
        return self.run.data.validation.evaluation_batches(self.config.training.eval_batches)

    def sums(self, mode: RoutingMode, objective: bool = False) -> dict[str, Any]:
        """What evaluation sums over the validation batches, of text or under the ``objective`` of training. A signal ends
        it: what is trained is worth more."""
        def stop() -> bool:  # asked before every batch
            processes.at(f"the evaluation of step {self.step}")
            return self._signal() is not None

        sums = self.evaluator.sums(evaluated_params(self.state), self.state["router_bias_LE"],
                                   self.run.validation_batches(self.config.training.eval_batches, objective), mode, stop)
        self._stop_if_asked()
        return sums

    def _evaluate(self) -> dict[str, Any]:
        """Loss on the validation batches, written as one line of kind "eval". Returns the sums; under another objective
        than the causal one ``objective_ce``, the loss it trains, among them."""
        sums = self.sums(RoutingMode.evaluation(self.config, record=True))
        summary = loss_summary(sums, self.run.data.domains)
        values = {"loss/ce": summary["ce"], "bits_per_byte": summary["bits_per_byte"], "tokens": summary["tokens"]}
        values |= {f"domain/{name}/ce": part["ce"] for name, part in summary["domains"].items()}
        if self.run.data.objective_validation is not None:
            own = self.sums(RoutingMode.evaluation(self.config, record=True), objective=True)
            sums["objective_ce"] = values["objective/ce"] = loss_summary(own, self.run.data.domains)["ce"]
        if not self._line_is_there():
            self.writer.write(self.step, values, kind="eval")
        self.evaluated_step = self.step
        per_byte = summary["bits_per_byte"]
        self.progress.say(f"step {self.step}  validation: {summary['ce']:.4f} nats per token"
                          + (f", {per_byte:.3f} bits per byte" if per_byte else ""))
        return sums

    def _line_is_there(self) -> bool:
        """Whether metrics.jsonl has the evaluation of this step: the last checkpoint is older than its evaluation."""
        return processes.index() == 0 and any(
            line["kind"] == "eval" and line["step"] == self.step for line in read_metrics(self.writer.path))

    def finish(self):
        """Final evaluation with baselines, samples, report; marks the run complete."""
        # Imported here: matplotlib and generation are not needed until now.
        from moe_jax.analysis.report import write_report
        workdir = self.run.workdir
        evaluation, routing = final_evaluation(self)
        write_json(workdir / "evaluation.json", evaluation)
        if routing:
            write_arrays(workdir / "routing" / "evaluation.npz", routing)
        if self.config.training.sample_length:
            processes.at("the samples", processes.PREPARING)
            write_json(workdir / "samples.json", self._samples())
        self._stop_if_asked()
        self.checkpointer.close()
        processes.at("the report", processes.PREPARING)
        if processes.index() == 0:
            write_report(workdir)
            write_json(workdir / "complete.json", {"step": self.step})
            say_result(evaluation)

    def _samples(self) -> list[dict[str, str]]:
        from moe_jax.inference.generate import generate_texts
        prompts = self.config.training.sample_prompts.split("|")
        texts = generate_texts(evaluated_params(self.state), self.config, self.run.vocab_size, self.run.data.vocabulary, prompts,
                               self.config.training.sample_length, bias_LE=self.state["router_bias_LE"])
        return [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts)]


class _Window:
    """Time, tokens and data wait since the last written line.

    The first step added to a new window only starts its clock: it may have compiled, and before it come evaluation and
    checkpoint.
    """

    def __init__(self):
        self._started: float | None = None
        self._count_from_zero()

    def _count_from_zero(self):
        self.tokens, self.steps, self.waited = 0, 0, 0.0

    def add(self, tokens: int, waited: float):
        if self._started is None:
            self._started = time.monotonic()
            return
        self.tokens, self.steps, self.waited = self.tokens + tokens, self.steps + 1, self.waited + waited

    def clear(self):
        """A line was written: the next one starts here."""
        self._count_from_zero()
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self._started, 1e-9)


class _Profile:
    """A trace of steps ``profile_start … profile_start + profile_steps - 1``, or of those that this process runs.

    Of several processes only process 0 writes one: the traces of two on one host would have the same name.
    """

    def __init__(self, config: Config, folder: pathlib.Path):
        self._start = config.training.profile_start
        self._end = self._start + config.training.profile_steps
        self._folder, self._running = folder, False

    def before(self, step: int):
        if self._start <= step < self._end and not self._running and processes.index() == 0:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, steps_done: int, metrics: Any):
        if self._running and steps_done >= self._end:
            jax.block_until_ready(metrics)
            self.stop()

    def stop(self):
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            log.info("Profile written to %s", self._folder)


def _num_documents(batches) -> int:
    return len({int(number) for batch in batches for number in np.unique(batch["document_ids"][batch["valid"]])})


CAUSAL = "each token takes its experts_per_token likeliest experts and none is dropped"


def final_evaluation(trainer: _Trainer) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """``evaluation.json`` and the arrays of ``routing/evaluation.npz``."""
    config, data = trainer.config, trainer.run.data
    sums = trainer._evaluate()
    summary = loss_summary(sums, data.domains)
    evaluation = {"step": trainer.step, **summary, "dispatch": config.moe.eval_dispatch if config.moe_layers else "dense"}
    if processes.index() == 0:  # counting on the host, for the file that process 0 writes
        evaluation |= {"documents": _num_documents(trainer.batches()), "baselines": baselines(trainer, summary)}
    processes.barrier("the baselines are counted", processes.PREPARING)
    if "objective_ce" in sums:
        evaluation["objective"] = {"name": config.data.objective, "ce": sums["objective_ce"]}
    if not config.moe_layers:
        return evaluation, {}
    if not RoutingMode.evaluation(config).is_causal(config):
        causal = loss_summary(trainer.sums(RoutingMode.causal(config, record=True)), data.domains)
        evaluation["causal"] = {"ce": causal["ce"], "bits_per_byte": causal["bits_per_byte"], "how": CAUSAL}
    capacity_sums = sums
    if config.moe.dispatch not in WITHOUT_DROPS:
        capacity_sums = trainer.sums(RoutingMode(config.moe.dispatch, config.moe.capacity_factor, record=True))
        evaluation["capacity"] = {"ce": loss_summary(capacity_sums, data.domains)["ce"],
                                  "drop_fraction": drop_fraction(capacity_sums),
                                  "capacity_factor": config.moe.capacity_factor}
    return evaluation, routing_arrays(sums, capacity_sums, config, data.domains)


def baselines(trainer: _Trainer, summary: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Unigram and bigram models of the same training text on the same validation targets; {} when streaming, and of an
    encoder–decoder, whose targets are no running text."""
    data = trainer.run.data
    if data.store is None or trainer.config.model.encoder_layers:
        return {}
    losses = ngram_losses(data.store.splits["train"], trainer.batches(), data.vocabulary.vocab_size)
    per_byte = summary["tokens"] / summary["bytes"] / math.log(2) if summary["bytes"] else None
    return {name: {"ce": loss, "bits_per_byte": loss * per_byte if per_byte else None} for name, loss in losses.items()}


def say_result(evaluation: dict[str, Any]) -> None:
    """One line: our loss beside the baselines'; and a warning where ours looked ahead."""
    def text(part):
        per_byte = part.get("bits_per_byte")
        return f"{part['ce']:.3f} nats per token" + (f" ({per_byte:.3f} bits per byte)" if per_byte else "")

    others = "".join(f"; {name} model {text(part)}" for name, part in evaluation["baselines"].items())
    log.info("Validation: %s%s", text(evaluation), others)
    if "causal" in evaluation:
        log.warning("That loss is not causal: its router saw later tokens. Routed causally: %s (%s)",
                    text(evaluation["causal"]), CAUSAL)
