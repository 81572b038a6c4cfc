"""Layout-independent checkpoints: any layout writes them, any layout reads them. safetensors + JSON, no pickle (docs/checkpoints.md).

    saver = Saver()                                        # or BackgroundSaver(): all ranks, once
    saver.save(run / "checkpoints/step_000300", engine, {"step": 300, …})
    for saved in saver.poll(): …                           # after every step; wait() at the end
    if rank == 0: folder.retain(run / "checkpoints", keep_last=3, keep_every=1000)

    facts = load_checkpoint(folder.latest(run / "checkpoints"), engine)     # all ranks, before the next step
    changed = differences(facts, engine)                   # {}: layout and machine keep the run bit for bit
    load_initial(other / "checkpoints/step_000300", engine)                 # a new run that begins with another run's weights

    with Reader(path) as reader:                           # one process, any layout's checkpoint
        load_weights(module, reader, Grid())

Importing this package imports nothing else: `folder` and `manifest` must stay usable without torch.
"""
