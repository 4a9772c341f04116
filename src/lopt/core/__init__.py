"""The method: where gradients stop and what each block learns from."""
