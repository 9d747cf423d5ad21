"""Data-parallel training under torchrun: which rows are whose, and a trainer whose steps are those of one process."""

from __future__ import annotations

import atexit
import copy
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import MethodType
from typing import Any

import datasets
import torch
import torch.distributed as dist
from datasets.distributed import split_dataset_by_node
from jaxtyping import Float
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from sae_lens_multimodal.data.mixture import Mixture
from sae_lens_multimodal.data.raw import Ordered
from sae_lens_multimodal.data.sources import Rows
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.training.checkpoint import whole_folder
from sae_lens_multimodal.training.config import MultimodalSAERunnerConfig, check_token_shares
from sae_lens_multimodal.training.prompts import PromptSource
from sae_lens_multimodal.training.randomness import random_state
from sae_lens_multimodal.training.tokens import LabelledBatch
from sae_lens_multimodal.training.trainer import BatchProvider, MultimodalSAETrainer
from sae_lens_multimodal.training.tree_file import load_tree, save_tree

_OWN_STATE_NAME = "process_state.safetensors"


@dataclass(frozen=True)
class Processes:
    """How many processes train one SAE together, and which one this is."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process evaluates, saves and reports."""
        return self.rank == 0

    def own_folder(self, checkpoint: Path) -> Path:
        """Where this process keeps its part of a checkpoint: the first one in it, the others beside it."""
        return checkpoint if self.is_first else checkpoint.parent / f"rank-{self.rank}" / checkpoint.name

    def told_by_first(self, value: Any) -> Any:  # noqa: ANN401 - anything that is the same for all
        """What the first process says."""
        if self.count == 1 or not dist.is_initialized():
            return value
        told = [value]
        dist.broadcast_object_list(told)
        return told[0]

    def wait_for_all(self) -> None:
        """Go on when all processes have come so far."""
        if self.count > 1 and dist.is_initialized():
            dist.all_reduce(torch.zeros(1))


def join_processes() -> Processes:
    """Join the other processes that torchrun has started, if it has, until this one ends."""
    if dist.is_available() and not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(_leave)
    if dist.is_available() and dist.is_initialized():
        return Processes(dist.get_rank(), dist.get_world_size())
    return Processes()


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- settings and rows -----------------------------------------------------------------------------------------------


def config_of_process(cfg: MultimodalSAERunnerConfig[Any], processes: Processes) -> MultimodalSAERunnerConfig[Any]:
    """The settings as this process has them: its own GPU; only the first one reports.

    Raises:
        ConfigError: a setting needs a single process.
    """
    if processes.count == 1:
        return cfg
    if cfg.use_cached_activations:
        raise ConfigError("use_cached_activations is for one process: the cache gives one order; leave it out.")
    if cfg.train_batch_size_tokens % processes.count:
        raise ConfigError(
            f"train_batch_size_tokens is {cfg.train_batch_size_tokens}, which {processes.count} processes cannot share "
            f"equally; take a multiple of {processes.count}."
        )
    own = copy.copy(cfg)
    if cfg.device == "cuda":
        own.device = f"cuda:{os.environ.get('LOCAL_RANK', processes.rank)}"
        own.llm_device = own.device if cfg.llm_device in (None, "cuda") else cfg.llm_device
        own.act_store_device = own.device if cfg.act_store_device in (None, "cuda") else cfg.act_store_device
        torch.cuda.set_device(own.device)
    # SAE-Lens names a folder at random in each process
    own.checkpoint_path = processes.told_by_first(cfg.checkpoint_path)
    if not processes.is_first:
        own.progress = False
        own.output_path = None
        own.logger = replace(cfg.logger, log_to_wandb=False)
    return own


def store_config(cfg: MultimodalSAERunnerConfig[Any], processes: Processes) -> MultimodalSAERunnerConfig[Any]:
    """What this process's activations store is to give: its part of every batch.

    Raises:
        ConfigError: the part is too small for `token_shares`.
    """
    if processes.count == 1:
        return cfg
    own = copy.copy(cfg)
    own.train_batch_size_tokens = cfg.train_batch_size_tokens // processes.count
    own.training_tokens = cfg.training_tokens // processes.count
    check_token_shares(cfg.token_shares, own.train_batch_size_tokens)
    return own


