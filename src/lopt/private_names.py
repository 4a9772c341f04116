"""Every private or version-dependent name of other libraries that lopt uses.

Each with what it is for and what breaks without it. All exist in the releases between the bounds of
pyproject.toml; tests/test_compat.py looks each of them up in what is installed, and finds private names used
anywhere else in the package. `lopt.compat` has the code that uses them.
"""

NAMES: dict[str, str] = {
    # -- transformers ----------------------------------------------------------------------------------------
    "transformers.utils.output_capturing:_active_collector": (
        "Where a running forward keeps the router logits it has captured so far. Without it a mixture of "
        "experts has no load balancing in its earlier blocks, and a recomputed layer is captured twice."
    ),
    "transformers.modeling_layers:GradientCheckpointingLayer.gradient_checkpointing": (
        "With `_gradient_checkpointing_func`, which `gradient_checkpointing_enable` sets on every layer: "
        "how the layer is recomputed. Without it reentrant checkpointing is not refused and gives no "
        "gradient behind a boundary, and before 5.23 a recomputed layer runs its hooks a second time."
    ),
    "transformers.masking_utils:find_packed_sequence_indices": (
        "Looks into position ids for packed rows. It cannot run on fake tensors, so nothing can be planned."
    ),
    "transformers.masking_utils:_ignore_causal_mask_sdpa": (
        "Looks into the mask to see whether it can be left out. It cannot run on fake tensors, so nothing "
        "can be planned."
    ),
    "transformers:PreTrainedConfig._attn_implementation": (
        "The attention kernel that a config names. Without it a model could make transformers run code "
        "from the hub."
    ),
    "transformers:PreTrainedConfig._experts_implementation": (
        "The same for the kernel of a mixture of experts."
    ),
    "transformers:Trainer._maybe_log_save_evaluate": (
        "Evaluates, saves and keeps the best metric after a step. Without it a run that was stopped "
        "during an evaluation cannot make up for it when it is resumed."
    ),
    "transformers:Trainer._tr_loss": "The sum of losses that it averages into the next log.",
    # -- trl -------------------------------------------------------------------------------------------------
    "trl.trainer.utils:_use_triton": (
        "Decides whether the fused LM head scores labelled positions only. Without it a CPU scores every "
        "position: 10.3 s instead of 3.6 s for 480 tokens of the packaged model, of which 220 have a "
        "label."
    ),
    "trl.trainer.utils:_ChunkedLogProbFunction": (
        "The fused LM head's autograd function. Without it the gradient of its matrix is summed in float32 "
        "as a whole and converted then: 2.0 GiB more for Qwen2.5-7B."
    ),
    "trl.kernels.chunked_logprob:_forward_tile": (
        "A tile of it in plain torch, see `lopt.losses.lm_head` and `fused_head_as_on_a_gpu`."
    ),
    "trl.kernels.chunked_logprob:_backward_tile": "The same for its backward.",
    "trl.kernels.chunked_logprob:_backward_kernel": "The same on a GPU.",
    "trl.kernels.chunked_logprob:_use_triton": "Where the kernels of tiles run.",
    "trl.kernels.chunked_logprob:_BLOCK_SIZE": "Columns of a tile that one program of a kernel takes.",
    "trl.kernels.chunked_logprob:_addmm_fp32": "The sum of products of a tile.",
    "trl.generation.vllm_generation:VLLMGeneration": (
        "Public. Its module makes vLLM's engine by the name `LLM`, without a number format, and keeps it as "
        "`llm`. Without them vLLM holds float32 weights in bfloat16, and a run ends in a traceback."
    ),
    "trl.generation.vllm_generation:VLLMGeneration._iter_named_params": (
        "Yields the weights that vLLM is sent. Without it the rounding of adapters, added and subtracted at "
        "every step, stays in the frozen weights."
    ),
    "trl.generation.vllm_generation:VLLMGeneration._weight_metadata": (
        "Names, dtypes and shapes of them, for which it would otherwise go through the weights of all "
        "processes of a pipeline once more."
    ),
    # -- torch -----------------------------------------------------------------------------------------------
    "torch.utils._python_dispatch:TorchDispatchMode": (
        "Sees every operator. Without it neither live bytes nor FLOPs can be counted."
    ),
    "torch._subclasses.fake_tensor:FakeTensorMode": (
        "Tensors with shapes and no memory. Without them nothing can be planned."
    ),
    "torch:Tensor._post_accumulate_grad_hooks": (
        "The order of these hooks. Without it a gradient that an optimizer uses up in one of them counts as "
        "an activation."
    ),
    "torch:UntypedStorage.resize_": (
        "Public, but replaced while live bytes are counted: FSDP frees weights by it, and no operator shows "
        "it. Without that, what FSDP has freed counts until its tensor is used again."
    ),
    "torch:Tensor._indices": "With `_values`, the parts of a sparse gradient. It counts by them.",
    "torch:Tensor._values": "See `_indices`.",
    "torch:ops.aten._scaled_dot_product_flash_attention_for_cpu": (
        "Attention on a CPU. Without its name it counts no FLOPs."
    ),
    "torch:ops.aten._scaled_dot_product_flash_attention_for_cpu_backward": "The same for its backward.",
    "torch.nn.parallel:DistributedDataParallel._set_params_and_buffers_to_ignore_for_model": (
        "Keeps earlier blocks out of DDP, whose reducer starts to listen after their backward is over. "
        "Without it DDP waits for gradients that never come."
    ),
    "torch.distributed.fsdp:FSDPModule._get_fsdp_state": (
        "With its `_state_ctx.iter_forward_root`, the module that a running forward of FSDP2 began with. A "
        "backward inside the forward ends it, and without putting it back every later layer counts as a "
        "forward of its own, whose weights are not gathered ahead."
    ),
    "torch.distributed.distributed_c10d:_get_default_store": (
        "The store by which ranks found each other. Without it they wait for a long write in a collective, "
        "which ends in a timeout."
    ),
    "torch.utils.data.dataloader:_MultiProcessingDataLoaderIter._try_get_data": (
        "The method in which the training process waits for a worker. Without it a worker that dies while "
        "it hands over a batch is reported as a lost connection."
    ),
    # -- datasets --------------------------------------------------------------------------------------------
    "datasets:Dataset._fingerprint": (
        "Hash of a data set's rows. Without it results made from other rows of the same number are not "
        "told apart."
    ),
    "datasets.formatting:_register_formatter": (
        "Gives a format a name. A data set with a named format keeps the columns that a map reads as they "
        "are; without it their types are guessed anew, which fails for tool calls with other arguments."
    ),
    # -- lm-eval ---------------------------------------------------------------------------------------------
    "lm_eval.tasks._factory:TaskFactory": (
        "Lays options over every task of a group; the public `TaskManager.load` does so for single tasks "
        "only. Without it MMLU cannot be read from local files."
    ),
}
"""Place of a name -> what it is for, and what breaks without it."""

