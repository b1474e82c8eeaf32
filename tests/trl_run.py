"""The same fine-tune by TRL's SFTTrainer with PEFT's adapters: what tests and the benchmark hold `minilora tune` to."""

from pathlib import Path
from typing import Any

from minilora.tuning.batches import batches
from minilora.tuning.data import read_rows
from minilora.tuning.model import load_model, load_tokenizer
from minilora.tuning.templates import Encoded

WORDS = "{{ m.content }} <end>"  # what the assistant writes, in the help desk's template


def trainer(model: str, data: str, out: Path, *, steps: int, batch: int, lr: float, rank: int, alpha: float,
            start: str | None = None, seed: int = 0, callbacks: list | None = None, **more: Any) -> Any:
    """An SFTTrainer in fp32 on the CPU, without packing, dropout or warm-up, that sees the rows in our order.

    start: an adapter to begin from, so that both begin with the same numbers.
    """
    import datasets
    import peft
    import trl
    from torch.utils.data import SequentialSampler

    class InOrder(trl.SFTTrainer):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset)

        def compute_loss(self, *args, **kwargs):
            found = super().compute_loss(*args, **kwargs)
            self.losses.append((found[0] if isinstance(found, tuple) else found).item())  # its log rounds them
            return found

    tokenizer, net = load_tokenizer(model), load_model(model)
    tokenizer.chat_template = tokenizer.chat_template.replace(WORDS, f"{{% generation %}}{WORDS}{{% endgeneration %}}")
    tokenizer.backend_tokenizer.model.unk_token = "<pad>"  # TRL tries the template on words that the help desk lacks
    columns = [{"messages": list(row.messages)} for row in ordered(read_rows(data).rows, steps, batch, seed)]
    config = trl.SFTConfig(output_dir=str(out), per_device_train_batch_size=batch, max_steps=steps, learning_rate=lr,
                           lr_scheduler_type="linear", warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, bf16=False,
                           use_cpu=True, report_to=[], logging_steps=1, save_strategy="no", seed=seed, packing=False,
                           gradient_checkpointing=False, optim="adamw_torch", assistant_only_loss=True,
                           max_length=None, disable_tqdm=True, **more)
    if start is not None:
        net, settings = peft.PeftModel.from_pretrained(net, start, is_trainable=True), None
    else:
        settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", lora_dropout=0.0,
                                   task_type="CAUSAL_LM")
    InOrder.losses = []
    return InOrder(net, config, train_dataset=datasets.Dataset.from_list(columns), processing_class=tokenizer,
                   peft_config=settings, callbacks=callbacks)


def ordered(rows: tuple, steps: int, batch: int, seed: int) -> list:
    """The rows of every step of ours, one after the other: `batches` of markers that stand in their place says which."""
    marked = [Encoded(i, (0, i), (False, True)) for i in range(len(rows))]
    at = batches(marked, batch, seed, 0)
    return [rows[i] for step in range(steps) for i in at(step)[1][:, 0].tolist()]
