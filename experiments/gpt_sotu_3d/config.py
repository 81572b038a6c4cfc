"""gpt_sotu cut in two directions at once: tensor 2 × pipe 2, so four ranks. The losses are gpt_sotu's, row for row."""

from research.config import GPT, Data, Experiment, Optimizer, Parallel, Schedule, Track

config = Experiment(
    question="Does gpt_sotu learn the same when its matrices are sliced over two ranks and its layers over two stages?",
    parent="gpt_sotu",
    model=GPT(
        num_layers=4,
        hidden_size=192,
        num_heads=6,
        num_kv_heads=6,
        ffn_size=768,
        vocab_size=8192,
        seq_length=128,
        norm="layernorm",
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
    parallel=Parallel(tensor=2, pipe=2, zero_stage=1),
    precision="fp32",
    track=Track(project="tessera"),
    seed=1,
)
