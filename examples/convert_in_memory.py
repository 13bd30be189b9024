"""Convert a model in memory, and generate: the state stays the same size however long the text."""

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import linearize

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
base = LlamaForCausalLM(config).eval()  # any transformers model of a supported family: AutoModelForCausalLM.from_pretrained(...)
calibration = torch.randint(256, (2, 128))  # token ids of some text

model = linearize.convert_model(base, method="default", options={"window": 16}, calibration=calibration)

for length in (32, 128, 512):
    cache = DynamicCache(config=model.config)
    model.generate(torch.randint(256, (1, length)), past_key_values=cache, max_new_tokens=16, do_sample=False, pad_token_id=0)
    print(f"{length + 16} tokens: {sum(layer.nbytes for layer in cache.layers)} bytes of state")