def own_rows(source: PromptSource, processes: Processes) -> PromptSource:
    """The prompts of this process: no other has one of its training rows.

    Raises:
        ConfigError: there are fewer rows than processes.
    """
    if processes.count == 1:
        return source
    rows = source.training_rows
    numbers = None if source.numbers is None else source.numbers[processes.rank :: processes.count]
    if isinstance(rows, Mixture):
        members = tuple(replace(member, rows=_every_nth(member.rows, processes)) for member in rows.members)
        return replace(source, training_rows=replace(rows, members=members), numbers=numbers)
    return replace(source, training_rows=_every_nth(rows, processes), numbers=numbers)


def _every_nth(rows: Rows | Ordered, processes: Processes) -> Any:  # noqa: ANN401 - of the same kind as the rows
    if isinstance(rows, datasets.IterableDataset):
        return split_dataset_by_node(rows, rank=processes.rank, world_size=processes.count)
    if len(rows) < processes.count:
        raise ConfigError(f"{processes.count} processes cannot share {len(rows)} rows; start fewer or give more rows.")
    mine = range(processes.rank, len(rows), processes.count)
    if isinstance(rows, Ordered):
        return replace(rows, order=[rows.order[index] for index in mine])
    if isinstance(rows, datasets.Dataset):
        return rows.select(mine)
    return [rows[index] for index in mine]


# ---- the trainer -----------------------------------------------------------------------------------------------------


class DistributedSAETrainer(MultimodalSAETrainer):
    """Trains on the batches of all processes together, as one process would on all of them.

    torch's `DistributedDataParallel` averages the gradients. What SAE-Lens takes from a whole batch besides is taken
    from all processes' batches: BatchTopK's choice and threshold, which features fired, normalisation.
    """

    def __init__(self, *args: Any, processes: Processes, **settings: Any) -> None:  # noqa: ANN401 - passed on
        """See `MultimodalSAETrainer`; `cfg` counts the tokens of all processes."""
        super().__init__(*args, **settings)
        self.processes = processes
        self._asked_to_stop = False
        self.sae.to(self.cfg.device)
        _share_steps(self.sae)
        if isinstance(self.sae, BatchTopKTrainingSAE):
            _share_batchtopk(self.sae, processes)

    def request_stop(self) -> None:
        """Stop all processes after the same step."""
        self._asked_to_stop = True

    def step(self, batch: Float[Tensor, "n d"]) -> TrainStepOutput:
        """One training step on this process's part of a batch."""
        before, since = self.act_freq_scores.clone(), self.n_forward_passes_since_fired.clone()
        output = super().step(batch)
        self.n_training_samples += len(batch) * (self.processes.count - 1)
        # One message: how often each feature fired, and whether anyone is to stop.
        told = torch.cat([self.act_freq_scores - before, before.new_tensor([float(self._asked_to_stop)])])
        dist.all_reduce(told)
        fired, self.stop_requested = told[:-1], bool(told[-1] > 0)
        self.act_freq_scores = before + fired
        self.n_forward_passes_since_fired = torch.where(fired > 0, torch.zeros_like(since), since + 1)
        return output

    def save_checkpoint(
        self, checkpoint_name: str, base_path: Path | str | None = None, wandb_aliases: list[str] | None = None
    ) -> None:
        """Save a checkpoint: the first process what all share, last; each other one its place in its own rows."""
        base = base_path if base_path is not None else self.cfg.checkpoint_path
        if not self.processes.is_first and base is not None:
            own = self.processes.own_folder(Path(base) / checkpoint_name)
            with self.data_provider.paused(), whole_folder(own) as folder:
                waiting = [tuple(batch) for batch in self.data_provider.waiting()]
                save_tree(folder / _OWN_STATE_NAME, {"random": random_state(), "waiting": waiting})
                if self.save_checkpoint_fn is not None:
                    self.save_checkpoint_fn(checkpoint_path=folder)
        # Whoever finds the first process's part finds all.
        self.processes.wait_for_all()
        if self.processes.is_first:
            super().save_checkpoint(checkpoint_name, base_path, wandb_aliases)

    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        """Be where `save_checkpoint` was; the folder is the first process's."""
        super().load_trainer_state(checkpoint_path)
        if not self.processes.is_first:
            own = load_tree(self.processes.own_folder(Path(checkpoint_path)) / _OWN_STATE_NAME)
            self.data_provider.restore([LabelledBatch(*batch) for batch in own["waiting"]])
            self._random_state = own["random"]

    def finish(self) -> None:
        """Make the SAE what is to be saved, from the tokens of all processes."""
        super().finish()
        names = ("image", "text", "newline")
        seen = torch.tensor([self.tokens_seen[name] for name in names], device=self.cfg.device)
        dist.all_reduce(seen)
        counts = dict(zip(names, seen.tolist(), strict=True))
        self.tokens_seen.clear()
        self.tokens_seen.update(Counter({name: count for name, count in counts.items() if count}))

    def _estimate_normalisation(self) -> None:
        own = self.data_provider
        self.data_provider = BatchProvider(_of_all(own, self.processes))
        try:
            super()._estimate_normalisation()
        finally:
            self.data_provider = own

    def _labelled_batches(self) -> Iterator[LabelledBatch]:
        return _of_all(self.data_provider, self.processes)


