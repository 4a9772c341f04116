"""How an optimizer step runs: schedules, offload, optimizers, clipping, gradient reduction."""
