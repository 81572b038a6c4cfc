"""Layout-free checkpoints: written by any layout, read by any layout. safetensors + JSON, no pickle anywhere (docs/checkpoints.md).

    saver = Saver()                                        # or BackgroundSaver(): all ranks, once
    saver.save(run / "checkpoints/step_000300", engine, {"step": 300, …})
    for saved in saver.poll(): …                           # after every step; wait() at the end
    if rank == 0: folder.retain(run / "checkpoints", keep_last=3, keep_every=1000)

    facts = load_checkpoint(folder.latest(run / "checkpoints"), engine)     # all ranks, before the next step
    why = differences(facts, engine)                       # {} where the run goes on bit for bit
    load_initial(other / "checkpoints/step_000300", engine)                 # a new run that begins with another's weights

    with Reader(path) as reader:                           # one process, any layout's checkpoint
        load_weights(module, reader, Grid())

Importing this package imports nothing else: `folder` and `manifest` must stay usable without torch.
"""
