"""Load, check and save models: by name, from safetensors only, without code that comes with them."""
