"""Watch and steer the Trainer of transformers: a small Llama learns the source of Python's own standard library.

    python examples/transformers_trainer.py

One callback is all that watching takes. What `report_to` names gets the curves.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from lightning_spectral.hugging_face import SpectralCallback

set_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))
folder = Path(sysconfig.get_paths()["stdlib"])
text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py"))[:40])
windows = torch.frombuffer(bytearray(text[: len(text) // 64 * 64]), dtype=torch.uint8).long().view(-1, 64)

trainer = Trainer(
    model,
    TrainingArguments("runs/transformers", max_steps=100, learning_rate=3e-3, report_to="none", save_strategy="no"),
    train_dataset=[{"input_ids": window, "labels": window} for window in windows],
    callbacks=[SpectralCallback(every_n_steps=20, auto_rescale=True, fuse_at_end=True)],
)
trainer.train()
for entry in trainer.state.log_history:
    if "spectral/ratio_median" in entry:
        print(f"step {entry['step']:>3}   ratio {entry['spectral/ratio_median']:.2f}")
trainer.save_model("runs/transformers/final")  # the scales are in its weights