OVERRIDES: dict[str, str] = {
    # -- transformers ----------------------------------------------------------------------------------------
    "transformers:Trainer._has_mixed_mesh_grads": (
        "Gradients are clipped by block also where they lie on several device meshes."
    ),
    "transformers:Trainer._get_output_dir": "Checkpoints are written in a folder beside their place first.",
    "transformers:Trainer._load_optimizer_and_scheduler": (
        "Heads and rollouts are resumed as well; optimizer state never passes through the GPU as a whole."
    ),
    "transformers:Trainer._load_best_model": "In a pipeline each process reads the weights of its blocks.",
    "transformers:Trainer._load_from_checkpoint": "The same.",
    "transformers:Trainer._save_rng_state": "In a pipeline one process writes the file.",
    "transformers:Trainer._load_rng_state": "A resumed run first evaluates, if that was left to do.",
    "transformers:Trainer._finalize_training": (
        "The same after the last step; offloaded weights are written back."
    ),
    "transformers:Trainer._move_model_to_device": "Offloaded weights stay in host memory.",
    "transformers:Trainer._prepare_inputs": (
        "The scale of the local losses; block-major prepares inputs once."
    ),
    "transformers:Trainer._push_from_checkpoint": "A checkpoint is pushed when it is known to be whole.",
    "transformers:Trainer._run_epoch": "Where stops begin to be noted instead of raised.",
    "transformers:Trainer._save": (
        "The output folder never holds half a model; arguments are JSON, not a pickle."
    ),
    "transformers:Trainer._save_checkpoint": "A checkpoint is whole or absent.",
    "transformers:Trainer._save_optimizer_and_scheduler": "Heads and rollouts are saved as well.",
    # -- trl -------------------------------------------------------------------------------------------------
    "trl:SFTTrainer._prepare_dataset": "Rows without a trainable token are counted, reported and left out.",
    "trl:SFTTrainer._name": "The trainer's name, for the model card (read).",
    "trl:SFTTrainer._tag_names": "Its tags, for the model card (read).",
    "trl:SFTTrainer._paper": "Its paper's citation, for the model card (read).",
    "trl:DPOTrainer._prepare_dataset": "What the chat template leaves out of the rows is counted.",
    "trl:DPOTrainer._precompute_ref_logps": "In a pipeline it waits until the blocks are in their places.",
    "trl:GRPOTrainer._generate_and_score_completions": (
        "Offloaded weights come in; stops are obeyed around rollouts."
    ),
    "trl:GRPOTrainer._calculate_rewards": "In a pipeline the last process computes them for all.",
    "trl:GRPOTrainer._get_per_token_logps_and_entropies": (
        "Old log-probabilities are those of the last process of a pipeline."
    ),
    "trl:GRPOTrainer._tokenize_prompts": "Prompts for the head warm-up, tokenized as for rollouts (called).",
    "trl:GRPOTrainer._step": "Number of the micro-batch, by which it finds its rollouts (read and written).",
    "trl:GRPOTrainer._metrics": "The share of a generation's groups whose rewards are equal (read).",
    "trl:GRPOTrainer._logs": "Rows of a generation with their advantages, of all ranks (read).",
    "trl:GRPOTrainer._buffered_inputs": "The rollouts, which belong to a checkpoint (read and written).",
}
"""Private methods that lopt's trainers override, and private members of TRL's that they use."""
