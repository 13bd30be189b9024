"""Fine-tune a converted model with transformers' Trainer and peft's LoRA, merge, save, and load it again."""

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import linearize

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
model = linearize.convert_model(LlamaForCausalLM(config), method="default", options={"window": 8})

# `modules_to_save` trains the mixers too: all that is new in a layer is in its submodule `linearize`
lora = LoraConfig(
    r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], modules_to_save=["linearize"], task_type="CAUSAL_LM"
)
model = get_peft_model(model, lora)
rows = torch.randint(64, (8,)).repeat(64, 4)
examples = [{"input_ids": row, "labels": row} for row in rows]

with tempfile.TemporaryDirectory() as folder:
    settings = TrainingArguments(
        folder,
        max_steps=60,
        learning_rate=3e-2,
        logging_steps=20,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(model=model, args=settings, train_dataset=examples).train()
    merged = model.merge_and_unload()
    merged.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        print("the same after loading:", torch.equal(loaded.eval()(rows[:1]).logits, merged.eval()(rows[:1]).logits))
