"""gpt_sotu with its norms replaced by a class of its own (variant.py): how an ablation in code is written."""

from research.config import GPT, Data, Experiment, Optimizer, Parallel, Schedule, Track

config = Experiment(
    question="Can a bounded curve, tanh, stand in for layer normalisation in a GPT this small?",
    parent="gpt_sotu",
    model=GPT(
        num_layers=4,
        hidden_size=192,
        num_heads=6,
        num_kv_heads=6,
        ffn_size=768,
        vocab_size=8192,
        seq_length=128,
        norm="variant:DynamicTanh",
        norm_eps=1e-5,
        position="learned",
        mlp="gelu",
        residual="pre_norm",
        init="gpt2",
        bias=True,
        qkv_bias=True,
        qk_norm=False,
        tied=True,
    ),
    data=Data(
        train="builtin:state_of_the_union/train",
        validation="builtin:state_of_the_union/val",
        tokenizer="builtin:bpe-8192",
    ),
    schedule=Schedule(steps=270, batch_size=16, micro_batch_size=8, validate_every=90),
    optimizer=Optimizer(
        lr=3e-3,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
        clip=1.0,
        decay="cosine",
        warmup_steps=30,
        min_lr=1e-4,
        label_smoothing=0.0,
    ),
    parallel=Parallel(tensor=1, pipe=1, zero_stage=1),
    precision="fp32",
    track=Track(project="tessera"),
    seed=1,
)
