"""Train a converted model and its indexers with transformers' Trainer: its loss, and the alignment loss beside it.

model = skim.load(model, "my-indexers")  # sparse, with trained indexers
AlignedTrainer(model, TrainingArguments("out"), train_dataset=dataset).train()
skim.save(model, "my-indexers-2")
"""

from transformers import Trainer

import skim


class AlignedTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with skim.record(model) as r:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        # A mean over the tokens of all accumulated batches is not divided by their number any more, so the alignment is here.
        parts = self.args.gradient_accumulation_steps if model.training and num_items_in_batch is not None else 1
        loss = loss + r.alignment / parts
        return (loss, outputs) if return_outputs else loss
