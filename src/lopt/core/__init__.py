"""The method. Read config, blocks, objective, boundaries, attach; then routers and warmup."""
