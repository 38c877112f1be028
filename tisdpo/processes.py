"""Several processes: every pair counts once, in the loss and in the metrics, however the processes share the pairs.

A loss that is the mean over the pairs of the global batch needs three things. The divisor is the number of pairs of all processes and
all accumulated batches. Pairs that accelerate repeats at the end of an epoch, so that all processes get equally many full batches, are
left out. And metrics are summed before they are divided, for the processes hold unequal numbers of pairs.
"""

import os
from collections import defaultdict

import torch
from torch import Tensor

from tisdpo.errors import InputError

REPEATED = "repeated"  # key of a batch that holds repeated rows only: it takes part in the collectives, and counts nothing


class GlobalBatches:
    """For a `transformers.Trainer`, to stand before it among the bases; it needs `_rows`, `_first` and `_items` of a batch.

    _rows(batch)         rows of the dataset that the batch holds (pairs, or sequences for SFT)
    _first(batch, rows)  the batch of its first rows
    _items(batch)        what the loss is divided by: pairs, or target tokens for SFT
    """

    loss_is_scaled_for_ga = True  # divided by the items of the whole accumulated, global batch; read by transformers from 5.19 on
    _forms_batches = False  # whether training batches are formed by tokens, and not by accelerate
    _ends_repeated = False  # whether this process's last training batch of an epoch is a repeated one, where accelerate does not know

    def __init__(self, *args, **kwargs):
        self._sums = {mode: defaultdict(lambda: [0.0, 0.0]) for mode in ("train", "eval")}  # of metrics, see `_add_metrics`
        super().__init__(*args, **kwargs)
        # transformers before 5.19 reads this, and else divides by the number of accumulated batches again (TRL before 1.15 says False)
        self.model_accepts_loss_kwargs = True

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimiser step, without repeated rows, and how many items they hold over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            batches[-1] = self._unrepeated(batches[-1], self._ends_repeated, self._remainder())
        items = torch.tensor(float(sum(self._items(batch) for batch in batches if REPEATED not in batch)), device=device)
        return batches, self.accelerator.reduce(items, "sum")

    def _remainder(self) -> int | None:
        """Rows in the last global training batch where accelerate does not know: of an epoch that goes on in its middle. Else None."""
        if self.accelerator.gradient_state.remainder >= 0 or self._forms_batches or self.args.dataloader_drop_last:
            return None
        split = self.args.accelerator_config.split_batches
        together = self._train_batch_size * (1 if split else self.accelerator.num_processes)
        return len(self.train_dataset) % together if hasattr(self.train_dataset, "__len__") else None

    def _prepare_input(self, data):
        """Moved to the device and not cast: DeepSpeed's format is that of the weights, while log-probs and token weights are float32."""
        return data.to(self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

    def _unrepeated(self, batch: dict, ends_repeated: bool = False, remainder: int | None = None) -> dict:
        """The last batch of an epoch without the rows that accelerate appended; other batches as they are."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader:
            return batch
        rows = real = self._rows(batch)
        remainder = state.remainder if remainder is None else remainder
        if ends_repeated:
            real = 0
        elif remainder > 0:  # rows of the dataset in the last global batch, of which the processes hold one part after the other
            real = min(max(remainder - self.accelerator.process_index * rows, 0), rows)
        if real == rows:
            return batch
        return self._first(batch, real) if real else {**self._first(batch, 1), REPEATED: True}

    def _share(self, loss: Tensor, inputs: dict, summed: bool) -> Tensor:
        """This process's part of the loss. summed: it is divided by the global count, while gradients are averaged over processes."""
        if REPEATED in inputs:
            loss = loss * 0.0  # still a backward, for other processes wait for its gradients
        return loss * self.accelerator.num_processes if summed else loss

    def get_eval_dataloader(self, eval_dataset=None):
        """The Trainer's, which with persistent workers keeps one loader for all rows without a name; rows given here get their own."""
        if eval_dataset is None or isinstance(eval_dataset, str):
            return super().get_eval_dataloader(eval_dataset)
        kept = getattr(self, "_eval_dataloaders", {})
        self._eval_dataloaders = {}
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self._eval_dataloaders = kept

    # Metrics

    def _add_metrics(self, mode: str, metrics: dict[str, Tensor], inputs: dict) -> None:
        """Sums and counts, on the device. A repeated batch adds nothing, but all processes know the same names."""
        for name, values in metrics.items():
            values = values.detach().reshape(-1)[: 0 if REPEATED in inputs else None]
            self._sums[mode][name][0] += values.sum()
            self._sums[mode][name][1] += values.numel()

    def _mean_metrics(self, mode: str) -> dict[str, float]:
        """Means over all batches since the last call and over all processes, each value once."""
        names = sorted(self._sums[mode])
        if not names:
            return {}
        sums = torch.tensor([[float(x) for x in self._sums[mode][name]] for name in names], device=self.args.device)
        total, count = self.accelerator.reduce(sums, "sum").unbind(1)
        self._sums[mode].clear()
        return dict(zip(names, (total / count.clamp(min=1)).tolist()))


def check_parallelism(model, accelerator) -> None:
    """InputError where the head is not where the tokens are, or a model or a launch splits single sequences or the vocabulary over
    processes, which the loss does not know."""
    if getattr(model, "hf_device_map", None):
        places = [x.weight.device for x in (model.get_input_embeddings(), model.get_output_embeddings())]
        if places[0] != places[1] or places[1].type == "meta":
            raise InputError(
                f"the model's embeddings are on {places[0]} and its head on {places[1]} (device_map; meta: offloaded), but the loss needs "
                'the head where the tokens are; load it with device_map={"": 0}, or share the work with accelerate (examples/accelerate)'
            )
    size = getattr(model, "_tp_size", None) or 1
    config = getattr(accelerator, "parallelism_config", None)
    if config is not None:
        size = max(size, config.non_data_parallel_size)
    if size > 1:
        raise InputError(
            f"the model is split over {size} processes by tensor or context parallelism, where no process has the whole head or the whole "
            "sequence; train with data parallelism only (examples/accelerate: DDP, FSDP2, ZeRO-2), without tp_plan, tp_size and cp_size"
        )


def check_whole_weights(args) -> None:
    """InputError where not every process gets the weights that scoring and copying the reference read before training."""
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        raise InputError(
            "tisdpo.TISDPOTrainer needs whole weights before training, which DeepSpeed ZeRO-3 splits at loading; use ZeRO-2 or FSDP2, or "
            "tisdpo.integrations.trl.TISDPOTrainer"
        )
    names = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    if all(os.environ.get(name, "false").lower() in ("1", "true") for name in names):
        raise InputError(
            "fsdp_cpu_ram_efficient_loading leaves all processes but one without weights, which tisdpo.TISDPOTrainer reads before "
            "training; set it to false in accelerate's configuration"
        )