def _of_all(provider: BatchProvider, processes: Processes) -> Iterator[LabelledBatch]:
    """The batches of all processes, joined."""
    for activations in provider:
        modality = provider.modality.to(activations.device)
        yield LabelledBatch(_gathered(activations, processes), _gathered(modality, processes).cpu())


def _gathered(mine: Tensor, processes: Processes) -> Tensor:
    everyones = [torch.empty_like(mine) for _ in range(processes.count)]
    dist.all_gather(everyones, mine.contiguous())
    return torch.cat(everyones)


class _Step(torch.nn.Module):
    """SAE-Lens's training step as a module's forward, which is what `DistributedDataParallel` wraps."""

    def __init__(self, sae: TrainingSAE[Any]) -> None:
        super().__init__()
        self.sae = sae

    def forward(self, step_input: TrainStepInput) -> TrainStepOutput:
        """The loss of one batch."""
        return type(self.sae).training_forward_pass(self.sae, step_input)


def _share_steps(sae: TrainingSAE[Any]) -> None:
    """Have the gradients of every step averaged over all processes, before SAE-Lens clips them."""
    shared = DistributedDataParallel(_Step(sae), broadcast_buffers=False, gradient_as_bucket_view=True)
    # As SAE-Lens itself replaces this method to compile it; kept out of the SAE's submodules, which it contains.
    vars(sae)["training_forward_pass"] = lambda step_input: shared(step_input)


def _share_batchtopk(sae: BatchTopKTrainingSAE, processes: Processes) -> None:
    sae.activation_fn = _SharedBatchTopK(sae.cfg.k, processes)

    def update_topk_threshold(self: BatchTopKTrainingSAE, acts_topk: Tensor) -> None:
        positive = acts_topk.detach()[acts_topk > 0]
        lowest = positive.min().double() if len(positive) else torch.tensor(torch.inf, dtype=torch.double)
        lowest = lowest.to(self.topk_threshold.device)
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        if torch.isfinite(lowest):
            rate = self.cfg.topk_threshold_lr
            self.topk_threshold = (1 - rate) * self.topk_threshold + rate * lowest

    vars(sae)["update_topk_threshold"] = MethodType(update_topk_threshold, sae)


class _SharedBatchTopK(torch.nn.Module):
    """BatchTopK over the batches of all processes: the largest activations of all stay, wherever they are."""

    def __init__(self, k: float, processes: Processes) -> None:
        super().__init__()
        self.k = k
        self._processes = processes

    def forward(self, x: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_sae"]:
        """Keep `k` activations a token on average over all processes."""
        acts = x.relu()
        count = int(self.k * acts.shape[:-1].numel() * self._processes.count)
        with torch.no_grad():
            # All that stay might be here, so as many as that are shown to the others.
            largest = acts.detach().flatten().topk(min(count, acts.numel()), sorted=False).values
            everyones = _gathered(largest, self._processes)
            lowest = everyones.topk(min(count, everyones.numel())).values[-1]
        return acts * (acts >= lowest)
