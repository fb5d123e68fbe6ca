"""Models with int8 and int4 weights: schemes, the layer, whole models, checkpoints, memory."""
