"""A small BERT on the State of the Union addresses: it predicts masked tokens from both sides. Trains in minutes on a laptop."""

from research.config import BERT, Data, Experiment, Masked, Optimizer, Parallel, Schedule, Track

config = Experiment(
    question="What can an encoder of 4 layers, which sees both sides, tell of a masked word in speeches that it has not read?",
    parent=None,
    model=BERT(
        num_layers=4,
        hidden_size=192,
        num_heads=6,
        ffn_size=768,
        vocab_size=8193,
        seq_length=128,
        token_types=2,
        sentence_head=True,
        norm_eps=1e-12,
        mlp="gelu",
        residual="pre_norm",
        init="gpt2",
        embedding_dropout=0.0,
        residual_dropout=0.0,
        mlp_dropout=0.0,
        attention_dropout=0.0,
    ),
    data=Data(
        train="builtin:state_of_the_union/train",
        validation="builtin:state_of_the_union/val",
        tokenizer="builtin:bpe-8192+mask",
        examples=Masked(rate=0.15, sentence_order=True),
    ),
    schedule=Schedule(steps=600, batch_size=16, micro_batch_size=8, validate_every=100, validate_tokens=4000),
    optimizer=Optimizer(
        lr=2e-3,
        betas=(0.9, 0.98),
        eps=1e-6,
        weight_decay=0.01,
        clip=1.0,
        decay="linear",
        warmup_steps=60,
        min_lr=0.0,
        label_smoothing=0.0,
    ),
    parallel=Parallel(),
    precision="fp32",
    track=Track(tags=("bert",)),
    seed=1,
)
