"""Local losses: what a block learns on its own, and the head it learns with (`AUX_LOSSES: dict[str, Any] = {"recon": Reconstruction, "next_token": NextToken}
"""The local losses by their name in `LoPTConfig.aux_loss`."""
